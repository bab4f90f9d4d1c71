"""ResNet and ResNeXt backbones, the feature pyramid, and the normalising of images.

ResNet: arXiv 1512.03385. ResNeXt: arXiv 1611.05431. FPN: arXiv 1612.03144.
Parameters have torchvision's names (`layer1.0.conv1.weight`). All images are RGB.

Letters: B images, H W height and width of images or features.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name: (blocks per stage, bottleneck blocks or basic ones, groups, width of a group in the first stage)
ARCHITECTURES = {
    "resnet18": ((2, 2, 2, 2), False, 1, 64),
    "resnet34": ((3, 4, 6, 3), False, 1, 64),
    "resnet50": ((3, 4, 6, 3), True, 1, 64),
    "resnet101": ((3, 4, 23, 3), True, 1, 64),
    "resnet152": ((3, 8, 36, 3), True, 1, 64),
    "resnext101_32x8d": ((3, 4, 23, 3), True, 32, 8),
    "resnext101_64x4d": ((3, 4, 23, 3), True, 64, 4),
}

# Mean and std that ImageNet weights were trained with: RGB, on the 0..255 scale. Detectron's (caffe) files
# have the std absorbed in conv1. detectron2 and mmdetection use these files with either of the two means, so
# a detector may choose the other one.
TORCHVISION_PIXELS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE_PIXELS = ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0))
BN_EPS = 1e-5  # added to the variance in every batch norm (torch's default)


# ---------------------------------------------------------------------------------------------- batch norm

class FixedStatsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses its stored mean and variance in training, too.

    Detection batches are too small for statistics of their own. `requires_grad` decides whether weight and
    bias train: FCOS freezes them, FSAF trains them.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def fold_norms(module: nn.Module) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Factor and offset per channel of every batch norm of the module that has fixed statistics.

    All norms share a few operators, so folding them anew in every pass costs next to nothing. Nothing is
    stored: after training, loading or moving the weights there is no old value to use by mistake.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, FixedStatsBatchNorm2d)]
    if not norms:
        return {}
    weight, bias = torch.cat([norm.weight for norm in norms] + [norm.bias for norm in norms]).chunk(2)
    mean, var = torch.cat([norm.running_mean for norm in norms] +
                          [norm.running_var for norm in norms]).chunk(2)
    scale = weight * (var + BN_EPS).rsqrt()
    offset = bias - mean * scale
    channels = [norm.num_features for norm in norms]
    return dict(zip(norms, zip(scale.split(channels), offset.split(channels))))


def conv_bn(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d,
            folded: dict[nn.Module, tuple[Tensor, Tensor]]) -> Tensor:
    """norm(conv(x)), in one pass if the norm is one of `folded`, from `fold_norms`.

    Such a norm is a factor and an offset per channel, which the convolution can apply. This saves one pass
    over the feature map, forward and backward, and its memory.
    """
    if norm not in folded:
        return norm(conv(x))
    scale, offset = folded[norm]
    return F.conv2d(x, conv.weight * scale[:, None, None, None], offset, conv.stride, conv.padding,
                    groups=conv.groups)


# ---------------------------------------------------------------------------------------------- ResNet

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18, -34).

    groups, group_width and caffe have no effect here: both blocks take the same arguments.
    """

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, groups: int, group_width: int,
                 caffe: bool, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(in_channels, planes, stride, norm)

    def forward(self, x: Tensor, folded: dict) -> Tensor:
        out = conv_bn(x, self.conv1, self.bn1, folded).relu_()
        out = conv_bn(out, self.conv2, self.bn2, folded)
        return out.add_(x if self.downsample is None else conv_bn(x, *self.downsample, folded)).relu_()


class Bottleneck(nn.Module):
    """A 1x1, a (grouped) 3x3 and a 1x1 convolution, and a shortcut (ResNet-50 and deeper, ResNeXt).

    caffe: the first 1x1 convolution has the stride (Detectron), instead of the 3x3 (torchvision).
    """

    expansion = 4

    def __init__(self, in_channels: int, planes: int, stride: int, groups: int, group_width: int,
                 caffe: bool, norm):
        super().__init__()
        width, out_channels = planes * group_width // 64 * groups, planes * self.expansion
        stride1, stride2 = (stride, 1) if caffe else (1, stride)
        self.conv1 = nn.Conv2d(in_channels, width, 1, stride1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride2, 1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride, norm)

    def forward(self, x: Tensor, folded: dict) -> Tensor:
        out = conv_bn(x, self.conv1, self.bn1, folded).relu_()
        out = conv_bn(out, self.conv2, self.bn2, folded).relu_()
        out = conv_bn(out, self.conv3, self.bn3, folded)
        return out.add_(x if self.downsample is None else conv_bn(x, *self.downsample, folded)).relu_()


def _shortcut(in_channels: int, out_channels: int, stride: int, norm) -> nn.Sequential | None:
    """A 1x1 convolution where a block changes the shape; None stands for the identity."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class Stage(nn.Sequential):
    """Residual blocks in a row."""

    def forward(self, x: Tensor) -> Tensor:
        folded = fold_norms(self)
        for block in self:
            x = block(x, folded)
        return x


class ResNet(nn.Module):
    """The stem and the four residual stages of a ResNet or ResNeXt.

    name: a key of ARCHITECTURES.
    caffe: where a bottleneck block has its stride, see `Bottleneck`.
    norm: "frozen" (fixed statistics, fixed weight and bias: FCOS), "affine" (fixed statistics, trained weight
        and bias: RetinaNet, FSAF) or "batch" (ordinary batch norm, for training from scratch).
    freeze_at: how many of [stem, layer1, ..., layer4] do not train, as in detectron2. The published recipes
        freeze 2, DeFRCN's freezes 3.

    forward: images (B, 3, H, W), normalised RGB -> the feature maps C2, C3, C4, C5, with strides 4, 8, 16, 32
    and `out_channels`. `last` is the number of stages to run; the features of the later ones are left out.
    """

    def __init__(self, name: str, caffe: bool = False, norm: str = "frozen", freeze_at: int = 2):
        super().__init__()
        if name not in ARCHITECTURES:
            raise ValueError(f"unknown backbone {name!r}; choose one of {', '.join(ARCHITECTURES)}")
        if norm not in ("frozen", "affine", "batch"):
            raise ValueError(f"unknown norm {norm!r}; choose frozen, affine or batch")
        blocks, bottleneck, groups, group_width = ARCHITECTURES[name]
        block = Bottleneck if bottleneck else BasicBlock
        make_norm = nn.BatchNorm2d if norm == "batch" else FixedStatsBatchNorm2d
        self.name, self.caffe = name, caffe
        self.out_channels = [planes * block.expansion for planes in (64, 128, 256, 512)]

        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = make_norm(64)
        in_channels = 64
        for i, planes in enumerate((64, 128, 256, 512)):
            stage = []
            for j in range(blocks[i]):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(block(in_channels, planes, stride, groups, group_width, caffe, make_norm))
                in_channels = planes * block.expansion
            setattr(self, f"layer{i + 1}", Stage(*stage))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

        if norm == "frozen":
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        stages = [nn.ModuleList([self.conv1, self.bn1]), self.layer1, self.layer2, self.layer3, self.layer4]
        for stage in stages[:freeze_at]:
            stage.requires_grad_(False)

    def forward(self, images: Tensor, last: int = 4) -> list[Tensor]:
        x = conv_bn(images, self.conv1, self.bn1, fold_norms(self.bn1)).relu_()
        x = F.max_pool2d(x, 3, 2, 1)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:last]:
            x = stage(x)
            features.append(x)
        return features


# ---------------------------------------------------------------------------------------------- FPN

class FPN(nn.Module):
    """Feature pyramid (FPN, Sec. 3) with coarser levels after P5.

    in_channels: channels of the maps of the backbone: C3, C4, C5, or C2 too.
    p6_from: "p5" (FCOS) or "c5" (RetinaNet, FSAF): P6 is a convolution of this map and P7 one of P6
        (arXiv 1708.02002, Sec. 4). "pool" (Faster R-CNN): P6 is every second cell of P5 (FPN, Sec. 4.1), and
        there is no P7.
    relu_before_p7: FCOS and RetinaNet's paper have this ReLU, mmdetection's RetinaNet and FSAF do not.

    forward: [C3, C4, C5] -> [P3, P4, P5, P6, P7], with strides 8 to 128 and `channels` channels each; with
    "pool" [C2, C3, C4, C5] -> [P2, P3, P4, P5, P6], with strides 4 to 64.
    """

    def __init__(self, in_channels: list[int], channels: int = 256, p6_from: str = "p5",
                 relu_before_p7: bool = True):
        super().__init__()
        self.p6_from, self.relu_before_p7 = p6_from, relu_before_p7
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        if p6_from != "pool":
            self.p6 = nn.Conv2d(channels if p6_from == "p5" else in_channels[-1], channels, 3, 2, 1)
            self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if p6_from == "pool":
                    nn.init.kaiming_uniform_(module.weight, a=1)  # Caffe2's XavierFill (detectron2)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features)]
        for i in range(len(merged) - 2, -1, -1):  # top-down pathway: each level adds the coarser one
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [output(feature) for output, feature in zip(self.output, merged)]
        if self.p6_from == "pool":
            return [*levels, F.max_pool2d(levels[-1], 1, 2)]
        p6 = self.p6(levels[-1] if self.p6_from == "p5" else features[-1])
        return [*levels, p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


# ---------------------------------------------------------------------------------------------- images

def normalise_images(images: Tensor, sizes: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std, and zeros outside each image.

    images: (B, 3, H, W) uint8 RGB; sizes: (B, 2) height and width of each image without padding, px;
    mean, std: (3, 1, 1). Returns (B, 3, H, W) float32. Raises ValueError for other types or shapes: images in
    0..1, or without a batch axis, would only be detected badly.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or sizes.ndim != 2:
        raise ValueError(f"images must be (B, 3, H, W) uint8, RGB in 0..255, with sizes (B, 2); these are "
                         f"{tuple(images.shape)} {images.dtype} with sizes {tuple(sizes.shape)}")
    # Published models were trained on images padded after normalising: padding is 0, not -mean / std.
    rows = torch.arange(images.shape[-2], device=images.device)[None, :] < sizes[:, :1]
    columns = torch.arange(images.shape[-1], device=images.device)[None, :] < sizes[:, 1:]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return (images.float() - mean) / std * inside

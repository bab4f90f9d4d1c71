"""ResNet / ResNeXt backbones, the feature pyramid, and readers for ImageNet weight files.

ResNet: arXiv 1512.03385. ResNeXt: arXiv 1611.05431. FPN: arXiv 1612.03144.
Parameters carry torchvision's names (`layer1.0.conv1.weight`), so its files load as they are. All images are
RGB; files whose first convolution expects BGR have its input channels flipped here, once, and nowhere else.
"""
import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# name: (blocks per stage, bottleneck?, groups, width of one group)
ARCHITECTURES = {
    "resnet18": ((2, 2, 2, 2), False, 1, 64),
    "resnet34": ((3, 4, 6, 3), False, 1, 64),
    "resnet50": ((3, 4, 6, 3), True, 1, 64),
    "resnet101": ((3, 4, 23, 3), True, 1, 64),
    "resnet152": ((3, 8, 36, 3), True, 1, 64),
    "resnext101_32x8d": ((3, 4, 23, 3), True, 32, 8),
    "resnext101_64x4d": ((3, 4, 23, 3), True, 64, 4),
}

# torchvision's IMAGENET1K_V1 files, the ones detection recipes start from. The name ends in the first 8
# digits of the file's SHA-256.
TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "resnext101_32x8d": "resnext101_32x8d-8ba56ff5.pth",
    "resnext101_64x4d": "resnext101_64x4d-173b62eb.pth",
}

# Mean and std in RGB, on the 0..255 scale, that a kind of ImageNet weights was trained with. Detectron's
# files have the std absorbed in conv1; detectron2 and mmdetection use them with either mean, so a detector
# may prefer the other.
TORCHVISION_PIXELS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
CAFFE_PIXELS = ((122.7717, 115.9465, 102.9801), (1.0, 1.0, 1.0))
BN_EPS = 1e-5  # of every batch norm here (torch default)
# Whose objects a weight file may hold beside tensors. getattr is how pickle names a method of theirs; like
# all of them it is read, never called.
FOREIGN_MODULES = ("mmengine.", "mmcv.", "mmdet.", "numpy.", "yacs.", "fvcore.", "argparse.Namespace",
                   "builtins.getattr", "__builtin__.getattr")


class WeightsError(ValueError):
    """A weight file is missing, damaged, or not what the model needs; the message says what to do."""


class FixedStatsBatchNorm2d(nn.BatchNorm2d):
    """Batch norm that uses its stored mean and variance in training, too.

    Detection batches are too small for statistics of their own. Whether weight and bias train is up to
    `requires_grad`: FCOS freezes them, FSAF trains them.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(x)); with fixed statistics the norm is a factor and an offset per channel, which the
    convolution takes over. That saves a pass over the feature map, forward and backward, and its memory."""
    if not isinstance(norm, FixedStatsBatchNorm2d):
        return norm(conv(x))
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return F.conv2d(x, conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale,
                    conv.stride, conv.padding, groups=conv.groups)


# ---------------------------------------------------------------------------------------------- ResNet

class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet-18, -34)."""

    expansion = 1

    def __init__(self, in_channels: int, planes: int, stride: int, groups: int, group_width: int,
                 caffe: bool, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, planes, 3, stride, 1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, 1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(in_channels, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(x, self.conv1, self.bn1).relu_()
        out = conv_norm(out, self.conv2, self.bn2)
        return out.add_(x if self.downsample is None else conv_norm(x, *self.downsample)).relu_()


class Bottleneck(nn.Module):
    """1x1, (grouped) 3x3 and 1x1 convolution with a shortcut; `caffe` puts the stride on the first 1x1."""

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

    def forward(self, x: Tensor) -> Tensor:
        out = conv_norm(x, self.conv1, self.bn1).relu_()
        out = conv_norm(out, self.conv2, self.bn2).relu_()
        out = conv_norm(out, self.conv3, self.bn3)
        return out.add_(x if self.downsample is None else conv_norm(x, *self.downsample)).relu_()


def _shortcut(in_channels: int, out_channels: int, stride: int, norm) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels))


class ResNet(nn.Module):
    """Features of the four residual stages.

    name: a key of ARCHITECTURES. caffe: stride 2 on the first 1x1 convolution of a stage (Detectron's R-50,
    R-101) instead of the 3x3. norm: "frozen" (fixed statistics, fixed affine: FCOS), "affine" (fixed
    statistics, trained affine: RetinaNet, FSAF) or "batch" (ordinary batch norm, for training from scratch).
    freeze_at: how many of [stem, layer1, ..., layer4] do not train, as in detectron2; the published recipes
    freeze 2.

    forward: images (B, 3, H, W) normalised RGB -> [C2, C3, C4, C5], strides 4, 8, 16, 32, channels
    `out_channels`; with `last` only the first so many.
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
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
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
        x = F.max_pool2d(conv_norm(images, self.conv1, self.bn1).relu_(), 3, 2, 1)
        features = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4)[:last]:
            x = stage(x)
            features.append(x)
        return features


# ---------------------------------------------------------------------------------------------- FPN

class FPN(nn.Module):
    """Feature pyramid P3..P7 from C3, C4, C5 (FPN Sec. 3; P6 and P7 as in RetinaNet, 1708.02002, Sec. 4).

    in_channels: channels of C3, C4, C5. p6_from: "p5" (FCOS) or "c5" (RetinaNet, FSAF). relu_before_p7: FCOS
    and the RetinaNet paper have it, mmdetection's RetinaNet and FSAF do not.
    forward: [C3, C4, C5] -> [P3, P4, P5, P6, P7], strides 8..128, `channels` each.
    """

    def __init__(self, in_channels: list[int], channels: int = 256, p6_from: str = "p5",
                 relu_before_p7: bool = True):
        super().__init__()
        self.p6_from, self.relu_before_p7 = p6_from, relu_before_p7
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.p6 = nn.Conv2d(channels if p6_from == "p5" else in_channels[-1], channels, 3, 2, 1)
        self.p7 = nn.Conv2d(channels, channels, 3, 2, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        merged = [lateral(feature) for lateral, feature in zip(self.lateral, features)]
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + F.interpolate(merged[i + 1], size=merged[i].shape[-2:], mode="nearest")
        levels = [output(feature) for output, feature in zip(self.output, merged)]
        p6 = self.p6(levels[-1] if self.p6_from == "p5" else features[-1])
        return [*levels, p6, self.p7(F.relu(p6) if self.relu_before_p7 else p6)]


def normalise_images(images: Tensor, sizes: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std, with zeros outside each image.

    images: (B, 3, H, W) uint8 or float RGB, sizes: (B, 2) height, width px, mean, std: (3, 1, 1).
    Returns float32. Published models were trained with images padded after normalising: padding is 0 here,
    not -mean / std.
    """
    rows = torch.arange(images.shape[-2], device=images.device)[None, :] < sizes[:, :1]
    columns = torch.arange(images.shape[-1], device=images.device)[None, :] < sizes[:, 1:]
    inside = (rows[:, :, None] & columns[:, None, :])[:, None]
    return (images.float() - mean) / std * inside


# ---------------------------------------------------------------------------------------- weight files

def load_imagenet(backbone: ResNet, path_or_name: str) -> tuple[tuple, tuple]:
    """Fill a backbone with ImageNet weights; the pixel mean and std they expect are returned.

    path_or_name: a file, or a key of ARCHITECTURES for torchvision's file (downloaded once, checksum
    verified). Files: torchvision `.pth`, Detectron / caffe2 `.pkl` (MSRA R-50, R-101, X-101-32x8d,
    X-101-64x4d, with fused or unfused batch norm), detectron2 `.pkl`, mmdetection's caffe `.pth`.
    Returns ((r, g, b) mean, (r, g, b) std) on the 0..255 scale. Raises WeightsError.
    """
    if path_or_name in TORCHVISION_FILES and path_or_name != backbone.name:
        raise WeightsError(f"--weights {path_or_name} does not fit the backbone {backbone.name}")
    path = imagenet_file(path_or_name)
    state = read_weight_file(path)
    _, bottleneck, groups, _ = ARCHITECTURES[backbone.name]
    if any(key.endswith(("_w", "_bn_s", "_bn_beta")) for key in state):
        state, caffe, bgr = _rename_caffe2(state), groups == 1, True
        pixels = TORCHVISION_PIXELS if backbone.name == "resnext101_32x8d" else CAFFE_PIXELS
    elif "stem.fc.weight" in state:  # detectron2's conversion of a torchvision file
        state, caffe, bgr, pixels = rename_detectron2_resnet(state), False, False, TORCHVISION_PIXELS
    elif "stem.conv1.weight" in state or "backbone.bottom_up.stem.conv1.weight" in state:
        state, caffe, bgr = rename_detectron2_resnet(state), groups == 1, True
        pixels = TORCHVISION_PIXELS if backbone.name == "resnext101_32x8d" else CAFFE_PIXELS
    elif "conv1.weight" in state and "fc.weight" in state:
        caffe, bgr, pixels = False, False, TORCHVISION_PIXELS
    elif "conv1.weight" in state:  # mmdetection removed the classifier when it converted the caffe files
        caffe = groups == 1 and bottleneck
        bgr = caffe or backbone.name == "resnext101_32x8d"
        pixels = CAFFE_PIXELS if caffe else TORCHVISION_PIXELS
    else:
        raise WeightsError(f"{path}: not an ImageNet ResNet (a whole detector goes to --init); it has keys "
                           f"like {sorted(state)[:3]}")
    if caffe != backbone.caffe and bottleneck:
        raise WeightsError(f"{path}: these weights are {'caffe' if caffe else 'pytorch'} style (stride on "
                           f"the {'first 1x1' if caffe else '3x3'} convolution): build the backbone with "
                           f"caffe={caffe} (train.py: {'add' if caffe else 'drop'} --caffe)")
    state = {key: value for key, value in state.items()
             if not key.startswith("fc.") and key != "conv1.bias"}
    if bgr and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    _load_matching(backbone, state, path)
    return pixels


def imagenet_file(path_or_name: str) -> Path:
    """The file itself, or torchvision's for a key of ARCHITECTURES, downloaded once. Raises WeightsError."""
    if path_or_name in TORCHVISION_FILES:
        return _download(TORCHVISION_FILES[path_or_name])
    if not Path(path_or_name).is_file():
        raise WeightsError(f"weights file {path_or_name} does not exist; give a path or one of "
                           f"{', '.join(TORCHVISION_FILES)}")
    return Path(path_or_name)


def read_weight_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` or Detectron `.pkl`. Raises WeightsError naming the file."""
    return tensors_in(read_file(path), path)


def read_file(path: str | Path):
    """What is in a `.pth` or `.pkl` file. Raises WeightsError naming it.

    Nothing in the file is executed: `.pth` is read with weights_only, `.pkl` with an unpickler that admits
    numpy arrays and builtins.
    """
    try:
        if str(path).endswith(".pkl"):
            with open(path, "rb") as file:
                return _NumpyUnpickler(file, encoding="latin1").load()
        with torch.serialization.safe_globals(_inert_globals(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        code = re.search(r"(?:GLOBAL|refused to load) (\S+)", str(error))
        # The type comes first because some of these errors have no message (EOFError of an empty file).
        reason = (f"it holds {code[1]}, which is code; of a model, save the state_dict()" if code else
                  f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
                  + "; empty, cut off, or not written by torch.save")
        raise WeightsError(f"{path}: cannot be read as weights ({reason})") from error


class _Inert:
    """Stands for an object of another code base beside its weights (a log, a config): keeps nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __init__(self, *_):
        pass

    def __setstate__(self, state):
        pass


def _inert_globals(path: str | Path) -> list[tuple[type, str]]:
    """The classes and functions of FOREIGN_MODULES that a file names, each to be read as `_Inert`."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # torch's format before 1.6, or not torch's at all
        return []
    return [(_Inert, name) for name in names if name.startswith(FOREIGN_MODULES)]


def tensors_in(content, path: str | Path) -> dict[str, Tensor]:
    """Tensors of what `read_file` gave, unwrapped from `state_dict` / `model` / `blobs`.

    Raises WeightsError naming the file.
    """
    for wrapper in ("state_dict", "model", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    return {key: torch.as_tensor(value) for key, value in content.items() if isinstance(key, str)
            and (isinstance(value, Tensor) or isinstance(value, np.ndarray) and value.dtype.kind in "fiu")}


class _NumpyUnpickler(pickle.Unpickler):
    """Unpickler for Detectron files: arrays and builtins only, so a hostile file cannot run code."""

    ALLOWED = {("numpy", "ndarray"), ("numpy", "dtype"), ("numpy.core.multiarray", "_reconstruct"),
               ("numpy._core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar"),
               ("numpy._core.multiarray", "scalar"), ("numpy.core.numeric", "_frombuffer"),
               ("numpy._core.numeric", "_frombuffer"), ("collections", "OrderedDict"), ("_codecs", "encode")}

    def find_class(self, module, name):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module, name)


def rename_mmdet_detector(state_dict: dict[str, Tensor], head: dict[str, str],
                          tower_layers: int) -> dict[str, Tensor]:
    """Weights of mmdetection's one-stage detectors (2.x and 3.x) under the names used here.

    head: {their name of a predictor: ours}. tower_layers: modules that one convolution of our towers takes
    (with norm and ReLU). Other keys keep their names.
    """
    neck = {"lateral_convs.0": "lateral.0", "lateral_convs.1": "lateral.1", "lateral_convs.2": "lateral.2",
            "fpn_convs.0": "output.0", "fpn_convs.1": "output.1", "fpn_convs.2": "output.2",
            "fpn_convs.3": "p6", "fpn_convs.4": "p7"}
    towers = {"cls_convs": "cls_tower", "reg_convs": "box_tower"}
    renamed = {}
    for key, value in state_dict.items():
        part, _, rest = key.removeprefix("module.").partition(".")
        if part == "backbone":
            renamed[f"backbone.{rest}"] = value
        elif part == "neck":
            name, _, leaf = rest.partition(".conv.")
            renamed[f"fpn.{neck.get(name, name)}.{leaf}"] = value
        elif part == "bbox_head":
            name, _, leaf = rest.partition(".")
            if name in towers:
                i, layer, leaf = leaf.split(".")
                leaf = f"{tower_layers * int(i) + (layer != 'conv')}.{leaf}"
            elif name == "scales":  # scales.0.scale
                leaf = leaf.removesuffix(".scale")
            name = towers.get(name) or head.get(name, name)
            renamed[f"head.{name}.{leaf}"] = value
        else:
            renamed[key] = value
    return renamed


def rename_torchvision_detector(state_dict: dict[str, Tensor], head_rules: list[tuple],
                                bn_eps: float) -> dict[str, Tensor]:
    """Weights of torchvision's one-stage detectors under the names used here.

    head_rules: `rename_keys` of the heads. bn_eps: what their batch norm adds to the variance, which is
    changed so that BN_EPS has the same effect.
    """
    renamed = complete_statistics(rename_keys(state_dict, [
        (r"^backbone\.body\.", "backbone."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.(0\.)?", r"fpn.lateral.\1."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.(0\.)?", r"fpn.output.\1."),
        (r"^backbone\.fpn\.extra_blocks\.", "fpn."), *head_rules]))
    for key in renamed:
        if key.endswith("running_var"):
            renamed[key] = renamed[key] + (bn_eps - BN_EPS)
    return with_pixels(renamed, TORCHVISION_PIXELS)


def rename_keys(state_dict: dict[str, Tensor], rules: list[tuple]) -> dict[str, Tensor]:
    """A state_dict in which of every key the first (pattern, replacement) that is found in it is applied."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key, hits = re.subn(pattern, replacement, key, count=1)
            if hits:
                break
        renamed[key] = value
    return renamed


def with_pixels(state_dict: dict[str, Tensor], pixels: tuple[tuple, tuple],
                bgr: bool = False) -> dict[str, Tensor]:
    """A detector's state_dict with pixel_mean and pixel_std (RGB); bgr: it saw BGR, conv1 is flipped."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in pixels)
    conv1 = state_dict.get("backbone.conv1.weight")
    if conv1 is None:
        raise WeightsError(f"a detector without a ResNet; it has keys like {sorted(state_dict)[:3]}")
    return {**state_dict, "pixel_mean": mean, "pixel_std": std,
            "backbone.conv1.weight": conv1.flip(1) if bgr else conv1}


def _download(file_name: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path, url = folder / file_name, TORCHVISION_URL + file_name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=file_name[-12:-4])
        except Exception as error:
            raise WeightsError(f"cannot download {url} ({error}). Without internet: fetch that file "
                               f"elsewhere and put it at {path}, or pass --weights FILE, or --weights none "
                               f"to start from scratch") from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(file_name[-12:-4]):
        raise WeightsError(f"{path}: damaged (SHA-256 starts with {digest[:8]}, not {file_name[-12:-4]}); "
                           f"delete it and run again")
    return path


def _rename_caffe2(blobs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Detectron's blob names (`res2_0_branch2a_w`) to torchvision's (`layer1.0.conv1.weight`).

    Fused files hold only scale and offset of each batch norm, as `complete_statistics` expects.
    """
    suffixes = {"_bn_s": ".weight", "_bn_b": ".bias", "_bn_gamma": ".weight", "_bn_beta": ".bias",
                "_bn_running_mean": ".running_mean", "_bn_running_var": ".running_var",
                "_bn_rm": ".running_mean", "_bn_riv": ".running_var"}
    state = {}
    for key, value in blobs.items():
        stem = re.fullmatch(r"(?:res_)?conv1(_w|_bn_\w+)", key)
        block = re.fullmatch(r"res(\d)_(\d+)_branch(1|2a|2b|2c)(_w|_bn_\w+)", key)
        if stem:
            prefix, number, suffix = "", "1", stem[1]
        elif block:
            prefix = f"layer{int(block[1]) - 1}.{block[2]}."
            number, suffix = {"1": "", "2a": "1", "2b": "2", "2c": "3"}[block[3]], block[4]
        else:
            continue  # the classifier, biases of convolutions in front of a batch norm, momentum blobs
        if suffix == "_w":
            state[prefix + (f"conv{number}" if number else "downsample.0") + ".weight"] = value
        elif suffix in suffixes:
            state[prefix + (f"bn{number}" if number else "downsample.1") + suffixes[suffix]] = value
    return complete_statistics(state)


def rename_detectron2_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """detectron2's names (`res2.0.conv1.norm.weight`) to torchvision's (`layer1.0.bn1.weight`)."""
    state = {}
    for key, value in weights.items():
        key = key.removeprefix("backbone.").removeprefix("bottom_up.").removeprefix("stem.")
        key = re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", key)
        key = re.sub(r"conv(\d)\.norm\.", r"bn\1.", key)
        key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        state[key] = value
    return complete_statistics({k: v for k, v in state.items() if re.match(r"conv1|bn1|layer\d", k)})


def complete_statistics(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Mean 0 and variance 1 - eps for a batch norm that has none: it is then exactly `x * weight + bias`."""
    for key in [k for k in state if re.search(r"(bn\d|downsample\.1)\.weight$", k)]:
        norm = key.removesuffix("weight")
        state.setdefault(norm + "running_mean", torch.zeros_like(state[key]))
        state.setdefault(norm + "running_var", torch.ones_like(state[key]) - BN_EPS)
        state.setdefault(norm + "num_batches_tracked", torch.tensor(0))
    return state


def _load_matching(backbone: ResNet, state: dict[str, Tensor], path):
    own = backbone.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    wrong = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in own
             if key in state and state[key].shape != own[key].shape]
    if missing or extra or wrong:
        raise WeightsError(f"{path}: does not fit {backbone.name}: {len(missing)} keys missing "
                           f"{missing[:3]}, {len(extra)} unknown {extra[:3]}, {len(wrong)} of another shape "
                           f"{wrong[:3]}")
    backbone.load_state_dict(state, strict=False)

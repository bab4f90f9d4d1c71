"""FCOS: Fully Convolutional One-Stage Object Detection
(arXiv 1904.01355; improved form: TPAMI, arXiv 2006.09214).

Every feature cell predicts class scores, the distances to the four sides of its object, and how
central it lies in it. `FCOS(original=True)` is the first form (R-50 1x: 36.6 AP in mmdetection), the
default the improved one (38.7 AP):

                    original                             improved
    positives       cells inside the box                 cells within 1.5 strides of its centre (and inside)
    box branch      exp, distances in pixels             ReLU, distances in strides
    box loss        -ln IoU                              GIoU
    centerness      predicted from the class tower       predicted from the box tower

Letters: B images, C classes, G gt objects (padded), L levels, P points of all levels, H W feature
height, width. Points of all levels are concatenated, finest level first, each in the row-major
order of `feature.flatten(2)`.
Where published implementations disagree a comment says `DIFFERS:`; the README lists them.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import (
    BN_EPS,
    CAFFE_PIXELS,
    FPN,
    TORCHVISION_PIXELS,
    ResNet,
    WeightsError,
    complete_statistics,
    normalise_images,
    rename_detectron2_resnet,
    rename_keys,
    rename_mmdet_detector,
    rename_torchvision_detector,
    with_pixels,
)
from ops import (
    best_pairs,
    cell_corners,
    final_detections,
    giou_loss,
    iou_loss,
    mean_over_ranks,
    sigmoid_focal_loss,
    torchvision_corners,
)

STRIDES = (8, 16, 32, 64, 128)  # P3..P7
LEVEL_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))  # max(l, t, r, b) in px, Sec. 3.2
CENTER_RADIUS = 1.5  # centre sampling of the improved form, in strides of the point's level
TOWER_CONVS = 4
GROUP_NORM_GROUPS = 32
PRIOR_PROB = 0.01  # score of every class at the start (RetinaNet, Sec. 3.3)
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
SCORE_THRESHOLD = 0.05  # on the class score alone, before the product with centerness
SCORE_THRESHOLD_TORCHVISION = 0.2  # on the square root of that product
PRE_NMS_TOP_K = 1000  # (point, class) pairs per level
NMS_THRESHOLD_ORIGINAL, NMS_THRESHOLD = 0.5, 0.6  # mmdetection's values of the two forms
MAX_DETECTIONS = 100
# mmdetection's improved recipe has detectron2's pixel mean, its original one Detectron's (both RGB here).
CAFFE_PIXELS_IMPROVED = ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0))


# ---------------------------------------------------------------------------------------------- head

class FCOSHead(nn.Module):
    """Two towers shared by all levels and three predictors (Sec. 3.2, Fig. 2).

    forward: L features (B, channels, H, W) -> logits (B, P, C), ltrb (B, P, 4), centerness logits (B, P),
    float32. ltrb is >= 0: pixels in the original form, strides of the point's level in the improved one.
    """

    def __init__(self, num_classes: int, channels: int = 256, original: bool = False,
                 tower_bias: bool = True):
        super().__init__()
        self.original = original
        self.cls_tower, self.box_tower = _tower(channels, tower_bias), _tower(channels, tower_bias)
        self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.ltrb = nn.Conv2d(channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.tensor(1.0)) for _ in STRIDES)  # s_i of Sec. 3.2
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_logits.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, ltrb, centerness = [], [], []
        for feature, scale in zip(features, self.scales):
            cls_feature, box_feature = self.cls_tower(feature), self.box_tower(feature)
            distance = self.ltrb(box_feature).float() * scale
            logits.append(self.cls_logits(cls_feature))
            ltrb.append(distance.exp() if self.original else distance.relu())
            centerness.append(self.centerness(cls_feature if self.original else box_feature))
        return _points_last(logits), _points_last(ltrb), _points_last(centerness).squeeze(-1)


def _tower(channels: int, bias: bool) -> nn.Sequential:
    layers = []
    for _ in range(TOWER_CONVS):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
                   nn.GroupNorm(GROUP_NORM_GROUPS, channels), nn.ReLU()]
    return nn.Sequential(*layers)


def _points_last(levels: list[Tensor]) -> Tensor:
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1).float()


# ---------------------------------------------------------------------------------------------- targets

def level_points(height: int, width: int, stride: int, device=None) -> Tensor:
    """Image position of every cell of one feature map (Sec. 3.1): (x * stride + stride // 2, ...).

    Returns (H*W, 2) float32 (x, y), pixels of the padded image, row-major.
    """
    return cell_corners(height, width, stride, stride, device) + stride // 2


def image_points(shapes: list[tuple[int, int]], device=None,
                 torchvision: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Points, strides and size ranges of all levels.

    shapes: (height, width) of the feature map of each level. torchvision: the points of its FCOS, see
    `torchvision_corners`. Returns points (P, 2) px, strides (P,) px and ranges (P, 2) px, float32.
    """
    points = (torchvision_corners(shapes, STRIDES[0], device) if torchvision else
              [level_points(*shape, stride, device) for shape, stride in zip(shapes, STRIDES)])
    strides, ranges = [], []
    for (height, width), stride, level_range in zip(shapes, STRIDES, LEVEL_RANGES):
        strides.append(torch.full((height * width,), float(stride), device=device))
        ranges.append(torch.tensor(level_range, device=device).expand(height * width, 2))
    return torch.cat(points), torch.cat(strides), torch.cat(ranges)


@torch.no_grad()
def fcos_targets(points: Tensor, strides: Tensor, ranges: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
                 original: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The object every point is responsible for (Sec. 3.1, 3.2).

    A point is a candidate of an object when it lies strictly inside the box (improved form: inside the part
    of the box within CENTER_RADIUS strides of its centre) and the box has the size of the point's level. Of
    several candidates the smallest box wins, of equal ones the first.

    points (P, 2), strides (P,), ranges (P, 2): from `image_points`. gt_boxes: (G, 4) px, gt_labels: (G,)
    int64, < 0 for padding and crowds, which no point sees; G may be 0.
    Returns labels (P,) int64, -1 = background; ltrb (P, 4) distances to the sides in px, 1 at background
    points; object index (P,) int64, -1 = background.
    """
    if gt_boxes.shape[0] == 0:  # a shape, not a value: argmin needs a column to look at
        gt_boxes, gt_labels = gt_boxes.new_zeros(1, 4), gt_labels.new_full((1,), -1)
    x, y = points[:, 0, None], points[:, 1, None]
    x1, y1, x2, y2 = gt_boxes.float().unbind(-1)
    ltrb = torch.stack((x - x1, y - y1, x2 - x, y2 - y), dim=-1)  # (P, G, 4)
    inside = ltrb.amin(-1) > 0
    if not original:
        reach = CENTER_RADIUS * strides[:, None]
        from_center = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
        inside &= from_center < reach
    size = ltrb.amax(-1)
    fits_level = (size >= ranges[:, :1]) & (size <= ranges[:, 1:])  # both ends count, as in mmdetection
    area = torch.where(inside & fits_level & (gt_labels >= 0), (x2 - x1) * (y2 - y1), math.inf)
    smallest, index = area.min(dim=1)

    positive = smallest < math.inf
    labels = torch.where(positive, gt_labels[index], -1)
    ltrb = ltrb.gather(1, index[:, None, None].expand(-1, 1, 4)).squeeze(1)
    return labels, torch.where(positive[:, None], ltrb, 1.0), torch.where(positive, index, -1)


def centerness_targets(ltrb: Tensor) -> Tensor:
    """How central a point is in its box: 1 in the middle, 0 on a side (Eq. 3).

    ltrb: (..., 4) > 0 in any unit: only ratios are used. Returns (...,) in [0, 1].
    """
    left_right, top_bottom = ltrb[..., 0::2], ltrb[..., 1::2]
    return torch.sqrt(left_right.amin(-1) / left_right.amax(-1) * (top_bottom.amin(-1) / top_bottom.amax(-1)))


# ---------------------------------------------------------------------------------------------- losses

def fcos_losses(logits: Tensor, ltrb: Tensor, centerness: Tensor, labels: Tensor, target_ltrb: Tensor,
                original: bool = False) -> dict[str, Tensor]:
    """Classification, box and centerness loss (Eq. 2, Sec. 3.3); their sum is the loss.

    logits (B, P, C), ltrb (B, P, 4), centerness (B, P): output of the head. labels (B, P), target_ltrb
    (B, P, 4): from `fcos_targets`, target_ltrb in the unit of ltrb. Without positives box and
    centerness are 0, with a graph.
    Returns {"cls", "box", "centerness"}, each () float32.
    """
    positive = labels >= 0
    # Background points enter with identical boxes: weight 0 alone would turn an infinite distance into NaN.
    ltrb = torch.where(positive[..., None], ltrb, 1.0)
    target_centerness = centerness_targets(target_ltrb)
    box_weight = target_centerness * positive
    # All ranks take part in this one reduction, also those without a positive point.
    num_pos, weight_sum = mean_over_ranks(torch.stack((positive.sum().float(), box_weight.sum())))
    num_pos = num_pos.clamp(min=1)

    one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    cls_loss = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA)
    # Around the origin instead of around its point: IoU and GIoU do not see the difference.
    pred_box, target_box = (torch.cat((-d[..., :2], d[..., 2:]), dim=-1) for d in (ltrb, target_ltrb))
    box_loss = iou_loss(pred_box, target_box) if original else giou_loss(pred_box, target_box)
    # Centerness has soft targets, so its loss cannot reach 0: values around 0.6 are normal.
    centerness_loss = F.binary_cross_entropy_with_logits(centerness, target_centerness, reduction="none")
    return {"cls": cls_loss.sum() / num_pos,
            "box": (box_loss * box_weight).sum() / weight_sum.clamp(min=1e-6),
            "centerness": (centerness_loss * positive).sum() / num_pos}


# ---------------------------------------------------------------------------------------------- decoding

def fcos_decode(points: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes (..., 4) px from points (..., 2) px and distances (..., 4) px (Eq. 1 backwards)."""
    return torch.cat((points - ltrb[..., :2], points + ltrb[..., 2:]), dim=-1)


def fcos_candidates(logits: Tensor, boxes: Tensor, centerness: Tensor, level_sizes: list[int],
                    score_threshold: float, torchvision: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into NMS: per level the PRE_NMS_TOP_K (point, class) pairs with the best class score.

    logits (P, C), boxes (P, 4) px, centerness logits (P,). level_sizes: points per level. Returns boxes
    (M, 4) px; scores (M,), class score x centerness, 0 where the class score is not above the threshold;
    labels (M,) int64. M does not depend on values. torchvision: the square root of that product is the score
    from the start.
    """
    scores, centerness = logits.sigmoid(), centerness.sigmoid()
    if torchvision:
        scores = (scores * centerness[:, None]).sqrt()
    point, labels, scores = best_pairs(scores, level_sizes, PRE_NMS_TOP_K, score_threshold)
    return boxes[point], scores if torchvision else scores * centerness[point], labels


def fcos_detections(logits: Tensor, boxes: Tensor, centerness: Tensor, level_sizes: list[int], height, width,
                    score_threshold: float, nms_threshold: float,
                    torchvision: bool = False) -> dict[str, Tensor]:
    """Detections of one image: `fcos_candidates` after NMS.

    height, width: of the image without padding. Returns {"boxes" (N, 4), "scores" (N,), "labels" (N,)
    int64}, best first; N may be 0.
    """
    candidates = fcos_candidates(logits, boxes, centerness, level_sizes, score_threshold, torchvision)
    return final_detections(*candidates, height, width, nms_threshold, MAX_DETECTIONS)


# ---------------------------------------------------------------------------------------------- model

class FCOS(nn.Module):
    """The detector.

    num_classes: without background. backbone, caffe, norm, freeze_at: see `backbone.ResNet`; caffe also
    chooses the pixel mean of Detectron's weights and std 1. original: the form in the table at the top.
    fpn_channels: a multiple of GROUP_NORM_GROUPS. tower_bias: of the convolutions in front of the group
    norms; by default as in mmdetection: in the improved form. torchvision: the points and scores of
    torchvision's FCOS, for its weights. score_threshold, nms_threshold: for inference; None is the form's
    published value.

    images (B, 3, H, W) uint8 RGB, each at the top left; sizes (B, 2) int64 height, width; gt_boxes (B, G, 4)
    px; gt_labels (B, G) int64, -1 = padding, -2 = crowd.
    train(): model(images, sizes, gt_boxes, gt_labels) -> {"cls", "box", "centerness"}, each ()
    eval():  model(images, sizes) -> B dicts {"boxes" (N, 4), "scores" (N,), "labels" (N,)}, best score first
    """

    divisor = 32  # what the sizes of a batch are rounded up to

    def __init__(self, num_classes: int, backbone: str = "resnet50", caffe: bool = False,
                 original: bool = False, norm: str = "frozen", freeze_at: int = 2, fpn_channels: int = 256,
                 tower_bias: bool | None = None, torchvision: bool = False,
                 score_threshold: float | None = None, nms_threshold: float | None = None):
        super().__init__()
        if score_threshold is None:
            score_threshold = SCORE_THRESHOLD_TORCHVISION if torchvision else SCORE_THRESHOLD
        if nms_threshold is None:
            nms_threshold = NMS_THRESHOLD_ORIGINAL if original else NMS_THRESHOLD
        self.original, self.torchvision = original, torchvision
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.backbone = ResNet(backbone, caffe, norm, freeze_at)
        self.fpn = FPN(self.backbone.out_channels[1:], fpn_channels, p6_from="p5", relu_before_p7=True)
        self.head = FCOSHead(num_classes, fpn_channels, original,
                             not original if tower_bias is None else tower_bias)
        pixels = (CAFFE_PIXELS if original else CAFFE_PIXELS_IMPROVED) if caffe else TORCHVISION_PIXELS
        for name, value in zip(("pixel_mean", "pixel_std"), pixels):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor | None = None,
                gt_labels: Tensor | None = None):
        outputs = self.network(images, sizes)
        return self.losses(outputs, gt_boxes, gt_labels) if self.training else self.detections(outputs, sizes)

    def network(self, images: Tensor, sizes: Tensor) -> dict:
        """Everything that is learned: head outputs of all points (see `FCOSHead`) and
        (height, width) of the levels."""
        images = normalise_images(images, sizes, self.pixel_mean, self.pixel_std)
        features = self.fpn(self.backbone(images)[1:])
        logits, ltrb, centerness = self.head(features)
        return {"logits": logits, "ltrb": ltrb, "centerness": centerness,
                "shapes": [tuple(feature.shape[-2:]) for feature in features]}

    def losses(self, outputs: dict, gt_boxes: Tensor, gt_labels: Tensor) -> dict[str, Tensor]:
        points, strides, ranges = image_points(outputs["shapes"], gt_boxes.device, self.torchvision)
        targets = [fcos_targets(points, strides, ranges, boxes, labels, self.original)
                   for boxes, labels in zip(gt_boxes, gt_labels)]
        labels, target_ltrb = (torch.stack(t) for t in zip(*(target[:2] for target in targets)))
        if not self.original:
            target_ltrb = target_ltrb / strides[:, None]
        return fcos_losses(outputs["logits"], outputs["ltrb"], outputs["centerness"], labels, target_ltrb,
                           self.original)

    def _decoded(self, outputs: dict) -> list[tuple]:
        """Of every image logits (P, C), boxes (P, 4) px, centerness (P,) and points per level."""
        points, strides, _ = image_points(outputs["shapes"], outputs["ltrb"].device, self.torchvision)
        ltrb = outputs["ltrb"] if self.original else outputs["ltrb"] * strides[:, None]
        level_sizes = [height * width for height, width in outputs["shapes"]]
        return [(*image, level_sizes) for image in
                zip(outputs["logits"], fcos_decode(points, ltrb), outputs["centerness"])]

    def candidates(self, outputs: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`fcos_candidates` of all images."""
        return [fcos_candidates(*image, self.score_threshold, self.torchvision)
                for image in self._decoded(outputs)]

    def detections(self, outputs: dict, sizes: Tensor) -> list[dict[str, Tensor]]:
        return [fcos_detections(*image, *size, self.score_threshold, self.nms_threshold, self.torchvision)
                for image, size in zip(self._decoded(outputs), sizes)]


# ---------------------------------------------------------------------------------- other people's weights
# Each reader gives a state_dict for a strict load, with the pixel mean and std the weights were trained with,
# in RGB: where they saw BGR, conv1 is flipped. A key that it does not know keeps its name.

def rename_mmdet(state_dict: dict[str, Tensor], caffe: bool | None = None,
                 original: bool | None = None) -> dict[str, Tensor]:
    """mmdetection's FCOS (2.x and 3.x), for the matching `FCOS`.

    original: the form; None: as published, the first where the towers have no bias. caffe: the style of the
    backbone; None is that of the published files: True for a ResNet, False for a ResNeXt. Raises WeightsError
    if it is another model.
    """
    head = {"conv_cls": "cls_logits", "conv_reg": "ltrb", "conv_centerness": "centerness"}
    renamed = rename_mmdet_detector(state_dict, head, tower_layers=3)
    if "head.centerness.weight" not in renamed or "backbone.layer1.0.conv2.weight" not in renamed:
        raise WeightsError(f"not an FCOS of mmdetection: it has keys like {sorted(state_dict)[:3]}")
    if original is None:
        original = "head.cls_tower.0.bias" not in renamed
    conv2 = renamed["backbone.layer1.0.conv2.weight"]
    if caffe is None:
        caffe = conv2.shape[0] == conv2.shape[1]  # no groups: a ResNet
    if not caffe:
        return with_pixels(renamed, TORCHVISION_PIXELS)
    return with_pixels(renamed, CAFFE_PIXELS if original else CAFFE_PIXELS_IMPROVED, bgr=True)


def rename_adelaidet(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """AdelaiDet's FCOS, for `FCOS(..., caffe=True)`; the backbone is Detectron's ResNet-50 or -101.

    Its scores are the square root of ours: the order of the detections is the same.
    """
    resnet = {key: value for key, value in state_dict.items() if key.startswith("backbone.bottom_up.")}
    renamed = {f"backbone.{key}": value for key, value in rename_detectron2_resnet(resnet).items()}
    renamed |= _rename_authors({key: value for key, value in state_dict.items() if key not in resnet},
                               r"backbone\.fpn_lateral", r"backbone\.fpn_output", 3,
                               r"backbone\.top_block\.", r"proposal_generator\.fcos_head\.")
    return with_pixels(renamed, CAFFE_PIXELS_IMPROVED, bgr=True)


def rename_first_fcos(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The authors' first repository, for `FCOS(..., caffe=True, tower_bias=True)`.

    Its two forms have the same keys: whether it is original=True only its name says ("imprv").
    """
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    for key in [key for key in state if key.endswith("running_var")]:
        state[key] = state[key] - BN_EPS  # its batch norm adds nothing to the variance
    state = rename_keys(state, [(r"^backbone\.body\.(stem\.)?", "backbone.")])
    renamed = _rename_authors(state, r"backbone\.fpn\.fpn_inner", r"backbone\.fpn\.fpn_layer", 2,
                              r"backbone\.fpn\.top_blocks\.", r"rpn\.head\.")
    return with_pixels(complete_statistics(renamed), CAFFE_PIXELS, bgr=True)


def _rename_authors(state: dict[str, Tensor], lateral: str, output: str, first: int, top: str,
                    head: str) -> dict[str, Tensor]:
    """What both repositories of the authors name alike, after these prefixes; first: their number of C3."""
    rules = [(lateral + r"(\d)", lambda match: f"fpn.lateral.{int(match[1]) - first}"),
             (output + r"(\d)", lambda match: f"fpn.output.{int(match[1]) - first}"),
             (top, "fpn."), (head + "bbox_tower", "head.box_tower"), (head + "bbox_pred", "head.ltrb"),
             (head + "ctrness", "head.centerness"), (head + r"scales\.(\d)\.scale", r"head.scales.\1"),
             (head, "head.")]
    return {key: value.reshape(()) if key.startswith("head.scales.") else value
            for key, value in rename_keys(state, rules).items()}


def rename_torchvision(state_dict: dict[str, Tensor], bn_eps: float = BN_EPS) -> dict[str, Tensor]:
    """torchvision's `fcos_resnet50_fpn`, for `FCOS(..., torchvision=True)`.

    bn_eps: of the batch norm they were used with; torchvision sets 0 for its published COCO weights.
    """
    renamed = rename_torchvision_detector(state_dict, [
        (r"^head\.classification_head\.conv\.", "head.cls_tower."),
        (r"^head\.classification_head\.", "head."),
        (r"^head\.regression_head\.conv\.", "head.box_tower."),
        (r"^head\.regression_head\.bbox_reg\.", "head.ltrb."),
        (r"^head\.regression_head\.bbox_ctrness\.", "head.centerness.")], bn_eps)
    return {**renamed, **{f"head.scales.{i}": torch.tensor(1.0) for i in range(len(STRIDES))}}

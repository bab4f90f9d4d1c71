"""FCOS: Fully Convolutional One-Stage Object Detection (arXiv 1904.01355; improved: TPAMI, arXiv 2006.09214).

Every feature cell predicts class scores, the distances to the four sides of its object, and its centerness.
`FCOS(80, original=True)` is the original form (R-50 1x: 36.6 AP in mmdetection). The default is the improved
form (38.7 AP):

                    original                           improved
    positives       points inside the box              points in the box and within 1.5 strides of its centre
    box branch      exp, distances in pixels           ReLU, distances in strides
    box loss        -ln IoU                            GIoU
    centerness      predicted from the class tower     predicted from the box tower

Letters: B images, C classes, G gt objects of one image (padded), L levels, P points over all levels,
H W feature height and width. Points are concatenated from the finest level to the coarsest, each level in the
row-major order of `feature.flatten(2)`.
`# DIFFERS:` marks where papers and published implementations disagree; docs/differences.md lists them.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import CAFFE_PIXELS, FPN, TORCHVISION_PIXELS, ResNet, normalise_images
from ops import (
    HUGE,
    box_area,
    final_detections,
    flatten_predictions,
    giou_loss,
    grid_points,
    iou_loss,
    mean_over_ranks,
    sigmoid_focal_loss,
    topk_candidates,
    with_padding_row,
)

STRIDES = (8, 16, 32, 64, 128)  # P3..P7
LEVEL_RANGES = ((-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8))  # max(l, t, r, b) in px, Sec. 3.2
CENTER_RADIUS = 1.5  # centre sampling of the improved form, in strides of the point's level
TOWER_CONVS = 4
GROUP_NORM_GROUPS = 32
PRIOR_PROB = 0.01  # score of every class at the start (RetinaNet, Sec. 3.3)
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
SCORE_THRESHOLD = 0.05  # on the class score alone, before the product with centerness
PRE_NMS_TOP_K = 1000  # (point, class) pairs per level
NMS_THRESHOLD_ORIGINAL, NMS_THRESHOLD = 0.5, 0.6  # mmdetection's values for the two forms
MAX_DETECTIONS = 100
# RGB mean and std for caffe weights in the improved form: mmdetection's recipe has detectron2's mean there,
# and Detectron's in the original form.
CAFFE_PIXELS_IMPROVED = ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0))


# ---------------------------------------------------------------------------------------------- head

class FCOSHead(nn.Module):
    """Two towers, shared by all levels, and three predictors (Sec. 3.2, Fig. 2).

    tower_bias: whether the convolutions of the towers have a bias. group_norm: whether a group norm follows
    each of them. initial_distance: bias of the four distances at the start.

    forward: L features (B, channels, H, W) -> class logits (B, P, C), ltrb (B, P, 4) >= 0 and centerness
    logits (B, P), float32. ltrb is in pixels in the original form, in strides of the point's level in the
    improved form.
    """

    def __init__(self, num_classes: int, channels: int = 256, original: bool = False,
                 tower_bias: bool = True, group_norm: bool = True, initial_distance: float = 0.0):
        super().__init__()
        self.num_classes, self.original = num_classes, original
        self.cls_tower, self.box_tower = (_tower(channels, tower_bias, group_norm) for _ in range(2))
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
        nn.init.constant_(self.ltrb.bias, initial_distance)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, ltrb, centerness = [], [], []
        for feature, scale in zip(features, self.scales):
            cls_feature, box_feature = self.cls_tower(feature), self.box_tower(feature)
            distance = self.ltrb(box_feature).float() * scale
            logits.append(self.cls_logits(cls_feature))
            ltrb.append(distance.exp() if self.original else distance.relu())
            centerness.append(self.centerness(cls_feature if self.original else box_feature))
        return (flatten_predictions(logits, self.num_classes), flatten_predictions(ltrb, 4),
                flatten_predictions(centerness, 1).squeeze(-1))


def _tower(channels: int, bias: bool, group_norm: bool) -> nn.Sequential:
    layers = []
    for _ in range(TOWER_CONVS):
        layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=bias),
                   nn.GroupNorm(GROUP_NORM_GROUPS, channels) if group_norm else nn.Identity(), nn.ReLU()]
    return nn.Sequential(*layers)


# ---------------------------------------------------------------------------------------------- targets

def level_points(height: int, width: int, stride: int, device=None) -> Tensor:
    """Centre in the image of every cell of one feature map (Sec. 3.1): stride // 2 + stride * (x, y).

    Returns (H*W, 2) float32 (x, y), pixels of the padded image, row-major.
    """
    return grid_points(height, width, stride, stride, device) + stride // 2


def all_points(shapes: list[tuple[int, int]], device=None) -> tuple[Tensor, Tensor, Tensor]:
    """Points of all levels with the stride and the size range of their level.

    shapes: (height, width) of each feature map.
    Returns points (P, 2) px, strides (P,) px and ranges (P, 2) px, float32.
    """
    points = torch.cat([level_points(*shape, stride, device) for shape, stride in zip(shapes, STRIDES)])
    strides, low, high = (
        torch.cat([torch.full((height * width,), float(value), device=device)
                   for (height, width), value in zip(shapes, values)])
        for values in (STRIDES, *zip(*LEVEL_RANGES)))
    return points, strides, torch.stack((low, high), dim=1)


@torch.no_grad()
def fcos_targets(points: Tensor, strides: Tensor, ranges: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
                 original: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The object that every point learns, and its distances to the sides (Sec. 3.1, 3.2).

    A point can learn an object if it lies strictly inside the box, and if its largest distance to a side is
    in the range of its level. In the improved form it must also lie within CENTER_RADIUS strides of the
    centre of the box. Among several objects the smallest area wins, among equal areas the first object.

    points (P, 2), strides (P,), ranges (P, 2): from `all_points`. gt_boxes: (..., G, 4) px; gt_labels:
    (..., G) int64, < 0 for padding and crowds, which no point learns. G may be 0.
    Returns labels (..., P) int64, -1 = background; ltrb (..., P, 4) px, 1 at background points; index of the
    object (..., P) int64, -1 = background.
    """
    gt_boxes, gt_labels = with_padding_row(gt_boxes.float(), gt_labels)
    point, corner1, corner2 = points[:, None], gt_boxes[..., None, :, :2], gt_boxes[..., None, :, 2:]
    left_top, right_bottom = point - corner1, corner2 - point  # (..., P, G, 2)
    inside = torch.minimum(left_top, right_bottom).amin(dim=-1) > 0
    if not original:
        from_center = (point - (corner1 + corner2) / 2).abs().amax(dim=-1)
        inside &= from_center < CENTER_RADIUS * strides[:, None]
    size = torch.maximum(left_top, right_bottom).amax(dim=-1)
    fits_level = (size >= ranges[:, :1]) & (size <= ranges[:, 1:])  # both ends count, as in mmdetection
    possible = inside & fits_level & (gt_labels >= 0)[..., None, :]
    smallest, index = torch.where(possible, box_area(gt_boxes)[..., None, :], HUGE).min(dim=-1)

    background = smallest == HUGE
    labels = gt_labels.gather(-1, index).masked_fill(background, -1)
    box = gt_boxes.gather(-2, index[..., None].expand(*index.shape, 4))
    ltrb = torch.cat((points - box[..., :2], box[..., 2:] - points), dim=-1)
    return labels, ltrb.masked_fill(background[..., None], 1.0), index.masked_fill(background, -1)


def centerness_targets(ltrb: Tensor) -> Tensor:
    """How central a point is in its box: 1 in the middle, 0 on a side (Eq. 3).

    ltrb: (..., 4) > 0. Any unit: only ratios are used. Returns (...,) in [0, 1].
    """
    left_right, top_bottom = ltrb[..., 0::2], ltrb[..., 1::2]
    return torch.sqrt(left_right.amin(-1) / left_right.amax(-1) * (top_bottom.amin(-1) / top_bottom.amax(-1)))


# ---------------------------------------------------------------------------------------------- losses

def fcos_losses(logits: Tensor, ltrb: Tensor, centerness: Tensor, labels: Tensor, target_ltrb: Tensor,
                original: bool = False, center_weights: bool = True) -> dict[str, Tensor]:
    """Classification, box and centerness loss (Eq. 2, Sec. 3.3); the loss is their sum.

    logits (B, P, C), ltrb (B, P, 4), centerness (B, P): outputs of the head. labels (B, P), target_ltrb
    (B, P, 4): from `fcos_targets`, target_ltrb in the unit of ltrb. center_weights: whether a positive point
    counts in "box" with its centerness target, or every one alike.
    "cls" and "centerness" are divided by the number of positives, "box" by the sum of its weights. Both
    normalisers are means over ranks.
    Returns {"cls", "box", "centerness"}, each () float32. Without positives "box" and "centerness" are 0, and
    still attached to the graph.
    """
    positive = labels >= 0
    # At background points the predicted distances become 1: an infinite one times a weight of 0 would be NaN.
    ltrb = torch.where(positive[..., None], ltrb, 1.0)
    target_centerness = centerness_targets(target_ltrb)
    # DIFFERS: Eq. 2 and torchvision have no weights; the authors' code and mmdetection have them.
    box_weight = (target_centerness if center_weights else 1.0) * positive
    # All ranks take part in this one reduction, also ranks without a positive point.
    num_pos, weight_sum = mean_over_ranks(torch.stack((positive.sum().float(), box_weight.sum())))
    num_pos = num_pos.clamp(min=1)

    one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    cls_loss = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA)
    # Boxes around the origin instead of around their points have the same IoU and GIoU.
    pred_box, target_box = (torch.cat((-d[..., :2], d[..., 2:]), dim=-1) for d in (ltrb, target_ltrb))
    box_loss = iou_loss(pred_box, target_box) if original else giou_loss(pred_box, target_box)
    # The targets are soft, so this loss cannot reach 0: values around 0.6 are normal.
    centerness_loss = F.binary_cross_entropy_with_logits(centerness, target_centerness, reduction="none")
    return {"cls": cls_loss.sum() / num_pos,
            "box": (box_loss * box_weight).sum() / weight_sum.clamp(min=1e-6),
            "centerness": (centerness_loss * positive).sum() / num_pos}


# ---------------------------------------------------------------------------------------------- decoding

def fcos_decode(points: Tensor, ltrb: Tensor) -> Tensor:
    """Boxes (..., 4) px from points (..., 2) px and distances (..., 4) px (Eq. 1 solved for the box)."""
    return torch.cat((points - ltrb[..., :2], points + ltrb[..., 2:]), dim=-1)


def fcos_candidates(logits: Tensor, boxes: Tensor, centerness: Tensor, level_sizes: list[int],
                    score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of one image for NMS: the PRE_NMS_TOP_K pairs of every level with the best class score.

    logits (P, C), boxes (P, 4) px, centerness logits (P,); level_sizes: points per level.
    Returns boxes (M, 4) px, scores (M,), labels (M,) int64. The score is class score x centerness, but 0 if
    the class score is not above score_threshold. M depends on shapes alone.
    """
    point, labels, scores = topk_candidates(logits.sigmoid(), level_sizes, PRE_NMS_TOP_K, score_threshold)
    return boxes[point], scores * centerness.sigmoid()[point], labels


# ---------------------------------------------------------------------------------------------- model

class FCOS(nn.Module):
    """The detector.

    num_classes: without background.
    backbone, caffe, norm, freeze_at: see `backbone.ResNet`. caffe also selects the pixel mean and std that
        caffe weights need.
    original: the form, see the table at the top of this file.
    fpn_channels: a multiple of GROUP_NORM_GROUPS.
    group_norm: see `FCOSHead`; mmdetection's configs without "gn-head" have none.
    tower_bias: see `FCOSHead`; None is mmdetection's choice, no bias in the original form with group norm.
    center_weights: see `fcos_losses`. initial_distance: see `FCOSHead`. From random weights a side can die
        with the published 0: if ReLU cuts it off at every point, it has no gradient and stays 0.
    score_threshold, nms_threshold: for inference; None is the published value of the form.

    images (B, 3, H, W) uint8 RGB, each at the top left; sizes (B, 2) int64 height, width; gt_boxes (B, G, 4)
    px; gt_labels (B, G) int64, -1 = padding, -2 = crowd.
    train(): model(images, sizes, gt_boxes, gt_labels) -> {"cls", "box", "centerness"}, each ()
    eval():  model(images, sizes) -> B dicts {"boxes" (N, 4), "scores" (N,), "labels" (N,)}, best score first
    """

    size_divisor = 32  # height and width of a batch are multiples of this

    def __init__(self, num_classes: int, backbone: str = "resnet50", caffe: bool = False,
                 original: bool = False, norm: str = "frozen", freeze_at: int = 2, fpn_channels: int = 256,
                 tower_bias: bool | None = None, group_norm: bool = True, center_weights: bool = True,
                 initial_distance: float = 0.0,
                 score_threshold: float = SCORE_THRESHOLD, nms_threshold: float | None = None):
        super().__init__()
        if nms_threshold is None:
            nms_threshold = NMS_THRESHOLD_ORIGINAL if original else NMS_THRESHOLD
        if tower_bias is None:
            tower_bias = not (original and group_norm)
        self.original, self.center_weights = original, center_weights
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections = MAX_DETECTIONS
        self.backbone = ResNet(backbone, caffe, norm, freeze_at)
        self.fpn = FPN(self.backbone.out_channels[1:], fpn_channels, p6_from="p5", relu_before_p7=True)
        self.head = FCOSHead(num_classes, fpn_channels, original, tower_bias, group_norm,
                             initial_distance)
        pixels = TORCHVISION_PIXELS
        if caffe:
            pixels = CAFFE_PIXELS if original else CAFFE_PIXELS_IMPROVED
        for name, value in zip(("pixel_mean", "pixel_std"), pixels):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor | None = None,
                gt_labels: Tensor | None = None):
        outputs = self.network(images, sizes)
        return self.losses(outputs, gt_boxes, gt_labels) if self.training else self.detections(outputs, sizes)

    def network(self, images: Tensor, sizes: Tensor) -> dict:
        """All layers: the three outputs of `FCOSHead`, and (height, width) of each level under "shapes"."""
        images = normalise_images(images, sizes, self.pixel_mean, self.pixel_std)
        features = self.fpn(self.backbone(images)[1:])
        logits, ltrb, centerness = self.head(features)
        return {"logits": logits, "ltrb": ltrb, "centerness": centerness,
                "shapes": [tuple(feature.shape[-2:]) for feature in features]}

    def points(self, shapes: list[tuple[int, int]], device=None) -> tuple[Tensor, Tensor, Tensor]:
        """`all_points`; a subclass may have its points elsewhere."""
        return all_points(shapes, device)

    def losses(self, outputs: dict, gt_boxes: Tensor, gt_labels: Tensor) -> dict[str, Tensor]:
        points, strides, ranges = self.points(outputs["shapes"], gt_boxes.device)
        labels, target_ltrb, _ = fcos_targets(points, strides, ranges, gt_boxes, gt_labels, self.original)
        if not self.original:
            target_ltrb = target_ltrb / strides[:, None]
        return fcos_losses(outputs["logits"], outputs["ltrb"], outputs["centerness"], labels, target_ltrb,
                           self.original, self.center_weights)

    def boxes(self, outputs: dict) -> Tensor:
        """Predicted boxes (B, P, 4), pixels of the padded image, not clipped."""
        points, strides, _ = self.points(outputs["shapes"], outputs["ltrb"].device)
        return fcos_decode(points, outputs["ltrb"] if self.original else outputs["ltrb"] * strides[:, None])

    def candidates(self, outputs: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`fcos_candidates` of every image; a subclass may score them in another way."""
        level_sizes = [height * width for height, width in outputs["shapes"]]
        return [fcos_candidates(*image, level_sizes, self.score_threshold)
                for image in zip(outputs["logits"], self.boxes(outputs), outputs["centerness"])]

    def detections(self, outputs: dict, sizes: Tensor) -> list[dict[str, Tensor]]:
        return [final_detections(*image, *size, self.nms_threshold, self.max_detections)
                for image, size in zip(self.candidates(outputs), sizes)]

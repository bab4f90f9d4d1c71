"""FSAF: Feature Selective Anchor-Free Module for Single-Shot Object Detection (arXiv 1903.00621).

Points near the centre of an object predict its class and the distances to its four sides, on every pyramid
level. The object trains on one level, the one where its loss is smallest now. Three forms:

    FSAF(80)                    the anchor-free branch alone, as in mmdetection (R-50 1x: 37.4 AP there)
    FSAF(80, joint=True)        the paper's form: the anchor-free branch and RetinaNet's on shared towers
    FSAF(80, anchor_only=True)  RetinaNet (arXiv 1708.02002)

Letters: B images, C classes, G gt objects of one image (padded), L levels, P points over all levels,
A anchors per point, N = P * A anchors, H W feature height and width. Points are concatenated from the finest
level to the coarsest, each level in the row-major order of `feature.flatten(2)`. The anchors of a point
follow each other.
`# DIFFERS:` marks where papers and published implementations disagree; docs/differences.md lists them.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbone import CAFFE_PIXELS, FPN, TORCHVISION_PIXELS, ResNet, normalise_images
from ops import (
    HUGE,
    box_area,
    cell_anchors,
    decode_boxes,
    encode_boxes,
    final_detections,
    flatten_predictions,
    grid_points,
    iou_loss,
    match_anchors,
    mean_over_ranks,
    place_anchors,
    sigmoid_focal_loss,
    topk_candidates,
    with_padding_row,
)

STRIDES = (8, 16, 32, 64, 128)  # P3..P7
SIZE_DIVISOR = 32  # padded height and width of an image, and of a batch, are multiples of this
TOWER_CONVS = 4
PRIOR_PROB = 0.01  # score of every class at the start (RetinaNet, Sec. 3.3)
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0

# ---- anchor-free branch
EFFECTIVE_SCALE = 0.2  # epsilon_e: side of the effective region, as a fraction of the side of the box
IGNORE_SCALE_JOINT = 0.5  # epsilon_i: the same for the ignore region
# DIFFERS: the paper has an ignore region around the effective region in every form. mmdetection's best
# anchor-free model has none: both scales are equal (R-50: 37.4 AP; 36.0 with the paper's
# scales).
IGNORE_SCALE = 0.2
# Nothing is learned in the middle of a crowd region (mmdetection): side of that part, as a fraction of the
# region's side.
CROWD_SCALE = 0.5
# DIFFERS: a region must cover this share of a cell's square, as in mmdetection: a large cell that touches the
# region belongs to it. In the paper the cells inside the projected region do.
MIN_COVERED = 0.01
NORMALIZER = 4.0  # S: unit of the predicted distances, in strides
# DIFFERS: start of the predicted distances, from mmdetection; the paper's is 0.1.
INITIAL_DISTANCE = 0.25
MIN_DISTANCE = 1e-4  # in training only: with a width or height of 0 the IoU has no gradient
NO_LOSS = 1e6  # stands for the loss of an object on a level where it has no effective cell
LAMBDA = 0.5  # weight of the anchor-free losses in the joint form

# ---- anchor-based branch (RetinaNet)
ANCHOR_SCALE = 4.0  # size of the smallest anchor in strides: 32 px on P3
OCTAVES = (0.0, 1 / 3, 2 / 3)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width
FOREGROUND_IOU, BACKGROUND_IOU = 0.5, 0.4

# ---- detection
SCORE_THRESHOLD = 0.05
PRE_NMS_TOP_K = 1000  # (point, class) or (anchor, class) pairs per level and branch
NMS_THRESHOLD = 0.5
MAX_DETECTIONS = 100


# ---------------------------------------------------------------------------------------------- head

class FSAFHead(nn.Module):
    """RetinaNet's two towers, shared by all levels, and two predictors for each branch.

    anchor_free, anchor_based: which branches there are.

    forward: L features (B, channels, H, W) -> dict of float32.
    Anchor-free: "logits" (B, P, C) and "tblr" (B, P, 4) >= 0, the distances to the top, bottom, left and
    right side in NORMALIZER strides. Anchor-based: "anchor_logits" (B, N, C), "anchor_deltas" (B, N, 4).
    """

    def __init__(self, num_classes: int, channels: int = 256, anchor_free: bool = True,
                 anchor_based: bool = False):
        super().__init__()
        self.num_classes, self.anchor_free, self.anchor_based = num_classes, anchor_free, anchor_based
        self.cls_tower, self.box_tower = _tower(channels), _tower(channels)
        if anchor_free:
            self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
            self.tblr = nn.Conv2d(channels, 4, 3, padding=1)
        if anchor_based:
            per_point = len(OCTAVES) * len(ASPECT_RATIOS)
            self.anchor_logits = nn.Conv2d(channels, per_point * num_classes, 3, padding=1)
            self.anchor_deltas = nn.Conv2d(channels, per_point * 4, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)
        for name, module in self.named_children():
            if name.endswith("logits"):
                nn.init.constant_(module.bias, -math.log((1 - PRIOR_PROB) / PRIOR_PROB))
        if anchor_free:
            nn.init.constant_(self.tblr.bias, INITIAL_DISTANCE)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        cls_features = [self.cls_tower(feature) for feature in features]
        box_features = [self.box_tower(feature) for feature in features]
        outputs = {}
        if self.anchor_free:
            outputs["logits"] = _predictions(self.cls_logits, cls_features, self.num_classes)
            outputs["tblr"] = _predictions(self.tblr, box_features, 4).relu()
        if self.anchor_based:
            outputs["anchor_logits"] = _predictions(self.anchor_logits, cls_features, self.num_classes)
            outputs["anchor_deltas"] = _predictions(self.anchor_deltas, box_features, 4)
        return outputs


def _tower(channels: int) -> nn.Sequential:
    layers = []
    for _ in range(TOWER_CONVS):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _predictions(predictor: nn.Conv2d, features: list[Tensor], size: int) -> Tensor:
    return flatten_predictions([predictor(feature) for feature in features], size)


# ------------------------------------------------------------------------------------------ points, anchors

def all_points(shapes: list[tuple[int, int]], device=None) -> tuple[Tensor, Tensor]:
    """Points of all levels, and the stride of their level.

    shapes: (height, width) of each feature map.
    Returns points (P, 2), pixels of the padded image, and strides (P,) px, float32.
    """
    # DIFFERS: a point is the upper left corner of its cell, as in mmdetection's FSAF and RetinaNet and in
    # torchvision's RetinaNet. The paper speaks of pixel locations only; some ports add half a stride.
    points = [grid_points(*shape, stride, stride, device) for shape, stride in zip(shapes, STRIDES)]
    strides = [torch.full((len(p),), float(stride), device=device) for p, stride in zip(points, STRIDES)]
    return torch.cat(points), torch.cat(strides)


def base_anchors() -> Tensor:
    """Anchors of one cell on every level, centred at the origin (RetinaNet, Sec. 4).

    Returns (L, A, 4) float32 px; all sizes of one aspect ratio come before the next ratio.
    """
    sizes = ANCHOR_SCALE * torch.tensor([2 ** octave for octave in OCTAVES])  # in strides
    return torch.stack([cell_anchors(stride * sizes, ASPECT_RATIOS).flatten(0, 1) for stride in STRIDES])


def all_anchors(base: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
    """Anchors of all levels around the points of `all_points`.

    base: (L, A, 4) px from `base_anchors`; shapes: (height, width) of each feature map. Returns (N, 4) px.
    """
    return torch.cat([place_anchors(anchors, grid_points(*shape, stride, stride, base.device))
                      for anchors, shape, stride in zip(base, shapes, STRIDES)])


def valid_points(points: Tensor, sizes: Tensor) -> Tensor:
    """Which points lie in each image after its own padding to SIZE_DIVISOR; the others learn nothing.

    points: (P, 2) px; sizes: (B, 2) height and width of each image without padding. Returns (B, P) bool.
    """
    padded = (sizes + SIZE_DIVISOR - 1) // SIZE_DIVISOR * SIZE_DIVISOR
    return (points < padded.flip(-1)[:, None]).all(dim=-1)


# ---------------------------------------------------------------------------------------------- targets

class AnchorFreeTargets(NamedTuple):
    """Assignment of points to G > 0 objects on all levels, before each object selects one."""
    gt_index: Tensor  # (..., P) int64: the object in whose effective region the point lies, -1 = none
    ignore_region: Tensor  # (..., P, G) bool: the point lies in the effective or ignore region of that object
    ignored: Tensor  # (..., P) bool: in the middle of a crowd or beyond the padding: learns nothing


@torch.no_grad()
def fsaf_targets(points: Tensor, strides: Tensor, gt_boxes: Tensor, gt_labels: Tensor, valid: Tensor,
                 effective_scale: float = EFFECTIVE_SCALE,
                 ignore_scale: float = IGNORE_SCALE) -> AnchorFreeTargets:
    """Effective and ignore regions of every object on every level (Sec. 3.2).

    A region is the box, shrunk around its centre. A point stands for the square with side `stride` around it
    and lies in a region that covers more than MIN_COVERED of this square. For the effective region the point
    must also lie strictly inside the box. An object may therefore have no effective point. With an area of
    (STRIDES[0] / 2) ** 2 px or less it never has one.
    Where effective regions overlap, the smallest area gets the point, among equal areas the first object.

    points (P, 2), strides (P,): from `all_points`. gt_boxes: (..., G, 4) px; gt_labels: (..., G) int64,
    -1 = padding, -2 = crowd; G may be 0. valid: (..., P) bool from `valid_points`.
    """
    gt_boxes, gt_labels = with_padding_row(gt_boxes.float(), gt_labels)
    label = gt_labels[..., None, :]
    crowd = _strictly_inside(points, _shrink(gt_boxes, CROWD_SCALE)) & (label == -2)
    ignored = ~valid | crowd.any(dim=-1)

    possible = (label >= 0) & valid[..., None]
    ignore_coverage = _cell_coverage(points, strides, _shrink(gt_boxes, ignore_scale))
    ignore_region = possible & (ignore_coverage > MIN_COVERED)
    effective_coverage = _cell_coverage(points, strides, _shrink(gt_boxes, effective_scale))
    effective = ignore_region & _strictly_inside(points, gt_boxes) & (effective_coverage > MIN_COVERED)
    # DIFFERS: objects compete for a point before they select a level, as in mmdetection. The larger one loses
    # the point even if the smaller one then trains on another level. In the paper only objects that train on
    # the same level compete.
    smallest, gt_index = torch.where(effective, box_area(gt_boxes)[..., None, :], HUGE).min(dim=-1)
    positive = (smallest < HUGE) & ~ignored

    # DIFFERS: the paper does not say what an effective point learns in the ignore region of another object of
    # the same class. As in mmdetection it is background, and this class is ignored there.
    another = torch.arange(gt_labels.shape[-1], device=gt_index.device) != gt_index[..., None]
    same_class = label == gt_labels.gather(-1, gt_index)[..., None]
    positive &= ~(ignore_region & another & same_class).any(dim=-1)
    return AnchorFreeTargets(gt_index.masked_fill(~positive, -1), ignore_region, ignored)


def _shrink(boxes: Tensor, scale: float) -> Tensor:
    """Boxes (..., 4) with the same centres and `scale` times the width and height."""
    corner1, corner2 = boxes[..., :2], boxes[..., 2:]
    center, half = (corner2 + corner1) / 2, (corner2 - corner1) / 2 * scale
    return torch.cat((center - half, center + half), dim=-1)


def _strictly_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether each point (P, 2) lies in each box (..., G, 4) and not on its sides: (..., P, G) bool."""
    point, boxes = points[:, None], boxes[..., None, :, :]
    return ((point > boxes[..., :2]) & (point < boxes[..., 2:])).all(dim=-1)


def _cell_coverage(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Share (..., P, G) of the square around each point that each box (..., G, 4) covers.

    The side of the square is the stride of the point.
    """
    half, boxes = strides[:, None] / 2, boxes[..., None, :, :]
    low = torch.maximum((points - half)[:, None], boxes[..., :2])
    high = torch.minimum((points + half)[:, None], boxes[..., 2:])
    side = (high - low).clamp(min=0)
    return side[..., 0] * side[..., 1] / strides[:, None] ** 2


def matched_targets(gt_index: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Label and box of the object that every point or anchor learns.

    gt_index: (B, P) int64, negative = no object; gt_boxes: (B, G, 4), gt_labels: (B, G), G > 0.
    Returns labels (B, P), -1 = no object, and boxes (B, P, 4), meaningless where there is no object.
    """
    index = gt_index.clamp(min=0)
    labels = gt_labels.gather(1, index).masked_fill(gt_index < 0, -1)
    return labels, gt_boxes.float().gather(1, index[..., None].expand(-1, -1, 4))


# ------------------------------------------------------------------------- losses of the anchor-free branch

def point_losses(logits: Tensor, boxes: Tensor, labels: Tensor,
                 target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss (B, P, C) and IoU loss (B, P) of every point, neither weighted nor reduced.

    logits (B, P, C), boxes (B, P, 4) px; labels (B, P), -1 = background, where the IoU loss is 0;
    target_boxes (B, P, 4) px.
    """
    one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    positive = labels >= 0
    # Background points get finite boxes: a zero gradient times an infinite distance would be NaN.
    boxes, target_boxes = (torch.where(positive[..., None], b, 1.0) for b in (boxes, target_boxes))
    cls_loss = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA)
    return cls_loss, torch.where(positive, iou_loss(boxes, target_boxes), 0.0)


@torch.no_grad()
def class_weights(ignore_region: Tensor, ignored: Tensor, labels: Tensor, gt_labels: Tensor,
                  num_classes: int) -> Tensor:
    """Weight of every class in the focal loss of every point.

    It is 0 for a class if the point lies in the ignore region of an object of that class, unless the point is
    positive for it. It is 0 for all classes if the point is ignored. Else it is 1.

    ignore_region (B, P, G), ignored (B, P): see `AnchorFreeTargets`; labels (B, P), -1 = background;
    gt_labels (B, G). Returns (B, P, C) float32.
    """
    classes = torch.arange(num_classes, device=labels.device)
    of_class = (gt_labels[..., None] == classes).float()  # (B, G, C); padding has no class
    ignored_class = (ignore_region.float() @ of_class > 0) & (labels[..., None] != classes)
    return (~(ignored_class | ignored[..., None])).float()


@torch.no_grad()
def level_losses(logits: Tensor, boxes: Tensor, targets: AnchorFreeTargets, gt_boxes: Tensor,
                 gt_labels: Tensor, level_sizes: list[int]) -> Tensor:
    """Focal + IoU loss of every object, averaged over its effective region, on every level (Eq. 1).

    logits (B, P, C); boxes (B, P, 4) px; targets of B images; gt_boxes (B, G, 4), gt_labels (B, G), G > 0;
    level_sizes: points per level. Returns (B, G, L); NO_LOSS where an object has no effective point.
    """
    # DIFFERS: the mean runs over the points that the object got, as in mmdetection. In the paper it runs over
    # the whole effective region. The focal loss of all classes counts; in one port only the object's class.
    labels, target_boxes = matched_targets(targets.gt_index, gt_boxes, gt_labels)
    cls_loss, box_loss = point_losses(logits, boxes, labels, target_boxes)
    weights = class_weights(targets.ignore_region, targets.ignored, labels, gt_labels, logits.shape[-1])
    point_loss = (cls_loss * weights).sum(dim=-1) + box_loss
    objects = torch.arange(gt_boxes.shape[1], device=gt_boxes.device)
    levels = zip(point_loss.split(level_sizes, dim=1), targets.gt_index.split(level_sizes, dim=1))
    means = []
    for loss, gt_index in levels:
        assigned = gt_index[..., None] == objects  # (B, points of the level, G)
        count = assigned.sum(dim=1)
        total = torch.where(assigned, loss[..., None], 0.0).sum(dim=1)
        means.append(torch.where(count > 0, total / count.clamp(min=1), NO_LOSS))
    return torch.stack(means, dim=-1)


def select_level(mean_loss: Tensor) -> Tensor:
    """Level on which each object trains: the one where it is easiest now (Eq. 2).

    mean_loss: (..., G, L) from `level_losses`. Returns (..., G) int64 in 0..L-1; of equal levels the finest.
    """
    return mean_loss.argmin(dim=-1)


def fsaf_losses(logits: Tensor, boxes: Tensor, targets: AnchorFreeTargets, gt_boxes: Tensor,
                gt_labels: Tensor, level_sizes: list[int],
                ignore_adjacent: bool = False) -> dict[str, Tensor]:
    """Focal loss and IoU loss of the anchor-free branch, with every object on the level that it selects.

    ignore_adjacent: the paper's rule for the other levels of an object, see below. The other arguments are
    those of `level_losses`. Both losses are divided by the number of positives, without any by the number of
    negatives. The numbers are means over ranks.
    Returns {"cls", "box"}, each () float32. Without positives "box" is 0, and still attached to the graph.
    """
    level = select_level(level_losses(logits, boxes, targets, gt_boxes, gt_labels, level_sizes))
    level_of_point = torch.cat([torch.full((size,), i, device=level.device)
                                for i, size in enumerate(level_sizes)])
    index = targets.gt_index.clamp(min=0)
    selected = (targets.gt_index >= 0) & (level.gather(1, index) == level_of_point)
    labels, target_boxes = matched_targets(torch.where(selected, targets.gt_index, -1), gt_boxes, gt_labels)
    ignore_region = targets.ignore_region
    if ignore_adjacent:
        # DIFFERS: the paper ignores the region of an object on its level and on the two levels beside it. On
        # the others it is background. mmdetection ignores it on all levels.
        ignore_region = ignore_region & ((level_of_point[:, None] - level[:, None]).abs() <= 1)
    weights = class_weights(ignore_region, targets.ignored, labels, gt_labels, logits.shape[-1])

    num_negative = ((targets.gt_index < 0) & ~targets.ignored).sum(dim=1).clamp(min=1).sum()
    # DIFFERS: the counts are means over ranks, so that N ranks equal one. mmdetection: each rank has its own.
    num_pos, num_negative = mean_over_ranks(torch.stack((selected.sum(), num_negative)).float())
    # Without any positive the divisor is the number of negatives, as in mmdetection: the loss stays small.
    normalizer = torch.where(num_pos > 0, num_pos, num_negative)
    cls_loss, box_loss = point_losses(logits, boxes, labels, target_boxes)
    return {"cls": (cls_loss * weights).sum() / normalizer, "box": box_loss.sum() / normalizer}


# ------------------------------------------------------------------------ losses of the anchor-based branch

def anchor_losses(logits: Tensor, deltas: Tensor, anchors: Tensor, match: Tensor, gt_boxes: Tensor,
                  gt_labels: Tensor) -> dict[str, Tensor]:
    """RetinaNet's focal loss and L1 loss, divided by the number of positive anchors (RetinaNet, Sec. 4).

    logits (B, N, C), deltas (B, N, 4), anchors (N, 4) px; match (B, N) from `match_anchors`;
    gt_boxes (B, G, 4), gt_labels (B, G), G > 0.
    Returns {"cls", "box"}, each () float32. Without positives "box" is 0, and still attached to the graph.
    """
    labels, target_boxes = matched_targets(match, gt_boxes, gt_labels)
    positive = match >= 0
    one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    # Background anchors get themselves as target boxes, so that the logarithms are finite.
    target_deltas = encode_boxes(torch.where(positive[..., None], target_boxes, anchors), anchors)
    # DIFFERS: L1, as in mmdetection's and torchvision's RetinaNet. Detectron, and with it the paper, has
    # smooth L1 with beta 1/9.
    box_loss = (deltas - target_deltas).abs().sum(dim=-1)
    cls_loss = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA).sum(dim=-1)
    # DIFFERS: positives of all images, mean over ranks, at least 1. In mmdetection each image counts at least
    # 1 and each rank has its own count; torchvision divides image by image.
    num_pos = mean_over_ranks(positive.sum().float()).clamp(min=1)
    return {"cls": torch.where(match > -2, cls_loss, 0.0).sum() / num_pos,
            "box": torch.where(positive, box_loss, 0.0).sum() / num_pos}


# ---------------------------------------------------------------------------------------------- decoding

def fsaf_decode(points: Tensor, strides: Tensor, tblr: Tensor) -> Tensor:
    """Boxes (..., P, 4) px from points (P, 2), strides (P,) and tblr (..., P, 4) in NORMALIZER strides."""
    top, bottom, left, right = (tblr * (NORMALIZER * strides[:, None])).unbind(-1)
    x, y = points.unbind(-1)
    return torch.stack((x - left, y - top, x + right, y + bottom), dim=-1)


# ---------------------------------------------------------------------------------------------- model

class AnchorFreeArguments(NamedTuple):
    """The arguments that `level_losses` and `fsaf_losses` share, in their order."""
    logits: Tensor
    boxes: Tensor
    targets: AnchorFreeTargets
    gt_boxes: Tensor
    gt_labels: Tensor
    level_sizes: list[int]


class FSAF(nn.Module):
    """The detector, in one of the three forms at the top of this file.

    num_classes: without background.
    backbone, caffe, norm, freeze_at: see `backbone.ResNet`. caffe also selects the pixel mean and std that
        caffe weights need.
    joint, anchor_only: the form.
    effective_scale, ignore_scale: sizes of the regions, as fractions of the box. By default ignore_scale is
        IGNORE_SCALE_JOINT in the joint form, else IGNORE_SCALE.
    ignore_adjacent: see `fsaf_losses`; by default in the joint form only.
    score_threshold, nms_threshold: for inference.

    images (B, 3, H, W) uint8 RGB, each at the top left; sizes (B, 2) int64 height, width; gt_boxes (B, G, 4)
    px; gt_labels (B, G) int64, -1 = padding, -2 = crowd.
    train(): model(images, sizes, gt_boxes, gt_labels) -> {"cls", "box"}, each (); in the joint form
             {"anchor_cls", "anchor_box", "free_cls", "free_box"}, the last two times LAMBDA
    eval():  model(images, sizes) -> B dicts {"boxes" (N, 4), "scores" (N,), "labels" (N,)}, best score first
    """

    size_divisor = SIZE_DIVISOR
    # The pyramid, see `backbone.FPN`; a subclass may have another one.
    p6_from = "c5"
    relu_before_p7 = False  # DIFFERS: as in mmdetection; RetinaNet's paper has a ReLU between P6 and P7.

    def __init__(self, num_classes: int, backbone: str = "resnet50", joint: bool = False,
                 anchor_only: bool = False, effective_scale: float = EFFECTIVE_SCALE,
                 ignore_scale: float | None = None, ignore_adjacent: bool | None = None, caffe: bool = False,
                 norm: str = "affine", freeze_at: int = 2, fpn_channels: int = 256,
                 score_threshold: float = SCORE_THRESHOLD, nms_threshold: float = NMS_THRESHOLD):
        super().__init__()
        if joint and anchor_only:
            raise ValueError("joint means both branches, anchor_only means one: give only one")
        if ignore_scale is None:
            ignore_scale = IGNORE_SCALE_JOINT if joint else IGNORE_SCALE
        if not 0 < effective_scale <= ignore_scale <= 1:
            raise ValueError(f"must be 0 < effective_scale <= ignore_scale <= 1, not effective_scale "
                             f"{effective_scale}, ignore_scale {ignore_scale}")
        self.joint, self.effective_scale, self.ignore_scale = joint, effective_scale, ignore_scale
        self.ignore_adjacent = joint if ignore_adjacent is None else ignore_adjacent
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections = MAX_DETECTIONS
        self.backbone = ResNet(backbone, caffe, norm, freeze_at)
        self.fpn = FPN(self.backbone.out_channels[1:], fpn_channels, self.p6_from, self.relu_before_p7)
        self.head = FSAFHead(num_classes, fpn_channels, anchor_free=not anchor_only,
                             anchor_based=joint or anchor_only)
        if self.head.anchor_based:  # a buffer, because weights may need others: torchvision's are rounded
            self.register_buffer("base_anchors", base_anchors())
        for name, value in zip(("pixel_mean", "pixel_std"), CAFFE_PIXELS if caffe else TORCHVISION_PIXELS):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor | None = None,
                gt_labels: Tensor | None = None):
        outputs = self.network(images, sizes)
        if self.training:
            return self.losses(outputs, sizes, gt_boxes, gt_labels)
        return self.detections(outputs, sizes)

    def network(self, images: Tensor, sizes: Tensor) -> dict:
        """All layers: the outputs of `FSAFHead`, and (height, width) of each level under "shapes"."""
        images = normalise_images(images, sizes, self.pixel_mean, self.pixel_std)
        features = self.fpn(self.backbone(images)[1:])
        return {**self.head(features), "shapes": [tuple(feature.shape[-2:]) for feature in features]}

    def anchors(self, shapes: list[tuple[int, int]]) -> Tensor:
        """`all_anchors`; a subclass may have its anchors elsewhere."""
        return all_anchors(self.base_anchors, shapes)

    def losses(self, outputs: dict, sizes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> dict[str, Tensor]:
        gt_boxes, gt_labels = with_padding_row(gt_boxes, gt_labels)
        anchor_free = anchor_based = {}
        if self.head.anchor_free:
            arguments = self.anchor_free_targets(outputs, sizes, gt_boxes, gt_labels)
            anchor_free = fsaf_losses(*arguments, self.ignore_adjacent)
        if self.head.anchor_based:
            anchors = self.anchors(outputs["shapes"])
            match = self.anchor_matches(anchors, outputs["shapes"], sizes, gt_boxes, gt_labels)
            anchor_based = anchor_losses(outputs["anchor_logits"], outputs["anchor_deltas"], anchors, match,
                                         gt_boxes, gt_labels)
        if not self.joint:
            return anchor_free or anchor_based
        return {"anchor_cls": anchor_based["cls"], "anchor_box": anchor_based["box"],
                "free_cls": LAMBDA * anchor_free["cls"], "free_box": LAMBDA * anchor_free["box"]}

    def anchor_free_targets(self, outputs: dict, sizes: Tensor, gt_boxes: Tensor,
                            gt_labels: Tensor) -> AnchorFreeArguments:
        """Targets of the anchor-free branch and all else that its losses need. gt_boxes: (B, G, 4), G > 0."""
        points, strides = all_points(outputs["shapes"], gt_boxes.device)
        targets = fsaf_targets(points, strides, gt_boxes, gt_labels, valid_points(points, sizes),
                               self.effective_scale, self.ignore_scale)
        boxes = fsaf_decode(points, strides, outputs["tblr"].clamp(min=MIN_DISTANCE))
        level_sizes = [height * width for height, width in outputs["shapes"]]
        return AnchorFreeArguments(outputs["logits"], boxes, targets, gt_boxes, gt_labels, level_sizes)

    def anchor_matches(self, anchors: Tensor, shapes: list[tuple[int, int]], sizes: Tensor, gt_boxes: Tensor,
                       gt_labels: Tensor) -> Tensor:
        """`match_anchors` of every image (B, N); an anchor is valid if its point is."""
        valid = valid_points(all_points(shapes, sizes.device)[0], sizes)
        valid = valid.repeat_interleave(self.base_anchors.shape[1], dim=1)
        return match_anchors(anchors, gt_boxes, gt_labels, FOREGROUND_IOU, BACKGROUND_IOU, valid)

    def candidates(self, outputs: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Candidates of every image for NMS: the PRE_NMS_TOP_K best pairs of every level of every branch.

        Returns boxes (M, 4) px, scores (M,), labels (M,) int64 for each image. A score that is not above
        score_threshold becomes 0. M depends on shapes alone.
        """
        level_sizes = [height * width for height, width in outputs["shapes"]]
        branches = []  # logits (B, rows, C), boxes (B, rows, 4), rows per level; rows: points or anchors
        if self.head.anchor_free:
            points, strides = all_points(outputs["shapes"], outputs["tblr"].device)
            branches.append((outputs["logits"], fsaf_decode(points, strides, outputs["tblr"]), level_sizes))
        if self.head.anchor_based:
            boxes = decode_boxes(outputs["anchor_deltas"], self.anchors(outputs["shapes"]))
            per_point = self.base_anchors.shape[1]
            branches.append((outputs["anchor_logits"], boxes, [size * per_point for size in level_sizes]))
        found = []
        for i in range(len(branches[0][0])):
            parts = []
            for logits, boxes, rows in branches:
                row, labels, scores = topk_candidates(logits[i].sigmoid(), rows, PRE_NMS_TOP_K,
                                                      self.score_threshold)
                parts.append((boxes[i][row], scores, labels))
            found.append(tuple(torch.cat(part) for part in zip(*parts)))
        return found

    def detections(self, outputs: dict, sizes: Tensor) -> list[dict[str, Tensor]]:
        """One class-wise NMS for the candidates of all levels and branches."""
        return [final_detections(*image, *size, self.nms_threshold, self.max_detections)
                for image, size in zip(self.candidates(outputs), sizes)]

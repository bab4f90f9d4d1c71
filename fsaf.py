"""FSAF: Feature Selective Anchor-Free Module for Single-Shot Object Detection (arXiv 1903.00621).

Every object is tried on every pyramid level on which a cell lies near its centre, and learned on the one
where its loss is smallest. These cells predict its class and the distances to its four sides. Three forms:

    FSAF(80)                    the anchor-free branch alone, as in mmdetection (R-50 1x: 37.4 AP there)
    FSAF(80, joint=True)        the paper's module: that branch and RetinaNet's on shared towers
    FSAF(80, anchor_only=True)  RetinaNet (arXiv 1708.02002)

Letters: B images, C classes, G gt objects (padded), L levels, P points of all levels, A anchors per point,
N = P * A anchors, H W feature height, width. Points of all levels are concatenated, finest level first,
each in the row-major order of `feature.flatten(2)`; the anchors of a point follow each other.
`# DIFFERS:` marks where the paper and published implementations disagree; the README lists them.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbone import (
    BN_EPS,
    CAFFE_PIXELS,
    FPN,
    TORCHVISION_PIXELS,
    ResNet,
    WeightsError,
    normalise_images,
    rename_mmdet_detector,
    rename_torchvision_detector,
    with_pixels,
)
from ops import (
    best_pairs,
    box_area,
    cell_corners,
    decode_boxes,
    encode_boxes,
    final_detections,
    iou_loss,
    match_anchors,
    mean_over_ranks,
    sigmoid_focal_loss,
    torchvision_corners,
)

STRIDES = (8, 16, 32, 64, 128)  # P3..P7
TOWER_CONVS = 4
PRIOR_PROB = 0.01  # score of every class at the start (RetinaNet, Sec. 3.3)
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0

# ---- anchor-free branch
EFFECTIVE_SCALE = 0.2  # epsilon_e: side of the effective region over the box's
IGNORE_SCALE_JOINT = 0.5  # epsilon_i: likewise of the ignore region
# DIFFERS: the paper has an ignore ring in every form. mmdetection's best anchor-free model has none: ignore
# scale = effective scale (R-50: 37.4 AP, with the ring 36.0).
IGNORE_SCALE = 0.2
CROWD_SCALE = 0.5  # of a crowd region, the part in which nothing is learned (mmdetection)
# DIFFERS: share of a cell's square that a region must cover, as in mmdetection: a large cell that touches the
# region counts. In the paper the cells inside the projected region do.
MIN_COVERED = 0.01
NORMALIZER = 4.0  # S: the unit of the predicted distances, in strides
# DIFFERS: mmdetection's start; the paper's is 0.1.
INITIAL_DISTANCE = 0.25
MIN_DISTANCE = 1e-4  # in training: with one side 0 the IoU is 0, and no other side has a gradient
NO_LOSS = 1e6  # stands for the loss of an object on a level where it has no effective cell
LAMBDA = 0.5  # weight of the anchor-free branch in the joint form
DIVISOR = 32  # an image's own padded size, like a batch's, is a multiple of this; cells beyond do not learn

# ---- anchor-based branch (RetinaNet)
ANCHOR_SCALE = 4.0  # side of the smallest anchor in strides: 32 px on P3
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

    forward: L features (B, channels, H, W) -> dict of float32: for the anchor-free branch "logits" (B, P, C)
    and "tblr" (B, P, 4) >= 0, distances to the top, bottom, left and right side in NORMALIZER strides; for
    the anchor-based one "anchor_logits" (B, N, C) and "anchor_deltas" (B, N, 4).
    """

    def __init__(self, num_classes: int, channels: int = 256, free: bool = True, anchor: bool = False):
        super().__init__()
        self.num_classes, self.free, self.anchor = num_classes, free, anchor
        self.cls_tower, self.box_tower = _tower(channels), _tower(channels)
        if free:
            self.cls_logits = nn.Conv2d(channels, num_classes, 3, padding=1)
            self.tblr = nn.Conv2d(channels, 4, 3, padding=1)
        if anchor:
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
        if free:
            nn.init.constant_(self.tblr.bias, INITIAL_DISTANCE)

    def forward(self, features: list[Tensor]) -> dict[str, Tensor]:
        cls_features = [self.cls_tower(feature) for feature in features]
        box_features = [self.box_tower(feature) for feature in features]
        outputs = {}
        if self.free:
            outputs["logits"] = _rows([self.cls_logits(f) for f in cls_features], self.num_classes)
            outputs["tblr"] = _rows([self.tblr(f) for f in box_features], 4).relu()
        if self.anchor:
            outputs["anchor_logits"] = _rows([self.anchor_logits(f) for f in cls_features], self.num_classes)
            outputs["anchor_deltas"] = _rows([self.anchor_deltas(f) for f in box_features], 4)
        return outputs


def _tower(channels: int) -> nn.Sequential:
    layers = []
    for _ in range(TOWER_CONVS):
        layers += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def _rows(levels: list[Tensor], size: int) -> Tensor:
    """L x (B, A * size, H, W) -> (B, P * A, size): a row per prediction."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, size) for level in levels],
                     dim=1).float()


# ------------------------------------------------------------------------------------------ points, anchors

def level_points(height: int, width: int, stride: int, device=None) -> Tensor:
    """Image position of every cell of one feature map, its upper left corner: (x * stride, y * stride).

    Returns (H*W, 2) float32 (x, y), pixels of the padded image, row-major.
    """
    # DIFFERS: mmdetection's FSAF and RetinaNet, and torchvision's, have priors around the corner of a cell.
    # The paper speaks of pixel locations only; some ports add half a stride, as FCOS does.
    return cell_corners(height, width, stride, stride, device)


def image_points(shapes: list[tuple[int, int]], device=None) -> tuple[Tensor, Tensor]:
    """Points (P, 2) and strides (P,) of all levels, px float32; shapes: (height, width) of each level."""
    points = [level_points(height, width, stride, device) for (height, width), stride in zip(shapes, STRIDES)]
    strides = [torch.full((len(p),), float(stride), device=device) for p, stride in zip(points, STRIDES)]
    return torch.cat(points), torch.cat(strides)


def base_anchors() -> Tensor:
    """Anchors of a cell at the origin, every size of one aspect ratio before the next (RetinaNet, Sec. 4).

    Returns (L, A, 4) float32 px, centred at 0.
    """
    ratios = torch.tensor(ASPECT_RATIOS).sqrt()
    sides = ANCHOR_SCALE * torch.tensor([2 ** octave for octave in OCTAVES])
    width, height = ((side[:, None] * sides).flatten() for side in (1 / ratios, ratios))
    unit = torch.stack((-width, -height, width, height), dim=-1) / 2
    return torch.tensor(STRIDES)[:, None, None] * unit


def image_anchors(base: Tensor, shapes: list[tuple[int, int]], torchvision: bool = False) -> Tensor:
    """Anchors (N, 4) px of all levels; base: (L, A, 4) from `base_anchors`, shapes as in `image_points`.

    torchvision: at the points where its RetinaNet has them, see `torchvision_corners`.
    """
    points = (torchvision_corners(shapes, STRIDES[0], base.device) if torchvision else
              [level_points(*shape, stride, base.device) for shape, stride in zip(shapes, STRIDES)])
    return torch.cat([(corner.repeat(1, 2)[:, None] + anchors).reshape(-1, 4)
                      for corner, anchors in zip(points, base)])


# ---------------------------------------------------------------------------------------------- targets

class FreeTargets(NamedTuple):
    """What the points learn in the anchor-free branch before objects have chosen their level; G > 0."""
    owner: Tensor  # (..., P) int64: index of the object in whose effective region the point lies, -1 = none
    region: Tensor  # (..., P, G) bool: in the ignore region of that object, which holds the effective one
    dropped: Tensor  # (..., P) bool: in the middle of a crowd, or beyond the image's padding: learns nothing


@torch.no_grad()
def fsaf_targets(points: Tensor, strides: Tensor, gt_boxes: Tensor, gt_labels: Tensor, inside: Tensor,
                 effective_scale: float = EFFECTIVE_SCALE, ignore_scale: float = IGNORE_SCALE) -> FreeTargets:
    """Effective and ignore regions of every object on every level.

    The regions are the box shrunk around its centre. A point stands for the square of side `stride` around
    it, and belongs to a region that covers MIN_COVERED of this square; to be effective it must lie strictly
    inside the box, too. An object may thus have no effective point, always if it is under STRIDES[0] / 2 px.
    Where effective regions overlap the smallest box wins (of equal ones the first), and for the others the
    point is ignored. A point that is to be ignored for the class it should learn is not positive.

    points (P, 2), strides (P,): from `image_points`; gt_boxes (G, 4) px, gt_labels (G,) int64, -1 = padding,
    -2 = crowd; inside: (P,) bool, points of the padded image itself. G may be 0.
    """
    gt_boxes, gt_labels = _at_least_one_row(gt_boxes.float(), gt_labels)
    crowd = _strictly_inside(points, _shrink(gt_boxes, CROWD_SCALE)) & (gt_labels == -2)
    dropped = ~inside | crowd.any(dim=1)

    possible = (gt_labels >= 0) & inside[:, None]
    region = possible & (_covered(points, strides, _shrink(gt_boxes, ignore_scale)) > MIN_COVERED)
    effective = (region & _strictly_inside(points, gt_boxes)
                 & (_covered(points, strides, _shrink(gt_boxes, effective_scale)) > MIN_COVERED))
    # DIFFERS: overlaps are settled before an object chooses its level, as in mmdetection: a point that a
    # smaller object owns is lost to the larger one even if the smaller then learns elsewhere. In the paper
    # only objects of one level compete.
    smallest, owner = torch.where(effective, box_area(gt_boxes), math.inf).min(dim=1)
    positive = (smallest < math.inf) & ~dropped

    # DIFFERS: the paper does not say what an effective cell does in the ignore region of another object of
    # its class. As in mmdetection it is background, and ignored for this class.
    another = torch.arange(len(gt_labels), device=owner.device) != owner[:, None]
    same_class = gt_labels == gt_labels[owner][:, None]
    positive &= ~(region & another & same_class).any(dim=1)
    return FreeTargets(torch.where(positive, owner, -1), region, dropped)


def _at_least_one_row(gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor]:
    """A padding row where (..., G, 4) and (..., G) have G = 0, a shape and not a value: `min` and `gather`
    need one."""
    if gt_labels.shape[-1]:
        return gt_boxes, gt_labels
    return gt_boxes.new_zeros(*gt_labels.shape[:-1], 1, 4), gt_labels.new_full((*gt_labels.shape[:-1], 1), -1)


def _shrink(boxes: Tensor, scale: float) -> Tensor:
    center, half = (boxes[:, 2:] + boxes[:, :2]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * scale
    return torch.cat((center - half, center + half), dim=1)


def _strictly_inside(points: Tensor, boxes: Tensor) -> Tensor:
    """(P, 2), (G, 4) -> (P, G) bool."""
    return ((points[:, None] > boxes[:, :2]) & (points[:, None] < boxes[:, 2:])).all(dim=-1)


def _covered(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Share (P, G) of the square of side `stride` around each point that lies in each box (G, 4)."""
    half = strides[:, None] / 2
    low = torch.maximum((points - half)[:, None], boxes[:, :2])
    high = torch.minimum((points + half)[:, None], boxes[:, 2:])
    side = (high - low).clamp(min=0)
    return side[..., 0] * side[..., 1] / strides[:, None] ** 2


# ---------------------------------------------------------------------------------------------- losses

def point_losses(logits: Tensor, boxes: Tensor, labels: Tensor,
                 target_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Focal loss (B, P, C) and IoU loss (B, P) of every point, neither weighted nor reduced.

    logits (B, P, C), boxes (B, P, 4) px; labels (B, P), -1 = background, where the IoU loss is 0;
    target_boxes (B, P, 4) px.
    """
    one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    positive = labels >= 0
    # Finite boxes at background points: a zero gradient times an infinite distance would be NaN.
    boxes, target_boxes = (torch.where(positive[..., None], b, 1.0) for b in (boxes, target_boxes))
    cls_loss = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA)
    return cls_loss, torch.where(positive, iou_loss(boxes, target_boxes), 0.0)


@torch.no_grad()
def class_weights(region: Tensor, dropped: Tensor, labels: Tensor, gt_labels: Tensor,
                  num_classes: int) -> Tensor:
    """Weight 0 for the class of every object in whose region a point lies without learning it, else 1.

    region (B, P, G), dropped (B, P), labels (B, P) of positive points, else -1; gt_labels (B, G).
    Returns (B, P, C) float32: 0 for all classes of dropped points.
    """
    classes = torch.arange(num_classes, device=labels.device)
    of_class = (gt_labels[..., None] == classes).float()  # (B, G, C); padding has no class
    ignored = (region.float() @ of_class > 0) & (labels[..., None] != classes)
    return (~(ignored | dropped[..., None])).float()


@torch.no_grad()
def level_losses(logits: Tensor, boxes: Tensor, targets: FreeTargets, gt_boxes: Tensor, gt_labels: Tensor,
                 level_sizes: list[int]) -> Tensor:
    """Mean loss of every object over its effective region on every level (Eq. 1).

    logits (B, P, C), boxes (B, P, 4) px, targets of B images, gt_boxes (B, G, 4), gt_labels (B, G), G > 0.
    level_sizes: points per level. Returns (B, G, L); NO_LOSS where an object has no effective cell.
    """
    # DIFFERS: as in mmdetection, cells that a smaller object has taken do not count. The paper's mean runs
    # over the whole effective region. The focal loss of all classes counts; in one port only the object's.
    labels, target_boxes = _targets_of(targets.owner, gt_boxes, gt_labels)
    cls_loss, box_loss = point_losses(logits, boxes, labels, target_boxes)
    weights = class_weights(targets.region, targets.dropped, labels, gt_labels, logits.shape[-1])
    point_loss = (cls_loss * weights).sum(dim=-1) + box_loss
    objects = torch.arange(gt_boxes.shape[1], device=gt_boxes.device)
    means = []
    for loss, owner in zip(point_loss.split(level_sizes, dim=1), targets.owner.split(level_sizes, dim=1)):
        mine = owner[..., None] == objects  # (B, points of the level, G)
        count = mine.sum(dim=1)
        total = torch.where(mine, loss[..., None], 0.0).sum(dim=1)
        means.append(torch.where(count > 0, total / count.clamp(min=1), NO_LOSS))
    return torch.stack(means, dim=-1)


def select_level(mean_loss: Tensor) -> Tensor:
    """Level on which each object trains: the one where it is easiest now (Eq. 2).

    mean_loss: (..., G, L) from `level_losses`. Returns (..., G) int64 in 0..L-1; of equal levels the finest.
    """
    return mean_loss.argmin(dim=-1)


def fsaf_losses(logits: Tensor, boxes: Tensor, targets: FreeTargets, gt_boxes: Tensor, gt_labels: Tensor,
                level_sizes: list[int], ignore_adjacent: bool = False) -> dict[str, Tensor]:
    """Losses of the anchor-free branch, every object on the level that suits it best now.

    Arguments as in `level_losses`. ignore_adjacent: the paper's rule for the other levels, see below.
    Without positives "box" is 0, with a graph. Returns {"cls", "box"}, each () float32.
    """
    level = select_level(level_losses(logits, boxes, targets, gt_boxes, gt_labels, level_sizes))
    level_of_point = torch.cat([torch.full((size,), i, device=level.device)
                                for i, size in enumerate(level_sizes)])
    index = targets.owner.clamp(min=0)
    chosen = (targets.owner >= 0) & (level.gather(1, index) == level_of_point)
    labels, target_boxes = _targets_of(torch.where(chosen, targets.owner, -1), gt_boxes, gt_labels)
    region = targets.region
    if ignore_adjacent:
        # DIFFERS: the paper ignores an object's region on its level and the two beside it, and takes it for
        # background on the others. mmdetection ignores it on all levels.
        region = region & ((level_of_point[:, None] - level[:, None]).abs() <= 1)
    weights = class_weights(region, targets.dropped, labels, gt_labels, logits.shape[-1])

    num_negative = ((targets.owner < 0) & ~targets.dropped).sum(dim=1).clamp(min=1).sum()
    # DIFFERS: the mean over ranks, for N ranks to equal one. In mmdetection every rank has its own count.
    num_pos, num_negative = mean_over_ranks(torch.stack((chosen.sum(), num_negative)).float())
    # Without any positive the negatives are the norm, as in mmdetection: a small loss instead of a huge one.
    normalizer = torch.where(num_pos > 0, num_pos, num_negative)
    cls_loss, box_loss = point_losses(logits, boxes, labels, target_boxes)
    return {"cls": (cls_loss * weights).sum() / normalizer, "box": box_loss.sum() / normalizer}


def _targets_of(owner: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor]:
    """Labels (B, P), -1 = background, and boxes (B, P, 4) of the objects `owner` (B, P) points at."""
    index = owner.clamp(min=0)
    labels = torch.where(owner >= 0, gt_labels.gather(1, index), -1)
    return labels, gt_boxes.float().gather(1, index[..., None].expand(-1, -1, 4))


def anchor_losses(logits: Tensor, deltas: Tensor, anchors: Tensor, match: Tensor, gt_boxes: Tensor,
                  gt_labels: Tensor) -> dict[str, Tensor]:
    """RetinaNet's focal loss and L1 loss over the number of positive anchors (RetinaNet, Sec. 4).

    logits (B, N, C), deltas (B, N, 4), anchors (N, 4) px, match (B, N): from `match_anchors`;
    gt_boxes (B, G, 4), gt_labels (B, G), G > 0. Without positives "box" is 0, with a graph.
    Returns {"cls", "box"}, each () float32.
    """
    labels, target_boxes = _targets_of(match, gt_boxes, gt_labels)
    positive = match >= 0
    one_hot = labels[..., None] == torch.arange(logits.shape[-1], device=labels.device)
    # Background anchors have their own box for a target: its logarithms are finite.
    target_deltas = encode_boxes(torch.where(positive[..., None], target_boxes, anchors), anchors)
    # DIFFERS: L1, as in mmdetection's and torchvision's RetinaNet. Detectron, and with it the paper, has
    # smooth L1 with beta 1/9.
    box_loss = (deltas - target_deltas).abs().sum(dim=-1)
    cls_loss = sigmoid_focal_loss(logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA).sum(dim=-1)
    # DIFFERS: positives of all images, mean over ranks, at least 1. mmdetection adds 1 for an image without,
    # and every rank has its own count; torchvision divides image by image.
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

class FSAF(nn.Module):
    """The detector, in one of the three forms at the top.

    num_classes: without background. backbone, caffe, norm, freeze_at: see `backbone.ResNet`; caffe also
    chooses the pixel mean and std of Detectron's weights. effective_scale, ignore_scale: of the regions; the
    published pairs are 0.2, 0.2 (default of the anchor-free form) and 0.2, 0.5 (of the joint form).
    ignore_adjacent: the paper's rule for levels an object did not choose; None: in the joint form only.
    torchvision: the pyramid and the places of the anchors of torchvision's RetinaNet, for its weights.
    score_threshold, nms_threshold: for inference.

    images (B, 3, H, W) uint8 RGB, each at the top left; sizes (B, 2) int64 height, width; gt_boxes (B, G, 4)
    px; gt_labels (B, G) int64, -1 = padding, -2 = crowd.
    train(): model(images, sizes, gt_boxes, gt_labels) -> {"cls", "box"}, each (); in the joint form
             {"anchor_cls", "anchor_box", "free_cls", "free_box"}, the latter two times LAMBDA
    eval():  model(images, sizes) -> B dicts {"boxes" (N, 4), "scores" (N,), "labels" (N,)}, best score first
    """

    divisor = DIVISOR

    def __init__(self, num_classes: int, backbone: str = "resnet50", joint: bool = False,
                 anchor_only: bool = False, effective_scale: float = EFFECTIVE_SCALE,
                 ignore_scale: float | None = None, ignore_adjacent: bool | None = None, caffe: bool = False,
                 norm: str = "affine", freeze_at: int = 2, fpn_channels: int = 256, torchvision: bool = False,
                 score_threshold: float = SCORE_THRESHOLD, nms_threshold: float = NMS_THRESHOLD):
        super().__init__()
        if joint and anchor_only:
            raise ValueError("joint has both branches, anchor_only one: give one of them")
        if ignore_scale is None:
            ignore_scale = IGNORE_SCALE_JOINT if joint else IGNORE_SCALE
        if not 0 < effective_scale <= ignore_scale <= 1:
            raise ValueError(f"effective_scale {effective_scale} and ignore_scale {ignore_scale} must grow "
                             f"from above 0 to at most 1")
        self.joint, self.effective_scale, self.ignore_scale = joint, effective_scale, ignore_scale
        self.torchvision = torchvision
        self.ignore_adjacent = joint if ignore_adjacent is None else ignore_adjacent
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.backbone = ResNet(backbone, caffe, norm, freeze_at)
        # DIFFERS: mmdetection has no ReLU between P6 and P7; RetinaNet's paper has one.
        self.fpn = FPN(self.backbone.out_channels[1:], fpn_channels, p6_from="p5" if torchvision else "c5",
                       relu_before_p7=torchvision)
        self.head = FSAFHead(num_classes, fpn_channels, free=not anchor_only, anchor=joint or anchor_only)
        if self.head.anchor:  # a buffer: torchvision's weights, for one, were trained with rounded anchors
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
        """Everything that is learned: outputs of `FSAFHead` and (height, width) of the levels."""
        images = normalise_images(images, sizes, self.pixel_mean, self.pixel_std)
        features = self.fpn(self.backbone(images)[1:])
        return {**self.head(features), "shapes": [tuple(feature.shape[-2:]) for feature in features]}

    def losses(self, outputs: dict, sizes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> dict[str, Tensor]:
        gt_boxes, gt_labels = _at_least_one_row(gt_boxes, gt_labels)
        free = anchor = {}
        if self.head.free:
            free = fsaf_losses(*self.free_targets(outputs, sizes, gt_boxes, gt_labels), self.ignore_adjacent)
        if self.head.anchor:
            inside = _inside(image_points(outputs["shapes"], sizes.device)[0], sizes)
            inside = inside.repeat_interleave(self.base_anchors.shape[1], dim=1)
            anchors = image_anchors(self.base_anchors, outputs["shapes"], self.torchvision)
            match = torch.stack([match_anchors(anchors, *gt, FOREGROUND_IOU, BACKGROUND_IOU, usable)
                                 for *gt, usable in zip(gt_boxes, gt_labels, inside)])
            anchor = anchor_losses(outputs["anchor_logits"], outputs["anchor_deltas"], anchors, match,
                                   gt_boxes, gt_labels)
        if not self.joint:
            return free or anchor
        return {**{f"anchor_{name}": loss for name, loss in anchor.items()},
                **{f"free_{name}": LAMBDA * loss for name, loss in free.items()}}

    def free_targets(self, outputs: dict, sizes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> tuple:
        """What `level_losses` and `fsaf_losses` need, in their order; gt_boxes (B, G, 4) with G > 0."""
        points, strides = image_points(outputs["shapes"], gt_boxes.device)
        targets = [fsaf_targets(points, strides, *image, self.effective_scale, self.ignore_scale)
                   for image in zip(gt_boxes, gt_labels, _inside(points, sizes))]
        targets = FreeTargets(*(torch.stack(t) for t in zip(*targets)))
        boxes = fsaf_decode(points, strides, outputs["tblr"].clamp(min=MIN_DISTANCE))
        level_sizes = [height * width for height, width in outputs["shapes"]]
        return outputs["logits"], boxes, targets, gt_boxes, gt_labels, level_sizes

    def candidates(self, outputs: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What goes into NMS: both branches' best pairs of every level.

        Of every image boxes (M, 4) px, scores (M,), 0 where not above the threshold, labels (M,) int64. M
        does not depend on values.
        """
        level_sizes = [height * width for height, width in outputs["shapes"]]
        branches = []  # logits (B, rows, C), boxes (B, rows, 4), rows per level
        if self.head.free:
            points, strides = image_points(outputs["shapes"], outputs["tblr"].device)
            branches.append((outputs["logits"], fsaf_decode(points, strides, outputs["tblr"]), level_sizes))
        if self.head.anchor:
            anchors = image_anchors(self.base_anchors, outputs["shapes"], self.torchvision)
            branches.append((outputs["anchor_logits"], decode_boxes(outputs["anchor_deltas"], anchors),
                             [size * self.base_anchors.shape[1] for size in level_sizes]))
        found = []
        for i in range(len(branches[0][0])):
            parts = []
            for logits, boxes, rows in branches:
                row, labels, scores = best_pairs(logits[i].sigmoid(), rows, PRE_NMS_TOP_K,
                                                 self.score_threshold)
                parts.append((boxes[i][row], scores, labels))
            found.append(tuple(torch.cat(part) for part in zip(*parts)))
        return found

    def detections(self, outputs: dict, sizes: Tensor) -> list[dict[str, Tensor]]:
        """One class-wise NMS for the candidates of all levels and branches."""
        return [final_detections(*image, *size, self.nms_threshold, MAX_DETECTIONS)
                for image, size in zip(self.candidates(outputs), sizes)]


def _inside(points: Tensor, sizes: Tensor) -> Tensor:
    """Which points (P, 2) lie in each image, sizes (B, 2) height, width, padded to DIVISOR: (B, P) bool."""
    padded = (sizes + DIVISOR - 1) // DIVISOR * DIVISOR
    return (points < padded.flip(-1)[:, None]).all(dim=-1)


# ---------------------------------------------------------------------------------- other people's weights
# Each reader gives a state_dict for a strict load, with the pixel mean and std and the anchors the weights
# were trained with, in RGB. A key that it does not know keeps its name.

def rename_mmdet(state_dict: dict[str, Tensor], caffe: bool = False) -> dict[str, Tensor]:
    """mmdetection's FSAF or RetinaNet (2.x and 3.x).

    The matching model: FSAF(...) where retina_reg has 4 channels, FSAF(..., anchor_only=True) where it has
    4 per anchor. caffe: the style of the backbone, which no key tells. Raises WeightsError if it is another
    model.
    """
    channels = [value.shape[0] for key, value in state_dict.items() if key.endswith("retina_reg.weight")]
    if channels not in ([4], [4 * len(OCTAVES) * len(ASPECT_RATIOS)]):
        raise WeightsError(f"not an FSAF or RetinaNet of mmdetection: it has keys like "
                           f"{sorted(state_dict)[:3]}")
    free = channels == [4]
    head = {"retina_cls": "cls_logits" if free else "anchor_logits",
            "retina_reg": "tblr" if free else "anchor_deltas"}
    renamed = with_pixels(rename_mmdet_detector(state_dict, head, tower_layers=2),
                          CAFFE_PIXELS if caffe else TORCHVISION_PIXELS, bgr=caffe)
    return renamed if free else {**renamed, "base_anchors": base_anchors()}


def rename_torchvision(state_dict: dict[str, Tensor], bn_eps: float = BN_EPS) -> dict[str, Tensor]:
    """torchvision's `retinanet_resnet50_fpn`, for `FSAF(..., anchor_only=True, torchvision=True)`.

    bn_eps: of the batch norm they were used with; torchvision sets 0 for its published COCO weights.
    """
    rules = [(r"^head\.classification_head\.cls_logits\.", "head.anchor_logits."),
             (r"^head\.regression_head\.bbox_reg\.", "head.anchor_deltas.")]
    for theirs, ours in (("classification", "cls"), ("regression", "box")):
        # Newer files number the pairs of convolution and ReLU of a tower, older ones all its layers.
        rules += [(rf"^head\.{theirs}_head\.conv\.{i}\.0\.", f"head.{ours}_tower.{2 * i}.")
                  for i in range(TOWER_CONVS)]
        rules.append((rf"^head\.{theirs}_head\.conv\.", f"head.{ours}_tower."))
    renamed = rename_torchvision_detector(state_dict, rules, bn_eps)
    # Sizes are cut to whole pixels (32, 40, 50, ...), sides rounded.
    sides = torch.tensor([[int(ANCHOR_SCALE * stride * 2 ** octave) for octave in OCTAVES]
                          for stride in STRIDES])
    ratios = torch.tensor(ASPECT_RATIOS).sqrt()
    width, height = ((side[:, None] * sides[:, None]).flatten(1) for side in (1 / ratios, ratios))
    anchors = (torch.stack((-width, -height, width, height), dim=-1) / 2).round()
    return {**renamed, "base_anchors": anchors}

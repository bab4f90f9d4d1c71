"""Faster R-CNN: Towards Real-Time Object Detection with Region Proposal Networks (arXiv 1506.01497).

Both forms are those of Detectron and detectron2. The form with a feature pyramid (arXiv 1612.03144):

    image -> ResNet -> FPN -> P2 .. P6 -> RPN -> proposals
                               |                     |
                            P2 .. P5 ---> RoIAlign <-+   every RoI on the level that fits its size
                                             |
                             two fully connected layers -> class and box of every RoI

The form without, called C4 after its one feature map of stride 16:

    image -> conv1 .. layer3 -> C4 -> RPN -> proposals
                                |               |
                                +-> RoIAlign <--+
                                       |
                                    layer4 -> mean -> class and box of every RoI

Stage one is the region proposal network (Sec. 3.1). Stage two is the detector of Fast R-CNN
(arXiv 1504.08083) on the same features. Both train together ("approximate joint training", Sec. 3.2).

Letters: B images, C classes, G gt objects of one image (padded), H W height and width of a feature map,
L levels, A anchors of a cell, N anchors of all levels, R proposals or RoIs, D channels. The last class logit
of a RoI, index C, is background. Anchors are concatenated from the finest level to the coarsest, each level
in the row-major order of `feature.flatten(2)`.
`# DIFFERS:` marks departures from the paper; docs/differences.md lists them.
"""
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import FPN, ResNet, normalise_images
from ops import (
    HUGE,
    batched_nms,
    cell_anchors,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    final_detections,
    flatten_predictions,
    grid_points,
    match_anchors,
    mean_over_ranks,
    pairwise_iou,
    place_anchors,
    roi_align,
    with_padding_row,
)

PIXELS = ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0))  # RGB mean and std of detectron2's published models

# ---- region proposal network (section numbers: Faster R-CNN)
STRIDES = (4, 8, 16, 32, 64)  # px per cell of P2 .. P6 (FPN, Sec. 4.1)
STRIDE_C4 = 16
# Square root of the area, px. With FPN every level has one size, in C4 the single map has all.
# DIFFERS: C4 has five sizes as in Detectron; the paper has the last three, and 64 in addition on COCO.
ANCHOR_SIZES = (32, 64, 128, 256, 512)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width (Sec. 3.3)
RPN_FOREGROUND_IOU, RPN_BACKGROUND_IOU = 0.7, 0.3  # Sec. 3.1.2
RPN_SAMPLES, RPN_POSITIVES = 256, 128  # sampled anchors per image, at most this many positive (Sec. 3.1.3)
# Anchors of one level before NMS in training, at inference (detectron2).
PRE_NMS_TOP_K = (2000, 1000)
# Proposals of all levels after NMS in training, at inference.
# DIFFERS: 1000 in training (detectron2); FPN's paper and Detectron take 2000.
POST_NMS_TOP_K = (1000, 1000)
PRE_NMS_TOP_K_C4, POST_NMS_TOP_K_C4 = (12000, 6000), (2000, 1000)
RPN_NMS_THRESHOLD = 0.7  # Sec. 3.3

# ---- RoI head
POOL_SIZE, POOL_SIZE_C4 = 7, 14  # side of the RoIAlign grid (Detectron)
CANONICAL_LEVEL, CANONICAL_SIZE = 4, 224  # a RoI of this size (px) belongs to P4 (FPN, Eq. 1)
HEAD_WIDTH = 1024  # of the two fully connected layers (FPN, Sec. 4.2)
ROI_FOREGROUND_IOU = 0.5  # Fast R-CNN, Sec. 2.3
ROI_SAMPLES, ROI_POSITIVE_FRACTION = 512, 0.25  # RoIs per image in training (Detectron; Fast R-CNN, Sec. 2.3)
DELTA_WEIGHTS = (10.0, 5.0)  # factors of the deltas of a RoI: of shifts, of logarithms (Detectron)

# ---- detections (Detectron)
SCORE_THRESHOLD = 0.05
NMS_THRESHOLD = 0.5
MAX_DETECTIONS = 100


# ------------------------------------------------------------------------ region proposal network

class RPN(nn.Module):
    """Region proposal network: objectness and box of every anchor (Sec. 3.1, Fig. 3).

    anchors_per_cell: A. All levels share the layers (FPN, Sec. 4.1).
    forward: L x (B, D, H, W) -> objectness logits (B, N), deltas (B, N, 4), both float32, in the order of
    `all_anchors`.
    """

    def __init__(self, channels: int, anchors_per_cell: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, anchors_per_cell, 1)
        self.deltas = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)  # Sec. 3.1.3
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        hidden = [self.conv(feature).relu() for feature in features]
        objectness = flatten_predictions([self.objectness(level) for level in hidden], 1).squeeze(-1)
        return objectness, flatten_predictions([self.deltas(level) for level in hidden], 4)


def base_anchors(fpn: bool = True) -> Tensor:
    """Anchors of one cell on every level, centred at the origin (Sec. 3.1.1; FPN, Sec. 4.1).

    Returns (L, A, 4) float32 px; all aspect ratios of one size come before the next size.
    """
    sizes = torch.tensor(ANCHOR_SIZES, dtype=torch.float32)
    anchors = cell_anchors(sizes, ASPECT_RATIOS).transpose(0, 1)  # (sizes, ratios, 4)
    return anchors if fpn else anchors.reshape(1, -1, 4)


def all_anchors(base: Tensor, shapes: list[tuple[int, int]], strides: tuple[int, ...]) -> Tensor:
    """Anchors of all levels, centred on the upper left corner of each cell.

    base: (L, A, 4) px from `base_anchors`; shapes: (height, width) of each feature map.
    Returns (N, 4) float32 xyxy, pixels of the padded image. Anchors may cross its border.
    """
    return torch.cat([place_anchors(anchors, grid_points(*shape, stride, stride, base.device))
                      for anchors, shape, stride in zip(base, shapes, strides)])


# ---- sampling

def random_priorities(count: int, device) -> Tensor:
    """Random priorities (count,): `subsample_labels` takes the elements with the smallest ones."""
    return torch.rand(count, device=device)


@torch.no_grad()
def subsample_labels(positive: Tensor, negative: Tensor, count: int, max_positive: int,
                     priorities: Tensor) -> tuple[Tensor, Tensor]:
    """Samples at most `max_positive` positives, then negatives up to `count` elements (Sec. 3.1.3).

    positive, negative: (..., N) bool. priorities: (..., N) float; the smallest are sampled first.
    Returns the sampled positives (..., N) bool and the sampled negatives (..., N) bool. Together they are
    fewer than `count` if there are not enough elements.
    """
    positive = positive & (_sampling_order(priorities, positive) < max_positive)
    remaining = count - positive.sum(dim=-1, keepdim=True)
    negative = negative & (_sampling_order(priorities, negative) < remaining)
    return positive, negative


def _sampling_order(priorities: Tensor, mask: Tensor) -> Tensor:
    """Position (..., N) int64 at which each element of the mask is sampled; other elements come later."""
    return priorities.masked_fill(~mask, HUGE).argsort(stable=True).argsort()


def _gather_boxes(boxes: Tensor, index: Tensor) -> Tensor:
    """boxes (..., G, 4), G > 0, at index (..., N). A negative index gives a box of zeros."""
    found = boxes.gather(-2, index.clamp(min=0)[..., None].expand(*index.shape, 4))
    return found.masked_fill((index < 0)[..., None], 0.0)


# ---- losses and proposals

def rpn_losses(objectness: Tensor, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
               sample_order: Callable = random_priorities) -> dict[str, Tensor]:
    """Objectness and box loss of sampled anchors, divided by RPN_SAMPLES times the number of images (Eq. 1).

    objectness: (B, N) logits; deltas: (B, N, 4); anchors: (N, 4) px; gt_boxes: (B, G, 4) px;
    gt_labels: (B, G) int64, < 0 for padding and crowds. sample_order: see `FasterRCNN`.
    Returns {"rpn_cls": (), "rpn_box": ()}. Without objects the box loss is 0 and has a gradient of zeros.
    """
    # DIFFERS: anchors that cross the image border are trained (detectron2, FPN); the paper ignores them.
    # DIFFERS: the box loss is L1 over the number of samples (detectron2). The paper has smooth L1, multiplied
    # by lambda = 10 and divided by the number of cells, about 2400.
    gt_boxes, gt_labels = with_padding_row(gt_boxes, gt_labels)
    match = match_anchors(anchors, gt_boxes, gt_labels, RPN_FOREGROUND_IOU, RPN_BACKGROUND_IOU)
    priorities = torch.stack([sample_order(len(anchors), anchors.device) for _ in match])
    positive, negative = subsample_labels(match >= 0, match == -1, RPN_SAMPLES, RPN_POSITIVES, priorities)
    cls_loss = F.binary_cross_entropy_with_logits(objectness, positive.float(), reduction="none")
    # An anchor without an object gets itself as the target: its logarithms are finite, its weight is 0.
    target = torch.where(positive[..., None], _gather_boxes(gt_boxes, match), anchors)
    box_loss = (deltas - encode_boxes(target, anchors)).abs()
    norm = RPN_SAMPLES * len(objectness)  # constant, even if fewer anchors could be sampled (Detectron)
    cls_loss = torch.where(positive | negative, cls_loss, 0.0).sum(dim=1)
    box_loss = torch.where(positive[..., None], box_loss, 0.0).sum(dim=(1, 2))
    return {"rpn_cls": cls_loss.sum() / norm, "rpn_box": box_loss.sum() / norm}


@torch.no_grad()
def rpn_proposals(objectness: Tensor, deltas: Tensor, anchors: Tensor, size: Tensor, level_sizes: list[int],
                  pre_nms_top_k: int, post_nms_top_k: int) -> tuple[Tensor, Tensor]:
    """Proposals of one image: the best anchors of each level, decoded and clipped, after NMS (Sec. 3.3).

    NMS is by level: boxes suppress only boxes of their own level (detectron2).
    objectness: (N,) logits; deltas: (N, 4); anchors: (N, 4) px; size: (2,) height, width before padding;
    level_sizes: number of anchors on each level.
    Returns boxes (post_nms_top_k, 4) px, best first, and valid (post_nms_top_k,) bool. The number of rows is
    fixed: rows that NMS leaves empty are zeros and not valid.
    """
    index = torch.arange(len(objectness), device=objectness.device).split(level_sizes)
    best = [anchor[logits.topk(min(pre_nms_top_k, len(logits))).indices]
            for anchor, logits in zip(index, objectness.split(level_sizes))]
    level = torch.cat([torch.full_like(anchor, i) for i, anchor in enumerate(best)])
    best = torch.cat(best)
    scores, boxes = objectness[best], clip_boxes(decode_boxes(deltas[best], anchors[best]), *size)
    valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1) & scores.isfinite()
    # An invalid box becomes an empty one with the lowest score: it suppresses nothing and comes last.
    boxes, scores = torch.where(valid[:, None], boxes, 0.0), torch.where(valid, scores, -HUGE)
    kept = batched_nms(boxes, scores, level, RPN_NMS_THRESHOLD, post_nms_top_k)
    # Padded first and cut afterwards, so that torch.export sees a fixed number of rows.
    kept = torch.cat((kept, kept.new_full((post_nms_top_k,), -1)))[:post_nms_top_k]
    valid = (kept >= 0) & valid[kept]
    return torch.where(valid[:, None], boxes[kept], 0.0), valid


# ---------------------------------------------------------------------------------------- RoI head

@torch.no_grad()
def sample_rois(proposals: Tensor, valid: Tensor, gt_boxes: Tensor, gt_labels: Tensor, num_classes: int,
                count: int = ROI_SAMPLES,
                sample_order: Callable = random_priorities) -> tuple[Tensor, Tensor, Tensor]:
    """Training RoIs of every image, sampled from proposals and gt boxes (Fast R-CNN, Sec. 2.3).

    At most ROI_POSITIVE_FRACTION of them are positive.
    proposals: (B, R, 4) px; valid: (B, R) bool; gt_boxes: (B, G, 4) px; gt_labels: (B, G) int64, < 0 for
    padding and crowds. sample_order: see `FasterRCNN`. G may be 0.
    Returns rois (B, count, 4) px, positives first; labels (B, count) int64, where num_classes is background
    and -1 marks a padding row; target boxes (B, count, 4) px, zeros for RoIs that are not positive.
    """
    gt_boxes, gt_labels = with_padding_row(gt_boxes, gt_labels)
    is_object = gt_labels >= 0
    boxes, valid = torch.cat((proposals, gt_boxes), dim=1), torch.cat((valid, is_object), dim=1)
    boxes, valid = F.pad(boxes, (0, 0, 0, count)), F.pad(valid, (0, count))  # there are always `count` rows
    iou = torch.where(is_object[..., None], pairwise_iou(gt_boxes, boxes), 0.0)
    best_iou, index = iou.max(dim=1)
    # DIFFERS: background starts at IoU 0 (detectron2), in Fast R-CNN at 0.1.
    foreground, background = valid & (best_iou >= ROI_FOREGROUND_IOU), valid & (best_iou < ROI_FOREGROUND_IOU)
    priorities = torch.stack([sample_order(boxes.shape[1], boxes.device) for _ in boxes])
    positive, negative = subsample_labels(foreground, background, count, int(count * ROI_POSITIVE_FRACTION),
                                          priorities)
    labels = torch.where(positive, gt_labels.gather(1, index), torch.where(negative, num_classes, -1))
    chosen = torch.where(positive, 0, torch.where(negative, 1, 2)).argsort(stable=True)[:, :count]
    index = torch.where(positive, index, -1).gather(1, chosen)
    return _gather_boxes(boxes, chosen), labels.gather(1, chosen), _gather_boxes(gt_boxes, index)


def roi_levels(rois: Tensor) -> Tensor:
    """Level that a RoI reads: P4 if its size is CANONICAL_SIZE, P3 if it is half of that (FPN, Eq. 1).

    rois: (..., 4) px. Returns (...) int64: 0 = P2 to 3 = P5; 0 for a RoI without area.
    """
    size = ((rois[..., 2] - rois[..., 0]) * (rois[..., 3] - rois[..., 1])).sqrt()
    level = (CANONICAL_LEVEL + torch.log2(size / CANONICAL_SIZE + 1e-8)).floor()
    return level.clamp(2, 5).long() - 2


def pool_rois(features: list[Tensor], rois: Tensor, size: int) -> Tensor:
    """`roi_align` of every RoI on its own level.

    features: P2 to P5 (B, D, H, W); rois: (B, R, 4) px. Returns (B * R, D, size, size) float32.
    """
    level = roi_levels(rois)
    # Every level sees all RoIs, so that the shapes are fixed. A RoI of another level loses its area: it has
    # no samples, costs torchvision's kernel next to nothing, and its features are 0.
    pooled = [roi_align(feature, torch.where((level == i)[..., None], rois, 0.0), size, 1 / stride)
              for i, (feature, stride) in enumerate(zip(features, STRIDES))]
    return sum(pooled[1:], start=pooled[0])


class BoxHead(nn.Module):
    """Two fully connected layers on the pooled features (FPN, Sec. 4.2).

    forward: (R, D, pool_size, pool_size) -> (R, HEAD_WIDTH).
    """

    def __init__(self, channels: int, pool_size: int):
        super().__init__()
        self.fc1 = nn.Linear(channels * pool_size ** 2, HEAD_WIDTH)
        self.fc2 = nn.Linear(HEAD_WIDTH, HEAD_WIDTH)
        for layer in (self.fc1, self.fc2):
            nn.init.kaiming_uniform_(layer.weight, a=1)  # Caffe2's XavierFill (detectron2)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.fc2(self.fc1(pooled.flatten(1)).relu()).relu()


class Predictor(nn.Module):
    """Class logits and one box per class of every RoI (Fast R-CNN, Sec. 2).

    classifier: class or function (channels, outputs) -> layer of the class logits.
    forward: pooled features (R, D) -> logits (R, C + 1), deltas (R, C, 4), float32.
    """

    def __init__(self, channels: int, num_classes: int, classifier: Callable = nn.Linear):
        super().__init__()
        self.cls_score = classifier(channels, num_classes + 1)
        self.deltas = nn.Linear(channels, num_classes * 4)
        for layer, std in ((self.cls_score, 0.01), (self.deltas, 0.001)):  # Fast R-CNN, Sec. 2.3
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.deltas(x).unflatten(1, (-1, 4)).float()


def roi_losses(logits: Tensor, deltas: Tensor, rois: Tensor, labels: Tensor,
               target_boxes: Tensor) -> dict[str, Tensor]:
    """Cross entropy and box loss, divided by the number of sampled RoIs, negatives too (Fast R-CNN, Eq. 1).

    logits: (R, C + 1) and deltas: (R, C, 4) of all images; rois, target_boxes: (R, 4) px; labels: (R,) int64,
    where C is background and -1 has no loss.
    Returns {"cls": (), "box": ()}. Without positives the box loss is 0 and has a gradient of zeros.
    """
    num_classes = deltas.shape[1]
    sampled, positive = labels >= 0, (labels >= 0) & (labels < num_classes)
    # DIFFERS: the count is the mean over ranks, so N ranks equal one; detectron2 takes each rank's own count.
    count = mean_over_ranks(sampled.sum().float()).clamp(min=1)
    cls_loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    # RoIs that are not positive get a unit box as RoI and target: its logarithms are finite, its weight is 0.
    unit = torch.cat((rois.new_zeros(2), rois.new_ones(2)))
    rois, target_boxes = (torch.where(positive[:, None], boxes, unit) for boxes in (rois, target_boxes))
    target = encode_boxes(target_boxes, rois, DELTA_WEIGHTS)
    own_class = torch.where(positive, labels, 0)[:, None, None].expand(-1, 1, 4)
    # DIFFERS: the box loss is L1 (detectron2), in Fast R-CNN smooth L1.
    box_loss = (deltas.gather(1, own_class).squeeze(1) - target).abs()
    return {"cls": torch.where(sampled, cls_loss, 0.0).sum() / count,
            "box": torch.where(positive[:, None], box_loss, 0.0).sum() / count}


def roi_candidates(logits: Tensor, deltas: Tensor, proposals: Tensor, valid: Tensor,
                   score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates for NMS in one image: every class of every RoI with its own box.

    logits: (R, C + 1); deltas: (R, C, 4); proposals: (R, 4) px; valid: (R,) bool.
    Returns boxes (R * C, 4) px, scores (R * C,), labels (R * C,) int64. The score is 0 where it does not
    exceed the threshold or the proposal is not valid.
    """
    scores = logits.softmax(dim=-1)[:, :-1]
    boxes = decode_boxes(deltas, proposals[:, None], DELTA_WEIGHTS)
    scores = torch.where(valid[:, None] & (scores > score_threshold), scores, 0.0)
    labels = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores))
    return boxes.flatten(0, 1), scores.flatten(), labels


# ------------------------------------------------------------------------------------------- model

class FasterRCNN(nn.Module):
    """Faster R-CNN, with a feature pyramid (fpn=True) or with a C4 backbone.

    num_classes: without background. backbone, caffe, norm, freeze_at: see `backbone.ResNet`. fpn_channels: of
    the pyramid. pool_size: side of the RoIAlign grid. roi_samples: RoIs per image in training.
    post_nms_top_k: number of proposals in training, at inference. None for pool_size or post_nms_top_k takes
    the published value of the form. score_threshold: of detections. sample_order: function (count, device) ->
    priorities (count,) of anchors and of RoIs, see `random_priorities`. predictor: class or function
    (channels, num_classes) -> `Predictor`.

    images (B, 3, H, W) uint8 RGB, each at the top left; sizes (B, 2) int64 height, width before padding;
    gt_boxes (B, G, 4) px; gt_labels (B, G) int64, -1 = padding, -2 = crowd.
    train(): model(images, sizes, gt_boxes, gt_labels) -> {"rpn_cls", "rpn_box", "cls", "box"}, each ()
    eval():  model(images, sizes) -> B dicts {"boxes" (N, 4), "scores" (N,), "labels" (N,)}, best score first
    """

    def __init__(self, num_classes: int, backbone: str = "resnet50", caffe: bool = True, fpn: bool = True,
                 fpn_channels: int = 256, pool_size: int | None = None, norm: str = "frozen",
                 freeze_at: int = 2, roi_samples: int = ROI_SAMPLES,
                 post_nms_top_k: tuple[int, int] | None = None, score_threshold: float = SCORE_THRESHOLD,
                 sample_order: Callable = random_priorities, predictor: Callable = Predictor):
        super().__init__()
        self.num_classes, self.roi_samples, self.sample_order = num_classes, roi_samples, sample_order
        self.score_threshold, self.nms_threshold = score_threshold, NMS_THRESHOLD
        self.max_detections = MAX_DETECTIONS
        self.pool_size = pool_size or (POOL_SIZE if fpn else POOL_SIZE_C4)
        self.pre_nms_top_k = PRE_NMS_TOP_K if fpn else PRE_NMS_TOP_K_C4
        self.post_nms_top_k = tuple(post_nms_top_k or (POST_NMS_TOP_K if fpn else POST_NMS_TOP_K_C4))
        # A batch is padded to its largest image; in C4 it is not rounded up, as published.
        self.strides, self.size_divisor = (STRIDES, 32) if fpn else ((STRIDE_C4,), 1)
        anchors = base_anchors(fpn)
        self.backbone = ResNet(backbone, caffe, norm, freeze_at)
        if fpn:
            self.fpn = FPN(self.backbone.out_channels, fpn_channels, p6_from="pool")
            self.rpn = RPN(fpn_channels, anchors.shape[1])
            self.box_head = BoxHead(fpn_channels, self.pool_size)
            self.predictor = predictor(HEAD_WIDTH, num_classes)
        else:  # layer4 belongs to the RoI head
            self.fpn, (channels, pooled_channels) = None, self.backbone.out_channels[-2:]
            self.rpn = RPN(channels, anchors.shape[1])
            self.predictor = predictor(pooled_channels, num_classes)
        for name, value in zip(("pixel_mean", "pixel_std"), PIXELS):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.register_buffer("base_anchors", anchors, persistent=False)

    def forward(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor | None = None,
                gt_labels: Tensor | None = None):
        if self.training:
            return self.losses(images, sizes, gt_boxes, gt_labels)
        return self.detections(self.network(images, sizes), sizes)

    def features(self, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Maps that the RPN reads (L) and maps that the RoI head reads, each (B, D, H, W)."""
        images = normalise_images(images, sizes, self.pixel_mean, self.pixel_std)
        if self.fpn is None:
            features = self.backbone(images, last=3)[-1:]
            return features, features
        features = self.fpn(self.backbone(images))
        return features, features[:-1]  # P6 is for the RPN only

    def anchors(self, shapes: list[tuple[int, int]]) -> Tensor:
        """`all_anchors`; a subclass may have its anchors elsewhere."""
        return all_anchors(self.base_anchors, shapes, self.strides)

    def propose(self, features: list[Tensor], sizes: Tensor) -> dict[str, Tensor]:
        """The region proposal network: outputs, anchors (N, 4) px and proposals of all images.

        Returns {"objectness" (B, N), "deltas" (B, N, 4), "anchors", "level_sizes" (number of anchors on each
        level), "proposals" (B, R, 4), "valid" (B, R)}.
        """
        objectness, deltas = self.rpn(features)
        shapes = [feature.shape[-2:] for feature in features]
        anchors = self.anchors(shapes)
        level_sizes = [height * width * self.base_anchors.shape[1] for height, width in shapes]
        proposals, valid = self.proposals(objectness, deltas, anchors, sizes, level_sizes)
        return {"objectness": objectness, "deltas": deltas, "anchors": anchors, "level_sizes": level_sizes,
                "proposals": proposals, "valid": valid}

    @torch.compiler.disable  # shapes inside NMS depend on the data: it runs between two compiled graphs
    def proposals(self, objectness: Tensor, deltas: Tensor, anchors: Tensor, sizes: Tensor,
                  level_sizes: list[int]) -> tuple[Tensor, Tensor]:
        """`rpn_proposals` of all images: boxes (B, R, 4) px and valid (B, R) bool, without gradient."""
        mode = 0 if self.training else 1
        found = [rpn_proposals(*image, level_sizes, self.pre_nms_top_k[mode], self.post_nms_top_k[mode])
                 for image in zip(objectness.detach(), deltas.detach(), [anchors] * len(sizes), sizes)]
        return tuple(torch.stack(part) for part in zip(*found))

    # DIFFERS: RoIAlign, as in Detectron; the paper has RoI pooling, which rounds boxes to cells.
    def pool(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """Features (B * R, D, pool_size, pool_size) of rois (B, R, 4) px; a subclass may pool otherwise."""
        if self.fpn is None:
            return roi_align(features[0], rois, self.pool_size, 1 / STRIDE_C4)
        return pool_rois(features, rois, self.pool_size)

    def predict(self, features: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B * R, C + 1) and deltas (B * R, C, 4) of rois (B, R, 4) px."""
        pooled = self.pool(features, rois)
        return self.predictor(self.backbone.layer4(pooled).mean(dim=(2, 3)) if self.fpn is None else
                              self.box_head(pooled))

    def losses(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> dict[str, Tensor]:
        """`rpn_losses` and `roi_losses`; the training loss is their sum."""
        rpn_features, roi_features = self.features(images, sizes)
        found = self.propose(rpn_features, sizes)
        rois, labels, targets = sample_rois(found["proposals"], found["valid"], gt_boxes, gt_labels,
                                            self.num_classes, self.roi_samples, self.sample_order)
        logits, deltas = self.predict(roi_features, rois)
        return {**rpn_losses(found["objectness"], found["deltas"], found["anchors"], gt_boxes, gt_labels,
                             self.sample_order),
                **roi_losses(logits, deltas, rois.flatten(0, 1), labels.flatten(), targets.flatten(0, 1))}

    def network(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """{"proposals" (B, R, 4) px, "valid" (B, R) bool, "logits" (B, R, C + 1), "deltas" (B, R, C, 4)}."""
        rpn_features, roi_features = self.features(images, sizes)
        found = self.propose(rpn_features, sizes)
        logits, deltas = self.predict(roi_features, found["proposals"])
        return {"proposals": found["proposals"], "valid": found["valid"],
                "logits": logits.unflatten(0, found["valid"].shape),
                "deltas": deltas.unflatten(0, found["valid"].shape)}

    def candidates(self, outputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`roi_candidates` of every image from the outputs of `network`; their shapes are fixed."""
        images = zip(*(outputs[name] for name in ("logits", "deltas", "proposals", "valid")))
        return [roi_candidates(*image, self.score_threshold) for image in images]

    def detections(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        """Candidates of every image after class-wise NMS; see `ops.final_detections`."""
        return [final_detections(*candidates, *size, self.nms_threshold, self.max_detections)
                for candidates, size in zip(self.candidates(outputs), sizes)]

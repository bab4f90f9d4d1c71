"""Boxes, anchors, losses, RoIAlign and non-maximum suppression: what two or more detectors share.

Boxes are (..., 4) float (x1, y1, x2, y2) in pixels unless a name says otherwise. x2 and y2 are the far edges:
a box is x2 - x1 wide (no "+1"). Everything here runs in float32, also under autocast, because the area of a
large box overflows float16.

Letters: B images, C classes, D channels, H W feature height and width, L pyramid levels, P points over all
levels, G gt objects, R RoIs, N and M any number of boxes.
"""
import math
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

USE_TORCHVISION = True  # False: the plain forms of NMS and RoIAlign everywhere
MAX_GROWTH = 1000 / 16  # a decoded side is at most this many times its anchor's: exp stays finite (Detectron)
# Larger than every area, score and priority. It is finite because some NPUs have no infinity: there a select
# gives the largest number instead, which a comparison with infinity would take for the value of an object.
HUGE = 1e30
# Boxes that the plain NMS decides at once: the more, the fewer and larger its operators. On a CPU torch gives
# tensors of 32768 elements or more to several threads, which wait for each other when other programs use the
# cores. The largest tensors here have 2 * NMS_BLOCK_CPU ** 2 elements, so one thread makes them.
NMS_BLOCK, NMS_BLOCK_CPU = 1024, 127


# ---------------------------------------------------------------------------------------------- boxes

def box_area(boxes: Tensor) -> Tensor:
    """Areas (...,) float32 of boxes (..., 4). They are not clamped: an inverted box may have one below 0."""
    boxes = boxes.float()
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _intersection(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Areas (...) float32 of the intersections of boxes whose shapes (..., 4) broadcast."""
    width_height = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    # In place: with every anchor and every object, these are the largest tensors of the targets.
    width_height -= torch.maximum(boxes1[..., :2], boxes2[..., :2])
    width_height.clamp_(min=0)
    return width_height[..., 0] * width_height[..., 1]


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of every box of one set with every box of another.

    boxes1: (..., N, 4), boxes2: (..., M, 4), same unit; N and M may be 0.
    Returns (..., N, M) in [0, 1]. The IoU of two boxes without area is 0.
    """
    boxes1, boxes2 = boxes1.float()[..., :, None, :], boxes2.float()[..., None, :, :]
    inter = _intersection(boxes1, boxes2)
    union = box_area(boxes1) + box_area(boxes2) - inter
    return inter / union.clamp(min=1 / HUGE)  # 0 / 0 would set the overflow flag of some NPUs


def clip_boxes(boxes: Tensor, height, width) -> Tensor:
    """Boxes (..., 4) clipped to [0, width] x [0, height]; height, width: numbers or 0-d tensors, px."""
    x = boxes[..., 0::2].clamp(min=0).minimum(torch.as_tensor(width, dtype=boxes.dtype, device=boxes.device))
    y = boxes[..., 1::2].clamp(min=0).minimum(torch.as_tensor(height, dtype=boxes.dtype, device=boxes.device))
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Deltas of boxes from their anchors (R-CNN, arXiv 1311.2524, App. C).

    boxes, anchors: (..., 4) px, with positive width and height. weights: factors of the shifts and of the
    logarithms.
    Returns (..., 4) float32: shift of the centre in x and y, in widths and heights of the anchor; then the
    logarithm of the ratio of the widths and of the heights.
    """
    boxes, anchors = boxes.float(), anchors.float()
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = (boxes[..., :2] + size / 2 - (anchors[..., :2] + anchor_size / 2)) / anchor_size
    return torch.cat((shift * weights[0], (size / anchor_size).log() * weights[1]), dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Boxes from deltas and anchors: the inverse of `encode_boxes`.

    deltas: (..., 4), anchors: (..., 4) px. Returns (..., 4) float32 px. MAX_GROWTH limits the sides.
    """
    deltas, anchors = deltas.float(), anchors.float()
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    shift, growth = deltas[..., :2] / weights[0], deltas[..., 2:] / weights[1]
    center = shift * anchor_size + (anchors[..., :2] + anchor_size / 2)
    half = growth.clamp(max=math.log(MAX_GROWTH)).exp() * anchor_size / 2
    return torch.cat((center - half, center + half), dim=-1)


# ------------------------------------------------------------------------- points, anchors, predictions

def grid_points(height: int, width: int, step_y: int, step_x: int, device=None) -> Tensor:
    """Image position (x * step_x, y * step_y) of the upper left corner of every cell of a feature map.

    Returns (H*W, 2) float32 (x, y), pixels of the padded image, in the row-major order of
    `feature.flatten(2)`: targets and predictions meet only through this order.
    """
    x = torch.arange(0, width * step_x, step_x, dtype=torch.float32, device=device)
    y = torch.arange(0, height * step_y, step_y, dtype=torch.float32, device=device)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def cell_anchors(sizes: Tensor, aspect_ratios: tuple[float, ...]) -> Tensor:
    """Anchors of one cell, centred at the origin (Faster R-CNN, arXiv 1506.01497, Sec. 3.1.1).

    sizes: (S,) px, side of the square of the same area; aspect_ratios: T ratios height / width.
    Returns (T, S, 4) float32 px.
    """
    ratios = torch.tensor(aspect_ratios, device=sizes.device).sqrt()
    width, height = (1 / ratios)[:, None] * sizes, ratios[:, None] * sizes
    return torch.stack((-width, -height, width, height), dim=-1) / 2


def place_anchors(anchors: Tensor, points: Tensor) -> Tensor:
    """Copies of the anchors (A, 4) of one cell around every point (P, 2), px.

    Returns (P * A, 4) px; the anchors of a point follow each other.
    """
    return (points.repeat(1, 2)[:, None] + anchors).reshape(-1, 4)


def flatten_predictions(levels: list[Tensor], size: int) -> Tensor:
    """Outputs of a predictor on all levels as one row per point, or per anchor.

    levels: L x (B, A * size, H, W), with A predictions of `size` numbers in each cell.
    Returns (B, P * A, size) float32, in the order of `grid_points` and `place_anchors`.
    """
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, size) for level in levels],
                     dim=1).float()


@torch.no_grad()
def match_anchors(anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, foreground_iou: float,
                  background_iou: float, valid: Tensor | None = None) -> Tensor:
    """Assigns to every anchor an object, background, or neither (Faster R-CNN, Sec. 3.1.2).

    An anchor is positive if its best IoU reaches foreground_iou, or if it is the best anchor of some object.
    It learns the object that it overlaps most. Other anchors are background if their best IoU is below
    background_iou.

    anchors: (N, 4), gt_boxes: (..., G, 4), same unit; gt_labels: (..., G) int64, < 0 for padding and crowds,
    which match nothing. G may be 0. valid: (..., N) bool; anchors that are not valid are neither.
    Returns (..., N) int64: index of the object, -1 = background, -2 = neither.
    """
    gt_boxes, gt_labels = with_padding_row(gt_boxes, gt_labels)
    possible = (gt_labels >= 0)[..., None]  # (..., G, 1)
    if valid is not None:
        possible = possible & valid[..., None, :]
    iou = torch.where(possible, pairwise_iou(gt_boxes, anchors), 0.0)
    best, index = iou.max(dim=-2)
    # DIFFERS: an anchor that is the best of some object still learns the object that it overlaps most itself,
    # as in Detectron and torchvision. In mmdetection it changes to that object.
    best_of_object = iou.amax(dim=-1, keepdim=True)
    low_quality = ((iou == best_of_object) & (best_of_object > 0)).any(dim=-2)
    match = torch.where(best < background_iou, -1, -2)
    match = torch.where((best >= foreground_iou) | low_quality, index, match)
    return match if valid is None else torch.where(valid, match, -2)


def with_padding_row(gt_boxes: Tensor, gt_labels: Tensor) -> tuple[Tensor, Tensor]:
    """(..., G, 4) and (..., G) as they are. If G is 0 they get a row of padding: min and gather need one."""
    if gt_labels.shape[-1]:  # a branch on a shape, not on a value
        return gt_boxes, gt_labels
    return gt_boxes.new_zeros(*gt_labels.shape[:-1], 1, 4), gt_labels.new_full((*gt_labels.shape[:-1], 1), -1)


# ---------------------------------------------------------------------------------------------- losses

def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of independent binary classifiers (RetinaNet, arXiv 1708.02002, Eq. 5), not reduced.

    logits, targets: same shape; targets are 0 or 1. Returns that shape, float32.
    """
    targets = targets.bool()
    wrong = torch.where(targets, -logits, logits).float()  # logit of 1 - p_t, the wrong answer
    alpha_t = torch.where(targets, alpha, 1 - alpha)
    return alpha_t * wrong.sigmoid() ** gamma * F.softplus(wrong)  # softplus(wrong) = -log(p_t)


def _intersection_union(boxes1: Tensor, boxes2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Areas of intersection and union of matched boxes (..., 4); the union is at least eps."""
    boxes1, boxes2 = boxes1.float(), boxes2.float()
    inter = _intersection(boxes1, boxes2)
    return inter, (box_area(boxes1) + box_area(boxes2) - inter).clamp(min=eps)


def iou_loss(pred: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """-ln(IoU) of matched boxes (UnitBox, arXiv 1608.01471), not reduced.

    pred, target: (..., 4) in any one unit. Returns (...,) in [0, -ln(eps)]; disjoint boxes have the maximum.
    """
    inter, union = _intersection_union(pred, target, eps)
    return -(inter / union).clamp(min=eps).log()


def giou_loss(pred: Tensor, target: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - GIoU of matched boxes (arXiv 1902.09630, Algorithm 1), not reduced.

    pred, target: (..., 4) in any one unit. Returns (...,) in [0, 2].
    """
    inter, union = _intersection_union(pred, target, eps)
    corner1 = torch.minimum(pred[..., :2], target[..., :2])
    corner2 = torch.maximum(pred[..., 2:], target[..., 2:])
    enclosing = box_area(torch.cat((corner1, corner2), dim=-1)).clamp(min=eps)
    return 1 - (inter / union - (enclosing - union) / enclosing)


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all ranks, without gradient; in a single process, the tensor itself.

    DDP averages gradients over ranks. A loss that is a sum divided by the mean count of all ranks therefore
    has the gradient of one process that holds the whole batch. Every rank must make the same calls.
    """
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


# ---------------------------------------------------------------------------------------------- RoIAlign

def roi_align(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """Features of every box on a size x size grid (Mask R-CNN, arXiv 1703.06870, Sec. 3).

    Pixel centres lie at half pixels ("aligned"). A cell of the grid is the mean of
    ceil(cell height) x ceil(cell width) bilinear samples. A sample more than a pixel outside the map counts
    as 0. The result is that of `torchvision.ops.roi_align(..., sampling_ratio=-1, aligned=True)`, which does
    the work where it has a kernel.

    features: (B, D, H, W); boxes: (B, R, 4), pixels of the image; scale: map pixels per image pixel.
    Returns (B * R, D, size, size) float32.
    """
    features, boxes = features.float(), boxes.float()
    operators = torchvision_operators(features.device.type)
    if operators:
        return operators.roi_align(features, list(boxes), size, scale, sampling_ratio=-1, aligned=True)
    with torch.autocast(features.device.type, enabled=False):  # autocast would round the coordinates, too
        return roi_align_plain(features, boxes, size, scale)


def roi_align_plain(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """`roi_align` in plain torch, for every device. No box may be larger than the map.

    Bilinear interpolation and the mean over samples act on rows and columns separately. A box is therefore
    two matrices, (size, H) and (size, W), and its grid is one product of the map with both.
    """
    x1, y1, x2, y2 = (boxes * scale - 0.5).unbind(-1)
    rows = _sampling_matrix(y1, y2, size, features.shape[2])  # (B, R, size, H)
    columns = _sampling_matrix(x1, x2, size, features.shape[3])  # (B, R, size, W)
    half_way = torch.einsum("brph,bdhw->brpdw", rows, features)
    return torch.einsum("brpdw,brqw->brdpq", half_way, columns).flatten(0, 1)


def _sampling_matrix(start: Tensor, end: Tensor, size: int, length: int) -> Tensor:
    """Weight of every pixel of a line in each of `size` equal cells between start and end.

    start, end: (...,) px of the line; length: pixels of the line. Returns (..., size, length).
    """
    cell = ((end - start) / size)[..., None, None]
    count = cell.ceil()  # samples per cell
    i = torch.arange(-(-length // size) + 1, device=start.device)
    p = torch.arange(size, device=start.device)[:, None]
    counted = count.clamp(min=1)
    position = start[..., None, None] + p * cell + (i + 0.5) * cell / counted  # (..., size, samples)
    weight = ((i < count) & (position >= -1) & (position <= length)) / counted
    position = position.clamp(min=0, max=length - 1)[..., None]
    tent = (1 - (position - torch.arange(length, device=start.device)).abs()).clamp(min=0)
    return (tent * weight[..., None]).sum(dim=-2)


# ------------------------------------------------------------------------- non-maximum suppression

def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, limit: int | None = None) -> Tensor:
    """Greedy non-maximum suppression: keep the best box, drop all that overlap it too much, repeat.

    "Too much" is an IoU above iou_threshold. Equal scores keep their input order. On a GPU and in a compiled
    graph torchvision's operator does the work, if there is one; elsewhere `nms_plain`, with the same result.

    boxes: (N, 4) px, scores: (N,); N may be 0.
    Returns indices (M,) int64 of the kept boxes, best score first, at most `limit` of them.
    """
    operators = _torchvision_nms(boxes)
    if operators:
        return operators.nms(boxes.float(), scores.float(), iou_threshold)[:limit]
    return nms_plain(boxes, scores, iou_threshold, limit=limit)


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float,
                limit: int | None = None) -> Tensor:
    """Class-wise `nms`: boxes suppress only boxes of their own class. labels: (N,) int64."""
    operators = _torchvision_nms(boxes)
    if operators:
        boxes = boxes.float()
        if boxes.numel():  # every class gets a place of its own, so that one NMS does for all
            boxes = boxes - boxes.min()
            boxes = boxes + (labels * (boxes.max() + 1))[:, None]
        return operators.nms(boxes, scores.float(), iou_threshold)[:limit]
    return nms_plain(boxes, scores, iou_threshold, labels, limit)


def nms_plain(boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None,
              limit: int | None = None) -> Tensor:
    """`nms` in plain torch, for every device; with labels, `batched_nms`.

    Boxes are sorted by score and decided in blocks. Boxes kept in earlier blocks first suppress boxes of the
    block. Within it the rule "keep a box unless a better kept box overlaps it" is applied to all boxes at
    once, until nothing changes. After round k the first k boxes are final, so the fixed point is the greedy
    answer; usually a few rounds reach it.
    """
    boxes, scores, threshold = boxes.float(), scores.float(), float32_below(iou_threshold)
    size = NMS_BLOCK_CPU if boxes.device.type == "cpu" else NMS_BLOCK
    position = torch.arange(size, device=boxes.device)
    is_better = position[:, None] < position  # within a block; triu would start threads for any size

    def suppresses(better: Tensor, worse: Tensor) -> Tensor:  # indices (N,), (M,) -> (N, M) bool
        overlap = pairwise_iou(boxes[better], boxes[worse]) > threshold
        return overlap if labels is None else overlap & (labels[better][:, None] == labels[worse])

    order = scores.argsort(descending=True, stable=True)
    kept = order[:0]
    for block in order.split(size):
        for better in kept.split(size):
            block = block[~suppresses(better, block).any(dim=0)]
        over = suppresses(block, block) & is_better[:len(block), :len(block)]
        keep, before = torch.ones_like(block, dtype=torch.bool), None
        while before is None or not torch.equal(keep, before):
            keep, before = ~(over & keep[:, None]).any(dim=0), keep
        kept = torch.cat((kept, block[keep]))
        if limit is not None and len(kept) >= limit:
            break
    return kept[:limit]


def _torchvision_nms(boxes: Tensor):
    """torchvision's operators where its NMS is the better one, else None.

    On a GPU it is faster. In a compiled graph it is one operator, and the loop of the plain form would break
    the graph. On a CPU the plain form is faster.
    """
    if boxes.is_cuda or torch.compiler.is_compiling():
        return torchvision_operators(boxes.device.type)
    return None


def torchvision_operators(device_type: str):
    """torchvision's operators where they have a kernel for the device, else None."""
    # On an NPU torchvision falls back to the CPU, while the plain forms stay on the device.
    return _import_torchvision_operators() if USE_TORCHVISION and device_type in ("cpu", "cuda") else None


@cache  # at the first call, because importing torchvision takes longer than importing torch
def _import_torchvision_operators():
    """`torchvision.ops`, or None where it is absent or does not fit torch: then only speed is lost."""
    try:
        import torchvision.ops
    except Exception:  # a torchvision made for another torch raises RuntimeError, not ImportError
        return None
    return torchvision.ops


def float32_below(value: float) -> float:
    """The largest float32 that is not above the value."""
    # torchvision compares a float32 IoU with a float64 threshold, while torch rounds the threshold to float32
    # first. With this number ">" gives torchvision's answer, e.g. for an IoU of exactly 3/5 against 0.6.
    rounded = torch.tensor(value, dtype=torch.float32)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf))
    return rounded.item()


# ---------------------------------------------------------------------------------------------- detections

def topk_candidates(scores: Tensor, level_sizes: list[int], top_k: int,
                    score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Candidates of a one-stage detector for NMS: the top_k best (point, class) pairs of every level.

    scores: (P, C) of one image, level by level; level_sizes: L point counts that add up to P.
    Returns index of the point (M,) int64, label (M,) int64, score (M,), which is 0 unless it is above the
    threshold. M depends on shapes alone.
    """
    # DIFFERS: as in mmdetection 3.x. mmdetection 2.x keeps the points with the best class score and all
    # classes of each. Its FCOS and AdelaiDet sort by the product with centerness.
    num_classes = scores.shape[-1]
    kept, offset = [], 0
    for size in level_sizes:
        pair = scores[offset:offset + size].flatten().topk(min(top_k, size * num_classes)).indices
        kept.append(pair + offset * num_classes)
        offset += size
    pair = torch.cat(kept)
    point, label = pair // num_classes, pair % num_classes
    best = scores[point, label]
    return point, label, torch.where(best > score_threshold, best, 0.0)


def clip_candidates(boxes: Tensor, scores: Tensor, height, width) -> tuple[Tensor, Tensor]:
    """Boxes (M, 4) px clipped to the image, and scores (M,), 0 for boxes without area after that."""
    boxes = clip_boxes(boxes, height, width)
    return boxes, torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1), scores, 0.0)


def final_detections(boxes: Tensor, scores: Tensor, labels: Tensor, height, width, nms_threshold: float,
                     max_detections: int) -> dict[str, Tensor]:
    """Detections of one image from its candidates: clipping, class-wise NMS, the max_detections best.

    boxes: (M, 4) px, scores: (M,), 0 = no candidate, labels: (M,) int64; M may be 0. height, width: size of
    the image without padding.
    Returns {"boxes" (N, 4), "scores" (N,), "labels" (N,) int64}, best score first; N may be 0.
    """
    boxes, scores = clip_candidates(boxes, scores, height, width)
    valid = scores > 0
    boxes, scores, labels = boxes[valid], scores[valid], labels[valid]
    keep = batched_nms(boxes, scores, labels, nms_threshold, max_detections)
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}

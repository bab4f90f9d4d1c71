"""Box arithmetic, losses and non-maximum suppression shared by the detectors.

Boxes are `(..., 4)` float (x1, y1, x2, y2) in pixels unless a name says otherwise; x2, y2 are the far edges,
so a box is x2 - x1 wide (no "+1"). Everything here runs in float32, also under autocast: areas overflow
float16.
"""
import math
from functools import cache

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

MAX_GROWTH = 1000 / 16  # of a decoded side over its anchor, lest exp overflows (Detectron)
NMS_BLOCK = 256  # boxes the plain NMS decides together: enough for few rounds, not too many for the IoUs


# ---------------------------------------------------------------------------------------------- boxes

def box_area(boxes: Tensor) -> Tensor:
    """Areas (...,) float32 of boxes (..., 4). An inverted box gets whatever the product says."""
    boxes = boxes.float()
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU of every box of one set with every box of another.

    boxes1: (N, 4), boxes2: (M, 4), same unit. Returns (N, M) in [0, 1]; two boxes without area give NaN.
    """
    boxes1, boxes2 = boxes1.float(), boxes2.float()
    corner1 = torch.maximum(boxes1[:, None, :2], boxes2[None, :, :2])
    corner2 = torch.minimum(boxes1[:, None, 2:], boxes2[None, :, 2:])
    width_height = (corner2 - corner1).clamp(min=0)
    inter = width_height[..., 0] * width_height[..., 1]
    return inter / (box_area(boxes1)[:, None] + box_area(boxes2)[None, :] - inter)


def clip_boxes(boxes: Tensor, height, width) -> Tensor:
    """Boxes (..., 4) cut to [0, width] x [0, height]; height, width are numbers or 0-d tensors, px."""
    x = boxes[..., 0::2].clamp(min=0).minimum(torch.as_tensor(width, dtype=boxes.dtype, device=boxes.device))
    y = boxes[..., 1::2].clamp(min=0).minimum(torch.as_tensor(height, dtype=boxes.dtype, device=boxes.device))
    return torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)


@torch.no_grad()
def match_anchors(anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor, foreground_iou: float,
                  background_iou: float, usable: Tensor | None = None) -> Tensor:
    """The object every anchor learns (Faster R-CNN, arXiv 1506.01497, Sec. 3.1.2).

    An anchor takes the object it overlaps most, if with an IoU of at least foreground_iou, or if no anchor
    overlaps that or another object more than it does. It is background below background_iou.

    anchors (N, 4); gt_boxes (G, 4) px, gt_labels (G,) int64, < 0 for padding and crowds, which no anchor
    sees; G may be 0. usable: (N,) bool; other anchors match nothing. Returns (N,) int64: object index,
    -1 = background, -2 = neither.
    """
    # One more row, an object that overlaps nothing: G may be 0.
    iou = F.pad(torch.where((gt_labels >= 0)[:, None], pairwise_iou(gt_boxes, anchors), 0.0), (0, 0, 0, 1))
    if usable is not None:
        iou = torch.where(usable, iou, 0.0)
    best, index = iou.max(dim=0)
    # DIFFERS: as in Detectron and torchvision, an anchor that is the best of some object keeps the object
    # that it overlaps most itself. In mmdetection it changes to the former.
    best_of_object = iou.amax(dim=1, keepdim=True)
    low_quality = ((iou == best_of_object) & (best_of_object > 0)).any(dim=0)
    match = torch.where(best < background_iou, -1, -2)
    match = torch.where((best >= foreground_iou) | low_quality, index, match)
    return match if usable is None else torch.where(usable, match, -2)


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Offsets of boxes from their anchors (R-CNN, arXiv 1311.2524, App. C).

    boxes, anchors: (..., 4) px, with area. Returns deltas (..., 4) float32: the shift of the centre in widths
    and heights of the anchor, then the logarithm of the ratio of the sizes.
    """
    boxes, anchors = boxes.float(), anchors.float()
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    shift = (boxes[..., :2] + size / 2 - (anchors[..., :2] + anchor_size / 2)) / anchor_size
    return torch.cat((shift, (size / anchor_size).log()), dim=-1)


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Boxes (..., 4) px from deltas (..., 4) and anchors (..., 4) px: `encode_boxes` backwards. A side grows
    at most MAX_GROWTH times."""
    deltas, anchors = deltas.float(), anchors.float()
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    center = deltas[..., :2] * anchor_size + (anchors[..., :2] + anchor_size / 2)
    half = deltas[..., 2:].clamp(max=math.log(MAX_GROWTH)).exp() * anchor_size / 2
    return torch.cat((center - half, center + half), dim=-1)


def cell_corners(height: int, width: int, step_y: int, step_x: int, device=None) -> Tensor:
    """Upper left corners (x * step_x, y * step_y) of the cells of a feature map.

    Returns (H*W, 2) float32 (x, y), pixels of the padded image, in the row-major order of
    `feature.flatten(2)`.
    """
    x, y = torch.arange(width, device=device) * step_x, torch.arange(height, device=device) * step_y
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2).float()


def torchvision_corners(shapes: list[tuple[int, int]], stride: int, device=None) -> list[Tensor]:
    """`cell_corners` of all levels as torchvision reckons them.

    Its cells lie image size // map size apart, which is less than the stride where the map's size was rounded
    up. shapes: (height, width) of each level; stride of the first, which divides the image.
    """
    image_height, image_width = (side * stride for side in shapes[0])
    return [cell_corners(height, width, image_height // height, image_width // width, device)
            for height, width in shapes]


# ---------------------------------------------------------------------------------------------- losses

def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss of independent binary classifiers (RetinaNet, arXiv 1708.02002, Eq. 5), not reduced.

    logits, targets: same shape; targets are 0 or 1. Returns that shape, float32: the caller weighs and sums.
    """
    targets = targets.bool()
    wrong = torch.where(targets, -logits, logits).float()  # logit of the other answer: of 1 - p_t
    alpha_t = torch.where(targets, alpha, 1 - alpha)
    return alpha_t * wrong.sigmoid() ** gamma * F.softplus(wrong)  # softplus: -log(p_t)


def _intersection_union(boxes1: Tensor, boxes2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    boxes1, boxes2 = boxes1.float(), boxes2.float()
    corner1 = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    corner2 = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    width_height = (corner2 - corner1).clamp(min=0)
    inter = width_height[..., 0] * width_height[..., 1]
    return inter, (box_area(boxes1) + box_area(boxes2) - inter).clamp(min=eps)


def iou_loss(pred: Tensor, target: Tensor, eps: float = 1e-6) -> Tensor:
    """-ln(IoU) of matched boxes (UnitBox, arXiv 1608.01471), not reduced.

    pred, target: (..., 4) in any one unit. Returns (...,) in [0, -ln(eps)]: the upper end for disjoint boxes.
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
    """Average of a tensor over all ranks, without gradient; the tensor itself in a single process.

    DDP averages gradients over ranks. A loss that is a sum divided by the *mean* count of all ranks therefore
    has the gradient of one process that holds the joined batch. Every rank must call this equally often.
    """
    value = value.detach()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


# ---------------------------------------------------------------------------------------------- RoIAlign

def roi_align(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """Features of every box on a size x size grid (Mask R-CNN, arXiv 1703.06870, Sec. 3), half-pixel aligned.

    A cell of the grid is the mean of ceil(cell height) x ceil(cell width) bilinear samples; samples more than
    a pixel outside the map count as 0. features (B, D, H, W), boxes (B, R, 4) px of the image, scale: pixels
    of the map per pixel of the image. Returns (B * R, D, size, size) float32. The result is that of
    `torchvision.ops.roi_align(..., sampling_ratio=-1, aligned=True)`, which is called where it has a kernel.
    """
    features, boxes = features.float(), boxes.float()
    torchvision_ops = _torchvision_ops(features.device.type)
    if torchvision_ops:
        return torchvision_ops.roi_align(features, list(boxes), size, scale, sampling_ratio=-1, aligned=True)
    with torch.autocast(features.device.type, enabled=False):  # its products are of coordinates, too
        return roi_align_plain(features, boxes, size, scale)


def roi_align_plain(features: Tensor, boxes: Tensor, size: int, scale: float) -> Tensor:
    """`roi_align` in plain torch: runs on every device.

    Bilinear interpolation and the mean over samples work on rows and columns apart, so a box is two matrices,
    (size, H) and (size, W), and its grid is one product with the map from either side. A box must not be
    longer than the map.
    """
    x1, y1, x2, y2 = (boxes * scale - 0.5).unbind(-1)
    rows = _sampling_matrix(y1, y2, size, features.shape[2])  # (B, R, size, H)
    columns = _sampling_matrix(x1, x2, size, features.shape[3])  # (B, R, size, W)
    half_way = torch.einsum("brph,bdhw->brpdw", rows, features)
    return torch.einsum("brpdw,brqw->brdpq", half_way, columns).flatten(0, 1)


def _sampling_matrix(start: Tensor, end: Tensor, size: int, length: int) -> Tensor:
    """Weight (..., size, length) of the pixels of a line in `size` equal cells from start to end (...,)."""
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
    """Greedy non-maximum suppression: keep the best box, drop what overlaps it too much, repeat.

    boxes: (N, 4) px, scores: (N,); N may be 0. "Too much" is an IoU above the threshold. Returns the kept
    indices (M,) int64, best score first, the first `limit` of them; equal scores keep their input order. The
    result is that of `torchvision.ops.nms`, which is called where that is better.
    """
    torchvision_ops = _torchvision_nms(boxes)
    if torchvision_ops:
        return torchvision_ops.nms(boxes.float(), scores.float(), iou_threshold)[:limit]
    return nms_plain(boxes, scores, iou_threshold, limit=limit)


def batched_nms(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float,
                limit: int | None = None) -> Tensor:
    """Class-wise `nms`: boxes suppress only boxes of their own class.

    boxes: (N, 4) px, scores: (N,), labels: (N,) int64; N may be 0. Returns kept indices (M,), best score
    first, the first `limit` of them.
    """
    torchvision_ops = _torchvision_nms(boxes)
    if torchvision_ops:
        if boxes.numel():  # it moves classes apart by an offset that supposes coordinates >= 0
            boxes = boxes.float() - boxes.float().min().clamp(max=0)
        return torchvision_ops.batched_nms(boxes.float(), scores.float(), labels, iou_threshold)[:limit]
    return nms_plain(boxes, scores, iou_threshold, labels, limit)


def nms_plain(boxes: Tensor, scores: Tensor, iou_threshold: float, labels: Tensor | None = None,
              limit: int | None = None) -> Tensor:
    """`nms` (and `batched_nms`, given labels) in plain torch: runs on every device.

    The sorted boxes are decided block by block. A block first loses what the boxes kept so far suppress.
    Inside it "keep a box unless a kept better box overlaps it" is repeated until nothing changes: after round
    k the first k boxes are final, so the fixed point is the greedy answer, and it is reached in a few rounds.
    """
    order = scores.float().argsort(descending=True, stable=True)
    boxes, threshold = boxes.float()[order], float32_below(iou_threshold)
    labels = None if labels is None else labels[order]

    def suppresses(better: Tensor, worse: Tensor) -> Tensor:  # (N,), (M,) positions -> (N, M) bool
        overlap = pairwise_iou(boxes[better], boxes[worse]) > threshold
        return overlap if labels is None else overlap & (labels[better][:, None] == labels[worse])

    kept = order.new_zeros(0)
    for block in torch.arange(len(order), device=order.device).split(NMS_BLOCK):
        block = block[~suppresses(kept, block).any(dim=0)]
        over = suppresses(block, block).triu(diagonal=1)
        keep, before = torch.ones_like(block, dtype=torch.bool), None
        while before is None or not torch.equal(keep, before):
            keep, before = ~(over & keep[:, None]).any(dim=0), keep
        kept = torch.cat((kept, block[keep]))
        if limit is not None and len(kept) >= limit:
            break
    return order[kept[:limit]]


def _torchvision_nms(boxes: Tensor):
    """torchvision's kernels on a GPU, and in a graph, which the plain form's loop would break. On a CPU the
    plain form is faster."""
    return _torchvision_ops(boxes.device.type) if boxes.is_cuda or torch.compiler.is_compiling() else None


@cache  # imported at the first call: it takes longer than torch itself
def _torchvision_ops(device_type: str):
    """torchvision's kernels, or None. Only a fast path: a CPU build of torch cannot load the registry's
    torchvision, and on an NPU it falls back to the CPU, where the plain form stays on the device."""
    if device_type not in ("cpu", "cuda"):
        return None
    try:
        import torchvision.ops
    except Exception:  # a torch / torchvision mismatch raises RuntimeError, not ImportError
        return None
    return torchvision.ops


def float32_below(value: float) -> float:
    """The largest float32 that is not above the value."""
    # torchvision compares a float32 IoU with a double threshold; torch rounds the threshold to float32 first.
    # With this number ">" decides alike (IoU of exactly 3/5 against 0.6).
    rounded = torch.tensor(value, dtype=torch.float32)
    if rounded.item() > value:
        rounded = torch.nextafter(rounded, torch.tensor(-math.inf))
    return rounded.item()


# ---------------------------------------------------------------------------------------------- detections

def best_pairs(scores: Tensor, level_sizes: list[int], top_k: int,
               score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What a one-stage detector hands on to NMS: per level the `top_k` (point, class) pairs with the best
    score.

    scores: (P, C) of one image, level by level; level_sizes: L numbers that add up to P. Returns point
    index (M,) int64, label (M,) int64, score (M,), 0 where it is not above the threshold: M is the same for
    all images of a size.
    """
    # DIFFERS: mmdetection 3.x's choice. mmdetection 2.x keeps the points with the best class and all classes
    # of each; its FCOS and AdelaiDet rank by the product with centerness.
    num_classes = scores.shape[-1]
    kept = []
    first = 0
    for size in level_sizes:
        pair = scores[first:first + size].flatten().topk(min(top_k, size * num_classes)).indices
        kept.append(pair + first * num_classes)
        first += size
    pair = torch.cat(kept)
    point, label = pair // num_classes, pair % num_classes
    best = scores[point, label]
    return point, label, torch.where(best > score_threshold, best, 0.0)


def clip_candidates(boxes: Tensor, scores: Tensor, height, width) -> tuple[Tensor, Tensor]:
    """Boxes (M, 4) cut to the image of height, width px; scores (M,), 0 for a box that is empty then."""
    boxes = clip_boxes(boxes, height, width)
    return boxes, torch.where((boxes[:, 2:] > boxes[:, :2]).all(dim=1), scores, 0.0)


def final_detections(boxes: Tensor, scores: Tensor, labels: Tensor, height, width, nms_threshold: float,
                     count: int) -> dict[str, Tensor]:
    """Candidates (M, 4) px, (M,), (M,) of one image, clipped to it, without empty boxes and those of score 0,
    after class-wise NMS: the `count` best.

    height, width: of the image without padding. Returns {"boxes" (N, 4), "scores" (N,), "labels" (N,) int64},
    best first; N may be 0.
    """
    boxes, scores = clip_candidates(boxes, scores, height, width)
    usable = scores > 0
    boxes, scores, labels = boxes[usable], scores[usable], labels[usable]
    keep = batched_nms(boxes, scores, labels, nms_threshold, count)
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}

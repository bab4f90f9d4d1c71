"""DeFRCN: Decoupled Faster R-CNN for Few-Shot Object Detection (arXiv 2108.09017).

A Faster R-CNN on the last-but-one stage of a ResNet ("C4") is trained on base classes with many images and
fine-tuned on novel classes with K boxes each. Three ideas, each in a place of its own:

    scale_gradient, Affine   the gradient decoupled layer: RPN and RoI head see the same features through an
                             affine layer of their own, and what they send back to the backbone is scaled
    Predictor, freeze_res5   what trains in the fine-tuning; dropout in front of the classifier
    calibrate                the prototypical calibration block: scores mixed with the similarity of a
                             detection to the mean of its class's shots, in the eyes of an ImageNet classifier

`DeFRCN(..., decouple=False, pool_size=14, freeze_at=2)` is Faster R-CNN (arXiv 1506.01497) with a C4 backbone
as in Detectron.

Letters: B images, C classes, G gt objects (padded), H W height, width of the feature map, N anchors,
R proposals or RoIs, D channels. The class logits of a RoI have background in the last place, C.
"""
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import (
    TORCHVISION_PIXELS,
    ResNet,
    WeightsError,
    imagenet_file,
    normalise_images,
    read_weight_file,
    rename_detectron2_resnet,
    rename_keys,
    with_pixels,
)
from ops import (
    clip_boxes,
    decode_boxes,
    encode_boxes,
    final_detections,
    match_anchors,
    mean_over_ranks,
    nms,
    pairwise_iou,
    roi_align,
)

STRIDE = 16  # of the backbone's last stage but one
PIXELS = ((123.675, 116.28, 103.53), (1.0, 1.0, 1.0))  # RGB mean and std of the published weights

# ---- region proposals
ANCHOR_SIZES = (32, 64, 128, 256, 512)
ASPECT_RATIOS = (0.5, 1.0, 2.0)  # height / width
RPN_FOREGROUND_IOU, RPN_BACKGROUND_IOU = 0.7, 0.3
RPN_SAMPLES, RPN_POSITIVES = 256, 128  # anchors per image that have a loss; of these at most positive
PRE_NMS_TOP_K = (12000, 6000)  # in training, at inference
POST_NMS_TOP_K = (2000, 1000)
RPN_NMS_THRESHOLD = 0.7

# ---- RoI head
POOL_SIZE = 7  # DeFRCN's; Detectron's C4 has 14
ROI_FOREGROUND_IOU = 0.5
ROI_SAMPLES, ROI_POSITIVE_FRACTION = 512, 0.25  # RoIs per image in training
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the box code of a RoI
CLS_DROPOUT = 0.8  # probability, in the fine-tuning only
COSINE_SCALE = 20.0  # of the optional cosine classifier (TFA, arXiv 2003.06957)

# ---- decoupling: what of the gradient of RPN and RoI head reaches the backbone
RPN_GRAD_SCALE = 0.0
ROI_GRAD_SCALE_BASE, ROI_GRAD_SCALE_NOVEL, ROI_GRAD_SCALE_VOC = 0.75, 0.01, 0.001

# ---- detection
SCORE_THRESHOLD = 0.05
NMS_THRESHOLD = 0.5
MAX_DETECTIONS = 100

# ---- calibration
CALIBRATION_ALPHA = 0.5  # weight of the detector's own score
CALIBRATION_WINDOW = (0.05, 1.0)  # scores that are calibrated: lower < score <= upper


# ---------------------------------------------------------------------------------------------- decoupling

class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x itself; on the way back its gradient times `scale` (the gradient decoupled layer).

    A scale of 0 gives zero gradients, not missing ones: every rank still has all of them to exchange.
    """
    return _ScaleGradient.apply(x, scale)


class Affine(nn.Module):
    """x * weight + bias per channel of (B, D, H, W): the part of the decoupled layer that learns."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


# ---------------------------------------------------------------------------------------------- proposals

class RPN(nn.Module):
    """Region proposal network: objectness and box of every anchor (Faster R-CNN, Sec. 3.1).

    forward: (B, D, H, W) -> objectness logits (B, N), deltas (B, N, 4), float32; the anchors of a cell follow
    each other, cells in the order of `feature.flatten(2)`.
    """

    def __init__(self, channels: int):
        super().__init__()
        per_cell = len(ANCHOR_SIZES) * len(ASPECT_RATIOS)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness = nn.Conv2d(channels, per_cell, 1)
        self.deltas = nn.Conv2d(channels, per_cell * 4, 1)
        for layer in (self.conv, self.objectness, self.deltas):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.conv(feature).relu()
        objectness, deltas = self.objectness(hidden), self.deltas(hidden)
        return (objectness.permute(0, 2, 3, 1).flatten(1).float(),
                deltas.permute(0, 2, 3, 1).reshape(len(deltas), -1, 4).float())


def image_anchors(height: int, width: int, device=None) -> Tensor:
    """Anchors (N, 4) px of a feature map, around the corner (x * STRIDE, y * STRIDE) of every cell; the
    aspect ratios of one size come before the next size.
    """
    sizes = torch.tensor(ANCHOR_SIZES, dtype=torch.float32, device=device)[:, None]
    ratios = torch.tensor(ASPECT_RATIOS, device=device)
    w = (sizes ** 2 / ratios).sqrt()
    h = ratios * w
    cell = torch.stack((-w, -h, w, h), dim=-1).reshape(-1, 4) / 2
    x, y = torch.arange(width, device=device) * STRIDE, torch.arange(height, device=device) * STRIDE
    corner = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 1, 2)
    return (corner.repeat(1, 1, 2) + cell).reshape(-1, 4)


def random_order(count: int, device) -> Tensor:
    """(count,) numbers; whoever is sampled is taken in the ascending order of these."""
    return torch.rand(count, device=device)


@torch.no_grad()
def sample(positive: Tensor, negative: Tensor, count: int, max_positive: int,
           order: Tensor) -> tuple[Tensor, Tensor]:
    """At most `max_positive` of the positives, then negatives to make `count` (Faster R-CNN, Sec. 3.1.3).

    positive, negative: (N,) bool; order: (N,) float. Returns the two masks (N,) bool of those taken; together
    fewer than `count` if there are not as many.
    """
    taken = positive & (_rank(order, positive) < max_positive)
    return taken, negative & (_rank(order, negative) < count - taken.sum())


def _rank(order: Tensor, mask: Tensor) -> Tensor:
    """Position of every element in the ascending order of those in the mask, which come first."""
    return torch.where(mask, order, math.inf).argsort(stable=True).argsort()


def rpn_losses(objectness: Tensor, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, gt_labels: Tensor,
               sample_order: Callable = random_order) -> dict[str, Tensor]:
    """Objectness and box loss of RPN_SAMPLES sampled anchors per image (Faster R-CNN, Eq. 1).

    objectness (B, N), deltas (B, N, 4), anchors (N, 4) px, gt_boxes (B, G, 4) px, gt_labels (B, G), < 0 for
    padding and crowds. Without objects the box loss is 0, with a graph. Returns {"rpn_cls", "rpn_box"}.
    """
    cls_loss, box_loss = [], []
    for logit, delta, boxes, labels in zip(objectness, deltas, gt_boxes, gt_labels):
        match = match_anchors(anchors, boxes, labels, RPN_FOREGROUND_IOU, RPN_BACKGROUND_IOU)
        positive, negative = sample(match >= 0, match == -1, RPN_SAMPLES, RPN_POSITIVES,
                                    sample_order(len(match), match.device))
        cross_entropy = F.binary_cross_entropy_with_logits(logit, positive.float(), reduction="none")
        cls_loss.append(torch.where(positive | negative, cross_entropy, 0.0).sum())
        # Other anchors have their own box for a target: its logarithms are finite.
        target = encode_boxes(torch.where(positive[:, None], _rows(boxes, match), anchors), anchors)
        box_loss.append(torch.where(positive[:, None], (delta - target).abs(), 0.0).sum())
    norm = RPN_SAMPLES * len(objectness)  # also where fewer could be sampled, as in Detectron
    return {"rpn_cls": torch.stack(cls_loss).sum() / norm, "rpn_box": torch.stack(box_loss).sum() / norm}


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """boxes (G, 4) at index (N,), whose negative values mean "none"; G may be 0."""
    return F.pad(boxes, (0, 0, 0, 1))[torch.where(index < 0, len(boxes), index)]


@torch.no_grad()
def rpn_proposals(objectness: Tensor, deltas: Tensor, anchors: Tensor, size: Tensor, pre_nms_top_k: int,
                  post_nms_top_k: int) -> tuple[Tensor, Tensor]:
    """Proposals of one image: the best anchors, decoded, clipped, after NMS.

    objectness (N,), deltas (N, 4), anchors (N, 4) px; size: (2,) height, width without padding. Returns boxes
    (post_nms_top_k, 4) px, best first, and which of them are real (post_nms_top_k,) bool: a fixed number of
    rows, whatever NMS leaves.
    """
    scores, best = objectness.topk(min(pre_nms_top_k, len(objectness)))
    boxes = clip_boxes(decode_boxes(deltas[best], anchors[best]), *size)
    usable = (boxes[:, 2:] > boxes[:, :2]).all(dim=1) & boxes.isfinite().all(dim=1) & scores.isfinite()
    # What is not usable becomes an empty box: it suppresses nothing and comes last.
    boxes, scores = torch.where(usable[:, None], boxes, 0.0), torch.where(usable, scores, -math.inf)
    kept = nms(boxes, scores, RPN_NMS_THRESHOLD, post_nms_top_k)
    # Filled up before it is cut: a fixed number of rows, also for torch.export.
    kept = torch.cat((kept, kept.new_full((post_nms_top_k,), -1)))[:post_nms_top_k]
    real = (kept >= 0) & usable[kept]
    return torch.where(real[:, None], boxes[kept], 0.0), real


# ---------------------------------------------------------------------------------------------- RoI head

@torch.no_grad()
def sample_rois(proposals: Tensor, real: Tensor, gt_boxes: Tensor, gt_labels: Tensor, num_classes: int,
                count: int = ROI_SAMPLES, sample_order: Callable = random_order):
    """RoIs of one image to train on: proposals and objects, at most ROI_POSITIVE_FRACTION of them positive.

    proposals (R, 4) px, real (R,) bool; gt_boxes (G, 4), gt_labels (G,), < 0 for padding and crowds. Returns
    rois (count, 4) px, positives first; labels (count,) int64, num_classes = background, -1 = a row too many;
    target boxes (count, 4) px.
    """
    object_here = gt_labels >= 0
    boxes, real = torch.cat((proposals, gt_boxes)), torch.cat((real, object_here))
    boxes, real = F.pad(boxes, (0, 0, 0, count)), F.pad(real, (0, count))  # there are always enough rows
    iou = torch.where(object_here[:, None], pairwise_iou(gt_boxes, boxes).nan_to_num(0.0), 0.0)
    best, index = F.pad(iou, (0, 0, 0, 1)).max(dim=0)  # one more object, that overlaps nothing: G may be 0
    positive, negative = sample(real & (best >= ROI_FOREGROUND_IOU), real & (best < ROI_FOREGROUND_IOU),
                                count, int(count * ROI_POSITIVE_FRACTION),
                                sample_order(len(boxes), boxes.device))
    labels = torch.where(positive, F.pad(gt_labels, (0, 1), value=-1)[index],
                         torch.where(negative, num_classes, -1))
    first = torch.where(positive, 0, torch.where(negative, 1, 2)).argsort(stable=True)[:count]
    return boxes[first], labels[first], _rows(gt_boxes, torch.where(positive, index, -1)[first])


class CosineClassifier(nn.Module):
    """Scores from the angle between a feature and a weight per class (TFA, arXiv 2003.06957).

    forward: (R, D) -> (R, outputs), COSINE_SCALE times the cosine.
    """

    def __init__(self, channels: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, channels))

    def forward(self, x: Tensor) -> Tensor:
        # The norm of the weights has no gradient: TFA rescales them in place before each use.
        weight = self.weight / (self.weight.detach().norm(dim=1, keepdim=True) + 1e-5)
        return COSINE_SCALE * F.linear(x / (x.norm(dim=1, keepdim=True) + 1e-5), weight)


class Predictor(nn.Module):
    """Class and box of every RoI.

    forward: pooled features (R, D) -> logits (R, C + 1), deltas (R, C, 4), float32. dropout: probability, in
    front of the classifier only (the box sees the whole feature).
    """

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0, cosine: bool = False):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.cls_score = (CosineClassifier(channels, num_classes + 1) if cosine else
                          nn.Linear(channels, num_classes + 1))
        self.deltas = nn.Linear(channels, num_classes * 4)
        for layer, std in ((self.cls_score, 0.01), (self.deltas, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            if not isinstance(layer, CosineClassifier):
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(self.dropout(x)).float(), self.deltas(x).unflatten(1, (-1, 4)).float()


def roi_losses(logits: Tensor, deltas: Tensor, rois: Tensor, labels: Tensor,
               target_boxes: Tensor) -> dict[str, Tensor]:
    """Cross entropy and L1 box loss, both over the number of sampled RoIs (Fast R-CNN, 1504.08083, Sec. 2.3).

    logits (R, C + 1), deltas (R, C, 4) of all images; rois, target_boxes (R, 4) px; labels (R,), C =
    background, -1 = no loss. Without positives the box loss is 0, with a graph. Returns {"cls", "box"}.
    """
    num_classes = deltas.shape[1]
    sampled, positive = labels >= 0, (labels >= 0) & (labels < num_classes)
    # DIFFERS: the mean over ranks, for N ranks to equal one; detectron2 divides by each rank's own count.
    count = mean_over_ranks(sampled.sum().float()).clamp(min=1)
    cls_loss = F.cross_entropy(logits, labels.clamp(min=0), reduction="none")
    # Other RoIs have a unit box for RoI and target: its logarithms are finite.
    unit = rois.new_tensor([0.0, 0.0, 1.0, 1.0])
    rois, target_boxes = (torch.where(positive[:, None], boxes, unit) for boxes in (rois, target_boxes))
    target = encode_boxes(target_boxes, rois) * rois.new_tensor(DELTA_WEIGHTS)
    own_class = torch.where(positive, labels, 0)[:, None, None].expand(-1, 1, 4)
    box_loss = (deltas.gather(1, own_class).squeeze(1) - target).abs()
    return {"cls": torch.where(sampled, cls_loss, 0.0).sum() / count,
            "box": torch.where(positive[:, None], box_loss, 0.0).sum() / count}


def roi_candidates(logits: Tensor, deltas: Tensor, proposals: Tensor, real: Tensor,
                   score_threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """What goes into NMS: every class of every RoI of one image, each with a box of its own.

    logits (R, C + 1), deltas (R, C, 4), proposals (R, 4) px, real (R,) bool. Returns boxes (R * C, 4) px,
    scores (R * C,), 0 where not above the threshold or not real, labels (R * C,) int64.
    """
    scores = logits.softmax(dim=-1)[:, :-1]
    boxes = decode_boxes(deltas / deltas.new_tensor(DELTA_WEIGHTS), proposals[:, None])
    scores = torch.where(real[:, None] & (scores > score_threshold), scores, 0.0)
    labels = torch.arange(scores.shape[1], device=scores.device).repeat(len(scores))
    return boxes.flatten(0, 1), scores.flatten(), labels


def roi_detections(logits: Tensor, deltas: Tensor, proposals: Tensor, real: Tensor, size: Tensor,
                   score_threshold: float) -> dict[str, Tensor]:
    """Detections of one image: `roi_candidates` after NMS.

    size: (2,) height, width without padding. Returns {"boxes" (N, 4), "scores" (N,), "labels" (N,) int64},
    best first; N may be 0.
    """
    candidates = roi_candidates(logits, deltas, proposals, real, score_threshold)
    return final_detections(*candidates, *size, NMS_THRESHOLD, MAX_DETECTIONS)


# ---------------------------------------------------------------------------------------------- model

class DeFRCN(nn.Module):
    """The detector.

    num_classes: without background. backbone, caffe, norm, freeze_at: see `backbone.ResNet`. decouple: the
    gradient decoupled layers, with rpn_grad_scale and roi_grad_scale. pool_size: of RoIAlign. freeze_res5,
    cls_dropout: the fine-tuning's. cosine: TFA's classifier. roi_samples: RoIs per image in training;
    post_nms_top_k: proposals in training, at inference. sample_order: see `random_order`.

    images (B, 3, H, W) uint8 RGB, each at the top left; sizes (B, 2) int64 height, width; gt_boxes (B, G, 4)
    px; gt_labels (B, G) int64, -1 = padding, -2 = crowd.
    train(): model(images, sizes, gt_boxes, gt_labels) -> {"rpn_cls", "rpn_box", "cls", "box"}, each ()
    eval():  model(images, sizes) -> B dicts {"boxes" (N, 4), "scores" (N,), "labels" (N,)}, best score first
    """

    divisor = 1  # images are not padded further than to the largest of a batch

    def __init__(self, num_classes: int, backbone: str = "resnet101", caffe: bool = True,
                 decouple: bool = True, rpn_grad_scale: float = RPN_GRAD_SCALE,
                 roi_grad_scale: float = ROI_GRAD_SCALE_BASE, pool_size: int = POOL_SIZE,
                 norm: str = "frozen", freeze_at: int = 3, freeze_res5: bool = False,
                 cls_dropout: float = 0.0, cosine: bool = False, roi_samples: int = ROI_SAMPLES,
                 post_nms_top_k: tuple[int, int] = POST_NMS_TOP_K, score_threshold: float = SCORE_THRESHOLD,
                 sample_order: Callable = random_order):
        super().__init__()
        self.num_classes, self.decouple, self.pool_size = num_classes, decouple, pool_size
        self.rpn_grad_scale, self.roi_grad_scale = rpn_grad_scale, roi_grad_scale
        self.roi_samples, self.post_nms_top_k = roi_samples, tuple(post_nms_top_k)
        self.score_threshold, self.sample_order = score_threshold, sample_order
        self.backbone = ResNet(backbone, caffe, norm, freeze_at)  # layer4 is the RoI head's
        if freeze_res5:
            self.backbone.layer4.requires_grad_(False)
        channels, pooled_channels = self.backbone.out_channels[-2:]
        self.affine_rpn, self.affine_roi = (Affine(channels), Affine(channels)) if decouple else (None, None)
        self.rpn = RPN(channels)
        self.predictor = Predictor(pooled_channels, num_classes, cls_dropout, cosine)
        for name, value in zip(("pixel_mean", "pixel_std"), PIXELS):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))

    def forward(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor | None = None,
                gt_labels: Tensor | None = None):
        if self.training:
            return self.losses(images, sizes, gt_boxes, gt_labels)
        return self.detections(self.network(images, sizes), sizes)

    def features(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """What RPN and RoI head see of the images: (B, D, H / STRIDE, W / STRIDE) each."""
        images = normalise_images(images, sizes, self.pixel_mean, self.pixel_std)
        feature = self.backbone(images, last=3)[-1]
        if not self.decouple:
            return feature, feature
        return (self.affine_rpn(scale_gradient(feature, self.rpn_grad_scale)),
                self.affine_roi(scale_gradient(feature, self.roi_grad_scale)))

    @torch.compiler.disable  # the shapes inside NMS depend on the data: it stays between two graphs
    def proposals(self, objectness: Tensor, deltas: Tensor, anchors: Tensor,
                  sizes: Tensor) -> tuple[Tensor, Tensor]:
        """`rpn_proposals` of all images: (B, R, 4) px and (B, R) bool."""
        pre, post = (top_k[0 if self.training else 1] for top_k in (PRE_NMS_TOP_K, self.post_nms_top_k))
        found = [rpn_proposals(o, d, anchors, size, pre, post) for o, d, size in
                 zip(objectness.detach(), deltas.detach(), sizes)]
        return tuple(torch.stack(part) for part in zip(*found))

    def predict(self, feature: Tensor, rois: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B * R, C + 1) and deltas (B * R, C, 4) of rois (B, R, 4) px."""
        pooled = roi_align(feature, rois, self.pool_size, 1 / STRIDE)
        return self.predictor(self.backbone.layer4(pooled).mean(dim=(2, 3)))

    def losses(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> dict[str, Tensor]:
        rpn_feature, roi_feature = self.features(images, sizes)
        objectness, deltas = self.rpn(rpn_feature)
        anchors = image_anchors(*rpn_feature.shape[-2:], rpn_feature.device)
        proposals, real = self.proposals(objectness, deltas, anchors, sizes)
        sampled = [sample_rois(*image, self.num_classes, self.roi_samples, self.sample_order)
                   for image in zip(proposals, real, gt_boxes, gt_labels)]
        rois, labels, targets = (torch.stack(part) for part in zip(*sampled))
        logits, roi_deltas = self.predict(roi_feature, rois)
        return {**rpn_losses(objectness, deltas, anchors, gt_boxes, gt_labels, self.sample_order),
                **roi_losses(logits, roi_deltas, rois.flatten(0, 1), labels.flatten(), targets.flatten(0, 1))}

    def network(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """Proposals (B, R, 4) px, which of them are real (B, R), their logits and deltas."""
        rpn_feature, roi_feature = self.features(images, sizes)
        objectness, deltas = self.rpn(rpn_feature)
        anchors = image_anchors(*rpn_feature.shape[-2:], rpn_feature.device)
        proposals, real = self.proposals(objectness, deltas, anchors, sizes)
        logits, deltas = self.predict(roi_feature, proposals)
        return {"proposals": proposals, "real": real, "logits": logits.unflatten(0, real.shape),
                "deltas": deltas.unflatten(0, real.shape)}

    def candidates(self, outputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`roi_candidates` of all images: fixed shapes, for `export.py`."""
        return [roi_candidates(*rois, self.score_threshold) for rois in self._rois(outputs)]

    def detections(self, outputs: dict[str, Tensor], sizes: Tensor) -> list[dict[str, Tensor]]:
        return [roi_detections(*rois, size, self.score_threshold)
                for rois, size in zip(self._rois(outputs), sizes)]

    def _rois(self, outputs: dict[str, Tensor]):
        """Of every image logits, deltas, proposals and which of them are real."""
        return zip(*(outputs[name] for name in ("logits", "deltas", "proposals", "real")))


def rename_detectron2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the official DeFRCN, or of detectron2's Faster R-CNN C4, under our names, for a strict load.

    The matching model has decouple=True where affine layers are there. They saw BGR: conv1 is flipped to RGB;
    PIXELS are added. A checkpoint without a predictor (the official "remove" surgery) lacks it here, too. A
    key that is not known keeps its name.
    """
    rest = [("^proposal_generator.rpn_head.conv.", "rpn.conv."),
            ("^proposal_generator.rpn_head.objectness_logits.", "rpn.objectness."),
            ("^proposal_generator.rpn_head.anchor_deltas.", "rpn.deltas."),
            ("^roi_heads.box_predictor.cls_score.", "predictor.cls_score."),
            ("^roi_heads.box_predictor.bbox_pred.", "predictor.deltas."), ("^affine_rcnn.", "affine_roi.")]
    resnet = {key.replace("roi_heads.res5.", "backbone.res5."): value for key, value in state_dict.items()
              if key.startswith(("backbone.", "roi_heads.res5."))}
    if not any(key.startswith("backbone.res5.") for key in resnet):
        raise WeightsError(f"not a Faster R-CNN C4 of detectron2: it has keys like {sorted(state_dict)[:3]}")
    renamed = {f"backbone.{key}": value for key, value in rename_detectron2_resnet(resnet).items()}
    renamed |= rename_keys({key: value for key, value in state_dict.items()
                            if not key.startswith(("backbone.", "roi_heads.res5."))}, rest)
    return with_pixels(renamed, PIXELS, bgr=True)


def transfer_predictor(own: dict[str, Tensor], state: dict[str, Tensor], old_names: list[str],
                       new_names: list[str]) -> dict[str, Tensor]:
    """The predictor for other classes than a checkpoint's ("surgery"), row by row, by class name.

    own, state: state_dicts of the new model and of the checkpoint. Classes that both know, and background,
    keep their rows; the others are drawn anew. Without a common class, or where only one of the two has a
    cosine classifier, all is as in `own`. Returns the entries "predictor.*" of a state_dict.
    """
    entries = {key: value.clone() for key, value in own.items() if key.startswith("predictor.")}
    old = [old_names.index(name) for name in new_names if name in old_names]
    new = [i for i, name in enumerate(new_names) if name in old_names]
    alike = set(entries) == {key for key in state if key.startswith("predictor.")}
    for key, value in entries.items() if old and alike else ():
        background = key.startswith("predictor.cls_score.")
        theirs = state[key].unflatten(0, (len(old_names) + background, -1))
        mine = value.unflatten(0, (len(new_names) + background, -1))  # a view
        mine.normal_(std=0.01) if value.ndim > 1 else mine.zero_()
        mine[new] = theirs[old]
        if background:
            mine[-1] = theirs[-1]
    return entries


# ---------------------------------------------------------------------------------------------- calibration

class CalibrationNet(nn.Module):
    """The ImageNet classifier whose 1000 logits describe a box: torchvision's ResNet-101.

    weights: a file, "resnet101" for torchvision's, which is downloaded, or None. Raises WeightsError.
    forward: image (3, H, W) uint8 RGB at its original size, boxes (n, 4) px -> (n, 1000) float32.
    """

    def __init__(self, weights: str | None = None):
        super().__init__()
        self.backbone, self.fc = ResNet("resnet101", norm="frozen"), nn.Linear(2048, 1000)
        if weights is not None:
            path = imagenet_file(weights)
            state = read_weight_file(path)
            try:
                self.load_state_dict({key if key.startswith("fc.") else f"backbone.{key}": value
                                      for key, value in state.items()})
            except RuntimeError as error:
                reason = " ".join(str(error).split())[:200]
                raise WeightsError(f"{path}: not torchvision's ResNet-101 ({reason})") from error
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in TORCHVISION_PIXELS)
        feature = self.backbone(((image.float() - mean) / std)[None])[-1]
        return self.fc(roi_align(feature, boxes[None], 1, 1 / 32).flatten(1))


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Mean feature of the shots of every class: features (S, D), labels (S,) -> (C, D); zeros for a class
    without shots."""
    one_hot = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return one_hot.T @ features / one_hot.sum(dim=0).clamp(min=1)[:, None]


def calibrate(scores: Tensor, labels: Tensor, features: Tensor, prototypes: Tensor,
              excluded: Tensor | None = None, alpha: float = CALIBRATION_ALPHA,
              window: tuple[float, float] = CALIBRATION_WINDOW) -> Tensor:
    """Scores mixed with the similarity of each detection to its class: alpha * score + (1 - alpha) * cosine.

    scores (N,), labels (N,) int64, features (N, D) of the detections; prototypes (C, D); excluded: (C,) bool,
    classes that keep their score (base classes; a class without shots keeps it, too). Only scores in the
    window change; detections are not sorted again. N may be 0. Returns (N,).
    """
    prototype = prototypes[labels]
    known = prototype.abs().amax(dim=-1) > 0
    if excluded is not None:
        known = known & ~excluded[labels]
    cosine = F.cosine_similarity(features.float(), prototype, dim=-1)
    inside = (scores > window[0]) & (scores <= window[1])
    return torch.where(inside & known, alpha * scores + (1 - alpha) * cosine, scores)

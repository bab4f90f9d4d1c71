"""DeFRCN: Decoupled Faster R-CNN for Few-Shot Object Detection (arXiv 2108.09017).

A Faster R-CNN is trained on base classes with many images. It is then fine-tuned on novel classes with K
boxes each. This file holds what DeFRCN adds to `faster_rcnn.py`, in three parts:

    gradient decoupled layer (GDL)   RPN and RoI head each have an affine layer in front of them. The gradient
                                     that they send back to the backbone is scaled.
    fine-tuning                      layer4 is frozen, the classifier has dropout, and the predictor of the
                                     base model is adapted to the new classes ("surgery").
    prototypical calibration block   The score of a detection is mixed with its similarity to the mean feature
    (PCB)                            of the shots of its class. An ImageNet classifier makes these features.

Letters: B images, C classes, H W height and width of the feature map, R RoIs, N detections, S shots of all
classes together, D channels.
"""
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone import TORCHVISION_PIXELS, ResNet
from faster_rcnn import ROI_SAMPLES, SCORE_THRESHOLD, FasterRCNN, Predictor, random_priorities
from ops import roi_align

# Values of the official configs, except where a comment names another source.
POOL_SIZE = 7  # side of the RoIAlign grid; Detectron's C4 models have 14
CLS_DROPOUT = 0.8  # probability that the classifier does not see a feature; fine-tuning only
COSINE_SCALE = 20.0  # of the optional cosine classifier (TFA, arXiv 2003.06957)
SURGERY_STD = 0.01  # std of new weights in `transfer_class_rows`

# ---- gradient decoupled layer: share of the gradient that reaches the backbone
RPN_GRAD_SCALE = 0.0
ROI_GRAD_SCALE_BASE = 0.75
ROI_GRAD_SCALE_NOVEL, ROI_GRAD_SCALE_VOC = 0.01, 0.001  # fine-tuning on COCO, on VOC

# ---- prototypical calibration block
CALIBRATION_ALPHA = 0.5  # weight of the detector's score
CALIBRATION_WINDOW = (0.05, 1.0)  # scores are calibrated where lower < score <= upper


# ------------------------------------------------------------------------ gradient decoupled layer

class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Identity whose backward pass multiplies the gradient by `scale`.

    A scale of 0 gives zero gradients, not missing ones: DDP waits for the gradient of every parameter.
    """
    return _ScaleGradient.apply(x, scale)


class Affine(nn.Module):
    """x * weight + bias per channel of (B, D, H, W): the trained part of the gradient decoupled layer."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


# ------------------------------------------------------------------------------------- fine-tuning

# Parts of a two-stage detector by the beginnings of their parameters' names. "backbone" is everything else.
PARTS = {"predictor": ("predictor.",), "rpn": ("rpn.", "affine_rpn."),
         "res5": ("backbone.layer4.", "affine_roi.", "box_head."), "backbone": ("backbone.", "fpn.")}


def train_only(model: nn.Module, parts: list[str]):
    """Freezes every parameter of a two-stage detector that belongs to none of the `parts`, keys of PARTS.

    With ["predictor"] only the last layers learn, as in TFA's fine-tuning (arXiv 2003.06957, Sec. 3.1).
    """
    for name, parameter in model.named_parameters():
        part = next(part for part, starts in PARTS.items() if name.startswith(starts))
        if part not in parts:
            parameter.requires_grad_(False)


class CosineClassifier(nn.Module):
    """Class logits from the angle between a feature and one weight per class (TFA, arXiv 2003.06957).

    forward: (R, D) -> (R, outputs), `scale` times the cosine.
    """

    def __init__(self, channels: int, outputs: int, scale: float = COSINE_SCALE):
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.empty(outputs, channels))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        # The norm of the weights has no gradient, because TFA normalises them in place before each use.
        weight = self.weight / (self.weight.detach().norm(dim=1, keepdim=True) + 1e-5)
        return self.scale * F.linear(x / (x.norm(dim=1, keepdim=True) + 1e-5), weight)


class FineTuningPredictor(Predictor):
    """`Predictor` with dropout before the classifier; the box layer sees the whole feature.

    dropout: probability. cosine: `CosineClassifier` with cosine_scale instead of a linear layer.
    """

    def __init__(self, channels: int, num_classes: int, dropout: float = 0.0, cosine: bool = False,
                 cosine_scale: float = COSINE_SCALE):
        super().__init__(channels, num_classes,
                         partial(CosineClassifier, scale=cosine_scale) if cosine else nn.Linear)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(self.dropout(x)).float(), self.deltas(x).unflatten(1, (-1, 4)).float()


def transfer_class_rows(own: dict[str, Tensor], state: dict[str, Tensor], old_names: list[str],
                        new_names: list[str]) -> dict[str, Tensor]:
    """Adapts the predictor of a checkpoint to other classes, row by row, by class name ("surgery").

    own, new_names: state_dict and class names of the new model. state, old_names: those of the checkpoint.
    Returns copies of the entries "predictor.*" of `own`. In them, background and the classes that both models
    know have the rows of the checkpoint, and the rows of other classes are drawn anew. Nothing changes if
    there is no common class, or if only one of the two models has a cosine classifier.
    """
    entries = {key: value.clone() for key, value in own.items() if key.startswith("predictor.")}
    same_layers = set(entries) == {key for key in state if key.startswith("predictor.")}
    new_index = [i for i, name in enumerate(new_names) if name in old_names]
    old_index = [old_names.index(new_names[i]) for i in new_index]
    if not new_index or not same_layers:
        return entries
    for key, value in entries.items():
        has_background = key.startswith("predictor.cls_score.")
        # (classes, rows of one class, ...); new_rows is a view, so `value` changes with it.
        old_rows = state[key].unflatten(0, (len(old_names) + has_background, -1))
        new_rows = value.unflatten(0, (len(new_names) + has_background, -1))
        if value.ndim > 1:
            new_rows.normal_(std=SURGERY_STD)
        else:
            new_rows.zero_()
        new_rows[new_index] = old_rows[old_index]
        if has_background:
            new_rows[-1] = old_rows[-1]
    return entries


# ------------------------------------------------------------------------------------------- model

class DeFRCN(FasterRCNN):
    """Faster R-CNN with gradient decoupled layers and a predictor for the fine-tuning.

    decouple: whether the gradient decoupled layers exist. rpn_grad_scale, roi_grad_scale: their factors.
    freeze_res5: freezes layer4, detectron2's "res5"; cls_dropout: see `FineTuningPredictor`. Only the
    fine-tuning has these two. cosine, cosine_scale: TFA's classifier. `FasterRCNN` explains everything else.
    """

    def __init__(self, num_classes: int, backbone: str = "resnet101", caffe: bool = True,
                 decouple: bool = True, rpn_grad_scale: float = RPN_GRAD_SCALE,
                 roi_grad_scale: float = ROI_GRAD_SCALE_BASE, pool_size: int = POOL_SIZE,
                 norm: str = "frozen", freeze_at: int = 3, freeze_res5: bool = False,
                 cls_dropout: float = 0.0, cosine: bool = False, cosine_scale: float = COSINE_SCALE,
                 roi_samples: int = ROI_SAMPLES, post_nms_top_k: tuple[int, int] | None = None,
                 score_threshold: float = SCORE_THRESHOLD, sample_order: Callable = random_priorities):
        super().__init__(num_classes, backbone, caffe, fpn=False, pool_size=pool_size, norm=norm,
                         freeze_at=freeze_at, roi_samples=roi_samples, post_nms_top_k=post_nms_top_k,
                         score_threshold=score_threshold, sample_order=sample_order,
                         predictor=partial(FineTuningPredictor, dropout=cls_dropout, cosine=cosine,
                                           cosine_scale=cosine_scale))
        self.decouple, self.rpn_grad_scale, self.roi_grad_scale = decouple, rpn_grad_scale, roi_grad_scale
        if freeze_res5:
            self.backbone.layer4.requires_grad_(False)
        channels = self.backbone.out_channels[-2]
        self.affine_rpn, self.affine_roi = (Affine(channels), Affine(channels)) if decouple else (None, None)
        # A checkpoint holds optimizer state by position, and there the affine layers precede these two.
        for name in ("rpn", "predictor"):
            self._modules[name] = self._modules.pop(name)

    def features(self, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The map that the RPN reads and the map that the RoI head reads, each (B, D, H, W)."""
        features, _ = super().features(images, sizes)
        if not self.decouple:
            return features, features
        return ([self.affine_rpn(scale_gradient(features[0], self.rpn_grad_scale))],
                [self.affine_roi(scale_gradient(features[0], self.roi_grad_scale))])


# ------------------------------------------------------------------- prototypical calibration block

class CalibrationNet(nn.Module):
    """ImageNet classifier that describes a box by its 1000 logits: a ResNet-101 in torchvision's form.

    It is in evaluation mode and does not train. `weights.load_classifier` fills it.
    forward: image (3, H, W) uint8 RGB in its original size, boxes (N, 4) px -> (N, 1000) float32.
    """

    def __init__(self):
        super().__init__()
        self.backbone, self.fc = ResNet("resnet101", norm="frozen"), nn.Linear(2048, 1000)
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor, boxes: Tensor) -> Tensor:
        mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in TORCHVISION_PIXELS)
        feature = self.backbone(((image.float() - mean) / std)[None])[-1]
        return self.fc(roi_align(feature, boxes[None], 1, 1 / 32).flatten(1))


def class_prototypes(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Prototype of every class: the mean feature of its shots.

    features: (S, D); labels: (S,) int64. Returns (C, D); zeros for a class without shots.
    """
    one_hot = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return one_hot.T @ features / one_hot.sum(dim=0).clamp(min=1)[:, None]


def calibrate(scores: Tensor, labels: Tensor, features: Tensor, prototypes: Tensor,
              excluded: Tensor | None = None, alpha: float = CALIBRATION_ALPHA,
              window: tuple[float, float] = CALIBRATION_WINDOW) -> Tensor:
    """Calibrated scores: alpha * score + (1 - alpha) * cosine similarity of detection and prototype.

    `fewshot.Calibration` calls it, between detecting and scoring.
    scores: (N,); labels: (N,) int64; features: (N, D) of the detections; prototypes: (C, D). N may be 0.
    excluded: (C,) bool, classes that keep their scores (base classes).
    Scores outside the window and scores of classes without shots do not change.
    Returns (N,) in the order of the input: detections are not sorted again, as in the official code.
    """
    prototype = prototypes[labels]
    eligible = prototype.abs().amax(dim=-1) > 0
    if excluded is not None:
        eligible = eligible & ~excluded[labels]
    cosine = F.cosine_similarity(features.float(), prototype, dim=-1)
    inside = (scores > window[0]) & (scores <= window[1])
    return torch.where(inside & eligible, alpha * scores + (1 - alpha) * cosine, scores)

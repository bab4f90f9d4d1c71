"""Detectors of other code bases, recognised by their keys and renamed: FORMATS is the table of all of them.

A reader (`fcos_from_mmdet`, ...) turns a state_dict into one under our names, for a strict load. It adds the
pixel mean and std of the training in RGB, and flips conv1 where the weights saw BGR. Unknown keys stay.
Backbones alone are read by weights.py.
"""
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import defrcn
import faster_rcnn
from backbone import ARCHITECTURES, BN_EPS, CAFFE_PIXELS, TORCHVISION_PIXELS
from data import COCO_CLASSES, COCO_IDS, COCO_NOVEL, VOC_CLASSES, VOC_NOVEL
from faster_rcnn import FasterRCNN, roi_levels
from fcos import CAFFE_PIXELS_IMPROVED, FCOS, PRE_NMS_TOP_K
from fsaf import ANCHOR_SCALE, ASPECT_RATIOS, FSAF, IGNORE_SCALE, OCTAVES, STRIDES, base_anchors
from ops import cell_anchors, grid_points, place_anchors, topk_candidates
from weights import (
    WeightsError,
    extract_state_dict,
    fill_missing_bn_stats,
    rename_detectron2_resnet,
    rename_keys,
)

State = dict[str, Tensor]  # a state_dict
TORCHVISION_SCORE_THRESHOLD = 0.2  # torchvision's FCOS; it applies to sqrt(class score x centerness)
# First 8 digits of the SHA-256 of torchvision's published files: their batch norms had no epsilon.
# They are fcos_resnet50_fpn_coco, retinanet_resnet50_fpn_coco and fasterrcnn_resnet50_fpn_coco.
WITHOUT_EPS = ("99b0c9b7", "eeacb38b", "258fb6c6")
TORCHVISION_PROPOSALS = (2000, 1000)  # after NMS, in training and at inference
TOWERS = {"cls": "cls_tower", "classification": "cls_tower", "reg": "box_tower", "regression": "box_tower"}


# ------------------------------------------------------------------------------------- torchvision's models

class TorchvisionFCOS(FCOS):
    """FCOS in the improved form, with torchvision's points and its score sqrt(class score x centerness)."""

    def __init__(self, num_classes: int, backbone: str = "resnet50", caffe: bool = False,
                 norm: str = "frozen", freeze_at: int = 2, fpn_channels: int = 256,
                 score_threshold: float = TORCHVISION_SCORE_THRESHOLD):
        super().__init__(num_classes, backbone, caffe, norm=norm, freeze_at=freeze_at,
                         fpn_channels=fpn_channels, score_threshold=score_threshold)

    def points(self, shapes: list[tuple[int, int]], device=None) -> tuple[Tensor, Tensor, Tensor]:
        _, strides, ranges = super().points(shapes, device)
        return torch.cat(_torchvision_points(shapes, STRIDES[0], device)), strides, ranges

    def candidates(self, outputs: dict) -> list[tuple[Tensor, Tensor, Tensor]]:
        level_sizes = [height * width for height, width in outputs["shapes"]]
        found = []
        for logits, boxes, centerness in zip(outputs["logits"], self.boxes(outputs), outputs["centerness"]):
            scores = (logits.sigmoid() * centerness.sigmoid()[:, None]).sqrt()
            point, labels, scores = topk_candidates(scores, level_sizes, PRE_NMS_TOP_K, self.score_threshold)
            found.append((boxes[point], scores, labels))
        return found


class TorchvisionRetinaNet(FSAF):
    """RetinaNet, `FSAF(..., anchor_only=True)`, with torchvision's pyramid and anchor positions."""

    p6_from, relu_before_p7 = "p5", True

    def anchors(self, shapes: list[tuple[int, int]]) -> Tensor:
        return _torchvision_anchors(self.base_anchors, shapes, STRIDES[0])


class TorchvisionFasterRCNN(FasterRCNN):
    """Faster R-CNN with FPN and torchvision's anchors, number of proposals and RoIAlign."""

    def __init__(self, num_classes: int, backbone: str = "resnet50", caffe: bool = False,
                 post_nms_top_k: tuple[int, int] = TORCHVISION_PROPOSALS, **arguments):
        super().__init__(num_classes, backbone, caffe, post_nms_top_k=post_nms_top_k, **arguments)
        self.base_anchors = self.base_anchors.round()

    def anchors(self, shapes: list[tuple[int, int]]) -> Tensor:
        return _torchvision_anchors(self.base_anchors, shapes, self.strides[0])

    def pool(self, features: list[Tensor], rois: Tensor) -> Tensor:
        """2 x 2 samples in each cell, and boxes that are not shifted by half a pixel."""
        from torchvision.ops import roi_align
        level = roi_levels(rois).flatten()[:, None, None, None]
        return sum((level == i) * roi_align(feature.float(), list(rois), self.pool_size, 1 / stride, 2)
                   for i, (feature, stride) in enumerate(zip(features, self.strides)))


def _torchvision_points(shapes: list[tuple[int, int]], stride: int, device) -> list[Tensor]:
    """torchvision's points, L tensors (H*W, 2) px. Their spacing is image size // map size.

    stride: of the finest map.
    """
    # The spacing is smaller than the stride of a level if the map size was rounded up.
    image_height, image_width = (side * stride for side in shapes[0])
    return [grid_points(height, width, image_height // height, image_width // width, device)
            for height, width in shapes]


def _torchvision_anchors(base: Tensor, shapes: list[tuple[int, int]], stride: int) -> Tensor:
    """The anchors (L, A, 4) of a cell around `_torchvision_points`, (N, 4) px."""
    points = _torchvision_points(shapes, stride, base.device)
    return torch.cat([place_anchors(*level) for level in zip(base, points)])


# ------------------------------------------------------------------------------------------------- readers

def fcos_from_mmdet(state: State, caffe: bool | None = None, original: bool | None = None) -> State:
    """mmdetection's FCOS (2.x and 3.x), for `FCOS(..., caffe=caffe, original=original)`.

    caffe: style of the backbone. original: form of the detector. None: as in the published files, ResNets
    have caffe style, ResNeXts do not, and the original form has no bias or no norm in its towers. Raises
    WeightsError.
    """
    renamed = _rename_mmdet(state, 3, {"conv_cls": "cls_logits", "conv_reg": "ltrb",
                                       "conv_centerness": "centerness"})
    if "head.centerness.weight" not in renamed or "backbone.layer1.0.conv2.weight" not in renamed:
        raise WeightsError(f"not an FCOS of mmdetection: it has keys like {sorted(state)[:3]}")
    if caffe is None:
        conv2 = renamed["backbone.layer1.0.conv2.weight"]
        caffe = conv2.shape[0] == conv2.shape[1]  # no groups: a ResNet
    if original is None:
        original = _has_original_form(renamed)
    caffe_pixels = CAFFE_PIXELS if original else CAFFE_PIXELS_IMPROVED
    return _with_pixels(renamed, caffe_pixels if caffe else TORCHVISION_PIXELS, bgr=caffe)


def _has_original_form(state: State) -> bool:
    return not {"head.cls_tower.0.bias", "head.cls_tower.1.weight"} <= set(state)


def fsaf_from_mmdet(state: State, caffe: bool = False) -> State:
    """mmdetection's FSAF, for `FSAF(...)`, or RetinaNet, for `FSAF(..., anchor_only=True)` (2.x and 3.x).

    caffe: style of the backbone, which no key tells. Raises WeightsError.
    """
    channels = [len(value) for key, value in state.items() if key.endswith("retina_reg.weight")]
    if channels == [4]:
        renamed = _rename_mmdet(state, 2, {"retina_cls": "cls_logits", "retina_reg": "tblr"})
    elif channels == [4 * len(OCTAVES) * len(ASPECT_RATIOS)]:
        renamed = _rename_mmdet(state, 2, {"retina_cls": "anchor_logits", "retina_reg": "anchor_deltas"})
        renamed["base_anchors"] = base_anchors()
    else:
        raise WeightsError(f"not an FSAF or RetinaNet of mmdetection: it has keys like {sorted(state)[:3]}")
    return _with_pixels(renamed, CAFFE_PIXELS if caffe else TORCHVISION_PIXELS, bgr=caffe)


def rcnn_from_mmdet(state: State, caffe: bool = False) -> State:
    """mmdetection's Faster R-CNN with FPN (2.x and 3.x), for `FasterRCNN(..., caffe=caffe)`.

    caffe: style of the backbone, which no key tells. Raises WeightsError.
    """
    renamed = rename_keys(state, [
        (r"^neck\.lateral_convs\.(\d)\.conv\.", r"fpn.lateral.\1."),
        (r"^neck\.fpn_convs\.(\d)\.conv\.", r"fpn.output.\1."),
        (r"^rpn_head\.rpn_conv\.", "rpn.conv."), (r"^rpn_head\.rpn_cls\.", "rpn.objectness."),
        (r"^rpn_head\.rpn_reg\.", "rpn.deltas."), (r"^roi_head\.bbox_head\.shared_fcs\.0\.", "box_head.fc1."),
        (r"^roi_head\.bbox_head\.shared_fcs\.1\.", "box_head.fc2."),
        (r"^roi_head\.bbox_head\.fc_cls\.", "predictor.cls_score."),
        (r"^roi_head\.bbox_head\.fc_reg\.", "predictor.deltas.")])
    if "predictor.deltas.weight" not in renamed:
        raise WeightsError(f"not a Faster R-CNN of mmdetection: it has keys like {sorted(state)[:3]}")
    return _with_pixels(renamed, CAFFE_PIXELS_IMPROVED if caffe else TORCHVISION_PIXELS, bgr=caffe)


def _rename_mmdet(state: State, tower_layers: int, predictors: dict[str, str]) -> State:
    """tower_layers: layers of our towers per convolution, with norm and ReLU. predictors: {theirs: ours}."""
    return rename_keys({key.removeprefix("module."): value for key, value in state.items()}, [
        (r"^neck\.lateral_convs\.(\d)\.conv\.", r"fpn.lateral.\1."),
        (r"^neck\.fpn_convs\.([012])\.conv\.", r"fpn.output.\1."),
        (r"^neck\.fpn_convs\.3\.conv\.", "fpn.p6."), (r"^neck\.fpn_convs\.4\.conv\.", "fpn.p7."),
        (r"^bbox_head\.(cls|reg)_convs\.(\d)\.(\w+)\.",  # the last group is "conv" or the name of the norm
         lambda m: f"head.{TOWERS[m[1]]}.{tower_layers * int(m[2]) + (m[3] != 'conv')}."),
        (r"^bbox_head\.scales\.(\d)\.scale$", r"head.scales.\1"),
        *((rf"^bbox_head\.{theirs}\.", f"head.{ours}.") for theirs, ours in predictors.items()),
        (r"^neck\.", "fpn."), (r"^bbox_head\.", "head.")])


def fcos_from_adelaidet(state: State) -> State:
    """AdelaiDet's FCOS with Detectron's ResNet-50 or ResNet-101, for `FCOS(..., caffe=True)`.

    Its scores are the square roots of ours: the order of the detections is the same.
    """
    resnet, rest = _split_detectron2(state, ("backbone.bottom_up.",))
    rest = _rename_authors(rest, [
        (r"^backbone\.fpn_lateral(\d)", lambda m: f"fpn.lateral.{int(m[1]) - 3}"),
        (r"^backbone\.fpn_output(\d)", lambda m: f"fpn.output.{int(m[1]) - 3}"),
        (r"^backbone\.top_block\.", "fpn."), (r"^proposal_generator\.fcos_head\.", "head.")])
    return _with_pixels(resnet | rest, CAFFE_PIXELS_IMPROVED, bgr=True)


def fcos_from_first_repository(state: State) -> State:
    """FCOS of the authors' first repository, for `FCOS(..., caffe=True, tower_bias=True)`.

    Both forms have the same keys. Only the file name tells them apart: "imprv" is the improved form.
    """
    renamed = _rename_authors({key.removeprefix("module."): value for key, value in state.items()}, [
        (r"^backbone\.body\.(stem\.)?", "backbone."),
        (r"^backbone\.fpn\.fpn_inner(\d)", lambda m: f"fpn.lateral.{int(m[1]) - 2}"),
        (r"^backbone\.fpn\.fpn_layer(\d)", lambda m: f"fpn.output.{int(m[1]) - 2}"),
        (r"^backbone\.fpn\.top_blocks\.", "fpn."), (r"^rpn\.head\.", "head.")])
    return _with_pixels(fill_missing_bn_stats(_change_bn_eps(renamed, 0.0)), CAFFE_PIXELS, bgr=True)


def _rename_authors(state: State, rules: list[tuple]) -> State:
    """rules: names of one of the authors' repositories, up to "head."; inside the head both have the same."""
    renamed = rename_keys(rename_keys(state, rules), [
        (r"^head\.bbox_tower", "head.box_tower"), (r"^head\.bbox_pred", "head.ltrb"),
        (r"^head\.ctrness", "head.centerness"), (r"^head\.scales\.(\d)\.scale", r"head.scales.\1")])
    return {k: v.reshape(()) if k.startswith("head.scales.") else v for k, v in renamed.items()}


def fcos_from_torchvision(state: State, bn_eps: float = BN_EPS) -> State:
    """torchvision's `fcos_resnet50_fpn`, for `TorchvisionFCOS`.

    bn_eps: epsilon of its batch norms. torchvision sets 0 for its published COCO weights.
    """
    renamed = _rename_torchvision(state, bn_eps, {"cls_logits": "cls_logits", "bbox_reg": "ltrb",
                                                  "bbox_ctrness": "centerness"})
    return renamed | {f"head.scales.{i}": torch.tensor(1.0) for i in range(len(STRIDES))}


def fsaf_from_torchvision(state: State, bn_eps: float = BN_EPS) -> State:
    """torchvision's `retinanet_resnet50_fpn`, for `TorchvisionRetinaNet(..., anchor_only=True)`."""
    renamed = _rename_torchvision(state, bn_eps, {"cls_logits": "anchor_logits", "bbox_reg": "anchor_deltas"})
    # As `fsaf.base_anchors`, but the sizes are cut to whole pixels (32, 40, 50, ...) and the coordinates of
    # the corners are rounded.
    sizes = [[int(ANCHOR_SCALE * stride * 2 ** octave) for octave in OCTAVES] for stride in STRIDES]
    anchors = [cell_anchors(torch.tensor(level), ASPECT_RATIOS).flatten(0, 1).round() for level in sizes]
    return renamed | {"base_anchors": torch.stack(anchors)}


def rcnn_from_torchvision(state: State, bn_eps: float = BN_EPS) -> State:
    """torchvision's `fasterrcnn_resnet50_fpn`, for `TorchvisionFasterRCNN`. Its first class is background."""
    renamed = rename_keys(_rename_torchvision(state, bn_eps, {}), [
        (r"^rpn\.head\.conv\.(0\.0\.)?", "rpn.conv."), (r"^rpn\.head\.cls_logits\.", "rpn.objectness."),
        (r"^rpn\.head\.bbox_pred\.", "rpn.deltas."), (r"^roi_heads\.box_head\.fc6\.", "box_head.fc1."),
        (r"^roi_heads\.box_head\.fc7\.", "box_head.fc2."),
        (r"^roi_heads\.box_predictor\.cls_score\.", "predictor.cls_score."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", "predictor.deltas.")])
    for key in [key for key in renamed if key.startswith("predictor.")]:
        background = 1 if ".cls_score." in key else 4  # rows
        others = renamed[key][background:]
        renamed[key] = torch.cat((others, renamed[key][:1])) if background == 1 else others
    return renamed


def _rename_torchvision(state: State, bn_eps: float, predictors: dict[str, str]) -> State:
    renamed = fill_missing_bn_stats(rename_keys(state, [
        (r"^backbone\.body\.", "backbone."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.(0\.)?", r"fpn.lateral.\1."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.(0\.)?", r"fpn.output.\1."),
        (r"^backbone\.fpn\.extra_blocks\.", "fpn."),
        # RetinaNet's newer files number the pairs of convolution and ReLU in a tower, older ones all layers.
        (r"^head\.(\w+)_head\.conv\.(\d)\.0\.", lambda m: f"head.{TOWERS[m[1]]}.{2 * int(m[2])}."),
        (r"^head\.(\w+)_head\.conv\.", lambda m: f"head.{TOWERS[m[1]]}."),
        *((rf"^head\.\w+_head\.{theirs}\.", f"head.{ours}.") for theirs, ours in predictors.items())]))
    return _with_pixels(_change_bn_eps(renamed, bn_eps), TORCHVISION_PIXELS)


def rcnn_from_detectron2(state: State) -> State:
    """The official DeFRCN, for `DeFRCN`; detectron2's Faster R-CNN, for `FasterRCNN` with FPN or C4.

    A file without a predictor (after the official "remove" surgery) gives none. Raises WeightsError.
    """
    fpn = any(key.startswith("backbone.fpn_") for key in state)
    if not fpn and not any(key.startswith(("backbone.res5.", "roi_heads.res5.")) for key in state):
        raise WeightsError(f"not a Faster R-CNN of detectron2: it has keys like {sorted(state)[:3]}")
    prefixes = ("backbone.bottom_up.",) if fpn else ("backbone.", "roi_heads.res5.")
    resnet, rest = _split_detectron2(state, prefixes)
    rest = rename_keys(rest, [
        (r"^backbone\.fpn_(lateral|output)(\d)", lambda m: f"fpn.{m[1]}.{int(m[2]) - 2}"),
        (r"^roi_heads\.box_head\.", "box_head."),
        (r"^proposal_generator\.rpn_head\.conv\.", "rpn.conv."),
        (r"^proposal_generator\.rpn_head\.objectness_logits\.", "rpn.objectness."),
        (r"^proposal_generator\.rpn_head\.anchor_deltas\.", "rpn.deltas."),
        (r"^roi_heads\.box_predictor\.cls_score\.", "predictor.cls_score."),
        (r"^roi_heads\.box_predictor\.bbox_pred\.", "predictor.deltas."),
        (r"^affine_rcnn\.", "affine_roi.")])
    return _with_pixels(resnet | rest, faster_rcnn.PIXELS, bgr=True)


def _split_detectron2(state: State, prefixes: tuple[str, ...]) -> tuple[dict, dict]:
    """The ResNet (the keys with these prefixes) under our names, and the rest as it is."""
    resnet = {k.removeprefix("roi_heads."): value for k, value in state.items() if k.startswith(prefixes)}
    rest = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    return {f"backbone.{key}": value for key, value in rename_detectron2_resnet(resnet).items()}, rest


def _change_bn_eps(state: State, bn_eps: float) -> State:
    """Changes the variances so that a batch norm with BN_EPS computes what it did with bn_eps."""
    return {k: v + (bn_eps - BN_EPS) if k.endswith("running_var") else v for k, v in state.items()}


def _with_pixels(state: State, pixels: tuple[tuple, tuple], bgr: bool = False) -> State:
    """Adds pixel_mean and pixel_std. bgr: the weights saw BGR, so conv1 is flipped."""
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in pixels)
    conv1 = state.get("backbone.conv1.weight")
    if conv1 is None:
        raise WeightsError(f"a detector without a ResNet; it has keys like {sorted(state)[:3]}")
    return state | {"pixel_mean": mean, "pixel_std": std,
                    "backbone.conv1.weight": conv1.flip(1) if bgr else conv1}


# ------------------------------------------------------------------------------------------------- formats

class Format(NamedTuple):
    """One format of files. A file has the first format of FORMATS that fits it."""
    name: str  # in messages
    key: str  # a tensor that every file of this format has
    rows: int | None  # length of this tensor; None: any
    reader: Callable[..., State]
    scores: str  # layer of the class scores, under our names
    args: dict  # model arguments that differ from DEFAULT_ARGS and that no tensor tells


DEFAULT_ARGS = {"original": False, "torchvision": False, "fsaf_branch": "free", "ignore_scale": None,
                "decouple": True, "norm": "frozen", "freeze_at": 2, "min_size": [800], "max_size": 1333,
                "pad_to": None, "data": None, "stage": None}
FSAF_ARGS = {"model": "fsaf", "ignore_scale": IGNORE_SCALE}
C4_ARGS = {"freeze_at": 3, "fpn": False, "rpn_grad_scale": defrcn.RPN_GRAD_SCALE,
           "roi_grad_scale": defrcn.ROI_GRAD_SCALE_BASE, "roi_samples": faster_rcnn.ROI_SAMPLES,
           "proposals": list(faster_rcnn.POST_NMS_TOP_K_C4)}
FPN_ARGS = {"model": "faster_rcnn", "fpn": True, "decouple": False, "pool_size": faster_rcnn.POOL_SIZE,
            "roi_samples": faster_rcnn.ROI_SAMPLES, "proposals": list(faster_rcnn.POST_NMS_TOP_K)}
FORMATS = (
    Format("an FCOS of mmdetection", "bbox_head.conv_centerness.weight", None, fcos_from_mmdet,
           "head.cls_logits", {"model": "fcos"}),
    Format("an FSAF of mmdetection", "bbox_head.retina_reg.weight", 4, fsaf_from_mmdet,
           "head.cls_logits", FSAF_ARGS | {"norm": "affine"}),
    Format("a RetinaNet of mmdetection", "bbox_head.retina_reg.weight", None, fsaf_from_mmdet,
           "head.anchor_logits", FSAF_ARGS | {"norm": "affine", "fsaf_branch": "anchor"}),
    Format("an FCOS of AdelaiDet", "proposal_generator.fcos_head.ctrness.weight", None, fcos_from_adelaidet,
           "head.cls_logits", {"model": "fcos"}),
    Format("an FCOS of its authors' first repository (see --original)", "rpn.head.centerness.weight", None,
           fcos_from_first_repository, "head.cls_logits", {"model": "fcos"}),
    Format("an FCOS of torchvision", "head.regression_head.bbox_ctrness.weight", None, fcos_from_torchvision,
           "head.cls_logits", {"model": "fcos", "torchvision": True}),
    Format("a RetinaNet of torchvision", "head.regression_head.bbox_reg.weight", None, fsaf_from_torchvision,
           "head.anchor_logits", FSAF_ARGS | {"torchvision": True, "fsaf_branch": "anchor"}),
    Format("an official DeFRCN", "affine_rpn.weight", None, rcnn_from_detectron2,
           "predictor.cls_score", C4_ARGS | {"model": "defrcn", "pool_size": defrcn.POOL_SIZE}),
    Format("a Faster R-CNN C4 of detectron2", "roi_heads.res5.0.conv1.weight", None, rcnn_from_detectron2,
           "predictor.cls_score",
           C4_ARGS | {"model": "faster_rcnn", "pool_size": faster_rcnn.POOL_SIZE_C4, "decouple": False}),
    Format("a Faster R-CNN of detectron2", "roi_heads.box_head.fc1.weight", None, rcnn_from_detectron2,
           "predictor.cls_score", FPN_ARGS),
    Format("a Faster R-CNN of mmdetection", "roi_head.bbox_head.shared_fcs.0.weight", None, rcnn_from_mmdet,
           "predictor.cls_score", FPN_ARGS | {"norm": "affine"}),
    Format("a Faster R-CNN of torchvision", "roi_heads.box_head.fc6.weight", None, rcnn_from_torchvision,
           "predictor.cls_score", FPN_ARGS | {"torchvision": True, "proposals": list(TORCHVISION_PROPOSALS)}))


def convert_detector(path: str | Path, content, original: bool, voc_split: int | None = None) -> dict:
    """A detector of another code base in the form of train.py's checkpoints.

    content: from `weights.read_file`. original: an FCOS of the first repository has the original form.
    voc_split: a two-stage detector has the classes of this few-shot split of VOC, if it has as many. A
    detector without a predictor has none.
    Returns also format (its name), notes (lines) and named (are the names known). Raises WeightsError.
    """
    state = {key.removeprefix("module."): value for key, value in extract_state_dict(content, path).items()}
    meta = content["meta"] if isinstance(content.get("meta"), dict) else {}  # mmdetection's
    found = _find_format(path, state)
    options = _reader_options(found, meta)
    try:
        state = found.reader(state, **options)
        args = DEFAULT_ARGS | found.args | _args_from_tensors(state)
    except WeightsError as error:
        raise WeightsError(f"{path}: looks like {found.name}, but: {error}") from error
    if found.reader is fcos_from_mmdet:
        original = options.get("original", _has_original_form(state))
    args["original"] = original and found.reader in (fcos_from_mmdet, fcos_from_first_repository)
    count = len(state[found.scores + ".weight"]) if found.scores + ".weight" in state else 0
    if found.scores == "predictor.cls_score":
        count = max(0, count - 1)  # background
    if found.scores == "head.anchor_logits":
        count //= state["base_anchors"].shape[1]
    if args["torchvision"]:
        if hashlib.sha256(Path(path).read_bytes()).hexdigest().startswith(WITHOUT_EPS):
            state = _change_bn_eps(state, 0.0)
        if count in (90, 91):  # one for every id of COCO, also for the 10 ids (and 0) without a category
            state, count = state | _rows_of_coco(state, found.scores, count), 80
    names, remark = _class_names(meta, count, args["model"], voc_split)
    form = (", original form" if args["original"] else ", improved form") if args["model"] == "fcos" else ""
    return {"model": state, "args": args, "step": 0, "format": found.name,
            "notes": [f"{path}: {found.name}{form}, {args['backbone']}, {count} classes{remark}"],
            "names": names or [f"class {i}" for i in range(count)], "named": names is not None,
            "category_ids": COCO_IDS if names == COCO_CLASSES else list(range(1, count + 1))}


def _rows_of_coco(state: State, scores: str, count: int) -> State:
    """The rows of COCO's 80 categories in the layers of torchvision that have a class for every id.

    count: 91 for the ids 0 to 90, 90 for 1 to 90 (two-stage: the background is apart).
    """
    if count == 91:
        return {key: state[key].unflatten(0, (-1, 91))[:, COCO_IDS].flatten(0, 1)
                for key in (scores + ".weight", scores + ".bias")}
    rows = torch.tensor([i - 1 for i in COCO_IDS])
    classes = {key: state[key][torch.cat((rows, torch.tensor([count])))]  # the last row is the background
               for key in (scores + ".weight", scores + ".bias")}
    return classes | {key: state[key].unflatten(0, (count, 4))[rows].flatten(0, 1)
                      for key in ("predictor.deltas.weight", "predictor.deltas.bias")}


def _find_format(path: str | Path, state: State) -> Format:
    for found in FORMATS:
        if found.key in state and found.rows in (None, len(state[found.key])):
            return found
    is_resnet = any(re.fullmatch(r"(stem\.)?conv1(\.weight|_w)", key) for key in state)
    advice = ": an ImageNet backbone? train.py takes it as --weights" if is_resnet else ""
    if "roi_heads.box_head.0.0.weight" in state:
        advice = ": a Faster R-CNN v2 of torchvision? Its box head has no counterpart here"
    raise WeightsError(f"{path}: not a detector that is known here; it has {len(state)} tensors like "
                       f"{sorted(state)[:3]}{advice}")


def _reader_options(found: Format, meta: dict) -> dict:
    """What the config that mmdetection saves tells a reader; {} without a config."""
    config = "".join(str(meta.get("config", meta.get("cfg", ""))).split())
    options, style = {}, re.search(r"style=['\"](caffe|pytorch)", config)
    if style and found.reader in (fcos_from_mmdet, fsaf_from_mmdet, rcnn_from_mmdet):
        options["caffe"] = style[1] == "caffe"
    if "FCOSHead" in config and found.reader is fcos_from_mmdet:
        options["original"] = "norm_on_bbox=True" not in config
    return options


def _args_from_tensors(state: State) -> dict:
    """Model arguments that a state_dict under our names tells. Raises WeightsError."""
    blocks = tuple(len({key.split(".")[2] for key in state if key.startswith(f"backbone.layer{i}.")})
                   for i in (1, 2, 3, 4))
    conv2 = state.get("backbone.layer1.0.conv2.weight", torch.zeros(0, 1))
    found = (blocks, "backbone.layer1.0.conv3.weight" in state, len(conv2) // conv2.shape[1], conv2.shape[1])
    backbone = [name for name, architecture in ARCHITECTURES.items() if architecture == found]
    if not backbone:
        raise WeightsError(f"its backbone is none of {', '.join(ARCHITECTURES)} (blocks per stage: {blocks})")
    lateral, is_fcos = state.get("fpn.lateral.0.weight"), "head.centerness.weight" in state
    return {"backbone": backbone[0], "caffe": bool((state["pixel_std"] == 1).all()),
            "fpn_channels": 256 if lateral is None else len(lateral),
            "tower_bias": "head.cls_tower.0.bias" in state if is_fcos else None,
            "head_norm": "none" if is_fcos and "head.cls_tower.1.weight" not in state else "group",
            "cosine": "predictor.cls_score.weight" in state and "predictor.cls_score.bias" not in state}


def _class_names(meta: dict, count: int, model: str,
                 voc_split: int | None = None) -> tuple[list[str] | None, str]:
    """Class names and a remark. The names are mmdetection's, or the usual ones for the count, or None."""
    dataset = meta.get("dataset_meta")
    dataset = dataset if isinstance(dataset, dict) else meta
    written = dataset.get("classes") or dataset.get("CLASSES")
    if isinstance(written, (list, tuple)) and len(written) == count:
        return [str(name) for name in written], ""
    if count == 0:
        return [], ", without a predictor"
    two_stage = model in ("defrcn", "faster_rcnn")
    usual = {"COCO's": COCO_CLASSES, "VOC's": list(VOC_CLASSES)}
    if two_stage:
        usual["COCO's base classes"] = [name for name in COCO_CLASSES if name not in COCO_NOVEL]
    if two_stage and voc_split:
        novel = list(VOC_NOVEL[voc_split])
        base = [name for name in VOC_CLASSES if name not in novel]
        usual = {**usual, f"VOC's base classes of split {voc_split}": base, "VOC's": base + novel,
                 f"VOC's novel classes of split {voc_split}": novel}
    elif model == "defrcn":
        usual |= {"VOC's": [], "COCO's novel classes (VOC's: give --voc-split)": list(COCO_NOVEL)}
    for what, names in usual.items():
        if len(names) == count:
            return names, f", not named, taken for {what}: {names[0]}, {names[1]}, ..."
    advice = " (VOC's base classes? Then give --voc-split)" if two_stage and count == 15 else ""
    return None, f", which it does not name{advice}"

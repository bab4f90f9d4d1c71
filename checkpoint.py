"""Checkpoints: build a model from its arguments, save it, load it, start a training from it.

A checkpoint is one dict of tensors and builtins: the weights, the arguments that describe their model, the
class names, the category ids of the dataset, and the state of the training (`resume.py`). Detectors of other
code bases are read into the same form. Nothing in a file is ever executed.
"""
from functools import partial
from pathlib import Path

import torch
from torch import nn

from convert import TorchvisionFasterRCNN, TorchvisionFCOS, TorchvisionRetinaNet, convert_detector
from data import check_names
from defrcn import (
    CLS_DROPOUT,
    COSINE_SCALE,
    ROI_GRAD_SCALE_BASE,
    DeFRCN,
    FineTuningPredictor,
    transfer_class_rows,
)
from faster_rcnn import FasterRCNN, Predictor
from fcos import FCOS
from fsaf import FSAF
from runtime import atomic_write, blame, memory_format, print0
from weights import WeightsError, extract_state_dict, read_file, refuse_nonfinite

# Arguments that define the architecture. They come from the checkpoint unless given on the command line.
MODEL_ARGS = ("model", "backbone", "fpn", "fpn_channels", "caffe", "original", "tower_bias", "head_norm",
              "torchvision", "fsaf_branch", "ignore_scale", "decouple", "cosine", "cosine_scale", "pool_size",
              "roi_samples", "proposals")
# Arguments of the few-shot stages that older checkpoints do not have. None is the published value.
ABLATION_ARGS = ("train_only", "cls_dropout", "cosine_scale", "pcb_alpha", "pcb_window")
# What the arguments in a checkpoint must be for a model to be built and scored. None means: not used.
ARG_KINDS = {"text": (str, ("model", "backbone", "norm", "fsaf_branch", "data", "train_split", "val_split",
                            "train_json", "train_images", "val_json", "val_images", "stage", "pcb_weights",
                            "shot_lists")),
             "whole number": (int, ("freeze_at", "fpn_channels", "max_size", "roi_samples", "pool_size",
                                    "shots", "shot_seed", "original", "fpn", "caffe", "decouple", "cosine",
                                    "generalized", "center_weights")),
             "number": ((int, float), ("initial_distance", "ignore_scale", "rpn_grad_scale", "roi_grad_scale",
                                       "cls_dropout", "cosine_scale", "pcb_alpha")),
             "list": (list, ("min_size", "pad_to", "proposals", "novel_classes", "train_only", "pcb_window"))}
CLASS_LAYERS = ("head.cls_logits.", "head.anchor_logits.", "predictor.")  # their shape depends on the classes


# ---------------------------------------------------------------------------------------------- model

def build_model(args: dict, num_classes: int) -> nn.Module:
    """The detector that the arguments of train.py describe, with fresh weights."""
    backbone = {key: args[key] for key in ("backbone", "caffe", "norm", "freeze_at")}
    if args["model"] == "fcos":
        if args.get("torchvision"):
            return TorchvisionFCOS(num_classes, fpn_channels=args["fpn_channels"], **backbone)
        return FCOS(num_classes, original=args["original"], tower_bias=args.get("tower_bias"),
                    group_norm=args.get("head_norm") != "none", fpn_channels=args["fpn_channels"],
                    center_weights=args.get("center_weights", True),
                    initial_distance=args.get("initial_distance", 0.0), **backbone)
    if args["model"] == "fsaf":
        model_class = TorchvisionRetinaNet if args.get("torchvision") else FSAF
        return model_class(num_classes, joint=args["fsaf_branch"] == "both",
                           anchor_only=args["fsaf_branch"] == "anchor", ignore_scale=args["ignore_scale"],
                           fpn_channels=args["fpn_channels"], **backbone)
    two_stage = {"pool_size": args["pool_size"], "roi_samples": args["roi_samples"],
                 "post_nms_top_k": args["proposals"], **backbone}
    cosine = {"cosine": args["cosine"], "cosine_scale": args.get("cosine_scale") or COSINE_SCALE}
    if args["model"] == "faster_rcnn":
        predictor = partial(FineTuningPredictor, **cosine) if args["cosine"] else Predictor
        model_class = TorchvisionFasterRCNN if args.get("torchvision") else FasterRCNN
        return model_class(num_classes, fpn=args["fpn"], fpn_channels=args["fpn_channels"],
                           predictor=predictor, **two_stage)
    fine_tuning = args["stage"] == "novel"
    roi_grad_scale, cls_dropout = args["roi_grad_scale"], args.get("cls_dropout")
    if cls_dropout is None:
        cls_dropout = CLS_DROPOUT if fine_tuning and not args["cosine"] else 0.0
    return DeFRCN(num_classes, decouple=args["decouple"], rpn_grad_scale=args["rpn_grad_scale"],
                  roi_grad_scale=ROI_GRAD_SCALE_BASE if roi_grad_scale is None else roi_grad_scale,
                  freeze_res5=fine_tuning and "res5" not in (args.get("train_only") or ()),
                  cls_dropout=cls_dropout, **cosine, **two_stage)


def load_model(path: str | Path, device: torch.device | str = "cpu", original: bool = False,
               classes: list[str] | None = None, voc_split: int | None = None) -> tuple[nn.Module, dict]:
    """A trained detector in evaluation mode, and the rest of its checkpoint.

    path, original, classes, voc_split: see `read_checkpoint`.
    Returns (model, info). info has args (dict), names (C class names), category_ids (C ids of the dataset),
    step, notes (lines to print), named (whether the class names are known). Raises WeightsError, also for a
    detector without a predictor.
    """
    checkpoint = read_checkpoint(path, original, classes, voc_split)
    if not checkpoint["names"]:
        raise WeightsError(f"{path}: has no predictor, so it detects nothing. A training can start from it: "
                           f"train.py --init")
    model = build_model(checkpoint["args"], len(checkpoint["names"]))
    model.load_state_dict(checkpoint["model"])
    info = {key: checkpoint[key] for key in ("args", "names", "category_ids", "step", "notes", "named")}
    return model.to(device, memory_format=memory_format(device)).eval(), info


# ---------------------------------------------------------------------------------------------- files

def save_checkpoint(path: Path, content: dict):
    """Writes a checkpoint, see `runtime.atomic_write`."""
    with atomic_write(path) as file:
        torch.save(content, file)


def read_checkpoint(path: str | Path, original: bool = False, classes: list[str] | None = None,
                    voc_split: int | None = None) -> dict:
    """A checkpoint of train.py, or a detector of another code base in the same form (see `convert.FORMATS`).

    original: an FCOS of the authors' first repository has the original form. The keys do not show the form.
    classes: class names that replace those of the checkpoint. voc_split: few-shot split of VOC, whose classes
    a two-stage detector of another code base has.
    Returns a dict with model, args, names, category_ids, step, path, notes (lines to print), named (whether
    the class names are known), and what else train.py wrote. names is empty for a detector without a
    predictor, from which a training can start. Raises WeightsError that names the file.
    """
    if not Path(path).is_file():
        raise WeightsError(f"checkpoint {path} does not exist")
    content = read_file(path)
    if isinstance(content, dict) and {"args", "names"} <= set(content):
        checkpoint = _own_checkpoint(path, content)
    else:
        with blame(path, WeightsError, "not a detector that is known here"):
            checkpoint = _fit_to_model(path, convert_detector(path, content, original, voc_split))
        refuse_nonfinite(checkpoint["model"], path)
    if classes is not None:
        count, different = len(checkpoint["names"]), len(set(classes))
        if len(classes) != count or different < count:
            raise WeightsError(f"--classes names {len(classes)} classes ({different} different), {path} has "
                               f"{count}")
        checkpoint |= {"names": list(classes), "named": True}
    return {**checkpoint, "path": path}


def _own_checkpoint(path: str | Path, content: dict) -> dict:
    """A checkpoint of train.py, checked. content: what its file holds. Raises WeightsError."""
    missing = {"model", "category_ids", "step"} - set(content)
    if missing:
        raise WeightsError(f"{path}: not a complete checkpoint of train.py, it lacks "
                           f"{', '.join(sorted(missing))}")
    with blame(path, WeightsError, "not a checkpoint of train.py"):
        older = {**dict.fromkeys(ABLATION_ARGS), "center_weights": True, "initial_distance": 0.0}
        if content["args"].get("model") == "faster_rcnn":
            older["fpn"] = False  # older checkpoints are of C4 and do not say so
        content["args"] = {**older, **content["args"]}
        _check_schema(content, path)
    return {**content, "notes": [], "named": True}


def _check_schema(content: dict, path: str | Path):
    """Raises WeightsError or another exception if a checkpoint of train.py describes no model and classes.

    It comes before anything in the file is used or printed.
    """
    args, names, ids = content["args"], content["names"], content["category_ids"]
    for word, (kind, keys) in ARG_KINDS.items():
        wrong = [key for key in keys if args[key] is not None and not isinstance(args[key], kind)]
        if wrong:
            raise WeightsError(f"{path}: its argument {wrong[0]} is no {word}")
    if not args["min_size"] or not args["max_size"] or not 0 < args["max_size"] < 2 ** 20:
        raise WeightsError(f"{path}: its argument min_size or max_size is no size")
    for key in ("min_size", "pad_to", "proposals"):
        if not all(type(side) is int and 0 < side < 2 ** 20 for side in args[key] or ()):
            raise WeightsError(f"{path}: its argument {key} is no list of sizes")
    if not (names and isinstance(names, list) and all(isinstance(name, str) for name in names)
            and len(set(names)) == len(names) and isinstance(ids, list) and len(ids) == len(names)
            and all(isinstance(i, (int, str)) for i in ids) and isinstance(content["step"], int)):
        raise WeightsError(f"{path}: its classes, their ids or its step are damaged")
    check_names(names, path)
    with torch.device("meta"):  # takes no memory, whatever sizes the arguments name
        own = build_model(args, len(names)).state_dict()
    state = extract_state_dict(content["model"], path)
    different = [key for key in own if key not in state or state[key].shape != own[key].shape]
    unknown = [key for key in content["model"] if key not in own]
    if different or unknown:
        raise WeightsError(f"{path}: its weights do not fit the model that its arguments describe "
                           f"({len(different)} are missing or of another shape {different[:3]}, "
                           f"{len(unknown)} have no place {str(unknown[:3])[:200]})")
    refuse_nonfinite(state, path)


def _fit_to_model(path: str | Path, converted: dict) -> dict:
    """Leaves out the tensors that the model of a converted detector does not have, and lists them in a note.

    converted: from `convert_detector`. Raises WeightsError if a tensor of the model is missing or if a tensor
    of the detector itself would be left out.
    """
    state = converted["model"]
    with torch.device("meta"):
        own = build_model(converted["args"], len(converted["names"])).state_dict()
    missing = [key for key in own if key not in state or state[key].shape != own[key].shape]
    if not converted["names"]:  # without a predictor
        missing = [key for key in missing if not key.startswith("predictor.")]
    left_out = [key for key in state if key not in own]
    parts = [key for key in left_out if key.startswith(("backbone.", "fpn.", "head.", "rpn.", "predictor."))]
    if missing or parts:
        raise WeightsError(f"{path}: is not quite {converted['format']}: {len(missing)} tensors are missing "
                           f"or of another shape {missing[:4]}, {len(parts)} have no place {parts[:4]}")
    notes = list(converted["notes"])
    if left_out:
        notes.append(f"{path}: left out {len(left_out)} tensors without a place here: "
                     f"{', '.join(left_out[:5])}")
    return {**converted, "model": {key: state[key] for key in own if key in state}, "notes": notes}


# ---------------------------------------------------------------------------------------------- start from

def load_init(model: nn.Module, checkpoint: dict, names: list[str]):
    """Fills a model with the weights of a checkpoint, to fine-tune it on the classes `names` (--init).

    checkpoint: from `read_checkpoint`. If it has other classes, the layers of the class scores keep their
    fresh weights. A two-stage detector takes over the rows of the classes that both know. Prints what is new.
    Raises WeightsError if the checkpoint holds another model.
    """
    for note in checkpoint["notes"]:
        print0(note)
    path, state, own = checkpoint["path"], checkpoint["model"], model.state_dict()
    old_names, names = checkpoint["names"], list(names)
    replaced = [key for key in own if key.startswith(CLASS_LAYERS)] if old_names != names else []
    different = [key for key in own
                 if key not in replaced and (key not in state or state[key].shape != own[key].shape)]
    unknown = sorted(key for key in state if key not in own
                     and not (replaced and key.startswith(CLASS_LAYERS)))
    if different or unknown:
        trained = ", ".join(f"{key} {checkpoint['args'][key]}" for key in MODEL_ARGS
                            if checkpoint["args"].get(key))
        raise WeightsError(f"{path}: not this model (different in {(different or unknown)[:3]}); it was "
                           f"trained with {trained}")
    model.load_state_dict(own | {key: state[key] for key in own if key in state and key not in replaced})
    if replaced and isinstance(model, FasterRCNN):
        model.load_state_dict(transfer_class_rows(own, state, old_names, names), strict=False)
        # A cosine classifier and a linear one have different layers: no row is taken over.
        same_layers = set(replaced) == {key for key in state if key.startswith("predictor.")}
        kept = [name for name in names if name in old_names and same_layers]
        new = [name for name in names if name not in kept]
        print0(f"{path} knows {len(old_names)} classes: the predictor keeps the rows of "
               f"{', '.join([*kept, 'background']) if kept else 'none'}, new are {', '.join(new) or 'none'}")
    elif replaced:
        known = "other classes" if checkpoint["named"] else "classes, which it does not name"
        print0(f"{path} knows {len(old_names)} {known}: new {', '.join(replaced)}")

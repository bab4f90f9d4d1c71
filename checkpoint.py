"""Checkpoints: what train.py writes, and other people's detectors read as if train.py had written them.

A checkpoint is one dict of tensors and builtins: the weights, the arguments that say which model they belong
to, the class names and the data set's category ids; a training state beside them. Nothing in a file is ever
executed.
"""
import hashlib
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch

import fcos
import fsaf
from backbone import ARCHITECTURES, BN_EPS, WeightsError, read_file, tensors_in
from data import VOC_CLASSES
from defrcn import (
    CLS_DROPOUT,
    POOL_SIZE,
    POST_NMS_TOP_K,
    ROI_GRAD_SCALE_BASE,
    ROI_SAMPLES,
    RPN_GRAD_SCALE,
    DeFRCN,
    rename_detectron2,
    transfer_predictor,
)
from fcos import FCOS
from fewshot import COCO_NOVEL
from fsaf import FSAF, IGNORE_SCALE

# The arguments that say which model it is: a checkpoint decides them unless they are given again.
MODEL_ARGS = ("model", "backbone", "fpn_channels", "caffe", "original", "tower_bias", "torchvision",
              "fsaf_branch", "ignore_scale", "decouple", "cosine", "pool_size", "roi_samples", "proposals")
# COCO's classes, in the order of its category ids, of which there are gaps.
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,"
    "keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
# torchvision's files that were trained with a batch norm without epsilon, by their SHA-256.
WITHOUT_EPS = ("99b0c9b7", "eeacb38b")  # fcos_resnet50_fpn_coco, retinanet_resnet50_fpn_coco


# ---------------------------------------------------------------------------------------------- model

def build_model(args: dict, num_classes: int) -> torch.nn.Module:
    """The detector that train.py's arguments describe, with fresh weights."""
    shared = {key: args[key] for key in ("backbone", "caffe", "norm", "freeze_at")}
    pyramid = {"fpn_channels": args.get("fpn_channels"), "torchvision": args.get("torchvision", False)}
    if args["model"] == "fcos":
        return FCOS(num_classes, original=args["original"], tower_bias=args.get("tower_bias"), **pyramid,
                    **shared)
    if args["model"] == "fsaf":
        return FSAF(num_classes, joint=args["fsaf_branch"] == "both",
                    anchor_only=args["fsaf_branch"] == "anchor", ignore_scale=args["ignore_scale"], **pyramid,
                    **shared)
    novel = args["stage"] == "novel" and args["model"] == "defrcn"
    return DeFRCN(num_classes, decouple=args["decouple"], rpn_grad_scale=args["rpn_grad_scale"],
                  roi_grad_scale=ROI_GRAD_SCALE_BASE if args["roi_grad_scale"] is None else
                  args["roi_grad_scale"], pool_size=args["pool_size"], freeze_res5=novel,
                  cls_dropout=CLS_DROPOUT if novel and not args["cosine"] else 0.0, cosine=args["cosine"],
                  roi_samples=args["roi_samples"], post_nms_top_k=args["proposals"], **shared)


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Layout of weights and images: channels last, but for an NPU, where torch_npu refuses it."""
    return torch.contiguous_format if torch.device(device).type == "npu" else torch.channels_last


def load_model(path: str | Path, device: torch.device | str = "cpu",
               original: bool = False, classes: list[str] | None = None) -> tuple[torch.nn.Module, dict]:
    """A trained detector in evaluation mode, and what else its checkpoint holds.

    path: of train.py, or another code base's (see `read_checkpoint`, also for original). classes: names in
    place of its own. Returns (model, info): info has args (dict), names (C class names), category_ids (C
    dataset ids), step, notes, named. Raises WeightsError.
    """
    checkpoint = read_checkpoint(path, original)
    model = build_model(checkpoint["args"], len(checkpoint["names"]))
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise WeightsError(f"{path}: its weights do not fit the model its arguments describe "
                           f"({' '.join(str(error).split())})") from error
    wild = [key for key, value in checkpoint["model"].items() if not value.isfinite().all()]
    if wild:
        raise WeightsError(f"{path}: {len(wild)} tensors hold values that are not finite, the first is "
                           f"{wild[0]}")
    info = {key: checkpoint[key] for key in ("args", "names", "category_ids", "step", "notes", "named")}
    if classes is not None:
        if len(classes) != len(info["names"]) or len(set(classes)) < len(classes):
            raise WeightsError(f"--classes names {len(classes)} classes ({len(set(classes))} different), "
                               f"{path} has {len(info['names'])}")
        info |= {"names": classes, "named": True}
    return model.to(device, memory_format=memory_format(device)).eval(), info


# ---------------------------------------------------------------------------------------------- files

@contextmanager
def whole_file(path: Path):
    """A binary file that appears at `path` whole or not at all: written beside its place, flushed to disk,
    then moved there. Raises OSError naming it; what was there before then still is."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = f"{error.__context__ or error}".splitlines()[0]
        raise OSError(f"{path} cannot be written ({reason}); what was there before is untouched") from error


def save_checkpoint(path: Path, content: dict):
    """See `whole_file`."""
    with whole_file(path) as file:
        torch.save(content, file)


def read_checkpoint(path: str | Path, original: bool = False) -> dict:
    """A checkpoint of train.py; another code base's detector comes in the same form.

    Recognised by their keys: mmdetection's FCOS, FSAF and RetinaNet, AdelaiDet's and the authors' first FCOS,
    torchvision's FCOS and RetinaNet, the official DeFRCN and detectron2's Faster R-CNN C4. original: of the
    first FCOS repository, whose two forms look alike, the first form. Returns a dict with model, args, names,
    category_ids, step, notes (lines to print), named (whether the file knows its classes). Raises
    WeightsError naming the file.
    """
    if not Path(path).is_file():
        raise WeightsError(f"checkpoint {path} does not exist")
    content = read_file(path)
    needed = {"model", "args", "names", "category_ids", "step"}
    if isinstance(content, dict) and {"args", "names"} <= set(content):
        if needed - set(content):
            raise WeightsError(f"{path}: not a whole checkpoint of train.py, it lacks "
                               f"{', '.join(sorted(needed - set(content)))}")
        return {**content, "notes": [], "named": True}
    return _read_foreign(path, content, original)


def load_init(model: torch.nn.Module, path: str, names: list[str], say=print):
    """Weights to fine-tune from. Where the checkpoint has other classes, the class predictor is left as
    initialised; DeFRCN's keeps the rows of the classes that both know."""
    checkpoint = read_checkpoint(path)
    state, own = checkpoint["model"], model.state_dict()
    of_classes = ("head.cls_logits.", "head.anchor_logits.", "predictor.")
    replaced = [key for key in own if key.startswith(of_classes) and checkpoint["names"] != list(names)]
    wrong = [key for key in own
             if key not in replaced and (key not in state or state[key].shape != own[key].shape)]
    unlike = {key for key in set(state) ^ set(own) if key.startswith("predictor.")}  # cosine or not
    unknown = {key for key in set(state) - set(own) if not (replaced and key.startswith(of_classes))}
    if wrong or unknown:
        trained = ", ".join(f"{key} {checkpoint['args'][key]}" for key in MODEL_ARGS
                            if checkpoint["args"].get(key))
        raise WeightsError(f"{path}: not this model (different in "
                           f"{(wrong or sorted(unknown))[:3]}); it was trained with {trained}")
    model.load_state_dict({**own, **{key: value for key, value in state.items()
                                     if key in own and key not in replaced}})
    if replaced and isinstance(model, DeFRCN):
        model.load_state_dict(transfer_predictor(own, state, checkpoint["names"], list(names)), strict=False)
        kept = [name for name in names if name in checkpoint["names"] and not unlike]
        say(f"{path} knows {len(checkpoint['names'])} classes: the predictor keeps the rows of "
            f"{', '.join([*kept, 'background']) if kept else 'none'}, new are "
            f"{', '.join(name for name in names if name not in kept) or 'none'}")
    elif replaced:
        say(f"{path} knows {len(checkpoint['names'])} "
            + ("other classes" if checkpoint["named"] else "classes, which it does not name")
            + f": new {', '.join(replaced)}")


# ------------------------------------------------------------------------------------ other people's weights

def _read_foreign(path: str | Path, content, original: bool) -> dict:
    state = {key.removeprefix("module."): value for key, value in tensors_in(content, path).items()}
    meta = content.get("meta") if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    args = {"original": False, "tower_bias": None, "torchvision": False, "fsaf_branch": "free",
            "ignore_scale": None, "decouple": True, "cosine": False, "caffe": True, "norm": "frozen",
            "freeze_at": 2, "fpn_channels": 256}
    what, reader, classes = _kind(path, state, meta, args, original)
    try:
        state = reader(state)
        args["backbone"] = _architecture(state)
    except WeightsError as error:
        raise WeightsError(f"{path}: looks like {what}, but: {error}") from error
    if "fpn.lateral.0.weight" in state:
        args["fpn_channels"] = len(state["fpn.lateral.0.weight"])
    if classes + ".weight" not in state:
        raise WeightsError(f"{path}: is {what} without a predictor (after surgery?): give the checkpoint "
                           f"from before it, --init does the surgery")
    outputs = len(state[classes + ".weight"])
    if args["model"] == "defrcn":
        args |= {"decouple": "affine_rpn.weight" in state, "cosine": classes + ".bias" not in state,
                 "rpn_grad_scale": RPN_GRAD_SCALE, "roi_grad_scale": ROI_GRAD_SCALE_BASE,
                 "roi_samples": ROI_SAMPLES, "proposals": list(POST_NMS_TOP_K)}
        if not args["decouple"]:
            args |= {"model": "faster_rcnn", "pool_size": 14}
        outputs -= 1
    if args["fsaf_branch"] == "anchor":
        outputs //= state["base_anchors"].shape[1]
    if args["torchvision"] and outputs == 91:  # a row for every id of COCO, also for those without a category
        for key in (classes + ".weight", classes + ".bias"):
            state[key] = state[key].unflatten(0, (-1, 91))[:, COCO_IDS].flatten(0, 1)
        outputs = 80

    args |= {"min_size": [800], "max_size": 1333, "pad_to": None, "data": None, "stage": None}
    with torch.device("meta"):
        own = build_model(args, outputs).state_dict()
    missing = [key for key in own if key not in state or state[key].shape != own[key].shape]
    extra = [key for key in state if key not in own]
    other = [key for key in extra if key.startswith(("backbone.", "fpn.", "head.", "rpn.", "predictor."))]
    if missing or other:
        raise WeightsError(f"{path}: is not quite {what}: {len(missing)} tensors are missing or of another "
                           f"shape {missing[:4]}, {len(other)} have no place {other[:4]}")
    written = _written_names(meta, outputs)
    names = written or _usual_names(outputs, args["model"] == "defrcn")
    known = ("" if written else f", not named, taken for {names[0]}, {names[1]}, ..." if names else
             ", which it does not name")
    notes = [f"{path}: {what}, {args['backbone']}, {outputs} classes{known}"]
    if extra:
        notes.append(f"{path}: left out {len(extra)} tensors without a place here: {', '.join(extra[:5])}")
    return {"model": {key: state[key] for key in own}, "args": args, "step": 0, "notes": notes,
            "names": names or [f"class {i}" for i in range(outputs)], "named": bool(names),
            "category_ids": COCO_IDS if names == COCO_CLASSES else list(range(1, outputs + 1))}


def _kind(path, state: dict, meta: dict, args: dict, original: bool) -> tuple:
    """What it is, the function that renames it, the layer of its class scores; completes `args`."""
    config = str(meta.get("config", meta.get("cfg", "")))
    style = re.search(r"style\s*=\s*['\"](caffe|pytorch)", config)
    if "bbox_head.conv_centerness.weight" in state:
        bias = "bbox_head.cls_convs.0.conv.bias" in state
        original = "norm_on_bbox=True" not in config.replace(" ", "") if "FCOSHead" in config else not bias
        conv2 = state.get("backbone.layer1.0.conv2.weight")
        # Of the published files the ResNets, whose convolutions have no groups.
        caffe = style[1] == "caffe" if style else conv2 is not None and conv2.shape[0] == conv2.shape[1]
        args |= {"model": "fcos", "original": original, "tower_bias": bias, "caffe": caffe}
        return (f"an FCOS of mmdetection ({'first' if original else 'improved'} form)",
                lambda s: fcos.rename_mmdet(s, caffe, original), "head.cls_logits")
    if "bbox_head.retina_reg.weight" in state:
        caffe = args["caffe"] = bool(style) and style[1] == "caffe"
        free = len(state["bbox_head.retina_reg.weight"]) == 4
        args |= {"model": "fsaf", "fsaf_branch": "free" if free else "anchor", "norm": "affine",
                 "ignore_scale": IGNORE_SCALE}
        return (f"{'an FSAF' if free else 'a RetinaNet'} of mmdetection",
                lambda s: fsaf.rename_mmdet(s, caffe), "head.cls_logits" if free else "head.anchor_logits")
    if "proposal_generator.fcos_head.ctrness.weight" in state:
        args["model"] = "fcos"
        return "an FCOS of AdelaiDet", fcos.rename_adelaidet, "head.cls_logits"
    if "rpn.head.centerness.weight" in state:
        args |= {"model": "fcos", "original": original, "tower_bias": True}
        form = "first" if original else "improved form; --original for the first"
        return f"an FCOS of its authors' first repository ({form})", fcos.rename_first_fcos, "head.cls_logits"
    if "head.regression_head.bbox_reg.weight" in state:
        args |= {"torchvision": True, "caffe": False}
        eps = 0.0 if _sha256(path) in WITHOUT_EPS else BN_EPS
        if "head.regression_head.bbox_ctrness.weight" in state:
            args["model"] = "fcos"
            return "an FCOS of torchvision", lambda s: fcos.rename_torchvision(s, eps), "head.cls_logits"
        args |= {"model": "fsaf", "fsaf_branch": "anchor", "ignore_scale": IGNORE_SCALE}
        return "a RetinaNet of torchvision", lambda s: fsaf.rename_torchvision(s, eps), "head.anchor_logits"
    if "roi_heads.res5.0.conv1.weight" in state:
        args |= {"model": "defrcn", "freeze_at": 3, "pool_size": POOL_SIZE}
        what = ("an official DeFRCN" if "affine_rpn.weight" in state else
                "a Faster R-CNN C4 of detectron2")
        return what, rename_detectron2, "predictor.cls_score"
    resnet = any(re.fullmatch(r"(stem\.)?conv1(\.weight|_w)", key) for key in state)
    raise WeightsError(f"{path}: not a detector that is known here; {len(state)} tensors like "
                       f"{sorted(state)[:3]}"
                       + (": an ImageNet backbone? train.py takes it as --weights" if resnet else ""))


def _sha256(path: str | Path) -> str:
    """The first 8 digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:8]


def _architecture(state: dict) -> str:
    """Key of ARCHITECTURES of a renamed detector."""
    blocks = tuple(len({key.split(".")[2] for key in state if key.startswith(f"backbone.layer{i}.")})
                   for i in (1, 2, 3, 4))
    conv2 = state.get("backbone.layer1.0.conv2.weight")
    if conv2 is not None:
        found = (blocks, "backbone.layer1.0.conv3.weight" in state, len(conv2) // conv2.shape[1],
                 conv2.shape[1])
        for name, architecture in ARCHITECTURES.items():
            if architecture == found:
                return name
    raise WeightsError(f"its backbone is none of {', '.join(ARCHITECTURES)} (blocks per stage: {blocks})")


def _written_names(meta: dict, count: int) -> list[str] | None:
    """The class names that mmdetection writes down."""
    dataset = meta.get("dataset_meta")
    written = dataset if isinstance(dataset, dict) else meta
    written = written.get("classes") or written.get("CLASSES")
    if isinstance(written, (list, tuple)) and len(written) == count:
        return [str(name) for name in written]
    return None


def _usual_names(count: int, few_shot: bool) -> list[str] | None:
    """What so many classes are elsewhere, in the order of COCO's ids or of VOC's alphabet."""
    if few_shot:
        known = [COCO_CLASSES, [c for c in COCO_CLASSES if c not in COCO_NOVEL], list(COCO_NOVEL)]
    else:
        known = [COCO_CLASSES, list(VOC_CLASSES)]
    return next((names for names in known if len(names) == count), None)

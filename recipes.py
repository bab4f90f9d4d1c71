"""What a training uses: its arguments, the published recipes, and which value wins.

`parse_args` gives every argument a value. `resolve` decides it; `train.py --show-recipe` prints the result.
"""
from runtime import AMP, Parser, blame, device_name, has_bf16, print0  # first: see runtime.py

# isort: split
import argparse
import math
import os
from contextlib import nullcontext
from pathlib import Path

from augment import AUGMENTATIONS
from backbone import ARCHITECTURES
from checkpoint import MODEL_ARGS, read_checkpoint
from data import MAX_WORKERS
from defrcn import (
    PARTS,
    POOL_SIZE,
    ROI_GRAD_SCALE_BASE,
    ROI_GRAD_SCALE_NOVEL,
    ROI_GRAD_SCALE_VOC,
    RPN_GRAD_SCALE,
)
from faster_rcnn import POOL_SIZE as POOL_SIZE_FPN
from faster_rcnn import POOL_SIZE_C4, POST_NMS_TOP_K, POST_NMS_TOP_K_C4, ROI_SAMPLES
from fewshot import add_class_arguments
from fewshot import schedule as few_shot_schedule
from fsaf import EFFECTIVE_SCALE, IGNORE_SCALE, IGNORE_SCALE_JOINT
from layouts import default_splits, layout
from weights import WeightsError

REFERENCE_BATCH = 16  # images per step of every published recipe; --lr and --schedule are meant for it
# Steps at the reference batch, and the steps where the lr drops to a tenth (Detectron's model zoo).
SCHEDULES = {"1x": (90_000, (60_000, 80_000)), "2x": (180_000, (120_000, 160_000)),
             "3x": (270_000, (210_000, 250_000)),  # detectron2's
             # mmdetection's 12 and 24 epochs of 7330 steps, COCO without its empty images
             "12e": (87_960, (58_640, 80_630)), "24e": (175_920, (117_280, 161_260)),
             "s1x": (130_000, (100_000, 120_000)),
             "tutorial": (7_500, (3_750, 5_000))}  # Detectron's: 60,000 steps of 2 images

VERIFY_BELOW = 5000  # images, for --verify-images

# ---- sources of values; `resolve` has their order
DEFAULTS = {"model": "fcos", "data": "shapes", "original": False, "head_norm": "group",
            "fsaf_branch": "free", "decouple": True, "fpn": True, "cosine": False, "backbone": "resnet50",
            "caffe": False, "fpn_channels": 256, "max_size": 1333, "train_split": "train2017",
            "val_split": "val2017", "drop_empty": False,
            "use_difficult": False, "generalized": False, "voc_split": 1, "pcb_weights": "resnet101",
            "schedule": "1x", "batch_size": REFERENCE_BATCH, "amp": "off", "loss_scale": "dynamic",
            "compile": False, "device": "auto", "seed": 0, "log_every": 20, "save_every": 1000, "keep": False,
            "no_eval": False, "pictures": 8, "skip_broken": 0, "augment": [], "torchvision": False}
# lr and weight_decay are for SGD. bias_lr and bias_decay multiply them for the biases of layers.
RECIPES = {
    "fcos": {"lr": 0.01, "weight_decay": 1e-4, "bias_lr": 2.0, "bias_decay": 0.0, "clip": 35.0,
             "warmup_steps": 500, "warmup_factor": 1 / 3, "norm": "frozen", "freeze_at": 2,
             "min_size": [800], "center_weights": True, "initial_distance": 0.0},
    "fsaf": {"lr": 0.01, "weight_decay": 1e-4, "bias_lr": 1.0, "bias_decay": 1.0, "clip": 10.0,
             "warmup_steps": 500, "warmup_factor": 1e-3, "norm": "affine", "freeze_at": 2,
             "min_size": [800], "ignore_scale": IGNORE_SCALE},
    "defrcn": {"lr": 0.02, "weight_decay": 5e-5, "bias_lr": 1.0, "bias_decay": 2.0, "clip": 0.0,
               "warmup_steps": 1000, "warmup_factor": 1e-3, "norm": "frozen", "freeze_at": 3,
               "min_size": [640, 672, 704, 736, 768, 800], "fpn": False, "pool_size": POOL_SIZE,
               "roi_samples": ROI_SAMPLES, "proposals": list(POST_NMS_TOP_K_C4),
               "rpn_grad_scale": RPN_GRAD_SCALE, "roi_grad_scale": ROI_GRAD_SCALE_BASE},
    "faster_rcnn": {"lr": 0.02, "weight_decay": 1e-4, "bias_lr": 1.0, "bias_decay": 1.0, "clip": 0.0,
                    "warmup_steps": 500, "warmup_factor": 1 / 3, "norm": "frozen", "freeze_at": 2,
                    "min_size": [800], "decouple": False, "pool_size": POOL_SIZE_FPN,
                    "roi_samples": ROI_SAMPLES, "proposals": list(POST_NMS_TOP_K)},
}
C4_FORM = {"warmup_steps": 1000, "warmup_factor": 1e-3, "min_size": [640, 672, 704, 736, 768, 800],
           "pool_size": POOL_SIZE_C4, "proposals": list(POST_NMS_TOP_K_C4)}
NOVEL_STAGE = {"lr": 0.01, "warmup_steps": 0, "roi_grad_scale": ROI_GRAD_SCALE_NOVEL}
VOC_SIZES = list(range(480, 801, 32))  # short sides, px
FEW_SHOT_VOC = {"base": {"use_difficult": True, "min_size": VOC_SIZES, "warmup_steps": 100},
                "novel": {"use_difficult": True, "min_size": VOC_SIZES, "roi_grad_scale": ROI_GRAD_SCALE_VOC}}
# What the novel stage takes from the checkpoint of the base stage, and the data, if none are given.
BASE_ARGS = ("min_size", "max_size", "novel_classes", "voc_split")
DATA_ARGS = ("data", "train_split", "val_split", "train_json", "train_images", "val_json", "val_images")
SHAPES = {"backbone": "resnet18", "weights": "none", "fpn_channels": 64, "min_size": [128], "max_size": 128,
          "train_split": "train", "val_split": "val", "schedule": "s1x", "batch_size": 8, "warmup_steps": 50,
          "pcb_weights": "none"}
SHAPES_TWO_STAGE = {"epochs": 1.5, "min_size": [160], "max_size": 214, "roi_samples": 32,
                    "proposals": [200, 100], "pool_size": 4}
# From random weights FSAF takes longer than FCOS: its head has no group norm.
SHAPES_MODEL = {"fcos": {"epochs": 1.75}, "fsaf": {"epochs": 2.5}, "defrcn": SHAPES_TWO_STAGE,
                "faster_rcnn": SHAPES_TWO_STAGE}
# FCOS on a device with bf16: larger images in the time that float32 takes. With smaller ones P7 would be one
# cell, where some CPUs compute a wrong gradient. A command that sets a size, the length or the precision has
# none of this.
SHAPES_BF16 = {"amp": "bf16", "max_size": 171, "epochs": 1.8}
SHAPES_NOVEL = {"max_steps": 200}
# Random weights must not be frozen, and batch norm must learn its statistics.
FROM_SCRATCH = {"norm": "batch", "freeze_at": 0, "optimizer": "adamw"}
# What the improved form of FCOS needs besides: equal weights in the box loss, as in the paper's Eq. 2, find
# small objects sooner, and with a positive distance at the start no side of the boxes dies (docs/results.md).
FROM_SCRATCH_FCOS = {"center_weights": False, "initial_distance": 1.0}
# Every published number was trained with SGD. From random weights SGD needs many epochs to tell classes
# apart. AdamW needs a few, because its steps do not shrink with the tiny gradients at the start.
ADAMW = {"lr": 0.002, "weight_decay": 0.05}


def resolve(given: dict, checkpoint: dict | None, names: list[str]) -> tuple[dict, dict]:
    """The value of every argument, and where it comes from: two dicts with the same keys.

    The first source that has an argument decides it: command line, checkpoint, AdamW, random weights, shapes
    in the novel stage, few-shot on VOC, novel stage, layout of the data, shapes in bf16, shapes, joint or C4
    form, recipe of the model, default.
    given: arguments on the command line. checkpoint: what --init or --resume names, or None. names: the names
    of all arguments.
    """
    layers = [("command line", given)]
    if checkpoint:
        saved = {key: value for key, value in checkpoint["args"].items() if value is not None}
        kept = set(saved) - {"resume", "init", "out"} if "resume" in given else set(MODEL_ARGS)
        if "init" in given and given.get("stage") == "novel" and saved.get("stage") == "base":
            kept |= {*BASE_ARGS, *(() if {"data", "train_json"} & set(given) else DATA_ARGS)}
        layers.append((str(checkpoint["path"]), {key: saved[key] for key in kept if key in saved}))

    def value(name: str):
        return next((layer[name] for _, layer in layers if name in layer), DEFAULTS.get(name))

    model, stage, data = value("model"), value("stage"), value("data")
    is_shapes = data == "shapes" and not value("train_json")
    in_folder = not value("train_json") and not is_shapes and Path(data).is_dir()
    is_voc = in_folder and layout(data) == "voc"
    splits = default_splits(data) if in_folder else ()
    novel = stage == "novel"
    in_bf16 = (is_shapes and model == "fcos" and not {*SHAPES_BF16, "min_size", "max_steps"} & set(given)
               and has_bf16(value("device")))
    joint = model == "fsaf" and value("fsaf_branch") == "both"
    c4 = model == "faster_rcnn" and not value("fpn")
    layers += [("built-in shapes, novel stage", SHAPES_NOVEL if novel and is_shapes else {}),
               ("published recipe, few-shot on VOC", FEW_SHOT_VOC[stage] if stage and is_voc else {}),
               ("published recipe, novel stage", NOVEL_STAGE if novel else {}),
               ("layout of the data", dict(zip(("train_split", "val_split"), splits))),
               ("built-in shapes on a device with bf16", SHAPES_BF16 if in_bf16 else {}),
               ("built-in shapes", {**SHAPES, **SHAPES_MODEL[model]} if is_shapes else {}),
               ("paper's joint form", {"ignore_scale": IGNORE_SCALE_JOINT} if joint else {}),
               ("published recipe of C4", C4_FORM if c4 else {}),
               (f"published recipe of {model}", RECIPES[model])]
    layers.append(("default", {**DEFAULTS, "weights": value("backbone"), "optimizer": "sgd",
                               "workers": min(4, max(1, (os.cpu_count() or 1) - 1)),
                               "shot_seed": value("seed")}))
    if value("weights") == "none" and not given.get("init"):
        fcos = FROM_SCRATCH_FCOS if model == "fcos" and not value("original") else {}
        layers.insert(1 + bool(checkpoint), ("random weights", {**FROM_SCRATCH, **fcos}))
    if value("optimizer") == "adamw":
        layers.insert(1 + bool(checkpoint), ("AdamW", ADAMW))
    # A source with one length (steps or epochs) unsets the other length of weaker sources.
    layers = [(source, {"epochs": None, "max_steps": None, **layer} if {"epochs", "max_steps"} & set(layer)
               else layer) for source, layer in layers]

    args, sources = {}, {}
    for name in dict.fromkeys((*names, *RECIPES[model], "torchvision", "tower_bias")):
        sources[name], args[name] = next(((source, layer[name]) for source, layer in layers if name in layer),
                                         ("", None))
    args["schedule_steps"], args["schedule_drops"] = SCHEDULES[args["schedule"]] if not stage else (
        few_shot_schedule(is_voc, args["shots"], args["generalized"]))
    for name in ("schedule_steps", "schedule_drops"):
        sources[name] = f"published, for batches of {REFERENCE_BATCH}; scaled to the length of the run"
    args["out"] = args["out"] or Path("runs") / run_name(args)
    return args, {**sources, "out": sources["out"] or "default"}


# ---------------------------------------------------------------------------------------------- arguments

def make_parser(default) -> Parser:
    """The arguments of train.py. default: the value of every argument that is not given."""
    parser = Parser(prog="train.py", argument_default=default, description="Train a detector. An argument "
                    "that is not given takes the published recipe's value: --show-recipe lists them all.")
    model = parser.add_argument_group("model").add_argument
    model("--model", choices=RECIPES, help="default: fcos")
    model("--original", action="store_true", help="FCOS as first published, without the improvements")
    model("--head-norm", choices=("group", "none"), help="FCOS: norm in the head (default: group)")
    model("--fsaf-branch", choices=("free", "anchor", "both"),
          help="FSAF's anchor-free branch (free, the default), RetinaNet's anchor-based one, or both")
    model("--fsaf-joint", action="store_const", dest="fsaf_branch", const="both", help="the joint form")
    model("--ignore-scale", type=float,
          help="side of FSAF's ignore region in parts of the box's: 0.2, or 0.5 with both branches")
    model("--no-decouple", action="store_false", dest="decouple", help="DeFRCN without its decoupling")
    model("--c4", action="store_false", dest="fpn", help="Faster R-CNN without FPN, on one feature map, C4")
    model("--fpn", action="store_true", help="Faster R-CNN with FPN (default)")
    model("--cosine", action="store_true", help="TFA's cosine classifier in place of the linear one")
    model("--rpn-grad-scale", type=float, help="DeFRCN: share of RPN's gradient that reaches the backbone")
    model("--roi-grad-scale", type=float, help="DeFRCN: share of the RoI head's gradient that does so")
    model("--roi-samples", type=int, help="RoIs per image in training (default: 512; shapes: 32)")
    model("--pool-size", type=int, help="grid of RoIAlign (default: 7; --c4: 14; shapes: 4)")
    model("--proposals", type=int, nargs=2, metavar=("TRAIN", "TEST"),
          help="proposals per image after NMS (default: 1000 1000; C4: 2000 1000; shapes: 200 100)")
    model("--backbone", choices=ARCHITECTURES, help="default: resnet50 (shapes: resnet18)")
    model("--weights", help="ImageNet weights: none, a file, or a backbone's name for torchvision's")
    model("--caffe", action="store_true", help="backbone of Detectron's files: stride on the first 1x1")
    model("--norm", choices=("frozen", "affine", "batch"),
          help="batch norm of the backbone: nothing trains, scale and offset train, or ordinary")
    model("--freeze-at", type=int, help="number of stages that do not train, the stem included")
    model("--fpn-channels", type=int, help="default: 256 (shapes: 64)")
    data = parser.add_argument_group("data").add_argument
    data("--data", help="'shapes' (default) or a folder in COCO, VOC, Roboflow or YOLO layout")
    data("--train-split", help="default: that of the layout, such as train2017; several joined by +")
    data("--val-split", help="default: that of the layout, such as val2017")
    data("--train-json", help="COCO-format file, with --train-images; several of both joined by +")
    data("--train-images", help="image folder of --train-json")
    data("--val-json", help="COCO-format file, with --val-images")
    data("--val-images", help="image folder of --val-json")
    data("--min-size", type=int, nargs="+",
         help="short side in px; one of several is drawn per image (default: 800; shapes: 128)")
    data("--max-size", type=int, help="limit of the long side in px (default: 1333; shapes: 128, bf16: 171)")
    data("--augment", nargs="+", choices=AUGMENTATIONS, help="random colours, random crops (default: none)")
    data("--pad-to", type=int, nargs=2, metavar=("H", "W"), help="one fixed network input size")
    data("--drop-empty", action="store_true", help="leave images without objects out of training")
    data("--use-difficult", action="store_true", help="train on VOC's difficult objects")
    data("--workers", type=int, help="loader processes per rank (default: up to 4)")
    data("--verify-images", action=argparse.BooleanOptionalAction,
         help=f"decode every image before step 1 (default: for fewer than {VERIFY_BELOW} images)")
    data("--skip-broken", type=int, metavar="N", help="go on with up to N broken images a rank (default: 0)")
    few = parser.add_argument_group("few-shot (--model defrcn or faster_rcnn)")
    few.add_argument("--stage", choices=("base", "novel"),
                     help="train on the base classes, or fine-tune (--init) on K shots of the novel ones")
    few.add_argument("--shots", type=int, help="K, boxes per class of the novel stage")
    few.add_argument("--shot-seed", type=int, help="number of the list of shots (default: --seed)")
    add_class_arguments(few)
    few.add_argument("--shot-lists", type=Path, help="folder of published lists, or none to sample shots")
    few.add_argument("--pcb-weights", help="ResNet-101 of the calibration: none, a file, or resnet101")
    few.add_argument("--pcb-alpha", type=float, help="weight of the detector's score in it (default: 0.5)")
    few.add_argument("--pcb-window", type=float, nargs=2, metavar=("LOW", "HIGH"),
                     help="scores that it changes (default: 0.05 1)")
    few.add_argument("--train-only", nargs="+", choices=tuple(PARTS), metavar="PART",
                     help=f"only these parts train: {', '.join(PARTS)} (TFA: predictor)")
    few.add_argument("--cls-dropout", type=float, help="before DeFRCN's classifier (default: 0.8, base: 0)")
    few.add_argument("--cosine-scale", type=float, help="factor of the cosines of --cosine (default: 20)")
    _add_run_arguments(parser)
    return parser


def _add_run_arguments(parser: Parser):
    """The arguments that are about neither model nor data."""
    optim = parser.add_argument_group("optimization").add_argument
    optim("--optimizer", choices=("sgd", "adamw"), help="default: sgd; from random weights adamw")
    optim("--batch-size", type=int, help="images per step over all ranks (default: 16; shapes: 8)")
    optim("--micro-batch", type=int, help="images per rank at a time (default: all); gradients add up")
    optim("--lr", type=float, help="for a batch of 16; another batch size scales it linearly")
    optim("--schedule", choices=SCHEDULES, help="steps and lr drops, for a batch of 16 (default: 1x)")
    optim("--epochs", type=float, help="length; the lr drops at the same fractions as in the schedule")
    optim("--max-steps", type=int, help="length in steps, in place of --epochs")
    optim("--warmup-steps", type=int, help="limited to a tenth of the run")
    optim("--warmup-factor", type=float, help="lr of the first step, as a fraction of the full lr")
    optim("--weight-decay", type=float)
    optim("--clip", type=float, help="limit of the L2 norm of the gradient, 0 = none")
    optim("--amp", choices=AMP,
          help="precision of the network (default: off, which is float32; FCOS on shapes: bf16 if possible)")
    optim("--loss-scale", help="for fp16: dynamic (default) or a number")
    optim("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; pads images to few sizes")
    run = parser.add_argument_group("run").add_argument
    run("--device", type=device_name, metavar="NAME", help="auto, cuda, npu, cpu; one by its number: npu:3")
    run("--out", type=Path, help="default: runs/MODEL, with the form and the stage")
    run("--seed", type=int, help="default: 0")
    run("--init", help="start from the weights of this checkpoint; other classes get a new head")
    run("--classes", metavar="NAME,NAME", type=lambda text: text.split(","),
        help="class names of an --init that does not name them, in the order of its labels")
    run("--resume", nargs="?", const="last",
        help="continue OUT/last.pth, or the file given, with its arguments; those given here override them")
    run("--log-every", type=int, help="steps between log lines (default: 20)")
    run("--save-every", type=int, help="steps between checkpoints, last.pth (default: 1000)")
    run("--keep", action="store_true", help="keep each checkpoint as step_N.pth too")
    run("--eval-every", type=int, help="steps between evaluations (default: at the end only)")
    run("--no-eval", action="store_true")
    run("--pictures", type=int, help="the evaluation draws the first N images (default: 8)")
    run("--show-recipe", action="store_true", help="print every value and where it comes from, and stop")


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, dict | None]:
    """The arguments with every default filled in, and the checkpoint of --init or --resume, read once."""
    parser = make_parser(argparse.SUPPRESS)
    given = vars(parser.parse_args(argv))
    names = list(vars(make_parser(None).parse_args([])))
    checkpoint = None
    if "resume" in given:
        path = given["resume"]
        if path == "last":
            path = resolve(given, None, names)[0]["out"] / "last.pth"
        checkpoint = read_checkpoint(path)
        if "ranks" not in checkpoint:
            raise WeightsError(f"{path}: holds weights but no training to go on with: give it as --init")
        given |= {"resume": Path(path), "out": given.get("out", Path(path).parent)}
    elif "init" in given:
        checkpoint = read_checkpoint(given["init"], False, given.get("classes"), voc_split_of(given))
    if checkpoint and given.get("model", checkpoint["args"]["model"]) != checkpoint["args"]["model"]:
        parser.error(f"{checkpoint['path']} is a checkpoint of --model {checkpoint['args']['model']}, not "
                     f"{given['model']}")
    with blame(checkpoint["path"], WeightsError, "has arguments of no run") if checkpoint else nullcontext():
        _check_saved(parser, checkpoint)
        values, sources = resolve(given, checkpoint, names)
        show_recipe = values.pop("show_recipe")  # not a value of the run
        args = argparse.Namespace(**values)
        _check(parser, args)
    if show_recipe:
        print0(recipe_table(args, sources))
        parser.exit()
    return args, checkpoint


def voc_split_of(given: dict) -> int | None:
    """The few-shot split of VOC that the command line asks for, by name or by VOC data; None without."""
    data = Path(given.get("data", ""))
    is_voc = "data" in given and "train_json" not in given and data.is_dir() and layout(data) == "voc"
    return given.get("voc_split", DEFAULTS["voc_split"] if is_voc else None)


def run_name(args: dict) -> str:
    """Folder of a run under runs/: the model and its form, the few-shot stage."""
    c4 = "c4" if args["model"] == "faster_rcnn" and not args["fpn"] else None
    parts = [args["model"], {"anchor": "anchor", "both": "joint"}.get(args["fsaf_branch"]), c4, args["stage"]]
    if args["stage"] == "novel":
        own_list = args["shot_seed"] == args["seed"]
        parts += ["all" if args["generalized"] else None, f"{args['shots']}shot", f"seed{args['seed']}",
                  None if own_list else f"list{args['shot_seed']}"]
    return "_".join(filter(None, parts))


def recipe_table(args: argparse.Namespace, sources: dict) -> str:
    """Every argument that is used, one per line: name, value, source."""
    rows = [("argument", "value", "where it comes from")]
    rows += [(name, value, sources.get(name, "")) for name, value in vars(args).items() if value is not None]
    return "\n".join(f"{name:16} {value!s:36} {source}" for name, value, source in rows)


# Arguments that must not be negative, and arguments that must be positive. One that is not used is None.
NOT_NEGATIVE = ("seed", "shot_seed", "workers", "clip", "weight_decay", "warmup_steps", "warmup_factor",
                "pictures", "skip_broken", "rpn_grad_scale", "roi_grad_scale", "pcb_alpha", "pcb_window",
                "cls_dropout")
POSITIVE = ("batch_size", "max_size", "lr", "save_every", "log_every", "fpn_channels", "micro_batch",
            "max_steps", "epochs", "eval_every", "shots", "roi_samples", "pool_size", "min_size", "pad_to",
            "proposals", "cosine_scale")


def _check(parser: Parser, args: argparse.Namespace):
    """Stops with one line if an argument makes no sense, alone or together with others."""
    for name in (*NOT_NEGATIVE, *POSITIVE):
        value = getattr(args, name)
        least = min(value) if isinstance(value, list) else value
        if least is not None and not (0 < least < math.inf or name in NOT_NEGATIVE and least == 0):
            sign = "must not be negative:" if name in NOT_NEGATIVE else "must be positive, not"
            parser.error(f"--{name.replace('_', '-')} {sign} {least}")
    two_stage, novel = args.model in ("defrcn", "faster_rcnn"), args.stage == "novel"
    few_shot = (args.stage or args.generalized or args.novel_classes or args.cosine
                or not args.decouple and args.model != "faster_rcnn")
    ignore_scale = args.ignore_scale
    for wrong, message in (
            (args.train_json and not args.val_json and args.data == "shapes" and not args.no_eval,
             "give --val-json and --val-images too, or --no-eval"),
            (args.workers > MAX_WORKERS, f"--workers must be at most {MAX_WORKERS}, not {args.workers}"),
            (args.max_steps and args.epochs, "give --epochs or --max-steps, not both"),
            # With 32 channels a group of the group norm has one value on a 1 x 1 level: nothing to normalise.
            (args.model == "fcos" and args.fpn_channels % 64, "--fpn-channels must be a multiple of 64 (32 "
             f"groups of two or more channels), not {args.fpn_channels}"),
            (args.pad_to and any(side % 32 for side in args.pad_to) and args.fpn,
             f"--pad-to must be multiples of 32, not {args.pad_to}"),
            (few_shot and not two_stage, "--stage, --generalized, --novel-classes, --cosine and "
             "--no-decouple belong to --model defrcn or faster_rcnn"),
            (novel != bool(args.shots), "--stage novel and --shots K belong together"),
            (novel and not (args.init or args.resume),
             "--stage novel fine-tunes: give the base stage's checkpoint with --init"),
            (args.model == "faster_rcnn" and (args.rpn_grad_scale, args.cls_dropout) != (None, None),
             "--rpn-grad-scale and --cls-dropout belong to --model defrcn"),
            (args.cosine_scale and not args.cosine, "--cosine-scale belongs to --cosine"),
            (args.train_only and not novel, "--train-only belongs to --stage novel"),
            (max(args.pcb_alpha or 0, args.cls_dropout or 0, *(args.pcb_window or [0])) > 1,
             "--pcb-alpha, --pcb-window and --cls-dropout are at most 1"),
            (args.model not in ("faster_rcnn", "defrcn") and not args.fpn,
             "--c4 is a form of Faster R-CNN: give --model faster_rcnn"),
            (args.model != "fcos" and args.original, "--original is a form of FCOS: give --model fcos"),
            (args.model != "fcos" and args.head_norm != "group", "--head-norm belongs to --model fcos"),
            (args.model != "fsaf" and (args.fsaf_branch != "free" or ignore_scale is not None),
             "--fsaf-joint, --fsaf-branch and --ignore-scale belong to --model fsaf"),
            (args.fsaf_branch == "anchor" and ignore_scale != IGNORE_SCALE,
             "--ignore-scale belongs to the anchor-free branch: --fsaf-branch anchor has none"),
            (ignore_scale is not None and not EFFECTIVE_SCALE <= ignore_scale <= 1,
             f"--ignore-scale must be {EFFECTIVE_SCALE} (no ring) to 1, not {ignore_scale}"),
            (not 0 <= args.freeze_at <= 5,
             f"--freeze-at must be 0..5 (stem and four stages), not {args.freeze_at}"),
            (args.loss_scale != "dynamic" and not _is_positive(args.loss_scale),
             f"--loss-scale is 'dynamic' or a positive number, not {args.loss_scale}")):
        if wrong:
            parser.error(message)


def _check_saved(parser: Parser, checkpoint: dict | None):
    """Raises ValueError if an argument in a checkpoint is none that the command line could give."""
    saved = checkpoint["args"] if checkpoint else {}
    for action in parser._actions:
        value = saved.get(action.dest)
        kind = (int, float) if action.type is float else int if action.type is int else str
        kind = bool if action.nargs == 0 and action.const in (True, False, None) else kind
        takes_list = action.nargs in ("+", 2) or action.dest in ("novel_classes", "classes")
        values = value if takes_list and isinstance(value, (list, tuple)) else [value]
        if value is not None and not all(isinstance(v, kind) and (not action.choices or v in action.choices)
                                         for v in values):
            raise ValueError(f"{action.dest} {str(value)[:40]!r}")
    for name in ("bias_lr", "bias_decay"):  # of the recipes, not of the command line
        if not isinstance(saved.get(name, 1.0), (int, float)):
            raise ValueError(f"{name} {str(saved[name])[:40]!r}")


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False

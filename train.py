"""Train a detector.

    python train.py --model fcos                              built-in shapes, minutes on a laptop CPU
    python train.py --model fsaf --fsaf-joint                 likewise: FSAF and RetinaNet's branch together
    python train.py --model defrcn --stage base               few-shot: first the base classes, then
    python train.py --model defrcn --stage novel --shots 10 --init runs/defrcn_base/last.pth
    python train.py --data coco --micro-batch 4               COCO on one GPU: 16 images a step, 4 at a time
    torchrun --nproc_per_node 8 train.py --data coco          COCO on 8 GPUs, 2 images each
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --data coco
    python train.py --data my_data --epochs 30 --init runs/fcos/last.pth --out runs/mine
    python train.py --resume runs/mine/last.pth

The file reads from top to bottom: arguments, learning rate, parameter groups, checkpoints, then main(), in
which the training loop is written out. The README has a recipe for every published number.
"""
import os

# torch_npu is imported for --device npu, and only then.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import fcntl
import json
import math
import platform
import resource
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from backbone import ARCHITECTURES, WeightsError, load_imagenet
from checkpoint import (
    MODEL_ARGS,
    build_model,
    load_init,
    memory_format,
    read_checkpoint,
    save_checkpoint,
    whole_file,
)
from data import (
    MAX_WORKERS,
    DataError,
    StepBatches,
    TrainSamples,
    check_pad_to,
    collate,
    open_dataset,
    shape_buckets,
)
from defrcn import (
    ROI_GRAD_SCALE_BASE,
    ROI_GRAD_SCALE_NOVEL,
    ROI_GRAD_SCALE_VOC,
    RPN_GRAD_SCALE,
    Affine,
    CalibrationNet,
)
from evaluate import (
    AMP,
    Parser,
    autocast,
    describe_few_shot,
    evaluate,
    make_calibration,
    make_folder,
    run_script,
    setup_device,
)
from fewshot import keep_classes, lists_folder, novel_names, schedule, shot_view
from fsaf import EFFECTIVE_SCALE, IGNORE_SCALE, IGNORE_SCALE_JOINT

REFERENCE_BATCH = 16  # images per step of every published recipe; --lr and --schedule are meant for it
# Steps at the reference batch and where the lr drops tenfold (Detectron's model zoo).
SCHEDULES = {"1x": (90_000, (60_000, 80_000)), "2x": (180_000, (120_000, 160_000)),
             "s1x": (130_000, (100_000, 120_000))}
MOMENTUM = 0.9
SCALE_GROWTH_STEPS = 2000  # as torch.amp.GradScaler
# In what the published recipes differ. lr, weight_decay: with SGD; bias_lr, bias_decay: of biases, times
# those of the rest; shapes: what the built-in set takes instead.
RECIPES = {
    "fcos": {"lr": 0.01, "weight_decay": 1e-4, "bias_lr": 2.0, "bias_decay": 0.0, "clip": 35.0,
             "warmup_steps": 500, "warmup_factor": 1 / 3, "norm": "frozen", "freeze_at": 2,
             "min_size": [800], "shapes": {"epochs": 1.75}},
    # From random weights FSAF takes longer than FCOS: its head has no group norm.
    "fsaf": {"lr": 0.01, "weight_decay": 1e-4, "bias_lr": 1.0, "bias_decay": 1.0, "clip": 10.0,
             "warmup_steps": 500, "warmup_factor": 1e-3, "norm": "affine", "freeze_at": 2,
             "min_size": [800], "shapes": {"epochs": 2.5}},
    "defrcn": {"lr": 0.02, "weight_decay": 5e-5, "bias_lr": 1.0, "bias_decay": 2.0, "clip": 0.0,
               "warmup_steps": 1000, "warmup_factor": 1e-3, "norm": "frozen", "freeze_at": 3,
               "min_size": [640, 672, 704, 736, 768, 800], "pool_size": 7,
               "shapes": {"epochs": 1.5, "min_size": [160], "max_size": 214, "roi_samples": 32,
                          "proposals": [200, 100], "pool_size": 4}},
}
RECIPES["faster_rcnn"] = {**RECIPES["defrcn"], "weight_decay": 1e-4, "bias_decay": 1.0, "freeze_at": 2,
                          "pool_size": 14}
NOVEL_STAGE = {"lr": 0.01, "warmup_steps": 0}  # DeFRCN's fine-tuning
NOVEL_SHAPES = {"epochs": None, "max_steps": 200}
# What an argument that was not given becomes, on the built-in set and elsewhere; the recipe's own values win.
SHAPES_DEFAULTS = {"backbone": "resnet18", "weights": "none", "fpn_channels": 64, "min_size": [128],
                   "max_size": 128, "train_split": "train", "val_split": "val", "schedule": "s1x",
                   "batch_size": 8, "warmup_steps": 50, "pcb_weights": "none"}
DEFAULTS = {"backbone": "resnet50", "fpn_channels": 256, "max_size": 1333, "train_split": "train2017",
            "val_split": "val2017", "schedule": "1x", "batch_size": 16, "roi_samples": 512,
            "proposals": [2000, 1000], "pcb_weights": "resnet101"}
# SGD is what every published number was trained with. From random weights it needs many epochs to learn to
# tell classes apart; AdamW, whose steps do not shrink with the tiny gradients at the start, needs a few.
ADAMW = {"lr": 0.002, "weight_decay": 0.05}


# ---------------------------------------------------------------------------------------------- arguments

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments with every default filled in."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_argument_group("model")
    model.add_argument("--model", default="fcos", choices=RECIPES)
    model.add_argument("--original", action="store_true",
                       help="FCOS as first published, without the improvements")
    model.add_argument("--fsaf-branch", default="free", choices=("free", "anchor", "both"),
                       help="FSAF's anchor-free branch, RetinaNet's anchor-based one, or both")
    model.add_argument("--fsaf-joint", action="store_const", dest="fsaf_branch", const="both",
                       help="the same as --fsaf-branch both: the paper's joint form")
    model.add_argument("--ignore-scale", type=float,
                       help="FSAF's ignore region over the box: 0.2 (default) or 0.5 (default with both "
                            "branches)")
    model.add_argument("--no-decouple", action="store_false", dest="decouple",
                       help="DeFRCN without its gradient decoupled layers")
    model.add_argument("--cosine", action="store_true", help="DeFRCN with TFA's cosine classifier")
    model.add_argument("--rpn-grad-scale", type=float, default=RPN_GRAD_SCALE,
                       help="DeFRCN: gradient from RPN to backbone (default: 0)")
    model.add_argument("--roi-grad-scale", type=float,
                       help="DeFRCN: gradient from RoI head to backbone (default: 0.75; novel stage: 0.01, "
                            "VOC 0.001)")
    model.add_argument("--roi-samples", type=int,
                       help="RoIs per image in training (default: 512; shapes: 32)")
    model.add_argument("--pool-size", type=int,
                       help="RoIAlign's grid (default: 7, Detectron's Faster R-CNN C4: 14; shapes: 4)")
    model.add_argument("--proposals", type=int, nargs=2, metavar=("TRAIN", "TEST"),
                       help="per image, after NMS (default: 2000 1000; shapes: 200 100)")
    model.add_argument("--backbone", choices=ARCHITECTURES, help="default: resnet50 (shapes: resnet18)")
    model.add_argument("--weights",
                       help="ImageNet weights: none, a file, or a backbone's name for torchvision's "
                            "(default: torchvision's; shapes: none)")
    model.add_argument("--caffe", action="store_true",
                       help="stride on the first 1x1: for Detectron's R-50, R-101")
    model.add_argument("--norm", choices=("frozen", "affine", "batch"),
                       help="batch norm of the backbone: fixed, trained scale, ordinary "
                            "(default: batch from scratch, else frozen for fcos, affine for fsaf)")
    model.add_argument("--freeze-at", type=int,
                       help="stages that do not train (default: 2, defrcn 3; 0 from scratch)")
    model.add_argument("--fpn-channels", type=int, help="default: 256 (shapes: 64)")
    data = parser.add_argument_group("data")
    data.add_argument("--data", default="shapes", help="'shapes' or a folder in COCO or VOC layout")
    data.add_argument("--train-split", help="default: train2017; several joined by +")
    data.add_argument("--val-split", help="default: val2017")
    data.add_argument("--train-json", help="COCO-format file, with --train-images")
    data.add_argument("--train-images", help="folder of its images")
    data.add_argument("--val-json", help="COCO-format file, with --val-images")
    data.add_argument("--val-images", help="folder of its images")
    data.add_argument("--min-size", type=int, nargs="+",
                      help="short side in px; of several one is drawn per image (default: 800; shapes: 128)")
    data.add_argument("--max-size", type=int,
                      help="limit of the long side in px (default: 1333; shapes: 128)")
    data.add_argument("--pad-to", type=int, nargs=2, metavar=("H", "W"), help="one fixed network input size")
    data.add_argument("--drop-empty", action="store_true",
                      help="leave images without objects out of training")
    data.add_argument("--use-difficult", action="store_true", help="train on VOC's difficult objects")
    data.add_argument("--workers", type=int, help="loader processes per rank (default: up to 4)")
    few = parser.add_argument_group("few-shot (--model defrcn or faster_rcnn)")
    few.add_argument("--stage", choices=("base", "novel"),
                     help="train on the base classes, or fine-tune (--init) on K shots of the novel ones")
    few.add_argument("--shots", type=int, help="K, boxes per class of the novel stage")
    few.add_argument("--shot-seed", type=int, help="which list of shots (default: --seed)")
    few.add_argument("--generalized", action="store_true", help="novel stage on K shots of all classes")
    few.add_argument("--novel-classes", metavar="NAME,NAME",
                     type=lambda text: [name.strip() for name in text.split(",")],
                     help="default: COCO's published 20, VOC's 5 of --voc-split, the last two of shapes")
    few.add_argument("--voc-split", type=int, default=1, choices=(1, 2, 3), help="VOC's published splits")
    few.add_argument("--shot-lists", type=Path,
                     help="folder of published lists, or none to sample (default: cocosplit or vocsplit "
                          "beside the data, if there)")
    few.add_argument("--pcb-weights",
                     help="ImageNet ResNet-101 of the calibration: a file, none, or resnet101 for "
                          "torchvision's (default; shapes: none)")
    few.add_argument("--save-init", type=Path, metavar="FILE",
                     help="write what --init becomes for the classes of this stage, and stop")
    optim = parser.add_argument_group("optimisation")
    optim.add_argument("--optimizer", choices=("sgd", "adamw"), help="default: sgd, adamw from scratch")
    optim.add_argument("--batch-size", type=int,
                       help="images per step, all ranks together (default: 16; shapes: 8)")
    optim.add_argument("--micro-batch", type=int,
                       help="images per rank at a time; gradients add up to the batch size "
                            "(default: all at once)")
    optim.add_argument("--lr", type=float,
                       help="for a batch of 16, scaled linearly "
                            "(default: 0.01; defrcn's base stage: 0.02; adamw: 0.002)")
    optim.add_argument("--schedule", choices=SCHEDULES,
                       help="steps and lr drops, for a batch of 16 (default: 1x; shapes: s1x)")
    optim.add_argument("--epochs", type=float,
                       help="length instead of the schedule's; lr drops at the same fractions")
    optim.add_argument("--max-steps", type=int, help="length in steps, likewise")
    optim.add_argument("--warmup-steps", type=int,
                       help="default: 500, defrcn's base stage 1000, or a tenth of the run (shapes: 50)")
    optim.add_argument("--weight-decay", type=float,
                       help="default: 0.0001; defrcn: 0.00005; adamw: 0.05")
    optim.add_argument("--clip", type=float,
                       help="limit of the gradient's L2 norm, 0 = none (default: fcos 35, fsaf 10, defrcn 0)")
    optim.add_argument("--amp", default="off", choices=AMP, help="precision of the network")
    optim.add_argument("--loss-scale", default="dynamic", help="for fp16: dynamic or a number")
    optim.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False,
                       help="torch.compile: a graph for each of a few sizes to which pictures are padded")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", choices=("auto", "cuda", "npu", "cpu"))
    run.add_argument("--out", type=Path, help="default: runs/MODEL, with the form and the stage")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--init", help="start from the weights of this checkpoint; other classes get a new head")
    run.add_argument("--resume", nargs="?", const="last", help="go on from OUT/last.pth or the file given")
    run.add_argument("--log-every", type=int, default=20)
    run.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (last.pth)")
    run.add_argument("--keep", action="store_true", help="keep each checkpoint as step_N.pth as well")
    run.add_argument("--eval-every", type=int, help="steps between evaluations (default: at the end)")
    run.add_argument("--no-eval", action="store_true")
    run.add_argument("--pictures", type=int, default=8, help="evaluation draws the first N images")
    parser.set_defaults(tower_bias=None, torchvision=False)  # only a checkpoint to start from sets these
    args = parser.parse_args(argv)
    if args.resume or args.init:  # what is not given again is what the checkpoint was trained with
        path = args.init
        if args.resume:
            path = args.out or Path("runs") / run_name(args)
            path = path / "last.pth" if args.resume == "last" else Path(args.resume)
            parser.set_defaults(out=path.parent)
        checkpoint = read_checkpoint(path)
        saved = checkpoint["args"]
        if args.resume and "ranks" not in checkpoint:
            raise WeightsError(f"{path}: holds weights but no training to go on with: give it as --init")
        parser.set_defaults(model=saved["model"])
        args = parser.parse_args(argv)
        if args.model != saved["model"]:
            parser.error(f"{path} is a checkpoint of --model {saved['model']}, not {args.model}")
        kept = [key for key in saved if key in MODEL_ARGS or args.resume
                and key not in ("resume", "init", "out")
                and not (key in ("epochs", "max_steps") and (args.epochs or args.max_steps))]
        parser.set_defaults(**{key: saved[key] for key in kept})
        args = parser.parse_args(argv)
        args.resume = path if args.resume else None

    recipe = RECIPES[args.model]
    toy = args.data == "shapes" and not args.train_json
    defaults = {**DEFAULTS, **{key: recipe[key] for key in ("min_size", "warmup_steps", "clip")},
                "pool_size": recipe.get("pool_size"),
                **(SHAPES_DEFAULTS | recipe["shapes"] if toy else {})}
    args.weights = args.weights or (defaults.get("weights") or args.backbone or defaults["backbone"])
    scratch = args.weights == "none" and not args.init
    args.optimizer = args.optimizer or ("adamw" if scratch else "sgd")
    defaults |= {"lr": recipe["lr"], "weight_decay": recipe["weight_decay"], "norm": recipe["norm"],
                 "freeze_at": recipe["freeze_at"], **(NOVEL_STAGE if args.stage == "novel" else {}),
                 **(NOVEL_SHAPES if args.stage == "novel" and toy else {}),
                 **({"norm": "batch", "freeze_at": 0} if scratch else {}),
                 **(ADAMW if args.optimizer == "adamw" else {})}
    if args.max_steps or args.epochs:
        defaults |= {"max_steps": args.max_steps, "epochs": args.epochs}
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.shot_seed = args.seed if args.shot_seed is None else args.shot_seed
    if args.model == "fsaf" and args.ignore_scale is None:
        args.ignore_scale = IGNORE_SCALE_JOINT if args.fsaf_branch == "both" else IGNORE_SCALE
    args.out = args.out or Path("runs") / run_name(args)
    args.workers = min(4, max(1, (os.cpu_count() or 1) - 1)) if args.workers is None else args.workers
    _check(parser, args)
    return args


def run_name(args: argparse.Namespace) -> str:
    """Folder of a run under runs/: the model and its form, the few-shot stage."""
    parts = [args.model, {"anchor": "anchor", "both": "joint"}.get(args.fsaf_branch), args.stage]
    if args.stage == "novel":
        parts += ["all" if args.generalized else None, f"{args.shots}shot", f"seed{args.seed}"]
    return "_".join(filter(None, parts))


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Stops with one line where arguments make no sense, alone or together."""
    if args.train_json and not args.val_json and args.data == "shapes" and not args.no_eval:
        parser.error("give --val-json and --val-images as well, or --no-eval")
    for name in ("seed", "shot_seed", "workers", "clip", "weight_decay", "warmup_steps", "pictures"):
        if not getattr(args, name) >= 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative: {getattr(args, name)}")
    for name in ("batch_size", "max_size", "lr", "save_every", "log_every", "fpn_channels", "micro_batch",
                 "max_steps", "epochs", "eval_every", "shots", "roi_samples", "pool_size"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("min_size", "pad_to", "proposals"):
        if min(getattr(args, name) or [1]) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {min(getattr(args, name))}")
    if args.workers > MAX_WORKERS:
        parser.error(f"--workers must be at most {MAX_WORKERS}, not {args.workers}")
    if args.max_steps and args.epochs:
        parser.error("give --epochs or --max-steps, not both")
    # At 32 a group norm group would be one channel: nothing to normalise on a 1 x 1 level.
    if args.model == "fcos" and args.fpn_channels % 64:
        parser.error(f"--fpn-channels must be a multiple of 64 (32 groups of two or more), "
                     f"not {args.fpn_channels}")
    two_stage = args.model in ("defrcn", "faster_rcnn")
    if not two_stage and (args.stage or args.generalized or args.novel_classes or args.cosine
                          or not args.decouple):
        parser.error("--stage, --generalized, --novel-classes, --cosine and --no-decouple belong to --model "
                     "defrcn or faster_rcnn")
    for name in ("rpn_grad_scale", "roi_grad_scale"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must not be negative: {getattr(args, name)}")
    if (args.stage == "novel") != bool(args.shots):
        parser.error("--stage novel and --shots K belong together")
    if args.stage == "novel" and not (args.init or args.resume):
        parser.error("--stage novel fine-tunes: give the base stage's checkpoint with --init")
    if args.save_init and not args.init:
        parser.error("--save-init writes what --init becomes: give --init as well")
    if args.model == "faster_rcnn":
        args.decouple = False
    if args.model != "fcos" and args.original:
        parser.error("--original is a form of FCOS: give --model fcos")
    if args.model != "fsaf" and (args.fsaf_branch != "free" or args.ignore_scale is not None):
        parser.error("--fsaf-joint, --fsaf-branch and --ignore-scale belong to --model fsaf")
    if args.fsaf_branch == "anchor" and args.ignore_scale != IGNORE_SCALE:
        parser.error("--ignore-scale belongs to the anchor-free branch: --fsaf-branch anchor has none")
    if args.ignore_scale is not None and not EFFECTIVE_SCALE <= args.ignore_scale <= 1:
        parser.error(f"--ignore-scale must be {EFFECTIVE_SCALE} (no ring) to 1, not {args.ignore_scale}")
    if not 0 <= args.freeze_at <= 5:
        parser.error(f"--freeze-at must be 0..5 (stem and four stages), not {args.freeze_at}")
    if args.loss_scale != "dynamic" and not _is_positive(args.loss_scale):
        parser.error(f"--loss-scale is 'dynamic' or a positive number, not {args.loss_scale}")


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


# ---------------------------------------------------------------------------------------------- optimisation

def learning_rate(step: int, base_lr: float, drops: list[int], warmup_steps: int, warmup_factor: float,
                  constant_warmup: bool) -> float:
    """Rate of a step (0-based): warm-up from warmup_factor, linear or constant, then a tenth after each drop.

    A function of the step alone, so that a resumed run continues it by construction.
    """
    rate = base_lr * 0.1 ** sum(step >= drop for drop in drops)
    if step >= warmup_steps:
        return rate
    return rate * (warmup_factor if constant_warmup else 1 - (1 - step / warmup_steps) * (1 - warmup_factor))


def parameter_groups(model: torch.nn.Module, weight_decay: float, bias_lr: float,
                     bias_decay: float) -> list[dict]:
    """Optimizer groups: biases of layers learn and decay at bias_lr and bias_decay times what the rest does.

    As in mmdetection 2.x the weight and bias of a norm layer are not such biases: both decay.
    """
    of_layers = {f"{name}.bias" for name, module in model.named_modules()
                 if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, Affine))}
    plain, biases = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if name in of_layers else plain).append(parameter)
    return [{"params": plain, "weight_decay": weight_decay, "lr_factor": 1.0},
            {"params": biases, "weight_decay": weight_decay * bias_decay, "lr_factor": bias_lr}]


class LossScaler:
    """Loss scaling for float16: the scale is halved where gradients overflow, and such a step left out; it is
    doubled after SCALE_GROWTH_STEPS others in a row. A setting other than "dynamic" is a fixed scale.

    torch.amp.GradScaler does the same in float64 on the device, which an NPU does not have, and waits for the
    device once more per step; here the scale is a number on the host.
    """

    def __init__(self, setting: str, enabled: bool):
        self.enabled, self.dynamic, self.good_steps = enabled, enabled and setting == "dynamic", 0
        self.scale = 1.0 if not enabled else 2.0 ** 16 if self.dynamic else float(setting)

    def unscale(self, model: torch.nn.Module):
        if self.enabled:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / self.scale)

    def update(self, overflow: bool):
        if self.dynamic:
            self.good_steps = 0 if overflow else self.good_steps + 1
            self.scale *= 0.5 if overflow else 2.0 if self.good_steps % SCALE_GROWTH_STEPS == 0 else 1.0

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict):
        if self.dynamic and state:
            self.scale, self.good_steps = state["scale"], state.get("good_steps", 0)


# ---------------------------------------------------------------------------------------------- checkpoints

def rank_states(device: torch.device, world: int, loss_sums: dict, logged: int) -> list[dict]:
    """What every rank needs besides the checkpoint to go on exactly: random numbers, drawn on the host and on
    the device, and the losses since the last log line."""
    state = {"rng": {"cpu": torch.get_rng_state()}, "logged": logged,
             "loss_sums": {name: value.cpu() for name, value in loss_sums.items()}}
    if device.type != "cpu":
        state["rng"][device.type] = torch.get_device_module(device).get_rng_state(device)
    if world == 1:
        return [state]
    states = [None] * world
    dist.all_gather_object(states, state)
    return states


def refuse_second_writer(log_file, out: Path):
    """Stops if another run has this log open: both would write the same checkpoint. The lock ends with its
    process, however that ends."""
    if log_file is None:  # of rank 0 alone
        return
    try:
        fcntl.flock(log_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"--out {out}: another run is writing there; choose another folder") from None
    except OSError:  # a file system without locks
        pass


def trim_log(path: Path, step: int):
    """Takes the rows after `step` out of a log.jsonl, and a last one that was cut off in writing: the resumed
    run writes them again."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                rows.append(line)
        except ValueError:
            continue
    with whole_file(path) as file:
        file.writelines(rows)


# ---------------------------------------------------------------------------------------------- main

def environment(device: torch.device, world: int) -> str:
    """One line: versions, device, commit."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                             capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    return (f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"{device.type} ({device_name(device)}), {world} rank(s), commit {commit}")


def device_name(device: torch.device) -> str:
    """The accelerator, or the processor and its threads."""
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return torch.get_device_module(device).get_device_name(device)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: of the device, or resident on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if platform.system() == "Darwin" else 1024) / 1e9
    return torch.get_device_module(device).max_memory_allocated() / 1e9


def main():
    args = parse_args()
    device, rank, world = setup_device(args.device, args.amp)
    say = print if rank == 0 else lambda *_: None
    say(environment(device, world))
    make_folder(args.out)
    if args.save_init:
        make_folder(args.save_init.parent)

    # ---- batch
    if args.batch_size % world:
        raise SystemExit(f"error: --batch-size {args.batch_size} is not divisible by {world} ranks")
    micro_batch = args.micro_batch or args.batch_size // world
    if args.batch_size % (world * micro_batch):
        raise SystemExit(f"error: --batch-size {args.batch_size} is not {world} ranks x a multiple of "
                         f"--micro-batch {micro_batch}")
    accumulate = args.batch_size // (world * micro_batch)
    if args.compile and device.type == "npu":
        raise SystemExit("error: --compile is for GPUs and CPUs, not for an NPU")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise SystemExit("error: --compile needs a C++ compiler, and there is no c++, g++ or clang++")

    # ---- data
    train_set = open_dataset(args.data, args.train_split, args.train_json, args.train_images)
    val_set = None
    if not args.no_eval:
        val_set = open_dataset(args.data, args.val_split, args.val_json, args.val_images, train_set.names)
    if args.stage:
        args.novel_classes = novel_names(train_set, args.voc_split, args.novel_classes)
        if args.stage == "novel" and args.init:
            base = read_checkpoint(args.init)
            seen = set(args.novel_classes) & set(base["names"])
            if seen and base["args"].get("stage") == "base":
                raise DataError(f"{args.init} was trained on {', '.join(sorted(seen))} as base classes: they "
                                f"cannot be novel (its own: {', '.join(base['args']['novel_classes'])})")
        learned = {"base": [name for name in train_set.names if name not in args.novel_classes],
                   "novel": train_set.names if args.generalized else args.novel_classes}[args.stage]
        say(f"{args.stage} stage: {', '.join(learned)} (novel classes: {', '.join(args.novel_classes)})")
        val_set = val_set and keep_classes(val_set, learned, drop_empty=False)
        if args.stage == "novel" and args.model == "defrcn" and args.pcb_weights != "none":
            try:
                CalibrationNet(args.pcb_weights)  # now, and not after the training
            except WeightsError as error:
                if args.pcb_weights != "resnet101":  # a file that was asked for
                    raise
                say(f"no prototypical calibration, scores will stay plain (--pcb-weights FILE): {error}")
                args.pcb_weights = "none"
        args.use_difficult = args.use_difficult or train_set.voc  # as published
        if args.roi_grad_scale is None:
            args.roi_grad_scale = (ROI_GRAD_SCALE_BASE if args.stage == "base" else
                                   ROI_GRAD_SCALE_VOC if train_set.voc else ROI_GRAD_SCALE_NOVEL)
        all_classes = train_set
        if args.stage == "base":
            train_set = keep_classes(train_set, learned, drop_empty=True)
        else:
            train_set = shot_view(train_set, learned, args.shots, args.shot_seed,
                                  lists_folder(vars(args), train_set.voc), args.out if rank == 0 else None)
    for line in (*train_set.notes, train_set.table(), *(val_set.notes if val_set else ())):
        say(line)
    if args.pad_to:
        for dataset in filter(None, (train_set, val_set)):
            check_pad_to(dataset, args.min_size, args.max_size, args.pad_to)
    filled = train_set.non_empty(args.use_difficult)
    indices = filled if args.drop_empty else np.arange(len(train_set))
    say(f"{len(indices)} training images, {len(train_set) - len(filled)} of {len(train_set)} have no object "
        f"to learn ({'dropped' if args.drop_empty else 'kept: --drop-empty leaves them out'})")
    if len(filled) == 0:
        raise DataError("there is no object to learn in the training data")

    # ---- schedule
    batches = StepBatches(train_set, indices, args.batch_size, args.seed, rank, world, accumulate)
    schedule_steps, schedule_drops = (schedule(train_set.voc, args.shots, args.generalized) if args.stage
                                      else SCHEDULES[args.schedule])
    max_steps = (args.max_steps or (math.ceil(args.epochs * batches.steps_per_epoch) if args.epochs else
                                    round(schedule_steps * REFERENCE_BATCH / args.batch_size)))
    drops = [round(max_steps * drop / schedule_steps) for drop in schedule_drops]
    warmup_steps = min(args.warmup_steps, max_steps // 10)
    base_lr = args.lr * args.batch_size / REFERENCE_BATCH
    say(f"lr {base_lr:g} = {args.lr:g} x {args.batch_size}/{REFERENCE_BATCH}, warm-up {warmup_steps} steps, "
        f"a tenth from steps {drops}; {max_steps} steps = {max_steps / batches.steps_per_epoch:.1f} epochs "
        f"of {batches.steps_per_epoch}")
    say(f"batch {args.batch_size} = {world} rank(s) x {accumulate} micro-batch(es) x {micro_batch} images"
        + (", each micro-batch normalised by its own number of positives" if accumulate > 1 else ""))

    # ---- model
    torch.manual_seed(args.seed)
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    model = build_model(settings, len(train_set.names))
    if args.init:
        load_init(model, args.init, train_set.names, say)
    elif args.weights != "none" and not args.resume:
        pixels = load_imagenet(model.backbone, args.weights)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in pixels)
        if not torch.allclose(std, model.pixel_std):  # recipes differ in the mean, but the std is the file's
            model.pixel_mean.copy_(mean)
            model.pixel_std.copy_(std)
    if args.save_init:
        if rank == 0:
            save_checkpoint(args.save_init, {
                "model": model.state_dict(), "step": 0, "args": settings, "names": train_set.names,
                "category_ids": train_set.category_ids})
            say(f"{args.init} for {len(train_set.names)} classes is {args.save_init}")
        return
    model.to(device, memory_format=memory_format(device))
    recipe = RECIPES[args.model]
    groups = parameter_groups(model, args.weight_decay, recipe["bias_lr"], recipe["bias_decay"])
    optimizer = (torch.optim.SGD(groups, lr=base_lr, momentum=MOMENTUM) if args.optimizer == "sgd" else
                 torch.optim.AdamW(groups, lr=base_lr))
    scaler = LossScaler(args.loss_scale, enabled=args.amp == "fp16")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters, {trained:,} of them train")

    # ---- resume
    start, logged, loss_sums = 0, 0, {}
    size = [len(train_set), len(train_set.boxes)]
    torch.manual_seed(args.seed + rank)
    if args.resume:
        path = args.resume
        checkpoint = read_checkpoint(path)
        for key in (*MODEL_ARGS, "optimizer", "norm", "freeze_at", "stage", "shots", "generalized"):
            if key in checkpoint["args"] and settings[key] != checkpoint["args"][key]:
                raise WeightsError(f"{path}: was trained with {key} {checkpoint['args'][key]}, not "
                                   f"{settings[key]}: a resumed run cannot change that")
        if checkpoint["names"] != train_set.names:
            raise WeightsError(f"{path}: was trained on the classes {checkpoint['names']}, the data has "
                               f"{train_set.names}; use --init to fine-tune on other classes")
        for key, value in settings.items():
            if value != checkpoint["args"].get(key) and key not in ("resume", "out", "init", "workers"):
                say(f"resume changes {key}: {checkpoint['args'].get(key)} -> {value}")
        try:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{path}: cannot resume, it holds another model "
                               f"({str(error)[:200]})") from error
        scaler.load_state_dict(checkpoint["scaler"])
        start = checkpoint["step"]
        logged = start
        if size != checkpoint["data"]:
            say(f"resume changes the data: {checkpoint['data'][0]} images, {checkpoint['data'][1]} boxes -> "
                f"{size[0]}, {size[1]}")
        if len(checkpoint["ranks"]) != world:
            say(f"resume changes the number of ranks: {len(checkpoint['ranks'])} -> {world} (a step sees the "
                f"same images; random numbers of dropout and sampling start afresh)")
        else:
            mine = checkpoint["ranks"][rank]
            torch.set_rng_state(mine["rng"]["cpu"])
            if device.type in mine["rng"] and device.type != "cpu":
                torch.get_device_module(device).set_rng_state(mine["rng"][device.type], device)
            logged = mine["logged"]
            loss_sums = {name: value.to(device) for name, value in mine["loss_sums"].items()}
        if rank == 0 and path.parent == args.out:
            trim_log(args.out / "log.jsonl", start)
        say(f"resumed {path} at step {start}")
        if start >= max_steps:
            raise SystemExit(f"error: {path} is at step {start}, the run ends at {max_steps}: nothing left "
                             f"to train (evaluate.py scores it)")

    elif rank == 0:  # a new run in an old folder keeps what is there
        for name in ("last.pth", "log.jsonl"):
            if (args.out / name).exists():
                number = next(n for n in range(1, 10 ** 6) if not (args.out / f"earlier{n}_{name}").exists())
                os.replace(args.out / name, args.out / f"earlier{number}_{name}")
                say(f"{args.out / name} of an earlier run is now earlier{number}_{name}")

    def save(step: int):
        states = rank_states(device, world, loss_sums, logged)
        if rank > 0:
            return
        content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                   "scaler": scaler.state_dict(), "step": step, "ranks": states, "args": settings,
                   "names": train_set.names, "category_ids": train_set.category_ids, "data": size}
        save_checkpoint(args.out / "last.pth", content)
        if args.keep:
            save_checkpoint(args.out / f"step_{step}.pth", content)

    # ---- loop
    # A signal only leaves a note: the step ends first, then all ranks save and stop together.
    # Set before the loader forks its workers: Ctrl-C must not kill them under a running step.
    interrupted = []
    defaults = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in defaults:
        signal.signal(number, lambda number, _: interrupted.append(number))
    shapes = [args.pad_to] if args.pad_to else None
    if args.compile:
        shapes = shapes or shape_buckets(train_set, max(args.min_size), args.max_size)
        say(f"compiled for the sizes {', '.join(f'{height} x {width}' for height, width in shapes)}")
        model.compile(dynamic=False)
    ddp = model if world == 1 else DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device.index])
    batches.start, batches.stop = start, max_steps
    loader = iter(DataLoader(
        TrainSamples(train_set, args.min_size, args.max_size, True, args.use_difficult, args.seed),
        batch_sampler=batches, num_workers=args.workers, pin_memory=device.type != "cpu",
        collate_fn=partial(collate, divisor=model.divisor, shapes=shapes,
                           min_objects=train_set.most_objects() if shapes else 1)))
    model.train()
    data_seconds, window = 0.0, time.perf_counter()
    log_file = open(args.out / "log.jsonl", "a") if rank == 0 else None
    refuse_second_writer(log_file, args.out)
    for step in range(start, max_steps):
        lr = learning_rate(step, base_lr, drops, warmup_steps, recipe["warmup_factor"],
                           constant_warmup=args.original)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        image_ids = []
        for micro in range(accumulate):
            waited = time.perf_counter()
            batch = next(loader)
            data_seconds += time.perf_counter() - waited
            image_ids += batch["image_ids"]
            images, sizes, gt_boxes, gt_labels = (batch[key].to(device, non_blocking=True) for key in
                                                  ("images", "sizes", "gt_boxes", "gt_labels"))
            images = images.contiguous(memory_format=memory_format(device))
            last = micro == accumulate - 1
            with nullcontext() if world == 1 or last else ddp.no_sync():  # ranks meet once a step
                with autocast(device, AMP[args.amp]):
                    losses = ddp(images, sizes, gt_boxes, gt_labels)
                (sum(losses.values()) / accumulate * scaler.scale).backward()
            for name, value in losses.items():
                loss_sums[name] = loss_sums.get(name, 0) + value.detach() / accumulate

        scaler.unscale(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or math.inf)
        # All ranks learn in one reduction whether one of them has to stop. Infinite gradients are ordinary
        # only under fp16 loss scaling, which skips such a step.
        overflow = ~torch.isfinite(norm)
        finite = torch.isfinite(sum(loss_sums.values())) & (~overflow | scaler.enabled)
        stop = torch.stack((~finite, torch.tensor(bool(interrupted), device=device), overflow)).float()
        if world > 1:
            dist.all_reduce(stop, op=dist.ReduceOp.MAX)
        not_finite, stopping, overflow = stop.tolist()
        if not_finite:
            if not finite:
                print(f"rank {rank}, step {step}: losses {({k: v.item() for k, v in losses.items()})}, "
                      f"gradient norm {norm.item()}, images {image_ids}", flush=True)
            raise SystemExit(f"error: loss or gradient is not finite at step {step}; the last "
                             f"checkpoint is kept. Lower --lr, lengthen --warmup-steps or lower --clip"
                             if rank == 0 else 1)
        if not overflow:
            optimizer.step()
        scaler.update(bool(overflow))
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        if done % args.log_every == 0 or done == max_steps:
            steps = done - logged
            names = list(loss_sums)
            means = torch.stack([loss_sums[name] for name in names]) / steps
            if world > 1:
                dist.all_reduce(means)
            means = dict(zip(names, (means / world).tolist()))
            seconds, timed = time.perf_counter() - window, done - max(logged, start)
            row = {"step": done, "epoch": round(done / batches.steps_per_epoch, 3),
                   "loss": sum(means.values()), **means, "lr": lr,
                   "data_s": data_seconds / timed, "step_s": seconds / timed,
                   "images_per_s": timed * args.batch_size / seconds, "memory_gb": peak_memory(device),
                   "eta_s": (max_steps - done) * seconds / timed}
            if args.compile:
                row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            say(f"step {done}/{max_steps}  epoch {row['epoch']:.2f}  "
                + "  ".join(f"{name} {row[name]:.4f}" for name in ("loss", *names))
                + f"  lr {lr:.5f}  data {row['data_s']:.3f} s  step {row['step_s']:.3f} s  "
                  f"{row['images_per_s']:.1f} images/s  {row['memory_gb']:.2f} GB  "
                  f"ETA {int(row['eta_s']) // 60}:{int(row['eta_s']) % 60:02}"
                + (f"  {row['graphs']} graphs" if args.compile else ""))
            if rank == 0:
                print(json.dumps(row), file=log_file, flush=True)
            loss_sums, data_seconds, window, logged = {}, 0.0, time.perf_counter(), done
        if done % args.save_every == 0 or done == max_steps or stopping:
            save(done)
        if stopping and done < max_steps:
            say(f"interrupted: saved {args.out / 'last.pth'} at step {done}; go on with --resume")
            return
        if val_set and (done == max_steps or args.eval_every and done % args.eval_every == 0):
            few_shot = {} if not args.stage else {
                "few_shot": describe_few_shot(settings), "calibration": make_calibration(
                    settings, args.pcb_weights, train_set.names, device, all_classes)}
            for number, handler in defaults.items():  # nothing is lost if an evaluation is cut off
                noting = signal.signal(number, handler)
            try:
                evaluate(model, val_set, device, args.out, max(args.min_size), args.max_size,
                         workers=args.workers, amp=AMP[args.amp], rank=rank, world=world, pad_to=args.pad_to,
                         pictures=args.pictures, **few_shot)
            except KeyboardInterrupt:
                raise SystemExit(f"interrupted while scoring step {done}; evaluate.py --ckpt "
                                 f"{args.out / 'last.pth'} does it again") from None
            for number in defaults:
                signal.signal(number, noting)
            window = time.perf_counter()


if __name__ == "__main__":
    run_script(main)

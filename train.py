"""Train a detector.

    python train.py --model fcos                              built-in shapes, minutes on a laptop CPU
    python train.py --model fsaf --fsaf-joint                 FSAF and RetinaNet's branch together
    python train.py --model defrcn --stage base               few-shot: first the base classes, then
    python train.py --model defrcn --stage novel --shots 10 --init runs/defrcn_base/last.pth
    python train.py --data coco --micro-batch 4               COCO on one GPU: 16 images a step, 4 at a time
    torchrun --nproc_per_node 8 train.py --data coco          COCO on 8 GPUs, 2 images each
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:29500 train.py --data coco
    python train.py --data my_data --epochs 30 --init runs/fcos/last.pth --out runs/mine
    python train.py --resume runs/mine/last.pth
    python train.py --data coco --show-recipe                 every value that would be used, and its source

The file reads from top to bottom: schedule, optimizer, data and model, then main() with the loop. Arguments
and published recipes are in recipes.py, what a checkpoint saves and restores in resume.py.
"""
import runtime  # before torch: see the first lines of runtime.py

# isort: split
import argparse
import math
import os
import shutil
import time
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

import fewshot
from checkpoint import build_model, load_init
from data import (
    WINDOW,
    DataError,
    DetectionDataset,
    TrainBatchSampler,
    TrainSamples,
    broken_images,
    check_pad_to,
    collate,
    death_of_a_loader,
    ignore_signals,
    shape_buckets,
)
from defrcn import Affine, train_only
from evaluate import EvalSettings, evaluate
from ops import HUGE
from recipes import REFERENCE_BATCH, VERIFY_BELOW, parse_args
from resume import TrainingState, restore_rng, restore_training, save_best, save_training
from runlog import Progress, RunLog, environment, lock_folder
from runtime import AMP, Place, UserError, gather_objects, print0
from shapes import open_dataset
from weights import load_imagenet

MOMENTUM = 0.9
SCALE_GROWTH_STEPS = 2000  # as torch.amp.GradScaler
SATURATING_SCALE = "32"  # --loss-scale on an NPU without infinity: that of the Ascend port of FCOS


# ---------------------------------------------------------------------------------------------- schedule

class Schedule(NamedTuple):
    """Length and learning rate of a run."""
    max_steps: int
    base_lr: float
    drops: list[int]  # steps from which the lr is a tenth of the lr before
    warmup_steps: int
    warmup_factor: float  # lr of the first step over base_lr
    constant_warmup: bool


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Schedule:
    """The published schedule, scaled to the batch size. --epochs or --max-steps set another length."""
    max_steps = (args.max_steps or (math.ceil(args.epochs * steps_per_epoch) if args.epochs else
                                    round(args.schedule_steps * REFERENCE_BATCH / args.batch_size)))
    drops = [round(max_steps * drop / args.schedule_steps) for drop in args.schedule_drops]
    base_lr = args.lr * args.batch_size / REFERENCE_BATCH
    schedule = Schedule(max_steps, base_lr, drops, min(args.warmup_steps, max_steps // 10),
                        args.warmup_factor, constant_warmup=args.original)
    print0(f"lr {base_lr:g} = {args.lr:g} x {args.batch_size}/{REFERENCE_BATCH}, warm-up "
           f"{schedule.warmup_steps} steps, a tenth from steps {drops}; {max_steps} steps = "
           f"{max_steps / steps_per_epoch:.1f} epochs of {steps_per_epoch}")
    return schedule


def learning_rate(step: int, schedule: Schedule) -> float:
    """Learning rate of a step (0-based): warm-up, linear or constant, then a tenth after each drop.

    It depends on the step and the arguments alone, so a resumed run has the same lr.
    """
    rate = schedule.base_lr * 0.1 ** sum(step >= drop for drop in schedule.drops)
    if step >= schedule.warmup_steps:
        return rate
    if schedule.constant_warmup:
        return rate * schedule.warmup_factor
    return rate * (1 - (1 - step / schedule.warmup_steps) * (1 - schedule.warmup_factor))


def micro_batches_per_step(args: argparse.Namespace, world: int) -> int:
    """Number of micro-batches per rank and step. Raises UserError if the batch does not divide evenly."""
    if args.batch_size % world:
        raise UserError(f"--batch-size {args.batch_size} is not divisible by {world} ranks")
    micro_batch = args.micro_batch or args.batch_size // world
    if args.batch_size % (world * micro_batch):
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of {world} ranks x "
                        f"--micro-batch {micro_batch}")
    accumulate = args.batch_size // (world * micro_batch)
    print0(f"batch {args.batch_size} = {world} rank(s) x {accumulate} micro-batch(es) x {micro_batch} images"
           + (", each micro-batch normalised by its own number of positives" if accumulate > 1 else ""))
    return accumulate


# ---------------------------------------------------------------------------------------------- optimizer

def parameter_groups(model: torch.nn.Module, weight_decay: float, bias_lr: float,
                     bias_decay: float) -> list[dict]:
    """Two optimizer groups: the biases of convolutions and linear layers, and all others that train.

    The lr and the decay of the biases are bias_lr and bias_decay times those of the rest. As in mmdetection
    2.x, the weight and bias of a norm layer belong to the rest.
    """
    layer_biases = {f"{name}.bias" for name, module in model.named_modules()
                 if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear, Affine))}
    rest, biases = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (biases if name in layer_biases else rest).append(parameter)
    return [{"params": rest, "weight_decay": weight_decay, "lr_factor": 1.0},
            {"params": biases, "weight_decay": weight_decay * bias_decay, "lr_factor": bias_lr}]


def make_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, args.weight_decay, args.bias_lr, args.bias_decay)
    if args.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=args.lr, momentum=MOMENTUM)
    return torch.optim.AdamW(groups, lr=args.lr)


class LossScaler:
    """Loss scaling for float16.

    If gradients overflow, the step is skipped and the scale is halved. After SCALE_GROWTH_STEPS good steps in
    a row the scale is doubled. A setting other than "dynamic" is a fixed scale.
    saturates: the device has no infinity, so no gradient shows that a scale is too large. The scale is fixed
    there, and the overflow flag of the device decides whether a step is skipped.
    """

    # torch.amp.GradScaler computes in float64 on the device, which an NPU does not have. It also waits for
    # the device once more per step. Here the scale is a number on the host.

    def __init__(self, setting: str, enabled: bool, saturates: bool = False):
        if enabled and saturates and setting == "dynamic":
            print0(f"this NPU has no infinity: the loss scale is fixed, {SATURATING_SCALE}")
            setting = SATURATING_SCALE
        self.enabled, self.dynamic, self.good_steps = enabled, enabled and setting == "dynamic", 0
        self.has_flag = enabled and saturates
        self.scale = 1.0 if not enabled else 2.0 ** 16 if self.dynamic else float(setting)

    def unscale(self, model: torch.nn.Module):
        if self.enabled:
            torch._foreach_mul_([p.grad for p in model.parameters() if p.grad is not None], 1 / self.scale)

    def overflow_flag(self) -> bool:
        """Whether the device says that an operation of this step overflowed."""
        return self.has_flag and runtime.take_overflow_flag()

    def update(self, overflow: bool):
        if self.dynamic:
            self.good_steps = 0 if overflow else self.good_steps + 1
            self.scale *= 0.5 if overflow else 2.0 if self.good_steps % SCALE_GROWTH_STEPS == 0 else 1.0

    def state_dict(self) -> dict:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state_dict(self, state: dict):
        if self.dynamic and state:
            self.scale, self.good_steps = state["scale"], state.get("good_steps", 0)


# --------------------------------------------------------------------------------------------- data and model

def training_indices(args: argparse.Namespace, train_set: DetectionDataset,
                     val_set: DetectionDataset | None, place: Place) -> np.ndarray:
    """Prints the notes and the class table; returns the indices of the training images. Raises DataError."""
    for line in (*train_set.notes, train_set.table(), *(val_set.notes if val_set else ())):
        print0(line)
    if args.pad_to:
        for dataset in filter(None, (train_set, val_set)):
            check_pad_to(dataset, args.min_size, args.max_size, args.pad_to)
    filled = train_set.non_empty(args.use_difficult)
    indices = filled if args.drop_empty else np.arange(len(train_set))
    indices = np.setdiff1d(indices, verified_broken(args, train_set, val_set, place))
    print0(f"{len(indices)} training images, {len(train_set) - len(filled)} of {len(train_set)} have no "
           f"object to learn ({'dropped' if args.drop_empty else 'kept: --drop-empty leaves them out'})")
    if len(np.intersect1d(filled, indices)) == 0:
        raise DataError("there is no object to learn in the training data")
    return indices


def verified_broken(args: argparse.Namespace, train_set: DetectionDataset,
                    val_set: DetectionDataset | None, place: Place) -> list[int]:
    """Decodes all images, if wanted; returns the indices of the broken training images.

    The ranks share the work, and every rank returns all. Raises DataError if there are more than
    --skip-broken, or if an image to be scored is broken.
    """
    on_disk = args.data != "shapes" or args.train_json
    datasets = [dataset for dataset in (train_set, val_set) if dataset and on_disk
                and (len(dataset) < VERIFY_BELOW if args.verify_images is None else args.verify_images)]
    broken = []
    for dataset in datasets:
        parts = gather_objects(broken_images(dataset, place.rank, place.world, Progress), place.world)
        broken.append({index: message for part in parts for index, message in part.items()})
    for dataset, messages in zip(datasets, broken):
        for message in messages.values():
            print0(f"broken: {message}")
        if len(messages) > (args.skip_broken if dataset is train_set else 0):
            advice = f" or train without, --skip-broken {len(messages)}" if dataset is train_set else ""
            raise DataError(f"{min(messages.values())}; {len(messages)} images of {len(dataset)} are broken, "
                            f"see above: mend them{advice}")
    return list(broken[0]) if datasets and datasets[0] is train_set else []


def input_shapes(args: argparse.Namespace, train_set: DetectionDataset,
                 device: torch.device) -> list[tuple[int, int]] | None:
    """Sizes to which batches are padded (--pad-to, --compile). None: the size follows the batch."""
    if args.compile and device.type == "npu":
        raise UserError("--compile is for GPUs and CPUs, not for an NPU")
    if args.compile and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise UserError("--compile needs a C++ compiler, and there is no c++, g++ or clang++")
    shapes = [args.pad_to] if args.pad_to else None
    if args.compile:
        shapes = shapes or shape_buckets(train_set, max(args.min_size), args.max_size)
        print0(f"compiled for the sizes {', '.join(f'{height} x {width}' for height, width in shapes)}")
    return shapes


def make_model(args: argparse.Namespace, checkpoint: dict | None, names: list[str]) -> torch.nn.Module:
    """The model with its first weights: those of --init, of ImageNet, or random ones."""
    model = build_model(vars(args), len(names))
    if args.init and not args.resume:
        load_init(model, checkpoint, names)
    elif args.weights != "none" and not args.resume:
        pixels = load_imagenet(model.backbone, args.weights)
        mean, std = (torch.tensor(value).view(3, 1, 1) for value in pixels)
        # Recipes use different means with one file. Only another std shows that it needs its own values.
        if not torch.allclose(std, model.pixel_std):
            model.pixel_mean.copy_(mean)
            model.pixel_std.copy_(std)
    if args.train_only:
        train_only(model, args.train_only)
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or every)
                      for every in (True, False))
    form = (" with FPN" if args.fpn else " on C4") if args.model == "faster_rcnn" else ""
    print0(f"{args.model}{form}: {total:,} parameters, {trained:,} of them train")
    return model


# ---------------------------------------------------------------------------------------------- main

def any_rank(flags: list[torch.Tensor], world: int) -> list[bool]:
    """Which flags, () bool each, are set on any rank. A step waits here, and in the NMS of proposals."""
    flags = torch.stack(flags).float()
    if world > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return [flag > 0 for flag in flags.tolist()]


def fail_broken(step: int, state: TrainingState, args: argparse.Namespace, train_set: DetectionDataset,
                place: Place):
    """Saves the last finished step and ends all ranks; one with too many broken images names one of them."""
    state.log.loss_sums = state.log.sums_before  # without the step that is given up
    save_training(step, state, args, train_set, place)
    if len(state.log.broken) <= args.skip_broken:
        time.sleep(2)  # torchrun stops all ranks when one ends: the one with the reason comes first
        raise SystemExit(1)
    last, count = args.out / "last.pth", len(state.log.broken)
    raise SystemExit(f"error: {min(state.log.broken)}; step {step} is saved: mend the image, or add "
                     f"--skip-broken {count}, and go on with --resume {last}")


def fail_nonfinite(step: int, losses: dict, norm: torch.Tensor, image_ids: list, place: Place):
    """Ends all ranks; a rank with a value that is not finite prints what it saw."""
    if not all(value.isfinite() for value in (*losses.values(), norm)):
        print(f"rank {place.rank}, step {step}: losses {({k: v.item() for k, v in losses.items()})}, "
              f"gradient norm {norm.item()}, images {image_ids}", flush=True)
    raise SystemExit(f"error: loss or gradient is not finite at step {step}; the last checkpoint is kept. "
                     f"Lower --lr, lengthen --warmup-steps or lower --clip" if place.rank == 0 else 1)


# Ranks exchange: the normalisers in every micro-batch (`ops.mean_over_ranks`); the gradients (DDP) and four
# flags (`any_rank`) in every step, with --norm batch also rank 0's statistics (DDP); mean losses for a log
# line; random states and loss sums for a checkpoint.
def main():
    runtime.copy_prints(None)  # log.txt starts with what is printed from here on
    args, checkpoint = parse_args()
    place = runtime.setup_device(args.device, args.amp)
    device, rank, world = place
    print0(environment(place))
    runtime.make_folder(args.out)
    lock_folder(args.out, place)
    accumulate = micro_batches_per_step(args, world)

    # ---- data
    train_set = open_dataset(args.data, args.train_split, args.train_json, args.train_images)
    val_set, scoring = None, {}
    if not args.no_eval:
        val_set = open_dataset(args.data, args.val_split, args.val_json, args.val_images, train_set.names)
    if args.stage:
        train_set, val_set, scoring = fewshot.prepare(args, checkpoint, train_set, val_set, place)
    indices = training_indices(args, train_set, val_set, place)
    sampler = TrainBatchSampler(train_set, indices, args.batch_size, args.seed, rank, world, accumulate,
                                window=1 if args.stage == "novel" else WINDOW)
    schedule = make_schedule(args, sampler.steps_per_epoch)
    shapes = input_shapes(args, train_set, device)

    # ---- model, optimizer, resume
    torch.manual_seed(args.seed)  # the same weights on all ranks
    layout = runtime.memory_format(device)
    model = make_model(args, checkpoint, train_set.names).to(device, memory_format=layout)
    optimizer, scaler = make_optimizer(args, model), LossScaler(
        args.loss_scale, enabled=args.amp == "fp16", saturates=runtime.saturates(device))
    torch.manual_seed(args.seed + rank)  # other dropout and samples on every rank
    start = checkpoint["step"] if args.resume else 0
    if start >= schedule.max_steps:
        raise UserError(f"{args.resume} is at step {start}, the run ends at {schedule.max_steps}: no "
                        f"step is left to train (evaluate.py scores it)")
    log = RunLog(args, start, place)
    state = TrainingState(model, optimizer, scaler, log)
    if args.resume:
        restore_training(checkpoint, state, args, train_set, place)
    log.open()  # after all checks: a run that is refused leaves the files of an earlier one as they are

    # ---- loader
    # Before the loader forks: Ctrl-C must not kill its processes during a step.
    interrupts = runtime.Interrupts()
    if args.compile:
        model.compile(dynamic=False)
    ddp = model if world == 1 else DistributedDataParallel(
        model, device_ids=None if device.type == "cpu" else [device.index])
    ddp.broadcast_buffers = args.norm == "batch"  # other buffers are constant
    sampler.start, sampler.stop = start, schedule.max_steps
    samples = TrainSamples(train_set, args.min_size, args.max_size, True, args.use_difficult, args.seed,
                           tuple(args.augment))
    make_batch = partial(collate, size_divisor=model.size_divisor, shapes=shapes,
                         min_objects=train_set.max_objects() if shapes else 1)
    loader = iter(DataLoader(samples, batch_sampler=sampler, num_workers=args.workers, collate_fn=make_batch,
                             worker_init_fn=ignore_signals, pin_memory=device.type != "cpu"))
    if args.resume:
        restore_rng(checkpoint, place)  # after the loader, which draws a random number when it starts

    # ---- loop
    model.train()
    for step in range(start, schedule.max_steps):
        lr = learning_rate(step, schedule)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        image_ids, log.sums_before = [], dict(log.loss_sums)
        for micro in range(accumulate):
            waited = time.perf_counter()
            batch = next(loader)
            log.data_seconds += time.perf_counter() - waited
            image_ids += batch["image_ids"]
            log.broken |= set(batch["broken"])
            if world == 1 and len(log.broken) > args.skip_broken:  # several ranks first finish the step
                fail_broken(step, state, args, train_set, place)
            images, sizes, gt_boxes, gt_labels = (batch[key].to(device, non_blocking=True) for key in
                                                  ("images", "sizes", "gt_boxes", "gt_labels"))
            images = images.contiguous(memory_format=layout)
            last_micro = micro == accumulate - 1
            # Gradients are reduced once a step.
            with nullcontext() if world == 1 or last_micro else ddp.no_sync():
                with runtime.autocast(device, AMP[args.amp]):
                    losses = ddp(images, sizes, gt_boxes, gt_labels)
                (sum(losses.values()) / accumulate * scaler.scale).backward()
            log.add(losses, accumulate)

        scaler.unscale(model)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip or HUGE)
        # Under fp16 loss scaling infinite gradients skip the step. Otherwise they are an error.
        overflow = ~torch.isfinite(norm) | scaler.overflow_flag()
        finite = torch.isfinite(sum(log.loss_sums.values())) & (~overflow | scaler.enabled)
        on_host = torch.full((), interrupts.received, device=device), torch.full(
            (), len(log.broken) > args.skip_broken, device=device)
        nonfinite, overflow, stop, too_many_broken = any_rank([~finite, overflow, *on_host], world)
        if too_many_broken:
            fail_broken(step, state, args, train_set, place)
        if nonfinite:
            fail_nonfinite(step, losses, norm, image_ids, place)
        if overflow:
            log.skipped += 1
        else:
            optimizer.step()
        scaler.update(overflow)
        optimizer.zero_grad(set_to_none=True)

        done = step + 1
        is_last = done == schedule.max_steps
        if done % args.log_every == 0 or is_last:
            log.write(done, lr, schedule.max_steps, sampler.steps_per_epoch)
        is_scored = val_set and (is_last or args.eval_every and done % args.eval_every == 0)
        if done % args.save_every == 0 or is_last or stop or is_scored:
            save_training(done, state, args, train_set, place)
        if stop and not is_last:
            last = args.out / "last.pth"
            print0(f"interrupted: saved {last} at step {done}; go on with --resume {last}")
            return
        if is_scored:
            settings = EvalSettings(max(args.min_size), args.max_size,
                                    workers=None if device.type == "cpu" else args.workers,
                                    amp=AMP[args.amp], pad_to=args.pad_to, pictures=args.pictures)
            try:
                with interrupts.at_once():  # the checkpoint is saved: an evaluation may be cut off
                    metrics = evaluate(model, val_set, place, args.out, settings, **scoring)
            except KeyboardInterrupt:
                raise SystemExit(f"interrupted while scoring step {done}; run evaluate.py --ckpt "
                                 f"{args.out / 'last.pth'} to score it") from None
            if metrics:  # on rank 0
                log.write_scores(done, metrics)
                save_best(done, metrics, state, args, train_set)
            log.restart_clock()
    log.draw_curves()


if __name__ == "__main__":
    runtime.run_main(main, death_of_a_loader)

"""What a training saves and how it goes on: last.pth, step_N.pth, best.pth.

A checkpoint for --resume holds the weights, the states of optimizer and loss scale, the step, the random
state and the log sums of every rank, the arguments, the classes, and the size of the data. The learning rate
is not in it: it is a function of the step (`train.learning_rate`).
"""
from runtime import Place, blame, gather_objects, print0  # before torch: see the first lines of runtime.py

# isort: split
import argparse
from pathlib import Path
from typing import NamedTuple

import torch

from checkpoint import MODEL_ARGS, save_checkpoint
from data import DetectionDataset
from runlog import RunLog
from weights import WeightsError, read_file


class TrainingState(NamedTuple):
    """The objects that a checkpoint saves and a resumed run restores."""
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: object  # `train.LossScaler`
    log: RunLog


def saved_form(args: argparse.Namespace) -> dict:
    """The arguments as a checkpoint holds them: builtins only, paths as text."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}


def _described_weights(step: int, state: TrainingState, args: argparse.Namespace,
                       train_set: DetectionDataset) -> dict:
    """The part of a checkpoint that `checkpoint.load_model` needs."""
    return {"model": state.model.state_dict(), "step": step, "args": saved_form(args),
            "names": train_set.names, "category_ids": train_set.category_ids}


def save_training(step: int, state: TrainingState, args: argparse.Namespace, train_set: DetectionDataset,
                  place: Place):
    """Writes last.pth, and step_N.pth with --keep. Every rank must call this."""
    rng = {"cpu": torch.get_rng_state()}
    if place.device.type != "cpu":
        rng[place.device.type] = torch.get_device_module(place.device).get_rng_state(place.device)
    ranks = gather_objects({"rng": rng, **state.log.state_dict()}, place.world)
    if place.rank > 0:
        return
    content = {**_described_weights(step, state, args, train_set), "ranks": ranks,
               "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(),
               "data": [len(train_set), len(train_set.boxes)]}
    save_checkpoint(args.out / "last.pth", content)
    if args.keep:
        save_checkpoint(args.out / f"step_{step}.pth", content)


def save_best(step: int, metrics: dict, state: TrainingState, args: argparse.Namespace,
              train_set: DetectionDataset):
    """Writes best.pth if the AP is the best of the run so far: weights without the state of the training.

    A best.pth of this or of a later step was left by a run that was resumed before that step.
    """
    path, ap = args.out / "best.pth", metrics["AP"] or 0.0
    try:
        best = read_file(path)
        is_better = ap > best["AP"] or best["step"] >= step
    except (WeightsError, LookupError, TypeError):  # there is none, or it is damaged
        is_better = True
    if is_better:
        save_checkpoint(path, {**_described_weights(step, state, args, train_set), "AP": ap})


def restore_training(checkpoint: dict, state: TrainingState, args: argparse.Namespace,
                     train_set: DetectionDataset, place: Place):
    """Restores everything that `save_training` saved, except the random state (`restore_rng`).

    Prints what changes. Raises WeightsError if the run cannot go on with these arguments or data.
    """
    with blame(checkpoint["path"], WeightsError, "cannot resume, the state of its training is damaged"):
        _restore(checkpoint, state, args, train_set, place)


def _restore(checkpoint: dict, state: TrainingState, args: argparse.Namespace, train_set: DetectionDataset,
             place: Place):
    path, saved = checkpoint["path"], checkpoint["args"]
    for key in (*MODEL_ARGS, "optimizer", "norm", "freeze_at", "stage", "shots", "generalized"):
        if key in saved and getattr(args, key) != saved[key]:
            raise WeightsError(f"{path}: was trained with {key} {saved[key]}, not {getattr(args, key)}: a "
                               f"resumed run cannot change that")
    if checkpoint["names"] != train_set.names:
        raise WeightsError(f"{path}: was trained on the classes {checkpoint['names']}, the data have "
                           f"{train_set.names}; use --init to fine-tune on other classes")
    for key, value in saved_form(args).items():
        if key in saved and value != saved[key] and key not in ("resume", "out", "init", "workers"):
            print0(f"resume changes {key}: {saved[key]} -> {value}")
    size = [len(train_set), len(train_set.boxes)]
    if size != checkpoint["data"]:
        print0(f"resume changes the data: {checkpoint['data'][0]} images, {checkpoint['data'][1]} boxes -> "
               f"{size[0]}, {size[1]}")
    state.model.load_state_dict(checkpoint["model"])
    _load_optimizer(state.optimizer, checkpoint["optimizer"])
    state.scaler.load_state_dict(checkpoint["scaler"])
    if len(checkpoint["ranks"]) != place.world:
        print0(f"resume changes the number of ranks: {len(checkpoint['ranks'])} -> {place.world} (a step "
               f"sees the same images; random numbers of dropout and sampling start afresh)")
    else:
        state.log.load_state_dict(checkpoint["ranks"][place.rank])
    print0(f"resumed {path} at step {checkpoint['step']}")


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict):
    """Restores the averages of the gradients. The arguments decide all else, such as the weight decay."""
    groups = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
        raise ValueError("the optimizer has other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    adamw = isinstance(optimizer, torch.optim.AdamW)
    keys = {"step", "exp_avg", "exp_avg_sq"} if adamw else {"momentum_buffer"}
    for parameter, values in optimizer.state.items():
        # SGD has no buffer for a parameter without a gradient.
        shapes = [value.shape for value in values.values() if adamw or value is not None]
        if set(values) != keys or not set(shapes) <= {parameter.shape, ()}:
            raise ValueError("the state of the optimizer does not fit its parameters")


def restore_rng(checkpoint: dict, place: Place):
    """Restores the random state of this rank, if the number of ranks is the same."""
    if len(checkpoint["ranks"]) == place.world:
        with blame(checkpoint["path"], WeightsError, "cannot resume, its random state is damaged"):
            rng = checkpoint["ranks"][place.rank]["rng"]
            torch.set_rng_state(rng["cpu"])
            if place.device.type in rng and place.device.type != "cpu":
                torch.get_device_module(place.device).set_rng_state(rng[place.device.type], place.device)

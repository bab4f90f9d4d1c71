"""Time to AP: our one-stage detectors and torchvision's, trained on the same batches from random weights.

Both have a ResNet-18 with an FPN of 64 channels, and the same images, flips, optimizer and schedule. They
differ in what each library adds: first weights, targets, losses, rules of detection. `benchmark.py learn` is
the command.
"""
import argparse
import contextlib
import io
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from data import DetectionDataset, TrainBatchSampler, TrainSamples, collate, ignore_signals
from draw import figure_of
from evaluate import EvalSettings, detect
from metrics import score
from recipes import parse_args
from runtime import Place, memory_format
from train import learning_rate, make_schedule

MODELS = {"FCOS": ("--model", "fcos"), "RetinaNet": ("--model", "fsaf", "--fsaf-branch", "anchor")}
SMALL = ("--weights", "none", "--backbone", "resnet18", "--fpn-channels", "64", "--schedule", "s1x",
         "--warmup-steps", "50")


def training_args(name: str, data: str, **numbers) -> argparse.Namespace:
    """What train.py uses for the small form of a model. numbers: further arguments, such as min_size=128."""
    words = [word for key, number in numbers.items() for word in (f"--{key.replace('_', '-')}", str(number))]
    return parse_args([*MODELS[name], *SMALL, "--data", data, *words])[0]


class Training(NamedTuple):
    """A training that both libraries make."""
    train_set: DetectionDataset
    val_set: DetectionDataset
    args: argparse.Namespace  # of train.py
    score_every: int  # steps


class TorchvisionDetector(nn.Module):
    """A detector of torchvision with the interface of ours."""

    size_divisor = 32

    def __init__(self, name: str, num_classes: int):
        super().__init__()
        from torchvision.models import detection, resnet18
        from torchvision.models.detection.backbone_utils import BackboneWithFPN
        from torchvision.ops.feature_pyramid_network import LastLevelP6P7
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
        backbone = BackboneWithFPN(resnet18(), layers, [128, 256, 512], 64, LastLevelP6P7(64, 64))
        self.detector = getattr(detection, name)(backbone, num_classes)
        # The images come resized. torchvision's own switch, _skip_resize, is for training only.
        self.detector.transform.resize = lambda image, target: (image, target)

    def forward(self, images: Tensor, sizes: Tensor, gt_boxes: Tensor, gt_labels: Tensor) -> dict:
        targets = [{"boxes": boxes[labels >= 0], "labels": labels[labels >= 0]}
                   for boxes, labels in zip(gt_boxes, gt_labels)]
        return self.detector(_in_0_1(images, sizes), targets)

    def network(self, images: Tensor, sizes: Tensor) -> list[dict[str, Tensor]]:
        return self.detector(_in_0_1(images, sizes))

    def detections(self, outputs: list[dict[str, Tensor]], sizes: Tensor) -> list[dict[str, Tensor]]:
        return outputs


def _in_0_1(images: Tensor, sizes: Tensor) -> list[Tensor]:
    """Images as torchvision takes them: a list of (3, h, w) float in 0..1, without padding."""
    return [image[:, :height, :width].float() / 255 for image, (height, width) in zip(images, sizes.tolist())]


def learning_curve(make_model: Callable[[int], nn.Module], training: Training, seed: int,
                   place: Place) -> list[dict]:
    """Trains a model and scores it on the way.

    make_model: from the number of classes. The seed sets weights and batches, so both libraries see the same
    batches.
    Returns a row {"step", "seconds", "AP", "AP50", "per_class"} for each evaluation. "seconds" is the time of
    the training alone, "per_class" {class name: AP}.
    """
    train_set, val_set, args, score_every = training
    torch.manual_seed(seed)
    layout = memory_format(place.device)
    model = make_model(len(train_set.names)).to(place.device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    sampler = TrainBatchSampler(train_set, range(len(train_set)), args.batch_size, seed)
    schedule = make_schedule(args, sampler.steps_per_epoch)
    sampler.stop = schedule.max_steps
    loader = DataLoader(TrainSamples(train_set, args.min_size, args.max_size, seed=seed),
                        batch_sampler=sampler, num_workers=1, worker_init_fn=ignore_signals,
                        collate_fn=partial(collate, size_divisor=model.size_divisor))
    rows, seconds, clock = [], 0.0, time.perf_counter()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        images, *targets = (batch[key].to(place.device)
                            for key in ("images", "sizes", "gt_boxes", "gt_labels"))
        sum(model(images.contiguous(memory_format=layout), *targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % score_every == 0 or done == schedule.max_steps:
            seconds += time.perf_counter() - clock
            found, _ = detect(model, val_set, place, EvalSettings(max(args.min_size), args.max_size))
            with contextlib.redirect_stdout(io.StringIO()):
                metrics = score(val_set, found)
            rows.append({"step": done, "seconds": seconds,
                         **{key: metrics[key] for key in ("AP", "AP50", "per_class")}})
            clock = time.perf_counter()
    return rows


def draw_learning(curves: dict[str, list[list[dict]]], path: Path):
    """Draws AP over steps and over seconds. curves: {label: rows of `learning_curve` of every seed}."""
    figure, axes = figure_of(1, 2)
    for axis, over in zip(axes, ("step", "seconds")):
        for i, (label, seeds) in enumerate(curves.items()):
            for number, rows in enumerate(seeds):
                axis.plot([row[over] for row in rows], [row["AP"] for row in rows], f"C{i}", marker=".",
                          label=None if number else label)
        axis.set(xlabel=over, ylabel="AP", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)

"""Time to AP: our one-stage detectors and torchvision's, trained on the same batches from random weights.

Both have a ResNet-18 with an FPN of 64 channels, and the same images, flips, optimizer and schedule. They
differ in what each library adds: first weights, targets, losses, rules of detection. `benchmark.py learn` is
the command.
"""
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
from fcos import FCOS
from fsaf import FSAF
from metrics import score
from recipes import ADAMW, REFERENCE_BATCH, SCHEDULES
from runtime import Place, memory_format
from train import Schedule, learning_rate

FROM_SCRATCH = {"backbone": "resnet18", "norm": "batch", "freeze_at": 0, "fpn_channels": 64}
OURS = {"FCOS": partial(FCOS, **FROM_SCRATCH), "RetinaNet": partial(FSAF, anchor_only=True, **FROM_SCRATCH)}
CLIP = 35.0  # limit of the L2 norm of the gradient
WARMUP_STEPS, WARMUP_FACTOR = 50, 1 / 3


class Training(NamedTuple):
    """A training that both libraries make."""
    train_set: DetectionDataset
    val_set: DetectionDataset
    min_size: int  # short side, px
    max_size: int  # limit of the long side, px
    batch_size: int
    steps: int
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
        # The images come resized. Its transform only normalises and pads them.
        self.detector = getattr(detection, name)(backbone, num_classes, _skip_resize=True)

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
                   place: Place) -> list[dict[str, float]]:
    """Trains a model and scores it on the way: a row {"step", "seconds", "AP", "AP50"} for each evaluation.

    make_model: from the number of classes. "seconds" is the time of the training alone. The seed sets weights
    and batches. Both libraries see the same batches.
    """
    train_set, val_set, min_size, max_size, batch_size, steps, score_every = training
    torch.manual_seed(seed)
    layout = memory_format(place.device)
    model = make_model(len(train_set.names)).to(place.device, memory_format=layout).train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=ADAMW["weight_decay"])
    length, drops = SCHEDULES["s1x"]
    schedule = Schedule(steps, ADAMW["lr"] * batch_size / REFERENCE_BATCH,
                        [round(steps * drop / length) for drop in drops], min(WARMUP_STEPS, steps // 10),
                        WARMUP_FACTOR, constant_warmup=False)
    sampler = TrainBatchSampler(train_set, range(len(train_set)), batch_size, seed, stop=steps)
    loader = DataLoader(TrainSamples(train_set, [min_size], max_size, seed=seed), batch_sampler=sampler,
                        num_workers=1, collate_fn=partial(collate, size_divisor=model.size_divisor),
                        worker_init_fn=ignore_signals)
    rows, seconds, clock = [], 0.0, time.perf_counter()
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, schedule)
        images, *targets = (batch[key].to(place.device)
                            for key in ("images", "sizes", "gt_boxes", "gt_labels"))
        sum(model(images.contiguous(memory_format=layout), *targets).values()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        if done % score_every == 0 or done == steps:
            seconds += time.perf_counter() - clock
            found, _ = detect(model, val_set, place, EvalSettings(min_size, max_size))
            with contextlib.redirect_stdout(io.StringIO()):
                metrics = score(val_set, found)
            rows.append({"step": done, "seconds": seconds, "AP": metrics["AP"], "AP50": metrics["AP50"],
                         "per_class": metrics["per_class"]})
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

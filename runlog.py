"""What a run shows and writes down: environment, log lines, log.txt, log.jsonl, progress of long loops."""
import runtime  # noqa: F401  before torch: see the first lines of runtime.py

# isort: split
import argparse
import fcntl
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from draw import draw_runs
from runtime import TEMPORARY, Place, UserError, atomic_write, copy_prints, print0, refuse_special


def environment(place: Place) -> str:
    """One line: versions, device, number of ranks, commit."""
    try:
        git = subprocess.run(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
                             capture_output=True, text=True)
        commit = git.stdout.strip() or "unknown"
    except OSError:  # no git on this machine
        commit = "unknown"
    return (f"python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}, "
            f"{place.device.type} ({device_name(place.device)}), {place.world} rank(s), commit {commit}")


def device_name(device: torch.device) -> str:
    """Name of the accelerator, or the processor and its number of threads."""
    if device.type == "cpu":
        return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    return torch.get_device_module(device).get_device_name(device)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: on the device, or resident memory on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if platform.system() == "Darwin" else 1024) / 1e9
    return torch.get_device_module(device).max_memory_allocated() / 1e9


class RunLog:
    """Prints mean losses and times since the last log line, and writes them to log.jsonl.

    start: the first step of this process.
    """

    def __init__(self, args: argparse.Namespace, start: int, place: Place):
        self.args, self.start, self.place = args, start, place
        self.logged, self.loss_sums = start, {}  # the step of the last line; sums of losses since then
        self.data_seconds, self.clock, self.file = 0.0, time.perf_counter(), None
        self.broken = set()  # messages of the images that this rank could not read
        self.skipped = 0  # steps of the run without a step of the optimizer, because float16 overflowed
        self.sums_before = {}  # loss_sums before the current step

    def open(self):
        """Opens log.jsonl, see `open_log`, and log.txt, which gets what the screen shows. Rank 0 only.

        The folder must be locked, see `lock_folder`.
        """
        if self.place.rank == 0:
            self.file = open_log(self.args, self.start)
            copy_prints(self.args.out / "log.txt")

    def state_dict(self) -> dict:
        return {"logged": self.logged, "skipped": self.skipped,
                "loss_sums": {name: value.cpu() for name, value in self.loss_sums.items()}}

    def load_state_dict(self, state: dict):
        if not 0 <= state["logged"] <= self.start:
            raise ValueError(f"a log line of step {state['logged']}")
        self.logged, self.skipped = state["logged"], state.get("skipped", 0)
        self.loss_sums = {name: value.to(self.place.device) for name, value in state["loss_sums"].items()}

    def add(self, losses: dict[str, torch.Tensor], accumulate: int):
        for name, value in losses.items():
            self.loss_sums[name] = self.loss_sums.get(name, 0) + value.detach() / accumulate

    def restart_clock(self):
        self.clock = time.perf_counter()

    def write(self, done: int, lr: float, max_steps: int, steps_per_epoch: int):
        """Writes the log line of step `done`. Every rank must call this."""
        means = torch.stack(list(self.loss_sums.values())) / (done - self.logged)
        if self.place.world > 1:
            dist.all_reduce(means)
        means = dict(zip(self.loss_sums, (means / self.place.world).tolist()))
        timed, seconds = done - max(self.logged, self.start), time.perf_counter() - self.clock
        row = {"step": done, "epoch": round(done / steps_per_epoch, 3), "loss": sum(means.values()), **means,
               "lr": lr, "data_s": self.data_seconds / timed, "step_s": seconds / timed,
               "images_per_s": timed * self.args.batch_size / seconds,
               "memory_gb": peak_memory(self.place.device), "eta_s": (max_steps - done) * seconds / timed}
        if self.skipped:
            row["skipped"] = self.skipped
        if self.args.compile:
            row["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        print0(f"step {done}/{max_steps}  epoch {row['epoch']:.2f}  "
               + "  ".join(f"{name} {row[name]:.4f}" for name in ("loss", *means))
               + f"  lr {lr:.5f}  data {row['data_s']:.3f} s  step {row['step_s']:.3f} s  "
                 f"{row['images_per_s']:.1f} images/s  {row['memory_gb']:.2f} GB  "
                 f"ETA {int(row['eta_s']) // 60}:{int(row['eta_s']) % 60:02}"
               + (f"  {self.skipped} steps skipped: float16 overflow" if self.skipped else "")
               + (f"  {row['graphs']} graphs" if self.args.compile else ""))
        if self.file:
            print(json.dumps(row), file=self.file, flush=True)
        if done == max_steps and self.broken:
            show = print0 if self.place.rank == 0 else print
            show("\n".join([f"rank {self.place.rank} skipped broken images:", *sorted(self.broken)]))
        self.loss_sums, self.data_seconds, self.logged = {}, 0.0, done
        self.restart_clock()

    def write_scores(self, done: int, metrics: dict):
        """Writes the scores after step `done` to log.jsonl: AP, AP50, ... and the AP of every class."""
        if self.file:  # rank 0
            scores = {key: metrics[key] for key in metrics if not isinstance(metrics[key], dict)}
            row = {"step": done, **scores, "per_class": metrics["per_class"]}
            print(json.dumps(row), file=self.file, flush=True)

    def draw_curves(self):
        """Draws what log.jsonl holds into curves.png. Without matplotlib a line says so."""
        if self.file:  # rank 0
            try:
                draw_runs([self.args.out], self.args.out / "curves.png")
            except UserError as error:
                print0(f"curves.png is not drawn: {error}")


class Progress:
    """How far a loop over `total` images is: a line that changes on a terminal, a line every 10 % in a file.

    what: such as "detecting in". Rank 0 prints, for the first time before the loop.
    """

    def __init__(self, what: str, total: int):
        self.what, self.total, self.done, self.shown, self.start = what, total, 0, 0.0, time.perf_counter()
        print0(f"{what} {total} images")

    def add(self, count: int):
        """Counts images as done."""
        tenths, self.done = 10 * self.done // max(1, self.total), min(self.total, self.done + count)
        seconds, ended = time.perf_counter() - self.start, self.done == self.total
        left = int((self.total - self.done) * seconds / self.done)
        line = (f"{self.what} {self.total} images: {self.done} done, {self.done / seconds:.1f} images/s, ETA "
                f"{left // 60}:{left % 60:02}")
        if not sys.stderr.isatty():
            if 10 * self.done // self.total > tenths:
                print0(line)
        elif os.environ.get("RANK", "0") == "0" and (ended or seconds - self.shown > 0.5):
            self.shown = seconds
            print(f"\r{line}  ", end="\n" if ended else "", file=sys.stderr, flush=True)


_locks = []  # open lock files


def lock_folder(out: Path, place: Place):
    """Locks an output folder for this process. Raises UserError if another training writes there.

    Files that a killed process left half written are removed. The system releases the lock when the process
    ends, even after kill -9. Rank 0 only.
    """
    if place.rank > 0:
        return
    for name in (".lock", "log.jsonl", "log.txt", "last.pth", "best.pth", "metrics.json", "detections.json"):
        refuse_special(out / name)
    file = open(out / ".lock", "w")
    _locks.append(file)  # closing it would release the lock
    try:
        # lockf: loader processes do not inherit the lock, so it cannot outlive this process.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--out {out}: another run is writing there; choose another folder") from None
    except OSError:  # a file system without locks
        return
    for path in out.glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):  # names of `atomic_write`
        path.unlink(missing_ok=True)


def open_log(args: argparse.Namespace, start: int):
    """log.jsonl. A run resumed in its own folder continues it, another one renames the old files."""
    path = args.out / "log.jsonl"
    if args.resume and args.resume.parent.resolve() == args.out.resolve():
        trim_log(path, start)
    else:
        for name in ("last.pth", "best.pth", "log.jsonl", "log.txt"):
            if (args.out / name).exists():
                number = next(n for n in range(1, 10 ** 6) if not (args.out / f"earlier{n}_{name}").exists())
                os.replace(args.out / name, args.out / f"earlier{number}_{name}")
                print0(f"{args.out / name} of an earlier run is now earlier{number}_{name}")
    return open(path, "a")


def trim_log(path: Path, step: int):
    """Removes the lines after `step` and an incomplete last line. The resumed run writes them again."""
    lines = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line)
        except ValueError:
            continue
    with atomic_write(path) as file:
        file.writelines(lines)

"""Runs train.py and evaluate.py one after the other in this process, with an eye on what they do on the NPU.

    python tests/programs/npu_jobs.py JOBS.json RESULTS.json

torch_npu, or the stand-in for it, must be on PYTHONPATH.

A job is {"words": [script, argument, ...], "same_samples": bool, "env": {name: value}, "saturates": bool}.
With "saturates" the device is like the first Ascend 910, see `Saturate`. For test_npu.py:
importing torch_npu changes a process, and each start of one costs seconds. Under torchrun, give one job.
"""
import contextlib
import io
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch
import torch_npu  # before the first backward: autograd starts one thread per device that it knows
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import evaluate
import shapes
import train
from runtime import run_main

shapes.SHAPES_IMAGES.update(train=48, val=4)


class Watch(TorchDispatchMode):
    """What happens on the device: {operator: calls}, and {what: {where: times}} of what should not."""

    def __init__(self):
        super().__init__()
        self.operators, self.events, self.depth = Counter(), {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        before = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        after = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        asked = kwargs.get("device")
        if not (any(_on_npu(t) for t in before + after) or asked and torch.device(asked).type == "npu"):
            return out
        name = func._schema.name.removeprefix("aten::")
        self.operators[name] += 1
        if any(t.dtype in (torch.float64, torch.complex128) and _on_npu(t) for t in before + after):
            self.note("float64", name)
        # torch_npu refuses other layouts than contiguous ones.
        if kwargs.get("memory_format") in (torch.channels_last, torch.channels_last_3d):
            self.note("channels_last", name)
        dynamic = any(tag in func.tags for tag in
                      (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output))
        if name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"):
            dynamic = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if dynamic:
            self.note("dynamic", name)
        to_host = any(map(_on_npu, before)) and (any(not _on_npu(t) for t in after)
                                                 or name == "copy_" and not _on_npu(args[0]))
        if to_host or name in ("_local_scalar_dense", "equal", "is_nonzero"):
            self.note("to_host", name)
        return out

    def note(self, what: str, name: str):
        frame, place = sys._getframe(2), "elsewhere"
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.parent == ROOT:
                place = f"{path.stem}.{frame.f_code.co_name}"
                break
            frame = frame.f_back
        self.events.setdefault(what, Counter())[f"{place} {name}"] += 1

    def report(self) -> dict:
        return {"operators": dict(sorted(self.operators.items())), **self.events}


class Saturate(TorchDispatchMode):
    """A device without infinity: what overflows becomes the largest number, NaN becomes 0, and a flag is set.

    Inside, torch.npu answers as torch_npu does on an Ascend 910 of the first generation.
    """

    def __init__(self):
        super().__init__()
        self.flag, self.overflows = False, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if (isinstance(tensor, torch.Tensor) and _on_npu(tensor) and tensor.is_floating_point()
                    and not tensor.isfinite().all()):
                self.flag = True
                self.overflows[func._schema.name.removeprefix("aten::")] += 1
                tensor.nan_to_num_(0.0)
        return out

    def __enter__(self):
        answers = {"utils": SimpleNamespace(is_support_inf_nan=lambda: False),
                   "is_bf16_supported": lambda: False, "get_npu_overflow_flag": lambda: self.flag,
                   "clear_npu_overflow_flag": lambda: setattr(self, "flag", False)}
        self.patches = [patch.object(torch.npu, *answer, create=True) for answer in answers.items()]
        for each in self.patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error):
        for each in self.patches:
            each.stop()
        return super().__exit__(*error)


def _on_npu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "npu"


def spread_order(count: int, device) -> torch.Tensor:
    """In place of random numbers, which differ between devices."""
    return (torch.arange(count, device=device) * 0.618034) % 1


def run(job: dict) -> dict:
    report = {"shapes": [], "error": None}
    step_watch, detect_watch = Watch(), Watch()
    npu = "npu" in job["words"] and not job.get("saturates")  # watched, which takes time
    saturating = Saturate() if job.get("saturates") else contextlib.nullcontext()
    os.environ.update(job.get("env", {}))
    kept = checkpoint.build_model, train.learning_rate, evaluate.detect

    def build_model(*args):
        model = kept[0](*args)
        if job.get("same_samples") and hasattr(model, "sample_order"):
            model.sample_order = spread_order
            if hasattr(model.predictor, "dropout"):
                model.predictor.dropout.p = 0.0
        model.register_forward_pre_hook(
            lambda _, tensors: report["shapes"].append([list(t.shape) for t in tensors]))
        return model

    watching = contextlib.ExitStack()

    def learning_rate(step, *args, **kwargs):  # called as a step begins: the second one is watched
        if npu and step == 1:
            watching.enter_context(recording)
            watching.enter_context(step_watch)
        else:
            watching.close()
        return kept[1](step, *args, **kwargs)

    def detect(*args):
        with detect_watch if npu else contextlib.nullcontext():
            return kept[2](*args)

    train.build_model = checkpoint.build_model = build_model
    train.learning_rate, evaluate.detect = learning_rate, detect
    recording = torch_npu.record() if npu else None
    script, *words = map(str, job["words"])
    sys.argv = [script, *words]
    text, start = io.StringIO(), time.time()
    try:
        with contextlib.redirect_stdout(text), saturating:
            run_main({"train.py": train.main, "evaluate.py": evaluate.main}[script])
    except SystemExit as stop:
        report["error"] = str(stop.code)
    finally:
        report["current_device"] = torch.npu.current_device()
        torch.npu.set_device(0)
        checkpoint.build_model, train.learning_rate, evaluate.detect = kept
        train.build_model = kept[0]
        for name in job.get("env", {}):
            del os.environ[name]
    out = Path(words[words.index("--out") + 1])
    for key, name in (("rows", "log.jsonl"), ("detections", "detections.json"), ("metrics", "metrics.json")):
        if (out / name).exists():
            lines = (out / name).read_text()
            report[key] = json.loads(lines) if key != "rows" else [  # without those of evaluations
                row for row in map(json.loads, lines.splitlines()) if "loss" in row]
    return {**report, "step": {**step_watch.report(), "recorded": getattr(recording, "counts", {})},
            "detect": detect_watch.report(), "overflows": getattr(saturating, "overflows", {}),
            "text": text.getvalue(), "seconds": time.time() - start,
            "options": npu and {**torch.npu.options, **vars(torch.npu.config)}}


def control() -> dict:
    """What the watch says of a few lines that do all they should not."""
    with Watch() as watch:
        x = torch.ones(2, 3, 4, 4, device="npu").double()
        x.to(memory_format=torch.channels_last)[x > 0].sum().item()
    return watch.report()


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, results = map(Path, sys.argv[1:])
    done = [control(), *(run(job) for job in json.loads(jobs.read_text()))]
    if int(os.environ.get("RANK", 0)) == 0:
        results.write_text(json.dumps(done))

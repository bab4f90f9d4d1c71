"""--device cuda on a GPU: the numbers of the CPU, no hidden waits, mixed precision, compiling, resuming."""
import json
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from helpers import small_two_stage

import evaluate
import train
from defrcn import DeFRCN
from fcos import FCOS
from fsaf import FSAF
from ops import nms_plain
from peers import Workload, synthetic_batch
from runtime import autocast, memory_format

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
SMALL = {"num_classes": 3, "backbone": "resnet18", "fpn_channels": 64}
ONE_STAGE = {"fcos": partial(FCOS, **SMALL), "fcos original": partial(FCOS, original=True, **SMALL),
             "fsaf": partial(FSAF, **SMALL), "fsaf joint": partial(FSAF, joint=True, **SMALL),
             "retinanet": partial(FSAF, anchor_only=True, **SMALL)}
MODELS = {**ONE_STAGE, "faster_rcnn": partial(small_two_stage, fpn=True, fpn_channels=64),
          "faster_rcnn c4": small_two_stage, "defrcn": partial(small_two_stage, DeFRCN)}
WORDS = {"fcos": ("--model", "fcos"), "joint": ("--model", "fsaf", "--fsaf-joint"),
         "faster_rcnn": ("--model", "faster_rcnn"), "base": ("--model", "defrcn", "--stage", "base")}
TRAINING = ("--device", "cuda", "--workers", 2, "--pictures", 0)


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch):
    """Convolutions in float32, not in torch's default on a GPU, TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def batch_on(device):
    images, sizes, boxes, labels = synthetic_batch(Workload(2, (256, 320), 10, "off", False), device)
    return images.contiguous(memory_format=memory_format(device)), sizes, boxes, labels % 3


def model_on(name, device):
    torch.manual_seed(0)
    return MODELS[name]().to(device, memory_format=memory_format(device)).train()


def losses_and_gradients(model, batch, amp=None):
    with autocast(batch[0].device, amp):
        losses = model(*batch)
    sum(losses.values()).backward()
    return ({name: value.item() for name, value in losses.items()},
            {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None})


# ---------------------------------------------------------------------------- same numbers

@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_equal_those_of_the_cpu(name):
    ours, gradients = losses_and_gradients(model_on(name, DEVICE), batch_on(DEVICE))
    theirs, expected = losses_and_gradients(model_on(name, "cpu"), batch_on("cpu"))
    assert ours == pytest.approx(theirs, rel=1e-4) and ours.keys() == theirs.keys()
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() <= 1e-2 * expected[key].norm() + 1e-6, key


@pytest.mark.parametrize("name", MODELS)
def test_detections_equal_those_of_the_cpu(name):
    found = []
    for device in (DEVICE, torch.device("cpu")):
        model = model_on(name, device).eval()
        model.score_threshold = 0.0
        images, sizes, *_ = batch_on(device)
        with torch.inference_mode():
            found.append([{key: value.cpu() for key, value in image.items()}
                          for image in model(images, sizes)])
    for ours, theirs in zip(*found):
        assert len(ours["boxes"]) == len(theirs["boxes"]) > 0
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
        boxes = [{(label, *row) for label, row in
                  zip(image["labels"].tolist(), image["boxes"].round().tolist())} for image in (ours, theirs)]
        assert len(boxes[0] & boxes[1]) >= 0.9 * len(boxes[1])


@pytest.mark.parametrize("classes", [None, 80])
def test_nms_by_hand_equals_the_kernel(classes):
    from torchvision.ops import batched_nms, nms
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(3000, 2, generator=generator) * 200
    boxes = torch.cat((corner, corner + 5 + 60 * torch.rand(3000, 2, generator=generator)), 1).to(DEVICE)
    scores = torch.rand(3000, generator=generator).to(DEVICE)
    labels = torch.arange(3000, device=DEVICE) % (classes or 1)
    kernel = batched_nms(boxes, scores, labels, 0.6) if classes else nms(boxes, scores, 0.6)
    assert torch.equal(nms_plain(boxes, scores, 0.6, labels if classes else None, 500), kernel[:500])


# ---------------------------------------------------------------------------- waits, precision, compiling

@pytest.mark.parametrize("name", ONE_STAGE)
def test_no_step_waits_for_the_device(name):
    model, batch = model_on(name, DEVICE), batch_on(DEVICE)
    losses_and_gradients(model, batch)  # the first step makes handles and chooses algorithms
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):  # the mode sees what it is made for
            batch[0].sum().item()
        sum(model(*batch).values()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 35.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", WORDS)
def test_the_training_loop_waits_once_a_step(in_process, form):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            in_process(train.main, *WORDS[form], *TRAINING, "--max-steps", 10, "--log-every", 10, "--no-eval",
                       "--out", "run")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = Counter(Path(warning.filename).name for warning in caught
                    if "synchroniz" in str(warning.message) and Path(warning.filename).parent == ROOT)
    assert waits == {"train.py": 10, "runlog.py": 1}  # any_rank in each step; the log line


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_near_float32(name, amp):
    exact, _ = losses_and_gradients(model_on(name, DEVICE), batch_on(DEVICE))
    mixed, gradients = losses_and_gradients(model_on(name, DEVICE), batch_on(DEVICE), amp)
    # Two stages: rounding changes which proposals are left, and these few RoIs are the loss.
    tolerance = 0.02 if name in ONE_STAGE else 0.3
    assert sum(mixed.values()) == pytest.approx(sum(exact.values()), rel=tolerance)
    assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


@pytest.mark.parametrize("name", [name if name == "fsaf" else pytest.param(name, marks=pytest.mark.slow)
                                  for name in MODELS])
def test_the_compiled_step_equals_the_eager_one(name):
    eager, expected = losses_and_gradients(model_on(name, DEVICE), batch_on(DEVICE))
    model = model_on(name, DEVICE)
    # A graph break raises. Two-stage detectors have one, at the NMS of the proposals.
    model.compile(dynamic=False, fullgraph=name in ONE_STAGE)
    compiled, gradients = losses_and_gradients(model, batch_on(DEVICE))
    assert compiled == pytest.approx(eager, rel=1e-3)
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() <= 1e-2 * expected[key].norm() + 1e-5, key
    torch.compiler.reset()


# ---------------------------------------------------------------------------- scripts

def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("form", "more"), [("fcos", ()), ("joint", ()), ("faster_rcnn", ()), ("base", ()),
                                            ("fcos", ("--amp", "fp16")), ("fcos", ("--amp", "bf16"))])
def test_a_resumed_run_goes_on_and_is_scored(in_process, tmp_path, form, more):
    in_process(train.main, *WORDS[form], *more, *TRAINING, "--max-steps", 12, "--save-every", 6, "--keep",
               "--log-every", 1, "--out", "whole", "--optimizer", "sgd")
    printed = in_process(train.main, "--resume", "whole/step_6.pth", "--device", "cuda", "--no-eval",
                         "--out", "resumed")
    assert "resumed whole/step_6.pth at step 6" in printed
    whole, resumed = (rows(tmp_path / run / "log.jsonl") for run in ("whole", "resumed"))
    assert [row["lr"] for row in resumed] == [row["lr"] for row in whole[6:]]
    # Some kernels add up in any order. Later that may change which RoIs a two-stage detector samples.
    expected = [row["loss"] for row in whole[6:]]
    assert resumed[0]["loss"] == pytest.approx(expected[0], rel=1e-2)
    tolerance = 0.2 if form in ("faster_rcnn", "base") else 1e-2
    assert [row["loss"] for row in resumed] == pytest.approx(expected, rel=tolerance)
    assert whole[-1]["memory_gb"] > 0
    assert "AP50" in json.loads((tmp_path / "whole/metrics.json").read_text())


def test_the_scores_equal_those_of_the_cpu(in_process, tmp_path):
    in_process(train.main, *WORDS["fcos"], *TRAINING, "--max-steps", 150, "--no-eval", "--out", "run")
    for device in ("cuda", "cpu"):
        in_process(evaluate.main, "--ckpt", "run/last.pth", "--device", device, "--out", device)
    cuda, cpu = (json.loads((tmp_path / device / "metrics.json").read_text()) for device in ("cuda", "cpu"))
    assert cuda["AP"] == pytest.approx(cpu["AP"], abs=1e-3) and cpu["AP"] > 0.005


def test_out_of_memory_ends_in_one_line(mistake):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.005)
    try:
        line = mistake(train.main, *WORDS["fcos"], *TRAINING, "--max-steps", 2, "--min-size", 800,
                       "--max-size", 1333, "--backbone", "resnet50", "--no-eval", "--out", "run")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert line.startswith("error: out of memory: ") and "--micro-batch" in line and "\n" not in line


def test_more_ranks_than_gpus_end_in_one_line(mistake, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(torch.cuda.device_count() + 1))
    line = mistake(train.main, "--device", "cuda", "--out", "run")
    assert f"ranks on this machine, but {torch.cuda.device_count()} cuda devices" in line

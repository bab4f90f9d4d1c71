"""--device npu on a stand-in that computes on the CPU (../shared/fake_npu); its errors without any."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import PROGRAMS, SHARED, environment, torchrun

import evaluate
import ops
import train
from ops import roi_align, roi_align_plain
from train import SCALE_GROWTH_STEPS, LossScaler

STAND_IN = SHARED / "fake_npu"
needs_stand_in = pytest.mark.skipif(not STAND_IN.is_dir(), reason=f"{STAND_IN} is absent")
COMMON = ("--batch-size", 2, "--workers", 0, "--max-steps", 3, "--log-every", 1, "--pictures", 0,
          "--optimizer", "sgd")  # AdamW would blow up rounding errors
SMALL, TINY = ("--min-size", 64, "--max-size", 96), ("--min-size", 32, "--max-size", 48)
TWO_STAGE = ("--model", "defrcn", "--roi-samples", 8, "--proposals", 20, 10)
FORMS = {"fcos": ("--model", "fcos"), "rcnn": ("--model", "faster_rcnn", *TWO_STAGE[2:]),
         "free": ("--model", "fsaf"),
         "joint": ("--model", "fsaf", "--fsaf-joint"), "base": (*TWO_STAGE, "--stage", "base"),
         "novel": (*TWO_STAGE, "--stage", "novel", "--shots", 1, "--init", "base_npu/last.pth")}
PADDED = ("fcos", "joint", "base")
FORM_NAMES = tuple(FORMS)
# Frozen statistics: batch statistics would depend on the images per device. With random weights they need a
# small rate.
AFFINE = ("--norm", "affine", "--lr", 0.0001)
NO_KERNEL = ("cummax", "index_add", "linalg_inv")  # on an NPU
# The NMS of the proposals: how many survive is known to the device alone.
DYNAMIC_IN_TRAINING = {"faster_rcnn.rpn_proposals index", "ops.nms_plain index", "ops.nms_plain equal"}


def train_job(form, out, *words, device="npu", size=SMALL, **more) -> dict:
    return {"words": ["train.py", *COMMON, *size, *FORMS[form], "--device", device, *words, "--out", out],
            "same_samples": True, **more}


def run_jobs(folder, jobs: dict, ranks: int = 1) -> dict:
    """Results of npu_jobs.py by name, and "control"."""
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    command = [sys.executable, *torchrun(ranks), str(PROGRAMS / "npu_jobs.py"), "jobs.json", "results.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500,
                          env=environment(PYTHONPATH=str(STAND_IN)))
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text())
    return dict(zip(("control", *jobs), results, strict=True))


def losses(result) -> list[float]:
    assert result["error"] is None, result["error"]
    return [row["loss"] for row in result["rows"]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    jobs = {}
    for form in FORMS:
        jobs[f"{form} cpu"] = train_job(form, f"{form}_cpu", "--no-eval", device="cpu")
        jobs[f"{form} npu"] = train_job(form, f"{form}_npu")
    for form in PADDED:
        jobs[f"{form} padded"] = train_job(form, f"{form}_padded", "--pad-to", 128, 160, "--no-eval")
    for form in ("fcos", "base"):
        for device in ("cpu", "npu"):
            jobs[f"{form} evaluated {device}"] = {"words": [
                "evaluate.py", "--ckpt", f"{form}_npu/last.pth", "--device", device, "--workers", 0,
                "--score-threshold", 0.001, "--pictures", 0, "--out", f"{form}_evaluated_{device}"]}
    jobs["whole"] = train_job("novel", "whole", "--save-every", 2, "--keep", "--no-eval", same_samples=False)
    jobs["resumed"] = {"words": ["train.py", "--resume", "whole/step_2.pth", "--device", "npu",
                                 "--workers", 0, "--out", "resumed"]}
    jobs["fp16"] = train_job("fcos", "fp16", "--amp", "fp16", "--no-eval", size=TINY)
    jobs["fp32 npu"] = train_job("fcos", "fp32_npu", "--no-eval", size=TINY)
    jobs["fp32"] = train_job("fcos", "fp32", "--no-eval", size=TINY, device="cpu")
    jobs["fcos affine"] = train_job("fcos", "fcos_affine", *AFFINE)
    jobs["device 1"] = train_job("fcos", "device_1", "--no-eval", device="npu:1", size=TINY)
    jobs["device 2"] = train_job("fcos", "device_2", device="npu:2")
    jobs["device 1 of torchrun"] = train_job("fcos", "device_of_torchrun", device="npu:1",
                                             env={"LOCAL_RANK": "0"})
    for script, words in (("train.py", ()), ("evaluate.py", ("--ckpt", "fcos_npu/last.pth"))):
        jobs[f"{script} one rank too many"] = {"words": [script, *words, "--device", "npu", "--out", "many"],
                                               "env": {"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}}
    return run_jobs(tmp_path_factory.mktemp("npu"), jobs)


# ---------------------------------------------------------------------------- same numbers

@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", FORM_NAMES)
def test_training_on_an_npu_equals_training_on_a_cpu(runs, form):
    npu, cpu = runs[f"{form} npu"], runs[f"{form} cpu"]
    assert losses(npu)[0] == pytest.approx(losses(cpu)[0], rel=1e-5) and len(losses(npu)) == 3
    # Later a rounding error may change which proposals a two-stage detector samples.
    tolerance = 0.02 if form in ("base", "novel", "rcnn") else 1e-5
    assert losses(npu) == pytest.approx(losses(cpu), rel=tolerance)
    assert "AP50" in npu["metrics"]
    assert "npu (FakeNPU), 1 rank(s)" in npu["text"] and npu["rows"][-1]["memory_gb"] > 0
    assert npu["options"] == {"jitCompile": "disable", "allow_internal_format": False}


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", ["fcos", "base"])
def test_detections_on_an_npu_equal_those_on_a_cpu(runs, form):
    npu, cpu = (runs[f"{form} evaluated {device}"]["detections"] for device in ("npu", "cpu"))
    assert len(npu) == len(cpu) > 20
    # Of nearly equal scores the order may differ: compare the scores, and boxes as sets.
    assert [d["score"] for d in npu] == pytest.approx([d["score"] for d in cpu], abs=2e-5)
    boxes = [{(d["image_id"], d["category_id"], *(round(v) for v in d["bbox"])) for d in found}
             for found in (npu, cpu)]
    assert len(boxes[0] & boxes[1]) >= 0.95 * len(boxes[1])


@needs_stand_in
@pytest.mark.slow
def test_resuming_on_an_npu_repeats_the_run_exactly(runs):
    whole, resumed = runs["whole"], runs["resumed"]  # of the form that draws samples and dropout
    assert losses(resumed) == losses(whole)[2:]
    assert "at step 2" in resumed["text"]


@needs_stand_in
@pytest.mark.slow
def test_float16_equals_float32_but_for_rounding(runs):
    assert losses(runs["fp16"]) == pytest.approx(losses(runs["fp32"]), rel=5e-3)


@pytest.mark.slow
@needs_stand_in
@pytest.mark.parametrize("form", ["fcos", "joint", "base"])
def test_mixed_precision(tmp_path, form):
    # P7 is 2 x 2 at this size: with one output cell torch 2.15's bfloat16 convolution of some CPUs has a
    # weight gradient full of uninitialised memory.
    larger = ("--min-size", 144, "--max-size", 192)
    jobs = {"npu": train_job("base", "base_npu", "--no-eval")} if form == "novel" else {}
    jobs |= {"fp32": train_job(form, "fp32", device="cpu"),
             "fp16": train_job(form, "fp16", "--amp", "fp16"),
             "fp16 fixed": train_job(form, "fixed", "--amp", "fp16", "--loss-scale", 32),
             "large": train_job(form, "large", device="cpu", size=larger),
             "bf16": train_job(form, "bf16", "--amp", "bf16", size=larger)}
    results = run_jobs(tmp_path, jobs)
    for name, reference in (("fp16", "fp32"), ("fp16 fixed", "fp32"), ("bf16", "large")):
        # Two stages: rounding changes which proposals are left, and these few RoIs are the loss.
        tolerance = 0.01 if form in ("fcos", "free", "joint") else 0.3
        assert losses(results[name])[0] == pytest.approx(losses(results[reference])[0], rel=tolerance), name
        assert len(losses(results[name])) == 3
        assert_clean_step(form, results[name])


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", ["fcos", *(pytest.param(form, marks=pytest.mark.slow)
                                            for form in ("joint", "base"))])
def test_two_ranks_over_hccl_equal_one(tmp_path, runs, form):
    two = run_jobs(tmp_path, {"two": train_job(form, "two", *AFFINE)}, ranks=2)["two"]
    one = (runs["fcos affine"] if form == "fcos" else
           run_jobs(tmp_path, {"one": train_job(form, "one", *AFFINE)})["one"])
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert "2 rank(s)" in two["text"] and len(two["detections"]) == len(one["detections"])
    assert two["step"]["to_host"].pop("train.main copy_") == 2  # DDP arranges its buckets, once in a run
    waits = two["detect"]["to_host"]  # all_gather_object goes through the device
    gathering = [place for place in waits if place.startswith("runtime.gather_objects ")]
    assert sum(waits.pop(place) for place in gathering) > 0
    assert_clean_step(form, two)


# ---------------------------------------------------------------------------- operators

def assert_clean_step(form, result):
    step, detect = result["step"], result["detect"]
    for part in (step, detect) if detect["operators"] else (step,):
        assert "float64" not in part and "channels_last" not in part
        operators = {*part["operators"], *part.get("recorded", ())}
        assert len(operators) > 30
        assert not [name for name in operators if "torchvision" in name or any(b in name for b in NO_KERNEL)]
    assert {"convolution_backward", "convolution_backward_overrideable"} & set(step["operators"])
    waits, dynamic = dict(step["to_host"]), step.get("dynamic", {})
    assert waits.pop("train.any_rank _to_copy") == 1  # the flags that stop a run
    assert waits.pop("runlog.write _to_copy") == 1
    if form in ("base", "novel", "rcnn"):
        assert set(dynamic) <= DYNAMIC_IN_TRAINING and set(waits) == {"ops.nms_plain equal"}
    else:
        assert not dynamic and not waits
    if detect["operators"]:  # boxes, scores and labels of every image come back
        assert set(detect["to_host"]) == {"ops.nms_plain equal", "evaluate._coco_results to"}
        assert detect["to_host"]["evaluate._coco_results to"] <= 3 * 4


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", FORM_NAMES)
def test_the_step_stays_on_the_device_with_fixed_shapes(runs, form):
    assert_clean_step(form, runs[f"{form} npu"])


@needs_stand_in
@pytest.mark.slow
def test_the_mixed_precision_step_stays_on_the_device(runs):
    assert_clean_step("fcos", runs["fp16"])


@needs_stand_in
@pytest.mark.slow
def test_the_watch_sees_what_it_is_made_for(runs):
    assert set(runs["control"]) == {"operators", "float64", "channels_last", "dynamic", "to_host"}


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", PADDED)
def test_pad_to_gives_every_step_one_shape(runs, form):
    shapes = runs[f"{form} padded"]["shapes"]
    assert len(shapes) == 3 and shapes.count(shapes[0]) == 3
    assert shapes[0][0] == [2, 3, 128, 160]
    # Images are wide and tall, and have different numbers of objects.
    assert len({str(shape) for shape in runs[f"{form} npu"]["shapes"]}) > 1


def test_roi_align_without_a_kernel_is_float32_under_autocast(monkeypatch):
    monkeypatch.setattr(ops, "USE_TORCHVISION", False)
    features, boxes = torch.rand(1, 8, 40, 40), torch.rand(1, 5, 2).repeat(1, 1, 2) * 300
    boxes[..., 2:] += 200
    with torch.autocast("cpu", torch.bfloat16):
        pooled = roi_align(features, boxes, 7, 1 / 16)
    torch.testing.assert_close(pooled, roi_align_plain(features, boxes, 7, 1 / 16), rtol=0, atol=0)


def test_loss_scale_by_hand():
    scaler = LossScaler("dynamic", enabled=True)
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.grad = torch.tensor([[2.0 ** 17]])
    scaler.unscale(model)
    assert model.weight.grad.item() == 2  # 2^17 / 2^16
    scaler.update(overflow=True)
    assert scaler.scale == 2.0 ** 15
    for _ in range(SCALE_GROWTH_STEPS):
        scaler.update(overflow=False)
    assert scaler.scale == 2.0 ** 16
    saturating = LossScaler("dynamic", enabled=True, saturates=True)
    saturating.update(overflow=True)
    assert saturating.scale == 32 and LossScaler("8", enabled=True, saturates=True).scale == 8
    assert not LossScaler("dynamic", enabled=False, saturates=True).overflow_flag()
    other = LossScaler("dynamic", enabled=True)
    other.load_state_dict({**scaler.state_dict(), "scale": 8.0})
    assert other.scale == 8
    fixed, off = LossScaler("32", enabled=True), LossScaler("dynamic", enabled=False)
    for same in (fixed, off):
        same.update(overflow=True)
        same.load_state_dict(scaler.state_dict())
    assert (fixed.scale, off.scale) == (32, 1)


# ---------------------------------------------------------------------------- a device without infinity

THREE = ("fcos", "free", "base")


@pytest.fixture(scope="module")
def saturating(tmp_path_factory):
    """20 steps of float32 on the stand-in as it is and without infinity; there also 3 steps of float16."""
    jobs = {}
    for form in THREE:
        steady = ("--max-steps", 20, "--warmup-steps", 0, "--lr", 0.001, "--no-eval")
        fp16 = ("--amp", "fp16", "--warmup-steps", 0, "--lr", 0.001, "--no-eval")
        jobs[f"{form} ordinary"] = train_job(form, f"{form}_ordinary", *steady)
        jobs[f"{form} fp32"] = train_job(form, f"{form}_fp32", *steady, saturates=True)
        jobs[f"{form} fp16"] = train_job(form, f"{form}_fp16", *fp16, size=TINY, saturates=True)
        jobs[f"{form} too large"] = train_job(form, f"{form}_large", *fp16, "--loss-scale", 2.0 ** 24,
                                              size=TINY, saturates=True)
    jobs["bf16"] = train_job("fcos", "bf16", "--amp", "bf16", saturates=True)
    return run_jobs(tmp_path_factory.mktemp("saturating"), jobs)


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", THREE)
def test_training_without_infinity_equals_training_with_it(saturating, form):
    ordinary, fp32 = saturating[f"{form} ordinary"], saturating[f"{form} fp32"]
    assert len(losses(fp32)) == 20 and losses(fp32) == losses(ordinary)
    assert fp32["overflows"] == {}  # else the flag would have float16 skip a good step


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("form", THREE)
def test_the_overflow_flag_decides_about_float16_steps_without_infinity(saturating, form):
    good, large = saturating[f"{form} fp16"], saturating[f"{form} too large"]
    assert good["overflows"] == {} and "skipped" not in good["rows"][-1]
    assert "this NPU has no infinity: the loss scale is fixed, 32" in good["text"]
    assert len(losses(good)) == len(losses(large)) == 3
    assert large["overflows"]["convolution_backward"] > 0  # and no value is infinite
    assert [row["skipped"] for row in large["rows"]] == [1, 2, 3]
    assert "  3 steps skipped: float16 overflow" in large["text"]


@needs_stand_in
@pytest.mark.slow
def test_bfloat16_is_refused_where_the_npu_lacks_it(saturating):
    assert (saturating["bf16"]["error"]
            == "error: --amp bf16: this NPU has no bfloat16; use --amp fp16 (docs/ascend.md)")


# ---------------------------------------------------------------------------- mistakes

CHECKPOINT = {train.main: (), evaluate.main: ("--ckpt", "c.pth")}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a torch_npu with these lines on the path, or none at all."""
    def make(lines: str | None, cuda: str | None = None):
        monkeypatch.delitem(sys.modules, "torch_npu", raising=False)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        if lines is not None:
            (tmp_path / "torch_npu").mkdir()
            (tmp_path / "torch_npu" / "__init__.py").write_text(lines)
        monkeypatch.syspath_prepend(tmp_path)
    yield make
    sys.modules.pop("torch_npu", None)
    if hasattr(torch, "npu"):
        del torch.npu


@pytest.mark.parametrize(("lines", "cuda", "message"), [
    (None, None, "error: --device npu: torch_npu is not installed (see docs/ascend.md)"),
    ("raise SystemError('must not be imported')", "13.2",
     "error: --device npu needs torch's CPU build, this is a CUDA build"),
    ("raise ImportError('libhccl.so: cannot open shared object file\\nmore')", None,
     "torch_npu cannot be imported (ImportError: libhccl.so: cannot open shared object file); it needs CANN"),
    ("import torch\ntorch._C._of_another_release", None, "torch_npu cannot be imported (AttributeError: "),
    ("import torch, types\ntorch.npu = types.SimpleNamespace(device_count=lambda: 0)", None,
     "error: --device npu, but torch_npu sees no NPU")])
@pytest.mark.parametrize("main", CHECKPOINT)
def test_an_unusable_torch_npu_ends_in_one_line(package, mistake, main, lines, cuda, message):
    package(lines, cuda)
    stopped = mistake(main, "--device", "npu", "--out", "out", *CHECKPOINT[main])
    assert message in stopped and "\n" not in stopped.strip()


@pytest.mark.parametrize("main", CHECKPOINT)
def test_cuda_without_a_gpu_ends_in_one_line(mistake, monkeypatch, main):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stopped = mistake(main, "--device", "cuda", "--out", "out", *CHECKPOINT[main])
    assert "error: --device cuda, but torch sees no CUDA GPU" in stopped


@needs_stand_in
@pytest.mark.slow
@pytest.mark.parametrize("script_name", ["train.py", "evaluate.py"])
def test_more_ranks_than_devices_end_in_one_line(runs, script_name):
    assert (runs[f"{script_name} one rank too many"]["error"]
            == "error: 3 ranks on this machine, but 2 npu devices")


@needs_stand_in
@pytest.mark.slow
def test_a_device_is_chosen_by_its_number(runs):
    assert losses(runs["device 1"]) == losses(runs["fp32 npu"]) and runs["device 1"]["current_device"] == 1
    assert runs["device 2"]["error"] == "error: --device npu:2, but 2 npu devices"
    assert runs["device 1 of torchrun"]["error"] == (
        "error: --device npu:1 does not go with torchrun, which gives each rank a device: use --device npu "
        "and ASCEND_RT_VISIBLE_DEVICES")


@pytest.mark.parametrize("name", ["npu:", "gpu:1", "cpu:0", "auto:1", "cuda:-1"])
@pytest.mark.parametrize("main", CHECKPOINT)
def test_other_names_of_devices_are_refused(mistake, main, name):
    stopped = mistake(main, "--device", name, "--out", "out", *CHECKPOINT[main])
    assert f"{name!r} is not auto, cuda, npu, cpu or a number like npu:3" in stopped


@pytest.mark.slow
def test_torch_npu_is_imported_for_npu_alone(tmp_path):
    """Nor does torch load it by itself, as it does with what an installed torch_npu registers."""
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(
        "# STAND_IN = True\nprint('imported')\nraise ImportError\ndef autoload(): pass\n")
    (tmp_path / "torch_npu-1.0.dist-info").mkdir()
    (tmp_path / "torch_npu-1.0.dist-info" / "METADATA").write_text("Name: torch_npu\nVersion: 1.0\n")
    (tmp_path / "torch_npu-1.0.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\ntorch_npu = torch_npu:autoload\n")
    done = subprocess.run([sys.executable, str(PROGRAMS / "choose_devices.py")], capture_output=True,
                          text=True, env=environment(PYTHONPATH=str(tmp_path)))
    assert done.stdout.split() == ["cpu", "auto", "cuda", "npu", "imported"], done.stderr

"""train.py: learning rate, parameter groups, and the command itself."""
import json
import os
import shutil
import signal
import time

import pytest
import torch
from conftest import wait_for
from PIL import Image

import train
from checkpoint import load_model
from fcos import FCOS
from recipes import parse_args
from train import Schedule, learning_rate, parameter_groups

TINY = ("train.py", "--device", "cpu", "--batch-size", 4, "--workers", 1, "--log-every", 1, "--out", "out")


def rows(folder):
    return [json.loads(line) for line in (folder / "out" / "log.jsonl").read_text().splitlines()]


def weights(folder, name="last.pth"):
    return torch.load(folder / "out" / name, weights_only=True)


# ---------------------------------------------------------------------------- schedule and groups

def test_learning_rate_by_hand():
    linear = Schedule(100, 0.01, [60, 80], warmup_steps=10, warmup_factor=1 / 3, constant_warmup=False)
    constant = linear._replace(constant_warmup=True)
    # Linear from a third: step 5 is halfway, (1/3 + 1) / 2 = 2/3.
    assert learning_rate(0, linear) == pytest.approx(0.01 / 3)
    assert learning_rate(5, linear) == pytest.approx(0.01 * 2 / 3)
    assert learning_rate(9, constant) == pytest.approx(0.01 / 3)
    for step, expected in ((10, 0.01), (59, 0.01), (60, 0.001), (79, 0.001), (80, 0.0001)):
        assert learning_rate(step, constant) == pytest.approx(expected)


def test_convolution_biases_learn_twice_as_fast_and_do_not_decay():
    model = FCOS(3, "resnet18", fpn_channels=64)
    plain, biases = parameter_groups(model, 1e-4, bias_lr=2.0, bias_decay=0.0)
    names = {id(p): n for n, p in model.named_parameters()}
    of = [{names[id(p)] for p in group["params"]} for group in (plain, biases)]
    assert (plain["lr_factor"], plain["weight_decay"],
            biases["lr_factor"], biases["weight_decay"]) == (1, 1e-4, 2, 0)
    assert {"head.cls_logits.bias", "fpn.p6.bias", "head.cls_tower.0.bias"} <= of[1]
    assert {"head.cls_tower.1.bias", "head.cls_tower.1.weight", "head.scales.0", "fpn.p6.weight"} <= of[0]
    assert of[0] | of[1] == {n for n, p in model.named_parameters() if p.requires_grad} and not of[0] & of[1]


# ---------------------------------------------------------------------------- the command

def test_a_short_run_leaves_its_files(in_process, tmp_path):
    out = in_process(train.main, *TINY[1:], "--max-steps", 3, "--pictures", 2)
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} == {"last.pth", "best.pth", "log.jsonl", "log.txt",
                                                  "detections.json", "metrics.json", "pictures",
                                                  "curves.png", ".lock"}
    log = rows(tmp_path)
    assert [row["step"] for row in log] == [1, 2, 3, 3]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert log[3]["AP"] == metrics["AP"] and log[3]["per_class"] == metrics["per_class"]
    text = (folder / "log.txt").read_text()
    assert text == out and "Average Precision" in text
    assert {"loss", "cls", "box", "centerness", "lr", "data_s", "step_s", "images_per_s", "memory_gb",
            "eta_s", "epoch"} <= set(log[0])
    assert log[0]["loss"] == pytest.approx(log[0]["cls"] + log[0]["box"] + log[0]["centerness"], rel=1e-6)
    assert ({"AP", "AP50", "AP75", "APs", "APm", "APl"}
            <= set(json.loads((folder / "metrics.json").read_text())))
    for words in ("torch " + torch.__version__, "heart", "lr 0.0005 = 0.002 x 4/16", "images/s", "ETA",
                  "commit", "have no object to learn"):
        assert words in out


def test_the_best_checkpoint_is_kept_without_the_state_of_the_training(in_process, mistake, tmp_path,
                                                                       monkeypatch):
    aps = iter((0.25, 0.5, 0.125, 0.75, 0.5))

    def evaluate(model, dataset, place, out, settings):
        return {"AP": next(aps), "per_class": {}}
    monkeypatch.setattr(train, "evaluate", evaluate)
    in_process(train.main, *TINY[1:], "--max-steps", 3, "--eval-every", 1, "--save-every", 50)
    best = torch.load(tmp_path / "out" / "best.pth", weights_only=True)
    assert (best["step"], best["AP"]) == (2, 0.5) and not {"optimizer", "ranks"} & set(best)
    scores = [(row["step"], row["AP"]) for row in rows(tmp_path) if "AP" in row]
    assert scores == [(1, 0.25), (2, 0.5), (3, 0.125)]
    in_process(train.main, "--resume", "out/last.pth", "--max-steps", 5)
    best = torch.load(tmp_path / "out" / "best.pth", weights_only=True)
    assert (best["step"], best["AP"]) == (4, 0.75)
    model, info = load_model(tmp_path / "out" / "best.pth")
    assert info["step"] == 4
    size = {name: (tmp_path / "out" / name).stat().st_size for name in ("best.pth", "last.pth")}
    assert size["best.pth"] < 0.4 * size["last.pth"]
    assert "holds weights but no training to go on with" in mistake(train.main, "--resume", "out/best.pth")


def test_a_resume_that_is_refused_leaves_the_log_as_it_is(in_process, mistake, tmp_path):
    in_process(train.main, *TINY[1:], "--max-steps", 2, "--no-eval")
    log = tmp_path / "out" / "log.jsonl"
    log.write_text(before := log.read_text() + '{"step": 3}\n')
    message = mistake(train.main, "--resume", "out/last.pth", "--max-steps", 4, "--norm", "affine")
    assert "out/last.pth: was trained with norm batch, not affine" in message
    assert log.read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fcos", "fsaf", "faster_rcnn", "defrcn"])
def test_resuming_repeats_the_uninterrupted_run_exactly(script, tmp_path, model):
    # Two stages draw random samples in every step. Scoring in between must not move them.
    words = {"fcos": (), "fsaf": ("--model", "fsaf", "--fsaf-joint"),
             "faster_rcnn": ("--model", "faster_rcnn"),
             "defrcn": ("--model", "defrcn", "--stage", "base", "--roi-samples", 16, "--proposals", 40, 20,
                        "--eval-every", 3, "--pictures", 0)}[model]
    no_eval = () if model == "defrcn" else ("--no-eval",)
    assert script(*TINY, *words, *no_eval, "--max-steps", 6, "--save-every", 3, "--keep")[0] == 0
    whole, whole_rows = weights(tmp_path), rows(tmp_path)
    (tmp_path / "out" / "last.pth").unlink()
    code, out, err = script(*TINY, "--max-steps", 6, "--no-eval", "--resume", "out/step_3.pth")
    assert code == 0 and "resumed out/step_3.pth at step 3" in out, err
    again, again_rows = weights(tmp_path), rows(tmp_path)
    assert all(torch.equal(value, again["model"][key]) for key, value in whole["model"].items())
    whole_rows, again_rows = ([row for row in log if "loss" in row] for log in (whole_rows, again_rows))
    for a, b in zip(whole_rows, again_rows, strict=True):
        assert all(a[key] == b[key] for key in a if not key.endswith(("_s", "_gb")))
        assert model != "fsaf" or {"anchor_cls", "anchor_box", "free_cls", "free_box"} <= set(a)


@pytest.mark.slow
@pytest.mark.parametrize(("model", "graphs"), [(("fcos",), 1), (("defrcn", "--stage", "base"), 2)])
def test_a_compiled_run_has_its_graphs_from_the_first_steps_on(script, tmp_path, model, graphs):
    words = (*TINY, "--model", *model, "--optimizer", "sgd", "--max-steps", 8, "--no-eval")
    code, out, err = script(*words, "--compile", timeout=900)
    assert code == 0, err
    log = rows(tmp_path)
    # Wide and tall images. DeFRCN has two graphs, before and after the proposals.
    assert [row["graphs"] for row in log[-4:]] == [2 * graphs] * 4, out
    if model == ("fcos",):  # DeFRCN's samples are drawn by other random numbers inside a graph
        assert script(*words, "--out", "plain")[0] == 0
        plain = (tmp_path / "plain" / "log.jsonl").read_text().splitlines()
        for row, line in zip(log, plain, strict=True):
            assert row["loss"] == pytest.approx(json.loads(line)["loss"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_saves_and_stops(script, background, tmp_path, number):
    run = background(tmp_path, *TINY, "--max-steps", 500, "--no-eval")
    wait_for(run, "step 2/")
    if number == signal.SIGINT:
        os.killpg(run.pid, number)  # Ctrl-C reaches the loader's processes too
    else:
        run.send_signal(number)
    rest = run.communicate(timeout=120)[0]
    assert run.returncode == 0 and "interrupted: saved out/last.pth" in rest
    step = weights(tmp_path)["step"]
    assert 2 < step < 100
    code, out, err = script(*TINY, "--max-steps", step + 1, "--no-eval", "--resume")
    assert code == 0, err
    assert f"resumed out/last.pth at step {step}" in out and "resume changes max_steps" in out
    code, _, err = script(*TINY, "--max-steps", step + 1, "--no-eval", "--resume")
    assert code != 0 and "no step is left to train" in err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["fcos", "fsaf"])
def test_ranks_and_micro_batches_change_nothing_but_rounding(script, tmp_path, model):
    # Frozen batch norm as in the published recipes: batch statistics would depend on the images per device.
    command = (*TINY, "--model", model, "--norm", "affine", "--max-steps", 4, "--no-eval")
    losses = []
    for ranks in (1, 2):
        code, out, err = script(*command, ranks=ranks)
        assert code == 0, err
        assert ("an earlier run is now earlier1_last.pth" in out) == (ranks == 2)
        losses.append([row["loss"] for row in rows(tmp_path)[-4:]])
    assert losses[1] == pytest.approx(losses[0], rel=2e-4)
    if model == "fsaf":
        return
    code, out, err = script(*command, "--micro-batch", 2)
    assert code == 0 and "2 micro-batch(es) x 2 images, each micro-batch normalised" in out, err
    # Another normaliser, the same images.
    assert rows(tmp_path)[-4]["loss"] == pytest.approx(losses[0][0], rel=0.2)


@pytest.mark.parametrize(("words", "message"), [
    (["--data", "nowhere"], "error: data folder nowhere does not exist"),
    (["--weights", "no.pth"], "error: --weights no.pth does not exist"),
    (["--resume"], "error: checkpoint out/last.pth does not exist"),
    (["--init", "no.pth"], "error: checkpoint no.pth does not exist"),
    (["--micro-batch", "3"], "error: --batch-size 4 must be a multiple of 1 ranks x --micro-batch 3"),
    (["--amp", "fp16"], "error: --amp fp16 needs a GPU or NPU"),
    (["--pad-to", "96", "96"], "it does not fit --pad-to 96 96"),
    (["--out", "/dev/null"], "cannot be used as a folder"),
    (["--seed", "-1"], "--seed must not be negative")])
def test_mistakes_end_in_one_line(mistake, words, message):
    assert message in mistake(train.main, *TINY[1:], "--max-steps", 30, "--no-eval", *words)


def test_compiling_needs_a_compiler(mistake, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "error: --compile needs a C++ compiler" in mistake(train.main, *TINY[1:], "--compile")
    assert not parse_args(["--compile", "--no-compile"])[0].compile


def test_the_script_itself_shows_no_traceback(script):
    code, out, err = script(*TINY, "--train-split", "val", "--max-steps", 30, "--no-eval", "--lr", "1e9",
                            "--clip", "0", "--warmup-steps", "0")
    assert code != 0 and "Traceback" not in err
    assert "error: loss or gradient is not finite at step" in err and "images [" in out and "losses {" in out


@pytest.mark.slow
def test_an_image_that_turns_out_broken_stops_the_run_by_name(script, tmp_path, coco_mini):
    for name in ("annotations", "train2017", "val2017"):
        (tmp_path / "coco").mkdir(exist_ok=True)
        if name == "annotations":
            (tmp_path / "coco" / name).symlink_to(coco_mini / name)
            continue
        (tmp_path / "coco" / name).mkdir()
        for image in (coco_mini / name).iterdir():
            (tmp_path / "coco" / name / image.name).symlink_to(image)
    for broken in list((tmp_path / "coco" / "train2017").iterdir()):
        broken.unlink()
        broken.write_bytes(b"\xff\xd8 this is no image")
    code, _, err = script(*TINY, "--data", "coco", "--weights", "none", "--backbone", "resnet18",
                          "--min-size", 64, "--max-size", 96, "--max-steps", 2, "--no-eval")
    assert code != 0 and "Traceback" not in err
    assert (err.strip().splitlines()[-1].startswith("error: coco/train2017/0")
            and "cannot be read as an image" in err)


@pytest.mark.slow
def test_broken_images_are_found_before_step_1_or_skipped(script, tmp_path, bccd):
    shutil.copytree(bccd, tmp_path / "voc")
    split = tmp_path / "voc" / "VOC2007" / "ImageSets" / "Main"
    names = (split / "trainval.txt").read_text().split()[:12]
    (split / "few.txt").write_text("\n".join(names))
    image = tmp_path / "voc" / "VOC2007" / "JPEGImages" / f"{names[3]}.jpg"
    image.write_bytes(image.read_bytes()[:2000])
    words = (*TINY, "--data", "voc", "--train-split", "2007_few", "--val-split", "2007_few", "--weights",
             "none", "--backbone", "resnet18", "--fpn-channels", 64, "--min-size", 64, "--max-size", 96,
             "--max-steps", 6)
    code, out, err = script(*words, "--no-eval")
    assert code != 0 and "step 1/6" not in out and "reading 12 images" in out
    assert f"{image.name}: cannot be read as an image" in err and "1 images of 12 are broken" in err
    assert "--skip-broken 1" in err and "Traceback" not in err
    code, out, err = script(*words, "--no-eval", "--skip-broken", 1)
    assert code == 0 and "11 training images" in out and "step 6/6" in out, err
    code, out, err = script(*words, "--no-eval", "--no-verify-images", "--skip-broken", 1)
    assert code == 0 and "skipped broken images:" in out and image.name in out, err
    code, out, err = script(*words, "--no-eval", ranks=2)
    assert code != 0 and "reading 6 images" in out and f"{image.name}: cannot be read as an image" in err
    code, out, err = script(*words)  # an image that would be scored cannot be skipped
    assert code != 0 and "mend them" in err
    code, out, err = script(*words, "--no-eval", "--no-verify-images")
    assert code != 0 and "go on with --resume out/last.pth" in err and image.name in err
    saved = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    assert saved["step"] < 6
    code, out, err = script("train.py", "--resume", "out/last.pth", "--skip-broken", 1)
    assert code == 0 and f"at step {saved['step']}" in out and "step 6/6" in out, err


@pytest.mark.slow
def test_bf16_and_voc_and_multi_scale_run(script, tmp_path, bccd):
    code, out, err = script(*TINY, "--data", bccd, "--train-split", "2007_trainval",
                            "--val-split", "2007_test", "--weights", "none", "--backbone", "resnet18",
                            "--fpn-channels", 64, "--min-size", 64, 96, "--max-size", 128, "--amp", "bf16",
                            "--max-steps", 2, "--drop-empty", "--schedule", "2x")
    assert code == 0, err
    assert "BloodImage_00338.xml: object 13" in out and "AP50 (VOC07 11-point)" in out
    assert "AP50_VOC07" in json.loads((tmp_path / "out" / "metrics.json").read_text())


@pytest.mark.slow
def test_two_ranks_survive_one_without_objects(script, tmp_path):
    # Image 1 has an object, image 2 none: with two ranks one of them never sees a positive point.
    (tmp_path / "d" / "annotations").mkdir(parents=True)
    (tmp_path / "d" / "train2017").mkdir()
    for i in (1, 2):
        Image.new("RGB", (64, 64), "grey").save(tmp_path / "d" / "train2017" / f"{i}.png")
    (tmp_path / "d" / "annotations" / "instances_train2017.json").write_text(json.dumps({
        "images": [{"id": i, "file_name": f"{i}.png", "width": 64, "height": 64} for i in (1, 2)],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [9, 9, 30, 30]}],
        "categories": [{"id": 1, "name": "thing"}]}))
    started = time.time()
    code, out, err = script(*TINY, "--batch-size", 2, "--data", "d", "--weights", "none",
                            "--backbone", "resnet18", "--fpn-channels", 64, "--min-size", 64,
                            "--max-steps", 3, "--no-eval", ranks=2, timeout=120)
    assert code == 0, err
    assert "step 3/3" in out and time.time() - started < 120


@pytest.mark.parametrize(("damage", "message"), [
    (lambda content: content["optimizer"]["state"][0].update(exp_avg=None), "the state of its training is"),
    (lambda content: content["args"].update(bias_decay=[1]), "has arguments of no run")])
def test_a_training_with_a_damaged_state_is_not_resumed(damage, message, in_process, mistake, tmp_path):
    in_process(train.main, *TINY[1:-2], "--max-steps", 1, "--no-eval", "--out", "run")
    content = torch.load(tmp_path / "run" / "last.pth", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "run" / "last.pth")
    line = mistake(train.main, "--resume", "run/last.pth", "--max-steps", 2)
    assert "run/last.pth" in line and message in line

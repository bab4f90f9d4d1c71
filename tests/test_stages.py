"""The few-shot commands: base stage, surgery, fine-tuning, scores, table."""
import json

import pytest
import torch
from conftest import train_small, write_checkpoint
from test_convert import BASIC, as_theirs, detectron2_c4, filled

import evaluate
import fewshot
import train
from defrcn import DeFRCN

TINY = ("train.py", "--device", "cpu", "--batch-size", 2, "--workers", 1, "--log-every", 1,
        "--model", "defrcn", "--roi-samples", 4, "--proposals", 10, 5, "--min-size", 96, "--max-size", 128)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base-stage checkpoint of two steps."""
    folder = tmp_path_factory.mktemp("base")
    out = train_small(folder, *TINY[1:], "--stage", "base", "--max-steps", 2)
    assert "base stage: disc, square, triangle, star, cross, ring (novel classes: arrow, heart)" in out
    return folder / "last.pth"


@pytest.mark.slow
def test_fine_tuning_scores_and_table(base, script, in_process, tmp_path):
    for seed in (0, 1):
        code, out, err = script(*TINY, "--stage", "novel", "--shots", 1, "--seed", seed, "--init", base,
                                "--max-steps", 2, "--pictures", 0)
        assert code == 0, err
    assert "1 shots per class, seed 1, sampled" in out
    assert "keeps the rows of none, new are arrow, heart" in out
    run = tmp_path / "runs" / "defrcn_novel_1shot_seed1"
    assert (run / "cocosplit" / "seed1" / "full_box_1shot_arrow_trainval.json").is_file()
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["few_shot"]["shots"] == 1 and metrics["few_shot"]["novel"] == ["arrow", "heart"]
    assert metrics["few_shot"]["nAP"] is not None and metrics["few_shot"]["bAP"] is None

    checkpoint = torch.load(run / "last.pth", weights_only=True)
    before = torch.load(base, weights_only=True)["model"]
    moved = {key for key, value in checkpoint["model"].items()
             if key in before and value.shape == before[key].shape and not torch.equal(value, before[key])}
    # Stem, layer1, layer2 (freeze at 3) and layer4 (the RoI head's) stay; layer3, RPN, affine layers learn.
    assert not any(key.startswith(("backbone.conv1", "backbone.layer1", "backbone.layer2", "backbone.layer4"))
                   for key in moved)
    assert {"backbone.layer3.0.conv1.weight", "rpn.conv.weight", "affine_roi.weight"} <= moved

    out = in_process(fewshot.main, "aggregate", *(tmp_path / "runs").iterdir(), "--out", "table")
    assert "FSOD" in out and "±" in out and "   2  " in out
    assert json.loads((tmp_path / "table" / "aggregate.json").read_text())[0]["seeds"] == [0, 1]


def test_a_converted_checkpoint_keeps_the_base_rows(base, in_process, tmp_path):
    out = in_process(fewshot.main, "convert", "--init", base, "--out", tmp_path / "converted.pth",
                     "--generalized")
    assert "keeps the rows of disc, square, triangle, star, cross, ring, background" in out
    old, new = (torch.load(path, weights_only=True) for path in (base, tmp_path / "converted.pth"))
    assert new["names"][-2:] == ["arrow", "heart"] and new["step"] == 0
    weight = "predictor.cls_score.weight"
    assert torch.equal(new["model"][weight][:6], old["model"][weight][:6])
    assert torch.equal(new["model"][weight][-1], old["model"][weight][-1])


@pytest.mark.slow
def test_the_form_with_fpn_is_fine_tuned(in_process, tmp_path):
    words = ("--model", "faster_rcnn", "--cosine", *TINY[11:], "--batch-size", 2, "--max-steps", 2)
    assert "base stage" in train_small(tmp_path / "base", *words, "--stage", "base")
    out = in_process(train.main, *words, "--stage", "novel", "--generalized", "--shots", 1, "--init",
                     "base/last.pth", "--device", "cpu", "--workers", 0, "--pictures", 0, "--out", "novel")
    assert "keeps the rows of disc, square, triangle, star, cross, ring, background" in out and "nAP" in out
    checkpoint = torch.load(tmp_path / "novel" / "last.pth", weights_only=True)
    assert checkpoint["args"]["fpn"] and "box_head.fc1.weight" in checkpoint["model"]


def test_only_two_stage_checkpoints_are_converted(mistake, tmp_path):
    write_checkpoint(tmp_path / "fcos.pth")
    line = mistake(fewshot.main, "convert", "--init", "fcos.pth", "--out", "c.pth")
    assert "fcos.pth: is a checkpoint of --model fcos" in line and not (tmp_path / "c.pth").exists()


@pytest.mark.slow
def test_generalized_fine_tuning_scores_base_and_novel_classes(base, script, tmp_path):
    words = ("--stage", "novel", "--generalized", "--shots", 1, "--init", base)
    code, out, err = script(*TINY, *words, "--max-steps", 2, "--pictures", 0, ranks=2)
    assert code == 0, err
    assert "bAP" in out and "nAP" in out
    run = tmp_path / "runs" / "defrcn_novel_all_1shot_seed0"
    code, out, err = script("evaluate.py", "--ckpt", run / "last.pth", "--out", "again", "--pictures", 0)
    assert code == 0, err
    assert (json.loads((tmp_path / "again" / "metrics.json").read_text())["few_shot"]
            == json.loads((run / "metrics.json").read_text())["few_shot"])


def test_an_ablation_trains_what_it_names_and_is_in_the_scores(base, in_process, tmp_path):
    in_process(train.main, *TINY[1:], "--stage", "novel", "--shots", 1, "--init", base, "--train-only",
               "predictor", "--cls-dropout", 0.5, "--max-steps", 2, "--pictures", 0, "--out", "a")
    before, after = (torch.load(path, weights_only=True)["model"] for path in (base, tmp_path / "a/last.pth"))
    changed = {key for key in after if key in before and after[key].shape == before[key].shape
               and not torch.equal(after[key], before[key])}
    assert all(key.startswith("predictor.") for key in changed)
    few_shot = json.loads((tmp_path / "a" / "metrics.json").read_text())["few_shot"]
    assert few_shot["train_only"] == ["predictor"] and few_shot["cls_dropout"] == 0.5
    assert "pcb_alpha" not in few_shot
    out = in_process(fewshot.main, "aggregate", "a")
    assert "train_only ['predictor']  cls_dropout 0.5" in out


class MeanColour(torch.nn.Module):
    """Stands in for the ImageNet classifier: the mean colour inside a box describes it."""

    def forward(self, image, boxes):
        return torch.stack([image[:, int(y1):max(int(y2), int(y1) + 1), int(x1):max(int(x2), int(x1) + 1)]
                            .float().mean(dim=(1, 2)) for x1, y1, x2, y2 in boxes.tolist()])


def test_a_foreign_checkpoint_is_calibrated_with_the_shots_that_are_named(in_process, mistake, tmp_path,
                                                                          monkeypatch):
    torch.manual_seed(0)
    theirs = filled(DeFRCN(2, **BASIC))
    torch.save({"model": as_theirs(theirs, detectron2_c4)}, tmp_path / "official.pth")
    monkeypatch.setattr(fewshot, "CalibrationNet", MeanColour)
    monkeypatch.setattr(fewshot, "load_classifier", lambda net, path: None)
    words = ("--ckpt", "official.pth", "--data", "shapes", "--classes", "arrow,heart", "--device", "cpu",
             "--min-size", 96, "--max-size", 128, "--proposals", 20, "--pictures", 0)
    calibrate = ("--pcb-weights", "r101.pth", "--shots", 1, "--shot-seed", 3)
    out = in_process(evaluate.main, *words, *calibrate)
    assert "1 shots per class, seed 3, sampled" in out and "after the prototypical calibration" in out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    few_shot = metrics["few_shot"]
    assert [few_shot[key] for key in ("calibrated", "shots", "shot_seed", "novel")] == [
        True, 1, 3, ["arrow", "heart"]]
    assert metrics["before_calibration"]["few_shot"]["nAP"] is not None


    def scores():
        found = json.loads((tmp_path / "detections.json").read_text())
        return {tuple(result["bbox"]): result["score"] for result in found}

    calibrated = scores()
    in_process(evaluate.main, *words)
    plain = scores()
    assert set(plain) == set(calibrated)
    assert any(abs(plain[box] - score) > 1e-3 for box, score in calibrated.items())

    line = mistake(evaluate.main, *words, "--pcb-weights", "r101.pth")
    assert "official.pth: was not trained here, so --pcb-weights needs its shots: --shots K" in line
    base = [word if word != "arrow,heart" else "disc,ring" for word in words]
    assert "none of its classes is novel (arrow, heart)" in mistake(evaluate.main, *base, *calibrate)


@pytest.mark.parametrize(("words", "message"), [
    (["--model", "fcos", "--stage", "base"], "belong to --model defrcn or faster_rcnn"),
    (["--train-only", "predictor"], "--train-only belongs to --stage novel"),
    (["--cosine-scale", "5"], "--cosine-scale belongs to --cosine"),
    (["--pcb-alpha", "1.5"], "at most 1"),
    (["--roi-grad-scale", "nan"], "--roi-grad-scale must not be negative"),
    (["--stage", "novel", "--shots", "1", "--init", "BASE", "--novel-classes", "disc"],
     "was trained on disc as base classes"),
    (["--stage", "novel", "--init", "BASE"], "--stage novel and --shots K belong together"),
    (["--stage", "novel", "--shots", "1"], "give the base stage's checkpoint with --init"),
    (["--stage", "base", "--novel-classes", "heart,unicorn"], "the data have no unicorn"),
    (["--stage", "novel", "--shots", "7", "--init", "BASE"], "class arrow: 7 shots cannot be drawn"),
    (["--stage", "novel", "--shots", "1", "--init", "BASE", "--shot-lists", "no"], "there is no such folder"),
    (["--stage", "novel", "--shots", "1", "--init", "BASE", "--pcb-weights", "no.pth"],
     "--pcb-weights no.pth does not exist")])
def test_mistakes_end_in_one_line(base, mistake, words, message):
    words = [base if word == "BASE" else word for word in words]
    assert message in mistake(train.main, *TINY[1:], "--no-eval", *words)



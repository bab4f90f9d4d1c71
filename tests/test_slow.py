"""Runs that take minutes on two cores: `python -m pytest -m slow`."""
import json

import pytest

pytestmark = pytest.mark.slow


def test_sixteen_real_images_are_learned_by_heart(script, tmp_path, coco_mini):
    content = json.loads((coco_mini / "annotations" / "instances_train2017.json").read_text())
    content["images"] = content["images"][:16]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    (tmp_path / "sixteen.json").write_text(json.dumps(content))
    files = ("sixteen.json", coco_mini / "train2017")
    code, out, err = script(
        "train.py", "--train-json", files[0], "--train-images", files[1], "--val-json", files[0],
        "--val-images", files[1], "--data", "coco", "--backbone", "resnet18", "--weights", "none",
        "--fpn-channels", 64, "--min-size", 256, "--max-size", 384, "--batch-size", 8, "--epochs", 150,
        "--schedule", "s1x", "--device", "cpu", "--out", "out", timeout=1200)
    assert code == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["AP"] >= 0.5, out[-3000:]


@pytest.mark.parametrize(("words", "ap"), [
    (("fcos",), 0.60), (("fsaf",), 0.45), (("fsaf", "--fsaf-joint"), 0.45)])
def test_shapes_reach_the_promised_ap(script, tmp_path, words, ap):
    code, out, err = script("train.py", "--model", *words, "--device", "cpu", "--out", "out", timeout=1200)
    assert code == 0, err
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["AP"] >= ap, out[-3000:]

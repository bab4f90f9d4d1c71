"""evaluate.py: checkpoints, the detection loop, and the command itself."""
import json

import numpy as np
import pytest
import torch
from conftest import train_small
from PIL import Image

import evaluate
from data import DataError, DetectionDataset
from evaluate import EvalSettings, detect, detect_image, load_model
from metrics import METRICS, read_results
from runtime import Place
from shapes import open_dataset
from weights import WeightsError


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of three training steps on shapes."""
    out = tmp_path_factory.mktemp("run")
    train_small(out, "--max-steps", 3, "--batch-size", 4)
    return out / "last.pth"


def test_a_checkpoint_rebuilds_its_model(trained):
    model, info = load_model(trained, "cpu")
    assert info["names"] == open_dataset("shapes", "val").names and info["step"] == 3
    assert info["category_ids"] == list(range(1, 9)) and not model.training
    assert torch.equal(model.state_dict()["head.ltrb.weight"],
                       torch.load(trained, weights_only=True)["model"]["head.ltrb.weight"])


def test_wrong_checkpoints_are_named(trained, tmp_path):
    checkpoint = torch.load(trained, weights_only=True)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    (tmp_path / "cut.pth").write_bytes(trained.read_bytes()[:1000])
    checkpoint["args"]["backbone"] = "resnet34"
    torch.save(checkpoint, tmp_path / "mixed.pth")
    for name, words in (("none.pth", "none.pth does not exist"), ("cut.pth", "cut.pth: cannot be read"),
                        ("other.pth", "other.pth: not a detector that is known"),
                        ("mixed.pth", "mixed.pth: its weights do not fit")):
        with pytest.raises(WeightsError, match=words):
            load_model(tmp_path / name)


def first_images(dataset, count):
    """The first images of a dataset."""
    boxes = slice(0, dataset.box_slice(count).start)
    part = DetectionDataset(
        names=dataset.names, category_ids=dataset.category_ids, image_ids=dataset.image_ids[:count],
        paths=dataset.paths[:count], sizes=dataset.sizes[:count], boxes=dataset.boxes[boxes],
        classes=dataset.classes[boxes], areas=dataset.areas[boxes], crowd=dataset.crowd[boxes],
        difficult=dataset.difficult[boxes], image_index=dataset.box_image[boxes])
    part.image = dataset.image
    return part


def test_detections_do_not_depend_on_the_batch_size(trained):
    model, _ = load_model(trained)
    model.score_threshold = 0.01
    dataset, place = first_images(open_dataset("shapes", "val"), 12), Place(torch.device("cpu"))
    (one, timing), (many, _) = (detect(model, dataset, place, EvalSettings(128, 128, size, workers=0))
                                for size in (1, 5))
    assert len(one) == len(many) > 0 and set(timing) == {"loading", "network", "post-processing"}
    for a in one:  # after three steps scores are nearly equal, so the order may differ
        assert any(a["image_id"] == b["image_id"] and a["category_id"] == b["category_id"]
                   and a["bbox"] == pytest.approx(b["bbox"], abs=2e-3)
                   and a["score"] == pytest.approx(b["score"], abs=2e-6) for b in many)
    assert all(isinstance(v, (int, float)) for v in one[0]["bbox"])


def test_the_command_scores_writes_and_rescores(trained, in_process, tmp_path):
    low = ("--score-threshold", 0.009)  # after three steps every score is near the prior 0.01
    out = in_process(evaluate.main, "--ckpt", trained, "--out", tmp_path / "a", "--pictures", 2, *low)
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all" in out and "post-processing" in out
    first = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert len(list((tmp_path / "a" / "pictures").iterdir())) == 2
    out = in_process(evaluate.main, "--detections", tmp_path / "a" / "detections.json", "--data", "shapes",
                     "--split", "val", "--out", tmp_path / "b", "--worst", 3)
    assert "images with the lowest F1" in out and len(list((tmp_path / "b" / "worst").iterdir())) == 3
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    assert all(first[key] == again[key] for key in METRICS)


@pytest.mark.slow
def test_every_image_is_counted_once_by_any_number_of_ranks(trained, script, tmp_path):
    results = []
    for ranks in (1, 2, 3):
        code, out, err = script("evaluate.py", "--ckpt", trained, "--out", tmp_path / "out", "--pictures", 0,
                                "--score-threshold", 0.009, ranks=ranks)
        assert code == 0, err
        results.append(json.loads((tmp_path / "out" / "detections.json").read_text()))
    assert results[0] == results[1] == results[2] != []


def test_one_image_in_python_is_detected_as_by_the_command(in_process, trained, tmp_path):
    (tmp_path / "photos").mkdir()
    photo = Image.effect_noise((300, 200), 90).convert("RGB")
    photo.getexif()[274] = 6  # to be turned by 90 degrees
    photo.save(tmp_path / "photos" / "a.png", exif=photo.getexif())
    in_process(evaluate.main, "--ckpt", trained, "--images", "photos", "--out", "out",
               "--score-threshold", 0.01)
    expected = json.loads((tmp_path / "out" / "detections.json").read_text())
    model, info = load_model(trained)
    model.score_threshold = 0.01
    for image in (tmp_path / "photos" / "a.png", str(tmp_path / "photos" / "a.png"), Image.open(
            tmp_path / "photos" / "a.png")):
        found = detect_image(model, info, image)
        assert len(found) == len(expected) > 0
        for ours, theirs in zip(found, expected):
            x, y, w, h = theirs["bbox"]
            assert ours["box"] == pytest.approx([x, y, x + w, y + h], abs=2e-3)
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6) and ours["name"] in info["names"]
    with pytest.raises(TypeError, match="a path or a Pillow image.*not ndarray"):
        detect_image(model, info, np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="b.jpg: there is no such image file"):
        detect_image(model, info, tmp_path / "b.jpg")


def test_recall_of_proposals(in_process, mistake, trained, tmp_path):
    train_small(tmp_path / "rcnn", "--model", "faster_rcnn", "--max-steps", 2, "--batch-size", 2)
    out = in_process(evaluate.main, "--ckpt", "rcnn/last.pth", "--proposals-recall", "--workers", 0)
    recall = json.loads((tmp_path / "rcnn" / "proposals_recall.json").read_text())
    assert 0 < recall["AR100"] == recall["AR1000"] and f"AR100 {recall['AR100']:.4f}" in out
    assert not (tmp_path / "rcnn" / "metrics.json").exists()
    line = mistake(evaluate.main, "--ckpt", trained, "--proposals-recall", "--out", "x")
    assert "--proposals-recall is for two-stage detectors" in line


def test_a_folder_of_images_is_drawn(trained, in_process, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("one.png", "two.jpg"):
        Image.new("RGB", (90, 70), "grey").save(tmp_path / "photos" / name)
    in_process(evaluate.main, "--ckpt", trained, "--images", tmp_path / "photos", "--out", tmp_path / "d",
               "--device", "cpu", "--workers", 0)
    assert sorted(p.stem for p in (tmp_path / "d" / "pictures").iterdir()) == ["one", "two"]
    assert isinstance(read_results(tmp_path / "d" / "detections.json"), list)


def test_broken_images_are_skipped_and_the_exit_says_so(trained, script, tmp_path):
    for name in ("a_b.png", "a/b.png", "deep/er/c.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70), "grey").save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "empty.jpg").touch()
    code, out, err = script("evaluate.py", "--ckpt", trained, "--images", "photos", "--out", "found",
                            "--workers", 0, "--max-detections", 3, "--score-threshold", 0.001,
                            "--nms-threshold", 0.3)
    assert code == 1
    assert err.strip() == "error: 1 images could not be read and were skipped; the other 3 are done"
    assert "skipped: photos/empty.jpg: cannot be read as an image" in out
    assert "detecting in 3 images: 3 done" in out
    results = read_results(tmp_path / "found" / "detections.json")
    assert {r["image_id"] for r in results} == {"a_b.png", "a/b.png", "deep/er/c.png"} and len(results) == 9
    described = json.loads((tmp_path / "found" / "classes.json").read_text())
    assert described["categories"][0] == {"id": 1, "name": "disc"} and len(described["categories"]) == 8
    assert described["settings"]["max_detections"] == 3 and described["settings"]["nms_threshold"] == 0.3
    assert len(described["skipped"]) == 1
    assert len(list((tmp_path / "found" / "pictures").iterdir())) == 3  # "a/b" and "a_b" are two files


@pytest.mark.parametrize(("words", "message"), [
    (["--ckpt", "no.pth"], "error: checkpoint no.pth does not exist"),
    (["--detections", "no.json", "--data", "shapes", "--split", "val"],
     "error: no.json: cannot be read as detections"),
    ([], "give --ckpt, or --detections together with --data"),
    (["--ckpt", "CKPT", "--min-size", "-5"], "--min-size must be positive"),
    (["--ckpt", "CKPT", "--data", "nowhere"], "error: data folder nowhere does not exist"),
    (["--ckpt", "CKPT", "--images", "nowhere"], "error: nowhere: no images"),
])
def test_mistakes_end_in_one_line(trained, mistake, words, message):
    assert message in mistake(evaluate.main, *[trained if w == "CKPT" else w for w in words])

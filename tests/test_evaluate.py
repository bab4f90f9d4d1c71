import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import evaluate
from backbone import WeightsError
from data import DataError, DetectionDataset, open_dataset
from evaluate import METRICS, detect, draw, load_model, read_results, score, voc_ap50, write_json


def dataset_of(boxes, classes, images, sizes=((100, 100),) * 3, difficult=None, voc=False, names=("a", "b")):
    """A dataset without pictures, with sparse category ids 5 and 90."""
    boxes, count = np.array(boxes, float).reshape(-1, 4), len(classes)
    return DetectionDataset(names, [5, 90][:len(names)], np.arange(len(sizes)) + 11, ["x.jpg"] * len(sizes),
                            sizes, boxes, classes, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
                            np.zeros(count, bool), np.zeros(count, bool) if difficult is None else difficult,
                            images, voc=voc)


def found(image_id, box, score, category=5):
    x1, y1, x2, y2 = box
    return {"image_id": image_id, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


# ---------------------------------------------------------------------------- COCO scores

def test_perfect_detections_score_one():
    boxes = [[10, 10, 30, 30], [40, 40, 90, 90], [0, 0, 20, 50]]
    dataset = dataset_of(boxes, [0, 1, 0], [0, 0, 1])
    metrics = score(dataset, [found(11, boxes[0], 0.9), found(11, boxes[1], 0.8, 90),
                              found(12, boxes[2], 0.7)])
    assert metrics["AP"] == metrics["AP50"] == pytest.approx(1.0)
    assert metrics["per_class"] == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    assert metrics["APl"] is None  # nothing is larger than 96 x 96
    assert set(METRICS) <= set(metrics)


def test_classes_without_objects_are_not_counted():
    metrics = score(dataset_of([[10, 10, 30, 30]], [0], [0]), [found(11, [10, 10, 30, 30], 0.9)])
    assert (metrics["per_class"] == {"a": pytest.approx(1.0), "b": None}
            and metrics["AP"] == pytest.approx(1.0))


def test_category_order_of_the_model_does_not_mix_up_classes():
    boxes = [[10, 10, 30, 30], [40, 40, 90, 90]]
    dataset = dataset_of(boxes, [0, 1], [0, 0])
    dataset.category_ids = [90, 5]
    metrics = score(dataset, [found(11, boxes[0], 0.9, 90)])
    assert metrics["per_class"] == {"a": pytest.approx(1.0), "b": 0.0}


def test_scores_equal_pycocotools_on_the_file_itself(coco_mini):
    path = coco_mini / "annotations" / "instances_val2017.json"
    truth = COCO(str(path))
    rng = np.random.default_rng(0)
    results = []
    for a in truth.dataset["annotations"]:  # shifted objects, some of another class, and noise
        x, y, w, h = np.array(a["bbox"]) + rng.normal(0, 3, 4)
        category = a["category_id"] if rng.random() < 0.8 else 1
        results.append({"image_id": a["image_id"], "category_id": category, "score": float(rng.random()),
                        "bbox": [float(v) for v in (x, y, max(w, 1), max(h, 1))]})
    reference = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    metrics = score(open_dataset(str(coco_mini), "val2017"), results)
    assert [metrics[key] for key in METRICS] == pytest.approx(reference.stats.tolist(), abs=1e-12)
    assert 0.1 < metrics["AP"] < 0.9


def test_no_detections_give_zero_and_a_warning(capsys):
    metrics = score(dataset_of([[10, 10, 30, 30]], [0], [0]), [])
    assert metrics["per_class"] == {"a": 0.0, "b": None} and metrics["APl"] is None
    assert metrics["AP"] == 0.0 and "not a single detection" in capsys.readouterr().out


def test_foreign_detections_are_refused():
    dataset = dataset_of([[10, 10, 30, 30]], [0], [0])
    for change, words in (({"image_id": 99}, "image_id 99"), ({"category_id": 7}, "category_id 7"),
                          ({"image_id": [11]}, "image_id .11."), ({"bbox": None}, "bbox None"),
                          ({"bbox": [0, 0, float("nan"), 5]}, "bbox .0, 0, nan"),
                          ({"score": "0.5"}, "score '0.5'"),
                          ({"bbox": [0, 0, -3, 5]}, "bbox .0, 0, -3, 5. is not")):
        with pytest.raises(DataError, match=words):
            score(dataset, [{**found(11, [0, 0, 5, 5], 0.5), **change}])
    with pytest.raises(DataError, match="lacks bbox"):
        score(dataset, [{"image_id": 11, "category_id": 5, "score": 1.0}])


# ---------------------------------------------------------------------------- VOC scores

def test_voc_ap_by_hand():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    dataset = dataset_of(boxes, [0] * 4, [0] * 4, difficult=[False, False, False, True], voc=True,
                         names=("a",))
    results = [found(11, boxes[0], 0.9),             # hit: precision 1, recall 1/3
               found(11, [0, 0, 10, 9], 0.8),        # the same object again: precision 1/2
               found(11, boxes[3], 0.75),            # a difficult one: does not count
               found(11, [20, 0, 30, 12], 0.7),      # IoU 100/120: hit, precision 2/3, recall 2/3
               found(11, [40, 0, 60, 10], 0.6)]      # IoU exactly 0.5: no hit, precision 2/4
    # Area under the envelope: 1/3 * 1 + 1/3 * 2/3 = 5/9. Eleven points: 4 of them (0 .. 0.3) at 1, 3
    # (0.4 .. 0.6) at 2/3, the others at 0.
    assert voc_ap50(dataset, results, eleven_point=False)["a"] == pytest.approx(5 / 9)
    assert voc_ap50(dataset, results, eleven_point=True)["a"] == pytest.approx((4 + 3 * 2 / 3) / 11)
    metrics = score(dataset, results)
    assert metrics["AP50_VOC"] == pytest.approx(5 / 9) and metrics["AP50_VOC07"] == pytest.approx(6 / 11)


def test_voc_scores_equal_the_published_evaluator(tmp_path):
    golden = SHARED / "golden"
    if not golden.is_dir():
        pytest.skip(f"{golden} is absent (set DETECTION_SHARED)")
    shutil.copy(golden / "make_tiny_datasets.py", tmp_path)
    shutil.copy(golden / "defrcn_rules.py", tmp_path / "golden_rules.py")
    subprocess.run([sys.executable, "make_tiny_datasets.py"], cwd=tmp_path, check=True)
    record = json.loads((golden / "fewshot_data.json").read_text())
    names = record["voc_classes"]["1"]["all"]
    expected = record["evaluators"]["voc_2007_test_all1"]
    dataset = open_dataset(str(tmp_path / "datasets"), "2007_test", names=names)
    # The official evaluator writes its detections with one decimal, and scores with three, before
    # it reads them.
    results = [found(image["image_id"], [round(b, 1) for b in (box[0] + 1, box[1] + 1, box[2], box[3])],
                     round(s, 3), dataset.category_ids[c])
               for image in expected["detections_xyxy"]
               for box, s, c in zip(image["boxes"], image["scores"], image["classes"])]
    for result in results:  # back from pixels counted from 1
        result["bbox"] = [result["bbox"][0] - 1, result["bbox"][1] - 1,
                          result["bbox"][2] + 1, result["bbox"][3] + 1]
    average = voc_ap50(dataset, results, eleven_point=True)
    # It counts a class without objects as 0; the other eleven of the twenty must agree.
    known = [value for value in average.values() if value is not None]
    assert 100 * sum(known) / 20 == pytest.approx(expected["result"]["AP50"], abs=1e-9) and len(known) == 11


# ---------------------------------------------------------------------------- files

@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of three training steps on shapes."""
    out = tmp_path_factory.mktemp("run")
    subprocess.run([sys.executable, str(evaluate.Path(evaluate.__file__).parent / "train.py"),
                    "--max-steps", "3", "--batch-size", "4", "--no-eval", "--device", "cpu", "--workers", "0",
                    "--out", str(out)],
                   check=True, capture_output=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
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


def subset(dataset, count):
    """The first images of shapes' validation split."""
    last = dataset.first[count]
    part = DetectionDataset(dataset.names, dataset.category_ids, dataset.image_ids[:count],
                            dataset.paths[:count], dataset.sizes[:count], dataset.boxes[:last],
                            dataset.classes[:last], dataset.areas[:last], dataset.crowd[:last],
                            dataset.difficult[:last],
                            np.repeat(np.arange(count), np.diff(dataset.first[:count + 1])))
    part.image = dataset.image
    return part


def test_detections_do_not_depend_on_the_batch_size(trained):
    model, _ = load_model(trained)
    model.score_threshold = 0.01
    dataset = subset(open_dataset("shapes", "val"), 12)
    (one, timing), (many, _) = (detect(model, dataset, torch.device("cpu"), 128, 128, size, workers=0)
                                for size in (1, 5))
    assert len(one) == len(many) > 0 and set(timing) == {"loading", "network", "post-processing"}
    for a in one:  # after three steps scores are nearly equal, so the order may differ
        assert any(a["image_id"] == b["image_id"] and a["category_id"] == b["category_id"]
                   and a["bbox"] == pytest.approx(b["bbox"], abs=2e-3)
                   and a["score"] == pytest.approx(b["score"], abs=2e-6) for b in many)
    assert all(isinstance(v, (int, float)) for v in one[0]["bbox"])


def test_the_command_scores_writes_and_rescores(trained, script, tmp_path):
    low = ("--score-threshold", 0.009)  # after three steps every score is near the prior 0.01
    code, out, err = script("evaluate.py", "--ckpt", trained, "--out", tmp_path / "a", "--pictures", 2, *low)
    assert code == 0, err
    assert "Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all" in out and "post-processing" in out
    first = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert len(list((tmp_path / "a" / "pictures").iterdir())) == 2
    code, out, err = script("evaluate.py", "--detections", tmp_path / "a" / "detections.json",
                            "--data", "shapes", "--split", "val", "--out", tmp_path / "b")
    assert code == 0, err
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


def test_a_folder_of_pictures_is_drawn(trained, script, tmp_path):
    (tmp_path / "photos").mkdir()
    for name in ("one.png", "two.jpg"):
        Image.new("RGB", (90, 70), "grey").save(tmp_path / "photos" / name)
    code, out, err = script("evaluate.py", "--ckpt", trained, "--images", tmp_path / "photos",
                            "--out", tmp_path / "d")
    assert code == 0, err
    assert sorted(p.stem for p in (tmp_path / "d" / "pictures").iterdir()) == ["one.png", "two.jpg"]
    assert isinstance(read_results(tmp_path / "d" / "detections.json"), list)


@pytest.mark.parametrize(("words", "message"), [
    (["--ckpt", "no.pth"], "error: checkpoint no.pth does not exist"),
    (["--detections", "no.json", "--data", "shapes", "--split", "val"],
     "error: no.json: cannot be read as detections"),
    ([], "give --ckpt, or --detections together with --data"),
    (["--ckpt", "CKPT", "--min-size", "-5"], "--min-size must be positive"),
    (["--ckpt", "CKPT", "--data", "nowhere"], "error: data folder nowhere does not exist"),
    (["--ckpt", "CKPT", "--images", "nowhere"], "error: nowhere: no pictures"),
])
def test_mistakes_end_in_one_line(trained, mistake, words, message):
    assert message in mistake(evaluate.main, *[trained if w == "CKPT" else w for w in words])


def test_drawings_show_objects_and_detections(tmp_path):
    dataset = subset(open_dataset("shapes", "val"), 2)
    box = dataset.boxes[0].tolist()
    draw(dataset, [found(1, box, 0.9, 1), found(1, [0, 0, 5, 5], 0.1, 2)], tmp_path, 2)
    picture = np.asarray(Image.open(tmp_path / "1.png"))
    assert picture.shape == (dataset.sizes[0][0] * 4, dataset.sizes[0][1] * 4, 3)
    plain = np.asarray(dataset.image(0).resize(picture.shape[1::-1]))
    # Scores under 0.2 are not drawn.
    assert (picture != plain).any() and (picture[:8, :8] == plain[:8, :8]).all()


def test_json_files_are_whole_or_absent(tmp_path, monkeypatch):
    write_json(tmp_path / "m.json", {"AP": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "m.json", {"AP": object()})
    assert json.loads((tmp_path / "m.json").read_text()) == {"AP": 1}

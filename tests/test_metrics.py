"""metrics.py: COCO's and VOC's scores, means over groups of classes, result files."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import SHARED
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import DataError, DetectionDataset
from metrics import METRICS, group_means, read_results, score, shown, voc_scores
from shapes import open_dataset


def dataset_of(boxes, classes, images, difficult=False, voc=False, names=("a", "b")):
    """A dataset of three images without files. The image ids are 11, 12, 13, the category ids 5 and 90."""
    return DetectionDataset(names, [5, 90][:len(names)], image_ids=[11, 12, 13], paths=["x.jpg"] * 3,
                            sizes=[(100, 100)] * 3, boxes=boxes, classes=classes, image_index=images,
                            difficult=difficult, voc=voc)


def found(image_id, box, score, category=5):
    x1, y1, x2, y2 = box
    return {"image_id": image_id, "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}


# ---------------------------------------------------------------------------- COCO

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
    assert metrics["per_class"] == {"a": pytest.approx(1.0), "b": None}
    assert metrics["AP"] == pytest.approx(1.0)


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


def random_coco_set(rng, folder):
    """A COCO file with decimal coordinates, and detections whose IoUs and scores often tie."""
    images = [{"id": i, "file_name": "a.jpg", "width": 100, "height": 100} for i in (1, 2)]
    categories = [{"id": 3, "name": "a"}, {"id": 8, "name": "b"}]
    annotations, results = [], []
    for _ in range(rng.integers(1, 12)):
        x, y, w, h = (rng.integers(10, 300, 4) / 10).round(1).tolist()
        image_id, category_id = int(rng.integers(1, 3)), int(rng.choice([3, 8]))
        shift = float(rng.choice([0.1, 0.7, 3.3, w / 3]))  # w / 3: an IoU of 0.5
        for left in {x, x + float(rng.choice([0, 2 * shift]))}:  # a detection between them
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id,
                                "bbox": [left, y, w, h], "area": w * h, "iscrowd": int(rng.random() < 0.1)})
        for _ in range(rng.integers(0, 3)):
            results.append({"image_id": image_id, "category_id": category_id, "bbox": [x + shift, y, w, h],
                            "score": float(rng.choice([0.3, 0.5, 0.9]))})
    path = folder / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path, results


def test_ties_are_decided_as_by_pycocotools(tmp_path, capsys):
    for name in ("annotations", "val2017"):
        (tmp_path / name).mkdir()
    (tmp_path / "val2017" / "a.jpg").touch()
    rng = np.random.default_rng(0)
    for number in range(300):
        path, results = random_coco_set(rng, tmp_path)
        if not results:
            continue
        truth = COCO(str(path))
        reference = COCOeval(truth, truth.loadRes([dict(r) for r in results]), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
        metrics = score(open_dataset(str(tmp_path), "val2017"), results)
        expected = [None if value == -1 else value for value in reference.stats.tolist()]
        assert [metrics[key] for key in METRICS] == expected, number
        capsys.readouterr()


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


# ---------------------------------------------------------------------------- VOC

def test_voc_ap_by_hand():
    boxes = [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]]
    dataset = dataset_of(boxes, [0] * 4, [0] * 4, difficult=[False, False, False, True], voc=True,
                         names=("a",))
    results = [found(11, boxes[0], 0.9),             # hit: precision 1, recall 1/3
               found(11, [0, 0, 10, 9], 0.8),        # the same object again: precision 1/2
               found(11, boxes[3], 0.75),            # a difficult object: does not count
               found(11, [20, 0, 30, 12], 0.7),      # IoU 100/120: hit, precision 2/3, recall 2/3
               found(11, [40, 0, 61, 10], 0.6),      # IoU 100/210: no hit, precision 2/4
               found(11, [40, 0, 60, 10], 0.5)]      # IoU exactly 0.5: hit, precision 3/5, recall 1
    # Area under the envelope: 1/3 * 1 + 1/3 * 2/3 + 1/3 * 3/5 = 34/45. Eleven points: 4 of them (0 .. 0.3) at
    # 1, 3 (0.4 .. 0.6) at 2/3, 4 (0.7 .. 1) at 3/5.
    metrics = score(dataset, results)
    assert metrics["AP50_VOC"] == metrics["per_class_AP50_VOC"]["a"] == pytest.approx(34 / 45)
    assert metrics["AP50_VOC07"] == pytest.approx((4 + 2 + 12 / 5) / 11)
    # At the six IoUs from 0.55 to 0.8 the last detection is wrong, at the three from 0.85 on the fourth too.
    assert metrics["AP75_VOC07"] == pytest.approx((4 + 2) / 11)
    assert metrics["AP_VOC07"] == pytest.approx((8.4 + 6 * 6 + 3 * 4) / 11 / 10)


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
    # The official evaluator writes its detections with one decimal and its scores with three, and then reads
    # them back.
    results = [found(image["image_id"], [round(b, 1) for b in (box[0] + 1, box[1] + 1, box[2], box[3])],
                     round(s, 3), dataset.category_ids[c])
               for image in expected["detections_xyxy"]
               for box, s, c in zip(image["boxes"], image["scores"], image["classes"])]
    for result in results:  # back from pixels counted from 1
        result["bbox"] = [result["bbox"][0] - 1, result["bbox"][1] - 1,
                          result["bbox"][2] + 1, result["bbox"][3] + 1]
    # It counts a class without objects as 0; the other eleven of the twenty must agree.
    for key in ("AP", "AP50", "AP75"):
        values = [v for v in voc_scores(dataset, results)[f"{key}_VOC07"].values() if v is not None]
        assert len(values) == 11
        assert 100 * sum(values) / 20 == pytest.approx(expected["result"][key], abs=1e-9)


# ---------------------------------------------------------------------------- groups of classes, files

def test_novel_and_base_scores_are_means_over_their_classes():
    per_class = {"a": 0.2, "b": 0.4, "c": None, "d": 0.9}
    metrics = {key: per_class for key in ("per_class", "per_class_AP50", "per_class_AP75")}
    means = group_means(metrics, {"n": ["b", "c", "d"], "b": ["a"]})
    assert list(means) == ["nAP", "nAP50", "nAP75", "bAP", "bAP50", "bAP75"]
    assert means["nAP"] == pytest.approx(0.65) and means["bAP50"] == pytest.approx(0.2)
    assert group_means(metrics, {"n": list(per_class), "b": []})["bAP"] is None
    metrics |= {"AP50_VOC07": 0.5, "per_class_AP50_VOC07": {**per_class, "a": 0.6}}
    means = group_means(metrics, {"n": ["b"], "b": ["a"]})
    assert means["nAP50_VOC07"] == pytest.approx(0.4) and means["bAP50_VOC07"] == pytest.approx(0.6)
    assert shown(0.65) == "0.6500" and shown(None) == "n/a"


def test_result_files_are_read_or_named(tmp_path):
    path = tmp_path / "detections.json"
    path.write_text("\ufeff" + json.dumps([found(11, [0, 0, 5, 5], 0.5)]), encoding="utf-8")
    assert read_results(path)[0]["bbox"] == [0, 0, 5, 5]
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match="detections.json: not COCO result format"):
        read_results(path)
    path.write_text("[")
    with pytest.raises(DataError, match="detections.json: cannot be read as detections"):
        read_results(path)

"""Schedules, the table over seeds, and the calibration of a results file."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, DetectionDataset
from evaluate import as_in_file
from fewshot import Calibration, schedule
from protocol import aggregate, aggregate_table, read_run, read_runs
from runtime import Place

# ---------------------------------------------------------------------------- schedules and tables

def test_published_schedules():
    assert schedule(voc=False, shots=None, generalized=False) == (110_000, (85_000, 100_000))
    assert schedule(voc=True, shots=None, generalized=False) == (15_000, (10_000, 13_300))
    assert schedule(voc=False, shots=30, generalized=True) == (12_000, (9_600,))
    assert schedule(voc=True, shots=10, generalized=False) == (4_000, (3_200,))
    assert schedule(voc=False, shots=4, generalized=False) == schedule(voc=False, shots=5, generalized=False)


def run_of(seed, n_ap, shots=1, **changes):
    few_shot = {"data": "coco", "model": "defrcn", "generalized": False, "shots": shots, "stage": "novel",
                "decouple": [0.0, 0.01], "novel": ["a"], "backbone": "r", "cosine": False,
                "calibrated": False, "seed": seed, "nAP": n_ap, "nAP50": 0.2, "nAP75": None, "bAP": None,
                "bAP50": None, **changes}
    return read_run(f"run {seed} {changes}", {"AP": 0.5, "few_shot": few_shot})


def test_the_table_gives_mean_and_interval():
    values = [0.10, 0.12, 0.17]
    rows = aggregate([run_of(seed, v) for seed, v in enumerate(values)] + [run_of(0, 0.3, shots=10)])
    assert [row["shots"] for row in rows] == [1, 10] and rows[0]["seeds"] == [0, 1, 2]
    # 1.96 * population standard deviation / sqrt(3), the deviation of 10, 12, 17 being sqrt(26 / 3).
    assert rows[0]["nAP"] == pytest.approx([0.13, 1.96 * (26 / 3) ** 0.5 / 3 ** 0.5 / 100])
    assert rows[1]["nAP"] == [0.3, None] and "nAP75" not in rows[0] and "bAP" not in rows[0]
    table = aggregate_table(rows)
    assert " 13.00 ± 3.33" in table and "FSOD" in table and "0, 0.01" in table and "bAP" not in table
    assert " 30.00  " in table and table.count("±") == 3  # a single run has no interval
    with pytest.raises(DataError, match="run 0 {} and run 0 {} have the same setting and seed, 0"):
        aggregate([run_of(0, 0.1), run_of(0, 0.2)])
    with pytest.raises(DataError, match="x: has no scores of --stage novel"):
        read_run("x", {"AP": 0.5})


def test_protocols_and_calibration_have_rows_of_their_own(tmp_path):
    own = [run_of(seed, 0.1 * seed, shot_seed=seed) for seed in range(3)]
    fixed = [run_of(seed, 0.2, shot_seed=0) for seed in (1, 2)]
    rows = aggregate(own + fixed)
    assert [(row["lists"], row["seeds"]) for row in rows] == [("own", [0, 1, 2]), (0, [0, 1, 2])]
    assert rows[0]["nAP"][0] == pytest.approx(0.1) and rows[1]["nAP"][0] == pytest.approx(0.4 / 3)
    assert [row["lists"] for row in aggregate(own[:1] + fixed)] == [0]
    rows = aggregate(own + [run_of(0, 0.5, shot_seed=0, calibrated=True)])
    assert [row["calibrated"] for row in rows] == [False, True]
    assert [line.split()[5] for line in aggregate_table(rows).splitlines()[1:]] == ["no", "yes"]
    # A calibrated run has a row for its detections before the calibration too.
    scores = [{"AP": ap, "few_shot": {**run_of(0, ap, calibrated=done).setting, "stage": "novel",
                                      "seed": 0, "nAP": ap}} for ap, done in ((0.3, True), (0.2, False))]
    for content, rows in (({**scores[0], "before_calibration": scores[1]}, [(False, 0.2), (True, 0.3)]),
                          (scores[1], [(False, 0.2)])):
        (tmp_path / "metrics.json").write_text(json.dumps(content))
        found = aggregate(read_runs([tmp_path]))
        assert [(row["calibrated"], row["nAP"][0]) for row in found] == rows


@pytest.mark.parametrize("few_shot", [3, [], {"stage": "novel"}, *(
    {"seed": 0, "stage": "novel", **run_of(0, 0.1).setting, **change} for change in (
        {"seed": "0"}, {"seed": True}, {"nAP": "0.1"}, {"decouple": [1]}, {"decouple": 7}, {"novel": 5},
        {"novel": [None]}, {"data": None}, {"shots": 1.5}))])
def test_damaged_scores_are_named(few_shot):
    with pytest.raises(DataError, match="^runs/a: "):
        read_run("runs/a", {"AP": 0.5, "few_shot": few_shot})


# ---------------------------------------------------------------------------- calibration of a results file

class MeanColour(torch.nn.Module):
    """Stands in for the ImageNet classifier: the mean colour inside a box describes it."""

    def forward(self, image, boxes):
        rows = [image[:, int(y1):int(y2), int(x1):int(x2)].float().mean(dim=(1, 2))
                for x1, y1, x2, y2 in boxes.tolist()]
        return torch.stack(rows)


def coloured(names, boxes, classes, colours):
    """One grey 40 x 40 image with coloured boxes, as a dataset."""
    pixels = np.full((40, 40, 3), 100, np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, colours):
        pixels[y1:y2, x1:x2] = colour
    none = np.zeros(len(boxes), bool)
    dataset = DetectionDataset(
        names=names, category_ids=[5, 90], image_ids=[7], paths=["x.png"], sizes=[(40, 40)], boxes=boxes,
        classes=classes, areas=np.full(len(boxes), 100), crowd=none, difficult=none,
        image_index=[0] * len(boxes))
    dataset.image = lambda index: Image.fromarray(pixels)
    return dataset


def test_scores_of_novel_classes_meet_their_prototypes():
    red, green = (200, 0, 0), (0, 200, 0)
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    support = coloured(["a", "b"], boxes, [0, 1], [red, green])
    calibration = Calibration(MeanColour(), support, ["a"], Place(torch.device("cpu")))
    # Class a is red. Found: a red and a green "a", a green "b" (base), one below the window.
    found = [{"image_id": 7, "category_id": category, "bbox": [x, x, 10, 10], "score": score}
             for category, x, score in ((5, 0, 0.4), (5, 20, 0.9), (90, 20, 0.6), (5, 0, 0.05))]
    test = coloured(["a", "b"], boxes, [0, 1], [red, green])
    new = calibration(test, found)
    assert calibration(test, []) == []
    # Cosines 1 and 0: 0.5 * 0.4 + 0.5 = 0.7 and 0.5 * 0.9 = 0.45; the others keep their scores.
    new = [(r["category_id"], r["bbox"][0], r["score"]) for r in as_in_file(test, new)]
    assert new == [(5, 0, 0.7), (90, 20, 0.6), (5, 20, 0.45), (5, 0, 0.05)]


def test_weight_and_window_of_the_calibration():
    red, green = (200, 0, 0), (0, 200, 0)
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    support = coloured(["a", "b"], boxes, [0, 1], [red, green])
    calibration = Calibration(MeanColour(), support, ["a"], Place(torch.device("cpu")), 0.25, (0.3, 0.5))
    found = [{"image_id": 7, "category_id": 5, "bbox": [0, 0, 10, 10], "score": score}
             for score in (0.4, 0.6, 0.2)]
    scores = [result["score"] for result in as_in_file(support, calibration(support, found))]
    assert scores == [0.85, 0.6, 0.2]  # 0.25 * 0.4 + 0.75; the others lie outside the window


def test_scores_are_calibrated_before_they_are_rounded():
    red, green = (200, 0, 0), (0, 200, 0)
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    support = coloured(["a", "b"], boxes, [0, 1], [red, green])
    calibration = Calibration(MeanColour(), support, ["a"], Place(torch.device("cpu")))
    found = {"image_id": 7, "category_id": 5, "bbox": [0.0004, 0.0, 10.0004, 10.0], "score": 0.4000007}
    assert calibration(support, [found])[0]["score"] == pytest.approx(0.70000035, abs=5e-8)
    written, = as_in_file(support, [found])
    assert written["bbox"] == [0.0, 0.0, 10.0, 10.0] and written["score"] == 0.400001

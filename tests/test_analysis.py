"""analysis.py: precision over recall, the worst images, the recall of proposals."""
import numpy as np
import pytest
from test_metrics import dataset_of, found

import analysis
from analysis import image_errors, precision_recall, proposal_recall
from draw import draw_precision_recall


def test_the_threshold_with_the_best_f1_by_hand(tmp_path):
    boxes = [[10, 10, 30, 30], [40, 40, 60, 60], [70, 10, 90, 30]]
    dataset = dataset_of(boxes, [0, 0, 0], [0, 0, 0])
    results = [found(11, boxes[0], 0.9), found(11, boxes[1], 0.7), found(11, [0, 70, 9, 90], 0.6),
               found(11, [0, 40, 9, 60], 0.5), found(11, [20, 70, 29, 90], 0.45), found(11, boxes[2], 0.4)]
    curves = precision_recall(dataset, results)
    # F1: 0.5 from 0.9 on, 0.8 from 0.7 on, 2 / (1 + 6 / 3) = 0.667 with all six.
    assert curves["a"]["threshold"] == pytest.approx(0.7)
    assert curves["a"]["f1"] == pytest.approx(0.8, abs=0.01)
    assert curves["b"]["threshold"] is None and len(curves["b"]["recall"]) == 101
    pytest.importorskip("matplotlib")
    draw_precision_recall(curves, tmp_path / "pr.png")
    assert (tmp_path / "pr.png").stat().st_size > 5000


def test_errors_of_an_image_by_hand(tmp_path):
    boxes = [[10, 10, 30, 30], [40, 40, 60, 60], [70, 10, 90, 30], [0, 50, 30, 90], [50, 70, 90, 99]]
    dataset = dataset_of(boxes, [0, 1, 0, 0, 0], [0, 0, 0, 0, 1], difficult=np.arange(5) == 3)
    results = [found(11, boxes[0], 0.9), found(11, [11, 10, 30, 30], 0.8), found(11, boxes[1], 0.7),
               found(11, [0, 0, 9, 9], 0.6), found(11, boxes[3], 0.55), found(11, boxes[2], 0.3),
               found(12, boxes[4], 0.9)]
    images = image_errors(dataset, results, {"a": 0.5, "b": None})
    assert [image.index for image in images] == [0, 1, 2]
    # Found: one object of three (the difficult one needs not be). Wrong: doubled, taken for a, false.
    assert images[0].f1 == pytest.approx(2 * 1 / (2 * 1 + 3 + 2)) and images[0].missed == [1, 2]
    assert [what for _, what in images[0].found] == ["", "doubled", "is a b", "false", ""]
    assert images[1].f1 == 1 and images[2].f1 == 1 and images[2].found == []
    assert image_errors(dataset, [], {"a": 0.5, "b": 0.5})[0].f1 == 0


def test_recall_of_proposals_by_hand(monkeypatch):
    boxes = [[10, 10, 30, 30], [40, 40, 90, 90], [0, 0, 99, 99]]  # small, medium, large, of both classes
    dataset = dataset_of(boxes, [0, 1, 0], [0, 0, 1])
    proposals = [found(11, [10, 10, 30, 30], 0.9, 90), found(11, [40, 40, 90, 80], 0.8)]  # IoU 1 and 0.8
    proposals += [found(12, [i, 0, i + 1, 1], 1 - i / 1000) for i in range(99)]
    recall = proposal_recall(dataset, proposals + [found(12, [0, 0, 99, 99], 0.1)])
    # IoUs 0.5 to 0.95: the small object is found at 10 of 10, the medium one at 7, the large one at 10.
    assert recall["ARs1000"] == pytest.approx(1.0) and recall["ARm1000"] == pytest.approx(0.7)
    assert recall["ARl1000"] == pytest.approx(1.0)
    assert recall["AR100"] == recall["AR1000"] == pytest.approx(2.7 / 3)
    crowded = proposals + [found(12, [i, 2, i + 1, 3], 0.5) for i in range(9)]
    recall = proposal_recall(dataset, crowded + [found(12, [0, 0, 99, 99], 0.1)])
    assert recall["AR100"] == pytest.approx(1.7 / 3)  # the large object has only the 109th place
    assert recall["AR300"] == pytest.approx(2.7 / 3)
    monkeypatch.setattr(analysis, "RECALL_IMAGES", 1)
    assert proposal_recall(dataset, crowded + [found(12, [0, 0, 99, 99], 0.1)]) == pytest.approx(recall)
    assert proposal_recall(dataset, [])["AR1000"] == 0
    assert proposal_recall(dataset_of([], [], []), [])["AR100"] is None

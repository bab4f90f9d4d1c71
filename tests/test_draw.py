"""draw.py: detections drawn on images, curves."""
import json
import sys

import numpy as np
import pytest
from PIL import Image

import browse
from data import DataError
from draw import class_colour, draw_detections, draw_precision_recall, file_name, file_names
from shapes import open_dataset


def test_drawings_show_objects_and_detections(tmp_path):
    dataset = open_dataset("shapes", "val")
    x1, y1, x2, y2 = dataset.boxes[0].tolist()
    draw_detections(dataset, [{"image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                               "score": 0.9},
                              {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.1}],
                    tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png"]
    drawn = np.asarray(Image.open(tmp_path / "1.png"))
    assert drawn.shape == (dataset.sizes[0][0] * 4, dataset.sizes[0][1] * 4, 3)
    plain = np.asarray(dataset.image(0).resize(drawn.shape[1::-1]))
    # Scores under 0.2 are not drawn.
    assert (drawn != plain).any() and (drawn[:8, :8] == plain[:8, :8]).all()
    assert (drawn == class_colour(0)).all(axis=-1).any() and not (drawn == class_colour(1)).all(axis=-1).any()


def test_the_classes_of_a_group_have_one_colour(tmp_path):
    dataset = open_dataset("shapes", "val")
    results = [{"image_id": 1, "category_id": category, "bbox": [20.0 * category, 20, 15, 15], "score": 0.9}
               for category in (1, 2, 3)]

    def colours(groups):
        draw_detections(dataset, results, tmp_path, 1, groups=groups)
        drawn = np.asarray(Image.open(tmp_path / "1.png"))
        return [bool((drawn == class_colour(label)).all(axis=-1).any()) for label in range(3)]

    disc, *others = dataset.names
    assert colours(None) == colours([dataset.names, []]) == [True, True, True]
    assert colours([[disc], others]) == [True, True, False]


def test_ids_with_folders_become_file_names():
    assert file_name("set/a b.JPG") == "set_a_b" and file_name("v1.2") == "v1.2" and file_name(7) == "7"
    assert file_names(["a.jpg", "A.png", "a/b", "a_b", 3]) == ["a", "A_", "a_b", "a_b_", "3"]


def test_curves_of_runs_and_of_precision(tmp_path, in_process, mistake):
    pytest.importorskip("matplotlib")
    for run, factor in (("a", 1.0), ("b", 0.5)):
        (tmp_path / run).mkdir()
        rows = [{"step": step, "epoch": 0.1, "loss": factor / step, "cls": 1.0, "lr": 0.1, "step_s": 1.0}
                for step in range(1, 9)] + [{"step": 8, "AP": factor / 2, "AP50": None, "per_class": {}}]
        (tmp_path / run / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "curves of 2 runs" in in_process(browse.main, "--log", "a", "b", "--out", "out")
    image = np.asarray(Image.open(tmp_path / "out" / "curves.png").convert("RGB")).astype(int)
    for colour in ((31, 119, 180), (255, 127, 14)):  # matplotlib's first two
        assert (abs(image - colour).max(axis=-1) < 12).sum() > 100
    rows[0] |= {"loss": 1e308, "cls": float("nan")}
    rows[1]["skipped"] = 10 ** 400
    (tmp_path / "b" / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))  # not drawn
    assert "curves of 1 runs" in in_process(browse.main, "--log", "b", "--out", "out")
    assert "c: has no log.jsonl" in mistake(browse.main, "--log", "a", "c")
    for text in ("[1]", "no", '{"step": "x", "loss": [1]}\n{"step": 1}\n3'):
        (tmp_path / "b" / "log.jsonl").write_text(text)
        assert "b/log.jsonl: is no log of train.py" in mistake(browse.main, "--log", "a", "b")


def test_missing_matplotlib_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match="curves need matplotlib: pip install matplotlib"):
        draw_precision_recall({}, tmp_path / "x.png")

import math

import numpy as np
import pytest
import torch
from PIL import Image

import browse
from browse import PANEL, draw_levels, draw_targets
from data import open_dataset
from evaluate import class_colour
from fsaf import FSAF


def test_boxes_and_targets_are_drawn(script, tmp_path):
    for words, name in (((), "1.png"), (("--targets",), "1_targets.png")):
        code, out, err = script("browse.py", "--count", 2, "--out", "out", *words)
        assert code == 0, err
        assert "heart" in out and "2 drawings in out" in out and (tmp_path / "out" / name).exists()


def test_each_level_has_a_panel_and_dots_only_where_points_are_positive():
    dataset = open_dataset("shapes", "val")
    empty = int(np.flatnonzero(np.diff(dataset.first) == 0)[0])
    for index, dotted in ((empty, False), (0, True)):
        picture = np.asarray(draw_targets(dataset, index, 96, 128, original=False))
        height, width = dataset.sizes[index]
        panel = round(width * PANEL / max(height, width))
        assert picture.shape[1] == 5 * panel + 4 * 4
        plain = np.asarray(dataset.image(index).resize((panel, picture.shape[0])))
        below_the_text = picture[40:, :panel] != plain[40:]
        assert below_the_text.any() == dotted


def test_an_object_has_the_colour_of_the_level_that_predicts_it_best():
    dataset = open_dataset("shapes", "val")
    model = FSAF(8, "resnet18", fpn_channels=64).eval()
    torch.nn.init.zeros_(model.head.tblr.weight)
    # Where every cell predicts the same, sides of a stride each way, the level is that of the object's size:
    # 2 strides. The objects of picture 0 are larger than 16 px and smaller than 256.
    torch.nn.init.constant_(model.head.tblr.bias, 0.25)
    picture, chosen = draw_levels(model, dataset, 0, 128, 128)
    objects = dataset.boxes[dataset.first[0]:dataset.first[1]]
    assert len(chosen) == len(objects) > 0
    for (level, side), box in zip(chosen, objects):
        assert side == pytest.approx(math.sqrt((box[2] - box[0]) * (box[3] - box[1])), rel=1e-3)
        assert abs(level - math.log2(side / 16)) < 1.5
        assert (np.asarray(picture) == class_colour(level)).all(-1).any()
    empty = int(np.flatnonzero(np.diff(dataset.first) == 0)[0])
    assert draw_levels(model, dataset, empty, 128, 128)[1] == []


def test_mistakes_end_in_one_line(mistake, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "neither COCO layout" in mistake(browse.main, "--data", tmp_path)
    assert "not both" in mistake(browse.main, "--targets", "--levels", "x.pth")
    assert "checkpoint x.pth does not exist" in mistake(browse.main, "--levels", "x.pth")

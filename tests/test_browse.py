"""browse.py: boxes, targets and selected levels, drawn."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import browse
from browse import GAP, PANEL, draw_levels, draw_targets, level_table
from draw import class_colour
from fsaf import FSAF
from shapes import open_dataset


def test_boxes_and_targets_are_drawn(in_process, tmp_path):
    out = in_process(browse.main, "--count", 2, "--out", "out")
    assert "heart" in out and "2 drawings in out" in out and (tmp_path / "out" / "1.png").exists()
    out = in_process(browse.main, "--split", "val", "--count", 2, "--out", "out", "--targets")
    assert "heart" in out and "2 drawings in out" in out and (tmp_path / "out" / "1_targets.png").exists()


def test_each_level_has_a_panel_and_dots_only_where_points_are_positive():
    dataset = open_dataset("shapes", "val")
    empty = int(np.flatnonzero(np.diff(dataset.box_offsets) == 0)[0])
    for index, dotted in ((empty, False), (0, True)):
        image = np.asarray(draw_targets(dataset, index, 96, 128, original=False))
        height, width = dataset.sizes[index]
        panel = round(width * PANEL / max(height, width))
        assert image.shape[1] == 5 * panel + 4 * GAP
        plain = np.asarray(dataset.image(index).resize((panel, image.shape[0])))
        below_the_text = image[40:, :panel] != plain[40:]
        assert below_the_text.any() == dotted


def test_an_object_has_the_colour_of_the_level_that_predicts_it_best():
    dataset = open_dataset("shapes", "val")
    model = FSAF(8, "resnet18", fpn_channels=64).eval()
    torch.nn.init.zeros_(model.head.tblr.weight)
    # Every cell predicts the same, sides of one stride each way. The level of an object is then that of its
    # size, 2 strides. The objects of image 0 are larger than 16 px and smaller than 256.
    torch.nn.init.constant_(model.head.tblr.bias, 0.25)
    image, selected = draw_levels(model, dataset, 0, 128, 128)
    objects = dataset.boxes[dataset.box_slice(0)]
    assert len(selected) == len(objects) > 0
    for (level, side), box in zip(selected, objects):
        assert side == pytest.approx(math.sqrt((box[2] - box[0]) * (box[3] - box[1])), rel=1e-3)
        assert abs(level - math.log2(side / 16)) < 1.5
        assert (np.asarray(image) == class_colour(level)).all(-1).any()
    empty = int(np.flatnonzero(np.diff(dataset.box_offsets) == 0)[0])
    assert draw_levels(model, dataset, empty, 128, 128)[1] == []


def test_the_table_counts_objects_of_every_level():
    lines = level_table([(0, 10.0), (0, 30.0), (0, 20.0), (-1, 4.0)]).splitlines()
    assert lines[:3] == ["no level: 1 objects, side 4 to 4 px, median 4",
                         "P3: 3 objects, side 10 to 30 px, median 20", "P4: 0 objects"]
    assert len(lines) == 6


def test_mistakes_end_in_one_line(mistake, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "neither COCO layout" in mistake(browse.main, "--data", tmp_path)
    assert "not both" in mistake(browse.main, "--targets", "--levels", "x.pth")
    assert "--count must be positive" in mistake(browse.main, "--count", 0)
    assert "checkpoint x.pth does not exist" in mistake(browse.main, "--levels", "x.pth")

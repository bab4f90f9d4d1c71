"""browse.py: boxes, targets and selected levels, drawn."""
import math

import numpy as np
import pytest
import torch
from PIL import Image

import browse
from browse import GAP, PANEL, draw_levels, draw_proposals, draw_targets, level_table, rpn_level_targets
from draw import class_colour
from faster_rcnn import FasterRCNN
from fsaf import FSAF
from ops import pairwise_iou
from shapes import open_dataset


def test_boxes_and_targets_are_drawn(in_process, tmp_path):
    out = in_process(browse.main, "--count", 2, "--out", "out")
    assert "heart" in out and "2 drawings in out" in out and (tmp_path / "out" / "1.png").exists()
    out = in_process(browse.main, "--split", "val", "--count", 2, "--out", "out", "--targets")
    assert "heart" in out and "2 drawings in out" in out and (tmp_path / "out" / "1_targets.png").exists()


def test_shots_are_drawn_in_a_row_per_class(in_process, mistake, tmp_path):
    out = in_process(browse.main, "--shots", 3, "--shot-seed", 1, "--out", "out")
    assert "3 shots per class, seed 1, sampled: 6 boxes" in out and "drawn in out/shots.png" in out
    sheet = np.asarray(Image.open(tmp_path / "out" / "shots.png"))
    tops = []
    for label in range(2):  # of the novel classes
        own = (sheet == class_colour(label)).all(axis=2)
        assert all(column.sum() > 50 for column in np.array_split(own, 3, axis=1))
        tops.append(np.flatnonzero(own.any(axis=1))[[0, -1]])
    assert tops[0][1] < tops[1][0]  # one row above the other
    assert "no tail; they have" in mistake(browse.main, "--shots", 1, "--novel-classes", "tail")


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


def test_positive_anchors_are_those_of_the_losses():
    dataset = open_dataset("shapes", "val")
    boxes, labels = torch.tensor([[10.0, 12.0, 44.0, 41.0], [0.0, 0.0, 125.0, 120.0]]), torch.tensor([0, 3])
    levels = rpn_level_targets(128, 120, boxes, labels)
    assert [level.name for level in levels] == ["P2", "P3", "P4", "P5", "P6"]
    assert [level.count for level in levels] == [3 * 32 * 32, 3 * 16 * 16, 3 * 8 * 8, 3 * 4 * 4, 3 * 2 * 2]
    for i, level in enumerate(levels):
        assert (set(level.gt_index) == {0}) == (i == 0) and (set(level.gt_index) == {1}) == (i == 2)
    iou = pairwise_iou(boxes[:1], torch.from_numpy(levels[0].anchors))
    assert iou.max() > 0.5 and len(levels[0].points) == len(levels[0].gt_index) == len(levels[0].anchors)
    image = draw_targets(dataset, 0, 128, 128, model="faster_rcnn")
    panel = round(dataset.sizes[0][1] * PANEL / max(dataset.sizes[0]))
    assert image.width == 5 * panel + 4 * GAP


def test_the_best_proposals_of_every_level_are_drawn():
    dataset = open_dataset("shapes", "val")
    torch.manual_seed(0)
    model = FasterRCNN(8, "resnet18", caffe=False, fpn_channels=32, post_nms_top_k=(50, 40)).eval()
    torch.nn.init.zeros_(model.rpn.deltas.weight)  # proposals are anchors, which are as large as their level
    image, drawn = draw_proposals(model, dataset, 0, 128, 128)
    for level, size in enumerate((32, 64, 128)):
        sides = [side for at, side in drawn if at == level]
        assert 0 < len(sides) <= browse.PROPOSALS
        assert 0.5 * size < max(sides) < 1.01 * size  # the border of the image cuts some
        assert (np.asarray(image) == class_colour(level)).all(-1).any()


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
    names = ["P3", "P4", "P5", "P6", "P7"]
    lines = level_table([(0, 10.0), (0, 30.0), (0, 20.0), (-1, 4.0)], names, "objects").splitlines()
    assert lines[:3] == ["no level: 1 objects, side 4 to 4 px, median 4",
                         "P3: 3 objects, side 10 to 30 px, median 20", "P4: 0 objects"]
    assert len(lines) == 6


def test_mistakes_end_in_one_line(mistake, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert "neither COCO layout" in mistake(browse.main, "--data", tmp_path)
    assert "not both" in mistake(browse.main, "--targets", "--levels", "x.pth")
    assert "--count must be positive" in mistake(browse.main, "--count", 0)
    assert "checkpoint x.pth does not exist" in mistake(browse.main, "--levels", "x.pth")

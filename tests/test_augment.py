"""Augmentation: boxes by hand, the same for the same (seed, epoch, index), off by default."""
import numpy as np
import pytest
from PIL import Image

import browse
from augment import AUGMENTATIONS, change_colours, random_crop
from data import TrainSamples
from recipes import parse_args
from shapes import open_dataset


class Numbers:
    """A generator whose next numbers are known."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)

    def uniform(self, low, high):
        return self.numbers.pop(0)

    def integers(self, high):
        return self.numbers.pop(0)


def test_boxes_of_a_crop_by_hand():
    pixels = np.arange(100 * 60 * 3, dtype=np.uint32).astype(np.uint8).reshape(60, 100, 3)
    boxes = np.array([[30, 20, 50, 40], [0, 0, 26, 50], [60, 30, 90, 60], [0, 0, 10, 10], [10, 0, 90, 60]],
                     np.float32)
    # Half of each side, its corner at (25, 15): the crop shows x 25 to 75 and y 15 to 45.
    image, cut, labels = random_crop(Image.fromarray(pixels), boxes, np.arange(5), Numbers(0.1, 0.5, 25, 15))
    assert image.size == (50, 30) and np.array_equal(np.asarray(image), pixels[15:45, 25:75])
    # Inside; a sliver of a box is dropped; a quarter of one too; one beyond; 1500 of 4800 is dropped too.
    assert cut.tolist() == [[5, 5, 25, 25]] and labels.tolist() == [0]
    assert cut.dtype == np.float32
    whole = random_crop(Image.fromarray(pixels), boxes, np.arange(5), Numbers(0.5))
    assert whole[0].size == (100, 60) and whole[1] is boxes
    image, cut, labels = random_crop(image, np.zeros((0, 4), np.float32), np.zeros(0, int),
                                     Numbers(0, 0.5, 1, 1))
    assert cut.shape == (0, 4) and labels.shape == (0,)


def test_a_box_is_kept_from_the_stated_share_on():
    image, label = Image.new("RGB", (100, 100)), np.array([3])
    for width, kept in ((25.0, 1), (24.0, 1), (26.0, 0)):  # 10 px of its width are visible: 40 % of 25 px
        boxes = np.array([[60 - width, 10, 60, 20]], np.float32)
        _, cut, labels = random_crop(image, boxes, label, Numbers(0.0, 0.5, 50, 0))
        assert len(cut) == len(labels) == kept
        assert not kept or cut.tolist() == [[0, 10, 10, 20]]


def test_colours_change_and_places_do_not():
    image = Image.new("RGB", (8, 8), (200, 60, 40))
    image.paste((20, 30, 220), (0, 0, 4, 8))
    seen = set()
    for seed in range(20):
        changed = np.asarray(change_colours(image, np.random.default_rng(seed))).astype(int)
        assert (changed[:, :4] == changed[0, 0]).all() and (changed[:, 4:] == changed[0, 7]).all()
        assert changed[0, 0, 2] > changed[0, 0, 0] and changed[0, 7, 0] > changed[0, 7, 2]  # blue, red
        seen.add(tuple(changed[0, 0]))
    assert len(seen) > 15


def test_samples_depend_on_the_seed_and_the_draw_alone():
    dataset = open_dataset("shapes", "val")
    both = TrainSamples(dataset, [96, 128], 128, seed=5, augment=("crop", "colour"))
    again = TrainSamples(dataset, [96, 128], 128, seed=5, augment=("crop", "colour"))
    plain = TrainSamples(dataset, [96, 128], 128, seed=5)
    changed = 0
    for draw, index in ((3, 7), (0, 1), (1, 1), (2, 4), (0, 9), (4, 9)):
        ours, theirs, unchanged = both[draw, index], again[draw, index], plain[draw, index]
        assert all(np.array_equal(ours[key], theirs[key]) for key in ("image", "boxes", "labels"))
        height, width = ours["image"].shape[:2]
        assert (ours["boxes"] > -1e-3).all() and (ours["boxes"] < np.array([width, height] * 2) + 1e-3).all()
        assert (width >= height) == (unchanged["image"].shape[1] >= unchanged["image"].shape[0])
        assert len(ours["boxes"]) == len(ours["labels"]) <= len(unchanged["boxes"])
        changed += len(ours["boxes"]) < len(unchanged["boxes"]) or not np.allclose(ours["boxes"],
                                                                                unchanged["boxes"], atol=2)
    assert changed > 0
    assert parse_args([])[0].augment == [] and parse_args(["--augment", "crop"])[0].augment == ["crop"]


def test_augmented_images_are_drawn(in_process, tmp_path, mistake):
    in_process(browse.main, "--split", "val", "--count", 1, "--augment", *AUGMENTATIONS, "--out", "out")
    assert Image.open(tmp_path / "out" / "1_augmented.png").width > 4 * 300
    assert "not both" in mistake(browse.main, "--augment", "crop", "--targets")


@pytest.mark.parametrize("words", [["--augment"], ["--augment", "mosaic"]])
def test_unknown_augmentations_are_refused(words, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert "--augment" in capsys.readouterr().err

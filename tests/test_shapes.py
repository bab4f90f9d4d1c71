"""shapes.py: the built-in dataset."""
import numpy as np
import pytest

from data import DataError
from shapes import _silhouette, open_dataset


def test_shapes_are_what_they_promise():
    dataset = open_dataset("shapes", "train")
    assert len(dataset.names) >= 8 and dataset.names[-2:] == ["arrow", "heart"]
    sides = (dataset.boxes[:, 2:] - dataset.boxes[:, :2]).max(axis=1)
    assert sides.min() < 13 and sides.max() > 90 and sides.max() / sides.min() > 7
    assert 0.03 < (np.diff(dataset.box_offsets) == 0).mean() < 0.07
    assert dataset.max_objects() >= 5 and len(np.unique(dataset.classes)) == 8
    assert (dataset.boxes >= 0).all()
    assert (dataset.boxes[:, 2:] <= dataset.sizes[dataset.box_image][:, ::-1]).all()


def test_shapes_do_not_change_between_reads_and_differ_between_splits(small_shapes):
    train, val, again = (open_dataset("shapes", s) for s in ("train", "val", "val"))
    assert np.array_equal(np.asarray(val.image(5)), np.asarray(again.image(5)))
    assert np.array_equal(val.boxes, again.boxes)
    assert not any(np.array_equal(train.objects(i)[0], val.objects(i)[0])
                   for i in range(len(val)) if len(val.objects(i)[0]))
    # A number that changes with the drawing code: published AP values belong to these images.
    assert int(np.asarray(val.image(0), np.int64).sum()) == 4003266


def test_the_box_of_a_shape_is_its_outline():
    dataset = open_dataset("shapes", "val")
    (height, width), objects = dataset._scene(4)
    mask = np.asarray(_silhouette(objects[-1][1], False, height, width))
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    drawn = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(drawn - dataset.boxes[dataset.box_slice(4)][-1]).max() < 1.5


def test_mistakes_are_named():
    with pytest.raises(DataError, match="splits train, val, not 'test'"):
        open_dataset("shapes", "test")
    with pytest.raises(DataError, match="the model knows the classes .'cat'., but shapes has .'disc', "):
        open_dataset("shapes", "val", names=["cat"])
    with pytest.raises(DataError, match="data folder nowhere does not exist"):
        open_dataset("nowhere", "val")

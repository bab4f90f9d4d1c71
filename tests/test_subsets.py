"""Classes and shots of a dataset against the lists that TFA and the official DeFRCN recorded."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import GOLDEN

from data import DataError
from fewshot import novel_names
from shapes import open_dataset
from subsets import k_shot_subset, lists_folder, sample_coco, sample_voc, select_classes

sys.path.insert(0, str(GOLDEN))
import defrcn_rules as rules  # noqa: E402


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "fewshot.json").read_text())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Small COCO and VOC trees with published-style lists, as the recorded runs had them."""
    folder = tmp_path_factory.mktemp("tiny")
    subprocess.run([sys.executable, str(GOLDEN / "tiny_datasets.py")], cwd=folder, check=True,
                   env={"PYTHONPATH": str(GOLDEN), "PATH": ""})
    return folder / "datasets"


def coco(tiny, split="trainvalno5k", images="trainval2014"):
    return open_dataset(str(tiny / "coco"), "", str(tiny / "cocosplit" / "datasplit" / f"{split}.json"),
                        str(tiny / "coco" / images))


def records(dataset):
    out = []
    for i in range(len(dataset)):
        rows = dataset.box_slice(i)
        out.append([dataset.image_ids[i].item(), sorted(
            [int(c), b, int(crowd)] for c, b, crowd in
            zip(dataset.classes[rows], dataset.boxes[rows].tolist(), dataset.crowd[rows]))])
    return out


def recorded(golden, name, learnable=False):
    return [[image, sorted(objects)] for image, objects in golden[name]
            if not learnable or any(not crowd for _, _, crowd in objects)]


# ---------------------------------------------------------------------------- published lists

def test_base_and_test_sets_are_the_published_ones(golden, tiny):
    train, test = coco(tiny), coco(tiny, "5k", "val2014")
    novel = novel_names(train)
    assert novel == golden["coco_classes_novel"]
    base = [name for name in train.names if name not in novel]
    assert len(base) == 60
    found = select_classes(train, base, drop_empty=True)
    assert records(found) == recorded(golden, "coco14_trainval_base", learnable=True)
    # Scoring keeps images without an object of these classes: any detection there is wrong.
    assert records(select_classes(test, novel, drop_empty=False)) == recorded(golden, "coco14_test_novel")
    for year in (2007, 2012):
        voc = open_dataset(str(tiny), f"{year}_trainval")
        found = select_classes(voc, golden["voc_classes"]["1"]["base"], drop_empty=True)
        assert records(found) == recorded(golden, f"voc_{year}_trainval_base1", learnable=True)


@pytest.mark.parametrize(("name", "shots"), [("novel", 1), ("novel", 2), ("all", 1)])
def test_coco_shots_are_merged_by_image(golden, tiny, name, shots):
    train = coco(tiny)
    names = train.names if name == "all" else novel_names(train)
    found = k_shot_subset(train, names, shots, 0, tiny / "cocosplit", None)
    assert records(found) == recorded(golden, f"coco14_trainval_{name}_{shots}shot_seed0")
    assert f"{shots} shots per class, seed 0, read from" in found.notes[0]
    assert found.image(0).size == tuple(found.sizes[0][::-1])


def test_voc_shots_are_records_of_one_box(golden, tiny):
    train = open_dataset(str(tiny), "2007_trainval+2012_trainval")
    found = k_shot_subset(train, novel_names(train, 1), 1, 0, tiny / "vocsplit", None)
    assert records(found) == recorded(golden, "voc_2007_trainval_novel1_1shot_seed0")
    # With more than K boxes K of them are drawn; which is up to the seed.
    classes = golden["voc_classes"]["2"]["all"]
    found = k_shot_subset(train, classes, 2, 0, tiny / "vocsplit", None)
    theirs = recorded(golden, "voc_2007_trainval_all2_2shot_seed0")
    assert np.bincount(found.classes).tolist() == [sum(o[0][0] == c for _, o in theirs) for c in range(20)]
    assert all(len(objects) == 1 for _, objects in records(found))
    again = k_shot_subset(train, classes, 2, 0, tiny / "vocsplit", None)
    assert records(found) == records(again)


# ---------------------------------------------------------------------------- sampling

def test_sampling_equals_tfas(golden):
    generator, boxes_of, number = rules.rng("fewshot_coco"), {}, 0
    source = (GOLDEN / "tiny_datasets.py").read_text()
    ids = sorted(map(int, re.findall(r"(\d+): '", source)))
    boxes_of = {c: {} for c in ids}
    for image in range(10, 10 + 3 * 900, 3):
        for _ in range(12):
            category, crowd, number = ids[generator.randint(80)], generator.rand() < 0.05, number + 1
            if not crowd:
                boxes_of[category].setdefault(image, []).append(number)
    lists = {seed: sample_coco(boxes_of, seed) for seed in (1, 2)}
    for key, boxes in golden["sampled_coco"].items():
        seed, category, shots = map(int, key.split("/"))
        assert lists[seed][category, shots] == boxes

    generator = rules.rng("fewshot_voc")
    names = sorted(golden["voc_classes"]["1"]["all"])
    boxes_of = {name: {} for name in names}
    for year, count in ((2007, 400), (2012, 200)):
        for i in range(count):
            path = f"datasets/VOC{year}/JPEGImages/{'' if year == 2007 else '2012_'}{i:06}.jpg"
            for j in range(generator.randint(1, 6)):
                boxes_of[names[generator.randint(20)]].setdefault(path, []).append(j)
    lists = {seed: sample_voc(boxes_of, seed) for seed in (1, 2)}
    for key, paths in golden["sampled_voc"].items():
        seed, name, shots = key.split("/")
        assert lists[int(seed)][name, int(shots)] == paths


def test_sampled_lists_are_written_in_the_layout_that_is_read(small_shapes, tmp_path):
    train = open_dataset("shapes", "train")
    novel = novel_names(train)
    assert novel == ["arrow", "heart"]
    sampled = k_shot_subset(train, novel, 10, 3, None, tmp_path)
    assert np.bincount(sampled.classes).tolist() == [10, 10]
    assert (tmp_path / "cocosplit" / "seed3" / "full_box_10shot_heart_trainval.json").is_file()
    read = k_shot_subset(train, novel, 10, 3, tmp_path / "cocosplit", None)
    assert records(read) == records(sampled)
    other = k_shot_subset(train, novel, 10, 4, None, None)
    assert records(other) != records(sampled)
    fewer = k_shot_subset(train, novel, 5, 3, None, None)
    assert {image for image, _ in records(fewer)} <= {image for image, _ in records(sampled)}


def test_a_small_set_gives_part_of_an_image_where_no_whole_one_fits():
    boxes_of = {"a": {"x": [1, 2, 3], "y": [4, 5, 6]}}
    lists = sample_coco(boxes_of, 0)
    assert [len(lists["a", k]) for k in (1, 2, 3, 5)] == [1, 2, 3, 5] and ("a", 10) not in lists
    assert all(len(set(boxes)) == len(boxes) for boxes in lists.values())
    assert lists["a", 2][0] == lists["a", 1][0]


def test_mistakes_are_named(tiny, tmp_path):
    train = coco(tiny)
    with pytest.raises(DataError, match="the data lack the classes unicorn"):
        select_classes(train, ["dog", "unicorn"], drop_empty=True)
    with pytest.raises(DataError, match="the data have no unicorn"):
        novel_names(train, given=["dog", "unicorn"])
    with pytest.raises(DataError, match="which classes are novel"):
        novel_names(select_classes(train, ["dog", "cat"], drop_empty=True))
    with pytest.raises(DataError, match="leave at least one class"):
        novel_names(train, given=list(train.names))
    with pytest.raises(DataError, match="full_box_5shot_person_trainval.json does not exist"):
        k_shot_subset(train, ["person"], 5, 0, tiny / "cocosplit", None)
    with pytest.raises(DataError, match="class person: 30 shots cannot be drawn from its .* boxes"):
        k_shot_subset(train, ["person"], 30, 0, None, None)
    with pytest.raises(DataError, match="there is no such folder"):
        lists_folder({"shot_lists": tmp_path / "none", "data": "coco"}, voc=False)
    assert lists_folder({"shot_lists": None, "data": str(tiny / "coco")}, voc=False) == tiny / "cocosplit"
    assert lists_folder({"shot_lists": None, "data": str(tiny)}, voc=True) == tiny / "vocsplit"
    assert lists_folder({"shot_lists": None, "data": "d/coco"}, voc=False) is None
    foreign = tmp_path / "seed0" / "full_box_1shot_dog_trainval.json"
    foreign.parent.mkdir()
    foreign.write_text(json.dumps({"annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4]}]}))
    with pytest.raises(DataError, match="image 5 is not in the training split"):
        k_shot_subset(train, ["dog"], 1, 0, tmp_path, None)
    foreign.write_text("{}")
    with pytest.raises(DataError, match="not a list of shots"):
        k_shot_subset(train, ["dog"], 1, 0, tmp_path, None)

"""Splits, shots and tables against TFA's and DeFRCN's recorded ones."""
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import GOLDEN
from PIL import Image

import fewshot
from data import DataError, DetectionDataset, open_dataset
from fewshot import (
    aggregate,
    aggregate_table,
    few_shot_scores,
    keep_classes,
    lists_folder,
    novel_names,
    sample_coco,
    sample_voc,
    schedule,
    shot_view,
)

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
        rows = slice(dataset.first[i], dataset.first[i + 1])
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
    found = keep_classes(train, base, drop_empty=True)
    assert records(found) == recorded(golden, "coco14_trainval_base", learnable=True)
    # Scoring keeps pictures without an object of these classes: what is found there is wrong.
    assert records(keep_classes(test, novel, drop_empty=False)) == recorded(golden, "coco14_test_novel")
    for year in (2007, 2012):
        voc = open_dataset(str(tiny), f"{year}_trainval")
        found = keep_classes(voc, golden["voc_classes"]["1"]["base"], drop_empty=True)
        assert records(found) == recorded(golden, f"voc_{year}_trainval_base1", learnable=True)


@pytest.mark.parametrize(("name", "shots"), [("novel", 1), ("novel", 2), ("all", 1)])
def test_coco_shots_are_merged_by_image(golden, tiny, name, shots):
    train = coco(tiny)
    names = train.names if name == "all" else novel_names(train)
    found = shot_view(train, names, shots, 0, tiny / "cocosplit", None)
    assert records(found) == recorded(golden, f"coco14_trainval_{name}_{shots}shot_seed0")
    assert f"{shots} shots per class, seed 0, read from" in found.notes[0]
    assert found.image(0).size == tuple(found.sizes[0][::-1])


def test_voc_shots_are_records_of_one_box(golden, tiny):
    train = open_dataset(str(tiny), "2007_trainval+2012_trainval")
    found = shot_view(train, novel_names(train, 1), 1, 0, tiny / "vocsplit", None)
    assert records(found) == recorded(golden, "voc_2007_trainval_novel1_1shot_seed0")
    # With more than K boxes K of them are drawn; which is up to the seed.
    classes = golden["voc_classes"]["2"]["all"]
    found = shot_view(train, classes, 2, 0, tiny / "vocsplit", None)
    theirs = recorded(golden, "voc_2007_trainval_all2_2shot_seed0")
    assert np.bincount(found.classes).tolist() == [sum(o[0][0] == c for _, o in theirs) for c in range(20)]
    assert all(len(objects) == 1 for _, objects in records(found))
    again = shot_view(train, classes, 2, 0, tiny / "vocsplit", None)
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


def test_sampled_lists_are_written_in_the_layout_that_is_read(tmp_path):
    train = open_dataset("shapes", "train")
    novel = novel_names(train)
    assert novel == ["arrow", "heart"]
    sampled = shot_view(train, novel, 10, 3, None, tmp_path)
    assert np.bincount(sampled.classes).tolist() == [10, 10]
    assert (tmp_path / "cocosplit" / "seed3" / "full_box_10shot_heart_trainval.json").is_file()
    read = shot_view(train, novel, 10, 3, tmp_path / "cocosplit", None)
    assert records(read) == records(sampled)
    other = shot_view(train, novel, 10, 4, None, None)
    assert records(other) != records(sampled)
    fewer = shot_view(train, novel, 5, 3, None, None)
    assert {image for image, _ in records(fewer)} <= {image for image, _ in records(sampled)}


def test_a_small_set_gives_part_of_an_image_where_no_whole_one_fits():
    boxes_of = {"a": {"x": [1, 2, 3], "y": [4, 5, 6]}}
    lists = sample_coco(boxes_of, 0)
    assert [len(lists["a", k]) for k in (1, 2, 3, 5)] == [1, 2, 3, 5] and ("a", 10) not in lists
    assert all(len(set(boxes)) == len(boxes) for boxes in lists.values())
    assert lists["a", 2][0] == lists["a", 1][0]


def test_mistakes_are_named(tiny, tmp_path):
    train = coco(tiny)
    with pytest.raises(DataError, match="the data have no unicorn"):
        novel_names(train, given=["dog", "unicorn"])
    with pytest.raises(DataError, match="which classes are novel"):
        novel_names(keep_classes(train, ["dog", "cat"], drop_empty=True))
    with pytest.raises(DataError, match="leave at least one class"):
        novel_names(train, given=list(train.names))
    with pytest.raises(DataError, match="full_box_5shot_person_trainval.json does not exist"):
        shot_view(train, ["person"], 5, 0, tiny / "cocosplit", None)
    with pytest.raises(DataError, match="class person: 30 shots cannot be drawn from its .* boxes"):
        shot_view(train, ["person"], 30, 0, None, None)
    with pytest.raises(DataError, match="there is no such folder"):
        lists_folder({"shot_lists": tmp_path / "none", "data": "coco"}, voc=False)
    assert lists_folder({"shot_lists": None, "data": str(tiny / "coco")}, voc=False) == tiny / "cocosplit"
    assert lists_folder({"shot_lists": None, "data": str(tiny)}, voc=True) == tiny / "vocsplit"
    assert lists_folder({"shot_lists": None, "data": "d/coco"}, voc=False) is None
    foreign = tmp_path / "seed0" / "full_box_1shot_dog_trainval.json"
    foreign.parent.mkdir()
    foreign.write_text(json.dumps({"annotations": [{"image_id": 5, "bbox": [1, 2, 3, 4]}]}))
    with pytest.raises(DataError, match="image 5 is not in the training split"):
        shot_view(train, ["dog"], 1, 0, tmp_path, None)
    foreign.write_text("{}")
    with pytest.raises(DataError, match="not a list of shots"):
        shot_view(train, ["dog"], 1, 0, tmp_path, None)


# ---------------------------------------------------------------------------- schedules and tables

def test_published_schedules():
    assert schedule(voc=False, shots=None, generalized=False) == (110_000, (85_000, 100_000))
    assert schedule(voc=True, shots=None, generalized=False) == (15_000, (10_000, 13_300))
    assert schedule(voc=False, shots=30, generalized=True) == (12_000, (9_600,))
    assert schedule(voc=True, shots=10, generalized=False) == (4_000, (3_200,))
    assert schedule(voc=False, shots=4, generalized=False) == schedule(voc=False, shots=5, generalized=False)


def run_of(seed, n_ap, shots=1):
    return {"AP": 0.5, "few_shot": {"data": "coco", "model": "defrcn", "generalized": False, "shots": shots,
                                    "decouple": [0.0, 0.01], "stage": "novel", "novel": ["a"],
                                    "backbone": "r", "cosine": False, "calibrated": False,
                                    "seed": seed, "nAP": n_ap, "nAP50": 0.2, "nAP75": None, "bAP": None,
                                    "bAP50": None}}


def test_the_table_gives_mean_and_interval():
    values = [0.10, 0.12, 0.17]
    rows = aggregate([run_of(seed, v) for seed, v in enumerate(values)] + [run_of(0, 0.3, shots=10)])
    assert [row["shots"] for row in rows] == [1, 10] and rows[0]["seeds"] == [0, 1, 2]
    # 1.96 * population standard deviation / sqrt(3), the deviation of 10, 12, 17 being sqrt(26 / 3).
    assert rows[0]["nAP"] == pytest.approx([0.13, 1.96 * (26 / 3) ** 0.5 / 3 ** 0.5 / 100])
    assert rows[1]["nAP"] == [0.3, 0.0] and "nAP75" not in rows[0] and "bAP" not in rows[0]
    table = aggregate_table(rows)
    assert " 13.00 ± 3.33" in table and "FSOD" in table and "0, 0.01" in table and "bAP" not in table
    with pytest.raises(DataError, match="have the same seed"):
        aggregate([run_of(0, 0.1), run_of(0, 0.2)])
    with pytest.raises(DataError, match="not of --stage novel"):
        aggregate([{"AP": 0.5}])


def test_novel_and_base_scores_are_means_over_their_classes():
    per_class = {"a": 0.2, "b": 0.4, "c": None, "d": 0.9}
    metrics = {key: per_class for key in ("per_class", "per_class_AP50", "per_class_AP75")}
    scores = few_shot_scores(metrics, ["b", "c", "d"])
    assert scores["nAP"] == pytest.approx(0.65) and scores["bAP50"] == pytest.approx(0.2)
    assert few_shot_scores(metrics, list(per_class))["bAP"] is None


# ---------------------------------------------------------------------------- calibration of a results file

class MeanColour(torch.nn.Module):
    """Stands in for the ImageNet classifier: a box is described by the mean colour inside it."""

    def __init__(self, weights):
        super().__init__()

    def forward(self, image, boxes):
        rows = [image[:, int(y1):int(y2), int(x1):int(x2)].float().mean(dim=(1, 2))
                for x1, y1, x2, y2 in boxes.tolist()]
        return torch.stack(rows)


def coloured(names, boxes, classes, colours):
    """One grey 40 x 40 picture with coloured boxes, as a dataset."""
    picture = np.full((40, 40, 3), 100, np.uint8)
    for (x1, y1, x2, y2), colour in zip(boxes, colours):
        picture[y1:y2, x1:x2] = colour
    none = np.zeros(len(boxes), bool)
    dataset = DetectionDataset(names, [5, 90], [7], ["x.png"], [(40, 40)], boxes, classes,
                               np.full(len(boxes), 100), none, none, [0] * len(boxes))
    dataset.image = lambda index: Image.fromarray(picture)
    return dataset


def test_scores_of_novel_classes_meet_their_prototypes(monkeypatch):
    monkeypatch.setattr(fewshot, "CalibrationNet", MeanColour)
    red, green = (200, 0, 0), (0, 200, 0)
    boxes = [[0, 0, 10, 10], [20, 20, 30, 30]]
    support = coloured(["a", "b"], boxes, [0, 1], [red, green])
    calibration = fewshot.Calibration("file", support, ["a"], "cpu")
    # Class a is red. Found: a red and a green "a", a green "b" (base), one below the window.
    found = [{"image_id": 7, "category_id": category, "bbox": [x, x, 10, 10], "score": score}
             for category, x, score in ((5, 0, 0.4), (5, 20, 0.9), (90, 20, 0.6), (5, 0, 0.05))]
    test = coloured(["a", "b"], boxes, [0, 1], [red, green])
    new = calibration(test, found)
    # Cosines 1 and 0: 0.5 * 0.4 + 0.5 = 0.7 and 0.5 * 0.9 = 0.45; the others keep their scores.
    assert [(r["category_id"], r["bbox"][0], r["score"]) for r in new] == [
        (5, 0, 0.7), (90, 20, 0.6), (5, 20, 0.45), (5, 0, 0.05)]
    assert calibration(test, []) == []

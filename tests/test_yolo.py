"""YOLO and Roboflow layouts, and other ways in which people keep COCO and VOC data."""
import json
import shutil

import numpy as np
import pytest
from PIL import Image

import evaluate
import train
from data import DataError
from layouts import default_splits, layout, open_folder
from recipes import parse_args
from shapes import open_dataset
from yolo import _read_yolo_yaml, load_yolo

SMALL = ("--weights", "none", "--backbone", "resnet18", "--fpn-channels", 64, "--min-size", 96,
         "--max-size", 128, "--workers", 0, "--device", "cpu", "--out", "run")


def write_images(root, names, size=(80, 40)):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(root / name)


def yolo(root, text="names: [cat, dog]\ntrain: images/train\nval: images/val\n"):
    write_images(root, ["images/train/a.jpg", "images/train/b.png", "images/val/c.jpg"])
    for name, lines in (("train/a", "0 0.5 0.5 0.25 0.5\n1 0.9 0.9 0.2 0.2\n"), ("val/c", "1 0.5 0.5 1 1\n")):
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "labels" / f"{name}.txt").write_text(lines)
    (root / "data.yaml").write_text(text)
    return root


# ---------------------------------------------------------------------------- YOLO

def test_boxes_of_yolo_by_hand(tmp_path):
    dataset = open_dataset(str(yolo(tmp_path)), "train")
    assert layout(str(tmp_path)) == "yolo" and default_splits(str(tmp_path)) == ("train", "val")
    assert dataset.names == ["cat", "dog"] and dataset.category_ids == [0, 1]
    assert dataset.image_ids.tolist() == ["images/train/a.jpg", "images/train/b.png"]
    assert dataset.sizes.tolist() == [[40, 80], [40, 80]] and dataset.classes.tolist() == [0, 1]
    np.testing.assert_allclose(dataset.boxes, [[30, 10, 50, 30], [64, 32, 80, 40]])
    both = open_dataset(str(tmp_path), "train+val", names=["cat", "dog"])
    assert len(both) == 3 and both.boxes[2].tolist() == [0, 0, 80, 40]
    with pytest.raises(DataError, match="not the model's classes"):
        open_dataset(str(tmp_path), "train", names=["dog", "cat"])


def test_an_upright_photo_has_its_boxes_upright(tmp_path):
    yolo(tmp_path)
    photo = Image.new("RGB", (80, 40))
    exif = photo.getexif()
    exif[274] = 6  # to be turned by 90 degrees
    photo.save(tmp_path / "images/train/a.jpg", exif=exif)
    dataset = load_yolo(tmp_path, ["train"])
    assert dataset.sizes[0].tolist() == [80, 40] and dataset.boxes[0].tolist() == [15, 20, 25, 60]
    assert dataset.image(0).size == (40, 80)


@pytest.mark.parametrize("text", [
    "names: ['cat', \"dog\"]\nnc: 2\n", "path: .\ntrain: images/train # here\nnames:\n  0: cat\n  1: dog\n",
    "names:\n- cat\n- dog\nval: ../images/val\n", "names: {0: cat, 1: dog}\n",
    "names:\n  - 'cat'\n  - dog\n"])
def test_the_ways_to_write_the_names(tmp_path, text):
    dataset = load_yolo(yolo(tmp_path, text), ["train"])
    assert dataset.names == ["cat", "dog"] and len(dataset) == 2
    assert len(load_yolo(tmp_path, ["val"])) == 1


def test_lists_over_lines_numbers_out_of_order_and_quotes(tmp_path):
    for text, names in (("names: [cat, dog,\n  bird, cow]\n", ["cat", "dog", "bird", "cow"]),
                        ("names:\n  1: dog\n  0: cat\n", ["cat", "dog"]),
                        ("names: {1: dog, 0: 'a, b'}\nnc: 2\n", ["a, b", "dog"]),
                        ("names: ['x', 'a, b', \"c\"] # three\n", ["x", "a, b", "c"]),
                        ("names:\n  - traffic light\n  - 'it: self'\n", ["traffic light", "it: self"])):
        assert load_yolo(yolo(tmp_path, text), ["train"]).names == names, text
    for text, complaint in (("names: {0: cat, 2: dog}\n", "the numbers of names are not 0 to 1"),
                            ("names: [cat, cat]\n", "class name 'cat' occurs 2 times")):
        with pytest.raises(DataError, match=complaint):
            load_yolo(yolo(tmp_path, text), ["train"])
    with pytest.raises(DataError, match="image 'images/train/a.jpg' occurs 2 times"):
        load_yolo(yolo(tmp_path), ["train", "train"])
    both = yolo(tmp_path, "names: [cat, dog]\ntrain: [images/train, images/val]\n")
    assert len(load_yolo(both, ["train"])) == 3
    (tmp_path / "labels/val/c.txt").write_text("\n1 0.5 0.5 1 1\n\n")
    assert len(load_yolo(both, ["train"]).boxes) == 3


def test_labels_are_found_from_the_folder_itself(tmp_path, monkeypatch):
    yolo(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert len(open_dataset(".", "train").boxes) == 2


def test_splits_that_hold_their_images_and_labels(tmp_path):
    write_images(tmp_path, ["train/images/a.jpg", "valid/images/b.jpg"])
    (tmp_path / "train/labels").mkdir()
    (tmp_path / "train/labels/a.txt").write_text("0 0.5 0.5 0.5 0.5")
    (tmp_path / "data.yaml").write_text("train: ../train/images\nval: ../valid/images\nnames: ['x y']\n")
    assert load_yolo(tmp_path, ["train"]).boxes.tolist() == [[20, 10, 60, 30]]
    assert len(load_yolo(tmp_path, ["val"])) == 1 and load_yolo(tmp_path, ["val"]).names == ["x y"]


@pytest.mark.parametrize(("line", "complaint"), [
    ("0 0.5 0.5 0.5", "a.txt: line 1: '0 0.5 0.5 0.5' is not a class"), ("2 0.5 0.5 0.5 0.5", "0 to 1"),
    ("cat 0.5 0.5 0.5 0.5", "line 1"), ("0 0.1 0.1 0.2 0.1 0.2 0.2", "line 1")])
def test_a_wrong_line_is_named(tmp_path, line, complaint):
    (yolo(tmp_path) / "labels/train/a.txt").write_text(line)
    with pytest.raises(DataError, match=complaint):
        load_yolo(tmp_path, ["train"])


def test_wrong_folders_and_boxes_are_named(tmp_path):
    yolo(tmp_path)
    with pytest.raises(DataError, match="no image folder for the split 'test'"):
        load_yolo(tmp_path, ["test"])
    (tmp_path / "labels/train/a.txt").write_text("0 0.5 0.5 0 0.5\n0 3 3 0.1 0.1\n1 0.5 0.5 1.001 1")
    dataset = load_yolo(tmp_path, ["train"])
    assert dataset.boxes.tolist() == [[0, 0, 80, 40]]  # rounding over the border is cut
    assert "a.txt: line 1: no area" in dataset.notes[0] and "outside its 80 x 40 image" in dataset.notes[1]
    (tmp_path / "data.yaml").write_text("nc: 3\n")
    with pytest.raises(DataError, match="must list the class names"):
        load_yolo(tmp_path, ["train"])
    assert _read_yolo_yaml(tmp_path / "data.yaml") == {"nc": "3"}


@pytest.mark.slow
def test_a_real_set_in_yolo_layout_is_trained_and_scored(bccd, script, in_process, tmp_path):
    """100 images of BCCD, rewritten; the boxes are those of the VOC layout."""
    voc, root = open_folder(str(bccd), "2007_trainval"), tmp_path / "cells"
    for i in range(100):
        split, height_width = "train" if i < 80 else "val", voc.sizes[i]
        path = root / "images" / split / f"{voc.image_ids[i]}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(voc.paths[i].decode(), path)
        label = root / "labels" / split / f"{voc.image_ids[i]}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for row in range(*voc.box_slice(i).indices(len(voc.boxes))[:2]):
            x1, y1, x2, y2 = voc.boxes[row] / np.tile(height_width[::-1], 2)
            numbers = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
            lines.append(" ".join([str(voc.classes[row]), *(f"{number:.6f}" for number in numbers)]))
        label.write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"names: {voc.names}\n")
    ours = open_dataset(str(root), "train+val")
    order = [ours.image_ids.tolist().index(f"images/{'train' if i < 80 else 'val'}/{voc.image_ids[i]}.jpg")
             for i in range(100)]
    for i, j in enumerate(order):
        np.testing.assert_allclose(ours.boxes[ours.box_slice(j)], voc.boxes[voc.box_slice(i)], atol=1e-3)
    in_process(train.main, "--data", root, *SMALL, "--batch-size", 4, "--max-steps", 2)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics["per_class"]) == {"Platelets", "RBC", "WBC"}
    out = in_process(evaluate.main, "--ckpt", "run/last.pth", "--data", root, "--workers", 0, "--out", "b")
    assert "detecting in 20 images" in out


# ---------------------------------------------------------------------------- COCO and VOC

def coco_file(path, names, first_id=1, **changes):
    content = {"images": [{"id": first_id + i, "file_name": name, "width": 80, "height": 40}
                          for i, name in enumerate(names)],
               "annotations": [{"id": first_id, "image_id": first_id, "category_id": 1,
                                "bbox": [1, 2, 30, 20]}],
               "categories": [{"id": 1, "name": "cat"}]} | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def test_coco_with_its_images_one_folder_deeper(tmp_path):
    write_images(tmp_path, ["images/train2017/a.jpg"])
    coco_file(tmp_path / "annotations/instances_train2017.json", ["a.jpg"])
    assert open_folder(str(tmp_path), "train2017").paths[0].decode().endswith("images/train2017/a.jpg")


def test_roboflow(tmp_path):
    for split in ("train", "valid"):
        write_images(tmp_path, [f"{split}/a.jpg"])
        coco_file(tmp_path / split / "_annotations.coco.json", ["a.jpg"])
    assert layout(str(tmp_path)) == "roboflow"
    assert len(open_folder(str(tmp_path), "valid")) == 1
    args, _ = parse_args(["--data", str(tmp_path)])
    assert (args.train_split, args.val_split) == ("train", "valid")


def test_images_without_annotations_are_detected_and_not_scored(tmp_path, in_process, mistake):
    write_images(tmp_path, ["coco/test2017/a.jpg"])
    coco_file(tmp_path / "coco/annotations/image_info_test-dev2017.json", ["a.jpg"])
    content = json.loads((tmp_path / "coco/annotations/image_info_test-dev2017.json").read_text())
    del content["annotations"]
    (tmp_path / "coco/annotations/image_info_test-dev2017.json").write_text(json.dumps(content))
    write_images(tmp_path, ["coco/train2017/a.jpg"])
    coco_file(tmp_path / "coco/annotations/instances_train2017.json", ["a.jpg"])
    in_process(train.main, "--data", "coco", *SMALL, "--batch-size", 1, "--max-steps", 1, "--no-eval")
    out = in_process(evaluate.main, "--ckpt", "run/last.pth", "--data", "coco", "--split", "test-dev2017",
                     "--score-threshold", 0.001, "--workers", 0)
    assert "there are no annotations to score" in out and not (tmp_path / "run/metrics.json").exists()
    assert json.loads((tmp_path / "run/detections.json").read_text())[0]["image_id"] == 1


def test_voc_without_years_and_with_png_images(tmp_path):
    write_images(tmp_path, ["JPEGImages/a.png", "JPEGImages/b.jpg"])
    for name in "ab":
        (tmp_path / "Annotations").mkdir(exist_ok=True)
        (tmp_path / "Annotations" / f"{name}.xml").write_text(
            "<annotation><filename>x.jpg</filename><object><name>cat</name><bndbox><xmin>5</xmin><ymin>6</ymin>"
            "<xmax>20</xmax><ymax>30</ymax></bndbox></object></annotation>")
    dataset = open_folder(str(tmp_path), "all")
    assert [path.decode()[-5:] for path in dataset.paths] == ["a.png", "b.jpg"]
    assert dataset.boxes.tolist() == [[4, 5, 20, 30]] * 2
    with pytest.raises(DataError, match="the split 'all' is every file of Annotations"):
        open_folder(str(tmp_path), "train")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    (tmp_path / "ImageSets/Main/train.txt").write_text("b")
    assert len(open_folder(str(tmp_path), "train")) == 1 and default_splits(str(tmp_path)) == ("train", "val")


def test_several_files_are_joined(tmp_path):
    for name, first in (("a", 1), ("b", 10)):
        write_images(tmp_path, [f"{name}/x.jpg"])
        coco_file(tmp_path / f"{name}.json", ["x.jpg"], first)
    joined = "+".join(str(tmp_path / name) for name in ("a.json", "b.json"))
    folders = f"{tmp_path / 'a'}+{tmp_path / 'b'}"
    assert open_dataset("shapes", "", joined, folders).image_ids.tolist() == [1, 10]
    with pytest.raises(DataError, match="give as many of both"):
        open_dataset("shapes", "", joined, str(tmp_path / "a"))
    coco_file(tmp_path / "b.json", ["x.jpg"], 1)
    with pytest.raises(DataError, match="number their images alike"):
        open_dataset("shapes", "", joined, folders)


def test_slips_of_new_users_get_a_hint(tmp_path):
    write_images(tmp_path, ["a.jpg"])
    path = tmp_path / "f.json"
    annotations = [{"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [40, 20, 70 + i % 5, 38]}
                   for i in range(12)]
    coco_file(path, ["a.jpg"], annotations=annotations,
              categories=[{"id": 1, "name": "RBC"}, {"id": 2, "name": "rbc "}])
    notes = " ".join(open_dataset("shapes", "", str(path), str(tmp_path)).notes)
    assert "12 of 12 boxes end outside their image. Is bbox x1 y1 x2 y2" in notes
    assert "'RBC' and 'rbc ' differ only in capitals or spaces" in notes
    coco_file(path, ["a.jpg"], annotations=[{**annotations[0], "image_id": "1"}])
    with pytest.raises(DataError, match="ids are text in one list and numbers in the other"):
        open_dataset("shapes", "", str(path), str(tmp_path))

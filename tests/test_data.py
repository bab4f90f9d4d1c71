"""data.py and layouts.py: layouts and what can be wrong with them, images, batches."""
import json
import pickle
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

import data
import layouts
from data import (
    CROWD,
    PADDING,
    DataError,
    DetectionDataset,
    SameSizeBatchSampler,
    TrainBatchSampler,
    TrainSamples,
    collate,
    load_sample,
    resized_shape,
)
from layouts import image_folder, layout, open_folder
from shapes import open_dataset


@pytest.fixture
def coco(tmp_path):
    """A small COCO tree with sparse category ids; write(change) applies change(content) to its json."""
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for name, size in (("a.jpg", (40, 30)), ("b.jpg", (30, 40)), ("c.jpg", (64, 32))):
        Image.new("RGB", size, "grey").save(tmp_path / "train2017" / name)

    def write(change=lambda content: None, name="instances_train2017.json"):
        content = {
            "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30},
                       {"id": 3, "file_name": "b.jpg", "width": 30, "height": 40},
                       {"id": 9, "file_name": "c.jpg", "width": 64, "height": 32}],
            "annotations": [
                {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 10, 20], "area": 150,
                 "iscrowd": 0},
                {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 40, 30], "area": 1200,
                 "iscrowd": 0},
                {"id": 4, "image_id": 7, "category_id": 90, "bbox": [5, 5, 8, 8], "iscrowd": 1}],
            "categories": [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}]}
        change(content)
        (tmp_path / "annotations" / name).write_text(json.dumps(content))
        return str(tmp_path)
    return write

# ---------------------------------------------------------------------------- dataset

def test_a_dataset_finds_its_boxes_images_and_labels():
    boxes = [[0, 0, 4, 2], [1, 1, 3, 9], [2, 2, 5, 5], [0, 0, 1, 1]]
    dataset = DetectionDataset(["cat", "dog"], [90, 5], image_ids=["x", "y", "z"], paths=["x.jpg"] * 3,
                               sizes=[(9, 9)] * 3, boxes=boxes, classes=[1, 0, 0, 1],
                               image_index=[2, 0, 2, 0])
    assert [dataset.box_slice(i) for i in range(3)] == [slice(0, 2), slice(2, 2), slice(2, 4)]
    assert dataset.boxes[dataset.box_slice(0)].tolist() == [boxes[1], boxes[3]]  # in their order
    assert dataset.classes[dataset.box_slice(2)].tolist() == [1, 0]
    assert dataset.box_image.tolist() == [0, 0, 2, 2] and dataset.annotation_order.tolist() == [1, 3, 0, 2]
    assert dataset.areas.tolist() == [16, 1, 8, 9]  # of the boxes, because no others are given
    assert not dataset.crowd.any() and not dataset.difficult.any() and not dataset.voc
    assert dataset.index_of_image() == {"x": 0, "y": 1, "z": 2}
    assert dataset.label_of_category() == {90: 0, 5: 1} and dataset.max_objects() == 2
    empty = DetectionDataset(["cat"], [1], image_ids=[7], paths=["x.jpg"], sizes=[(9, 9)], boxes=[],
                             classes=[], image_index=[])
    assert empty.max_objects() == 1 and empty.box_slice(0) == slice(0, 0) and len(empty.non_empty()) == 0
    assert empty.objects(0)[0].shape == (0, 4) and "1 images (1 without boxes), 0 boxes" in empty.table()


def test_a_dataset_holds_arrays_not_python_objects(coco):
    # Forked loader processes copy every Python object that they touch; arrays stay shared.
    dataset = open_folder(coco(), "train2017")
    for name in ("image_ids", "paths", "sizes", "boxes", "classes", "areas", "crowd", "difficult",
                 "annotation_order", "box_offsets"):
        assert isinstance(getattr(dataset, name), np.ndarray) and getattr(dataset, name).dtype != object
    assert len(pickle.dumps(dataset)) < 4000


# ---------------------------------------------------------------------------- COCO

def test_coco_boxes_classes_and_ids(coco):
    dataset = open_folder(coco(), "train2017")
    assert dataset.names == ["cat", "dog"] and dataset.category_ids == [5, 90]
    assert dataset.image_ids.tolist() == [7, 3, 9]
    boxes, labels = dataset.objects(0)
    assert boxes.tolist() == [[0, 0, 40, 30], [5, 5, 13, 13]] and labels.tolist() == [0, CROWD]
    assert dataset.objects(1)[0].tolist() == [[1, 2, 11, 22]] and dataset.objects(1)[1].tolist() == [1]
    assert dataset.objects(2)[0].shape == (0, 4)
    assert dataset.areas.tolist() == [1200, 64, 150]  # of the file; width x height where it has none
    assert dataset.non_empty().tolist() == [0, 1]
    assert "dog" in dataset.table() and "3 images (1 without boxes), 3 boxes (1 crowds" in dataset.table()


BROKEN = {  # case: (change of the json, what the message must name)
    "lacks bbox": (lambda c: c["annotations"][0].pop("bbox"), ["valid bbox", "'id': 1"]),
    "unknown category": (lambda c: c["annotations"][0].update(category_id=4),
                         ["annotation 1", "image 3", "category 4"]),
    "no such image": (lambda c: c["annotations"][1].update(image_id=77), ["annotation 2", "image 77"]),
    "duplicate annotation": (lambda c: c["annotations"][1].update(id=1), ["annotation id 1", "2 times"]),
    "duplicate image": (lambda c: c["images"][1].update(id=7), ["image id 7", "2 times"]),
    "duplicate category": (lambda c: c["categories"][1].update(id=5), ["category id 5"]),
    "category id as text": (lambda c: c["annotations"][0].update(category_id="5"), ["unknown category '5'"]),
    "class name as number": (lambda c: c["categories"][0].update(name=1), ["lacks a valid name"]),
    "iscrowd as text": (lambda c: c["annotations"][0].update(iscrowd="0"), ["tion 1", "iscrowd is '0'"]),
    "mixed image ids": (lambda c: c["images"][2].update(id="9"), ["all text or all whole numbers"]),
    "mixed category ids": (lambda c: (c["categories"][1].update(id="9"),
                                      [a.update(category_id="9") for a in c["annotations"]
                                       if a["category_id"] != 5]), ["ids of categories must be all text"]),
    "huge image id": (lambda c: c["images"][2].update(id=2 ** 70), ["whole numbers below 2^63"]),
    "an id that is a truth value": (lambda c: c["images"][2].update(id=True), ["ids of images"]),
    "huge coordinate": (lambda c: c["annotations"][0].update(bbox=[1, 2, 10 ** 400, 4]), ["has a bbox"]),
    "huge area": (lambda c: c["annotations"][0].update(area=10 ** 400), ["annotation 1", "area"]),
    "class name with escapes": (lambda c: c["categories"][0].update(name="a\x1b[31m"), ["class name"]),
    "class name with half a character": (lambda c: c["categories"][0].update(name="a\ud800"), ["class name"]),
    "bbox of three": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3]), ["annotation 1", "[1, 2, 3]"]),
    "bbox of text": (lambda c: c["annotations"][0].update(bbox=["1", 2, 3, 4]),
                     ["annotation 1", "['1', 2, 3, 4]"]),
    "image of no size": (lambda c: c["images"][0].update(width=0), ["image 7", "width 0"]),
    "no categories": (lambda c: c.update(categories=[]), ["0 categories"]),
    "not COCO": (lambda c: c.pop("annotations"), ["not a COCO annotation file", "'annotations'"]),
    "missing image file": (lambda c: c["images"][2].update(file_name="x.jpg"),
                        ["x.jpg does not exist", "1 of 3"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_structural_errors_stop_and_name_the_annotation(coco, case):
    change, words = BROKEN[case]
    with pytest.raises(DataError) as error:
        open_folder(coco(change), "train2017")
    for word in ["instances_train2017.json", *words]:
        assert word in str(error.value)


@pytest.mark.parametrize(("bbox", "why"), [
    ([5, 5, -3, 4], "no area"), ([5, 5, 0, 4], "no area"), ([float("nan"), 5, 3, 4], "not finite"),
    ([5, 5, float("inf"), 4], "not finite"), ([50, 5, 3, 4], "outside its 40 x 30"),
    ([-9, 5, 9, 4], "outside")])
def test_invalid_boxes_are_named_counted_and_left_out(coco, bbox, why):
    dataset = open_folder(coco(lambda c: c["annotations"][1].update(bbox=bbox)), "train2017")
    assert len(dataset.boxes) == 2 and dataset.objects(0)[1].tolist() == [CROWD]
    named, summary = dataset.notes
    assert "instances_train2017.json: image 7, annotation 2" in named and str(bbox) in named and why in named
    assert summary == "left out 1 invalid boxes of 3, in training and in scoring"


def test_a_long_list_of_invalid_boxes_is_cut(coco):
    def change(content):
        content["annotations"] += [{"id": 100 + i, "image_id": 7, "category_id": 5, "bbox": [0, 0, 0, 0]}
                                   for i in range(25)]
    notes = open_folder(coco(change), "train2017").notes
    assert len(notes) == layouts.LISTED_PROBLEMS + 2
    assert notes[-2] == "... and 15 more" and notes[-1].startswith("left out 25 invalid boxes of 28")


def test_annotation_id_0_is_named(coco):
    notes = open_folder(coco(lambda c: c["annotations"][1].update(id=0)), "train2017").notes
    assert len(notes) == 1 and "annotation id 0 (image 7)" in notes[0]


def test_boxes_over_the_border_are_clipped_and_tiny_ones_not_trained_on(coco):
    def change(content):
        content["annotations"][0]["bbox"] = [20, 2, 30, 20]
        content["annotations"][1]["bbox"] = [3, 3, 0.5, 9]
    dataset = open_folder(coco(change), "train2017")
    assert dataset.objects(1)[0].tolist() == [[20, 2, 30, 22]]
    assert dataset.boxes[2].tolist() == [20, 2, 50, 22]  # scored as annotated
    assert dataset.objects(0)[1].tolist() == [CROWD]
    assert "1 boxes reach over the border" in dataset.notes[0] and "annotation 1," in dataset.notes[0]
    assert "1 boxes are under 1 px" in dataset.notes[1] and "annotation 2," in dataset.notes[1]


def test_splits_are_joined(coco, tmp_path):
    root = coco(lambda c: c.update(images=c["images"][:2]))
    shutil.copytree(tmp_path / "train2017", tmp_path / "val2014")
    coco(lambda c: c.update(images=c["images"][2:], annotations=[]), "instances_valminusminival2014.json")
    dataset = open_folder(root, "train2017+valminusminival2014")
    assert dataset.image_ids.tolist() == [7, 3, 9]
    assert dataset.paths[2].decode() == str(tmp_path / "val2014" / "c.jpg")
    coco(lambda c: None, "instances_valminusminival2014.json")
    with pytest.raises(DataError, match="image id 7 occurs 2 times"):
        open_folder(root, "train2017+valminusminival2014")
    coco(lambda c: c["categories"][0].update(name="cow"), "instances_valminusminival2014.json")
    with pytest.raises(DataError, match="instances_valminusminival2014.json: its categories differ"):
        open_folder(root, "train2017+valminusminival2014")


def test_a_file_and_a_folder_named_directly(coco, tmp_path):
    coco()
    json_path = tmp_path / "annotations" / "instances_train2017.json"
    dataset = open_folder("anything", "any", str(json_path), str(tmp_path / "train2017"))
    assert len(dataset) == 3 and dataset.image(0).size == (40, 30)
    with pytest.raises(DataError, match="belong together"):
        open_folder("anything", "any", str(json_path))


def test_names_of_any_alphabet_a_byte_order_mark_and_the_current_folder(coco, tmp_path, monkeypatch):
    root = coco(lambda c: c["images"][0].update(file_name="bär.jpg"))
    (tmp_path / "train2017" / "a.jpg").rename(tmp_path / "train2017" / "bär.jpg")
    path = tmp_path / "annotations" / "instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert open_folder(root, "train2017").image(0).size == (40, 30)
    monkeypatch.chdir(tmp_path / "train2017")
    assert len(open_folder("", "", str(path), ".")) == 3


def test_classes_follow_the_model_by_name(coco):
    root = coco()
    dataset = open_folder(root, "train2017", names=["dog", "cat"])
    assert dataset.category_ids == [90, 5] and dataset.objects(1)[1].tolist() == [0]
    with pytest.raises(DataError, match="only in the file .'cat'., only in the model .'cow'."):
        open_folder(root, "train2017", names=["dog", "cow"])


def test_missing_places_are_named(coco, tmp_path):
    root = coco()
    assert layout(root) == "coco"
    for arguments, words in (((str(tmp_path / "no"), "x"), "no does not exist"),
                             ((root, "val2017"), "instances_val2017.json does not exist"),
                             ((str(tmp_path / "train2017"), "x"), "neither COCO layout .* nor VOC")):
        with pytest.raises(DataError, match=words):
            open_folder(*arguments)
    shutil.rmtree(tmp_path / "train2017")
    with pytest.raises(DataError, match="train2017 does not exist: 3 of 3 images"):
        open_folder(root, "train2017")
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(DataError, match="instances_train2017.json: not JSON"):
        open_folder(root, "train2017")


@pytest.mark.parametrize("indent", [None, 1])
def test_segmentation_outlines_are_skipped(coco, tmp_path, indent):
    root, path = coco(), tmp_path / "annotations" / "instances_train2017.json"
    plain = open_folder(root, "train2017")
    content = json.loads(path.read_text())
    outlines = [[[1.5, 2, -3e-1, 4e+20], [5, 6]], {"counts": "0[1]2", "size": [3, 4]}, "a {n} odd one"]
    for i, annotation in enumerate(content["annotations"]):
        outline = {"segmentation": outlines[i]}
        content["annotations"][i] = outline | annotation if i % 2 else annotation | outline
    content["categories"][0]["note"] = 'the "segmentation": [1, 2'
    path.write_text("\ufeff" + json.dumps(content, indent=indent), encoding="utf-8")
    again = open_folder(root, "train2017")
    assert np.array_equal(again.boxes, plain.boxes) and np.array_equal(again.areas, plain.areas)
    text = path.read_text(encoding="utf-8")
    path.write_text(text + "]")
    with pytest.raises(DataError, match=f"Extra data: .*char {len(text) - 1}"):  # the mark does not count
        open_folder(root, "train2017")


def test_real_coco(coco_mini):
    dataset = open_folder(str(coco_mini), "train2017")
    assert len(dataset) == 111 and len(dataset.names) == 80 and dataset.names[0] == "person"
    assert dataset.category_ids[-1] == 90 and dataset.crowd.sum() == 12 and len(dataset.non_empty()) <= 109
    sample = load_sample(dataset, 0, 800, 1333)
    assert min(sample["image"].shape[:2]) == 800 or max(sample["image"].shape[:2]) == 1333


# ---------------------------------------------------------------------------- VOC

VOC_FILE = ("<annotation><size><width>{width}</width><height>30</height><depth>3</depth></size>"
            "{objects}</annotation>")
VOC_OBJECT = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
              "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>")


@pytest.fixture
def voc(tmp_path):
    """A VOC tree of two images, 000001 with the given objects and 000002 without any."""
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / "VOC2007" / folder).mkdir(parents=True)

    def write(*objects, width=40):
        base = tmp_path / "VOC2007"
        for name, rows in (("000001", objects), ("000002", ())):
            text = VOC_FILE.format(width=width, objects="".join(VOC_OBJECT.format(*o) for o in rows))
            (base / "Annotations" / f"{name}.xml").write_text(text)
            Image.new("RGB", (40, 30), "grey").save(base / "JPEGImages" / f"{name}.jpg")
        (base / "ImageSets" / "Main" / "trainval.txt").write_text("000001\n000002\n")
        return str(tmp_path)
    return write


def test_voc_counts_pixels_from_one(voc):
    root = voc(("dog", 0, 1, 1, 40, 30), ("cat", 1, 11, 6, 20, 15))
    dataset = open_folder(root, "2007_trainval")
    assert layout(root) == "voc"
    assert dataset.names == list(data.VOC_CLASSES) and dataset.voc
    assert dataset.boxes.tolist() == [[0, 0, 40, 30], [10, 5, 20, 15]]  # the first covers the 40 x 30 image
    assert dataset.objects(0)[1].tolist() == [data.VOC_CLASSES.index("dog")]
    assert len(dataset.objects(0, use_difficult=True)[1]) == 2
    assert dataset.image_ids.tolist() == ["000001", "000002"]


def test_voc_with_classes_of_its_own_and_sizes_from_the_images(voc):
    dataset = open_folder(voc(("zebra", 0, 2, 2, 9, 9), ("ant", 0, 2, 2, 9, 9), width=0), "2007_trainval")
    assert dataset.names == ["ant", "zebra"] and dataset.sizes.tolist() == [[30, 40], [30, 40]]
    with pytest.raises(DataError, match=r"000001.xml: object 1 \(zebra\), .*: unknown class; .* knows ant"):
        open_folder(voc(("zebra", 0, 2, 2, 9, 9)), "2007_trainval", names=["ant"])


def test_voc_names_with_spaces_and_other_suffixes(voc, tmp_path):
    root = voc(("dog", 0, 2, 2, 9, 9))
    base = tmp_path / "VOC2007"
    for folder, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        (base / folder / f"000002{suffix}").rename(base / folder / f"my dog{suffix.replace('.jpg', '.PNG')}")
    xml = base / "Annotations" / "my dog.xml"
    text = xml.read_text().replace("<size>", "<filename>my dog.PNG</filename><size>")
    xml.write_text(text.replace("40", "40.0"))
    (base / "ImageSets" / "Main" / "dog_trainval.txt").write_text("000001  1\nmy dog -1\n")
    dataset = open_folder(root, "2007_dog_trainval")
    assert dataset.image_ids.tolist() == ["000001", "my dog"] and dataset.image(1).size == (40, 30)


def test_voc_mistakes_are_named(voc, tmp_path):
    dataset = open_folder(voc(("dog", 0, 9, 9, 9, 20), ("dog", 0, 9, 9, 5, 20), ("dog", 0, 2, 2, 9, 9)),
                           "2007_trainval")
    assert (len(dataset.boxes) == 1
            and "000001.xml: object 1 (dog), bndbox [9.0, 9.0, 9.0, 20.0]" in dataset.notes[0])
    with pytest.raises(DataError, match="YEAR_SPLIT"):
        open_folder(str(tmp_path), "trainval")
    base = tmp_path / "VOC2007"
    (base / "Annotations" / "000001.xml").write_text(
        "<annotation><object><name>dog</name></object></annotation>")
    with pytest.raises(DataError, match="000001.xml: not a VOC annotation"):
        open_folder(str(tmp_path), "2007_trainval")
    (base / "Annotations" / "000001.xml").write_text("<annotation>")
    with pytest.raises(DataError, match="000001.xml: not XML"):
        open_folder(str(tmp_path), "2007_trainval")
    (base / "Annotations" / "000001.xml").unlink()
    with pytest.raises(DataError, match="000001.xml does not exist"):
        open_folder(str(tmp_path), "2007_trainval")


def test_real_voc_with_its_two_broken_rows(bccd):
    dataset = open_folder(str(bccd), "2007_trainval")
    assert dataset.names == ["Platelets", "RBC", "WBC"] and len(dataset) == 292
    assert dataset.notes[-1] == "left out 2 invalid boxes of 3943, in training and in scoring"


# ---------------------------------------------------------------------------- images

def test_a_folder_of_images_is_a_dataset_without_boxes(tmp_path):
    for name, size in (("b.PNG", (8, 6)), ("a.jpg", (5, 7))):
        Image.new("RGB", size).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    dataset = image_folder(tmp_path, ["cat"], [7])
    assert dataset.image_ids.tolist() == ["a.jpg", "b.PNG"] and dataset.sizes.tolist() == [[7, 5], [6, 8]]
    assert dataset.boxes.shape == (0, 4) and dataset.image(1).size == (8, 6)
    assert image_folder(tmp_path / "a.jpg", ["cat"], [7]).image_ids.tolist() == ["a.jpg"]
    with pytest.raises(DataError, match="no images"):
        image_folder(tmp_path / "nowhere", ["cat"], [7])


def test_folders_files_and_patterns_of_images_are_joined(tmp_path):
    for path in ("one/1.png", "one/deep/er/2.png", "two/1.png", "two/3.jpg", "two/4.jpg", "5.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 6)).save(tmp_path / path)
    patterns = [tmp_path / "one", str(tmp_path / "two" / "*.jpg"), str(tmp_path / "5.png")]
    dataset = image_folder(patterns, ["cat"], [7])
    assert sorted(dataset.image_ids.tolist()) == ["1.png", "3.jpg", "4.jpg", "5.png", "deep/er/2.png"]
    dataset = image_folder([tmp_path / "one", tmp_path / "two"], ["cat"], [7])  # both have a 1.png
    assert {str(tmp_path / "one/1.png"), str(tmp_path / "two/1.png"),
            "3.jpg"} <= set(dataset.image_ids.tolist())


def test_broken_images_of_a_folder_are_left_out_and_named(tmp_path):
    noise = Image.effect_noise((90, 70), 80)
    noise.save(tmp_path / "good.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:1500])
    (tmp_path / "empty.png").touch()
    (tmp_path / "fake.png").write_text("<html>not found</html>")
    steps = []

    class Shown:
        def __init__(self, what, total):
            steps.append(total)

        def add(self, count):
            steps.append(count)

    dataset = image_folder(tmp_path, ["cat"], [7], Shown)
    assert dataset.image_ids.tolist() == ["good.jpg"] and steps == [4, 1, 1, 1, 1]
    assert len(dataset.notes) == 3
    for name, note in zip(("cut.jpg", "empty.png", "fake.png"), dataset.notes):
        assert note.startswith(f"skipped: {tmp_path / name}: cannot be read as an image")
    (tmp_path / "good.jpg").unlink()
    with pytest.raises(DataError, match="none of the 3 images can be read, the first: .*cut.jpg"):
        image_folder(tmp_path, ["cat"], [7])


def test_every_mode_becomes_rgb(tmp_path):
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    for name, image in {
            "grey": Image.fromarray((ramp / 257).astype(np.uint8)),
            "sixteen": Image.fromarray(ramp.astype(np.uint16)),
            "float": Image.fromarray((ramp / 257).astype(np.float32)), "cmyk": Image.new("CMYK", (8, 8)),
            "alpha": Image.new("RGBA", (8, 8), (9, 9, 9, 0)), "bit": Image.new("1", (8, 8), 1),
            "palette": Image.new("RGB", (8, 8), "red").quantize(), "la": Image.new("LA", (8, 8))}.items():
        path = tmp_path / f"{name}.tiff"
        image.save(path)
        read = data.read_image(str(path))
        assert read.mode == "RGB" and read.size == (8, 8)
        if name in ("grey", "sixteen", "float"):  # 16 bits are scaled down, not cut off at 255
            np.testing.assert_allclose(np.asarray(read)[..., 0], ramp / 257, atol=1)


def test_exif_orientation_is_applied_and_compared_with_the_annotation(coco, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (40, 30), "grey").save(tmp_path / "train2017" / "b.jpg", exif=exif)
    dataset = open_folder(coco(), "train2017")
    assert dataset.image(1).size == (30, 40)
    Image.new("RGB", (30, 40), "grey").save(tmp_path / "train2017" / "b.jpg", exif=exif)
    for shrink in (1, 4):
        with pytest.raises(DataError, match="b.jpg: the image is 40 x 30 .* says 30 x 40"):
            dataset.image(1, shrink)


def test_a_large_jpeg_is_decoded_smaller_but_not_too_small(coco_mini, tmp_path):
    dataset = open_folder(str(coco_mini), "val2017")
    index = int(np.flatnonzero((dataset.sizes == (480, 640)).all(axis=1))[0])
    for shrink, expected in ((1, (640, 480)), (1.99, (640, 480)), (2, (320, 240)), (3.99, (320, 240)),
                             (4.5, (160, 120))):
        assert dataset.image(index, shrink).size == expected
    whole, half = (np.asarray(image.resize((160, 120), Image.BILINEAR), int) for image in
                   (dataset.image(index), dataset.image(index, 3)))
    assert 0 < np.abs(whole - half).mean() < 2  # of 255
    exif = Image.Exif()
    exif[0x0112] = 6
    dataset.image(index).save(tmp_path / "turned.jpg", exif=exif)
    assert data.read_image(str(tmp_path / "turned.jpg"), (640, 480), 2).size == (240, 320)
    sample = load_sample(dataset, index, 100, 1000)
    assert sample["image"].shape == (100, 133, 3) and sample["original_size"] == (480, 640)


def test_an_image_decoded_smaller_stays_under_its_boxes(tmp_path):
    for width, height, part in ((1000, 776, 8), (1002, 778, 2), (1001, 777, 1)):
        pixels = np.zeros((height, width, 3), np.uint8)
        pixels[700:760, 900:960] = 255
        Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
        image = data.read_image(str(tmp_path / "a.jpg"), (height, width), 8)
        assert image.size == (width // part, height // part)
        small = data.resize(np.array(image), 97, 125)[..., 0] / 255.0
        for axis, middle in ((0, 930 * 125 / width), (1, 730 * 97 / height)):
            profile = small.sum(axis)
            center = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
            assert abs(center - middle) < 0.1  # px of the small image


@pytest.mark.parametrize("content", [b"", b"not an image", "truncated"])
def test_broken_images_are_named(coco, tmp_path, content):
    path = tmp_path / "train2017" / "a.jpg"
    path.write_bytes(path.read_bytes()[:300] if content == "truncated" else content)
    with pytest.raises(DataError, match="a.jpg: cannot be read as an image"):
        open_folder(coco(), "train2017").image(0)


def test_images_are_resized_as_pillow_does(coco_mini):
    paths = sorted((coco_mini / "val2017").iterdir())[:6]
    sizes = (800, 1067), (64, 96), (333, 500), (100, 640), (7, 5), (480, 640)
    for path, (height, width) in zip(paths, sizes):
        image = Image.open(path).convert("RGB")
        ours = data.resize(np.array(image), height, width).astype(int)
        theirs = np.asarray(image.resize((width, height), Image.BILINEAR)).astype(int)
        assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 1


def test_resizing():
    assert resized_shape(480, 640, 800, 1333) == (800, 1067)  # 640 * 800 / 480 = 1066.67
    assert resized_shape(300, 900, 800, 1333) == (444, 1333)  # the long side limits: 300 * 1333 / 900 = 444.3
    assert resized_shape(1, 4000, 800, 1333) == (1, 1333)


def test_flip_and_resize_move_boxes_with_the_image(coco, tmp_path):
    image = Image.new("RGB", (30, 40))
    image.paste("white", (1, 2, 11, 22))
    image.save(tmp_path / "train2017" / "b.png")
    dataset = open_folder(coco(lambda c: c["images"][1].update(file_name="b.png")), "train2017")
    for flip in (False, True):
        sample = load_sample(dataset, 1, 60, 1000, flip)
        assert sample["image"].shape == (80, 60, 3)
        x1, y1, x2, y2 = sample["boxes"][0].astype(int)
        assert (x1, x2) == ((38, 58) if flip else (2, 22)) and (y1, y2) == (4, 44)
        inside = np.zeros((80, 60), bool)
        inside[y1:y2, x1:x2] = True
        assert sample["image"][inside].mean() > 230 and sample["image"][~inside].mean() < 10


def test_batches_are_padded_at_the_right_and_bottom(coco):
    dataset = open_folder(coco(), "train2017")
    batch = collate([load_sample(dataset, i, 30, 60) for i in (0, 1, 2)])
    # 40 x 30 stays, 30 x 40 stays, 64 x 32 becomes 60 x 30: the largest, 40 high and 60 wide,
    # rounded up to 32
    assert batch["images"].shape == (3, 3, 64, 64) and batch["images"].dtype == torch.uint8
    assert batch["sizes"].tolist() == [[30, 40], [40, 30], [30, 60]]
    assert batch["gt_boxes"].shape == (3, 2, 4) and batch["gt_boxes"].dtype == torch.float32
    assert batch["gt_labels"].tolist() == [[0, CROWD], [1, PADDING], [PADDING, PADDING]]
    assert batch["images"][0, :, 30:].sum() == 0 and batch["images"][0, :, :30, :40].min() > 100
    assert batch["image_ids"] == [7, 3, 9]
    assert collate([load_sample(dataset, 2, 30, 60)])["gt_labels"].tolist() == [[PADDING]]
    assert collate([load_sample(dataset, 2, 30, 60)], size_divisor=1)["images"].shape == (1, 3, 30, 60)
    for shapes, expected in (([(32, 32), (96, 128)], (96, 128)), ([(30, 60), (96, 128)], (30, 60))):
        sample = load_sample(dataset, 2, 30, 60)
        assert collate([sample], shapes=shapes)["images"].shape == (1, 3, *expected)
    with pytest.raises(DataError, match="images of 30 x 60 .* fit none of the sizes"):
        collate([load_sample(dataset, 2, 30, 60)], shapes=[(96, 32)])


def test_a_few_sizes_hold_every_batch():
    dataset = open_dataset("shapes", "val")
    assert data.shape_buckets(dataset, 128, 128) == [(96, 128), (128, 96), (128, 128)]
    dataset.sizes = np.array([(480, 640), (640, 480), (427, 640), (375, 500), (640, 640), (200, 640)])
    # At 800/1333: 800 x 1067, 800 x 1199, 800 x 1067, 800 x 800, 417 x 1333. From 800 to 1333 in four steps,
    # 933, 1067, 1200, 1333, up to the next multiple of 32.
    wide = [(800, 960), (800, 1088), (800, 1216), (800, 1344)]
    buckets = data.shape_buckets(dataset, 800, 1333)
    assert sorted(buckets) == sorted(wide + [(width, height) for height, width in wide] + [(1344, 1344)])
    assert buckets[:2] == [(800, 960), (960, 800)]  # the first that fits is the smallest
    for height, width in dataset.sizes:
        height, width = data.resized_shape(height, width, 800, 1333)
        assert any(height <= shape[0] and width <= shape[1] for shape in buckets)


# ---------------------------------------------------------------------------- batches

def steps(dataset, **kwargs):
    return list(TrainBatchSampler(dataset, np.arange(len(dataset)), **kwargs))


def test_ranks_and_micro_batches_share_out_the_same_images():
    dataset = open_dataset("shapes", "val")
    whole = steps(dataset, batch_size=8, start=0, stop=40)
    for world, accumulate in ((2, 1), (4, 1), (2, 2), (1, 4)):
        parts = [steps(dataset, batch_size=8, rank=r, world=world, accumulate=accumulate, start=0, stop=40)
                 for r in range(world)]
        for step in range(40):
            seen = sum((part[step * accumulate + k] for part in parts for k in range(accumulate)), [])
            assert seen == whole[step]


def draws(dataset, **kwargs):
    """(steps, batch_size, 2): position and image index of every draw."""
    return np.array(steps(dataset, **kwargs))


def test_every_draw_is_made_once_and_an_epoch_draws_every_image_once():
    dataset = open_dataset("shapes", "val")
    for window in (1, 4, 32):
        drawn = draws(dataset, batch_size=8, seed=3, stop=96, window=window).reshape(-1, 2)
        drawn = drawn[drawn[:, 0].argsort()]
        assert drawn[:, 0].tolist() == list(range(96 * 8))
        epochs = [drawn[start:start + 200, 1].tolist() for start in range(0, 600, 200)]
        assert all(sorted(epoch) == list(range(200)) for epoch in epochs) and epochs[0] != epochs[1]
    assert np.array_equal(drawn[:200, 1], np.array(epochs[0]))
    other_seed, ours = (draws(dataset, batch_size=8, seed=seed, stop=9) for seed in (4, 3))
    assert not np.array_equal(other_seed, ours)


def test_steps_hold_one_orientation_but_for_one_in_a_window():
    dataset = open_dataset("shapes", "val")
    wide = dataset.sizes[:, 1] >= dataset.sizes[:, 0]
    assert 50 < wide.sum() < 150
    share = wide[draws(dataset, batch_size=8, stop=96)[..., 1]].mean(axis=1).reshape(3, 32)
    assert (((share > 0) & (share < 1)).sum(axis=1) <= 1).all()
    assert ((share == 1).sum(axis=1) > 8).all() and (np.diff(share, axis=1) > 0).any()  # not sorted any more
    # A window of one step: wide images first, so that few micro-batches hold both orientations.
    for step in wide[draws(dataset, batch_size=8, stop=20, window=1)[..., 1]]:
        assert sorted(step, reverse=True) == step.tolist()


def published_draws(wide, steps, seed, devices=8):
    """Images of every step as detectron2 draws them.

    Every device takes every 8th draw of one endless sequence of permutations, into a bucket for each
    orientation. A bucket with two images leaves as a pair.
    """

    def endless():
        rng = np.random.default_rng(seed)
        while True:
            yield from rng.permutation(len(wide))

    def pairs(device):
        buckets = {True: [], False: []}
        for index in islice(endless(), device, None, devices):
            bucket = buckets[bool(wide[index])]
            bucket.append(index)
            if len(bucket) == 2:
                yield list(bucket)
                bucket.clear()

    loaders = [pairs(device) for device in range(devices)]
    return np.array([sum((next(loader) for loader in loaders), []) for _ in range(steps)])


@pytest.mark.parametrize("images", [5, 20, 40, 200])
def test_few_images_are_drawn_as_the_published_code_draws_them(images):
    dataset = open_dataset("shapes", "val")
    indices = np.arange(images)
    dataset.sizes[indices] = [(30, 40) if i % 5 else (40, 30) for i in indices]  # a fifth is tall
    wide = dataset.sizes[indices, 1] >= dataset.sizes[indices, 0]
    theirs = published_draws(wide, 600, seed=1)
    ours = np.array(list(TrainBatchSampler(dataset, indices, 16, seed=1, stop=600, window=1)))
    counts = [np.bincount(drawn.ravel(), minlength=images) for drawn in (ours[..., 1], theirs)]
    assert counts[0].max() - counts[0].min() <= 1  # uniform
    assert np.abs(counts[1] - 600 * 16 / images).max() < 30
    # Share of tall images in a step: the same mean, and never a step of tall images alone.
    tall = [(~wide)[drawn].mean(axis=1) for drawn in (ours[..., 1], theirs)]
    assert tall[0].mean() == pytest.approx(0.2, abs=0.001) and tall[1].mean() == pytest.approx(0.2, abs=0.01)
    assert max(t.max() for t in tall) < 0.8
    distinct = [np.mean([len(set(step)) for step in drawn.tolist()]) for drawn in (ours[..., 1], theirs)]
    assert distinct[0] == pytest.approx(distinct[1], rel=0.15)
    # Copies of an image in a step have flips and sizes of their own.
    samples = TrainSamples(dataset, [30, 36, 40, 44, 48, 52], 90, seed=1)
    if images == 5:
        views = {(index, *load.shape[:2]) for position, index in ours[0].tolist()
                 for load in [samples[position, index]["image"]]}
        assert len(views) > 8


def test_a_restart_continues_the_stream():
    dataset = open_dataset("shapes", "val")
    assert (steps(dataset, batch_size=16, start=0, stop=30)[17:]
            == steps(dataset, batch_size=16, start=17, stop=30))


def test_a_set_smaller_than_the_batch_is_repeated(coco):
    dataset = open_folder(coco(), "train2017")
    drawn = sorted(i for step in steps(dataset, batch_size=4, stop=3, window=1) for _, i in step)
    assert drawn == [0] * 4 + [1] * 4 + [2] * 4


def test_detection_batches_hold_images_of_one_size_and_every_image_once(coco):
    dataset = open_folder(coco(), "train2017")
    dataset.sizes = np.array([(30, 40), (40, 30), (60, 80)])  # at 30/60 the first and the last are equal
    assert list(SameSizeBatchSampler(dataset, 30, 60, 2, rank=0, world=1)) == [[0, 2], [1]]
    assert list(SameSizeBatchSampler(dataset, 30, 60, 1, rank=0, world=1)) == [[0], [2], [1]]
    ranks = [SameSizeBatchSampler(dataset, 30, 60, 1, rank=r, world=2) for r in range(2)]
    assert [list(batches) for batches in ranks] == [[[0], [1]], [[2]]]
    assert [len(batches) for batches in ranks] == [2, 1]


def test_augmentation_depends_on_the_seed_and_the_draw_alone():
    dataset = open_dataset("shapes", "val")
    samples = TrainSamples(dataset, [64, 96, 128], 256, seed=5)
    assert all(np.array_equal(samples[e, 3]["image"], samples[e, 3]["image"]) for e in range(4))
    assert {min(samples[e, 3]["image"].shape[:2]) for e in range(12)} == {64, 96, 128}
    one_size = TrainSamples(dataset, [96], 256, seed=5)
    plain = load_sample(dataset, 3, 96, 256)["image"]
    images = {one_size[e, 3]["image"].tobytes() for e in range(12)}
    assert images == {plain.tobytes(), plain[:, ::-1].tobytes()}

"""Detection datasets: COCO and Pascal VOC layouts, their checks, reading and resizing images, batches.

A class is a label 0..C-1. A box is (x1, y1, x2, y2) in pixels and x2 - x1 wide. Category ids and other box
conventions exist only in this file and in the files that are written out.
"""
import glob
import json
import math
import mmap
import multiprocessing
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, get_worker_info

from runtime import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
# gt_labels of a padding row and of a crowd region. A crowd is background in FCOS, RetinaNet and Faster R-CNN;
# FSAF ignores its middle. Scoring ignores it, and it is never a shot.
PADDING, CROWD = -1, -2
MAX_WORKERS = 256  # loader processes of one rank
BUCKETS = 4  # number of long sides in `shape_buckets`: 960, 1088, 1216, 1344 for COCO at 800/1333
LISTED_PROBLEMS = 10  # invalid boxes that are described one by one, before "... and N more"
# COCO's customary splits without a folder of their own: {split: folder of its images}
EXTRA_COCO_SPLITS = {"minival2014": "val2014", "valminusminival2014": "val2014", "test-dev2017": "test2017"}
ROBOFLOW_FILE = "_annotations.coco.json"
# COCO's 80 classes in the order of their category ids, which have gaps.
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,"
    "keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
# COCO's classes that VOC also has: the novel ones of the few-shot benchmark.
COCO_NOVEL = tuple("person,bicycle,car,motorcycle,airplane,bus,train,boat,bird,cat,dog,horse,sheep,cow,"
                   "bottle,chair,couch,potted plant,dining table,tv".split(","))
VOC_CLASSES = tuple("aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,"
                    "motorbike,person,pottedplant,sheep,sofa,train,tvmonitor".split(","))


class DataError(UserError):
    """The data cannot be used. The message names the file, the image, the annotation and the bad value."""


# ---------------------------------------------------------------------------------------------- dataset

class DetectionDataset:
    """Images and their boxes in flat arrays. Forked loader processes share arrays but copy Python objects.

    C classes: names; category_ids as in the files.
    N images: image_ids; paths as bytes; sizes (N, 2) height, width in px.
    A boxes, sorted by image: boxes (A, 4) xyxy px; classes (A,) int64 0..C-1; areas (A,) px^2, by default of
    the boxes; crowd and difficult (A,) bool; annotation_order (A,), the place of each box before sorting.
    notes: lines to print before training. voc: whether VOC's AP50 is scored, too. annotated: False for a file
    that holds images only, such as COCO's test-dev: there is nothing to score. The constructor takes the
    boxes in any order; image_index (A,) is the index of the image of each box.
    """

    def __init__(self, names, category_ids, *, image_ids, paths, sizes, boxes, classes, image_index,
                 areas=None, crowd=False, difficult=False, notes=(), voc=False, annotated=True):
        self.names, self.category_ids = list(names), list(category_ids)
        self.notes, self.voc, self.annotated = list(notes), voc, annotated
        self.image_ids, self.paths = np.asarray(image_ids), np.array([os.fsencode(path) for path in paths])
        self.sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        if areas is None:
            areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
        order = self.annotation_order = np.argsort(image_index, kind="stable")
        self.boxes, self.classes = boxes[order], np.asarray(classes, np.int64)[order]
        self.areas = np.asarray(areas, np.float64)[order]
        self.crowd = np.broadcast_to(np.asarray(crowd, bool), len(boxes))[order]
        self.difficult = np.broadcast_to(np.asarray(difficult, bool), len(boxes))[order]
        counts = np.bincount(np.asarray(image_index, np.int64), minlength=len(self.image_ids))
        self.box_offsets = np.concatenate(([0], np.cumsum(counts)))  # (N + 1,), see `box_slice`

    def __len__(self) -> int:
        return len(self.image_ids)

    def box_slice(self, index: int) -> slice:
        """Rows of `boxes` and the other per-box arrays that belong to image `index`."""
        return slice(int(self.box_offsets[index]), int(self.box_offsets[index + 1]))

    @property
    def box_image(self) -> np.ndarray:
        """(A,) int64 index of the image of every box."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_offsets))

    def index_of_image(self) -> dict:
        """{image id: index}."""
        return {image_id: index for index, image_id in enumerate(self.image_ids.tolist())}

    def label_of_category(self) -> dict:
        """{category id: label}."""
        return {category: label for label, category in enumerate(self.category_ids)}

    def max_objects(self) -> int:
        """The largest number of boxes in one image, at least 1."""
        return max(1, int(np.diff(self.box_offsets).max(initial=0)))

    def image(self, index: int, shrink: float = 1.0) -> Image.Image:
        """`read_image` of one image. Raises DataError if it is broken or differs from its annotated size."""
        return read_image(os.fsdecode(self.paths[index]), tuple(self.sizes[index].tolist()), shrink)

    def objects(self, index: int, use_difficult: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What one image trains on: boxes (n, 4) float32 px, clipped to the image, and labels (n,) int64.

        A crowd has the label CROWD. Boxes under 1 px are left out, and VOC's difficult ones by default.
        """
        rows = self.box_slice(index)
        height, width = self.sizes[index]
        boxes = self.boxes[rows].clip(0, (width, height, width, height))
        labels = np.where(self.crowd[rows], CROWD, self.classes[rows])
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        if not use_difficult:
            keep &= ~self.difficult[rows]
        return boxes[keep].astype(np.float32), labels[keep]

    def non_empty(self, use_difficult: bool = False) -> np.ndarray:
        """Indices of the images with at least one object to train on. Crowds do not count."""
        return np.array([i for i in range(len(self)) if (self.objects(i, use_difficult)[1] >= 0).any()],
                        np.int64)

    def table(self) -> str:
        """Every class with its index, category id and counts: worth reading before every training."""
        width, box_image = max(map(len, [*self.names, "class"])), self.box_image
        lines = [f"{'class':{width}}  index  id     images    boxes"]
        for i, (name, category) in enumerate(zip(self.names, self.category_ids)):
            images = box_image[self.classes == i]
            lines.append(f"{name:{width}}  {i:5}  {category!s:5} {len(np.unique(images)):8} {len(images):8}")
        empty = int((np.diff(self.box_offsets) == 0).sum())
        lines.append(f"{len(self)} images ({empty} without boxes), {len(self.boxes)} boxes"
                     f" ({int(self.crowd.sum())} crowds, {int(self.difficult.sum())} difficult)")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- layouts

def layout(data: str) -> str:
    """What --data names: "shapes", "voc", "coco", "roboflow" or "yolo", found by looking. Raises DataError.

    A new layout needs a name here, its splits in `default_splits`, a branch in `open_folder` and a function
    like `load_voc`, which returns a DetectionDataset.
    """
    if data == "shapes":
        return "shapes"
    root = Path(data)
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist (--data takes a folder or 'shapes')")
    if any(root.glob("VOC[0-9]*")) or (root / "Annotations").is_dir():
        return "voc"
    if (root / "annotations").is_dir():
        return "coco"
    if any(root.glob(f"*/{ROBOFLOW_FILE}")):
        return "roboflow"
    if any(root.glob("*.yaml")):
        return "yolo"
    raise DataError(f"{root}: neither COCO layout (annotations/instances_SPLIT.json) nor VOC layout "
                    f"(VOC2007/ or Annotations/), Roboflow's (SPLIT/{ROBOFLOW_FILE}) or YOLO's (data.yaml). "
                    f"Other layouts need a COCO-format file and its image folder, see --help")


def default_splits(data: str) -> tuple[str, str]:
    """Names of the split to train on and of the one to score on, where none is given."""
    kind = layout(data)
    if kind == "voc":
        return ("2007_trainval", "2007_test") if any(Path(data).glob("VOC[0-9]*")) else ("train", "val")
    return {"shapes": ("train", "val"), "coco": ("train2017", "val2017"), "roboflow": ("train", "valid"),
            "yolo": ("train", "val")}[kind]


def open_folder(data: str, split: str, json_path: str | None = None, image_dir: str | None = None,
                names: list[str] | None = None) -> DetectionDataset:
    """A dataset on disk, see `layout`. `shapes.open_dataset` also knows the built-in set and YOLO's layout.

    split: one split or several joined by "+"; a VOC split is YEAR_SPLIT. json_path, image_dir: a COCO-format
    file and its images, or several of both joined by "+", instead of data and split. names: the classes of a
    model. Raises DataError if the dataset has others.
    """
    if json_path or image_dir:
        files, folders = (list(map(Path, (text or "").split("+"))) for text in (json_path, image_dir))
        if not (json_path and image_dir) or len(files) != len(folders):
            raise DataError("an annotation file and its image folder belong together: give as many of both")
        return load_coco(list(zip(files, folders)), names)
    root, kind, parts = Path(data), layout(data), split.split("+")
    if kind == "voc":
        return load_voc(root, split, names)
    if kind == "roboflow":
        return load_coco([(root / part / ROBOFLOW_FILE, root / part) for part in parts], names)
    found = []
    for part in parts:
        folder = EXTRA_COCO_SPLITS.get(part, part)
        path, info = (root / "annotations" / f"{kind}_{part}.json" for kind in ("instances", "image_info"))
        found.append((info if info.is_file() and not path.is_file() else path,
                      root / "images" / folder if (root / "images" / folder).is_dir() else root / folder))
    return load_coco(found, names)


def image_folder(patterns: Path | list[str], names: list[str], category_ids: list[int],
                 progress: Callable | None = None) -> DetectionDataset:
    """Images without annotations, from files, folders with their subfolders, and glob patterns.

    The image ids are the paths below the folder, or the file names; paths of several folders that would have
    the same id keep the folder too. Images that cannot be read are left out, with a line in `notes` for each.
    progress: see `try_images`. Raises DataError if there is no image that can be read.
    """
    patterns = [patterns] if isinstance(patterns, Path) else patterns
    files = {}  # path: id
    for pattern in map(Path, patterns):
        if pattern.exists():
            found = [pattern] if pattern.is_file() else pattern.rglob("*")
            root = pattern.parent if pattern.is_file() else pattern
        else:
            found, root = [Path(match) for match in glob.glob(str(pattern), recursive=True)], None
            if not found:
                raise DataError(f"{pattern}: no images: there is no such file or folder, and no file fits it "
                                f"as a pattern")
        files |= {path: path.relative_to(root or path.parent) for path in found
                  if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()}
    if not files:
        raise DataError(f"{', '.join(map(str, patterns))}: no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    paths = sorted(files)
    same = {name for name, count in Counter(files.values()).items() if count > 1}
    ids = [str(path if files[path] in same else files[path]) for path in paths]
    sizes, broken = try_images(lambda i: read_image(str(paths[i])).size[::-1], len(paths), progress)
    good = [i for i in range(len(paths)) if i not in broken]
    if not good:
        raise DataError(f"none of the {len(paths)} images can be read, the first: {broken[0]}")
    dataset = DetectionDataset(names, category_ids, image_ids=[ids[i] for i in good],
                               paths=[paths[i] for i in good], sizes=[sizes[i] for i in good], boxes=[],
                               classes=[], image_index=[])
    dataset.notes += [f"skipped: {message}" for message in broken.values()]
    return dataset


def try_images(read: Callable[[int], object], count: int,
               progress: Callable | None) -> tuple[list, dict[int, str]]:
    """Calls read(i) for every image, in parallel.

    progress: such as `runlog.Progress`. Returns the results and {index: what is wrong} for a DataError.
    """
    def attempt(i: int):
        try:
            return read(i)
        except DataError as error:
            return error

    results, shown = [], progress("reading", count) if progress else None
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        for result in pool.imap(attempt, range(count)):
            results.append(result)
            if shown:
                shown.add(1)
    return results, {i: str(result) for i, result in enumerate(results) if isinstance(result, DataError)}


def broken_images(dataset: DetectionDataset, progress: Callable | None = None) -> dict[int, str]:
    """Decodes every image of a dataset: {index: what is wrong} of those that cannot be read."""
    # A JPEG is read whole, but decoded at an eighth of its size.
    return try_images(lambda i: dataset.image(i, 8.0) and None, len(dataset), progress)[1]


def _refuse_duplicates(values: list, what: str, source, hint: str = ""):
    if len(set(values)) < len(values):
        value, count = Counter(values).most_common(1)[0]
        raise DataError(f"{source}: {what} {value!r} occurs {count} times{hint}")


def _refuse_missing_images(paths: list[str], source):
    """Lists each folder once instead of asking for each file: 118k files take under a second."""
    folders = [os.path.dirname(path) or "." for path in paths]
    listed = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else set() for folder in set(folders)}
    missing = [path for path, folder in zip(paths, folders) if os.path.basename(path) not in listed[folder]]
    if missing:
        folder = os.path.dirname(missing[0]) or "."
        what = missing[0] if os.path.isdir(folder) else f"image folder {folder}"
        raise DataError(f"{what} does not exist: {len(missing)} of {len(paths)} images of {source} missing")


def valid_boxes(boxes: np.ndarray, has_area: np.ndarray, sizes: np.ndarray, describe,
                 notes: list[str]) -> np.ndarray:
    """Which boxes (A, 4) can be objects of their images. What is wrong with the others goes to the notes.

    has_area: (A,) bool, from the numbers in the file. sizes: (A, 2) height, width of the image of each box.
    describe: function that names the box of a row. Returns (A,) bool.
    """
    finite = np.isfinite(boxes).all(axis=1)
    inside = (boxes[:, :2] < sizes[:, ::-1]).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    valid = finite & has_area & inside
    invalid = np.flatnonzero(~valid)
    for i in invalid[:LISTED_PROBLEMS]:
        if not finite[i]:
            why = "not finite"
        elif not has_area[i]:
            why = "no area (inverted or empty)"
        else:
            why = f"outside its {sizes[i][1]} x {sizes[i][0]} image"
        notes.append(f"{describe(i)}: {why}")
    if len(invalid) > LISTED_PROBLEMS:
        notes.append(f"... and {len(invalid) - LISTED_PROBLEMS} more")
    if len(invalid):
        notes.append(f"left out {len(invalid)} invalid boxes of {len(boxes)}, in training and in scoring")
    leaving = (boxes[:, 2:] > sizes[:, ::-1] + 1).any(axis=1)
    if len(boxes) >= 10 and leaving.mean() > 0.5:
        notes.append(f"{leaving.sum()} of {len(boxes)} boxes end outside their image. Is bbox x1 y1 x2 y2 in "
                     f"this file? COCO's is x y width height")
    beyond = valid & ((boxes[:, :2] < -1).any(axis=1) | (boxes[:, 2:] > sizes[:, ::-1] + 1).any(axis=1))
    tiny = valid & ((boxes[:, 2:] - boxes[:, :2]) < 1).any(axis=1)
    for rows, what in ((beyond, "reach over the border of their image; training clips them"),
                       (tiny, "are under 1 px wide or high; scoring counts them, training leaves them out. "
                              "Are the coordinates pixels?")):
        if rows.any():
            notes.append(f"{rows.sum()} boxes {what} (the first: {describe(rows.argmax())})")
    return valid


# ---------------------------------------------------------------------------------------------- COCO and VOC

_ID, _NUMBER = (int, str), (int, float)
_COCO_FIELDS = {"images": {"id": _ID, "file_name": str, "width": _NUMBER, "height": _NUMBER},
                "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": list},
                "categories": {"id": _ID, "name": str}}
# Outlines fill most of a COCO file and are not used here. Parsing without them takes a quarter of the time.
_OUTLINES = re.compile(rb'"segmentation"\s*:\s*(?:\[[][\d\s.,eE+-]*\]|\{[^{}]*\})')


def load_coco(parts: list[tuple[Path, Path]], names: list[str] | None = None) -> DetectionDataset:
    """One dataset from one or several COCO-format files.

    parts: (json file, image folder) pairs with the same categories. names: see `open_folder`. An invalid box
    is left out and described in the notes; any other mistake raises DataError.
    """
    images, paths, annotations, files, categories = [], [], [], [], {}
    for path, folder in parts:
        content = _read_coco_file(path)
        found = {category["id"]: category["name"] for category in content["categories"]}
        if categories and found != categories:
            raise DataError(f"{path}: its categories differ from those of {parts[0][0]}")
        categories = found
        image_paths = [str(folder / image["file_name"]) for image in content["images"]]
        _refuse_missing_images(image_paths, path)
        paths += image_paths
        images += content["images"]
        annotations += content["annotations"]
        files += [path] * len(content["annotations"])
    source = " and ".join(str(path) for path, _ in parts)
    names, found = names or list(found.values()), set(found.values())
    if set(names) != found:
        raise DataError(f"{source}: not the model's classes: only in the file {sorted(found - set(names))}, "
                        f"only in the model {sorted(set(names) - found)}")
    label_of = {category: names.index(name) for category, name in categories.items()}
    index_of = {image["id"]: i for i, image in enumerate(images)}
    image_ids = np.array(list(index_of))
    if image_ids.tolist() != list(index_of):
        raise DataError(f"{source}: image ids must be all text or all numbers below 2^63")
    _refuse_duplicates([image["id"] for image in images], "image id", source,
                       ". The files number their images alike: give every image an id of its own")
    notes = [f"{file}: annotation id 0 (image {a['image_id']}): pycocotools ignores it, scoring here does not"
             for a, file in zip(annotations, files) if a["id"] == 0]
    notes += similar_names(sorted(found), source)

    def describe(i: int) -> str:
        a = annotations[i]
        return f"{files[i]}: image {a['image_id']}, annotation {a['id']}, bbox {a['bbox']}"

    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
    image_index = np.array([index_of[a["image_id"]] for a in annotations], np.int64)
    xywh = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    boxes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    valid = valid_boxes(boxes, (xywh[:, 2:] > 0).all(axis=1), sizes[image_index], describe, notes)
    annotations = [annotations[i] for i in np.flatnonzero(valid)]
    return DetectionDataset(
        names, sorted(label_of, key=label_of.get), image_ids=image_ids, paths=paths, sizes=sizes,
        boxes=boxes[valid], classes=[label_of[a["category_id"]] for a in annotations],
        image_index=image_index[valid], crowd=[bool(a.get("iscrowd")) for a in annotations], notes=notes,
        annotated=not all(path.name.startswith("image_info") for path, _ in parts),
        areas=[a["area"] if isinstance(a.get("area"), _NUMBER) else a["bbox"][2] * a["bbox"][3]
               for a in annotations])


def similar_names(names: list[str], source) -> list[str]:
    """A note for every two class names that differ in capitals or spaces only."""
    first, notes = {}, []
    for name in names:
        other = first.setdefault(name.strip().lower(), name)
        if other != name:
            notes.append(f"{source}: the classes {other!r} and {name!r} differ only in capitals or spaces. "
                         f"Are they one class?")
    return notes


def _read_coco_file(path: Path) -> dict:
    """A parsed file. Raises DataError if it lacks a field or if a value in it is impossible."""
    if not path.is_file():
        raise DataError(f"annotation file {path} does not exist")
    try:
        try:
            content = json.loads(_OUTLINES.sub(b'"segmentation": 0', path.read_bytes()))
        except ValueError:
            content = json.loads(path.read_bytes())  # so that the error states a place in the file itself
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if path.name.startswith("image_info") and isinstance(content, dict):  # COCO's test images
        content.setdefault("annotations", [])
    for key, fields in _COCO_FIELDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: not a COCO annotation file, the list {key!r} is missing")
        for row in content[key]:
            wrong = [field for field, kind in fields.items()
                     if not isinstance(row, dict) or not isinstance(row.get(field), kind)]
            if wrong:
                raise DataError(f"{path}: {key} entry {str(row)[:80]} lacks a valid {', '.join(wrong)}")
    images, categories = content["images"], content["categories"]
    if not images or not categories:
        raise DataError(f"{path}: has {len(images)} images and {len(categories)} categories")
    _refuse_duplicates([category["id"] for category in categories], "category id", path)
    _refuse_duplicates([category["name"] for category in categories], "category name", path)
    _refuse_duplicates([image["id"] for image in images], "image id", path)
    _refuse_duplicates([a["id"] for a in content["annotations"]], "annotation id", path)
    for image in images:
        if not (1 <= image["width"] < math.inf and 1 <= image["height"] < math.inf):
            raise DataError(f"{path}: image {image['id']}: width {image['width']}, height {image['height']}")
    image_ids, category_ids = {image["id"] for image in images}, {category["id"] for category in categories}
    for a in content["annotations"]:
        where = f"{path}: annotation {a['id']} (image {a['image_id']!r})"
        if a["image_id"] not in image_ids:
            kinds = {type(key).__name__ for key in image_ids}
            hint = "" if type(a["image_id"]).__name__ in kinds else (
                " (ids are text in one list and numbers in the other)")
            raise DataError(f"{where}: there is no such image in the file{hint}")
        if a["category_id"] not in category_ids:
            raise DataError(f"{where}: unknown category {a['category_id']!r}")
        if a.get("iscrowd") not in (None, 0, 1):
            raise DataError(f"{where}: iscrowd is {a['iscrowd']!r}, not 0 or 1")
        if not (len(a["bbox"]) == 4 and all(isinstance(v, _NUMBER) for v in a["bbox"])):
            raise DataError(f"{where}: bbox {a['bbox']} is not [x, y, width, height]")
    return content


def load_voc(root: Path, split: str, names: list[str] | None = None) -> DetectionDataset:
    """Dataset in Pascal VOC layout. split: YEAR_SPLIT, or several: "2007_trainval+2012_trainval".

    A root that holds Annotations/ itself has no year: a split is a list in ImageSets/Main, or "all", every
    file of Annotations. Images are in JPEGImages or images, with any suffix.
    Without names, the classes are VOC's twenty, or those in the files if there is any other. An invalid box
    is left out and described in the notes; any other mistake raises DataError.
    """
    image_ids, paths, sizes, objects, image_index, notes = [], [], [], [], [], []
    for part in split.split("+"):
        base, subset = root, part
        if not (root / "Annotations").is_dir():
            year, _, subset = part.partition("_")
            base = root / f"VOC{year}"
        listing = base / "ImageSets" / "Main" / f"{subset}.txt"
        if listing.is_file():
            lines = listing.read_text().splitlines()
        elif subset == "all" and base == root:
            lines = sorted(path.stem for path in (base / "Annotations").glob("*.xml"))
        else:
            raise DataError(f"{listing} does not exist (" + (
                "without lists, the split 'all' is every file of Annotations)" if base == root else
                "a VOC split is named YEAR_SPLIT, e.g. 2007_trainval)"))
        folder = base / ("JPEGImages" if (base / "JPEGImages").is_dir() else "images")
        for line in filter(None, map(str.strip, lines)):
            image_id = re.sub(r"\s+-?[01]$", "", line)  # in lists of one class a line ends in 1, 0 or -1
            size, suffix, found = _read_voc_file(base / "Annotations" / f"{image_id}.xml")
            path = str(_with_any_suffix(folder / f"{image_id}{suffix}"))
            objects += found
            image_index += [len(image_ids)] * len(found)
            image_ids.append(image_id)
            paths.append(path)
            sizes.append(size or read_image(path).size[::-1])
    if not image_ids:
        raise DataError(f"{root}: the split {split} lists no images")
    _refuse_duplicates(image_ids, "image", root)
    _refuse_missing_images(paths, f"{root} {split}")
    if names is None:
        found_names = {obj["name"] for obj in objects}
        names = list(VOC_CLASSES) if found_names <= set(VOC_CLASSES) else sorted(found_names)
    notes += similar_names(names, root)
    for obj in objects:
        if obj["name"] not in names:
            raise DataError(f"{obj['text']}: unknown class; the model knows {', '.join(names)}")
    sizes, image_index = np.array(sizes, np.int64), np.array(image_index, np.int64)
    bndbox = np.array([obj["bndbox"] for obj in objects], np.float64).reshape(-1, 4)
    boxes = bndbox - (1, 1, 0, 0)  # VOC counts pixels from 1 and includes both ends
    # A box that is one pixel wide in VOC's convention is an annotation mistake.
    has_area = (bndbox[:, 2:] > bndbox[:, :2]).all(axis=1)
    valid = valid_boxes(boxes, has_area, sizes[image_index], lambda i: objects[i]["text"], notes)
    objects = [objects[i] for i in np.flatnonzero(valid)]
    return DetectionDataset(
        names, range(1, len(names) + 1), image_ids=image_ids, paths=paths, sizes=sizes, boxes=boxes[valid],
        classes=[names.index(obj["name"]) for obj in objects], image_index=image_index[valid],
        difficult=[obj["difficult"] for obj in objects], notes=notes, voc=True)


def _with_any_suffix(path: Path) -> Path:
    """The image file of that name; one with another suffix if it does not exist; `path` if none does."""
    if path.is_file():
        return path
    others = (path.with_name(path.stem + suffix) for suffix in sorted(IMAGE_SUFFIXES))
    return next((other for other in others if other.is_file()), path)


def _read_voc_file(path: Path) -> tuple[tuple[int, int] | None, str, list[dict]]:
    """Size (height, width) or None, suffix of the image file, and objects. Raises DataError."""
    if not path.is_file():
        raise DataError(f"annotation file {path} does not exist")
    try:
        tree = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise DataError(f"{path}: not XML ({error})") from error
    try:
        size = tuple(int(float(tree.findtext(f"size/{side}", "0"))) for side in ("height", "width"))
        objects = []
        for number, obj in enumerate(tree.iter("object"), start=1):
            bndbox = [float(obj.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            name, difficult = obj.findtext("name").strip(), obj.findtext("difficult", "0").strip() == "1"
            objects.append({"name": name, "bndbox": bndbox, "difficult": difficult,
                            "text": f"{path}: object {number} ({name}), bndbox {bndbox}"})
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a VOC annotation: no valid size, name or bndbox ({error})") from error
    suffix = Path(tree.findtext("filename", "").strip()).suffix or ".jpg"
    return (size if min(size) > 0 else None), suffix, objects


# ---------------------------------------------------------------------------------------------- samples

def read_image(path: str, size: tuple[int, int] | None = None, shrink: float = 1.0) -> Image.Image:
    """Any image that Pillow reads, as upright RGB (EXIF orientation applied).

    size: (height, width) that it must have. shrink: factor by which the caller will reduce it. A JPEG is
    decoded at 1/2, 1/4 or 1/8 if that factor is at most `shrink` and divides both sides. A remainder would
    shift the image against its boxes. Raises DataError for a missing or broken file or another size.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            factor = next((n for n in (8, 4, 2) if n <= shrink and width % n == height % n == 0), 1)
            image.draft(None, (width // factor, height // factor))  # has no effect on formats other than JPEG
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # turned by 90 degrees
                width, height = height, width
            image = upright_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error
    if size not in (None, (height, width)):
        raise DataError(f"{path}: the image is {width} x {height} (EXIF orientation applied), but its "
                        f"annotation says {size[1]} x {size[0]}, so its boxes cannot be placed")
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as upright RGB (EXIF orientation applied)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits, which Pillow would cut at 255
        pixels = np.asarray(image, np.float32)
        pixels = pixels / 257 if pixels.max() > 255 else pixels
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) with a short side of min_size, or a long side of max_size if that is smaller."""
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (h, w, 3) uint8, bilinear and antialiased. torch needs a third of Pillow's time for it."""
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def load_sample(dataset: DetectionDataset, index: int, min_size: int, max_size: int, flip: bool = False,
                use_difficult: bool = False) -> dict:
    """One image and its objects at network size.

    Returns {"image" (h, w, 3) uint8, "boxes" (n, 4) float32 px of the resized image, "labels" (n,) int64,
    "image_id", "index", "original_size" (height, width)}.
    """
    if worker := get_worker_info():
        text = f"image {dataset.image_ids[index]} ({os.fsdecode(dataset.paths[index])})"
        _in_progress[worker.id] = os.getpid(), text.encode()
    height, width = dataset.sizes[index].tolist()
    new_height, new_width = resized_shape(height, width, min_size, max_size)
    image = dataset.image(index, min(height / new_height, width / new_width))
    boxes, labels = dataset.objects(index, use_difficult)
    boxes = boxes * np.array([new_width / width, new_height / height] * 2, np.float32)
    if flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
        boxes = np.stack((new_width - boxes[:, 2], boxes[:, 1], new_width - boxes[:, 0], boxes[:, 3]), axis=1)
    return {"image": resize(np.array(image), new_height, new_width), "boxes": boxes, "labels": labels,
            "image_id": dataset.image_ids[index].item(), "index": index, "original_size": (height, width)}


# What each loader process is reading, in memory that forked processes share and that survives them.
_in_progress = np.frombuffer(mmap.mmap(-1, MAX_WORKERS * 1024), [("process", "i8"), ("image", "S1016")])


def death_of_a_loader(error: Exception) -> str | None:
    """One line that names the image on which a loader process died; None for any other error.

    The system kills a process that needs too much memory, and a library can crash. torch then raises a
    RuntimeError wherever the program is, unless the connection to the process breaks first.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        with suppress(RuntimeError):  # torch notices the same death a moment later
            time.sleep(1)
    elif not str(error).startswith("DataLoader worker"):
        return None
    alive = [process.pid for process in multiprocessing.active_children()]
    dead = (_in_progress["process"] > 0) & ~np.isin(_in_progress["process"], alive)
    if not dead.any():
        return None
    image = _in_progress["image"][dead][0].decode(errors="replace")
    reason = str(error).splitlines()[0].rstrip(". ")
    return f"a loader process died at {image} ({reason}). Is memory short? Fewer --workers need less"


def collate(samples: list[dict], size_divisor: int = 32, shapes: list[tuple[int, int]] | None = None,
            min_objects: int = 1) -> dict:
    """Samples of `load_sample` as one batch (the tensor contract of the models).

    Returns images (B, 3, H, W) uint8, zero-padded at the right and bottom; sizes (B, 2) int64 height, width
    before padding; gt_boxes (B, G, 4) float32; gt_labels (B, G) int64, PADDING in rows without an object,
    G >= min_objects; original_sizes (B, 2); lists image_ids, indices, broken. (H, W) is the first of `shapes`
    that holds all images, by default the smallest multiples of size_divisor. Raises DataError if none does.
    """
    sizes = torch.tensor([sample["image"].shape[:2] for sample in samples])
    height, width = sizes.amax(dim=0).tolist()
    if shapes is None:
        shapes = [(-(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor)]
    large_enough = [shape for shape in shapes if height <= shape[0] and width <= shape[1]]
    if not large_enough:
        raise DataError(f"images of {height} x {width} (height, width) fit none of the sizes {shapes}")
    num_objects = max(min_objects, *(len(sample["labels"]) for sample in samples))
    images = torch.zeros(len(samples), 3, *large_enough[0], dtype=torch.uint8)
    gt_boxes = torch.zeros(len(samples), num_objects, 4)
    gt_labels = torch.full((len(samples), num_objects), PADDING)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes.tolist())):
        n = len(sample["labels"])
        images[i, :, :h, :w] = torch.from_numpy(sample["image"]).permute(2, 0, 1)
        gt_boxes[i, :n] = torch.from_numpy(sample["boxes"])
        gt_labels[i, :n] = torch.from_numpy(sample["labels"])
    return {"images": images, "sizes": sizes, "gt_boxes": gt_boxes, "gt_labels": gt_labels,
            "image_ids": [sample["image_id"] for sample in samples], "indices": [s["index"] for s in samples],
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "broken": [sample["broken"] for sample in samples if "broken" in sample]}


def check_pad_to(dataset: DetectionDataset, min_sizes: list[int], max_size: int, pad_to: tuple[int, int]):
    """Raises DataError if a resized image of the dataset is larger than the input size pad_to."""
    for i, (height, width) in enumerate(dataset.sizes.tolist()):
        for min_size in min_sizes:
            shape = resized_shape(height, width, min_size, max_size)
            if shape[0] > pad_to[0] or shape[1] > pad_to[1]:
                raise DataError(f"image {dataset.image_ids[i]} is {shape[0]} x {shape[1]} (height, width) "
                                f"after resizing: it does not fit --pad-to {pad_to[0]} {pad_to[1]}")


def shape_buckets(dataset: DetectionDataset, min_size: int, max_size: int) -> list[tuple[int, int]]:
    """A few batch shapes (height, width), so that a training step can be compiled once for each.

    They are multiples of 32, smallest first: the largest short side with BUCKETS long sides, wide and tall.
    One of them holds any batch of `TrainBatchSampler`. min_size: the largest in training.
    """
    shapes = np.array([resized_shape(height, width, min_size, max_size) for height, width in dataset.sizes])
    short, shortest, longest = shapes.min(axis=1).max(), shapes.max(axis=1).min(), shapes.max()
    longs = shortest + (longest - shortest) * np.arange(1, BUCKETS + 1) / BUCKETS
    short, *longs = (32 * math.ceil(side / 32) for side in (short, *longs))
    wide = {(short, max(short, long)) for long in longs}
    return sorted(wide | {(width, height) for height, width in wide}, key=lambda shape: (sum(shape), shape))


class TrainSamples(Dataset):
    """Augmented samples of a training set. An item is requested as (epoch, index).

    Flip and short side depend on (seed, epoch, index) alone, not on a loader process, a rank or a restart. A
    broken image becomes a black one without objects, with what is wrong under "broken": the training decides.
    """

    def __init__(self, dataset: DetectionDataset, min_sizes: list[int], max_size: int, flip: bool = True,
                 use_difficult: bool = False, seed: int = 0):
        self.dataset, self.min_sizes, self.max_size = dataset, list(min_sizes), max_size
        self.flip, self.use_difficult, self.seed = flip, use_difficult, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        if not isinstance(key, tuple):
            raise DataError("TrainSamples takes (epoch, index): give its DataLoader "
                            "batch_sampler=TrainBatchSampler(...) and collate_fn=collate")
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        min_size = self.min_sizes[rng.integers(len(self.min_sizes))]
        flip = self.flip and rng.random() < 0.5
        try:
            return load_sample(self.dataset, index, min_size, self.max_size, flip, self.use_difficult)
        except DataError as error:
            height, width = self.dataset.sizes[index].tolist()
            blank = np.zeros((*resized_shape(height, width, min_size, self.max_size), 3), np.uint8)
            return {"image": blank, "boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64),
                    "image_id": self.dataset.image_ids[index].item(), "index": index,
                    "original_size": (height, width), "broken": str(error)}


class TestSamples(Dataset):
    """Samples for detection: every image once, at one size."""

    def __init__(self, dataset: DetectionDataset, min_size: int, max_size: int):
        self.dataset, self.min_size, self.max_size = dataset, min_size, max_size

    def __getitem__(self, index: int) -> dict:
        return load_sample(self.dataset, index, self.min_size, self.max_size)

    def __len__(self) -> int:
        return len(self.dataset)


class TrainBatchSampler:
    """Batch sampler of training. The images of a step depend on (seed, epoch) alone.

    A step takes `batch_size` images that are all wide or all tall, which wastes little padding. Rank r of
    `world` gets the r-th part of every step, in `accumulate` micro-batches. All ranks together see the same
    images for any `world` and `accumulate`. Yields lists of (epoch, index), from step `start` up to `stop`.
    """

    def __init__(self, dataset: DetectionDataset, indices: np.ndarray, batch_size: int, seed: int = 0,
                 rank: int = 0, world: int = 1, accumulate: int = 1, start: int = 0, stop: int = 0):
        self.indices, self.batch_size, self.seed = np.asarray(indices), batch_size, seed
        self.wide = dataset.sizes[self.indices, 1] >= dataset.sizes[self.indices, 0]
        self.rank, self.world, self.accumulate, self.start, self.stop = rank, world, accumulate, start, stop
        self.steps_per_epoch = sum(-(-int(group.sum()) // batch_size) for group in (self.wide, ~self.wide))

    def epoch(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, batch_size) image indices. The last batch of a group repeats its first images."""
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for group in (self.wide, ~self.wide):
            members = rng.permutation(self.indices[group])
            count = -(-len(members) // self.batch_size)
            batches.append(np.resize(members, (count, self.batch_size)))
        return rng.permutation(np.concatenate(batches))

    def __iter__(self):
        micro_batch = self.batch_size // (self.world * self.accumulate)
        current = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, batches = epoch, self.epoch(epoch)
            mine = batches[position].reshape(self.world, self.accumulate, micro_batch)[self.rank]
            for part in mine.tolist():
                yield [(epoch, index) for index in part]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


class SameSizeBatchSampler(list):
    """Batch sampler of detection: lists of indices of images that have the same size after resizing.

    Without padding, results do not depend on the batch. Rank r of `world` gets every world-th batch.
    """

    def __init__(self, dataset: DetectionDataset, min_size: int, max_size: int, batch_size: int, rank: int,
                 world: int):
        shapes = [resized_shape(h, w, min_size, max_size) for h, w in dataset.sizes.tolist()]
        batches = []
        for i in sorted(range(len(dataset)), key=lambda i: shapes[i]):
            if not batches or len(batches[-1]) == batch_size or shapes[batches[-1][0]] != shapes[i]:
                batches.append([])
            batches[-1].append(i)
        super().__init__(batches[rank::world])

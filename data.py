"""Detection datasets: COCO and Pascal VOC layouts, `shapes` drawn on the fly; checks, resizing, batching.

Inside, a class is an index 0..C-1 and a box is (x1, y1, x2, y2) in pixels with far edges: a box is
x2 - x1 wide. Dataset category ids and other box conventions exist in this file and in the files that
are written out only.
"""
import json
import math
import mmap
import multiprocessing
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import Dataset, get_worker_info

ORIENTATION = 0x0112  # EXIF's tag
PADDING, CROWD = -1, -2  # gt_labels of rows that are no object
MAX_WORKERS = 256  # loader processes of a rank
BUCKETS = 4  # long sides for which a step is compiled: 960, 1088, 1216, 1344 of COCO at 800/1333
LISTED_PROBLEMS = 10  # how many unusable boxes are spelled out before "... and N more"
# split: folder of its images
EXTRA_COCO_SPLITS = {"minival2014": "val2014", "valminusminival2014": "val2014"}
VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
               "tvmonitor")


class DataError(ValueError):
    """The data cannot be used as they are; the message names file, image, annotation and value."""


# ---------------------------------------------------------------------------------------------- dataset

class DetectionDataset:
    """Images and boxes in flat arrays: forked workers then share the memory instead of copying
    objects they touch.

    names: C class names. category_ids: C ids as the files have them. image_ids, paths: (N,) arrays. sizes:
    (N, 2) height, width. Boxes of image i are rows first[i]:first[i + 1] of boxes (A, 4) xyxy px, classes
    (A,), areas (A,) px^2 (of the object, not the box, where the file tells), crowd (A,), difficult (A,) bool;
    file_row (A,): where the box stood among all boxes. notes: lines to print. voc: score with VOC's AP50.
    """

    def __init__(self, names, category_ids, image_ids, paths, sizes, boxes, classes, areas, crowd, difficult,
                 image_index, notes=(), voc=False):
        order = self.file_row = np.argsort(image_index, kind="stable")
        self.names, self.category_ids, self.voc, self.notes = (
            list(names), list(category_ids), voc, list(notes))
        self.image_ids, self.paths = np.asarray(image_ids), np.array([os.fsencode(p) for p in paths])
        self.sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        self.boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
        self.classes, self.areas = np.asarray(classes, np.int64)[order], np.asarray(areas, np.float64)[order]
        self.crowd, self.difficult = np.asarray(crowd, bool)[order], np.asarray(difficult, bool)[order]
        counts = np.bincount(np.asarray(image_index, np.int64), minlength=len(self.image_ids))
        self.first = np.concatenate(([0], np.cumsum(counts)))

    def __len__(self) -> int:
        return len(self.image_ids)

    def image(self, index: int, shrink: float = 1.0) -> Image.Image:
        """`read_image` of an image. Raises DataError if it is broken or not of the size stated."""
        return read_image(os.fsdecode(self.paths[index]), tuple(self.sizes[index].tolist()), shrink)

    def objects(self, index: int, use_difficult: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What image `index` trains on: boxes (n, 4) float32 px clipped to the image, labels (n,) int64.

        Crowds are labelled CROWD. Boxes under 1 px and, unless asked for, VOC's difficult ones are left out.
        """
        rows = slice(self.first[index], self.first[index + 1])
        height, width = self.sizes[index]
        boxes = self.boxes[rows].clip(0, (width, height, width, height))
        labels = np.where(self.crowd[rows], CROWD, self.classes[rows])
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        if not use_difficult:
            keep &= ~self.difficult[rows]
        return boxes[keep].astype(np.float32), labels[keep]

    def non_empty(self, use_difficult: bool = False) -> np.ndarray:
        """Indices of the images that have an object to learn (a crowd is none)."""
        return np.array([i for i in range(len(self)) if (self.objects(i, use_difficult)[1] >= 0).any()],
                        np.int64)

    def most_objects(self) -> int:
        """Boxes of the image that has the most, at least 1."""
        return max(1, int(np.diff(self.first).max(initial=0)))

    def table(self) -> str:
        """Class name -> index, category id, images and boxes: read it once before every training."""
        image_of_box = np.repeat(np.arange(len(self)), np.diff(self.first))
        pairs = (np.unique(np.stack((self.classes, image_of_box)), axis=1)[0] if len(self.boxes)
                 else self.classes)
        images = np.bincount(pairs, minlength=len(self.names))
        boxes = np.bincount(self.classes, minlength=len(self.names))
        width = max(map(len, [*self.names, "class"]))
        lines = [f"{'class':{width}}  index  id     images    boxes"]
        for i, name in enumerate(self.names):
            lines.append(f"{name:{width}}  {i:5}  {self.category_ids[i]!s:5} {images[i]:8} {boxes[i]:8}")
        empty = int((np.diff(self.first) == 0).sum())
        lines.append(f"{len(self)} images ({empty} without boxes), {len(self.boxes)} boxes"
                     f" ({int(self.crowd.sum())} crowds, {int(self.difficult.sum())} difficult)")
        return "\n".join(lines)


def open_dataset(data: str, split: str, json_path: str | None = None, image_dir: str | None = None,
                 names: list[str] | None = None) -> DetectionDataset:
    """The dataset at `data`, in the layout found there.

    data: "shapes", or a folder in COCO layout (`annotations/instances_SPLIT.json`, `SPLIT/`) or VOC layout
    (`VOC2007/ImageSets/Main/SPLIT.txt`, ...). split: one or several joined by "+"; VOC's are YEAR_SPLIT.
    json_path and image_dir name a COCO-format file and its images directly. names: the classes a model knows;
    a dataset with others is refused. Raises DataError.
    """
    root = Path(data)
    if json_path or image_dir:
        if not (json_path and image_dir):
            raise DataError("an annotation file and its image folder belong together: give both")
        return load_coco([(Path(json_path), Path(image_dir))], names)
    if data == "shapes":
        dataset = Shapes(split)
        if names and names != dataset.names:
            raise DataError(f"the model knows {names}, shapes has {dataset.names}")
        return dataset
    if not root.is_dir():
        raise DataError(f"data folder {root} does not exist (--data takes a folder or 'shapes')")
    if any(root.glob("VOC[0-9]*")):
        return load_voc(root, split, names)
    if (root / "annotations").is_dir():
        parts = split.split("+")
        return load_coco([(root / "annotations" / f"instances_{part}.json",
                           root / EXTRA_COCO_SPLITS.get(part, part)) for part in parts], names)
    raise DataError(f"{root}: neither COCO layout (annotations/instances_{split}.json) nor VOC layout "
                    f"(VOC2007/); for other layouts give the COCO-format file and the image folder "
                    f"(--train-json --train-images --val-json --val-images)")


def _class_order(names: list[str] | None, found: list[str], source) -> list[str]:
    if names is None:
        return found
    if set(names) != set(found):
        raise DataError(f"{source}: its classes are not the model's: only in the file "
                        f"{sorted(set(found) - set(names))}, "
                        f"only in the model {sorted(set(names) - set(found))}")
    return list(names)


# ---------------------------------------------------------------------------------------------- COCO

def load_coco(parts: list[tuple[Path, Path]], names: list[str] | None = None) -> DetectionDataset:
    """COCO-format files joined into one dataset. parts: (json file, image folder) pairs. Raises DataError.

    Structural errors (a missing file, an unknown category, ...) stop; a box that cannot be an object is
    listed in the notes and left out.
    """
    columns, notes, categories = [], [], None
    for path, folder in parts:
        content = _read_json(path)
        table = {category["id"]: category["name"] for category in content["categories"]}
        if categories is not None and table != categories:
            raise DataError(f"{path}: other categories than {parts[0][0]}")
        categories = table
        columns.append(_coco_columns(content, table, path, folder, notes))
    joined = {key: np.concatenate([c[key] for c in columns]) for key in columns[0]}
    offsets = np.cumsum([0] + [len(c["image_ids"]) for c in columns])
    joined["image_index"] = np.concatenate([c["image_index"] + o for c, o in zip(columns, offsets)])
    _refuse_duplicates(joined["image_ids"].tolist(), "image id", parts[-1][0])
    order = _class_order(names, list(categories.values()), parts[0][0])
    id_of = {name: category for category, name in categories.items()}
    category_ids = [id_of[name] for name in order]
    index_of = {category: index for index, category in enumerate(category_ids)}
    joined["classes"] = np.array([index_of[c] for c in joined.pop("category").tolist()], np.int64)
    return DetectionDataset(order, category_ids, **joined, difficult=np.zeros(len(joined["boxes"]), bool),
                            notes=notes)


_ID, _NUMBER = (int, str), (int, float)
_COCO_FIELDS = {"images": {"id": _ID, "file_name": str, "width": _NUMBER, "height": _NUMBER},
                "annotations": {"id": _ID, "image_id": _ID, "category_id": _ID, "bbox": list},
                "categories": {"id": _ID, "name": str}}
# Outlines are most of COCO's files and no use here: not parsing them saves three quarters of the time.
_OUTLINES = re.compile(rb'"segmentation"\s*:\s*(?:\[[][\d\s.,eE+-]*\]|\{[^{}]*\})')


def _read_json(path: Path) -> dict:
    if not path.is_file():
        raise DataError(f"annotation file {path} does not exist")
    try:
        try:
            content = json.loads(_OUTLINES.sub(b'"segmentation": 0', path.read_bytes()))
        except ValueError:
            content = json.loads(path.read_bytes())  # again: the error names a place in the file itself
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for key, fields in _COCO_FIELDS.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path}: not a COCO annotation file, the list {key!r} is missing")
        for row in content[key]:
            wrong = [field for field, kind in fields.items()
                     if not isinstance(row, dict) or not isinstance(row.get(field), kind)]
            if wrong:
                raise DataError(f"{path}: {key} entry {str(row)[:80]}: {', '.join(wrong)} missing or of a "
                                f"wrong type")
    if not content["images"] or not content["categories"]:
        raise DataError(f"{path}: has {len(content['images'])} images and "
                        f"{len(content['categories'])} categories")
    _refuse_duplicates([c["id"] for c in content["categories"]], "category id", path)
    _refuse_duplicates([c["name"] for c in content["categories"]], "category name", path)
    return content


def _refuse_duplicates(values: list, what: str, path):
    if len(set(values)) < len(values):
        value, count = Counter(values).most_common(1)[0]
        raise DataError(f"{path}: {what} {value!r} occurs {count} times")


def _coco_columns(content: dict, categories: dict, path: Path, folder: Path, notes: list[str]) -> dict:
    images, annotations = content["images"], content["annotations"]
    for image in images:
        if not (1 <= image["width"] < math.inf and 1 <= image["height"] < math.inf):
            raise DataError(f"{path}: image {image['id']}: width {image['width']}, height {image['height']}")
    position = {image["id"]: i for i, image in enumerate(images)}
    _refuse_duplicates([image["id"] for image in images], "image id", path)
    for a in annotations:
        where = f"{path}: annotation {a['id']}"
        if a["image_id"] not in position:
            raise DataError(f"{where}: points to image {a['image_id']!r}, which is not in the file")
        if a["category_id"] not in categories:
            raise DataError(f"{where} (image {a['image_id']}): unknown category {a['category_id']!r}")
        if a.get("iscrowd") not in (None, 0, 1):
            raise DataError(f"{where} (image {a['image_id']}): iscrowd is {a['iscrowd']!r}, not 0 or 1")
        if not (len(a["bbox"]) == 4 and all(isinstance(v, _NUMBER) for v in a["bbox"])):
            raise DataError(f"{where} (image {a['image_id']}): bbox {a['bbox']} is not [x, y, width, height]")
    ids = [a["id"] for a in annotations]
    _refuse_duplicates(ids, "annotation id", path)
    if 0 in ids:
        notes.append(f"{path}: annotation id 0 (image {annotations[ids.index(0)]['image_id']}): pycocotools "
                     f"would count it as never found; scoring here renumbers")
    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
    xywh = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    boxes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    index = np.array([position[a["image_id"]] for a in annotations], np.int64)
    keep = _usable(boxes, (xywh[:, 2:] > 0).all(axis=1), sizes[index], lambda i: (
        f"{path}: image {annotations[i]['image_id']}, annotation {ids[i]}, "
        f"bbox {annotations[i]['bbox']}"), notes)
    area = [a["area"] if isinstance(a.get("area"), _NUMBER) else a["bbox"][2] * a["bbox"][3]
            for a in annotations]
    paths = [str(folder / image["file_name"]) for image in images]
    _refuse_missing_images(paths, path)
    image_ids = np.array([image["id"] for image in images])
    if image_ids.tolist() != [image["id"] for image in images]:
        raise DataError(f"{path}: image ids must be all text or all numbers below 2^63")
    return {"image_ids": image_ids, "paths": np.array(paths),
            "sizes": sizes, "boxes": boxes[keep], "areas": np.array(area, np.float64)[keep],
            "category": np.array([a["category_id"] for a in annotations])[keep], "image_index": index[keep],
            "crowd": np.array([bool(a.get("iscrowd")) for a in annotations], bool)[keep]}


def _usable(boxes: np.ndarray, solid: np.ndarray, sizes: np.ndarray, name, notes: list[str]) -> np.ndarray:
    """Which boxes (A, 4) can be objects of their images (A, 2); the others go to the notes, named
    by name(row).

    solid: (A,) bool, whether the box as it stands in the file has an area.
    """
    finite = np.isfinite(boxes).all(axis=1)
    inside = (boxes[:, :2] < sizes[:, ::-1]).all(axis=1) & (boxes[:, 2:] > 0).all(axis=1)
    keep = finite & solid & inside
    bad = np.flatnonzero(~keep)
    for i in bad[:LISTED_PROBLEMS]:
        why = ("not finite" if not finite[i] else "no area (inverted or empty)" if not solid[i]
               else f"outside its {sizes[i][1]} x {sizes[i][0]} image")
        notes.append(f"{name(i)}: {why}")
    if len(bad) > LISTED_PROBLEMS:
        notes.append(f"... and {len(bad) - LISTED_PROBLEMS} more")
    if len(bad):
        notes.append(f"left out {len(bad)} unusable boxes of {len(boxes)}, in training and in scoring")
    beyond = keep & ((boxes[:, :2] < -1).any(axis=1) | (boxes[:, 2:] > sizes[:, ::-1] + 1).any(axis=1))
    if beyond.any():
        i = int(np.flatnonzero(beyond)[0])
        notes.append(f"{int(beyond.sum())} boxes reach over the border of their image and are cut there in "
                     f"training (the first: {name(i)})")
    tiny = keep & ((boxes[:, 2:] - boxes[:, :2]) < 1).any(axis=1)
    if tiny.any():
        notes.append(f"{int(tiny.sum())} boxes are under 1 px wide or high: scored, not trained on "
                     f"(the first: {name(int(np.flatnonzero(tiny)[0]))}). Are the coordinates pixels?")
    return keep


def _refuse_missing_images(paths: list[str], source):
    """One listing per folder instead of one look per file: 118k files take under a second."""
    folders = [os.path.dirname(path) or "." for path in paths]
    listed = {folder: set(os.listdir(folder)) if os.path.isdir(folder) else None for folder in set(folders)}
    missing = [path for path, folder in zip(paths, folders)
               if os.path.basename(path) not in (listed[folder] or ())]
    if missing:
        folder = os.path.dirname(missing[0]) or "."
        what = (f"image folder {folder} does not exist" if listed[folder] is None
                else f"{missing[0]} does not exist")
        raise DataError(f"{what}: {len(missing)} of {len(paths)} images of {source} are missing")


# ---------------------------------------------------------------------------------------------- VOC

def load_voc(root: Path, split: str, names: list[str] | None = None) -> DetectionDataset:
    """Pascal VOC layout. split: YEAR_SPLIT, several joined by "+" ("2007_trainval+2012_trainval").

    Raises DataError. Classes: VOC's twenty if the files name no other, else what they name, sorted.
    VOC counts pixels from 1 and includes both ends: (xmin - 1, ymin - 1, xmax, ymax) is the same
    box with far edges.
    """
    image_ids, paths, sizes, rows, notes = [], [], [], [], []
    for part in split.split("+"):
        year, _, subset = part.partition("_")
        base = root / f"VOC{year}"
        listing = base / "ImageSets" / "Main" / f"{subset}.txt"
        if not listing.is_file():
            raise DataError(f"{listing} does not exist (a VOC split is named YEAR_SPLIT, e.g. 2007_trainval)")
        for line in listing.read_text().splitlines():
            if not line.strip():
                continue
            name = re.sub(r"\s+-?[01]$", "", line.strip())  # lists of one class end in 1, 0 or -1
            path = base / "Annotations" / f"{name}.xml"
            size, suffix, objects = _read_voc_file(path)
            paths.append(str(base / "JPEGImages" / f"{name}{suffix}"))
            if size is None:
                size = read_image(paths[-1]).size[::-1]
            rows += [(len(image_ids), path, *obj) for obj in objects]
            image_ids.append(name)
            sizes.append(size)
    if not image_ids:
        raise DataError(f"{root}: the split {split} lists no images")
    _refuse_duplicates(image_ids, "image", root)
    _refuse_missing_images(paths, f"{root} {split}")
    found = {row[2] for row in rows}
    if names is None:
        names = list(VOC_CLASSES) if found <= set(VOC_CLASSES) else sorted(found)
    for row in rows:
        if row[2] not in names:
            raise DataError(f"{row[1]}: unknown class {row[2]!r}; the model knows {', '.join(names)}")
    index = np.array([row[0] for row in rows], np.int64)
    pixels = np.array([row[4] for row in rows], np.float64).reshape(-1, 4)
    boxes = pixels - (1, 1, 0, 0)
    # A box that is one pixel wide by VOC's convention is a slip of the mouse, not an object.
    solid = (pixels[:, 2:] > pixels[:, :2]).all(axis=1)
    keep = _usable(boxes, solid, np.array(sizes, np.int64)[index], lambda i: (
        f"{rows[i][1]}: object {rows[i][3]} ({rows[i][2]}), bndbox {list(rows[i][4])}"), notes)
    kept = [row for row, k in zip(rows, keep) if k]
    boxes = boxes[keep]
    return DetectionDataset(
        names, range(1, len(names) + 1), image_ids, paths, sizes, boxes,
        [names.index(row[2]) for row in kept],
        (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]), np.zeros(len(kept), bool),
        [row[5] for row in kept], index[keep], notes, voc=True)


def _read_voc_file(path: Path) -> tuple[tuple[int, int] | None, str, list[tuple]]:
    """((height, width) or None, suffix of the picture, [(class name, number, (xmin, ymin, xmax, ymax),
    difficult)]) of one file."""
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
            box = tuple(float(obj.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
            objects.append((obj.findtext("name").strip(), number, box,
                            obj.findtext("difficult", "0").strip() == "1"))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a VOC annotation, a size, name or bndbox is missing or no number "
                        f"({error})") from error
    suffix = Path(tree.findtext("filename", "").strip()).suffix or ".jpg"
    return (size if min(size) > 0 else None), suffix, objects


# ---------------------------------------------------------------------------------------------- shapes

SHAPES_IMAGES = {"train": 4000, "val": 200}  # images of each split; no picture is in both
SHAPES_SIDES = (96, 128)  # px; half of the pictures are wide, half are tall
SHAPES_OBJECT = (12, 96)  # px, longer side of an object: an 8-fold range
SHAPES_EMPTY = 0.05  # share of images without objects
SHAPES_MAX_OBJECTS = 6
SHAPES_OVERLAP = 0.4  # of the smaller of two boxes


def _regular(points: int, inner: float = 1.0) -> np.ndarray:
    """Outline of a regular polygon, or of a star with inner < 1, in [-1, 1]; the first corner is on top."""
    count = points if inner == 1 else 2 * points
    angle = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radius = np.where(np.arange(count) % 2, inner, 1.0) if inner < 1 else np.ones(count)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((16 * np.sin(t) ** 3, -y), axis=1) / 16


# name: outline (n, 2). The last two are the novel classes of the few-shot runs.
OUTLINES = {
    "disc": _regular(40),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _regular(3),
    "star": _regular(5, inner=0.42),
    "cross": np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                       (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]),
    "ring": _regular(40),  # its hole is cut when it is drawn
    "arrow": np.array([(0, -1), (.8, 0), (.3, 0), (.3, 1), (-.3, 1), (-.3, 0), (-.8, 0)]),
    "heart": _heart(),
}
CORNERS = list(OUTLINES.values())
RING_HOLE = 0.55  # radius of the hole in parts of the ring's


class Shapes(DetectionDataset):
    """The built-in set: textured pictures of eight shapes, drawn when they are read, equal on
    every machine and run.

    split: "train" or "val". Image i of a split depends on the split and i alone.
    """

    def __init__(self, split: str):
        if split not in SHAPES_IMAGES:
            raise DataError(f"shapes has the splits {', '.join(SHAPES_IMAGES)}, not {split!r}")
        count = SHAPES_IMAGES[split]
        self.seed = list(SHAPES_IMAGES).index(split)
        scenes = [self._scene(i) for i in range(count)]
        sizes = [scene[0] for scene in scenes]
        objects = [(i, *obj) for i, scene in enumerate(scenes) for obj in scene[1]]
        outlines = [outline for _, _, outline in objects]
        boxes = np.array([[*outline.min(axis=0), *outline.max(axis=0)]
                          for outline in outlines]).reshape(-1, 4)
        super().__init__(OUTLINES, range(1, len(OUTLINES) + 1), np.arange(1, count + 1),
                         [f"shapes_{split}_{i:05}" for i in range(count)], sizes, boxes,
                         [label for _, label, _ in objects],
                         (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
                         np.zeros(len(boxes), bool), np.zeros(len(boxes), bool), [i for i, _, _ in objects])

    def _scene(self, index: int) -> tuple[tuple[int, int], list[tuple[int, np.ndarray]]]:
        """Size (height, width) and objects [(label, outline (n, 2) px)] of a picture, back to front."""
        rng = np.random.default_rng((self.seed, index, 0))
        size = SHAPES_SIDES if rng.random() < 0.5 else SHAPES_SIDES[::-1]
        wanted = 0 if rng.random() < SHAPES_EMPTY else rng.integers(1, SHAPES_MAX_OBJECTS + 1)
        objects, boxes = [], []
        for _ in range(20 * wanted):  # tries; a crowded picture may end up with fewer objects than wanted
            if len(objects) == wanted:
                break
            label = int(rng.integers(len(OUTLINES)))
            longer, narrower = rng.uniform(*SHAPES_OBJECT), rng.uniform(0.85, 1.0)
            turn = rng.uniform(-0.1, 0.1)
            cos, sin = math.cos(turn), math.sin(turn)
            outline = CORNERS[label] * (1, narrower) @ np.array([[cos, sin], [-sin, cos]])
            outline -= outline.min(axis=0)
            outline *= longer / outline.max()
            width, height = outline.max(axis=0).tolist()
            if width + 1 > size[1] or height + 1 > size[0]:
                continue
            x, y = rng.uniform(0, size[1] - width), rng.uniform(0, size[0] - height)
            box = (x, y, x + width, y + height)
            if all(_covered(box, other) <= SHAPES_OVERLAP for other in boxes):
                objects.append((label, outline + (x, y)))
                boxes.append(box)
        return size, objects

    def image(self, index: int, shrink: float = 1.0) -> Image.Image:
        size, objects = self._scene(index)
        rng = np.random.default_rng((self.seed, index, 1))
        height, width = size
        base = rng.uniform(50, 205, 3)
        picture = np.broadcast_to(base, (height, width, 3)).copy()
        for cells, strength in ((3, 40), (10, 15), (32, 10)):  # blurred noise of three scales, then grain
            noise = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
            for c in range(3):
                picture[..., c] += np.asarray(
                    Image.fromarray(noise[..., c]).resize((width, height), Image.BICUBIC))
        grain = rng.normal(0, 4, picture.shape)
        image = Image.fromarray((picture + grain).clip(0, 255).astype(np.uint8))
        for label, outline in objects:
            colour = rng.uniform(0, 255, 3)
            while np.abs(colour - base).sum() < 180:
                colour = rng.uniform(0, 255, 3)
            stripes = (rng.uniform(-20, 20)
                       * np.sin(np.arange(width) * rng.uniform(0.1, 0.8) + rng.uniform(0, 6)))
            corner, end = outline.min(axis=0).astype(int), outline.max(axis=0).astype(int) + 1
            part = slice(corner[1], end[1]), slice(corner[0], end[0])
            texture = colour + stripes[None, part[1], None] + grain[part]
            mask = _silhouette(outline - corner, list(OUTLINES)[label] == "ring", *texture.shape[:2])
            image.paste(Image.fromarray(texture.clip(0, 255).astype(np.uint8)), tuple(corner.tolist()), mask)
        return image


def _covered(box: tuple, other: tuple) -> float:
    """Intersection of two boxes in parts of the smaller one."""
    inter = (max(0, min(box[2], other[2]) - max(box[0], other[0]))
             * max(0, min(box[3], other[3]) - max(box[1], other[1])))
    return inter / min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))


def _silhouette(outline: np.ndarray, ring: bool, height: int, width: int, smooth: int = 4) -> Image.Image:
    """Mask with soft edges of an outline (n, 2) px in a height x width picture,
    drawn `smooth` times as large."""
    mask = Image.new("L", (width * smooth, height * smooth))
    draw = ImageDraw.Draw(mask)
    draw.polygon([tuple(p) for p in outline * smooth], fill=255)
    if ring:
        center = (outline.min(axis=0) + outline.max(axis=0)) / 2
        draw.polygon([tuple(p) for p in (center + (outline - center) * RING_HOLE) * smooth], fill=0)
    return mask.reduce(smooth)


# ---------------------------------------------------------------------------------------------- pictures

def read_image(path: str, size: tuple[int, int] | None = None, shrink: float = 1.0) -> Image.Image:
    """Any picture Pillow reads as RGB, upright (EXIF).

    size: (height, width) it must have. shrink: how many times smaller it will be used; a JPEG is decoded to a
    half, a quarter or an eighth if that leaves it large enough and both sides divide by it (else a rest would
    move the picture against its boxes). Raises DataError naming a broken or missing file, or one of another
    size.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            part = next((n for n in (8, 4, 2) if n <= shrink and width % n == height % n == 0), 1)
            image.draft(None, (width // part, height // part))  # of other formats than JPEG this does nothing
            image.load()
            if image.getexif().get(ORIENTATION, 1) > 4:  # it lies on its side
                width, height = height, width
            image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as a picture ({error})") from error
    if size not in (None, (height, width)):
        raise DataError(f"{path}: the picture is {width} x {height} (EXIF orientation applied), its "
                        f"annotation says {size[1]} x {size[0]}: the boxes cannot be placed")
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits: Pillow's convert would cut at 255
        pixels = np.asarray(image, np.float32)
        image = Image.fromarray(
            (pixels / 257 if pixels.max() > 255 else pixels).clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """Size (height, width) after scaling so that the short side is min_size, or the long one
    max_size if smaller."""
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """A picture (h, w, 3) uint8 at another size: Pillow's antialiased bilinear filter to 1 of 255, in torch's
    form, which takes a third of the time."""
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def load_sample(dataset: DetectionDataset, index: int, min_size: int, max_size: int, flip: bool = False,
                use_difficult: bool = False) -> dict:
    """One image at network size.

    Returns {"image" (h, w, 3) uint8, "boxes" (n, 4) float32 px of that image, "labels" (n,) int64,
    "image_id", "index", "original_size" (height, width)}.
    """
    worker = get_worker_info()
    if worker:
        path = os.fsdecode(dataset.paths[index])
        _held[worker.id] = os.getpid(), f"image {dataset.image_ids[index]} ({path})".encode()
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


# Which image every loader process holds: memory that forked processes share, to be read when one has died.
_held = np.frombuffer(mmap.mmap(-1, MAX_WORKERS * 1024), [("process", "i8"), ("image", "S1016")])


def death_of_a_loader(error: Exception) -> str | None:
    """One line with the image that a loader process held when it died (killed for its memory, or crashed in a
    library); None if the error is another. torch raises it in the midst of whatever is running, or the pipe
    to that process breaks first."""
    if isinstance(error, (ConnectionError, EOFError)):
        with suppress(RuntimeError):  # the same death, which torch sees now
            time.sleep(1)
    elif not str(error).startswith("DataLoader worker"):
        return None
    alive = [process.pid for process in multiprocessing.active_children()]
    images = _held["image"][(_held["process"] > 0) & ~np.isin(_held["process"], alive)]
    if not len(images):
        return None
    reason = str(error).splitlines()[0].rstrip(". ")
    return (f"a loader process died at {images[0].decode(errors='replace')} ({reason}). Is memory short? "
            f"Fewer --workers need less")


def check_pad_to(dataset: DetectionDataset, min_sizes: list[int], max_size: int,
                 pad_to: tuple[int, int]):
    """Raises DataError if an image of the dataset, resized, does not fit the fixed input size pad_to."""
    for i, (height, width) in enumerate(dataset.sizes.tolist()):
        for min_size in min_sizes:
            shape = resized_shape(height, width, min_size, max_size)
            if shape[0] > pad_to[0] or shape[1] > pad_to[1]:
                raise DataError(f"image {dataset.image_ids[i]} is {shape[0]} x {shape[1]} (height, width) "
                                f"after resizing: it does not fit --pad-to {pad_to[0]} {pad_to[1]}")


def shape_buckets(dataset: DetectionDataset, min_size: int, max_size: int) -> list[tuple[int, int]]:
    """A few (height, width) px of which one holds any batch of `StepBatches`, smallest first, so that a step
    can be compiled for each: of wide and of tall pictures the largest short side, with BUCKETS long ones.

    Sides are multiples of 32. min_size: the largest that images are resized to.
    """
    shapes = np.array([resized_shape(height, width, min_size, max_size) for height, width in dataset.sizes])
    short, shortest, longest = shapes.min(axis=1).max(), shapes.max(axis=1).min(), shapes.max()
    longs = shortest + (longest - shortest) * np.arange(1, BUCKETS + 1) / BUCKETS
    short, *longs = (32 * math.ceil(side / 32) for side in (short, *longs))
    wide = {(short, max(short, long)) for long in longs}
    return sorted(wide | {(width, height) for height, width in wide}, key=lambda shape: (sum(shape), shape))


def collate(samples: list[dict], divisor: int = 32, shapes: list[tuple[int, int]] | None = None,
            min_objects: int = 1) -> dict:
    """Samples as one batch (the tensor contract of the models).

    Returns images (B, 3, H, W) uint8, zero-padded at the right and bottom; sizes (B, 2) int64 height, width;
    gt_boxes (B, G, 4) float32; gt_labels (B, G) int64, PADDING where an image has fewer than G objects
    (G >= min_objects); image_ids, indices: lists; original_sizes (B, 2). H, W: the largest sides rounded up
    to `divisor`, or the first of `shapes` that holds them. Raises DataError if none does.
    """
    sizes = torch.tensor([sample["image"].shape[:2] for sample in samples])
    height, width = sizes.amax(dim=0).tolist()
    if shapes is None:
        shapes = [(-(-height // divisor) * divisor, -(-width // divisor) * divisor)]
    fitting = [shape for shape in shapes if height <= shape[0] and width <= shape[1]]
    if not fitting:
        raise DataError(f"images of {height} x {width} (height, width) fit none of the sizes {shapes}")
    height, width = fitting[0]
    count = len(samples)
    most = max(min_objects, *(len(sample["labels"]) for sample in samples))
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8)
    gt_boxes, gt_labels = torch.zeros(count, most, 4), torch.full((count, most), PADDING)
    for i, sample in enumerate(samples):
        h, w = sample["image"].shape[:2]
        n = len(sample["labels"])
        images[i, :, :h, :w] = torch.from_numpy(sample["image"]).permute(2, 0, 1)
        gt_boxes[i, :n], gt_labels[i, :n] = (torch.from_numpy(sample["boxes"]),
                                             torch.from_numpy(sample["labels"]))
    return {"images": images, "sizes": sizes, "gt_boxes": gt_boxes, "gt_labels": gt_labels,
            "image_ids": [sample["image_id"] for sample in samples], "indices": [s["index"] for s in samples],
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples])}


# ---------------------------------------------------------------------------------------------- batches

class TrainSamples(Dataset):
    """Training view of a dataset. An item is asked for by (epoch, index).

    Flip and short side are drawn from (seed, epoch, index), so they depend on neither worker,
    rank nor restart.
    """

    def __init__(self, dataset: DetectionDataset, min_sizes: list[int], max_size: int, flip: bool = True,
                 use_difficult: bool = False, seed: int = 0):
        self.dataset, self.min_sizes, self.max_size = dataset, list(min_sizes), max_size
        self.flip, self.use_difficult, self.seed = flip, use_difficult, seed

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        min_size = self.min_sizes[rng.integers(len(self.min_sizes))]
        flip = self.flip and rng.random() < 0.5
        return load_sample(self.dataset, index, min_size, self.max_size, flip, self.use_difficult)


class TestSamples(Dataset):
    """Every image of a dataset once, at one size, in order."""

    def __init__(self, dataset: DetectionDataset, min_size: int, max_size: int):
        self.dataset, self.min_size, self.max_size = dataset, min_size, max_size

    def __getitem__(self, index: int) -> dict:
        return load_sample(self.dataset, index, self.min_size, self.max_size)

    def __len__(self) -> int:
        return len(self.dataset)


class StepBatches:
    """The images of every training step: a function of (seed, epoch) alone.

    A step takes `batch_size` images of one aspect-ratio group (wide or tall), which wastes little padding.
    Rank r of `world` takes the r-th part of each step, in `accumulate` micro-batches; what all ranks see
    together depends on neither `world` nor `accumulate`. Iterating yields lists of (epoch, index), from step
    `start` to step `stop`.
    """

    def __init__(self, dataset: DetectionDataset, indices: np.ndarray, batch_size: int, seed: int = 0,
                 rank: int = 0, world: int = 1, accumulate: int = 1, start: int = 0, stop: int = 0):
        self.indices, self.batch_size, self.seed = np.asarray(indices), batch_size, seed
        self.wide = dataset.sizes[self.indices, 1] >= dataset.sizes[self.indices, 0]
        self.rank, self.world, self.accumulate, self.start, self.stop = rank, world, accumulate, start, stop
        self.steps_per_epoch = sum(-(-int(group.sum()) // batch_size) for group in (self.wide, ~self.wide))

    def epoch(self, epoch: int) -> np.ndarray:
        """(steps_per_epoch, batch_size) image indices. The last batch of a group is filled up from
        its first."""
        rng = np.random.default_rng((self.seed, epoch))
        batches = []
        for group in (self.wide, ~self.wide):
            members = rng.permutation(self.indices[group])
            count = -(-len(members) // self.batch_size)
            batches.append(np.resize(members, (count, self.batch_size)))
        return rng.permutation(np.concatenate(batches))

    def __iter__(self):
        micro = self.batch_size // (self.world * self.accumulate)
        current = None
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != current:
                current, batches = epoch, self.epoch(epoch)
            mine = batches[position].reshape(self.world, self.accumulate, micro)[self.rank]
            for part in mine.tolist():
                yield [(epoch, index) for index in part]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate

"""Datasets on disk: COCO, VOC and Roboflow layouts, folders of images, and the checks of the files.

Everything is checked when a dataset is opened. A box that cannot be right is left out and described in the
notes of the dataset; any other mistake raises DataError.
"""
import glob
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data import (
    IMAGE_SUFFIXES,
    VOC_CLASSES,
    DataError,
    DetectionDataset,
    check_names,
    read_image,
    read_text,
    try_images,
)
from runtime import blame, print0

LISTED_PROBLEMS = 10  # invalid boxes that are described one by one, before "... and N more"
# COCO's customary splits without a folder of their own: {split: folder of its images}
EXTRA_COCO_SPLITS = {"minival2014": "val2014", "valminusminival2014": "val2014", "test-dev2017": "test2017"}
ROBOFLOW_FILE = "_annotations.coco.json"
MAX_SIDE = 2 ** 20  # px; an image cannot be wider or higher
LARGE_FILE = 50_000_000  # bytes of an annotation file whose reading is announced


# ---------------------------------------------------------------------------------------------- folders

def layout(data: str) -> str:
    """What --data names: "shapes", "voc", "coco", "roboflow" or "yolo", found by looking. Raises DataError.

    A new layout needs a name here, its splits in `default_splits`, a branch in `open_folder` and a function
    like `load_voc`, which returns a DetectionDataset. A reader in a file of its own, like yolo.py, is called
    from `shapes.open_dataset`.
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


def refuse_duplicates(values: list, what: str, source, hint: str = ""):
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
        with blame(path, DataError):
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
    _check_ids(list(index_of), f"{source}: the image ids of the files together")
    refuse_duplicates([image["id"] for image in images], "image id", source,
                       ". The files number their images alike: give every image an id of its own")
    notes = [f"{file}: annotation id 0 (image {a['image_id']}): pycocotools ignores it, scoring here does not"
             for a, file in zip(annotations, files) if a["id"] == 0]
    notes += similar_names(sorted(found), source)

    def describe(i: int) -> str:
        a = annotations[i]
        return f"{files[i]}: image {a['image_id']}, annotation {a['id']}, bbox {a['bbox']}"

    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
    image_index = np.array([index_of[a["image_id"]] for a in annotations], np.int64)
    with blame(source, DataError, "has a bbox that is no number"):  # a whole number may have any size
        xywh = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    boxes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), axis=1)
    valid = valid_boxes(boxes, (xywh[:, 2:] > 0).all(axis=1), sizes[image_index], describe, notes)
    annotations = [annotations[i] for i in np.flatnonzero(valid)]
    return DetectionDataset(
        names, sorted(label_of, key=label_of.get), image_ids=image_ids, paths=paths, sizes=sizes,
        boxes=boxes[valid], boxes_xywh=xywh[valid], classes=[label_of[a["category_id"]] for a in annotations],
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
    if path.stat().st_size > LARGE_FILE:
        print0(f"reading {path}, {path.stat().st_size / 1e6:.0f} MB")
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
    for key in _COCO_FIELDS:
        _check_ids([row["id"] for row in content[key]], f"{path}: the ids of {key}")
    check_names([category["name"] for category in categories], path)
    refuse_duplicates([category["id"] for category in categories], "category id", path)
    refuse_duplicates([category["name"] for category in categories], "category name", path)
    refuse_duplicates([image["id"] for image in images], "image id", path)
    refuse_duplicates([a["id"] for a in content["annotations"]], "annotation id", path)
    for image in images:
        if not (1 <= image["width"] <= MAX_SIDE and 1 <= image["height"] <= MAX_SIDE):
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
            raise DataError(f"{where}: bbox {str(a['bbox'])[:80]} is not [x, y, width, height]")
        if isinstance(a.get("area"), _NUMBER) and not 0 <= a["area"] < 1e300:
            raise DataError(f"{where}: area {a['area']}")
    return content


def _check_ids(ids: list, what: str):
    """Raises DataError unless all ids are text, or all are whole numbers of 64 bits."""
    if not (all(isinstance(i, str) for i in ids) or all(type(i) is int and abs(i) < 2 ** 63 for i in ids)):
        raise DataError(f"{what} must be all text or all whole numbers below 2^63")


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
            lines = read_text(listing).splitlines()
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
    refuse_duplicates(image_ids, "image", root)
    _refuse_missing_images(paths, f"{root} {split}")
    if names is None:
        found_names = {obj["name"] for obj in objects}
        names = list(VOC_CLASSES) if found_names <= set(VOC_CLASSES) else sorted(found_names)
    check_names(names, root)
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
    except (ElementTree.ParseError, LookupError, ValueError) as error:  # LookupError: an unknown encoding
        raise DataError(f"{path}: not XML ({error})") from error
    try:
        size = tuple(int(float(tree.findtext(f"size/{side}", "0"))) for side in ("height", "width"))
        objects = []
        for number, obj in enumerate(tree.iter("object"), start=1):
            bndbox = [float(obj.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
            name, difficult = obj.findtext("name").strip(), obj.findtext("difficult", "0").strip() == "1"
            objects.append({"name": name, "bndbox": bndbox, "difficult": difficult,
                            "text": f"{path}: object {number} ({name}), bndbox {bndbox}"})
        if max(size) > MAX_SIDE:
            raise ValueError(f"size {size}")
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise DataError(f"{path}: not a VOC annotation: no valid size, name or bndbox ({error})") from error
    suffix = Path(tree.findtext("filename", "").strip()).suffix or ".jpg"
    return (size if min(size) > 0 else None), suffix, objects

"""YOLO layout: a .yaml file with the class names, images, and label files beside them.

    mine/data.yaml               names: [cat, dog]  train: images/train  val: images/val
    mine/images/train/a.jpg      or mine/train/images/a.jpg
    mine/labels/train/a.txt      a line per object: class, centre x, y, width, height, in parts of the image
"""
import os
import re
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from data import IMAGE_SUFFIXES, DataError, DetectionDataset, check_names, read_text
from layouts import refuse_duplicates, similar_names, valid_boxes
from runtime import blame


def load_yolo(root: Path, splits: list[str], names: list[str] | None = None) -> DetectionDataset:
    """Dataset in YOLO layout, see the top of this file. Category ids are 0, 1, ... as in the label files.

    The images of a split are where the .yaml says, in images/SPLIT or in SPLIT/images. An image without a
    label file has no object. names: the classes of a model. An invalid box is left out and described in the
    notes; any other mistake raises DataError.
    """
    path = sorted(root.glob("*.yaml"), key=lambda path: (path.name != "data.yaml", path.name))[0]
    with blame(path, DataError, "is not the part of YAML that YOLO's files use"):
        content = _read_yolo_yaml(path)
    found_names = content.get("names")
    if not isinstance(found_names, list) or not found_names:
        raise DataError(f"{path}: it must list the class names under 'names'")
    check_names(found_names, path)
    refuse_duplicates(found_names, "class name", path)
    if names and names != found_names:
        raise DataError(f"{path}: not the model's classes: the file has {found_names}, the model {names}")
    notes, paths, sizes, rows, image_index, places = similar_names(found_names, path), [], [], [], [], []
    for split in splits:
        for image in _images_of_split(root, path, content, split):
            label = _label_file(image)
            lines = read_text(label).splitlines() if label.is_file() else []
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                rows.append(_object_of_line(line, len(found_names), f"{label}: line {number}"))
                image_index.append(len(paths))
                places.append(f"{label}: line {number}")
            paths.append(str(image))
            sizes.append(_size_of_image(image))
    if not paths:
        raise DataError(f"{path}: the split {'+'.join(splits)} has no images")
    sizes, image_index = np.array(sizes, np.int64), np.array(image_index, np.int64)
    rows = np.array(rows, np.float64).reshape(-1, 5)
    wide_high = sizes[image_index][:, ::-1]
    center, half = rows[:, 1:3] * wide_high, rows[:, 3:] * wide_high / 2
    boxes = np.concatenate((center - half, center + half), axis=1)
    limit = np.concatenate((wide_high, wide_high), axis=1)
    # The numbers in the files are rounded: up to a pixel beyond the border is no mistake.
    boxes = np.where((boxes > -1) & (boxes < limit + 1), boxes.clip(0, limit), boxes)
    valid = valid_boxes(boxes, (half > 0).all(axis=1), sizes[image_index], lambda i: places[i], notes)
    ids = [os.path.relpath(p, root) for p in paths]
    refuse_duplicates(ids, "image", path)
    return DetectionDataset(found_names, range(len(found_names)), image_ids=ids, paths=paths, sizes=sizes,
                            boxes=boxes[valid], classes=rows[valid, 0].astype(np.int64),
                            image_index=image_index[valid], notes=notes)


def _images_of_split(root: Path, path: Path, content: dict, split: str) -> list[Path]:
    """Image files of a split. path, content: the .yaml file. Raises DataError if there is no folder."""
    written = content.get(split) or content.get({"val": "valid", "valid": "val"}.get(split, "")) or [None]
    files = []
    for folder in [written] if isinstance(written, str) else written:
        places = [root / "images" / split, root / split / "images"]
        if folder:
            written_root = root / str(content.get("path", ""))
            places = [written_root / folder, root / folder.removeprefix("../"), *places]
        found = next((place for place in places if place.is_dir()), None)
        if found is None:
            raise DataError(f"{path}: no image folder for the split {split!r}: looked for "
                            f"{', '.join(map(str, places))}")
        files += sorted(file for file in found.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    return files


def _label_file(image: Path) -> Path:
    """The last folder named images on the way to the image, replaced by labels."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        parts[len(parts) - 1 - parts[::-1].index("images", 1)] = "labels"
    return Path(*parts).with_suffix(".txt")


def _object_of_line(line: str, num_classes: int, place: str) -> list[float]:
    try:
        row = [float(field) for field in line.split()]
    except ValueError:
        row = []
    if len(row) != 5 or row[0] not in range(num_classes):
        raise DataError(f"{place}: {line!r} is not a class (0 to {num_classes - 1}), then centre x and y, "
                        f"width, height")
    return row


def _read_yolo_yaml(path: Path) -> dict:
    """The keys of a YOLO file: text, or lists of text. It reads the part of YAML that these files use.

    Names as "0: cat" are sorted by their numbers. Raises DataError if these are not 0, 1, 2, ...
    """
    content, key, text = {}, None, ""
    for line in read_text(path).splitlines():
        text += re.sub(r"(^|\s)#.*", "", line).rstrip()
        if text.count("[") > text.count("]") or text.count("{") > text.count("}"):
            continue  # a list over several lines
        if pair := re.match(r"(\w+)\s*:\s*(.*)", text) if not re.match(r"\d", text) else None:
            key, value = pair[1], pair[2].strip()
            if value.startswith(("[", "{")):
                content[key] = [_item(match) for match in ITEM.finditer(value[1:-1])]
            elif value:
                content[key] = value.strip("'\"")
        elif text.strip():
            items = content.setdefault(key, [])
            if isinstance(items, list):
                items.append(_item(ITEM.match(text.strip().removeprefix("- "))))
        text = ""
    for key, items in content.items():
        if isinstance(items, list):
            numbers = [number for number, _ in items if number is not None]
            if numbers and sorted(numbers) != list(range(len(items))):
                raise DataError(f"{path}: the numbers of {key} are not 0 to {len(items) - 1}")
            content[key] = [text for _, text in (sorted(items) if numbers else items)]
    return content


# An entry of a list: quoted or not, with or without a number in front.
ITEM = re.compile(r"""\s*(?:(\d+)\s*:\s*)?(?:'([^']*)'|"([^"]*)"|([^,'"\s][^,]*))\s*(?:,|$)""")


def _item(match: re.Match) -> tuple[int | None, str]:
    number, *texts = match.groups()
    return number and int(number), next(text for text in texts if text is not None).strip()


def _size_of_image(path: Path) -> tuple[int, int]:
    """(height, width) of an upright image, from the start of its file. Raises DataError."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size if turned else image.size[::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: cannot be read as an image ({error})") from error

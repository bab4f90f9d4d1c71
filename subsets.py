"""Parts of a dataset: the objects of some classes, or K shots of every class.

A shot is one box. The lists of shots that TFA (arXiv 2003.06957) published are read where they exist:

    cocosplit/seed0/full_box_10shot_person_trainval.json     COCO format, beside the data folder `coco`
    vocsplit/seed0/box_10shot_bird_train.txt                 image paths, in the folder that holds VOC2007

Where they do not exist, lists are drawn by the same protocol from a seed.
"""
import json
import os
import random
import re
from pathlib import Path

import numpy as np

from data import DataError, DetectionDataset, read_text

SHOTS = (1, 2, 3, 5, 10, 30)  # K of the published lists; a list of K shots holds the list before it
DRAWS = 1000  # draws without a fitting image before the sampling gives up


class Subset(DetectionDataset):
    """Some images of a dataset with some of their boxes, under a class list of its own.

    A record is one entry of this dataset. images: indices into the source, one per record; an image may occur
    several times. rows: for each record the rows of `source.boxes` that it keeps. names: C class names, all
    of them known to the source; boxes of other classes are left out.
    """

    def __init__(self, source: DetectionDataset, images, rows, names: list[str]):
        self.source, self.source_index = source, np.asarray(images, np.int64)
        new_label = np.array([names.index(name) if name in names else -1 for name in source.names])
        kept = [[row for row in record if new_label[source.classes[row]] >= 0] for record in rows]
        flat = np.array([row for record in kept for row in record], np.int64)
        super().__init__(
            names=names, category_ids=[source.category_ids[source.names.index(name)] for name in names],
            image_ids=source.image_ids[self.source_index], paths=source.paths[self.source_index],
            sizes=source.sizes[self.source_index], boxes=source.boxes[flat],
            boxes_xywh=source.boxes_xywh[flat],
            classes=new_label[source.classes[flat]], areas=source.areas[flat], crowd=source.crowd[flat],
            difficult=source.difficult[flat],
            image_index=np.repeat(np.arange(len(kept)), [len(record) for record in kept]),
            notes=source.notes, voc=source.voc)

    def image(self, index: int, shrink: float = 1.0):
        return self.source.image(self.source_index[index], shrink)


def select_classes(dataset: DetectionDataset, names: list[str], drop_empty: bool) -> Subset:
    """The images of a dataset with only the objects of these classes.

    drop_empty: leave out images that then have nothing to learn (crowds do not count), as the base stage
    does. Scoring keeps them. Raises DataError for a class that the data lack.
    """
    missing = [name for name in names if name not in dataset.names]
    if missing:
        raise DataError(f"the data lack the classes {', '.join(missing)}; they have "
                        f"{', '.join(dataset.names)}")
    wanted = np.isin(dataset.classes, [dataset.names.index(name) for name in names])
    rows = [np.arange(len(dataset.boxes))[dataset.box_slice(i)] for i in range(len(dataset))]
    rows = [record[wanted[record]] for record in rows]
    images = [i for i, record in enumerate(rows) if not drop_empty or (~dataset.crowd[record]).any()]
    return Subset(dataset, images, [rows[i] for i in images], names)


# ---------------------------------------------------------------------------------------------- shots

def sample_coco(boxes_of: dict[str, dict], seed: int) -> dict[tuple[str, int], list]:
    """K boxes per class as TFA draws them for COCO, for every K of SHOTS that the class can fill.

    boxes_of: class -> image -> its boxes of that class, all in the order of the annotation file. Images are
    drawn until there are exactly K boxes. An image is taken with all its boxes of the class; it is skipped if
    that would be too many, or if it is taken already. Boxes of other classes are not part of the list. In a
    small set it can happen that no image fits; then one image gives only some of its boxes. Returns
    {(class, K): boxes}; the boxes of a K begin with the boxes of the K before.
    """
    rng, lists = random.Random(seed), {}
    for name, images in boxes_of.items():
        taken, boxes = set(), []
        for shots in SHOTS:
            misses = 0
            while len(boxes) < shots and misses < DRAWS and len(taken) < len(images):
                for image in rng.sample(list(images), min(shots, len(images))):
                    misses += 1
                    if image in taken or len(boxes) + len(images[image]) > shots:
                        continue
                    taken.add(image)
                    boxes += images[image]
                    misses = 0
                    if len(boxes) == shots:
                        break
            # DIFFERS: TFA takes whole images only. Its loop does not end if no image fits.
            left = [image for image in images if image not in taken]
            if len(boxes) < shots and left:
                image, missing = rng.choice(left), shots - len(boxes)
                boxes += images[image][:missing]
                images = {**images, image: images[image][missing:]}
                if not images[image]:
                    taken.add(image)
            if len(boxes) < shots:
                break
            lists[name, shots] = list(boxes)
    return lists


def sample_voc(boxes_of: dict[str, dict], seed: int) -> dict[tuple[str, int], list]:
    """Image lists as TFA draws them for VOC: {(class, K): images}, for every K of SHOTS up to 10.

    boxes_of: as in `sample_coco`. For each K, the number of drawn images equals the number of missing boxes.
    They are appended one by one until K boxes are reached. A list may hold more than K boxes, and one image
    twice.
    """
    rng, lists = random.Random(seed), {}
    for name, images in boxes_of.items():
        taken, before = [], 0
        for shots in SHOTS[:5]:
            if len(images) < shots - before:
                break
            count = 0
            for image in rng.sample(list(images), shots - before):
                taken.append(image)
                count += len(images[image])
                if count >= shots - before:
                    break
            before = shots
            lists[name, shots] = list(taken)
    return lists


def lists_folder(args: dict, voc: bool) -> Path | None:
    """The folder of the published lists: --shot-lists, or TFA's place beside the data.

    args: arguments of train.py. Returns None if shots are to be sampled. Raises DataError if the folder that
    was given does not exist.
    """
    if args["shot_lists"]:
        if str(args["shot_lists"]) == "none":
            return None
        if not Path(args["shot_lists"]).is_dir():
            raise DataError(f"--shot-lists {args['shot_lists']}: there is no such folder")
        return Path(args["shot_lists"])
    if args["data"] == "shapes":
        return None
    folder = Path(args["data"]) / "vocsplit" if voc else Path(args["data"]).parent / "cocosplit"
    return folder if folder.is_dir() else None


def k_shot_subset(source: DetectionDataset, names: list[str], shots: int, seed: int, lists: Path | None,
                  save_to: Path | None) -> Subset:
    """The dataset of K shots of every class in `names`.

    source: all images with all classes. lists: folder of the published lists; if None, shots are sampled and
    the lists are saved in the folder `save_to` in the same layout. As published, COCO's shots are merged by
    image, and its other objects become background. In VOC every shot is a record of its own, at most K per
    class. Raises DataError for a missing list, a list of other data, or too few boxes.
    """
    if lists is not None:
        rows_of = _read_lists(lists / f"seed{seed}", source, names, shots)
        origin = f"read from {lists / f'seed{seed}'}"
    else:
        rows_of, images_of = _sample_lists(source, names, shots, seed)
        origin = "sampled"
        if save_to:
            folder = save_to / ("vocsplit" if source.voc else "cocosplit") / f"seed{seed}"
            for name in names:
                _write_list(_list_path(folder, source, name, shots), source, rows_of[name], images_of[name])
            origin = f"sampled, lists in {folder}"
    if source.voc:
        # DIFFERS: the draw of K boxes is seeded. The official code draws them with numpy's unseeded global
        # state. It draws again for the calibration, which may then see other shots.
        rng = random.Random(seed)
        rows_of = {name: rng.sample(rows, min(shots, len(rows))) for name, rows in rows_of.items()}
    empty = [name for name, rows in rows_of.items() if not rows]
    if empty:
        raise DataError(f"the list of {shots} shots of {', '.join(empty)} holds no box ({origin})")
    shot_rows = [row for name in names for row in rows_of[name]]
    shot_images = source.box_image[shot_rows].tolist()
    if source.voc:  # a record per shot
        images, rows = shot_images, [[row] for row in shot_rows]
    else:  # a record per image
        rows_in = {}
        for image, row in zip(shot_images, shot_rows):
            rows_in.setdefault(image, []).append(row)
        images, rows = list(rows_in), list(rows_in.values())
    subset = Subset(source, images, rows, names)
    subset.notes = [f"{shots} shots per class, seed {seed}, {origin}: {len(shot_rows)} boxes in "
                    f"{len(set(images))} images"]
    return subset


def _read_lists(folder: Path, source: DetectionDataset, names: list[str], shots: int) -> dict[str, list[int]]:
    """{class: rows of source.boxes} of the published lists in a folder."""
    paths = {name: _list_path(folder, source, name, shots) for name in names}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} does not exist ({len(missing)} of {len(names)} lists are missing): "
                        f"take another --shots or --seed, another folder with --shot-lists, or sample with "
                        f"--shot-lists none")
    return {name: _read_list(path, source, name) for name, path in paths.items()}


def _sample_lists(source: DetectionDataset, names: list[str], shots: int, seed: int):
    """Two dicts with an entry per class: the rows of its boxes, and the indices of their images as drawn."""
    boxes_of = _boxes_by_class(source)
    lists = (sample_voc if source.voc else sample_coco)(boxes_of, seed)
    for name in names:
        if (name, shots) not in lists:
            possible = ", ".join(str(k) for n, k in lists if n == name) or "none"
            boxes, images = sum(map(len, boxes_of[name].values())), len(boxes_of[name])
            raise DataError(f"class {name}: {shots} shots cannot be drawn from its {boxes} boxes in {images} "
                            f"images (possible --shots: {possible})")
    if source.voc:
        images_of = {name: lists[name, shots] for name in names}
        return {name: [row for i in images for row in boxes_of[name][i]]
                for name, images in images_of.items()}, images_of
    rows_of, box_image = {name: lists[name, shots] for name in names}, source.box_image
    return rows_of, {name: list(dict.fromkeys(box_image[rows].tolist()))
                     for name, rows in rows_of.items()}


def _boxes_by_class(dataset: DetectionDataset) -> dict[str, dict[int, list[int]]]:
    """class -> image index -> rows of its boxes, without crowds.

    Boxes and images are in the order of the annotation file, classes in the order of their ids (VOC: in
    alphabetical order).
    """
    order = sorted(range(len(dataset.names)), key=lambda c: dataset.names[c] if dataset.voc else
                   (str(type(dataset.category_ids[c])), dataset.category_ids[c]))
    boxes_of = {dataset.names[c]: {} for c in order}
    box_image = dataset.box_image.tolist()
    for row in np.argsort(dataset.annotation_order).tolist():
        if not dataset.crowd[row]:
            boxes_of[dataset.names[dataset.classes[row]]].setdefault(box_image[row], []).append(row)
    return boxes_of


def _list_path(folder: Path, dataset: DetectionDataset, name: str, shots: int) -> Path:
    """The file of a list. A class name that is no file name, such as "../a", is changed and gets its id."""
    category = dataset.category_ids[dataset.names.index(name)]
    safe = re.sub(r'[/\\:*?"<>|]', "_", name)[:80]
    name = name if safe == name else f"{safe}_{category}"
    if dataset.voc:
        return folder / f"box_{shots}shot_{name}_train.txt"
    return folder / f"full_box_{shots}shot_{name}_trainval.json"


def _read_list(path: Path, source: DetectionDataset, name: str) -> list[int]:
    """Rows of source.boxes that a published list names. Raises DataError."""
    index_of = {str(image_id): i for i, image_id in enumerate(source.image_ids.tolist())}
    label, rows = source.names.index(name), []

    def rows_of(image_id) -> np.ndarray:
        if str(image_id) not in index_of:
            raise DataError(f"{path}: image {image_id} is not in the training split")
        box_slice = source.box_slice(index_of[str(image_id)])
        return box_slice.start + np.flatnonzero(source.classes[box_slice] == label)

    try:
        if source.voc:
            for line in read_text(path).split():
                rows += rows_of(Path(line).stem).tolist()
            return rows
        for annotation in json.loads(read_text(path))["annotations"]:
            x, y, w, h = annotation["bbox"]
            candidates = rows_of(annotation["image_id"])
            same = candidates[np.abs(source.boxes[candidates] - (x, y, x + w, y + h)).max(axis=1) < 0.01]
            if not len(same):
                raise DataError(f"{path}: image {annotation['image_id']} has no {name} at "
                                f"{annotation['bbox']}")
            rows.append(int(same[0]))
        return rows
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a list of shots ({error})") from error


def _write_list(path: Path, source: DetectionDataset, rows: list[int], images: list[int]):
    path.parent.mkdir(parents=True, exist_ok=True)
    if source.voc:
        lines = [os.fsdecode(source.paths[i]) for i in images]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    annotations, box_image = [], source.box_image
    for row in rows:
        x1, y1, x2, y2 = source.boxes[row].tolist()
        annotations.append({"id": int(source.annotation_order[row]) + 1,
                            "image_id": source.image_ids[box_image[row]].item(),
                            "category_id": source.category_ids[source.classes[row]],
                            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(source.areas[row]),
                            "iscrowd": 0})
    records = [{"id": source.image_ids[i].item(), "file_name": Path(os.fsdecode(source.paths[i])).name,
                "height": int(source.sizes[i, 0]), "width": int(source.sizes[i, 1])} for i in images]
    categories = [{"id": c, "name": n} for c, n in zip(source.category_ids, source.names)]
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}),
                    encoding="utf-8")

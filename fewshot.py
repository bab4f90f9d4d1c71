"""Few-shot data: base and novel classes, lists of K shots per class as TFA (arXiv 2003.06957) publishes
them, and the sampling that made them.

A split is named by class names, never by ids. A shot is a box. TFA's lists are read as they are where they
exist:

    cocosplit/seed0/full_box_10shot_person_trainval.json     COCO format, beside the data folder `coco`
    vocsplit/seed0/box_10shot_bird_train.txt                 image paths, in the folder that holds VOC2007

Elsewhere the same protocol draws them, seeded.
"""
import json
import os
import random
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from data import VOC_CLASSES, DataError, DetectionDataset, Shapes
from defrcn import CALIBRATION_WINDOW, CalibrationNet, calibrate, class_prototypes

SHOTS = (1, 2, 3, 5, 10, 30)  # of the published lists: a list of K shots holds the one before
COCO_NOVEL = ("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "boat", "bird", "cat",
              "dog", "horse", "sheep", "cow", "bottle", "chair", "couch", "potted plant", "dining table",
              "tv")
VOC_NOVEL = {1: ("bird", "bus", "cow", "motorbike", "sofa"),
             2: ("aeroplane", "bottle", "cow", "horse", "sofa"),
             3: ("boat", "cat", "motorbike", "sheep", "sofa")}
DRAWS = 1000  # without a fitting image before sampling gives up


class View(DetectionDataset):
    """Some images of a dataset with some of their boxes, under a class list of its own.

    images: indices into the source, one per record; an image may occur in several. rows: for each record the
    rows of `source.boxes` it keeps. names: C class names, a subset of the source's; rows of other classes
    are left out.
    """

    def __init__(self, source: DetectionDataset, images, rows, names: list[str]):
        self.source, self.source_index = source, np.asarray(images, np.int64)
        index_of = np.array([names.index(name) if name in names else -1 for name in source.names])
        kept = [[row for row in record if index_of[source.classes[row]] >= 0] for record in rows]
        flat = np.array([row for record in kept for row in record], np.int64)
        super().__init__(
            names, [source.category_ids[source.names.index(name)] for name in names],
            source.image_ids[self.source_index], source.paths[self.source_index],
            source.sizes[self.source_index], source.boxes[flat], index_of[source.classes[flat]],
            source.areas[flat], source.crowd[flat], source.difficult[flat],
            np.repeat(np.arange(len(kept)), [len(record) for record in kept]), source.notes, source.voc)

    def image(self, index: int, shrink: float = 1.0):
        return self.source.image(self.source_index[index], shrink)


# ---------------------------------------------------------------------------------------------- schedules

# Steps of 16 images and the lr drop of DeFRCN's configs: (data, generalized): {K: (steps, drop)}.
FINE_TUNING = {
    ("coco", False): {1: (1000, 800), 2: (1500, 1200), 3: (2000, 1600), 5: (2500, 2000), 10: (2500, 2000),
                      30: (4000, 3200)},
    ("coco", True): {1: (3200, 2560), 2: (4000, 3200), 3: (4800, 3840), 5: (6000, 4800), 10: (6000, 4800),
                     30: (12000, 9600)},
    ("voc", False): {1: (800, 640), 2: (1200, 960), 3: (1600, 1280), 5: (2000, 1600), 10: (4000, 3200)},
    ("voc", True): {1: (1000, 800), 2: (1500, 1200), 3: (2000, 1600), 5: (2500, 2000), 10: (4000, 3200)},
}
BASE_TRAINING = {"coco": (110_000, (85_000, 100_000)), "voc": (15_000, (10_000, 13_300))}


def schedule(voc: bool, shots: int | None, generalized: bool) -> tuple[int, tuple[int, ...]]:
    """Steps of 16 images and lr drops as published; shots None: the base stage. Own data take COCO's, and K
    shots the next K with a config."""
    kind = "voc" if voc else "coco"
    if shots is None:
        return BASE_TRAINING[kind]
    table = FINE_TUNING[kind, generalized]
    steps, drop = table[min((k for k in table if k >= shots), default=max(table))]
    return steps, (drop,)


# ---------------------------------------------------------------------------------------------- classes

def novel_names(dataset: DetectionDataset, voc_split: int = 1, given: list[str] | None = None) -> list[str]:
    """The novel classes of a dataset: `given` names, else the published ones of COCO and VOC, else (shapes)
    the last two. Raises DataError for a name that does not exist and where no class would be left as
    base."""
    names = dataset.names
    if given is None:
        if isinstance(dataset, Shapes):
            given = names[-2:]
        elif dataset.voc and set(VOC_CLASSES) == set(names):
            given = VOC_NOVEL[voc_split]
        elif len(names) == 80 and set(COCO_NOVEL) < set(names):
            given = COCO_NOVEL
        else:
            raise DataError(f"which classes are novel? Say it with --novel-classes; the data have "
                            f"{', '.join(names)}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise DataError(f"novel classes: the data have no {', '.join(unknown)}; they have {', '.join(names)}")
    if len(set(given)) < len(given) or not 0 < len(given) < len(names):
        raise DataError(f"novel classes {', '.join(given) or '(none)'}: name each once, and leave at least "
                        f"one class of {', '.join(names)} as base")
    return list(given)


def keep_classes(dataset: DetectionDataset, names: list[str], drop_empty: bool) -> View:
    """The images with the objects of these classes only. drop_empty: without the images that then have
    nothing to learn (a crowd is nothing), as the base stage trains; scoring keeps them."""
    missing = [name for name in names if name not in dataset.names]
    if missing:
        raise DataError(f"the data lack the classes {', '.join(missing)}; they have "
                        f"{', '.join(dataset.names)}")
    wanted = np.isin(dataset.classes, [dataset.names.index(name) for name in names])
    rows = [np.arange(dataset.first[i], dataset.first[i + 1]) for i in range(len(dataset))]
    rows = [record[wanted[record]] for record in rows]
    images = [i for i, record in enumerate(rows) if not drop_empty or (~dataset.crowd[record]).any()]
    return View(dataset, images, [rows[i] for i in images], names)


# ---------------------------------------------------------------------------------------------- shots

def sample_coco(boxes_of: dict[str, dict], seed: int) -> dict[tuple[str, int], list]:
    """K boxes per class as TFA draws them for COCO, for every K of SHOTS that the class can fill.

    boxes_of: class -> image -> its boxes of that class, all in the order of the annotation file. Images are
    drawn until there are exactly K boxes; one is taken with all its boxes of the class, or skipped when that
    were too many or it is taken already. Other classes' boxes in it are not part of the list. Where no image
    fits, which happens in small sets only (TFA would not end), one gives the first few of its boxes. Returns
    {(class, K): boxes}; the boxes of K begin with those of the K before.
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
            # DIFFERS: TFA takes whole images only, and does not end where none fits.
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

    boxes_of as in `sample_coco`. For every K as many images are drawn as boxes are missing, and appended
    until their objects of the class fill the gap: a list may hold more than K boxes, and an image twice.
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
    """Where the lists for train.py's arguments are: --shot-lists, or TFA's place; None: to be sampled."""
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


def shot_view(source: DetectionDataset, names: list[str], shots: int, seed: int, lists: Path | None,
              save_to: Path | None) -> View:
    """The dataset of the K shots of every class in `names`: read from the folder `lists`, or if None sampled
    from `source` (all classes of its images) and saved in the folder `save_to` in the same layout.

    As published, COCO's shots are merged by image, whose other objects are background, and in VOC every shot
    is a record of its own, at most K per class. Raises DataError for a missing or foreign list and for too
    few boxes.
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
        # DIFFERS: seeded. The official code draws the K of more boxes with numpy's global state, unseeded,
        # and again for the calibration, which may then see other shots.
        rng = random.Random(seed)
        rows_of = {name: rng.sample(rows, min(shots, len(rows))) for name, rows in rows_of.items()}
    empty = [name for name, found in rows_of.items() if not found]
    if empty:
        raise DataError(f"the list of {shots} shots of {', '.join(empty)} holds no box ({origin})")
    image_of_box = np.repeat(np.arange(len(source)), np.diff(source.first))
    shot_rows = [row for name in names for row in rows_of[name]]
    if source.voc:  # a record per shot
        images, rows = image_of_box[shot_rows].tolist(), [[row] for row in shot_rows]
    else:  # a record per image
        images = list(dict.fromkeys(image_of_box[shot_rows].tolist()))
        rows = [[row for row in shot_rows if image_of_box[row] == image] for image in images]
    view = View(source, images, rows, names)
    view.notes = [f"{shots} shots per class, seed {seed}, {origin}: {sum(map(len, rows))} boxes in "
                  f"{len(set(images))} images"]
    return view


def _read_lists(folder: Path, source: DetectionDataset, names: list[str], shots: int) -> dict[str, list[int]]:
    paths = {name: _list_path(folder, source, name, shots) for name in names}
    missing = [path for path in paths.values() if not path.is_file()]
    if missing:
        raise DataError(f"{missing[0]} does not exist ({len(missing)} of {len(names)} lists are missing): "
                        f"take another --shots or --seed, another folder with --shot-lists, or sample with "
                        f"--shot-lists none")
    return {name: _read_list(path, source, name) for name, path in paths.items()}


def _sample_lists(source: DetectionDataset, names: list[str], shots: int, seed: int):
    """Rows of the boxes, and indices of the images as drawn, of every class: two dicts."""
    every = _boxes_by_class(source)
    lists = (sample_voc if source.voc else sample_coco)(every, seed)
    for name in names:
        if (name, shots) not in lists:
            possible = ", ".join(str(k) for n, k in lists if n == name) or "none"
            boxes, images = sum(map(len, every[name].values())), len(every[name])
            raise DataError(f"class {name}: {shots} shots cannot be drawn from its {boxes} boxes in {images} "
                            f"images (possible --shots: {possible})")
    if source.voc:
        images_of = {name: lists[name, shots] for name in names}
        return {name: [row for i in images for row in every[name][i]]
                for name, images in images_of.items()}, images_of
    image_of_box = np.repeat(np.arange(len(source)), np.diff(source.first))
    rows = {name: lists[name, shots] for name in names}
    return rows, {name: list(dict.fromkeys(image_of_box[found].tolist())) for name, found in rows.items()}


def _boxes_by_class(dataset: DetectionDataset) -> dict[str, dict[int, list[int]]]:
    """class -> image index -> rows, without crowds, all in the order of the annotation file; classes in the
    order of their ids (VOC: of the alphabet)."""
    order = sorted(range(len(dataset.names)), key=lambda c: dataset.names[c] if dataset.voc else
                   (str(type(dataset.category_ids[c])), dataset.category_ids[c]))
    boxes_of = {dataset.names[c]: {} for c in order}
    image_of_box = np.repeat(np.arange(len(dataset)), np.diff(dataset.first))
    for row in np.argsort(dataset.file_row).tolist():
        if not dataset.crowd[row]:
            boxes_of[dataset.names[dataset.classes[row]]].setdefault(int(image_of_box[row]), []).append(row)
    return boxes_of


def _list_path(folder: Path, dataset: DetectionDataset, name: str, shots: int) -> Path:
    if dataset.voc:
        return folder / f"box_{shots}shot_{name}_train.txt"
    return folder / f"full_box_{shots}shot_{name}_trainval.json"


def _read_list(path: Path, source: DetectionDataset, name: str) -> list[int]:
    """Rows of the source that a published list names. Raises DataError."""
    index_of = {str(image_id): i for i, image_id in enumerate(source.image_ids.tolist())}
    label, rows = source.names.index(name), []

    def rows_of(image_id) -> np.ndarray:
        if str(image_id) not in index_of:
            raise DataError(f"{path}: image {image_id} is not in the training split")
        i = index_of[str(image_id)]
        candidates = np.arange(source.first[i], source.first[i + 1])
        return candidates[source.classes[candidates] == label]

    try:
        if source.voc:
            for line in path.read_text(encoding="utf-8").split():
                rows += rows_of(Path(line).stem).tolist()
            return rows
        for annotation in json.loads(path.read_text(encoding="utf-8"))["annotations"]:
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
    image_of_box = np.repeat(np.arange(len(source)), np.diff(source.first))
    if source.voc:
        lines = [os.fsdecode(source.paths[i]) for i in images]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    annotations = []
    for row in rows:
        x1, y1, x2, y2 = source.boxes[row].tolist()
        annotations.append({"id": int(source.file_row[row]) + 1,
                            "image_id": source.image_ids[image_of_box[row]].item(),
                            "category_id": source.category_ids[source.classes[row]],
                            "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(source.areas[row]),
                            "iscrowd": 0})
    records = [{"id": source.image_ids[i].item(), "file_name": Path(os.fsdecode(source.paths[i])).name,
                "height": int(source.sizes[i, 0]), "width": int(source.sizes[i, 1])} for i in images]
    categories = [{"id": c, "name": n} for c, n in zip(source.category_ids, source.names)]
    path.write_text(json.dumps({"images": records, "annotations": annotations, "categories": categories}),
                    encoding="utf-8")


# ---------------------------------------------------------------------------------------------- calibration

class Calibration:
    """Prototypical calibration of a detections file: the scores of novel classes, mixed with the similarity
    to their shots.

    weights: of the ImageNet classifier, see `defrcn.CalibrationNet`. support: the shots. novel: names of the
    classes that are calibrated. Raises WeightsError.
    """

    def __init__(self, weights: str, support: DetectionDataset, novel: list[str], device):
        self.net, self.device = CalibrationNet(weights).to(device), device
        # DIFFERS: the official code takes the shots' boxes through the resizing of the detector and back with
        # one ratio for both axes, which moves them by up to 0.1 %. Here they stay where they are.
        features, labels = [], []
        for i in range(len(support)):
            rows = np.arange(support.first[i], support.first[i + 1])
            rows = rows[~support.crowd[rows]]
            features.append(self._features(support, i, support.boxes[rows]))
            labels.append(torch.from_numpy(support.classes[rows]))
        self.prototypes = class_prototypes(torch.cat(features), torch.cat(labels).to(device),
                                           len(support.names))
        self.excluded = torch.tensor([name not in novel for name in support.names], device=device)

    @torch.inference_mode()
    def _features(self, dataset: DetectionDataset, index: int, boxes) -> torch.Tensor:
        image = torch.from_numpy(np.asarray(dataset.image(index)).copy()).permute(2, 0, 1)
        boxes = torch.as_tensor(boxes, dtype=torch.float32, device=self.device)
        return self.net(image.to(self.device), boxes)

    def __call__(self, dataset: DetectionDataset, results: list[dict], rank: int = 0,
                 world: int = 1) -> list[dict]:
        """Detections in COCO result format with their new scores, best first in every image; all ranks get
        all, each computes every world-th image."""
        label_of = {category: label for label, category in enumerate(dataset.category_ids)}
        by_image = {}
        for result in results:
            if CALIBRATION_WINDOW[0] < result["score"] <= CALIBRATION_WINDOW[1]:
                by_image.setdefault(result["image_id"], []).append(result)
        position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
        new = {}
        for image_id in sorted(by_image, key=position.get)[rank::world]:
            found = by_image[image_id]
            xywh = torch.tensor([result["bbox"] for result in found])
            features = self._features(dataset, position[image_id],
                                      torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), dim=1))
            labels = torch.tensor([label_of[result["category_id"]] for result in found], device=self.device)
            scores = torch.tensor([result["score"] for result in found], device=self.device)
            scores = calibrate(scores, labels, features, self.prototypes, self.excluded)
            new[image_id] = [{**result, "score": round(score, 6)} for result, score in
                             zip(found, scores.tolist())]
        if world > 1:
            parts = [None] * world
            dist.all_gather_object(parts, new)
            new = {image_id: found for part in parts for image_id, found in part.items()}
        kept = [r for r in results if not CALIBRATION_WINDOW[0] < r["score"] <= CALIBRATION_WINDOW[1]]
        changed = [result for found in new.values() for result in found]
        return sorted(kept + changed, key=lambda r: (position[r["image_id"]], -r["score"]))


# ---------------------------------------------------------------------------------------------- tables

# Runs that differ in one of these are different rows; decouple: None, or the scales of RPN and RoI head.
SETTING_KEYS = ("data", "novel", "model", "backbone", "cosine", "decouple", "calibrated", "generalized",
                "shots")
TABLE_KEYS = ("nAP", "nAP50", "nAP75", "nAP50_VOC07", "bAP", "bAP50", "bAP50_VOC07", "AP")


def few_shot_scores(metrics: dict, novel: list[str]) -> dict[str, float | None]:
    """nAP, nAP50, nAP75 of the novel classes, bAP, ... of the others: means over classes, None without any.
    On VOC data also nAP50_VOC07 and bAP50_VOC07, the published measure there.

    metrics: of `evaluate.score`, with "per_class", "per_class_AP50", ...
    """
    columns = {"AP": "per_class", "AP50": "per_class_AP50", "AP75": "per_class_AP75"}
    if "per_class_AP50_VOC07" in metrics:
        columns["AP50_VOC07"] = "per_class_AP50_VOC07"
    scores = {}
    for letter, is_novel in (("n", True), ("b", False)):
        for key, column in columns.items():
            values = [value for name, value in metrics[column].items()
                      if (name in novel) == is_novel and value is not None]
            scores[letter + key] = float(np.mean(values)) if values else None
    return scores


def aggregate(runs: list[dict]) -> list[dict]:
    """One row per setting of metrics.json contents: mean and 95 % confidence interval over seeds.

    The interval is 1.96 standard deviations (of the population, as TFA computes it) over the root of the
    number of runs. Raises DataError where a run has no few-shot scores.
    """
    groups = {}
    for run in runs:
        if not isinstance(run, dict) or run.get("few_shot", {}).get("stage") != "novel":
            raise DataError("a run that is not of --stage novel: there is nothing to aggregate")
        *words, shots = (run["few_shot"][key] for key in SETTING_KEYS)
        groups.setdefault((*map(str, words), shots), []).append(run)
    rows = []
    for _, members in sorted(groups.items()):
        row = {key: members[0]["few_shot"][key] for key in SETTING_KEYS}
        row["seeds"] = sorted(m["few_shot"]["seed"] for m in members)
        if len(set(row["seeds"])) < len(members):
            raise DataError(f"several runs of {row['model']} with {row['shots']} shots have the same seed: "
                            f"{row['seeds']}")
        for key in TABLE_KEYS:
            values = [m["few_shot"].get(key) if key != "AP" else m["AP"] for m in members]
            if None not in values:
                row[key] = [float(np.mean(values)), float(1.96 * np.std(values) / np.sqrt(len(values)))]
        rows.append(row)
    return rows


def aggregate_table(rows: list[dict]) -> str:
    """Rows of `aggregate` as text, in percent."""
    keys = [key for key in TABLE_KEYS if any(key in row for row in rows)]
    lines = [f"{'data':16} {'novel':20} {'model':12} {'scales':8} {'setting':7} shots runs  "
             + "  ".join(f"{key:>13}" for key in keys)]
    for row in rows:
        cells = [f"{100 * row[key][0]:6.2f} ± {100 * row[key][1]:4.2f}" if key in row else "" for key in keys]
        setting = "gFSOD" if row["generalized"] else "FSOD"
        scales = "{:g}, {:g}".format(*row["decouple"]) if row["decouple"] else "none"
        lines.append(f"{row['data'][-16:]:16} {','.join(row['novel'])[:20]:20} {row['model']:12} {scales:8} "
                     f"{setting:7} {row['shots']:5} {len(row['seeds']):4}  "
                     + "  ".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)

"""Scores of detections: COCO's twelve numbers, Pascal VOC's AP50, means over groups of classes."""
import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import DataError, DetectionDataset
from runtime import print0

# The twelve lines of pycocotools' summary.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
VOC_IOU = 0.5  # a detection matches an object from this IoU on


class ClassGroups(NamedTuple):
    """Groups of classes with mean APs of their own, an entry of metrics.json."""
    key: str  # name of the entry
    info: dict  # what else the entry says
    members: dict[str, list[str]]  # see `group_means`


def score(dataset: DetectionDataset, results: list[dict]) -> dict:
    """Scores detections in COCO result format and prints the tables.

    Returns the METRICS in 0..1, None where the dataset has no object of that size, and {class name: AP} as
    "per_class", "per_class_AP50" and "per_class_AP75". VOC data also get "AP50_VOC07" (11-point), "AP50_VOC"
    (all-point) and both per class. Raises DataError for a malformed detection or an unknown id.
    """
    _check_results(dataset, results)
    if not results:
        print0("warning: there is not a single detection")
    metrics = _coco_scores(dataset, results)
    columns = {"AP": metrics["per_class"]}
    if dataset.voc:
        for key, eleven_point in (("AP50_VOC07", True), ("AP50_VOC", False)):
            columns[key] = metrics[f"per_class_{key}"] = voc_ap50(dataset, results, eleven_point)
            metrics[key] = _mean(columns[key].values())
    width = max(map(len, dataset.names))
    print0(f"{'class':{width}}  " + "  ".join(f"{key:>10}" for key in columns))
    for name in dataset.names:
        print0(f"{name:{width}}  " + "  ".join(f"{shown(column[name]):>10}" for column in columns.values()))
    if dataset.voc:
        print0(f"AP50 (VOC07 11-point) {shown(metrics['AP50_VOC07'])}   "
               f"AP50 (VOC10+ all-point) {shown(metrics['AP50_VOC'])}   difficult objects ignored")
    print0("  ".join(f"{key} {shown(metrics[key])}" for key in METRICS[:6]))
    return metrics


def group_means(metrics: dict, groups: dict[str, list[str]]) -> dict[str, float | None]:
    """Mean AP, AP50 and AP75 over groups of classes; on VOC data also AP50_VOC07, the published measure.

    metrics: what `score` returned. groups: {prefix: class names}; {"n": novel, "b": base} gives nAP, nAP50,
    ..., bAP, .... Classes without objects do not count; the mean of no class is None.
    """
    columns = {"AP": "per_class", "AP50": "per_class_AP50", "AP75": "per_class_AP75"}
    if "per_class_AP50_VOC07" in metrics:
        columns["AP50_VOC07"] = "per_class_AP50_VOC07"
    means = {}
    for prefix, names in groups.items():
        for key, column in columns.items():
            means[prefix + key] = _mean(value for name, value in metrics[column].items() if name in names)
    return means


def shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _mean(values) -> float | None:
    """Mean of the values that are not None; None without any."""
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def read_results(path: Path) -> list[dict]:
    """Detections in COCO result format, from this program or any other. Raises DataError."""
    try:
        results = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as detections ({error})") from error
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise DataError(f"{path}: not COCO result format, a list of {{image_id, category_id, bbox, score}}")
    return results


def _check_results(dataset: DetectionDataset, results: list[dict]):
    """Raises DataError for the first detection that lacks a field or has an impossible value."""
    ids = {"image_id": set(dataset.image_ids.tolist()), "category_id": set(dataset.category_ids)}
    for i, result in enumerate(results):
        missing = {"image_id", "category_id", "bbox", "score"} - set(result)
        if missing:
            raise DataError(f"detection {i} lacks {', '.join(sorted(missing))}")
        for key, existing in ids.items():
            if not isinstance(result[key], (int, str)) or result[key] not in existing:
                raise DataError(f"detection {i}: {key} {result[key]!r} is not in the dataset")
        box = result["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0):
            raise DataError(f"detection {i}: bbox {box!r} is not [x, y, width, height]")
        if not _is_finite(result["score"]):
            raise DataError(f"detection {i}: score {result['score']!r} is not a number")


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e300  # false for nan; an int may exceed floats


# ---------------------------------------------------------------------------------------------- COCO

def ground_truth(dataset: DetectionDataset) -> COCO:
    """The dataset as pycocotools wants it. VOC's difficult objects are ignored, as crowds are."""
    truth = COCO()
    image_ids, box_image = dataset.image_ids.tolist(), dataset.box_image
    boxes_xywh = dataset.boxes_xywh.tolist()
    truth.dataset = {
        "images": [{"id": image_id, "height": height, "width": width}
                   for image_id, (height, width) in zip(image_ids, dataset.sizes.tolist())],
        "categories": [{"id": category, "name": name}
                       for category, name in zip(dataset.category_ids, dataset.names)],
        # Ids start at 1, because pycocotools takes id 0 for "not matched".
        "annotations": [{"id": i + 1, "image_id": image_ids[box_image[i]], "bbox": boxes_xywh[i],
                         "category_id": dataset.category_ids[dataset.classes[i]],
                         "area": float(dataset.areas[i]),
                         "iscrowd": int(dataset.crowd[i] or dataset.difficult[i])}
                        for i in range(len(boxes_xywh))]}
    truth.createIndex()
    return truth


def coco_evaluation(truth: COCO, results: list[dict]) -> COCOeval:
    """pycocotools' evaluation of boxes, not run yet. truth: from `ground_truth`."""
    # loadRes changes the dicts that it is given, and refuses an empty list.
    detections = truth.loadRes([dict(result) for result in results]) if results else COCO()
    return COCOeval(truth, detections, "bbox")


def _coco_scores(dataset: DetectionDataset, results: list[dict]) -> dict:
    """METRICS and the AP, AP50 and AP75 of every class, by pycocotools. Prints its summary."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = ground_truth(dataset)
        evaluation = coco_evaluation(truth, results)
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) as summary:
        evaluation.summarize()
    print0(summary.getvalue().rstrip())
    metrics = {key: float(v) if v > -1 else None for key, v in zip(METRICS, evaluation.stats)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # all areas, 100 detections per image
    precision = np.moveaxis(precision, 2, 0)  # class, IoU, recall
    # pycocotools sorts classes by category id and writes -1 where there is nothing to find.
    position = {category: i for i, category in enumerate(sorted(dataset.category_ids))}
    for key, ious in (("per_class", slice(None)), ("per_class_AP50", 0), ("per_class_AP75", 5)):
        metrics[key] = {}
        for name, category in zip(dataset.names, dataset.category_ids):
            values = precision[position[category], ious]
            values = values[values > -1]
            metrics[key][name] = float(values.mean()) if len(values) else None
    return metrics


# ---------------------------------------------------------------------------------------------- VOC

def voc_ap50(dataset: DetectionDataset, results: list[dict], eleven_point: bool) -> dict[str, float | None]:
    """Pascal VOC's AP50 of every class; None for a class without objects.

    eleven_point: True takes the mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC07), False takes
    the area under the precision envelope (VOC10 and later). Detections are taken best score first. Each can
    match the object that it overlaps most, with an IoU of at least VOC_IOU. A second match of an object is a
    false positive; a match of a difficult object does not count. The IoU equals that of the devkit, which
    counts pixels.
    """
    index_of, by_category = dataset.index_of_image(), {category: [] for category in dataset.category_ids}
    for result in results:
        by_category[result["category_id"]].append(result)
    average = {}
    for label, name in enumerate(dataset.names):
        is_class = dataset.classes == label
        num_objects = int((is_class & ~dataset.difficult).sum())
        found, hits = set(), []  # rows of objects that have been detected; 1 true positive, 0 false positive
        for result in sorted(by_category[dataset.category_ids[label]], key=lambda r: -r["score"]):
            in_image = dataset.box_slice(index_of[result["image_id"]])
            rows = in_image.start + np.flatnonzero(is_class[in_image])
            x, y, w, h = result["bbox"]
            ious = iou_with(np.array([x, y, x + w, y + h]), dataset.boxes[rows])
            best = int(ious.argmax()) if len(rows) else -1
            if best < 0 or ious[best] < VOC_IOU:
                hits.append(0)
            elif not dataset.difficult[rows[best]]:
                hits.append(int(rows[best] not in found))
                found.add(rows[best])
        true_positives = np.cumsum(hits)
        recall, precision = true_positives / max(1, num_objects), true_positives / np.arange(1, len(hits) + 1)
        average[name] = _average_precision(recall, precision, eleven_point) if num_objects else None
    return average


def iou_with(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU of one box (4,) with boxes (n, 4)."""
    sides = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0)
    inter = sides.prod(axis=1)
    union = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - inter
    return inter / np.maximum(union, 1e-12)


def _average_precision(recall: np.ndarray, precision: np.ndarray, eleven_point: bool) -> float:
    if eleven_point:
        return float(np.mean([precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)]))
    recall, precision = np.concatenate(([0], recall, [1])), np.concatenate(([0], precision, [0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())

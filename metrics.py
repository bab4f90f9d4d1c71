"""Scores of detections: COCO's twelve numbers, Pascal VOC's AP50, means over groups of classes."""
import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data import DataError, DetectionDataset, read_text
from runtime import print0

# The twelve lines of pycocotools' summary.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
VOC_IOUS = tuple(iou / 100 for iou in range(50, 100, 5))  # a detection matches an object from this IoU on


class ClassGroups(NamedTuple):
    """Groups of classes with mean APs of their own, an entry of metrics.json."""
    key: str  # name of the entry
    info: dict  # what else the entry says
    members: dict[str, list[str]]  # see `group_means`


def score(dataset: DetectionDataset, results: list[dict]) -> dict:
    """Scores detections in COCO result format and prints the tables.

    Returns the METRICS in 0..1, None where the dataset has no object of that size, and {class name: AP} as
    "per_class", "per_class_AP50" and "per_class_AP75". VOC data also get "AP50_VOC" (all-point), "AP50_VOC07"
    (11-point), and as published for few-shot detection "AP75_VOC07" and "AP_VOC07", the mean over COCO's ten
    IoUs; all of them also per class. Raises DataError for a malformed detection or an unknown id.
    """
    _check_results(dataset, results)
    if not results:
        print0("warning: there is not a single detection")
    metrics = _coco_scores(dataset, results)
    columns = {"AP": metrics["per_class"]}
    if dataset.voc:
        for key, by_class in voc_scores(dataset, results).items():
            metrics[f"per_class_{key}"], metrics[key] = by_class, _mean(by_class.values())
        columns |= {key: metrics[f"per_class_{key}"] for key in ("AP50_VOC07", "AP50_VOC")}
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
    """Mean AP, AP50 and AP75 over groups of classes, on VOC data also as VOC07 computes them, as published.

    metrics: what `score` returned. groups: {prefix: class names}; {"n": novel, "b": base} gives nAP, nAP50,
    ..., bAP, .... Classes without objects do not count; the mean of no class is None.
    """
    columns = {"AP": "per_class", "AP50": "per_class_AP50", "AP75": "per_class_AP75"}
    columns |= {f"{key}_VOC07": f"per_class_{key}_VOC07" for key in columns if f"{key}_VOC07" in metrics}
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
        results = json.loads(read_text(path))
    except (DataError, ValueError, RecursionError) as error:
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

def voc_scores(dataset: DetectionDataset, results: list[dict]) -> dict[str, dict[str, float | None]]:
    """Pascal VOC's APs, {measure: {class name: AP}}; None for a class without objects.

    AP50_VOC07, AP75_VOC07 and AP_VOC07 (mean over VOC_IOUS) take the mean of the best precision at recall
    >= 0, 0.1, ..., 1. AP50_VOC (VOC10 and later) is the area under the precision envelope.
    """
    scores = {key: {} for key in ("AP50_VOC07", "AP50_VOC", "AP75_VOC07", "AP_VOC07")}
    by_category = {category: [] for category in dataset.category_ids}
    for result in results:
        by_category[result["category_id"]].append(result)
    for label, name in enumerate(dataset.names):
        matches = _voc_matches(dataset, label, by_category[dataset.category_ids[label]])
        num_objects = int(((dataset.classes == label) & ~dataset.difficult).sum())
        curves = [_precision_recall(*matches, dataset.difficult, num_objects, iou) for iou in VOC_IOUS]
        eleven = [_average_precision(*curve, eleven_point=True) for curve in curves]
        area = _average_precision(*curves[0], eleven_point=False)
        for by_class, value in zip(scores.values(), (eleven[0], area, eleven[5], np.mean(eleven))):
            by_class[name] = float(value) if num_objects else None
    return scores


def _voc_matches(dataset: DetectionDataset, label: int, results: list[dict]) -> tuple[list[int], list[float]]:
    """For every detection of one class, best score first: the object that it overlaps most, and their IoU.

    The object is a row of the dataset, -1 if its image has none of the class. The IoU equals that of the
    devkit, which counts pixels.
    """
    index_of, is_class, rows, ious = dataset.index_of_image(), dataset.classes == label, [], []
    for result in sorted(results, key=lambda r: -r["score"]):
        in_image = dataset.box_slice(index_of[result["image_id"]])
        objects = in_image.start + np.flatnonzero(is_class[in_image])
        x, y, w, h = result["bbox"]
        overlaps = iou_with(np.array([x, y, x + w, y + h]), dataset.boxes[objects])
        best = int(overlaps.argmax()) if len(objects) else -1
        rows.append(int(objects[best]) if len(objects) else -1)
        ious.append(float(overlaps[best]) if len(objects) else 0.0)
    return rows, ious


def _precision_recall(rows: list[int], ious: list[float], difficult: np.ndarray, num_objects: int,
                      min_iou: float) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after every detection of one class, see `_voc_matches`.

    A detection is right if its IoU is at least min_iou. A second match of an object is wrong; a match of a
    difficult object does not count.
    """
    found, hits = set(), []
    for row, iou in zip(rows, ious):
        if row < 0 or iou < min_iou:
            hits.append(0)
        elif not difficult[row]:
            hits.append(int(row not in found))
            found.add(row)
    true_positives = np.cumsum(hits)
    return true_positives / max(1, num_objects), true_positives / np.arange(1, len(hits) + 1)


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

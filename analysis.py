"""Why a score is what it is: precision over recall, the worst images, the recall of proposals."""
import contextlib
import io
from typing import NamedTuple

import numpy as np

from data import DetectionDataset
from metrics import coco_evaluation, ground_truth, iou_with, shown
from runtime import print0

PROPOSALS = [100, 300, 1000]  # the best of an image that `proposal_recall` looks at
RECALL_IMAGES = 500  # that it scores at a time
MATCH_IOU = 0.5  # a detection is that of an object from this IoU on


def precision_recall(dataset: DetectionDataset, results: list[dict]) -> dict[str, dict]:
    """Precision over recall at IoU 0.5 of every class, and the score threshold with the best F1.

    Returns {class name: {"recall" and "precision" (101), "threshold", "f1", "best_recall"}}; the last three
    are None for a class that is never found. Precision is pycocotools': the best at that recall or beyond.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = coco_evaluation(ground_truth(dataset), results)
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    recall, curves = evaluation.params.recThrs, {}
    for i, category in enumerate(sorted(dataset.category_ids)):
        precision = evaluation.eval["precision"][0, :, i, 0, -1]
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        best = int(f1.argmax())
        found = precision.max() > 0
        curves[dataset.names[dataset.category_ids.index(category)]] = {
            "recall": recall.tolist(), "precision": precision.clip(0).tolist(),
            "threshold": float(evaluation.eval["scores"][0, best, i, 0, -1]) if found else None,
            "f1": float(f1[best]) if found else None, "best_recall": float(recall[best]) if found else None}
    return {name: curves[name] for name in dataset.names}


class ImageErrors(NamedTuple):
    """What went wrong in one image, see `image_errors`."""
    index: int  # of the image
    f1: float  # 1 if there is nothing to find and nothing was found
    missed: list[int]  # rows of `dataset.boxes` that no detection matches
    found: list[tuple[dict, str]]  # detections with "" or what is wrong: "doubled", "false", "is a CLASS"


def image_errors(dataset: DetectionDataset, results: list[dict],
                 thresholds: dict[str, float | None]) -> list[ImageErrors]:
    """Matches the detections of every image with its objects, at an IoU of 0.5, best score first.

    thresholds: lowest score of every class name, see `precision_recall`; None leaves the class out. A
    detection matches the free object of its class that it overlaps most. Else it is doubled (an object of its
    class is there), "is a CLASS" (one of another class is) or false. Crowds and difficult objects need not be
    found; a detection of them counts neither way. Returns the images, lowest F1 first.
    """
    label_of = dataset.label_of_category()
    by_image = {image_id: [] for image_id in dataset.image_ids.tolist()}
    for result in results:
        limit = thresholds[dataset.names[label_of[result["category_id"]]]]
        if limit is not None and result["score"] >= limit:
            by_image[result["image_id"]].append(result)
    images = []
    for index, image_id in enumerate(dataset.image_ids.tolist()):
        in_image = dataset.box_slice(index)
        rows = np.arange(in_image.start, in_image.stop)
        optional = dataset.crowd[rows] | dataset.difficult[rows]
        free, found, hits = np.ones(len(rows), bool), [], 0
        for result in sorted(by_image[image_id], key=lambda r: -r["score"]):
            x, y, w, h = result["bbox"]
            iou = iou_with(np.array([x, y, x + w, y + h]), dataset.boxes[rows])
            own = dataset.classes[rows] == label_of[result["category_id"]]
            match = int((iou * (own & free)).argmax()) if len(rows) else 0
            if len(rows) and iou[match] >= MATCH_IOU and own[match] and free[match]:
                free[match], hits = False, hits + (not optional[match])
                found.append((result, ""))
            elif (near := iou >= MATCH_IOU).any():
                other = dataset.names[dataset.classes[rows[iou.argmax()]]]
                found.append((result, "doubled" if (near & own).any() else f"is a {other}"))
            else:
                found.append((result, "false"))
        missed, wrong = rows[free & ~optional].tolist(), sum(what != "" for _, what in found)
        parts = 2 * hits + wrong + len(missed)
        images.append(ImageErrors(index, 2 * hits / parts if parts else 1.0, missed, found))
    return sorted(images, key=lambda image: image.f1)


def proposal_recall(dataset: DetectionDataset, proposals: list[dict]) -> dict[str, float | None]:
    """Share of the objects that proposals cover, a mean over the IoUs 0.5 to 0.95, whatever the class.

    proposals: in COCO result format, best score first; their category is ignored. Prints and returns AR100,
    AR300, AR1000 for the best proposals of each image, and ARs1000, ARm1000, ARl1000 for small, medium and
    large objects. None where there is no object of that size.
    """
    by_image = {image_id: [] for image_id in dataset.image_ids.tolist()}
    for proposal in proposals:
        by_image[proposal["image_id"]].append(proposal)
    found = objects = 0.0  # (IoU, area, number of proposals), (area, 1)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = ground_truth(dataset)
        for start in range(0, len(dataset), RECALL_IMAGES):  # all at once would take gigabytes
            image_ids = dataset.image_ids[start:start + RECALL_IMAGES].tolist()
            results = [proposal for image_id in image_ids for proposal in by_image[image_id]]
            evaluation = coco_evaluation(truth, results)
            params = evaluation.params
            params.useCats, params.maxDets, params.imgIds = 0, PROPOSALS, image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            count = np.zeros((len(params.areaRng), 1))
            for image in filter(None, evaluation.evalImgs):
                count[params.areaRng.index(image["aRng"])] += (~np.array(image["gtIgnore"], bool)).sum()
            found = found + evaluation.eval["recall"][:, 0].clip(0) * count
            objects = objects + count
    # area, number of proposals; -1 without objects
    recall = np.where(objects > 0, found.mean(axis=0) / np.maximum(objects, 1), -1)
    values = {f"AR{count}": recall[0, i] for i, count in enumerate(PROPOSALS)}
    values |= {f"AR{size}{PROPOSALS[-1]}": recall[i, -1] for i, size in enumerate("sml", start=1)}
    values = {name: float(value) if value > -1 else None for name, value in values.items()}
    print0("proposals: " + "  ".join(f"{name} {shown(value)}" for name, value in values.items()))
    return values

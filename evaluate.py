"""Score a checkpoint, re-score a detections file, or draw detections for a folder of images.

    python evaluate.py --ckpt runs/fcos/last.pth                  the split the run was trained against
    python evaluate.py --ckpt C.pth --data coco --split val2017   another dataset or split
    torchrun --nproc_per_node 8 evaluate.py --ckpt C.pth          every image once, whatever the rank count
    python evaluate.py --detections runs/fcos/detections.json --data coco --split val2017
    python evaluate.py --ckpt C.pth --images photos/              no annotations: drawings and detections.json
    python evaluate.py --aggregate runs/novel_*                   few-shot table over seeds and shots

Written to --out (by default the checkpoint's folder, for --images its subfolder images): detections.json
(COCO result format), metrics.json, pictures/.
"""
import os

# torch_npu is imported for --device npu, and only then.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import colorsys
import contextlib
import importlib.util
import io
import json
import math
import re
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader

from backbone import WeightsError
from checkpoint import load_model, memory_format, whole_file
from data import (
    DataError,
    DetectionDataset,
    TestSamples,
    check_pad_to,
    collate,
    death_of_a_loader,
    open_dataset,
    read_image,
    resized_shape,
)
from fewshot import (
    Calibration,
    aggregate,
    aggregate_table,
    few_shot_scores,
    keep_classes,
    lists_folder,
    shot_view,
)
from ops import nms

# COCO's 12 lines
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
# Rank 0 scores while the others wait in a collective, so the limit is far above torch's 10 minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


# ------------------------------------------------------------------------------------------- device and ranks

def setup_device(name: str, amp: str = "off") -> tuple[torch.device, int, int]:
    """Device, rank and number of ranks; under torchrun the process group is started.

    name: auto (cuda if there is one, else cpu), cuda, npu or cpu. amp: a key of AMP, for that device. Raises
    SystemExit with one line.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if amp == "fp16" and name == "cpu":
        raise SystemExit("error: --amp fp16 needs a GPU or NPU; on a CPU use --amp bf16")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no CUDA GPU "
                         "(use --device cpu, or check the driver)")
    if name == "npu":
        _import_npu()
    local_rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if name != "cpu":
        module = torch.get_device_module(name)
        if local_rank >= module.device_count():
            raise SystemExit(f"error: {os.environ.get('LOCAL_WORLD_SIZE', world)} ranks on this machine, but "
                             f"{module.device_count()} {name} devices")
        device = torch.device(name, local_rank)
        module.set_device(device)
    if world > 1:
        dist.init_process_group(BACKENDS[name], timeout=COLLECTIVE_TIMEOUT)
    return device, int(os.environ.get("RANK", 0)), world


def _import_npu():
    found = importlib.util.find_spec("torch_npu")
    if found is None or not found.origin:  # without origin: a folder of that name
        raise SystemExit("error: --device npu: torch_npu is not installed (see 'Ascend' in README.md)")
    # The pair of a CUDA build and torch_npu does not raise, it aborts the process. A stand-in for
    # tests may pass.
    if torch.version.cuda and "STAND_IN = True" not in Path(found.origin).read_text(encoding="utf-8"):
        raise SystemExit("error: --device npu needs the CPU build of torch, this is a CUDA build "
                         "(see 'Ascend' in README.md)")
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # without CANN an ImportError; of another torch release, anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SystemExit(f"error: --device npu: torch_npu cannot be imported ({reason}); it needs CANN and "
                         f"the torch_npu release that matches torch {torch.__version__}") from None
    if torch.npu.device_count() == 0:
        raise SystemExit("error: --device npu, but torch_npu sees no NPU (npu-smi info lists those of this "
                         "machine)")
    torch.npu.set_compile_mode(jit_compile=False)  # else every new image size compiles every operator
    torch.npu.config.allow_internal_format = False  # else convolutions convert their tensors to and fro


def make_folder(path: Path):
    """Make an output folder before any work is done for it. Raises DataError if that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        raise DataError(f"--out {path}: cannot be used as a folder ({error})") from error


def autocast(device: torch.device, amp: torch.dtype | None):
    """Mixed precision in that type; None: none."""
    return torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)


def synchronize(device: torch.device):
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


# ---------------------------------------------------------------------------------------------- detections

class EqualShapes:
    """Batches of images that have one size after resizing: no padding, so results do not depend on the batch.

    Rank r of `world` takes every world-th batch; a batch is a list of indices.
    """

    def __init__(self, dataset: DetectionDataset, min_size: int, max_size: int, batch_size: int, rank: int,
                 world: int):
        shapes = [resized_shape(height, width, min_size, max_size)
                  for height, width in dataset.sizes.tolist()]
        order = sorted(range(len(dataset)), key=lambda i: shapes[i])
        batches = []
        for i in order:
            if not batches or len(batches[-1]) == batch_size or shapes[batches[-1][0]] != shapes[i]:
                batches.append([])
            batches[-1].append(i)
        self.batches = batches[rank::world]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@torch.inference_mode()
def detect(model: torch.nn.Module, dataset: DetectionDataset, device: torch.device, min_size: int,
           max_size: int, batch_size: int = 1, workers: int = 2, amp: torch.dtype | None = None,
           rank: int = 0, world: int = 1,
           pad_to: tuple[int, int] | None = None) -> tuple[list[dict], dict[str, float]]:
    """Detections of every image, in COCO result format
    (category ids of `dataset`, pixels of the original images).

    Every rank gets the results of all ranks. Also returns ms per image spent waiting for images ("loading"),
    in the network and in post-processing (decoding and NMS). The mode of the model is restored.
    """
    was_training = model.training
    model.eval()
    batches = EqualShapes(dataset, min_size, max_size, batch_size, rank, world)
    make_batch = partial(collate, divisor=model.divisor, shapes=[pad_to] if pad_to else None)
    loader = DataLoader(TestSamples(dataset, min_size, max_size), batch_sampler=batches, num_workers=workers,
                        collate_fn=make_batch, pin_memory=device.type != "cpu")
    results, seen, seconds = [], [], dict.fromkeys(("loading", "network", "post-processing"), 0.0)
    nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)  # imports its kernels untimed
    clock = time.perf_counter()

    def lap(phase: str):
        nonlocal clock
        synchronize(device)
        now = time.perf_counter()
        seconds[phase] += now - clock
        clock = now

    for batch in loader:
        lap("loading")
        images = batch["images"].to(device, non_blocking=True)
        images = images.contiguous(memory_format=memory_format(device))
        sizes = batch["sizes"].to(device, non_blocking=True)
        with autocast(device, amp):
            outputs = model.network(images, sizes)
        lap("network")
        detections = model.detections(outputs, sizes)
        results += _coco_results(dataset, batch, detections)
        seen += batch["indices"]
        lap("post-processing")
    model.train(was_training)
    milliseconds = {phase: 1000 * value / max(1, len(seen)) for phase, value in seconds.items()}
    if world > 1:
        parts = [None] * world
        dist.all_gather_object(parts, (seen, results))
        seen, results = sum((part[0] for part in parts), []), sum((part[1] for part in parts), [])
    assert sorted(seen) == list(range(len(dataset))), "every image must be scored exactly once"
    order = {image_id: position for position, image_id in enumerate(dataset.image_ids.tolist())}
    # The file does not depend on ranks or batches.
    results.sort(key=lambda r: (order[r["image_id"]], -r["score"]))
    return results, milliseconds


def _coco_results(dataset: DetectionDataset, batch: dict, detections: list[dict]) -> list[dict]:
    results = []
    for i, found in enumerate(detections):
        # width, height, width, height
        scale = (batch["original_sizes"][i] / batch["sizes"][i]).flip(0).repeat(2)
        boxes = found["boxes"].float().cpu() * scale
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist()):
            results.append({"image_id": batch["image_ids"][i], "category_id": dataset.category_ids[label],
                            "bbox": [round(v, 3) for v in box], "score": round(score, 6)})
    return results


# ---------------------------------------------------------------------------------------------- scores

def score(dataset: DetectionDataset, results: list[dict]) -> dict:
    """AP of detections in COCO result format; prints the table.

    Raises DataError for ids the dataset does not have. Returns {"AP", "AP50", ...: the 12 COCO numbers in
    0..1 (None where no object is of that kind), "per_class": {name: AP}}; for VOC data also "AP50_VOC07"
    (11-point) and "AP50_VOC" (all-point).
    """
    _check_results(dataset, results)
    if not results:
        print("warning: there is not a single detection")
    metrics = _coco_scores(dataset, results)
    columns = {"AP": metrics["per_class"]}
    if dataset.voc:
        for key, eleven_point in (("AP50_VOC07", True), ("AP50_VOC", False)):
            columns[key] = metrics[f"per_class_{key}"] = voc_ap50(dataset, results, eleven_point)
            known = [v for v in columns[key].values() if v is not None]
            metrics[key] = float(np.mean(known)) if known else None
    width = max(map(len, dataset.names))
    print(f"{'class':{width}}  " + "  ".join(f"{key:>10}" for key in columns))
    for name in dataset.names:
        print(f"{name:{width}}  " + "  ".join(f"{_shown(column[name]):>10}" for column in columns.values()))
    if dataset.voc:
        print(f"AP50 (VOC07 11-point) {_shown(metrics['AP50_VOC07'])}   "
              f"AP50 (VOC10+ all-point) {_shown(metrics['AP50_VOC'])}   difficult objects ignored")
    print("  ".join(f"{key} {_shown(metrics[key])}" for key in METRICS[:6]))
    return metrics


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _check_results(dataset: DetectionDataset, results: list[dict]):
    images, categories = set(dataset.image_ids.tolist()), set(dataset.category_ids)
    for i, result in enumerate(results):
        missing = {"image_id", "category_id", "bbox", "score"} - set(result)
        if missing:
            raise DataError(f"detection {i} lacks {', '.join(sorted(missing))}")
        for key, known in (("image_id", images), ("category_id", categories)):
            if not isinstance(result[key], (int, str)) or result[key] not in known:
                raise DataError(f"detection {i}: {key} {result[key]!r} is not in the dataset")
        box = result["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(map(_is_finite, box)) and min(box[2:]) >= 0):
            raise DataError(f"detection {i}: bbox {box!r} is not [x, y, width, height]")
        if not _is_finite(result["score"]):
            raise DataError(f"detection {i}: score {result['score']!r} is not a number")


def _is_finite(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _coco_scores(dataset: DetectionDataset, results: list[dict]) -> dict:
    truth, image_ids = COCO(), dataset.image_ids.tolist()
    image_of_box = np.repeat(np.arange(len(dataset)), np.diff(dataset.first))
    xywh = np.concatenate((dataset.boxes[:, :2], dataset.boxes[:, 2:] - dataset.boxes[:, :2]),
                          axis=1).tolist()
    truth.dataset = {
        "images": [{"id": i, "height": h, "width": w}
                   for i, (h, w) in zip(image_ids, dataset.sizes.tolist())],
        "categories": [{"id": c, "name": n} for c, n in zip(dataset.category_ids, dataset.names)],
        # Ids from 1: pycocotools takes id 0 for "not matched". VOC's difficult objects are
        # ignored like crowds.
        "annotations": [{"id": i + 1, "image_id": image_ids[image_of_box[i]], "bbox": xywh[i],
                         "category_id": dataset.category_ids[dataset.classes[i]],
                         "area": float(dataset.areas[i]),
                         "iscrowd": int(dataset.crowd[i] or dataset.difficult[i])} for i in range(len(xywh))]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        found = truth.loadRes([dict(r) for r in results]) if results else COCO()  # it refuses an empty list
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, class; all areas, 100 detections
    precision = np.moveaxis(precision, 2, 0)
    # pycocotools orders classes by category id and writes -1 where there is nothing to find.
    rank_of = {category: i for i, category in enumerate(sorted(dataset.category_ids))}
    metrics = {key: float(v) if v > -1 else None for key, v in zip(METRICS, evaluation.stats)}
    for key, ious in (("per_class", slice(None)), ("per_class_AP50", 0), ("per_class_AP75", 5)):
        parts = [precision[rank_of[category], ious] for category in dataset.category_ids]
        metrics[key] = {name: float(p[p > -1].mean()) if (p > -1).any() else None
                        for name, p in zip(dataset.names, parts)}
    return metrics


def voc_ap50(dataset: DetectionDataset, results: list[dict], eleven_point: bool) -> dict[str, float | None]:
    """Pascal VOC's AP at IoU > 0.5 of every class; None for a class without objects.

    eleven_point: the mean of the best precision at recall >= 0, 0.1, ..., 1 (VOC07) instead of the area under
    the precision envelope (VOC10 and later). Detections go by score; each takes the object it overlaps most.
    A second hit of an object is a false positive, a hit of a difficult one counts as nothing. With far-edge
    boxes the IoU is the devkit's, which counts pixels.
    """
    position = {image_id: i for i, image_id in enumerate(dataset.image_ids.tolist())}
    by_category = {category: [] for category in dataset.category_ids}
    for result in results:
        by_category[result["category_id"]].append(result)
    average = {}
    for label, name in enumerate(dataset.names):
        found = sorted(by_category[dataset.category_ids[label]], key=lambda r: -r["score"])
        mine = dataset.classes == label
        total = int((mine & ~dataset.difficult).sum())
        taken, hits = set(), []  # hits: 1 true positive, 0 false positive
        for result in found:
            i = position[result["image_id"]]
            rows = np.arange(dataset.first[i], dataset.first[i + 1])
            rows = rows[mine[rows]]
            x, y, w, h = result["bbox"]
            overlap = _iou(np.array([x, y, x + w, y + h]), dataset.boxes[rows])
            best = int(overlap.argmax()) if len(rows) else -1
            if best < 0 or overlap[best] <= 0.5:
                hits.append(0)
            elif not dataset.difficult[rows[best]]:
                hits.append(int(rows[best] not in taken))
                taken.add(rows[best])
        true = np.cumsum(hits)
        recall, precision = true / max(1, total), true / np.arange(1, len(hits) + 1)
        average[name] = _area_under(recall, precision, eleven_point) if total else None
    return average


def _iou(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    side = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0)
    inter = side.prod(axis=1)
    return inter / np.maximum((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - inter,
                              1e-12)


def _area_under(recall: np.ndarray, precision: np.ndarray, eleven_point: bool) -> float:
    if eleven_point:
        return float(np.mean([precision[recall >= t].max(initial=0) for t in np.arange(0, 1.1, 0.1)]))
    recall, precision = np.concatenate(([0], recall, [1])), np.concatenate(([0], precision, [0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(((recall[1:] - recall[:-1]) * envelope[1:]).sum())


# ---------------------------------------------------------------------------------------------- drawings

def draw(dataset: DetectionDataset, results: list[dict], folder: Path, count: int, threshold: float = 0.2):
    """Pictures of the first `count` images: objects thin and white, detections with a score of at least
    `threshold` in the colour of their class, with name and score."""
    folder.mkdir(parents=True, exist_ok=True)
    label_of = {category: label for label, category in enumerate(dataset.category_ids)}
    by_image = {}
    for result in results:
        if result["score"] >= threshold:
            by_image.setdefault(result["image_id"], []).append(result)
    for i in range(min(count, len(dataset))):
        image, zoom = enlarge(dataset.image(i))
        canvas = ImageDraw.Draw(image)
        for box in (dataset.boxes[dataset.first[i]:dataset.first[i + 1]] * zoom).tolist():
            canvas.rectangle(box, outline="black", width=3)
            canvas.rectangle(box, outline="white", width=1)
        image_id = dataset.image_ids[i].item()
        # The best last, on top: of two classes on one object the better one is read.
        for result in sorted(by_image.get(image_id, []), key=lambda r: r["score"]):
            label = label_of[result["category_id"]]
            x, y, w, h = (v * zoom for v in result["bbox"])
            draw_box(canvas, (x, y, x + w, y + h), class_colour(label),
                     f"{dataset.names[label]} {result['score']:.2f}")
        image.save(folder / f"{file_name(image_id)}{'.png' if zoom > 1 else '.jpg'}")


def file_name(image_id: int | str) -> str:
    """An image id as part of a file name: ids may hold folders."""
    return re.sub(r"[^\w.-]", "_", str(image_id))


def enlarge(image: Image.Image) -> tuple[Image.Image, int]:
    """A small picture blown up so that text on it can be read, and the factor."""
    zoom = max(1, 512 // max(image.size))
    return image.resize((image.width * zoom, image.height * zoom)), zoom


def class_colour(label: int) -> tuple[int, int, int]:
    """A bright colour; neighbouring labels lie far apart on the colour wheel (golden angle)."""
    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(label * 0.381966 % 1, 0.9, 1))


def draw_box(canvas: ImageDraw.ImageDraw, box, colour, text: str):
    """A rectangle (x1, y1, x2, y2) with a text on a ground of its colour at the upper left corner."""
    x, y = box[0], box[1]
    canvas.rectangle(tuple(box), outline=colour, width=2)
    if text:
        place = (x + 2, y - 11 if y > 11 else y + 1)
        canvas.rectangle(canvas.textbbox(place, text), fill=colour)
        canvas.text(place, text, fill="black")


# ---------------------------------------------------------------------------------------------- script

def evaluate(model, dataset, device, out: Path, min_size: int, max_size: int, batch_size: int = 1,
             workers: int = 2, amp: torch.dtype | None = None, rank: int = 0, world: int = 1, pad_to=None,
             pictures: int = 8, few_shot: dict | None = None, calibration: Calibration | None = None) -> dict:
    """Detect, score, write detections.json, metrics.json and pictures/ under `out`. All ranks call it; the
    metrics are returned on rank 0, {} elsewhere.

    few_shot: what describes the run, with "novel", the names of the novel classes: their scores are added.
    calibration: scores the detections before and after.
    """
    results, timing = detect(model, dataset, device, min_size, max_size, batch_size, workers, amp, rank,
                             world, pad_to)
    plain = results
    if calibration:
        results = calibration(dataset, plain, rank, world)
    if rank > 0:
        return {}
    write_json(out / "detections.json", results)
    metrics = score(dataset, plain)
    if calibration:
        print("after the prototypical calibration:")
        metrics = {**score(dataset, results), "before_calibration": metrics}
    if few_shot:
        for part in filter(None, (metrics.get("before_calibration"), metrics)):
            scores = few_shot_scores(part, few_shot["novel"])
            calibrated = part is metrics and calibration is not None
            part["few_shot"] = {**few_shot, "calibrated": calibrated, **scores}
            print("before calibration: " * (part is not metrics)
                  + "  ".join(f"{key} {_shown(value)}" for key, value in scores.items()))
    metrics["ms_per_image"] = {phase: round(value, 3) for phase, value in timing.items()}
    print("ms per image: " + ", ".join(f"{phase} {value:.1f}" for phase, value in timing.items()))
    write_json(out / "metrics.json", metrics)
    draw(dataset, results, out / "pictures", pictures)
    return metrics


def describe_few_shot(args: dict) -> dict:
    """What metrics.json says of a few-shot run; args: train.py's."""
    return {"novel": args["novel_classes"],
            "decouple": [args["rpn_grad_scale"], args["roi_grad_scale"]] if args["decouple"] else None,
            **{key: args[key] for key in ("stage", "data", "model", "backbone", "cosine", "shots", "seed",
                                          "shot_seed", "generalized")}}


def make_calibration(args: dict, weights: str, names: list[str], device,
                     source: DetectionDataset | None = None) -> Calibration | None:
    """The prototypical calibration of a run of the novel stage, from its shots; None in the base stage, for
    Faster R-CNN, and where weights is "none".

    args: train.py's. source: its training split with all classes, opened again if None. Raises WeightsError.
    """
    if args["stage"] != "novel" or args["model"] != "defrcn" or weights == "none":
        return None
    if source is None:
        source = open_dataset(args["data"], args["train_split"], args["train_json"], args["train_images"])
    support = shot_view(source, names, args["shots"], args["shot_seed"], lists_folder(args, source.voc), None)
    return Calibration(weights, support, args["novel_classes"], device)


def read_metrics(folder: Path) -> dict:
    """metrics.json of a run. Raises DataError naming the file."""
    try:
        return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / 'metrics.json'}: cannot be read ({error})") from error


def write_json(path: Path, content):
    """See `whole_file`."""
    with whole_file(path) as file:
        file.write(json.dumps(content).encode())


def read_results(path: Path) -> list[dict]:
    """detections.json of any detector in COCO result format. Raises DataError naming the file."""
    try:
        results = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as detections ({error})") from error
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise DataError(f"{path}: not COCO result format, a list of {{image_id, category_id, bbox, score}}")
    return results


def image_folder(path: Path, names: list[str], category_ids: list[int]) -> DetectionDataset:
    """Pictures without annotations (a folder, or one file) as a dataset; image ids are the file names."""
    paths = sorted(p for p in ([path] if path.is_file() else path.glob("*"))
                   if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{path}: no pictures ({', '.join(sorted(IMAGE_SUFFIXES))})")
    sizes = [read_image(str(p)).size[::-1] for p in paths]
    none = np.zeros(0)
    return DetectionDataset(names, category_ids, [p.name for p in paths], [str(p) for p in paths], sizes,
                            np.zeros((0, 4)), none, none, none, none, none.astype(np.int64))


class Parser(argparse.ArgumentParser):
    """All ranks have the same arguments: one of them complains."""

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)):
            raise SystemExit(2)
        self.exit(2, f"error: {message} ({self.prog} --help lists the arguments)\n")


def run_script(main):
    """Call main(); a user's mistake ends in one line instead of a traceback. Of the ranks of a run that fail
    the first says why: the others fail with it, or only because it is gone."""
    try:
        main()
        if dist.is_initialized():  # after a failure it could wait for ranks that will not come
            dist.destroy_process_group()
        return
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        reason = stop.code
    except KeyboardInterrupt:
        reason = "interrupted"
    except torch.OutOfMemoryError as error:
        reason = (f"error: out of memory: {str(error).splitlines()[0]} Try smaller parts: --micro-batch in "
                  f"training, --batch-size in evaluation")
    except (DataError, WeightsError) as error:
        # An error in a loader's worker arrives with that worker's traceback around its message.
        reason = f"error: {str(error).rsplit('DataError: ', 1)[-1].strip()}"
    except Exception as error:
        known = death_of_a_loader(error) or (isinstance(error, OSError) and error)
        if not known and _fails_first():
            raise
        reason = f"error: {known}" if known else 1
    raise SystemExit(reason if reason == 1 or _fails_first() else 1)


def _fails_first() -> bool:
    """Whether this rank is the first of its run to fail, counted in the store in which the ranks met."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=10))
        return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError, KeyError):  # rank 0 kept the store, and is gone
        return int(os.environ["RANK"]) == 0


def class_order(ckpt: str, info: dict, dataset: DetectionDataset) -> list[str]:
    """The classes of another code base's checkpoint in its own order: those of the data, where it does not
    name them and has as many. Raises DataError where it has not."""
    if info["named"]:
        return info["names"]
    if len(dataset.names) != len(info["names"]):
        raise DataError(f"{ckpt} has {len(info['names'])} classes, which it does not name, the data have "
                        f"{len(dataset.names)}: say which they are, in its order, with --classes")
    return dataset.names


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", help="checkpoint of train.py or of another code base (see README)")
    parser.add_argument("--original", action="store_true",
                        help="--ckpt is an FCOS of its authors' first repository, in its first form")
    parser.add_argument("--classes", metavar="NAME,NAME", type=lambda text: text.split(","),
                        help="the classes of a --ckpt that does not name them, in its order")
    parser.add_argument("--detections", type=Path, help="score this COCO result file, without a network")
    parser.add_argument("--images", type=Path, help="a folder of pictures, or one: draw, do not score")
    parser.add_argument("--aggregate", type=Path, nargs="+", metavar="RUN",
                        help="mean and 95 %% interval of few-shot runs, from their metrics.json")
    data = parser.add_argument_group("data (default: what the checkpoint was trained against)")
    data.add_argument("--data", help="'shapes' or a folder in COCO or VOC layout")
    data.add_argument("--split", help="e.g. val2017, 2007_test")
    data.add_argument("--json", help="COCO-format file, with --image-dir")
    data.add_argument("--image-dir", help="folder of its images")
    data.add_argument("--min-size", type=int, help="short side in px")
    data.add_argument("--max-size", type=int, help="limit of the long side in px")
    data.add_argument("--pad-to", type=int, nargs=2, metavar=("H", "W"), help="one fixed network input size")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", choices=("auto", "cuda", "npu", "cpu"))
    run.add_argument("--amp", default="off", choices=AMP)
    run.add_argument("--batch-size", type=int, default=1,
                     help="images per device; only equal sizes share a batch")
    run.add_argument("--workers", type=int, default=2)
    run.add_argument("--pcb-weights", help="DeFRCN's calibration (default: the checkpoint's; see train.py)")
    run.add_argument("--score-threshold", type=float, help="drop class scores below (default: the model's)")
    run.add_argument("--out", type=Path, help="default: the folder of the checkpoint or detections")
    run.add_argument("--pictures", type=int, default=8, help="draw the first N images")
    args = parser.parse_args()
    if (sum(map(bool, (args.ckpt, args.detections, args.aggregate))) != 1
            or args.detections and not (args.data or args.json)):
        parser.error("give --ckpt, or --detections together with --data, or --aggregate")
    for name in ("min_size", "max_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.score_threshold is not None and not 0 <= args.score_threshold < 1:
        parser.error(f"--score-threshold must be in 0..1, not {args.score_threshold}")
    if args.batch_size < 1 or args.workers < 0 or args.pictures < 0:
        parser.error("--batch-size must be at least 1, --workers and --pictures at least 0")
    return args


def main():
    args = parse_args()
    if args.aggregate:
        rows = aggregate([read_metrics(folder) for folder in args.aggregate])
        print(aggregate_table(rows))
        if args.out:
            make_folder(args.out)
            write_json(args.out / "aggregate.json", rows)
        return
    if args.detections:
        out = args.out or args.detections.parent
        make_folder(out)
        split = args.split or ("val" if args.data == "shapes" else "val2017")
        dataset = open_dataset(args.data or "", split, args.json, args.image_dir)
        results = read_results(args.detections)
        metrics = score(dataset, results)
        write_json(out / "metrics.json", metrics)
        draw(dataset, results, out / "pictures", args.pictures)
        return
    device, rank, world = setup_device(args.device, args.amp)
    model, info = load_model(args.ckpt, device, args.original, args.classes)
    trained = info["args"]
    for note in info["notes"] if rank == 0 else ():
        print(note)
    if args.score_threshold is not None:
        model.score_threshold = args.score_threshold
    # Without annotations there is nothing to compare: the run's own detections stay where they are.
    out = args.out or Path(args.ckpt).parent / ("images" if args.images else "")
    make_folder(out)
    if args.images:
        dataset = image_folder(args.images, info["names"], info["category_ids"])
    elif args.data or args.json:
        known = None if trained["stage"] or trained["data"] is None else info["names"]
        split = ("val" if args.data == "shapes" else
                 "val2017" if trained["data"] in (None, "shapes") else trained["val_split"])
        dataset = open_dataset(args.data or "", args.split or split, args.json, args.image_dir, known)
        if trained["data"] is None:
            dataset = keep_classes(dataset, class_order(args.ckpt, info, dataset), drop_empty=False)
    elif trained["data"] is None:
        raise DataError(f"{args.ckpt}: not trained here: say what to score it on with --data (and --split)")
    elif trained["train_json"] and not trained["val_json"] or args.split and trained["val_json"]:
        raise DataError(f"{args.ckpt}: was trained on a file of its own: say what to score with --json and "
                        f"--image-dir (or --data and --split)")
    else:
        dataset = open_dataset(trained["data"], args.split or trained["val_split"], trained["val_json"],
                               trained["val_images"], None if trained["stage"] else info["names"])
    few_shot = calibration = None
    if trained["stage"] and not args.images:
        dataset = keep_classes(dataset, info["names"], drop_empty=False)
        few_shot = describe_few_shot(trained)
        few_shot["data"] = args.data or args.json or few_shot["data"]
        try:
            calibration = make_calibration(trained, args.pcb_weights or trained["pcb_weights"], info["names"],
                                           device)
        except WeightsError as error:
            if args.pcb_weights:
                raise
            if rank == 0:
                print(f"no prototypical calibration, the scores stay plain (--pcb-weights FILE): {error}")
    pad_to = args.pad_to or trained["pad_to"]
    min_size, max_size = args.min_size or max(trained["min_size"]), args.max_size or trained["max_size"]
    amp = AMP[args.amp]
    if pad_to:
        check_pad_to(dataset, [min_size], max_size, pad_to)
    if rank == 0:
        print(f"{args.ckpt}: step {info['step']}, {len(info['names'])} classes; {len(dataset)} images, "
              f"short side {min_size}, long side at most {max_size} px")
    if args.images:
        results, _ = detect(model, dataset, device, min_size, max_size, args.batch_size, args.workers, amp,
                            rank, world, pad_to)
        if rank == 0:
            write_json(out / "detections.json", results)
            draw(dataset, results, out / "pictures", len(dataset))
            print(f"{len(results)} detections in {out / 'detections.json'}, drawings in {out / 'pictures'}")
        return
    for note in dataset.notes if rank == 0 else ():
        print(note)
    evaluate(model, dataset, device, out, min_size, max_size, args.batch_size, args.workers, amp, rank, world,
             pad_to, args.pictures, few_shot, calibration)


if __name__ == "__main__":
    run_script(main)

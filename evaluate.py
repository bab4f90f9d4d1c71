"""Score a checkpoint, score a detections file, or draw detections for a folder of images.

    python evaluate.py --ckpt runs/fcos/last.pth                  the split that the run was scored on
    python evaluate.py --ckpt C.pth --data coco --split val2017   another dataset or split
    torchrun --nproc_per_node 8 evaluate.py --ckpt C.pth          on 8 devices, each image once
    python evaluate.py --detections runs/fcos/detections.json --data coco --split val2017
    python evaluate.py --onnx fcos.onnx --ckpt C.pth              an exported file, beside its checkpoint
    python evaluate.py --ckpt C.pth --images photos/              no annotations: drawings and detections.json

It writes detections.json (COCO result format), metrics.json and pictures/ to --out. By default this is the
folder of the checkpoint, or its subfolder images for --images.
"""
from runtime import (  # before torch: see the first lines of runtime.py
    AMP,
    Parser,
    Place,
    UserError,
    autocast,
    device_name,
    gather_objects,
    make_folder,
    memory_format,
    print0,
    run_main,
    setup_device,
    synchronize,
    write_json,
)

# isort: split
import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from analysis import image_errors, precision_recall, proposal_recall
from checkpoint import load_model
from data import (
    MAX_WORKERS,
    VOC_NOVEL,
    DataError,
    DetectionDataset,
    SameSizeBatchSampler,
    TestSamples,
    check_pad_to,
    collate,
    death_of_a_loader,
    ignore_signals,
    load_sample,
    resize,
    resized_shape,
    sample_without_objects,
    upright_rgb,
)
from draw import DRAW_THRESHOLD, draw_detections, draw_errors, draw_precision_recall
from faster_rcnn import FasterRCNN
from fewshot import calibrated_stage, checkpoint_scoring
from layouts import default_splits, image_folder, layout
from metrics import ClassGroups, group_means, read_results, score, shown
from onnx_model import load_onnx
from ops import nms
from runlog import Progress
from shapes import open_dataset
from subsets import select_classes


class EvalSettings(NamedTuple):
    """How images are read, batched and drawn in an evaluation."""
    min_size: int  # short side, px
    max_size: int  # limit of the long side, px
    batch_size: int = 1  # images per device; only images of one size share a batch
    workers: int | None = None  # loader processes; None: none on a CPU, else 2
    amp: torch.dtype | None = None
    pad_to: tuple[int, int] | None = None  # one fixed network input size (height, width)
    pictures: int = 8  # how many images are drawn
    draw_threshold: float = DRAW_THRESHOLD
    curves: bool = False  # whether precision over recall is drawn
    worst: int = 0  # how many of the images with the lowest F1 are drawn


# ---------------------------------------------------------------------------------------------- detections

@torch.inference_mode()
def detect(model: torch.nn.Module, dataset: DetectionDataset, place: Place, settings: EvalSettings,
           decode: Callable | None = None) -> tuple[list[dict], dict[str, float]]:
    """Detections of every image, in COCO result format with unrounded numbers, see `as_in_file`.

    decode: function from the outputs of the network and sizes to detections, by default the model's.
    Boxes are in pixels of the original images, category ids are those of `dataset`. Images are split over the
    ranks; every rank returns all results. Also returns the ms per image spent waiting for images ("loading"),
    in the network, and in post-processing (decoding and NMS). The mode of the model is restored.
    """
    was_training = model.training
    model.eval()
    device = place.device
    sampler = SameSizeBatchSampler(dataset, settings.min_size, settings.max_size, settings.batch_size,
                                   place.rank, place.world)
    make_batch = partial(collate, size_divisor=model.size_divisor,
                         shapes=[settings.pad_to] if settings.pad_to else None)
    # On a CPU loader processes would take the cores from the network.
    workers = settings.workers
    if workers is None:
        workers = 0 if device.type == "cpu" else 2
    # A generator of its own: starting the loader must not change the random numbers of a training.
    loader = DataLoader(TestSamples(dataset, settings.min_size, settings.max_size), batch_sampler=sampler,
                        num_workers=workers, collate_fn=make_batch, pin_memory=device.type != "cpu",
                        worker_init_fn=ignore_signals, generator=torch.Generator())
    results, seen, seconds = [], [], dict.fromkeys(("loading", "network", "post-processing"), 0.0)
    nms(torch.zeros(0, 4, device=device), torch.zeros(0, device=device), 0.5)  # loads the kernels untimed
    clock = time.perf_counter()

    def lap(phase: str):
        nonlocal clock
        synchronize(device)
        now = time.perf_counter()
        seconds[phase] += now - clock
        clock = now

    progress = Progress("detecting in", len(dataset))
    for batch in loader:
        lap("loading")
        images = batch["images"].to(device, non_blocking=True)
        images = images.contiguous(memory_format=memory_format(device))
        sizes = batch["sizes"].to(device, non_blocking=True)
        with autocast(device, settings.amp):
            outputs = model.network(images, sizes)
        lap("network")
        results += _coco_results(dataset, batch, (decode or model.detections)(outputs, sizes))
        seen += batch["indices"]
        lap("post-processing")
        progress.add(len(batch["indices"]) * place.world)
    model.train(was_training)
    milliseconds = {phase: 1000 * value / max(1, len(seen)) for phase, value in seconds.items()}
    parts = gather_objects((seen, results), place.world)
    seen, results = (sum(lists, []) for lists in zip(*parts))
    assert sorted(seen) == list(range(len(dataset))), "every image must be scored exactly once"
    return results, milliseconds


def _coco_results(dataset: DetectionDataset, batch: dict, detections: list[dict]) -> list[dict]:
    """Detections of one batch in COCO result format, pixels of the original images."""
    results = []
    for i, found in enumerate(detections):
        # (height, width) ratios -> width, height, width, height
        scale = (batch["original_sizes"][i] / batch["sizes"][i]).flip(0).repeat(2)
        boxes = found["boxes"].float().cpu() * scale
        boxes[:, 2:] -= boxes[:, :2]
        for box, box_score, label in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist()):
            results.append({"image_id": batch["image_ids"][i], "category_id": dataset.category_ids[label],
                            "bbox": box, "score": box_score})
    return results


def as_in_file(dataset: DetectionDataset, results: list[dict]) -> list[dict]:
    """Results as detections.json has them: 0.001 px, scores of six decimals, by image, best score first.

    The order depends on neither ranks nor batches.
    """
    index_of = dataset.index_of_image()
    rounded = [{**result, "bbox": [round(v, 3) for v in result["bbox"]], "score": round(result["score"], 6)}
               for result in results]
    return sorted(rounded, key=lambda r: (index_of[r["image_id"]], -r["score"]))


def evaluate(model: torch.nn.Module, dataset: DetectionDataset, place: Place, out: Path,
             settings: EvalSettings, groups: ClassGroups | None = None,
             calibrate: Callable[[DetectionDataset, list[dict]], list[dict]] | None = None) -> dict:
    """Detects, scores, and writes detections.json, metrics.json and pictures/ under `out`.

    groups: groups of classes; the mean APs of each are added to the metrics. calibrate: changes the results;
    they are scored before and after. Every rank must call this; rank 0 returns the metrics, the others {}.
    """
    found, milliseconds = detect(model, dataset, place, settings)
    calibrated = calibrate(dataset, found) if calibrate else found
    if place.rank > 0:
        return {}
    results = as_in_file(dataset, calibrated)
    write_json(out / "detections.json", results)
    if not dataset.annotated:
        print0(f"{len(results)} detections in {out / 'detections.json'}; there are no annotations to score")
        return {}
    if calibrate:
        before = _score_with_groups(dataset, as_in_file(dataset, found), groups, calibrated=False)
        print0("after the prototypical calibration:")
    metrics = _score_with_groups(dataset, results, groups, calibrated=bool(calibrate))
    if calibrate:
        metrics["before_calibration"] = before
    metrics["ms_per_image"] = {phase: round(value, 3) for phase, value in milliseconds.items()}
    print0("ms per image: " + ", ".join(f"{phase} {value:.1f}" for phase, value in milliseconds.items()))
    write_json(out / "metrics.json", metrics)
    draw_scores(dataset, results, out, settings.curves, settings.worst)
    draw_detections(dataset, results, out / "pictures", settings.pictures, settings.draw_threshold,
                    list(groups.members.values()) if groups else None)
    return metrics


def draw_scores(dataset: DetectionDataset, results: list[dict], out: Path, curves: bool, worst: int):
    """Draws precision over recall (curves_pr.png, .json) and the `worst` images with the lowest F1 (worst/).

    Prints the threshold with the best F1 of every class, which decides what counts as a detection there.
    """
    if not curves and not worst:
        return
    by_class = precision_recall(dataset, results)
    for name, curve in by_class.items():
        print0(f"{name}: " + ("never found" if curve["threshold"] is None else
                              f"best F1 {curve['f1']:.4f} at a score of {curve['threshold']:.4f}"))
    if worst:
        thresholds = {name: curve["threshold"] for name, curve in by_class.items()}
        draw_errors(dataset, image_errors(dataset, results, thresholds)[:worst], out / "worst")
        print0(f"the {min(worst, len(dataset))} images with the lowest F1 are in {out / 'worst'}")
    if curves:
        write_json(out / "curves_pr.json", by_class)
        draw_precision_recall(by_class, out / "curves_pr.png")


def _score_with_groups(dataset: DetectionDataset, results: list[dict], groups: ClassGroups | None,
                       calibrated: bool) -> dict:
    metrics = score(dataset, results)
    if groups:
        means = group_means(metrics, groups.members)
        metrics[groups.key] = {**groups.info, "calibrated": calibrated, **means}
        print0("  ".join(f"{name} {shown(value)}" for name, value in means.items()))
    return metrics


# ---------------------------------------------------------------------------------------------- script

def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="checkpoint of train.py or of another code base (see docs/weights.md)")
    parser.add_argument("--onnx", help="score this file of export.py, with --ckpt beside the checkpoint")
    parser.add_argument("--original", action="store_true",
                        help="--ckpt is the original form of FCOS, from its authors' first repository")
    parser.add_argument("--classes", metavar="NAME,NAME", type=lambda text: text.split(","),
                        help="class names for a --ckpt without names, in the order of its labels")
    parser.add_argument("--detections", type=Path, help="score this COCO result file, without a network")
    parser.add_argument("--images", nargs="+", metavar="PATH", help="images, folders with their subfolders, "
                                                                    "glob patterns: draw, do not score")
    data = parser.add_argument_group("data (default: what the checkpoint was scored on)")
    data.add_argument("--data", help="'shapes' or a folder in COCO, VOC, Roboflow or YOLO layout")
    data.add_argument("--split", help="default: that of the layout, such as val2017, 2007_test")
    data.add_argument("--json", help="COCO-format file, with --image-dir")
    data.add_argument("--image-dir", help="image folder of --json")
    data.add_argument("--min-size", type=int, help="short side in px")
    data.add_argument("--max-size", type=int, help="limit of the long side in px")
    data.add_argument("--pad-to", type=int, nargs=2, metavar=("H", "W"), help="one fixed network input size")
    run = parser.add_argument_group("run")
    run.add_argument("--device", type=device_name, default="auto", metavar="NAME",
                     help="auto, cuda, npu, cpu; one by its number: npu:3")
    run.add_argument("--amp", default="off", choices=AMP, help="precision of the network")
    run.add_argument("--batch-size", type=int, default=1,
                     help="images per device (default: 1); only images of one size share a batch")
    run.add_argument("--workers", type=int, help="loader processes per rank (default: 0 on a CPU, else 2)")
    run.add_argument("--score-threshold", type=float,
                     help="drop detections with a lower class score (default: the model's; here 0.05)")
    run.add_argument("--nms-threshold", type=float, help="IoU above which NMS drops the worse box of a class "
                                                         "(default: the model's, 0.5 or 0.6)")
    run.add_argument("--max-detections", type=int, help="the best N of each image (default: 100)")
    run.add_argument("--proposals", type=int, metavar="N",
                     help="proposals per image of a two-stage detector (default: the model's, 1000 or 100)")
    run.add_argument("--draw-threshold", type=float, default=DRAW_THRESHOLD,
                     help=f"draw detections with at least this score (default: {DRAW_THRESHOLD})")
    run.add_argument("--curves", action="store_true", help="draw precision over recall (curves_pr.png), print"
                                                           " the threshold with the best F1 of each class")
    run.add_argument("--worst", type=int, default=0, metavar="N",
                     help="draw the N images with the lowest F1: what was missed, doubled or mistaken")
    run.add_argument("--proposals-recall", action="store_true",
                     help="score the proposals of a two-stage detector, not its detections")
    run.add_argument("--out", type=Path, help="default: the folder of the checkpoint or detections file")
    run.add_argument("--pictures", type=int, default=8, help="draw the first N images (default: 8)")
    _add_few_shot_arguments(parser)
    args = parser.parse_args()
    has_data = args.data or args.json
    if bool(args.ckpt or args.onnx) == bool(args.detections) or args.detections and not has_data:
        parser.error("give --ckpt, or --detections together with --data, or --onnx")
    for name in ("pad_to", "score_threshold", "nms_threshold", "max_detections"):
        if args.onnx and getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} does not go with --onnx: the file decides it")
    for name in ("min_size", "max_size", "max_detections", "proposals", "shots"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("score_threshold", "nms_threshold", "draw_threshold"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must be in 0..1, not {getattr(args, name)}")
    if args.shots and not has_data:
        parser.error("--shots needs --data: it is for a checkpoint of another code base")
    if args.proposals_recall and (args.images or args.detections):
        parser.error("--proposals-recall needs --ckpt and annotated data")
    if args.batch_size < 1 or min(args.workers or 0, args.pictures, args.worst) < 0:
        parser.error("--batch-size must be at least 1, --workers, --pictures and --worst at least 0")
    if (args.workers or 0) > MAX_WORKERS:
        parser.error(f"--workers must be at most {MAX_WORKERS}, not {args.workers}")
    return args


def _add_few_shot_arguments(parser: Parser):
    few = parser.add_argument_group("few-shot (a checkpoint of train.py knows all but the first)")
    few.add_argument("--pcb-weights", help="ImageNet ResNet-101 of DeFRCN's calibration: a file, resnet101 "
                                           "for torchvision's, or none (default: the checkpoint's)")
    few.add_argument("--voc-split", type=int, choices=tuple(VOC_NOVEL), help="VOC's classes of --ckpt")
    few.add_argument("--shots", type=int, metavar="K", help="calibrate with the list of K shots per class")
    few.add_argument("--shot-seed", type=int, default=0, help="number of that list (default: 0)")
    few.add_argument("--train-split", help="split that holds the shots (default: that of the layout)")
    few.add_argument("--train-json", help="COCO-format file that holds them, with --train-images")
    few.add_argument("--train-images", help="image folder of --train-json")


def choose_dataset(args: argparse.Namespace, info: dict) -> DetectionDataset:
    """The dataset that the arguments name, else the one that the checkpoint was scored on.

    info: from `load_model`. The classes of the dataset are those of the checkpoint, in its order. Raises
    DataError.
    """
    trained, names, source = info["args"], info["names"], args.onnx or args.ckpt
    if args.images:
        return image_folder(args.images, names, info["category_ids"], Progress)
    foreign, few_shot = trained["data"] is None, bool(trained["stage"])
    if args.data or args.json:
        split = args.split
        if not split and not args.json:
            split = default_splits(args.data)[1]
            if layout(args.data) in ("coco", "voc") and trained["data"] not in (None, "shapes"):
                split = trained["val_split"]
        dataset = open_dataset(args.data or "", split, args.json, args.image_dir,
                               None if few_shot or foreign else names)
    elif foreign:
        raise DataError(f"{source}: was not trained here. Name the data with --data and --split")
    elif trained["train_json"] and not trained["val_json"] or args.split and trained["val_json"]:
        raise DataError(f"{source}: was trained on a file of its own. Name the data with --json and "
                        f"--image-dir, or with --data and --split")
    else:
        dataset = open_dataset(trained["data"], args.split or trained["val_split"], trained["val_json"],
                               trained["val_images"], None if few_shot else names)
    if foreign and not info["named"]:
        names = _class_names_of_data(source, names, dataset)
    return select_classes(dataset, names, drop_empty=False) if foreign or few_shot else dataset


def _class_names_of_data(ckpt: str, names: list[str], dataset: DetectionDataset) -> list[str]:
    """The classes of the data, for a checkpoint that has as many and does not name them."""
    if len(dataset.names) != len(names):
        raise DataError(f"{ckpt} has {len(names)} classes and does not name them; the data have "
                        f"{len(dataset.names)}. Name the classes of the checkpoint, in its order, with "
                        f"--classes")
    return dataset.names


@torch.inference_mode()
def detect_image(model: torch.nn.Module, info: dict, image: str | Path | Image.Image) -> list[dict]:
    """Detections in one image, which is prepared as `detect` prepares it.

    model, info: from `load_model`. image: a file, or a Pillow image of any mode.
    Returns {"name", "score", "box": [x1, y1, x2, y2] px of the upright image} of each, best score first.
    Raises DataError for a file that is missing or broken, TypeError for anything else.
    """
    min_size, max_size = max(info["args"]["min_size"]), info["args"]["max_size"]
    if isinstance(image, (str, Path)):
        if not Path(image).is_file():
            raise DataError(f"{image}: there is no such image file")
        dataset = image_folder(Path(image), info["names"], info["category_ids"])
        sample = load_sample(dataset, 0, min_size, max_size)
    elif isinstance(image, Image.Image):
        try:
            image = upright_rgb(image)
        except OSError as error:  # Pillow reads the pixels only now
            raise DataError(f"the Pillow image cannot be read ({error})") from error
        shape = resized_shape(image.height, image.width, min_size, max_size)
        sample = sample_without_objects(resize(np.array(image), *shape), image.size[::-1])
    else:
        raise TypeError(f"detect_image takes a path or a Pillow image, not {type(image).__name__}. "
                        f"Image.fromarray(array) makes one of an RGB array. OpenCV's arrays are BGR: "
                        f"Image.fromarray(array[..., ::-1])")
    pad_to = info["args"]["pad_to"]
    batch = collate([sample], model.size_divisor, [pad_to] if pad_to else None)
    device = model.pixel_mean.device
    found = model(batch["images"].to(device), batch["sizes"].to(device))[0]
    scale = (batch["original_sizes"][0] / batch["sizes"][0]).flip(0).repeat(2)  # of x and y
    return [{"name": info["names"][label], "score": score, "box": box} for box, score, label in
            zip((found["boxes"].cpu() * scale).tolist(), found["scores"].tolist(), found["labels"].tolist())]


def draw_images(model: torch.nn.Module, dataset: DetectionDataset, place: Place, out: Path,
                settings: EvalSettings):
    """Writes the detections of images without annotations, a drawing of each image, and classes.json.

    classes.json names the classes, the settings and the images that were left out.
    """
    results, _ = detect(model, dataset, place, settings)
    if place.rank == 0:
        results = as_in_file(dataset, results)
        write_json(out / "detections.json", results)
        write_json(out / "classes.json", {
            "categories": [{"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.names)],
            "settings": {**settings._asdict(), "amp": str(settings.amp), "nms_threshold": model.nms_threshold,
                         "score_threshold": model.score_threshold, "max_detections": model.max_detections},
            "skipped": dataset.notes})
        draw_detections(dataset, results, out / "pictures", settings.pictures, settings.draw_threshold)
        print0(f"{len(results)} detections in {out / 'detections.json'}, drawings in {out / 'pictures'}")


def best_proposals(outputs: dict[str, torch.Tensor], sizes: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """The proposals of a two-stage detector as detections of class 0. Scores fall with the rank, from 1."""
    images = []
    for boxes, valid in zip(outputs["proposals"], outputs["valid"]):
        boxes = boxes[valid]
        scores = 1 - torch.arange(len(boxes), device=boxes.device) / (len(boxes) + 1)
        labels = torch.zeros(len(boxes), dtype=torch.long)
        images.append({"boxes": boxes, "scores": scores, "labels": labels})
    return images


def score_proposals(model: torch.nn.Module, dataset: DetectionDataset, place: Place, out: Path,
                    settings: EvalSettings):
    """Writes proposals_recall.json. Raises UserError for a one-stage detector."""
    if not isinstance(model, FasterRCNN):
        raise UserError("--proposals-recall is for two-stage detectors: faster_rcnn and defrcn")
    print0(f"at most {model.post_nms_top_k[1]} proposals per image")
    proposals, _ = detect(model, dataset, place, settings, best_proposals)
    if place.rank == 0:
        proposals = as_in_file(dataset, proposals)
        write_json(out / "proposals_recall.json", proposal_recall(dataset, proposals))


def score_file(args: argparse.Namespace):
    """Scores a detections file against a dataset."""
    out = args.out or args.detections.parent
    make_folder(out)
    split = args.split or (default_splits(args.data)[1] if args.data and not args.json else "")
    dataset = open_dataset(args.data or "", split, args.json, args.image_dir)
    results = read_results(args.detections)
    write_json(out / "metrics.json", score(dataset, results))
    draw_scores(dataset, results, out, args.curves, args.worst)
    draw_detections(dataset, results, out / "pictures", args.pictures, args.draw_threshold)


def main():
    args = parse_args()
    if args.detections:
        return score_file(args)
    place = setup_device(args.device, args.amp)
    if args.onnx:
        model, info = load_onnx(args.onnx)
    else:
        model, info = load_model(args.ckpt, place.device, args.original, args.classes, args.voc_split)
    trained, source = info["args"], args.onnx or args.ckpt
    for note in info["notes"]:
        print0(note)
    for name in ("score_threshold", "nms_threshold", "max_detections"):
        if getattr(args, name) is not None:
            setattr(model, name, getattr(args, name))
    if args.proposals:
        if not isinstance(model, FasterRCNN):
            raise UserError("--proposals is for two-stage detectors: faster_rcnn and defrcn")
        model.post_nms_top_k = (model.post_nms_top_k[0], args.proposals)
    # --images and --onnx write to a subfolder, so the detections.json of the run is not overwritten.
    out = args.out or Path(source).parent / ("images" if args.images else "onnx" if args.onnx else "")
    make_folder(out)
    dataset = choose_dataset(args, info)
    settings = EvalSettings(
        min_size=args.min_size or max(trained["min_size"]), max_size=args.max_size or trained["max_size"],
        batch_size=args.batch_size, workers=args.workers, amp=AMP[args.amp],
        pad_to=args.pad_to or trained["pad_to"], pictures=len(dataset) if args.images else args.pictures,
        draw_threshold=args.draw_threshold, curves=args.curves, worst=args.worst)
    if settings.pad_to:
        if any(side % model.size_divisor for side in settings.pad_to):
            raise UserError(f"--pad-to must be multiples of {model.size_divisor}, not {settings.pad_to}")
        check_pad_to(dataset, [settings.min_size], settings.max_size, settings.pad_to)
    print0(f"{source}: step {info['step']}, {len(info['names'])} classes; {len(dataset)} images, "
           f"short side {settings.min_size}, long side at most {settings.max_size} px")
    for note in dataset.notes:
        print0(note)
    if args.images:
        draw_images(model, dataset, place, out, settings)
        if dataset.notes:
            raise SystemExit(f"error: {len(dataset.notes)} images could not be read and were skipped; the "
                             f"other {len(dataset)} are done" if place.rank == 0 else 1)
        return
    if args.proposals_recall:
        return score_proposals(model, dataset, place, out, settings)
    scoring = {}
    if args.shots or args.pcb_weights not in (None, "none"):
        trained = calibrated_stage(trained, info["names"], source, args)
    if trained["stage"]:
        scoring = checkpoint_scoring(trained, info["names"], place, "none" if args.onnx else args.pcb_weights,
                                     args.data or args.json or trained["data"])
    metrics = evaluate(model, dataset, place, out, settings, **scoring)
    if args.onnx and args.ckpt:
        print0(f"{args.ckpt}:")
        model, _ = load_model(args.ckpt, place.device, args.original, args.classes, args.voc_split)
        make_folder(out / "checkpoint")
        theirs = evaluate(model, dataset, place, out / "checkpoint", settings, **scoring)
        if theirs:  # on rank 0
            print0(f"AP {shown(metrics['AP'])} of {args.onnx}, {shown(theirs['AP'])} of {args.ckpt}")


if __name__ == "__main__":
    run_main(main, death_of_a_loader)

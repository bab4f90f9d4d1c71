"""Few-shot runs: base and novel classes, published schedules, calibration of results.

Classes are named, never numbered. The lists of K shots are in subsets.py. As a script this file runs the
protocol and makes the table over seeds (protocol.py), and converts a checkpoint to the classes of the novel
stage:

    python fewshot.py run --base runs/defrcn_base/last.pth --shots 1 10 --seeds 0-9
    python fewshot.py aggregate runs/defrcn_novel_*
    python fewshot.py convert --init runs/defrcn_base/last.pth --out novel_init.pth
"""
from runtime import (  # before torch: see the first lines of runtime.py
    Parser,
    Place,
    gather_objects,
    make_folder,
    print0,
    run_main,
)

# isort: split
import argparse
from pathlib import Path

import numpy as np
import torch

from checkpoint import ABLATION_ARGS, build_model, load_init, read_checkpoint, save_checkpoint
from data import COCO_NOVEL, VOC_CLASSES, VOC_NOVEL, DataError, DetectionDataset
from defrcn import CALIBRATION_ALPHA, CALIBRATION_WINDOW, CalibrationNet, calibrate, class_prototypes
from layouts import default_splits
from metrics import ClassGroups
from protocol import add_run_arguments, aggregate_runs, run_protocol
from runlog import Progress
from shapes import Shapes, open_dataset
from subsets import Subset, k_shot_subset, lists_folder, select_classes
from weights import WeightsError, load_classifier

# ---------------------------------------------------------------------------------------------- schedules

# DeFRCN's configs: steps of 16 images and the step of the lr drop. (data, generalized): {K: (steps, drop)}
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
    """Published number of steps (16 images each), and the steps at which the lr drops.

    shots: K; None means the base stage. Datasets other than VOC use COCO's schedule. A K without a published
    schedule uses that of the next larger K, or of the largest.
    """
    kind = "voc" if voc else "coco"
    if shots is None:
        return BASE_TRAINING[kind]
    table = FINE_TUNING[kind, generalized]
    steps, drop = table[min((k for k in table if k >= shots), default=max(table))]
    return steps, (drop,)


# ---------------------------------------------------------------------------------------------- classes

def novel_names(dataset: DetectionDataset, voc_split: int = 1, given: list[str] | None = None) -> list[str]:
    """The novel classes of a dataset.

    They are the `given` names, else the published ones of COCO or VOC, else (shapes) the last two classes.
    Raises DataError for an unknown name, and if no base class is left.
    """
    names = dataset.names
    if given is None:
        if isinstance(dataset, Shapes):
            given = names[-2:]
        elif dataset.voc and set(VOC_CLASSES) == set(names):
            given = VOC_NOVEL[voc_split]
        elif len(names) == 80 and set(COCO_NOVEL) < set(names):
            given = COCO_NOVEL
        else:
            raise DataError(f"which classes are novel? Name them with --novel-classes; the data have "
                            f"{', '.join(names)}")
    unknown = [name for name in given if name not in names]
    if unknown:
        raise DataError(f"novel classes: the data have no {', '.join(unknown)}; they have {', '.join(names)}")
    if len(set(given)) < len(given) or not 0 < len(given) < len(names):
        raise DataError(f"novel classes {', '.join(given) or '(none)'}: name each once, and leave at least "
                        f"one class of {', '.join(names)} as base")
    return list(given)


def stage_names(names: list[str], novel: list[str], stage: str, generalized: bool) -> list[str]:
    """The classes that a stage learns, in the order of the data: base, novel, or (generalized) all."""
    if stage == "base":
        return [name for name in names if name not in novel]
    return names if generalized else novel


# ---------------------------------------------------------------------------------------------- calibration

class Calibration:
    """Prototypical calibration of detections: mixes novel scores with the similarity to the shots.

    `evaluate.evaluate` calls it between detecting and scoring. detections.json, the metrics and the drawings
    have the calibrated scores; metrics.json keeps the metrics before it under "before_calibration".
    net: (image, boxes) -> features, see `defrcn.CalibrationNet`; it runs on all shots at once here. support:
    the shots. novel: names of the classes that are calibrated. alpha, window: see `defrcn.calibrate`.
    """

    def __init__(self, net: torch.nn.Module, support: DetectionDataset, novel: list[str], place: Place,
                 alpha: float = CALIBRATION_ALPHA, window: tuple[float, float] = CALIBRATION_WINDOW):
        self.net, self.place, self.alpha, self.window = net.to(place.device), place, alpha, tuple(window)
        # DIFFERS: the official code sends the boxes of the shots through the detector's resizing and back,
        # with one ratio for both axes. That moves them by up to 0.1 %. Here they keep their place.
        features, labels = [], []
        for i in range(len(support)):
            box_slice = support.box_slice(i)
            keep = ~support.crowd[box_slice]
            features.append(self._features(support, i, support.boxes[box_slice][keep]))
            labels.append(torch.from_numpy(support.classes[box_slice][keep]))
        self.prototypes = class_prototypes(torch.cat(features), torch.cat(labels).to(place.device),
                                           len(support.names))
        self.excluded = torch.tensor([name not in novel for name in support.names], device=place.device)

    @torch.inference_mode()
    def _features(self, dataset: DetectionDataset, index: int, boxes) -> torch.Tensor:
        image = torch.from_numpy(np.asarray(dataset.image(index)).copy()).permute(2, 0, 1)
        boxes = torch.as_tensor(boxes, dtype=torch.float32, device=self.place.device)
        return self.net(image.to(self.place.device), boxes)

    def __call__(self, dataset: DetectionDataset, results: list[dict]) -> list[dict]:
        """Results in COCO format with calibrated scores, in no particular order.

        Images are split over the ranks; every rank returns all results.
        """
        label_of, index_of = dataset.label_of_category(), dataset.index_of_image()
        low, high = self.window
        unchanged, found_in = [], {}
        for result in results:
            if low < result["score"] <= high:
                found_in.setdefault(result["image_id"], []).append(result)
            else:
                unchanged.append(result)
        changed, device = [], self.place.device
        progress = Progress("calibrating in", len(found_in))
        for image_id in sorted(found_in, key=index_of.get)[self.place.rank::self.place.world]:
            progress.add(self.place.world)
            found = found_in[image_id]
            xywh = torch.tensor([result["bbox"] for result in found])
            boxes = torch.cat((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), dim=1)
            features = self._features(dataset, index_of[image_id], boxes)
            labels = torch.tensor([label_of[result["category_id"]] for result in found], device=device)
            scores = torch.tensor([result["score"] for result in found], device=device)
            scores = calibrate(scores, labels, features, self.prototypes, self.excluded, self.alpha,
                               self.window)
            changed += [{**result, "score": score} for result, score in zip(found, scores.tolist())]
        return unchanged + sum(gather_objects(changed, self.place.world), [])


# ---------------------------------------------------------------------------------------------- runs

def prepare(args: argparse.Namespace, checkpoint: dict | None, train_set: DetectionDataset,
            val_set: DetectionDataset | None, place: Place) -> tuple[Subset, Subset | None, dict]:
    """Prepares the base or novel stage of a training.

    args: of train.py. Their novel_classes and pcb_weights are set to the values that are used. checkpoint:
    what --init or --resume read. Returns training set, validation set and `scoring`, the keyword arguments of
    `evaluate.evaluate`. Raises DataError and WeightsError.
    """
    novel = args.novel_classes = novel_names(train_set, args.voc_split, args.novel_classes)
    if args.stage == "novel" and args.init:
        _check_base_classes(checkpoint, train_set.names, novel)
    names = stage_names(train_set.names, novel, args.stage, args.generalized)
    print0(f"{args.stage} stage: {', '.join(names)} (novel classes: {', '.join(novel)})")
    if val_set is not None:
        val_set = select_classes(val_set, names, drop_empty=False)
    if args.stage == "base":
        train_set = select_classes(train_set, names, drop_empty=True)
        return train_set, val_set, _scoring(vars(args), names, None, None, place)
    # Read now: a bad weight file stops the run before the training, not after it.
    net = _calibration_net(vars(args), args.pcb_weights, required=args.pcb_weights != "resnet101")
    args.pcb_weights = args.pcb_weights if net else "none"
    train_set = k_shot_subset(train_set, names, args.shots, args.shot_seed,
                              lists_folder(vars(args), train_set.voc), args.out if place.rank == 0 else None)
    return train_set, val_set, _scoring(vars(args), names, net, lambda: train_set, place)


def _check_base_classes(checkpoint: dict, names: list[str], novel: list[str]):
    """Raises DataError if a checkpoint of --init has seen novel classes, or if its classes are a wrong guess.

    checkpoint: from `read_checkpoint`. names: all classes of the data.
    """
    path, stage, foreign = checkpoint["path"], checkpoint["args"].get("stage"), "format" in checkpoint
    if foreign and checkpoint["names"] == list(COCO_NOVEL) and not set(COCO_NOVEL) <= set(names):
        raise DataError(f"{path}: its 20 classes were taken for COCO's novel ones, which the data have not. "
                        f"Name them with --voc-split or --classes")
    seen = ", ".join(name for name in novel if name in checkpoint["names"])
    if seen and foreign:
        raise DataError(f"{path} has the novel classes {seen}: give the checkpoint of the base stage, from "
                        f"before a surgery")
    if seen and stage != "novel":
        own = f" (its own: {', '.join(checkpoint['args']['novel_classes'])})" if stage else ""
        raise DataError(f"{path} was trained on {seen} as base classes: they cannot be novel{own}")


def calibrated_stage(trained: dict, names: list[str], path: str, args: argparse.Namespace) -> dict:
    """Arguments of a novel stage for a DeFRCN of another code base, so that its results can be calibrated.

    trained, names: arguments and classes of the checkpoint at `path`. args: of evaluate.py. A checkpoint of
    --stage novel has its own. Raises DataError if there is nothing to calibrate, or not enough is known.
    """
    if trained["stage"] == "novel" and not args.shots:
        return trained
    if trained["stage"] or trained["model"] != "defrcn" or trained["data"] is not None:
        raise DataError(f"{path}: --pcb-weights and --shots calibrate a DeFRCN of another code base, or one "
                        f"of --stage novel, which knows its shots")
    if not args.shots:
        raise DataError(f"{path}: was not trained here, so --pcb-weights needs its shots: --shots K "
                        f"--shot-seed N")
    data = args.data or "."
    split = args.train_split or (default_splits(data)[0] if not args.train_json else "")
    source = open_dataset(data, split, args.train_json, args.train_images)
    published = novel_names(source, args.voc_split or 1)
    novel = [name for name in names if name in published]
    if not novel:
        raise DataError(f"{path}: none of its classes is novel ({', '.join(published)})")
    return {**trained, "stage": "novel", "data": data, "train_split": split, "train_json": args.train_json,
            "train_images": args.train_images, "shots": args.shots, "shot_seed": args.shot_seed,
            "seed": args.shot_seed, "shot_lists": None, "novel_classes": novel,
            "generalized": len(novel) < len(names), "pcb_weights": args.pcb_weights or "resnet101",
            **dict.fromkeys(ABLATION_ARGS)}


def checkpoint_scoring(args: dict, names: list[str], place: Place, pcb_weights: str | None,
                       scored_on: str) -> dict:
    """`scoring` for `evaluate.evaluate` of a checkpoint of a few-shot stage.

    args, names: arguments of its training, its classes. pcb_weights: weights of the calibration; None takes
    those of the training. scored_on: name of the data of this evaluation. Raises DataError and WeightsError.
    """
    def shots():
        source = open_dataset(args["data"], args["train_split"], args["train_json"], args["train_images"])
        subset = k_shot_subset(source, names, args["shots"], args["shot_seed"],
                               lists_folder(args, source.voc), None)
        print0("\n".join(subset.notes))
        return subset

    net = _calibration_net(args, pcb_weights or args["pcb_weights"], required=bool(pcb_weights))
    return _scoring({**args, "data": scored_on}, names, net, shots, place)


def _calibration_net(args: dict, weights: str, required: bool) -> CalibrationNet | None:
    """The classifier of the calibration; None if the run has none.

    required: weights that cannot be loaded raise WeightsError. Otherwise they give a note and None.
    """
    if args["stage"] != "novel" or args["model"] != "defrcn" or not args["shots"] or weights == "none":
        return None
    net = CalibrationNet()
    try:
        load_classifier(net, weights)
    except WeightsError as error:
        if required:
            raise
        print0(f"no prototypical calibration, scores will stay plain: {error}")
        return None
    return net


def _scoring(args: dict, names: list[str], net: CalibrationNet | None, shots, place: Place) -> dict:
    """`scoring` for `evaluate.evaluate`. shots: a function that returns the dataset of the shots."""
    novel = args["novel_classes"]
    info = {"novel": novel, "fpn": args.get("fpn", False) and args["model"] == "faster_rcnn",
            "decouple": [args["rpn_grad_scale"], args["roi_grad_scale"]] if args["decouple"] else None,
            **{key: args[key] for key in ABLATION_ARGS if args[key] is not None},
            **{key: args[key] for key in ("stage", "data", "model", "backbone", "cosine", "shots", "seed",
                                          "shot_seed", "generalized")}}
    members = {"n": [name for name in names if name in novel],
               "b": [name for name in names if name not in novel]}

    def calibrate_results(dataset: DetectionDataset, results: list[dict]) -> list[dict]:
        alpha = CALIBRATION_ALPHA if args["pcb_alpha"] is None else args["pcb_alpha"]
        window = args["pcb_window"] or CALIBRATION_WINDOW
        return Calibration(net, shots(), novel, place, alpha, window)(dataset, results)

    return {"groups": ClassGroups("few_shot", info, members), "calibrate": calibrate_results if net else None}


# ---------------------------------------------------------------------------------------------- script

def add_class_arguments(parser: argparse.ArgumentParser):
    """The arguments that decide which classes the novel stage learns; train.py has them too."""
    parser.add_argument("--generalized", action="store_true", help="K shots of all classes, not of the novel "
                                                                   "ones only")
    parser.add_argument("--novel-classes", metavar="NAME,NAME",
                        type=lambda text: [name.strip() for name in text.split(",")],
                        help="default: COCO's published 20, VOC's 5 of --voc-split, the last two of shapes")
    parser.add_argument("--voc-split", type=int, choices=tuple(VOC_NOVEL),
                        help="published split of VOC's classes (default: 1)")


def convert_checkpoint(args: argparse.Namespace):
    """Writes a checkpoint from which a novel stage can start: its predictor has their classes ("surgery")."""
    dataset = open_dataset(args.data, args.split, args.json, args.image_dir)
    voc_split = args.voc_split if dataset.voc else None
    checkpoint = read_checkpoint(args.init, False, None, voc_split)
    if checkpoint["args"]["model"] not in ("defrcn", "faster_rcnn"):
        raise WeightsError(f"{args.init}: is a checkpoint of --model {checkpoint['args']['model']}; few-shot "
                           f"stages belong to defrcn and faster_rcnn")
    novel = novel_names(dataset, args.voc_split, args.novel_classes)
    names = stage_names(dataset.names, novel, "novel", args.generalized)
    settings = {**checkpoint["args"], "stage": "novel", "shots": None, "generalized": args.generalized,
                "novel_classes": novel}
    torch.manual_seed(args.seed)
    model = build_model(settings, len(names))
    load_init(model, checkpoint, names)
    make_folder(args.out.parent)
    save_checkpoint(args.out, {
        "model": model.state_dict(), "step": 0, "args": settings, "names": names,
        "category_ids": [dataset.category_ids[dataset.names.index(name)] for name in names]})
    print(f"{args.init} for {len(names)} classes is {args.out}")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="run | aggregate | convert")
    run = commands.add_parser("run", help="fine-tunings for all shots and seeds, and their table")
    add_run_arguments(run)
    run.set_defaults(run=run_protocol)
    table = commands.add_parser("aggregate", help="mean and 95 %% interval over seeds")
    table.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders with metrics.json")
    table.add_argument("--out", type=Path, help="folder for aggregate.json")
    table.set_defaults(run=aggregate_runs)
    convert = commands.add_parser("convert", help="a checkpoint for the classes of the novel stage")
    convert.add_argument("--init", required=True, metavar="CKPT", help="checkpoint of the base stage")
    convert.add_argument("--out", type=Path, required=True, metavar="FILE", help="checkpoint to write")
    convert.add_argument("--data", default="shapes", help="'shapes' or a folder in COCO or VOC layout")
    convert.add_argument("--split", default="train", help="a split that names all classes (default: train)")
    convert.add_argument("--json", help="COCO-format file, with --image-dir")
    convert.add_argument("--image-dir", help="image folder of --json")
    add_class_arguments(convert)
    convert.add_argument("--seed", type=int, default=0, help="of the new rows (default: 0)")
    convert.set_defaults(run=convert_checkpoint, voc_split=1)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    run_main(main)

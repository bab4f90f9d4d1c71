"""Draw the boxes of a dataset, the targets that a detector makes of them, or the levels that a model chooses.

    python browse.py                                     the built-in shapes
    python browse.py --data coco --split train2017       COCO, VOC or your own data
    python browse.py --data coco --split val2017 --targets --min-size 800 --max-size 1333
    python browse.py --targets faster_rcnn
    python browse.py --log runs/fcos runs/fsaf           losses, lr and AP over the steps
    python browse.py --shots 5 --shot-seed 0             the shots of the novel classes (few-shot)
    python browse.py --levels runs/fsaf/last.pth         or runs/faster_rcnn/last.pth

It prints the class table and every problem in the data, and draws the first images into --out. With --targets
an image becomes a row of panels, one per pyramid level. A dot is a positive point of FCOS, or the centre of a
positive anchor of Faster R-CNN's RPN, in the colour of the object that it learns. With --levels, an object of
FSAF has the colour of the level on which its loss is smallest. Its dots are the points that learn it there.
Of Faster R-CNN, the best proposals of every level are drawn.
"""
from runtime import Parser, UserError, make_folder, run_main  # first: torch must not be imported before it

# isort: split
import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

import faster_rcnn
import fcos
import fsaf
from augment import AUGMENTATIONS
from checkpoint import load_model
from data import DetectionDataset, TrainSamples, collate, load_sample
from draw import class_colour, draw_box, draw_runs, enlarge, file_names
from evaluate import choose_dataset
from faster_rcnn import FasterRCNN, rpn_proposals
from fewshot import add_class_arguments, novel_names, stage_names
from fsaf import FSAF, NO_LOSS, STRIDES, level_losses, select_level
from layouts import default_splits
from ops import match_anchors
from shapes import open_dataset
from subsets import k_shot_subset, lists_folder

PANEL = 400  # px, longer side of the panel of a level
SHOT_PANEL = 200  # px, longer side of the panel of a shot
GAP = 4  # px between panels
PROPOSALS = 10  # drawn per level
SHAPES_SIZE, COCO_SIZE = (128, 128), (800, 1333)  # default --min-size, --max-size


def draw_objects(dataset: DetectionDataset, index: int) -> Image.Image:
    """One image with its boxes and class names. Crowds and VOC's difficult objects are marked."""
    image, zoom = enlarge(dataset.image(index))
    canvas = ImageDraw.Draw(image)
    rows = dataset.box_slice(index)
    for row in range(rows.start, rows.stop):
        label = int(dataset.classes[row])
        mark = " (crowd)" * bool(dataset.crowd[row]) + " (difficult)" * bool(dataset.difficult[row])
        draw_box(canvas, dataset.boxes[row] * zoom, class_colour(label), dataset.names[label] + mark)
    return image


def draw_augmented(dataset: DetectionDataset, index: int, min_size: int, max_size: int,
                   augment: list[str]) -> Image.Image:
    """Four draws of one image, with its boxes, in a row."""
    samples = TrainSamples(dataset, [min_size], max_size, augment=tuple(augment))
    panels = []
    for draw in range(4):
        sample = samples[4 * index + draw, index]
        image, zoom = enlarge(Image.fromarray(sample["image"]))
        canvas = ImageDraw.Draw(image)
        for box, label in zip(sample["boxes"] * zoom, sample["labels"].tolist()):
            draw_box(canvas, box, class_colour(label), dataset.names[label] if label >= 0 else "crowd")
        panels.append(image)
    return _in_a_row(panels)


def draw_shots(shots: DetectionDataset) -> Image.Image:
    """The shots of a novel stage, from `subsets.k_shot_subset`: a row per class, a panel per shot."""
    rows = []
    for label, name in enumerate(shots.names):
        panels = []
        for row in np.flatnonzero((shots.classes == label) & ~shots.crowd):
            image = shots.image(int(shots.box_image[row]))
            zoom = SHOT_PANEL / max(image.size)
            image = image.resize((round(image.width * zoom), round(image.height * zoom)))
            draw_box(ImageDraw.Draw(image), shots.boxes[row] * zoom, class_colour(label), name)
            panels.append(image)
        rows.append(_in_a_row(panels))
    sheet = Image.new("RGB", (max(row.width for row in rows), sum(row.height + GAP for row in rows)), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet


class LevelTargets(NamedTuple):
    """Positive places on one level, and the object that each of them learns."""
    name: str
    stride: int
    count: int  # number of places on this level
    points: np.ndarray  # (N, 2) px: a positive point, or the centre of a positive anchor
    gt_index: list[int]  # (N,)
    anchors: np.ndarray | None = None  # (N, 4) px


def fcos_level_targets(height: int, width: int, boxes: torch.Tensor, labels: torch.Tensor,
                       original: bool) -> list[LevelTargets]:
    """Positive points of FCOS in an image of this size."""
    shapes = [(-(-height // stride), -(-width // stride)) for stride in fcos.STRIDES]
    points, strides, ranges = fcos.all_points(shapes)
    _, _, gt_index = fcos.fcos_targets(points, strides, ranges, boxes, labels, original)
    sizes = [h * w for h, w in shapes]
    levels = zip(points.split(sizes), gt_index.split(sizes))
    return [LevelTargets(f"P{i + 3}", fcos.STRIDES[i], sizes[i], at[index >= 0].numpy(),
                         index[index >= 0].tolist()) for i, (at, index) in enumerate(levels)]


def rpn_level_targets(height: int, width: int, boxes: torch.Tensor,
                      labels: torch.Tensor) -> list[LevelTargets]:
    """Positive anchors of Faster R-CNN's RPN with FPN, before sampling, in an image of this size."""
    padded_height, padded_width = (-(-side // 32) * 32 for side in (height, width))
    shapes = [(-(-padded_height // stride), -(-padded_width // stride)) for stride in faster_rcnn.STRIDES]
    base = faster_rcnn.base_anchors()
    anchors = faster_rcnn.all_anchors(base, shapes, faster_rcnn.STRIDES)
    match = match_anchors(anchors, boxes, labels, faster_rcnn.RPN_FOREGROUND_IOU,
                          faster_rcnn.RPN_BACKGROUND_IOU)
    sizes = [h * w * base.shape[1] for h, w in shapes]
    levels = zip(anchors.split(sizes), match.split(sizes))
    return [LevelTargets(f"P{i + 2}", faster_rcnn.STRIDES[i], sizes[i],
                         ((at[:, :2] + at[:, 2:]) / 2)[index >= 0].numpy(), index[index >= 0].tolist(),
                         at[index >= 0].numpy()) for i, (at, index) in enumerate(levels)]


def draw_targets(dataset: DetectionDataset, index: int, min_size: int, max_size: int,
                 original: bool = False, model: str = "fcos") -> Image.Image:
    """One image at network size, one panel per level: what is positive there, and the objects it learns.

    original: targets of FCOS's original form. model: "fcos" (points) or "faster_rcnn" (anchors of the RPN).
    """
    sample = load_sample(dataset, index, min_size, max_size)
    height, width = sample["image"].shape[:2]
    arguments = height, width, torch.from_numpy(sample["boxes"]), torch.from_numpy(sample["labels"])
    levels = fcos_level_targets(*arguments, original) if model == "fcos" else rpn_level_targets(*arguments)
    image, zoom = _panel(sample)
    panels = []
    for level in levels:
        panels.append(image.copy())
        canvas = ImageDraw.Draw(panels[-1])
        for i in sorted(set(level.gt_index)):
            draw_box(canvas, sample["boxes"][i] * zoom, class_colour(i))
        for k, i in enumerate(level.gt_index):
            if level.anchors is not None:
                canvas.rectangle((level.anchors[k] * zoom).tolist(), outline=class_colour(i))
            _draw_dot(canvas, level.points[k] * zoom, level.stride * zoom / 5, i)
        what = "points" if level.anchors is None else "anchors"
        _write(canvas, f"{level.name}, stride {level.stride}: {len(level.points)} of {level.count} {what}")
    return _in_a_row(panels)


@torch.no_grad()
def draw_proposals(model: FasterRCNN, dataset: DetectionDataset, index: int, min_size: int,
                   max_size: int) -> tuple[Image.Image, list[tuple[int, float]]]:
    """One panel per level with its best PROPOSALS proposals, over the objects in white.

    Returns also the (level, side in px) pairs of the proposals. side: root of the area at network size.
    """
    sample = load_sample(dataset, index, min_size, max_size)
    batch = collate([sample], model.size_divisor)
    features, _ = model.features(batch["images"], batch["sizes"])
    found = model.propose(features, batch["sizes"])
    levels = zip(*(rows.split(found["level_sizes"]) for rows in
                   (found["anchors"], found["objectness"][0], found["deltas"][0])))
    image, zoom = _panel(sample)
    panels, drawn = [], []
    for i, (anchors, objectness, deltas) in enumerate(levels):
        boxes, valid = rpn_proposals(objectness, deltas, anchors, batch["sizes"][0], [len(anchors)],
                                     model.pre_nms_top_k[1], PROPOSALS)
        panels.append(image.copy())
        canvas = ImageDraw.Draw(panels[-1])
        for box in sample["boxes"]:
            draw_box(canvas, box * zoom, "white")
        for box in boxes[valid].tolist():
            canvas.rectangle([side * zoom for side in box], outline=class_colour(i))
            drawn.append((i, ((box[2] - box[0]) * (box[3] - box[1])) ** 0.5))
        _write(canvas, f"P{i + 2}: its best {int(valid.sum())} proposals")
    return _in_a_row(panels), drawn


def _panel(sample: dict) -> tuple[Image.Image, float]:
    """The image of a sample with a longer side of PANEL, and the factor."""
    height, width = sample["image"].shape[:2]
    zoom = PANEL / max(height, width)
    return Image.fromarray(sample["image"]).resize((round(width * zoom), round(height * zoom))), zoom


def _write(canvas: ImageDraw.ImageDraw, text: str):
    canvas.rectangle(canvas.textbbox((4, 4), text), fill="white")
    canvas.text((4, 4), text, fill="black")


def _in_a_row(panels: list[Image.Image]) -> Image.Image:
    width, height = (max(sides) for sides in zip(*(panel.size for panel in panels)))
    row = Image.new("RGB", (len(panels) * (width + GAP) - GAP, height), "white")
    for i, panel in enumerate(panels):
        row.paste(panel, (i * (width + GAP), 0))
    return row


@torch.no_grad()
def draw_levels(model: FSAF, dataset: DetectionDataset, index: int, min_size: int,
                max_size: int) -> tuple[Image.Image, list[tuple[int, float]]]:
    """One image with the level that each object selects, and the (level, side in px) pairs of its objects.

    side: root of the area of the box at network size. An object without an effective point on any level
    cannot be learned; it has level -1 and is not drawn.
    """
    sample = load_sample(dataset, index, min_size, max_size)
    batch = collate([sample])
    outputs = model.network(batch["images"], batch["sizes"])
    arguments = model.anchor_free_targets(outputs, batch["sizes"], batch["gt_boxes"], batch["gt_labels"])
    losses = level_losses(*arguments)[0]
    points = fsaf.all_points(outputs["shapes"])[0].split(arguments.level_sizes)
    gt_index = arguments.targets.gt_index[0].split(arguments.level_sizes)

    image, zoom = enlarge(Image.fromarray(sample["image"]))
    canvas = ImageDraw.Draw(image)
    selected = []
    for i, level in enumerate(select_level(losses).tolist()):
        if batch["gt_labels"][0, i] < 0:  # padding or a crowd
            continue
        box, label = sample["boxes"][i], sample["labels"][i]
        level = -1 if losses[i, level] == NO_LOSS else level
        selected.append((level, float(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)))
        if level < 0:
            continue
        draw_box(canvas, box * zoom, class_colour(level), f"P{level + 3} {dataset.names[label]}")
        for point in points[level][gt_index[level] == i]:
            _draw_dot(canvas, point.numpy() * zoom, STRIDES[level] * zoom / 6, level)
    return image, selected


def _draw_dot(canvas: ImageDraw.ImageDraw, point: np.ndarray, radius: float, label: int):
    x, y = point.tolist()
    radius = max(2, radius)
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), class_colour(label), "black")


def level_table(selected: list[tuple[int, float]], names: list[str], what: str) -> str:
    """How many objects or proposals belong to each level, and how large they are.

    selected: from `draw_levels` or `draw_proposals`. names: of the levels.
    """
    lines = []
    for level in range(-1 if what == "objects" else 0, len(names)):
        sides = sorted(side for at, side in selected if at == level)
        line = f"{names[level] if level >= 0 else 'no level'}: {len(sides)} {what}"
        if sides:
            line += f", side {sides[0]:.0f} to {sides[-1]:.0f} px, median {sides[len(sides) // 2]:.0f}"
        lines.append(line)
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="'shapes' or a folder, as for train.py (default: shapes; with "
                                       "--levels, the data that the checkpoint was scored on)")
    parser.add_argument("--split", help="default: that of the layout, such as train2017")
    parser.add_argument("--json", help="COCO-format file, instead of --data; needs --image-dir")
    parser.add_argument("--image-dir", help="folder with the images of --json")
    parser.add_argument("--log", type=Path, nargs="+", metavar="RUN",
                        help="draw losses, lr and AP of these runs over their steps, in OUT/curves.png")
    parser.add_argument("--augment", nargs="+", choices=AUGMENTATIONS,
                        help="draw each image as four epochs of a training with this augmentation see it")
    parser.add_argument("--shots", type=int, metavar="K", help="draw the K shots of every novel class, in "
                                                               "OUT/shots.png: a row per class")
    parser.add_argument("--shot-seed", type=int, default=0, help="number of the list of shots (default: 0)")
    parser.add_argument("--shot-lists", help="folder of published lists, or none to sample shots")
    add_class_arguments(parser)
    parser.add_argument("--count", type=int, default=8, help="draw the first N images")
    parser.add_argument("--targets", nargs="?", const="fcos", choices=("fcos", "faster_rcnn"),
                        help="draw the targets of this detector instead of the boxes (default: fcos)")
    parser.add_argument("--original", action="store_true", help="targets of the original form of FCOS")
    parser.add_argument("--levels", metavar="CKPT", help="draw the levels that objects select in this FSAF, "
                                                       "or the proposals of this Faster R-CNN")
    parser.add_argument("--min-size", type=int, help="short side at network size, for the three above "
                                                     "(default: the checkpoint's, 128 for shapes, else 800)")
    parser.add_argument("--max-size", type=int, help="limit of the long side "
                                                     "(default: the checkpoint's, 128 for shapes, else 1333)")
    parser.add_argument("--out", type=Path, default=Path("runs/browse"))
    args = parser.parse_args()
    if sum(map(bool, (args.targets, args.levels, args.augment, args.shots))) > 1:
        parser.error("give one of --targets, --levels, --augment and --shots, not both")
    for name in ("count", "min_size", "max_size", "shots"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    return args


def main():
    args = parse_args()
    if args.log:
        make_folder(args.out)
        draw_runs(args.log, args.out / "curves.png")
        return print(f"curves of {len(args.log)} runs in {args.out / 'curves.png'}")
    trained = None
    if args.levels:
        model, info = load_model(args.levels)
        trained = info["args"]
        if not (isinstance(model, FSAF) and model.head.anchor_free
                or isinstance(model, FasterRCNN) and model.fpn is not None):
            form = {"fsaf": " --fsaf-branch anchor", "faster_rcnn": " --c4"}.get(trained["model"], "")
            raise UserError(f"{args.levels}: --levels needs an FSAF with an anchor-free branch or a Faster "
                            f"R-CNN with FPN, but this is --model {trained['model']}{form}")
    if trained:
        dataset = choose_dataset(argparse.Namespace(**vars(args), ckpt=args.levels, images=None), info)
        min_size, max_size = max(trained["min_size"]), trained["max_size"]
    else:
        split = args.split or (default_splits(args.data or "shapes")[0] if not args.json else "")
        dataset = open_dataset(args.data or "shapes", split, args.json, args.image_dir)
        is_shapes = args.data in (None, "shapes") and not args.json
        min_size, max_size = SHAPES_SIZE if is_shapes else COCO_SIZE
    min_size, max_size = args.min_size or min_size, args.max_size or max_size

    print("\n".join([*dataset.notes, dataset.table()]))
    make_folder(args.out)
    if args.shots:
        novel = novel_names(dataset, args.voc_split or 1, args.novel_classes)
        names = stage_names(dataset.names, novel, "novel", args.generalized)
        lists = lists_folder({"data": args.data or args.json or "shapes", "shot_lists": args.shot_lists},
                             dataset.voc)
        shots = k_shot_subset(dataset, names, args.shots, args.shot_seed, lists, None)
        draw_shots(shots).save(args.out / "shots.png")
        return print("\n".join([*shots.notes, f"drawn in {args.out / 'shots.png'}"]))
    count, selected = min(args.count, len(dataset)), []
    for index, name in enumerate(file_names(dataset.image_ids[:count].tolist())):
        path = args.out / name
        if args.augment:
            image = draw_augmented(dataset, index, min_size, max_size, args.augment)
            image.save(f"{path}_augmented.png")
        elif args.targets:
            image = draw_targets(dataset, index, min_size, max_size, args.original, args.targets)
            image.save(f"{path}_targets.png")
        elif args.levels:
            draw = draw_levels if isinstance(model, FSAF) else draw_proposals
            image, levels = draw(model, dataset, index, min_size, max_size)
            image.save(f"{path}_levels.png")
            selected += levels
        else:
            draw_objects(dataset, index).save(f"{path}.png")
    if args.levels:
        first, what = (3, "objects") if isinstance(model, FSAF) else (2, "proposals")
        print(level_table(selected, [f"P{i}" for i in range(first, first + 5)], what))
    print(f"{count} drawings in {args.out}")


if __name__ == "__main__":
    run_main(main)

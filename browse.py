"""Look at a dataset before training on it: its boxes, or the targets FCOS makes of them. Or look at what a
trained FSAF makes of it: the level each object chooses.

    python browse.py                                     the built-in shapes
    python browse.py --data coco --split train2017       COCO, VOC or your own data
    python browse.py --data coco --split val2017 --targets --min-size 800 --max-size 1333
    python browse.py --levels runs/fsaf/last.pth

Prints the class table and every problem found, and draws the first images into --out. With --targets an
image becomes a row of panels, one per pyramid level: a dot is a positive point, in the colour of the object
it learns. With --levels a box has the colour of the level on which its loss is smallest, and dots where it is
learned there.
"""
import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # before torch: see evaluate.py

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from backbone import WeightsError
from data import DetectionDataset, collate, load_sample, open_dataset
from evaluate import class_colour, draw_box, enlarge, file_name, load_model, make_folder, run_script
from fcos import STRIDES, fcos_targets, image_points
from fsaf import FSAF, NO_LOSS, level_losses, select_level
from fsaf import image_points as corner_points

PANEL = 400  # px, longer side of a level's panel


def draw_objects(dataset: DetectionDataset, index: int) -> Image.Image:
    """One image with its boxes and class names; crowds and VOC's difficult objects are marked as such."""
    image, zoom = enlarge(dataset.image(index))
    canvas = ImageDraw.Draw(image)
    for row in range(dataset.first[index], dataset.first[index + 1]):
        label = int(dataset.classes[row])
        mark = " (crowd)" * bool(dataset.crowd[row]) + " (difficult)" * bool(dataset.difficult[row])
        draw_box(canvas, dataset.boxes[row] * zoom, class_colour(label), dataset.names[label] + mark)
    return image


def draw_targets(dataset: DetectionDataset, index: int, min_size: int, max_size: int,
                 original: bool) -> Image.Image:
    """One image at network size, a panel (PANEL px) per level: its positive points, their objects."""
    sample = load_sample(dataset, index, min_size, max_size)
    height, width = sample["image"].shape[:2]
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    points, strides, ranges = image_points(shapes)
    boxes, labels = torch.from_numpy(sample["boxes"]), torch.from_numpy(sample["labels"])
    _, _, owner = fcos_targets(points, strides, ranges, boxes, labels, original)
    level_sizes = [h * w for h, w in shapes]
    panels = []
    levels = zip(points.split(level_sizes), owner.split(level_sizes))
    for level, (level_points, level_owner) in enumerate(levels):
        zoom = PANEL / max(height, width)
        panel = Image.fromarray(sample["image"]).resize((round(width * zoom), round(height * zoom)))
        canvas = ImageDraw.Draw(panel)
        positive = (level_owner >= 0).nonzero().squeeze(1).tolist()
        for i in sorted(set(level_owner[positive].tolist())):
            draw_box(canvas, sample["boxes"][i] * zoom, class_colour(i), "")
        radius = max(2, STRIDES[level] * zoom / 5)
        for i in positive:
            x, y = (level_points[i] * zoom).tolist()
            colour = class_colour(int(level_owner[i]))
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), colour, "black")
        text = f"P{level + 3}, stride {STRIDES[level]}: {len(positive)} of {level_sizes[level]} points"
        canvas.rectangle(canvas.textbbox((4, 4), text), fill="white")
        canvas.text((4, 4), text, fill="black")
        panels.append(panel)
    row = Image.new("RGB", (sum(p.width + 4 for p in panels) - 4, panels[0].height), "white")
    for level, panel in enumerate(panels):
        row.paste(panel, (level * (panel.width + 4), 0))
    return row


@torch.no_grad()
def draw_levels(model: FSAF, dataset: DetectionDataset, index: int, min_size: int,
                max_size: int) -> tuple[Image.Image, list[tuple[int, float]]]:
    """One image with the level that each object chooses, and its (level, side in px) pairs.

    An object without an effective cell on any level, which cannot be learned, has level -1 and is not drawn.
    """
    sample = load_sample(dataset, index, min_size, max_size)
    batch = collate([sample])
    outputs = model.network(batch["images"], batch["sizes"])
    arguments = model.free_targets(outputs, batch["sizes"], batch["gt_boxes"], batch["gt_labels"])
    _, _, targets, _, _, level_sizes = arguments
    losses = level_losses(*arguments)[0]
    points = corner_points(outputs["shapes"])[0].split(level_sizes)
    owner = targets.owner[0].split(level_sizes)

    image, zoom = enlarge(Image.fromarray(sample["image"]))
    canvas = ImageDraw.Draw(image)
    chosen = []
    for i, level in enumerate(select_level(losses).tolist()):
        if batch["gt_labels"][0, i] < 0:
            continue
        box, label = sample["boxes"][i], sample["labels"][i]
        level = -1 if losses[i, level] == NO_LOSS else level
        chosen.append((level, float(((box[2] - box[0]) * (box[3] - box[1])) ** 0.5)))
        if level < 0:
            continue
        draw_box(canvas, box * zoom, class_colour(level), f"P{level + 3} {dataset.names[label]}")
        radius = max(2, STRIDES[level] * zoom / 6)
        for x, y in (points[level][owner[level] == i] * zoom).tolist():
            canvas.ellipse((x - radius, y - radius, x + radius, y + radius), class_colour(level), "black")
    return image, chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="'shapes' or a folder in COCO or VOC layout (default: shapes; for "
                                       "--levels what the checkpoint was scored on)")
    parser.add_argument("--split", help="default: train (shapes), train2017")
    parser.add_argument("--json", help="COCO-format file, with --image-dir")
    parser.add_argument("--image-dir", help="folder of its images")
    parser.add_argument("--count", type=int, default=8, help="draw the first N images")
    parser.add_argument("--targets", action="store_true", help="draw FCOS's targets instead of the boxes")
    parser.add_argument("--original", action="store_true", help="targets of the original form of FCOS")
    parser.add_argument("--levels", metavar="CKPT", help="draw the levels that objects choose in this FSAF")
    parser.add_argument("--min-size", type=int,
                        help="short side at which targets and levels are found (default: the checkpoint's, "
                             "800 for --targets; shapes: 128)")
    parser.add_argument("--max-size", type=int, help="limit of the long side (default: 1333; shapes: 128)")
    parser.add_argument("--out", type=Path, default=Path("runs/browse"))
    args = parser.parse_args()
    if args.targets and args.levels:
        parser.error("give --targets or --levels, not both")
    for name in ("count", "min_size", "max_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    if args.levels:
        model, info = load_model(args.levels)
        trained = info["args"]
        if not isinstance(model, FSAF) or not model.head.free:
            raise WeightsError(f"{args.levels}: --levels needs an FSAF with its anchor-free branch, this is "
                               f"--model {trained['model']} --fsaf-branch {trained.get('fsaf_branch')}")
        min_size, max_size = max(trained["min_size"]), trained["max_size"]
    if args.levels and not (args.data or args.json):
        dataset = open_dataset(trained["data"], args.split or trained["val_split"], trained["val_json"],
                               trained["val_images"], info["names"])
    else:
        data = args.data or "shapes"
        shapes = data == "shapes" and not args.json
        if not args.levels:
            min_size, max_size = (128, 128) if shapes else (800, 1333)
        dataset = open_dataset(data, args.split or ("train" if shapes else "train2017"), args.json,
                               args.image_dir, info["names"] if args.levels else None)
    min_size, max_size = args.min_size or min_size, args.max_size or max_size
    for line in (*dataset.notes, dataset.table()):
        print(line)
    make_folder(args.out)
    count, chosen = min(args.count, len(dataset)), []
    for index in range(count):
        kind = ""
        if args.targets:
            picture, kind = draw_targets(dataset, index, min_size, max_size, args.original), "_targets"
        elif args.levels:
            (picture, levels), kind = draw_levels(model, dataset, index, min_size, max_size), "_levels"
            chosen += levels
        else:
            picture = draw_objects(dataset, index)
        picture.save(args.out / f"{file_name(dataset.image_ids[index])}{kind}.png")
    for level in range(-1, len(STRIDES)) if args.levels else ():
        sides = sorted(side for at, side in chosen if at == level)
        print(f"{f'P{level + 3}' if level >= 0 else 'no level'}: {len(sides)} objects"
              + (f", side {sides[0]:.0f} to {sides[-1]:.0f} px, median {sides[len(sides) // 2]:.0f}"
                 if sides else ""))
    print(f"{count} drawings in {args.out}")


if __name__ == "__main__":
    run_script(main)

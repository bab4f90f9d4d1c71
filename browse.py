"""Look at a dataset before training on it: its boxes, or the targets FCOS makes of them.

    python browse.py                                     the built-in shapes
    python browse.py --data coco --split train2017       COCO, VOC or your own data
    python browse.py --data coco --split val2017 --targets --min-size 800 --max-size 1333

Prints the class table and every problem found, and draws the first images into --out. With --targets an
image becomes a row of panels, one per pyramid level: a dot is a positive point, in the colour of the object
it learns.
"""
import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # before torch: see evaluate.py

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import DetectionDataset, load_sample, open_dataset
from evaluate import class_colour, draw_box, enlarge, file_name, make_folder, run_script
from fcos import STRIDES, fcos_targets, image_points

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


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes", help="'shapes' or a folder in COCO or VOC layout")
    parser.add_argument("--split", help="default: train (shapes), train2017")
    parser.add_argument("--json", help="COCO-format file, with --image-dir")
    parser.add_argument("--image-dir", help="folder of its images")
    parser.add_argument("--count", type=int, default=8, help="draw the first N images")
    parser.add_argument("--targets", action="store_true", help="draw FCOS's targets instead of the boxes")
    parser.add_argument("--original", action="store_true", help="targets of the original form of FCOS")
    parser.add_argument("--min-size", type=int, help="short side for --targets (default: 800; shapes: 128)")
    parser.add_argument("--max-size", type=int, help="limit of the long side (default: 1333; shapes: 128)")
    parser.add_argument("--out", type=Path, default=Path("runs/browse"))
    args = parser.parse_args()
    shapes = args.data == "shapes"
    split = args.split or ("train" if shapes else "train2017")
    dataset = open_dataset(args.data, split, args.json, args.image_dir)
    for line in (*dataset.notes, dataset.table()):
        print(line)
    make_folder(args.out)
    for index in range(min(args.count, len(dataset))):
        if args.targets:
            picture = draw_targets(dataset, index, args.min_size or (128 if shapes else 800),
                                   args.max_size or (128 if shapes else 1333), args.original)
        else:
            picture = draw_objects(dataset, index)
        picture.save(args.out / f"{file_name(dataset.image_ids[index])}{'_targets' * args.targets}.png")
    print(f"{min(args.count, len(dataset))} drawings in {args.out}")


if __name__ == "__main__":
    run_script(main)

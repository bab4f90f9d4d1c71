"""Draw the boxes of a dataset, the targets that FCOS makes of them, or the levels that FSAF's objects select.

    python browse.py                                     the built-in shapes
    python browse.py --data coco --split train2017       COCO, VOC or your own data
    python browse.py --data coco --split val2017 --targets --min-size 800 --max-size 1333
    python browse.py --levels runs/fsaf/last.pth

It prints the class table and every problem in the data, and draws the first images into --out. With --targets
an image becomes a row of panels, one per pyramid level. A dot is a positive point in the colour of the object
that it learns. With --levels a box has the colour of the level on which its loss is smallest. Its dots are
the points that learn it there.
"""
from runtime import Parser, UserError, make_folder, run_main  # first: torch must not be imported before it

# isort: split
import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import fsaf
from checkpoint import load_model
from data import DetectionDataset, collate, load_sample
from draw import class_colour, draw_box, enlarge, file_name
from fcos import STRIDES, all_points, fcos_targets
from fsaf import FSAF, NO_LOSS, level_losses, select_level
from shapes import open_dataset

PANEL = 400  # px, longer side of the panel of a level
GAP = 4  # px between panels
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


def draw_targets(dataset: DetectionDataset, index: int, min_size: int, max_size: int,
                 original: bool) -> Image.Image:
    """One image at network size, one panel per level: positive points of FCOS and their objects."""
    sample = load_sample(dataset, index, min_size, max_size)
    height, width = sample["image"].shape[:2]
    zoom = PANEL / max(height, width)
    shapes = [(-(-height // stride), -(-width // stride)) for stride in STRIDES]
    points, strides, ranges = all_points(shapes)
    boxes, labels = torch.from_numpy(sample["boxes"]), torch.from_numpy(sample["labels"])
    _, _, gt_index = fcos_targets(points, strides, ranges, boxes, labels, original)
    level_sizes = [h * w for h, w in shapes]
    levels = zip(points.split(level_sizes), gt_index.split(level_sizes))
    image = Image.fromarray(sample["image"]).resize((round(width * zoom), round(height * zoom)))
    row = Image.new("RGB", (len(shapes) * (image.width + GAP) - GAP, image.height), "white")
    for level, (level_points, level_gt_index) in enumerate(levels):
        panel = image.copy()
        canvas = ImageDraw.Draw(panel)
        positive = (level_gt_index >= 0).nonzero().squeeze(1).tolist()
        for i in sorted(set(level_gt_index[positive].tolist())):
            draw_box(canvas, sample["boxes"][i] * zoom, class_colour(i))
        for i in positive:
            _draw_dot(canvas, level_points[i] * zoom, STRIDES[level] * zoom / 5, int(level_gt_index[i]))
        text = f"P{level + 3}, stride {STRIDES[level]}: {len(positive)} of {level_sizes[level]} points"
        canvas.rectangle(canvas.textbbox((4, 4), text), fill="white")
        canvas.text((4, 4), text, fill="black")
        row.paste(panel, (level * (panel.width + GAP), 0))
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
            _draw_dot(canvas, point * zoom, STRIDES[level] * zoom / 6, level)
    return image, selected


def _draw_dot(canvas: ImageDraw.ImageDraw, point: torch.Tensor, radius: float, label: int):
    x, y = point.tolist()
    radius = max(2, radius)
    canvas.ellipse((x - radius, y - radius, x + radius, y + radius), class_colour(label), "black")


def level_table(selected: list[tuple[int, float]]) -> str:
    """How many objects selected each level, and how large they are. selected: from `draw_levels`."""
    lines = []
    for level in range(-1, len(STRIDES)):
        sides = sorted(side for at, side in selected if at == level)
        line = f"{f'P{level + 3}' if level >= 0 else 'no level'}: {len(sides)} objects"
        if sides:
            line += f", side {sides[0]:.0f} to {sides[-1]:.0f} px, median {sides[len(sides) // 2]:.0f}"
        lines.append(line)
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="'shapes' or a folder in COCO or VOC layout (default: shapes; with "
                                       "--levels, the data that the checkpoint was scored on)")
    parser.add_argument("--split", help="default: train for shapes, else train2017")
    parser.add_argument("--json", help="COCO-format file, instead of --data; needs --image-dir")
    parser.add_argument("--image-dir", help="folder with the images of --json")
    parser.add_argument("--count", type=int, default=8, help="draw the first N images")
    parser.add_argument("--targets", action="store_true", help="draw FCOS's targets instead of the boxes")
    parser.add_argument("--original", action="store_true", help="targets of the original form of FCOS")
    parser.add_argument("--levels", metavar="CKPT", help="draw the levels that objects select in this FSAF")
    parser.add_argument("--min-size", type=int, help="short side at network size, for --targets and --levels "
                                                     "(default: the checkpoint's, 128 for shapes, else 800)")
    parser.add_argument("--max-size", type=int, help="limit of the long side "
                                                     "(default: the checkpoint's, 128 for shapes, else 1333)")
    parser.add_argument("--out", type=Path, default=Path("runs/browse"))
    args = parser.parse_args()
    if args.targets and args.levels:
        parser.error("give --targets or --levels, not both")
    for name in ("count", "min_size", "max_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    return args


def main():
    args = parse_args()
    trained = names = model = None
    if args.levels:
        model, info = load_model(args.levels)
        trained, names = info["args"], info["names"]
        if not isinstance(model, FSAF) or not model.head.anchor_free:
            raise UserError(f"{args.levels}: --levels needs an FSAF with an anchor-free branch, but this is "
                            f"--model {trained['model']} --fsaf-branch {trained.get('fsaf_branch')}")
    is_shapes = args.data in (None, "shapes") and not args.json
    if trained and not (args.data or args.json):
        dataset = open_dataset(trained["data"], args.split or trained["val_split"], trained["val_json"],
                               trained["val_images"], names)
    else:
        split = args.split or ("train" if is_shapes else "train2017")
        dataset = open_dataset(args.data or "shapes", split, args.json, args.image_dir, names)
    min_size, max_size = SHAPES_SIZE if is_shapes else COCO_SIZE
    if trained:
        min_size, max_size = max(trained["min_size"]), trained["max_size"]
    min_size, max_size = args.min_size or min_size, args.max_size or max_size

    print("\n".join([*dataset.notes, dataset.table()]))
    make_folder(args.out)
    count, selected = min(args.count, len(dataset)), []
    for index in range(count):
        path = args.out / file_name(dataset.image_ids[index])
        if args.targets:
            image = draw_targets(dataset, index, min_size, max_size, args.original)
            image.save(f"{path}_targets.png")
        elif args.levels:
            image, levels = draw_levels(model, dataset, index, min_size, max_size)
            image.save(f"{path}_levels.png")
            selected += levels
        else:
            draw_objects(dataset, index).save(f"{path}.png")
    if args.levels:
        print(level_table(selected))
    print(f"{count} drawings in {args.out}")


if __name__ == "__main__":
    run_main(main)

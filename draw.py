"""Boxes on images."""
import colorsys
import re
from pathlib import Path

from PIL import Image, ImageDraw

from data import DetectionDataset

ENLARGED = 512  # px; smaller images are drawn at a multiple of their size that fits in this
GOLDEN_ANGLE = 0.381966  # as a fraction of the colour wheel


DRAW_THRESHOLD = 0.2  # detections with a lower score are not drawn


def draw_detections(dataset: DetectionDataset, results: list[dict], folder: Path, count: int,
                    threshold: float = DRAW_THRESHOLD):
    """Draws the first `count` images of the dataset into `folder`, which is made if needed.

    Objects are white. Detections with a score of at least `threshold` have the colour of their class and show
    its name and the score. results: COCO result format. Two image ids never share a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    label_of = dataset.label_of_category()
    by_image, used = {}, set()
    for result in results:
        if result["score"] >= threshold:
            by_image.setdefault(result["image_id"], []).append(result)
    for i in range(min(count, len(dataset))):
        image, zoom = enlarge(dataset.image(i))
        canvas = ImageDraw.Draw(image)
        for x1, y1, x2, y2 in (dataset.boxes[dataset.box_slice(i)] * zoom).tolist():
            canvas.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline="black", width=4)
            canvas.rectangle((x1, y1, x2, y2), outline="white", width=2)
        image_id = dataset.image_ids[i].item()
        # The best comes last, on top: where two classes overlap, the better one stays legible.
        for result in sorted(by_image.get(image_id, []), key=lambda r: r["score"]):
            label = label_of[result["category_id"]]
            x, y, w, h = (v * zoom for v in result["bbox"])
            draw_box(canvas, (x, y, x + w, y + h), class_colour(label),
                     f"{dataset.names[label]} {result['score']:.2f}")
        name, suffix = file_name(image_id), ".png" if zoom > 1 else ".jpg"
        while (key := f"{name}{suffix}".lower()) in used:  # "a/b" and "a_b", or "A" and "a"
            name += "_"
        used.add(key)
        image.save(folder / f"{name}{suffix}")


def draw_box(canvas: ImageDraw.ImageDraw, box, colour, text: str = ""):
    """Draws a box (x1, y1, x2, y2) with a label in its colour at the upper left corner."""
    x, y = box[0], box[1]
    canvas.rectangle(tuple(box), outline=colour, width=2)
    if text:
        place = (x + 2, y - 11 if y > 11 else y + 1)
        canvas.rectangle(canvas.textbbox(place, text), fill=colour)
        canvas.text(place, text, fill="black")


def class_colour(label: int) -> tuple[int, int, int]:
    """A bright RGB colour. Neighbouring labels lie far apart on the colour wheel."""
    return tuple(int(255 * v) for v in colorsys.hsv_to_rgb(label * GOLDEN_ANGLE % 1, 0.9, 1))


def enlarge(image: Image.Image) -> tuple[Image.Image, int]:
    """A small image enlarged so that text on it is legible, and the factor (1 for a large one)."""
    zoom = max(1, ENLARGED // max(image.size))
    return image.resize((image.width * zoom, image.height * zoom)), zoom


def file_name(image_id: int | str) -> str:
    """An image id as a file name without its suffix. Ids may contain folders."""
    return re.sub(r"[^\w.-]", "_", str(image_id))

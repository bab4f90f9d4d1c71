"""The built-in dataset: textured images with objects of eight shapes, drawn when they are read."""
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data import DataError, DetectionDataset
from layouts import layout, open_folder
from yolo import load_yolo

SHAPES_IMAGES = {"train": 4000, "val": 200}  # images of each split
SHAPES_SIDES = (96, 128)  # px; half of the images are wide, half are tall
SHAPES_OBJECT = (12, 96)  # px, range of an object's longer side
SHAPES_EMPTY = 0.05  # share of images without objects
SHAPES_MAX_OBJECTS = 6
SHAPES_OVERLAP = 0.4  # limit of the intersection of two boxes over the area of the smaller one
RING_HOLE = 0.55  # radius of the hole over the radius of the ring
SMOOTH = 4  # silhouettes are drawn this many times as large and then averaged


def _regular(points: int, inner: float = 1.0) -> np.ndarray:
    """Outline (n, 2) in [-1, 1] with a corner on top: a regular polygon, or with inner < 1 a star."""
    count = points if inner == 1 else 2 * points
    angle = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radius = np.where(np.arange(count) % 2, inner, 1.0) if inner < 1 else np.ones(count)
    return np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack((16 * np.sin(t) ** 3, -y), axis=1) / 16


# {class name: outline (n, 2)}. The last two classes are the novel ones of few-shot runs.
OUTLINES = {
    "disc": _regular(40),
    "square": np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _regular(3),
    "star": _regular(5, inner=0.42),
    "cross": np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3),
                       (.3, 1), (-.3, 1), (-.3, .3), (-1, .3), (-1, -.3), (-.3, -.3)]),
    "ring": _regular(40),  # `_silhouette` cuts its hole
    "arrow": np.array([(0, -1), (.8, 0), (.3, 0), (.3, 1), (-.3, 1), (-.3, 0), (-.8, 0)]),
    "heart": _heart(),
}


class Shapes(DetectionDataset):
    """The built-in dataset, the same on every machine and in every run.

    split: "train" or "val". Image i of a split depends on the split and on i alone.
    """

    def __init__(self, split: str):
        if split not in SHAPES_IMAGES:
            raise DataError(f"shapes has the splits {', '.join(SHAPES_IMAGES)}, not {split!r}")
        count = SHAPES_IMAGES[split]
        self.seed = list(SHAPES_IMAGES).index(split)
        scenes = [self._scene(i) for i in range(count)]
        objects = [(i, label, outline) for i, (_, scene) in enumerate(scenes) for label, outline in scene]
        super().__init__(
            OUTLINES, range(1, len(OUTLINES) + 1), image_ids=np.arange(1, count + 1),
            paths=[f"shapes_{split}_{i:05}" for i in range(count)], sizes=[size for size, _ in scenes],
            boxes=[[*outline.min(axis=0), *outline.max(axis=0)] for _, _, outline in objects],
            classes=[label for _, label, _ in objects], image_index=[i for i, _, _ in objects])

    def _scene(self, index: int) -> tuple[tuple[int, int], list[tuple[int, np.ndarray]]]:
        """Size (height, width) of an image and its objects [(label, outline (n, 2) px)], back to front."""
        rng = np.random.default_rng((self.seed, index, 0))
        size = SHAPES_SIDES if rng.random() < 0.5 else SHAPES_SIDES[::-1]
        wanted = 0 if rng.random() < SHAPES_EMPTY else rng.integers(1, SHAPES_MAX_OBJECTS + 1)
        objects, boxes = [], []
        for _ in range(20 * wanted):  # attempts: a crowded image may end up with fewer objects than wanted
            if len(objects) == wanted:
                break
            label = int(rng.integers(len(OUTLINES)))
            longer, narrower = rng.uniform(*SHAPES_OBJECT), rng.uniform(0.85, 1.0)
            turn = rng.uniform(-0.1, 0.1)
            cos, sin = math.cos(turn), math.sin(turn)
            outline = list(OUTLINES.values())[label] * (1, narrower) @ np.array([[cos, sin], [-sin, cos]])
            outline -= outline.min(axis=0)
            outline *= longer / outline.max()
            width, height = outline.max(axis=0).tolist()
            if width + 1 > size[1] or height + 1 > size[0]:
                continue
            x, y = rng.uniform(0, size[1] - width), rng.uniform(0, size[0] - height)
            box = (x, y, x + width, y + height)
            if all(_overlap_of_smaller(box, other) <= SHAPES_OVERLAP for other in boxes):
                objects.append((label, outline + (x, y)))
                boxes.append(box)
        return size, objects

    def image(self, index: int, shrink: float = 1.0) -> Image.Image:
        """Draws one image. shrink is ignored: there is no file to decode at a smaller size."""
        (height, width), objects = self._scene(index)
        rng = np.random.default_rng((self.seed, index, 1))
        base = rng.uniform(50, 205, 3)
        pixels = np.broadcast_to(base, (height, width, 3)).copy()
        for cells, strength in ((3, 40), (10, 15), (32, 10)):  # blurred noise at three scales, then grain
            noise = rng.uniform(-strength, strength, (cells, cells, 3)).astype(np.float32)
            for c in range(3):
                pixels[..., c] += np.asarray(
                    Image.fromarray(noise[..., c]).resize((width, height), Image.BICUBIC))
        grain = rng.normal(0, 4, pixels.shape)
        image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
        for label, outline in objects:
            colour = rng.uniform(0, 255, 3)
            while np.abs(colour - base).sum() < 180:
                colour = rng.uniform(0, 255, 3)
            stripes = (rng.uniform(-20, 20)
                       * np.sin(np.arange(width) * rng.uniform(0.1, 0.8) + rng.uniform(0, 6)))
            corner, end = outline.min(axis=0).astype(int), outline.max(axis=0).astype(int) + 1
            part = slice(corner[1], end[1]), slice(corner[0], end[0])
            texture = colour + stripes[None, part[1], None] + grain[part]
            mask = _silhouette(outline - corner, list(OUTLINES)[label] == "ring", *texture.shape[:2])
            image.paste(Image.fromarray(texture.clip(0, 255).astype(np.uint8)), tuple(corner.tolist()), mask)
        return image


def _overlap_of_smaller(box: tuple, other: tuple) -> float:
    """Intersection of two boxes over the area of the smaller one."""
    inter = (max(0, min(box[2], other[2]) - max(box[0], other[0]))
             * max(0, min(box[3], other[3]) - max(box[1], other[1])))
    return inter / min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))


def _silhouette(outline: np.ndarray, is_ring: bool, height: int, width: int) -> Image.Image:
    """Mask (height, width) with soft edges of an outline (n, 2) px."""
    mask = Image.new("L", (width * SMOOTH, height * SMOOTH))
    canvas = ImageDraw.Draw(mask)
    canvas.polygon([tuple(point) for point in outline * SMOOTH], fill=255)
    if is_ring:
        center = (outline.min(axis=0) + outline.max(axis=0)) / 2
        hole = center + (outline - center) * RING_HOLE
        canvas.polygon([tuple(point) for point in hole * SMOOTH], fill=0)
    return mask.reduce(SMOOTH)


def open_dataset(data: str, split: str, json_path: str | None = None, image_dir: str | None = None,
                 names: list[str] | None = None) -> DetectionDataset:
    """The dataset that --data names: "shapes", or a folder in one of the layouts of `layouts.layout`.

    split, json_path, image_dir and names: see `layouts.open_folder`. Raises DataError.
    """
    if not (json_path or image_dir) and layout(data) == "yolo":
        return load_yolo(Path(data), split.split("+"), names)
    if data != "shapes" or json_path or image_dir:
        return open_folder(data, split, json_path, image_dir, names)
    dataset = Shapes(split)
    if names and names != dataset.names:
        raise DataError(f"the model knows the classes {names}, but shapes has {dataset.names}")
    return dataset

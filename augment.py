"""Augmentation of training images beside the flip: random colours and crops. Every published recipe has none.

All random numbers come from the generator that is given, which `data.TrainSamples` makes for every draw.
"""
import numpy as np
from PIL import Image, ImageEnhance

AUGMENTATIONS = ("colour", "crop")
STRENGTH = 0.4  # brightness, contrast and saturation change by factors of 1 - STRENGTH to 1 + STRENGTH
HUE = 0.05  # largest turn of the hue, as a part of the colour wheel
CROP = (0.5, 1.0)  # side of a crop, as a fraction of the side of the image
CROP_SHARE = 0.5  # probability that an image is cropped
MIN_VISIBLE = 0.4  # a box with a smaller share of its area in the crop is dropped


def change_colours(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """An RGB image with another brightness, contrast, saturation and hue, the first three in random order."""
    enhancers = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for i in rng.permutation(len(enhancers)):
        image = enhancers[i](image).enhance(rng.uniform(1 - STRENGTH, 1 + STRENGTH))
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.asarray(hue) + np.uint8(round(256 * rng.uniform(-HUE, HUE)) % 256))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def random_crop(image: Image.Image, boxes: np.ndarray, labels: np.ndarray,
                rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A part of an image, with the same ratio of its sides, and the objects in it. Some images stay whole.

    boxes: (n, 4) px; labels: (n,). Boxes are cut at the border of the crop; those of which less than
    MIN_VISIBLE is left are dropped. Returns the image, boxes (m, 4) px of the crop, labels (m,).
    """
    if rng.random() >= CROP_SHARE:
        return image, boxes, labels
    scale = rng.uniform(*CROP)
    width, height = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    left, top = rng.integers(image.width - width + 1), rng.integers(image.height - height + 1)
    corner = np.array([left, top] * 2, boxes.dtype)
    cut = (boxes - corner).clip(0, np.array([width, height] * 2, boxes.dtype))
    area, visible = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, cut))
    kept = (visible > 0) & (visible >= MIN_VISIBLE * area)
    return image.crop((left, top, left + width, top + height)), cut[kept], labels[kept]

"""Detection datasets: images and their boxes, reading and resizing images, samples, batches.

A class is a label 0..C-1. A box is (x1, y1, x2, y2) in pixels and x2 - x1 wide. Category ids and other box
conventions exist only where a dataset is read (`layouts.py`) and in the files that are written out.
"""
import math
import mmap
import multiprocessing
import os
import signal
import time
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import Dataset, get_worker_info

from augment import change_colours, random_crop
from runtime import UserError, refuse_special

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"}
# gt_labels of a padding row and of a crowd region. A crowd is background in FCOS, RetinaNet and Faster R-CNN;
# FSAF ignores its middle. Scoring ignores it, and it is never a shot.
PADDING, CROWD = -1, -2
MAX_WORKERS = 256  # loader processes of one rank
WINDOW = 32  # steps whose draws are grouped by orientation, see TrainBatchSampler
PERMUTATION, STEP_ORDER, AUGMENTATION = range(3)  # first number of a seed: each has its own random numbers
BUCKETS = 4  # number of long sides in `shape_buckets`: 960, 1088, 1216, 1344 for COCO at 800/1333
# COCO's 80 classes in the order of their category ids, which have gaps.
COCO_CLASSES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,"
    "keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush").split(",")
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
# COCO's classes that VOC also has: the novel ones of the few-shot benchmark.
COCO_NOVEL = tuple("person,bicycle,car,motorcycle,airplane,bus,train,boat,bird,cat,dog,horse,sheep,cow,"
                   "bottle,chair,couch,potted plant,dining table,tv".split(","))
VOC_CLASSES = tuple("aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,"
                    "motorbike,person,pottedplant,sheep,sofa,train,tvmonitor".split(","))
# VOC's novel classes in the three published splits. The official order of a split is base, then novel.
VOC_NOVEL = {1: ("bird", "bus", "cow", "motorbike", "sofa"),
             2: ("aeroplane", "bottle", "cow", "horse", "sofa"),
             3: ("boat", "cat", "motorbike", "sheep", "sofa")}


class DataError(UserError):
    """The data cannot be used. The message names the file, the image, the annotation and the bad value."""


def read_text(path: Path) -> str:
    """A text file of the user's. Raises DataError if it cannot be read or is not UTF-8."""
    try:
        refuse_special(path)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from error


def check_names(names: list[str], source):
    """Raises DataError for a class name that is empty or holds control characters or lone surrogates."""
    for name in names:
        if not name.strip() or any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
            raise DataError(f"{source}: {ascii(name[:80])} cannot be a class name: it is empty or holds "
                            f"characters that cannot be shown")


# ---------------------------------------------------------------------------------------------- dataset

class DetectionDataset:
    """Images and their boxes in flat arrays. Forked loader processes share arrays but copy Python objects.

    C classes: names; category_ids as in the files.
    N images: image_ids; paths as bytes; sizes (N, 2) height, width in px.
    A boxes, sorted by image: boxes (A, 4) xyxy px; boxes_xywh (A, 4), the numbers of a COCO file, for scoring
    (x + w - x is not exactly w); classes (A,) int64 0..C-1; areas (A,) px^2, by default of the boxes; crowd
    and difficult (A,) bool; annotation_order (A,), the place of each box before sorting.
    notes: lines to print before training. voc: whether VOC's AP50 is scored, too. annotated: False for a file
    that holds images only, such as COCO's test-dev: there is nothing to score. The constructor takes the
    boxes in any order; image_index (A,) is the index of the image of each box.
    """

    def __init__(self, names, category_ids, *, image_ids, paths, sizes, boxes, classes, image_index,
                 boxes_xywh=None, areas=None, crowd=False, difficult=False, notes=(), voc=False,
                 annotated=True):
        self.names, self.category_ids = list(names), list(category_ids)
        self.notes, self.voc, self.annotated = list(notes), voc, annotated
        self.image_ids, self.paths = np.asarray(image_ids), np.array([os.fsencode(path) for path in paths])
        self.sizes = np.asarray(sizes, np.int64).reshape(-1, 2)
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        if boxes_xywh is None:
            boxes_xywh = np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
        if areas is None:
            areas = boxes_xywh[:, 2:].prod(axis=1)
        order = self.annotation_order = np.argsort(image_index, kind="stable")
        self.boxes_xywh = np.asarray(boxes_xywh, np.float64).reshape(-1, 4)[order]
        self.boxes, self.classes = boxes[order], np.asarray(classes, np.int64)[order]
        self.areas = np.asarray(areas, np.float64)[order]
        self.crowd = np.broadcast_to(np.asarray(crowd, bool), len(boxes))[order]
        self.difficult = np.broadcast_to(np.asarray(difficult, bool), len(boxes))[order]
        counts = np.bincount(np.asarray(image_index, np.int64), minlength=len(self.image_ids))
        self.box_offsets = np.concatenate(([0], np.cumsum(counts)))  # (N + 1,), see `box_slice`

    def __len__(self) -> int:
        return len(self.image_ids)

    def box_slice(self, index: int) -> slice:
        """Rows of `boxes` and the other per-box arrays that belong to image `index`."""
        return slice(int(self.box_offsets[index]), int(self.box_offsets[index + 1]))

    @property
    def box_image(self) -> np.ndarray:
        """(A,) int64 index of the image of every box."""
        return np.repeat(np.arange(len(self)), np.diff(self.box_offsets))

    def index_of_image(self) -> dict:
        """{image id: index}."""
        return {image_id: index for index, image_id in enumerate(self.image_ids.tolist())}

    def label_of_category(self) -> dict:
        """{category id: label}."""
        return {category: label for label, category in enumerate(self.category_ids)}

    def max_objects(self) -> int:
        """The largest number of boxes in one image, at least 1."""
        return max(1, int(np.diff(self.box_offsets).max(initial=0)))

    def image(self, index: int, shrink: float = 1.0) -> Image.Image:
        """`read_image` of one image. Raises DataError if it is broken or differs from its annotated size."""
        return read_image(os.fsdecode(self.paths[index]), tuple(self.sizes[index].tolist()), shrink)

    def objects(self, index: int, use_difficult: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """What one image trains on: boxes (n, 4) float32 px, clipped to the image, and labels (n,) int64.

        A crowd has the label CROWD. Boxes under 1 px are left out, and VOC's difficult ones by default.
        """
        rows = self.box_slice(index)
        height, width = self.sizes[index]
        boxes = self.boxes[rows].clip(0, (width, height, width, height))
        labels = np.where(self.crowd[rows], CROWD, self.classes[rows])
        keep = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(axis=1)
        if not use_difficult:
            keep &= ~self.difficult[rows]
        return boxes[keep].astype(np.float32), labels[keep]

    def non_empty(self, use_difficult: bool = False) -> np.ndarray:
        """Indices of the images with at least one object to train on. Crowds do not count."""
        return np.array([i for i in range(len(self)) if (self.objects(i, use_difficult)[1] >= 0).any()],
                        np.int64)

    def table(self) -> str:
        """Every class with its index, category id and counts: worth reading before every training."""
        width, box_image = max(map(len, [*self.names, "class"])), self.box_image
        lines = [f"{'class':{width}}  index  id     images    boxes"]
        for i, (name, category) in enumerate(zip(self.names, self.category_ids)):
            images = box_image[self.classes == i]
            lines.append(f"{name:{width}}  {i:5}  {category!s:5} {len(np.unique(images)):8} {len(images):8}")
        empty = int((np.diff(self.box_offsets) == 0).sum())
        lines.append(f"{len(self)} images ({empty} without boxes), {len(self.boxes)} boxes"
                     f" ({int(self.crowd.sum())} crowds, {int(self.difficult.sum())} difficult)")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- samples

def read_image(path: str, size: tuple[int, int] | None = None, shrink: float = 1.0) -> Image.Image:
    """Any image that Pillow reads, as upright RGB (EXIF orientation applied).

    size: (height, width) that it must have; a file of another size is not decoded. shrink: factor by which
    the caller will reduce it. A JPEG is decoded at 1/2, 1/4 or 1/8 if that factor is at most `shrink` and
    divides both sides. A remainder would shift the image against its boxes. Raises DataError for a missing or
    broken file or another size.
    """
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        raise DataError(f"{path}: there is no such image file")
    try:
        with Image.open(path) as image:
            width, height = image.size
            if size:
                _check_size(path, sorted((height, width)), sorted(size))  # not decoded: it could be huge
            factor = next((n for n in (8, 4, 2) if n <= shrink and width % n == height % n == 0), 1)
            image.draft(None, (width // factor, height // factor))  # has no effect on formats other than JPEG
            image.load()
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # turned by 90 degrees
                width, height = height, width
            image = upright_rgb(image)
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything for a damaged file
        raise DataError(f"{path}: cannot be read as an image ({error or type(error).__name__})") from error
    if size:
        _check_size(path, (height, width), size)
    return image


def _check_size(path: str, found, annotated):
    """found, annotated: (height, width), both sorted while the orientation is not known."""
    if tuple(found) != tuple(annotated):
        raise DataError(f"{path}: the image is {found[1]} x {found[0]} (EXIF orientation applied), but its "
                        f"annotation says {annotated[1]} x {annotated[0]}, so its boxes cannot be placed")


def upright_rgb(image: Image.Image) -> Image.Image:
    """A Pillow image of any mode as upright RGB (EXIF orientation applied)."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 and 32 bits, which Pillow would cut at 255
        pixels = np.asarray(image, np.float32)
        pixels = pixels / 257 if pixels.max() > 255 else pixels
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def try_images(read: Callable[[int], object], count: int,
               progress: Callable | None) -> tuple[list, dict[int, str]]:
    """Calls read(i) for every image, in parallel.

    progress: such as `runlog.Progress`. Returns the results and {index: what is wrong} for a DataError.
    """
    def attempt(i: int):
        try:
            return read(i)
        except DataError as error:
            return error

    results, shown = [], progress("reading", count) if progress else None
    with ThreadPool(min(8, os.cpu_count() or 1)) as pool:
        for result in pool.imap(attempt, range(count)):
            results.append(result)
            if shown:
                shown.add(1)
    return results, {i: str(result) for i, result in enumerate(results) if isinstance(result, DataError)}


def broken_images(dataset: DetectionDataset, rank: int = 0, world: int = 1,
                  progress: Callable | None = None) -> dict[int, str]:
    """Decodes every world-th image of a dataset: {index: what is wrong} of those that cannot be read."""
    mine = range(rank, len(dataset), world)

    def read(i: int):
        dataset.image(mine[i], 8.0)  # a JPEG is read whole, but decoded at an eighth of its size
    return {mine[i]: message for i, message in try_images(read, len(mine), progress)[1].items()}


def resized_shape(height: int, width: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(height, width) with a short side of min_size, or a long side of max_size if that is smaller."""
    scale = min(max_size / max(height, width), min_size / min(height, width))
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes (h, w, 3) uint8, bilinear and antialiased. torch needs a third of Pillow's time for it."""
    if image.shape[:2] == (height, width):
        return image
    planes = torch.from_numpy(image).permute(2, 0, 1)[None]
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def sample_without_objects(image: np.ndarray, original_size: tuple[int, int],
                           image_id=0, index: int = 0) -> dict:
    """An image (h, w, 3) uint8 at network size as a sample, see `load_sample`."""
    return {"image": image, "boxes": np.zeros((0, 4), np.float32), "labels": np.zeros(0, np.int64),
            "image_id": image_id, "index": index, "original_size": original_size}


def load_sample(dataset: DetectionDataset, index: int, min_size: int, max_size: int, flip: bool = False,
                use_difficult: bool = False, augment: tuple[str, ...] = (),
                rng: np.random.Generator | None = None) -> dict:
    """One image and its objects at network size.

    augment: some of `augment.AUGMENTATIONS`, which draw from rng.
    Returns {"image" (h, w, 3) uint8, "boxes" (n, 4) float32 px of the resized image, "labels" (n,) int64,
    "image_id", "index", "original_size" (height, width)}.
    """
    if worker := get_worker_info():
        text = f"image {dataset.image_ids[index]} ({os.fsdecode(dataset.paths[index])})"
        _in_progress[worker.id] = os.getpid(), text.encode()
    height, width = original_size = dataset.sizes[index].tolist()
    new_height, new_width = resized_shape(height, width, min_size, max_size)
    shrink = min(height / new_height, width / new_width)
    image = dataset.image(index, shrink if "crop" not in augment else 1.0)
    boxes, labels = dataset.objects(index, use_difficult)
    if "crop" in augment:
        image, boxes, labels = random_crop(image, boxes, labels, rng)
        width, height = image.size
        new_height, new_width = resized_shape(height, width, min_size, max_size)
    if "colour" in augment:
        image = change_colours(image, rng)
    boxes = boxes * np.array([new_width / width, new_height / height] * 2, np.float32)
    if flip:
        image = image.transpose(Image.FLIP_LEFT_RIGHT)
        boxes = np.stack((new_width - boxes[:, 2], boxes[:, 1], new_width - boxes[:, 0], boxes[:, 3]), axis=1)
    return {"image": resize(np.array(image), new_height, new_width), "boxes": boxes, "labels": labels,
            "image_id": dataset.image_ids[index].item(), "index": index,
            "original_size": tuple(original_size)}


def ignore_signals(worker: int):
    """For DataLoader's worker_init_fn: a loader process ignores Ctrl-C and SIGTERM.

    Schedulers and torchrun send them to every process. The training finishes its step with the loader's help,
    and then `runtime.run_main` ends the loader. After kill -9 of the training it ends by itself in seconds.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


# What each loader process is reading, in memory that forked processes share and that survives them.
_in_progress = np.frombuffer(mmap.mmap(-1, MAX_WORKERS * 1024), [("process", "i8"), ("image", "S1016")])


def death_of_a_loader(error: Exception) -> str | None:
    """One line that names the image on which a loader process died; None for any other error.

    The system kills a process that needs too much memory, and a library can crash. torch then raises a
    RuntimeError wherever the program is, unless the connection to the process breaks first.
    """
    if isinstance(error, (ConnectionError, EOFError)):
        with suppress(RuntimeError):  # torch notices the same death a moment later
            time.sleep(1)
    elif not str(error).startswith("DataLoader worker"):
        return None
    alive = [process.pid for process in multiprocessing.active_children()]
    dead = (_in_progress["process"] > 0) & ~np.isin(_in_progress["process"], alive)
    if not dead.any():
        return None
    image = _in_progress["image"][dead][0].decode(errors="replace")
    reason = str(error).splitlines()[0].rstrip(". ")
    return f"a loader process died at {image} ({reason}). Is memory short? Fewer --workers need less"


def collate(samples: list[dict], size_divisor: int = 32, shapes: list[tuple[int, int]] | None = None,
            min_objects: int = 1) -> dict:
    """Samples of `load_sample` as one batch (the tensor contract of the models).

    Returns images (B, 3, H, W) uint8, zero-padded at the right and bottom; sizes (B, 2) int64 height, width
    before padding; gt_boxes (B, G, 4) float32; gt_labels (B, G) int64, PADDING in rows without an object,
    G >= min_objects; original_sizes (B, 2); lists image_ids, indices, broken. (H, W) is the first of `shapes`
    that holds all images, by default the smallest multiples of size_divisor. Raises DataError if none does.
    """
    sizes = torch.tensor([sample["image"].shape[:2] for sample in samples])
    height, width = sizes.amax(dim=0).tolist()
    if shapes is None:
        shapes = [(-(-height // size_divisor) * size_divisor, -(-width // size_divisor) * size_divisor)]
    large_enough = [shape for shape in shapes if height <= shape[0] and width <= shape[1]]
    if not large_enough:
        raise DataError(f"images of {height} x {width} (height, width) fit none of the sizes {shapes}")
    num_objects = max(min_objects, *(len(sample["labels"]) for sample in samples))
    images = torch.zeros(len(samples), 3, *large_enough[0], dtype=torch.uint8)
    gt_boxes = torch.zeros(len(samples), num_objects, 4)
    gt_labels = torch.full((len(samples), num_objects), PADDING)
    for i, (sample, (h, w)) in enumerate(zip(samples, sizes.tolist())):
        n = len(sample["labels"])
        images[i, :, :h, :w] = torch.from_numpy(sample["image"]).permute(2, 0, 1)
        gt_boxes[i, :n] = torch.from_numpy(sample["boxes"])
        gt_labels[i, :n] = torch.from_numpy(sample["labels"])
    return {"images": images, "sizes": sizes, "gt_boxes": gt_boxes, "gt_labels": gt_labels,
            "image_ids": [sample["image_id"] for sample in samples], "indices": [s["index"] for s in samples],
            "original_sizes": torch.tensor([sample["original_size"] for sample in samples]),
            "broken": [sample["broken"] for sample in samples if "broken" in sample]}


def check_pad_to(dataset: DetectionDataset, min_sizes: list[int], max_size: int, pad_to: tuple[int, int]):
    """Raises DataError if a resized image of the dataset is larger than the input size pad_to."""
    for i, (height, width) in enumerate(dataset.sizes.tolist()):
        for min_size in min_sizes:
            shape = resized_shape(height, width, min_size, max_size)
            if shape[0] > pad_to[0] or shape[1] > pad_to[1]:
                raise DataError(f"image {dataset.image_ids[i]} is {shape[0]} x {shape[1]} (height, width) "
                                f"after resizing: it does not fit --pad-to {pad_to[0]} {pad_to[1]}")


def shape_buckets(dataset: DetectionDataset, min_size: int, max_size: int) -> list[tuple[int, int]]:
    """A few batch shapes (height, width), so that a training step can be compiled once for each.

    They are multiples of 32, smallest first: the largest short side with BUCKETS long sides, wide and tall,
    and a square for both orientations. One of them holds any batch. min_size: the largest in training.
    """
    shapes = np.array([resized_shape(height, width, min_size, max_size) for height, width in dataset.sizes])
    short, shortest, longest = shapes.min(axis=1).max(), shapes.max(axis=1).min(), shapes.max()
    longs = shortest + (longest - shortest) * np.arange(1, BUCKETS + 1) / BUCKETS
    short, *longs = (32 * math.ceil(side / 32) for side in (short, *longs))
    wide = {(short, max(short, long)) for long in longs}
    return sorted(wide | {(width, height) for height, width in wide} | {(longs[-1], longs[-1])},
                  key=lambda shape: (sum(shape), shape))


class TrainSamples(Dataset):
    """Augmented samples of a training set. An item is requested as a draw of `TrainBatchSampler`.

    Flip, short side and augmentation depend on (seed, position) alone, not on a loader process, a rank or a
    restart. A broken image becomes a black one without objects, with what is wrong under "broken": the
    training decides.
    """

    def __init__(self, dataset: DetectionDataset, min_sizes: list[int], max_size: int, flip: bool = True,
                 use_difficult: bool = False, seed: int = 0, augment: tuple[str, ...] = ()):
        self.dataset, self.min_sizes, self.max_size = dataset, list(min_sizes), max_size
        self.flip, self.use_difficult, self.seed, self.augment = flip, use_difficult, seed, augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        if not isinstance(key, tuple):
            raise DataError("TrainSamples takes (position, index): give its DataLoader "
                            "batch_sampler=TrainBatchSampler(...) and collate_fn=collate")
        position, index = key
        rng = np.random.default_rng((AUGMENTATION, self.seed, position))
        min_size = self.min_sizes[rng.integers(len(self.min_sizes))]
        flip = self.flip and rng.random() < 0.5
        try:
            return load_sample(self.dataset, index, min_size, self.max_size, flip, self.use_difficult,
                               self.augment, rng)
        except DataError as error:
            height, width = self.dataset.sizes[index].tolist()
            blank = np.zeros((*resized_shape(height, width, min_size, self.max_size), 3), np.uint8)
            image_id = self.dataset.image_ids[index].item()
            return {**sample_without_objects(blank, (height, width), image_id, index), "broken": str(error)}


class TestSamples(Dataset):
    """Samples for detection: every image once, at one size."""

    def __init__(self, dataset: DetectionDataset, min_size: int, max_size: int):
        self.dataset, self.min_size, self.max_size = dataset, min_size, max_size

    def __getitem__(self, index: int) -> dict:
        return load_sample(self.dataset, index, self.min_size, self.max_size)

    def __len__(self) -> int:
        return len(self.dataset)


class TrainBatchSampler:
    """Batch sampler of training: an endless sequence of draws, cut into steps.

    The sequence is one permutation of `indices` after another, so every image is drawn equally often. The
    draws of `window` steps are sorted, wide images before tall ones, and cut into steps, which are shuffled.
    At most one of these steps holds both orientations, so that padding wastes little. With a window of one
    step, a step holds successive draws, as in detectron2.

    The sequence depends on the seed alone. Rank r of `world` gets the r-th part of every step, in
    `accumulate` micro-batches. All ranks together see the same images for any `world` and `accumulate`.
    Yields lists of draws (position in the sequence, index), from step `start` up to `stop`.
    """

    def __init__(self, dataset: DetectionDataset, indices: np.ndarray, batch_size: int, seed: int = 0,
                 rank: int = 0, world: int = 1, accumulate: int = 1, start: int = 0, stop: int = 0,
                 window: int = WINDOW):
        self.indices, self.batch_size, self.seed, self.window = np.asarray(indices), batch_size, seed, window
        self.wide = dataset.sizes[:, 1] >= dataset.sizes[:, 0]
        self.rank, self.world, self.accumulate, self.start, self.stop = rank, world, accumulate, start, stop
        self.steps_per_epoch = -(-len(self.indices) // batch_size)

    def steps(self, window: int) -> np.ndarray:
        """(self.window, batch_size, 2) int64 of one window: position and image index of every draw."""
        draws = self.window * self.batch_size
        position = np.arange(window * draws, (window + 1) * draws)
        epoch, place = np.divmod(position, len(self.indices))
        index = np.concatenate([
            np.random.default_rng((PERMUTATION, self.seed, e)).permutation(self.indices)[place[epoch == e]]
            for e in range(epoch[0], epoch[-1] + 1)])
        order = np.argsort(~self.wide[index], kind="stable")
        steps = np.stack((position, index), axis=1)[order].reshape(self.window, self.batch_size, 2)
        return np.random.default_rng((STEP_ORDER, self.seed, window)).permutation(steps)

    def __iter__(self):
        micro_batch = self.batch_size // (self.world * self.accumulate)
        current = None
        for step in range(self.start, self.stop):
            window, place = divmod(step, self.window)
            if window != current:
                current, steps = window, self.steps(window)
            mine = steps[place].reshape(self.world, self.accumulate, micro_batch, 2)[self.rank]
            for part in mine.tolist():
                yield [tuple(draw) for draw in part]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulate


class SameSizeBatchSampler(list):
    """Batch sampler of detection: lists of indices of images that have the same size after resizing.

    Without padding, results do not depend on the batch. Rank r of `world` gets every world-th batch.
    """

    def __init__(self, dataset: DetectionDataset, min_size: int, max_size: int, batch_size: int, rank: int,
                 world: int):
        shapes = [resized_shape(h, w, min_size, max_size) for h, w in dataset.sizes.tolist()]
        batches = []
        for i in sorted(range(len(dataset)), key=lambda i: shapes[i]):
            if not batches or len(batches[-1]) == batch_size or shapes[batches[-1][0]] != shapes[i]:
                batches.append([])
            batches[-1].append(i)
        super().__init__(batches[rank::world])

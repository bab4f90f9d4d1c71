"""Boxes on images; curves of runs and of precision over recall, with matplotlib if it is installed."""
import colorsys
import json
import re
from pathlib import Path

from PIL import Image, ImageDraw

from data import IMAGE_SUFFIXES, DataError, DetectionDataset
from runtime import blame

ENLARGED = 512  # px; smaller images are drawn at a multiple of their size that fits in this
GOLDEN_ANGLE = 0.381966  # as a fraction of the colour wheel
DRAWABLE = 1e30  # larger numbers of a log are left out of its curves
DRAW_THRESHOLD = 0.2  # detections with a lower score are not drawn


def draw_detections(dataset: DetectionDataset, results: list[dict], folder: Path, count: int,
                    threshold: float = DRAW_THRESHOLD, groups: list[list[str]] | None = None):
    """Draws the first `count` images of the dataset into `folder`, which is made if needed.

    Objects are white. Detections with a score of at least `threshold` have the colour of their class and show
    its name and the score. results: COCO result format. groups: lists of class names; if two or more are not
    empty, the classes of a list have one colour. Two image ids never share a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    colours = [class_colour(label) for label in range(len(dataset.names))]
    if groups and sum(map(bool, groups)) > 1:
        group_of = {name: number for number, names in enumerate(groups) for name in names}
        colours = [class_colour(group_of[name]) for name in dataset.names]
    label_of = dataset.label_of_category()
    by_image, names = {}, file_names(dataset.image_ids[:count].tolist())
    for result in results:
        if result["score"] >= threshold:
            by_image.setdefault(result["image_id"], []).append(result)
    for i, name in enumerate(names):
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
            draw_box(canvas, (x, y, x + w, y + h), colours[label],
                     f"{dataset.names[label]} {result['score']:.2f}")
        image.save(folder / f"{name}{'.png' if zoom > 1 else '.jpg'}")


def draw_errors(dataset: DetectionDataset, worst: list, folder: Path):
    """Draws images with what is wrong in them. worst: from `analysis.image_errors`.

    Objects that were found are white, missed ones red; right detections are green, wrong ones orange and say
    what is wrong. The files are numbered, the worst image first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    label_of = dataset.label_of_category()
    for number, errors in enumerate(worst, start=1):
        image, zoom = enlarge(dataset.image(errors.index))
        canvas = ImageDraw.Draw(image)
        rows = dataset.box_slice(errors.index)
        for row in range(rows.start, rows.stop):
            missed = row in errors.missed
            name = dataset.names[dataset.classes[row]]
            draw_box(canvas, dataset.boxes[row] * zoom, (255, 60, 60) if missed else (255, 255, 255),
                     f"missed {name}" if missed else name)
        for result, wrong in errors.found:
            x, y, w, h = (value * zoom for value in result["bbox"])
            name = dataset.names[label_of[result["category_id"]]]
            draw_box(canvas, (x, y, x + w, y + h), (255, 170, 0) if wrong else (60, 220, 60),
                     f"{name} {result['score']:.2f} {wrong}".strip())
        name = file_name(dataset.image_ids[errors.index].item())
        image.save(folder / f"{number:03}_F1_{errors.f1:.2f}_{name}{'.png' if zoom > 1 else '.jpg'}")


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
    """An image id as a file name without a suffix. Ids may be paths of images."""
    path = Path(str(image_id))
    path = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
    return re.sub(r"[^\w.-]", "_", str(path))


def file_names(image_ids: list) -> list[str]:
    """`file_name` of every id. Where two ids would share a file, such as a/b and a_b, one gets a "_" more."""
    names, used = [], set()
    for image_id in image_ids:
        name = file_name(image_id)
        while name.lower() in used:  # a file system may not tell A from a
            name += "_"
        used.add(name.lower())
        names.append(name)
    return names


# ---------------------------------------------------------------------------------------------- curves

def figure_of(rows: int, columns: int):
    """A figure of matplotlib and its axes. Raises DataError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # without pyplot: no window, no global state
    except ImportError as error:
        raise DataError(f"curves need matplotlib: pip install matplotlib ({error})") from error
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).flatten()


def _numbers_of_log(path: Path) -> list[dict[str, float]]:
    """The rows of log.jsonl, without what is not a number that can be drawn."""
    if not path.is_file():
        raise DataError(f"{path.parent}: has no log.jsonl, so it is no run of train.py")
    with blame(path, DataError, "is no log of train.py"):
        rows = [{key: value for key, value in json.loads(line).items()
                 if isinstance(value, (int, float)) and abs(value) < DRAWABLE}
                for line in path.read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "step" in row]


def draw_runs(folders: list[Path], path: Path):
    """Draws what log.jsonl of every run holds over its steps: each loss term, the lr, AP and AP50.

    Raises DataError for a run without log.jsonl, or if matplotlib is missing.
    """
    runs = {str(folder): _numbers_of_log(folder / "log.jsonl") for folder in folders}
    other = ("step", "epoch", "data_s", "step_s", "images_per_s", "memory_gb", "eta_s", "graphs")
    names = dict.fromkeys(name for rows in runs.values() for row in rows if "loss" in row
                          for name in row if name not in other)
    figure, axes = figure_of(-(-(len(names) + 1) // 3), 3)
    for axis, name in zip(axes, [*names, "AP"]):
        for folder, rows in runs.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points), marker="." if name == "AP" else None, label=folder)
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    for axis in axes[len(names) + 1:]:
        axis.set_axis_off()
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def draw_precision_recall(curves: dict[str, dict], path: Path):
    """Draws precision over recall of every class. curves: from `analysis.precision_recall`.

    A dot marks the threshold with the best F1. Raises DataError if matplotlib is missing.
    """
    figure, (axis,) = figure_of(1, 1)
    figure.set_size_inches(7, 6)
    for i, (name, curve) in enumerate(curves.items()):
        if curve["threshold"] is None:
            continue
        colour = [value / 255 for value in class_colour(i)]
        axis.plot(curve["recall"], curve["precision"], color=colour,
                  label=f"{name}: F1 {curve['f1']:.2f} at {curve['threshold']:.2f}")
        best = curve["recall"].index(curve["best_recall"])
        axis.plot(curve["best_recall"], curve["precision"][best], "o", color=colour)
    axis.set(xlabel="recall", ylabel="precision, IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=110)

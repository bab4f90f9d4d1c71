"""Damages inputs at random and reads them. Prints every traceback; the exit status is their number.

    python fuzz.py KIND,KIND SEED COUNT
"""
import contextlib
import copy
import io
import json
import pickle
import random
import resource
import signal
import sys
import tempfile
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import numpy as np
import torch
from PIL import Image

import backbone
import benchmark
import browse
import checkpoint
import evaluate
import export
import fewshot
import layouts
import metrics
import protocol
import recipes
import runtime
import train
from data import read_image
from shapes import open_dataset
from weights import read_file, read_weight_file

CASE_SECONDS = 20
MEMORY = 3 * 2 ** 30  # that a case may take on top
ODD = [None, True, -1, 0, 2.5, 1e308, float("nan"), float("inf"), 2 ** 63, 2 ** 70, -10 ** 400, "", "x",
       "\x1b[2J", "\ud800", "../../x", "n" * 300, "\0", [], [1], [[]], {}, {"a": 1}, ["a", 1], b"b"]


def damaged(content, rng: random.Random):
    """A copy with one to three of its values, anywhere, replaced, removed, repeated or swapped."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        parent, key, value = None, None, content
        while isinstance(value, (dict, list)) and len(value) and (parent is None or rng.random() < 0.9):
            parent = value
            key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
            value = parent[key]
        if parent is None:
            continue
        action = rng.random()
        if action < 0.2:
            del parent[key]
        elif action < 0.3 and isinstance(parent, list):
            parent.append(copy.deepcopy(value))
        elif action < 0.35 and isinstance(value, torch.Tensor):
            parent[key] = rng.choice([value.flatten()[:1], value.double(), value * float("nan"), value.bool(),
                                      value.new_zeros(1).expand(10 ** 9), value.to_sparse(), value.cfloat()])
        else:
            parent[key] = copy.deepcopy(rng.choice(ODD))
    return content


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Bytes with some of them changed, removed, doubled or cut off."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 2, 8, 64])):
        at = rng.randrange(len(content))
        action = rng.random()
        if action < 0.6:
            content[at] = rng.randrange(256)
        elif action < 0.75:
            del content[at:at + rng.choice([1, 4, 64])]
        elif action < 0.9:
            content[at:at] = content[at:at + rng.choice([1, 4, 64])]
        elif action < 0.93:
            del content[at:]
        if not content:
            break
    return bytes(content)


# ---------------------------------------------------------------------------- kinds: folder -> case function

def pickles(folder: Path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    content = {"blobs": {"conv1_w": array.copy("F"), "n": np.float32(1), "b": array > 2, "s": "t"},
               "cfg": ["x", {"y": 1}]}
    whole = [pickle.dumps(content, protocol) for protocol in range(2, 6)]

    def case(rng):
        path = folder / "x.pkl"
        path.write_bytes(flipped(rng.choice(whole), rng))
        for value in read_weight_file(path).values():
            value.double().sum().item()
    return case


def _training(folder: Path) -> dict:
    """A small checkpoint of a training in folder/run."""
    backbone.ARCHITECTURES["resnet18"] = ((1, 1, 1, 1), False, 1, 64)
    sys.argv = ["train.py", "--train-split", "val", "--no-eval", "--max-steps", "1", "--batch-size", "2",
                "--workers", "0", "--min-size", "64", "--max-size", "64", "--device", "cpu",
                "--out", str(folder / "run")]
    train.main()
    return torch.load(folder / "run" / "last.pth", weights_only=True)


def checkpoints(folder: Path):
    whole = _training(folder)
    path = folder / "run" / "last.pth"

    def case(rng):
        torch.save(damaged(whole, rng), path)
        if rng.random() < 0.5:
            model, info = checkpoint.load_model(path)
            evaluate.detect_image(model, info, Image.new("RGB", (40, 30)))
            sys.argv = ["evaluate.py", "--ckpt", str(path), "--images", str(folder), "--device", "cpu"]
            args = evaluate.parse_args()
            args.images = None
            evaluate.choose_dataset(args, info).table()
        else:
            sys.argv = ["train.py", "--resume", str(path), "--max-steps", "2", "--device", "cpu",
                        "--workers", "0", "--no-eval"]
            train.main()
    return case


def archives(folder: Path):
    whole, path = io.BytesIO(), folder / "x.pth"
    torch.save({"state_dict": {"conv1.weight": torch.arange(50.0)}, "meta": {"epoch": 1}}, whole)

    def case(rng):
        path.write_bytes(flipped(whole.getvalue(), rng))
        read_file(path)
    return case


def _image(path: Path, size=(20, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise(size, 50).convert("RGB").save(path)


def coco_files(folder: Path):
    for name in ("a", "b"):
        _image(folder / "val2017" / f"{name}.jpg")
    path = folder / "annotations" / "instances_val2017.json"
    path.parent.mkdir()
    whole = {"images": [{"id": 1, "file_name": "a.jpg", "width": 20, "height": 10},
                        {"id": 2, "file_name": "b.jpg", "width": 20, "height": 10}],
             "categories": [{"id": 1, "name": "cat"}, {"id": 5, "name": "dog"}],
             "annotations": [{"id": i, "image_id": 1 + i % 2, "category_id": [1, 5][i // 2], "area": 9.5,
                              "iscrowd": i // 3, "bbox": [1.5, 2, 7, 4 + i]} for i in range(4)]}

    def case(rng):
        if rng.random() < 0.7:
            text = json.dumps(damaged(whole, rng), default=str)
            path.write_bytes(text.encode())
        else:
            path.write_bytes(flipped(json.dumps(whole).encode(), rng))
        _use(layouts.open_folder(str(folder), "val2017"))
    return case


def _use(dataset):
    """What a training and a scoring do with a dataset."""
    runtime.print0(dataset.table(), *dataset.notes)
    for i in range(len(dataset)):
        dataset.objects(i)
        with contextlib.suppress(runtime.UserError):
            dataset.image(i)
    metrics.score(dataset, [{"image_id": dataset.image_ids[0].item(), "category_id": dataset.category_ids[0],
                             "bbox": [0, 0, 5, 5], "score": 0.5}])


def voc_files(folder: Path):
    _image(folder / "JPEGImages" / "a.jpg")
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    listing = folder / "ImageSets" / "Main" / "val.txt"
    text = ("<?xml version='1.0' encoding='utf-8'?><annotation><filename>a.jpg</filename><size>"
            "<width>20</width><height>10</height></size><object><name>cat</name><difficult>0</difficult>"
            "<bndbox><xmin>1</xmin><ymin>2.5</ymin><xmax>9</xmax><ymax>8</ymax></bndbox></object></annotation>")
    words = ["inf", "nan", "-1", "1e400", "9" * 400, "&lt;", "\x1b", "utf-16", "x", "", "<a>", "]]>"]

    def case(rng):
        changed = text
        if rng.random() < 0.5:
            old = rng.choice(["20", "10", "cat", "0", "1<", "2.5", "utf-8", "a.jpg", "bndbox", "<name>"])
            changed = text.replace(old, rng.choice(words), 1)
        content = changed.encode()
        (folder / "Annotations" / "a.xml").write_bytes(content if changed != text else flipped(content, rng))
        listing.write_bytes(b"a\n" if rng.random() < 0.8 else flipped(b"a 1\nb\n", rng))
        _use(layouts.open_folder(str(folder), "val"))
    return case


def yolo_files(folder: Path):
    _image(folder / "images" / "val" / "a.jpg")
    label = folder / "labels" / "val" / "a.txt"
    label.parent.mkdir(parents=True)

    def case(rng):
        parts = [b"names: [cat, dog]\ntrain: images/train\nval: images/val\n",
                 b"0 0.5 0.5 0.2 0.4\n1 .1 .2 .1 .1\n"]
        at = rng.randrange(2)
        parts[at] = flipped(parts[at], rng)
        (folder / "data.yaml").write_bytes(parts[0])
        label.write_bytes(parts[1])
        _use(open_dataset(str(folder), "val"))
    return case


def result_files(folder: Path):
    dataset = open_dataset("shapes", "val")
    whole = [{"image_id": 1 + i, "category_id": 1 + i % 3, "bbox": [1.0, 2, 30, 40], "score": 0.5}
             for i in range(6)]
    path = folder / "detections.json"

    def case(rng):
        text = json.dumps(damaged(whole, rng) if rng.random() < 0.7 else whole, default=str).encode()
        path.write_bytes(text if rng.random() < 0.7 else flipped(text, rng))
        metrics.score(dataset, metrics.read_results(path))
    return case


def metrics_files(folder: Path):
    few_shot = {"stage": "novel", "data": "coco", "model": "defrcn", "backbone": "resnet101", "cosine": False,
                "novel": ["a", "b"], "decouple": [0.0, 0.01], "fpn": False, "calibrated": True, "shots": 5,
                "generalized": False, "seed": 0, "shot_seed": 0, "nAP": 0.1, "nAP50": 0.2, "bAP": None}
    whole = {"AP": 0.1, "per_class": {"a": 0.1, "b": None}, "few_shot": few_shot}
    whole["before_calibration"] = {"AP": 0.1, "few_shot": {**few_shot, "calibrated": False}}
    path = folder / "metrics.json"

    def case(rng):
        text = json.dumps(damaged(whole, rng) if rng.random() < 0.7 else whole, default=str).encode()
        path.write_bytes(text if rng.random() < 0.7 else flipped(text, rng))
        runs = protocol.read_runs([folder])
        protocol.aggregate_table(protocol.aggregate(runs))
    return case


def images(folder: Path):
    whole = {}
    for suffix in ("jpg", "png", "gif", "bmp", "webp", "tif"):
        _image(folder / f"x.{suffix}", (60, 40))
        whole[suffix] = (folder / f"x.{suffix}").read_bytes()

    def case(rng):
        suffix = rng.choice(list(whole))
        path = folder / f"y.{suffix}"
        path.write_bytes(flipped(whole[suffix], rng))
        read_image(str(path), rng.choice([None, (40, 60)]), rng.choice([1.0, 4.0]))
    return case


def commands(folder: Path):
    words = """--data shapes --model fcos defrcn --ckpt x.pth --min-size -1 0 1e9 nan inf x --workers 262
        --out /dev/null --shots 5 --stage novel --lr --batch-size 7 --pad-to 64 96 --images --detections
        --split val+ --json --classes a,b a,,b --size --count --rounds --models --epochs --help
        --score-threshold --device cpu npu --amp fp16 --resume --init --train-json a+b --loss-scale
        --novel-classes --levels --log 99999999999999999999""".split() + ["", "\x1b[2J"]
    mains = {"train": lambda: recipes.parse_args(), "evaluate": evaluate.main, "browse": browse.main,
             "export": export.main, "fewshot": fewshot.main, "benchmark": benchmark.main}
    benchmark.PARTS = {}  # only the arguments: no measuring

    def case(rng):
        name = rng.choice(list(mains))
        first = {"fewshot": ["aggregate", "convert", "x"], "benchmark": ["train", "nms", "x"]}.get(name)
        sys.argv = [f"{name}.py", *([rng.choice(first)] if first else []),
                    *(rng.choice(words) for _ in range(rng.randint(0, 6)))]
        if name == "benchmark" and not {"x"} & set(sys.argv):
            sys.argv.append("--rounds")  # never complete: it would measure
        runtime.run_main(mains[name])
    return case


KINDS = {function.__name__: function for function in (
    pickles, checkpoints, archives, coco_files, voc_files, yolo_files, result_files, metrics_files, images,
    commands)}


def fuzz(kind: str, seed: int, count: int) -> int:
    """Runs the cases of a kind; returns the number of tracebacks."""
    failures = accepted = 0
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        with contextlib.redirect_stdout(io.StringIO()):
            case = KINDS[kind](Path(name))
        for number in range(count):
            rng = random.Random(f"{kind} {seed} {number}")
            signal.alarm(CASE_SECONDS)
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    case(rng)
                accepted += 1
            except (runtime.UserError, SystemExit):
                pass
            except BaseException:
                failures += 1
                print(f"---- {kind} {seed} {number}: {sys.argv[1:] if kind == 'commands' else ''}")
                traceback.print_exc(limit=-4, file=sys.stdout)
            signal.alarm(0)
    print(f"{kind}: {count} cases, {accepted} accepted, {count - accepted - failures} refused in one line, "
          f"{failures} tracebacks", flush=True)
    return failures


def main():
    kinds, seed, count = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("the case hangs")))
    raise SystemExit(min(sum(fuzz(kind, seed, count) for kind in kinds), 100))


if __name__ == "__main__":
    main()

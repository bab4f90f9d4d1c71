"""Speed and memory of this repository beside torchvision, pycocotools and, where installed, mmdetection.

    python benchmark.py                                  all parts but learn; takes minutes on a CPU
    python benchmark.py train --size 800 1344 --batch-size 4 --amp bf16 --compile
    python benchmark.py infer loader --data coco --split val2017

Every round times all cases in turn, so a machine that changes its pace affects them equally. A ratio above 1
means that ours is better: it is theirs / ours. The median ratio of the rounds, the least and the greatest are
printed and written to --out, as benchmark.json and as bars in benchmark.png.

    train     training step on synthetic images, the same layers frozen; also the operators of a step, how
              often it waits for the device, the share of targets and losses, and the pace in operations per
              second relative to a large matrix product
    memory    peak memory of that step
    infer     images of --data to detections: evaluate.py's loop, and a plain loop over torchvision's model
    nms       the plain form of NMS and torchvision's kernel, for the calls that the detectors make; with
              --load N also while N other processes use the cores
    loader    images of --data to batches, in one process
    growth    a step for growing images, batches, objects and ranks; reading for growing datasets
    startup   from a COCO file of the size of train2017's to the first batch: time and memory
    score     COCO scores of 5000 images with 100 detections each
    learn     AP over steps and over seconds of trainings from random weights, ours and torchvision's, on the
              same batches: FCOS and RetinaNet with ResNet-18. Takes long, so it runs only if it is named:
              python benchmark.py learn --data bccd --min-size 256 --max-size 344 --batch-size 8 --seeds 0 1 2
"""
import runtime  # first: torch must not be imported before it

# isort: split
import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import ops
from checkpoint import build_model
from data import DetectionDataset, TrainBatchSampler, TrainSamples, collate
from evaluate import EvalSettings, detect
from fcos import FCOS
from fsaf import FSAF
from layouts import default_splits, load_coco
from learning import MODELS, TorchvisionDetector, Training, draw_learning, learning_curve, training_args
from metrics import score, shown
from ops import nms_plain
from peers import CLASSES, OURS, PEERS, Workload, our_step, peer_steps, synthetic_batch, torchvision_model
from runlog import device_name, peak_memory
from runtime import AMP
from shapes import open_dataset
from subsets import Subset

CPU = torch.device("cpu")
TRAIN2017 = (118_287, 860_001)  # images and boxes of instances_train2017.json


# ---------------------------------------------------------------------------------------------- measuring

def time_interleaved(cases: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds that every case {name: function} takes in every round, after one round to warm up."""
    times = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, function in cases.items():
            runtime.synchronize(device)
            start = time.perf_counter()
            function()
            runtime.synchronize(device)
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return times


def report_ratios(title: str, values: dict[str, list[float]], per: float = 1.0, unit: str = "ms") -> dict:
    """Prints and returns the median of every case and its ratio to the first case, ours.

    values: {case: a number per round}, in seconds if unit is "ms", in GB if it is "MB". per: the number of
    images that a number covers.
    """
    ours, *_ = values.values()
    cases, shown = {}, []
    for name, theirs in values.items():
        ratios = [a / b for a, b in zip(theirs, ours)]
        cases[name] = {"value": 1000 * median(theirs) / per, "ratio": median(ratios),
                       "least": min(ratios), "most": max(ratios)}
        ratio = f" ({median(ratios):.2f}x, {min(ratios):.2f} to {max(ratios):.2f})" if len(cases) > 1 else ""
        shown.append(f"{name} {cases[name]['value']:.1f} {unit}{ratio}")
    print(f"{title}: {', '.join(shown)}", flush=True)
    return {"title": title, "unit": unit, "cases": cases}


def in_new_process(function, *arguments):
    """Calls a function in a new process, where the peak of memory starts anew."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resident_peak() -> float:
    """Peak of the resident memory of this process in GB; Linux only."""
    # getrusage keeps its peak across exec: a new process would report the peak of its parent.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


# ---------------------------------------------------------------------------------------------- parts

def workload(args) -> Workload:
    return Workload(args.batch_size, tuple(args.size), args.objects, args.amp, args.compile)


def train_part(args, device: torch.device):
    work = workload(args)
    side = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(side, side, device=device, dtype=AMP[work.amp] or torch.float32)
    for name in args.models:
        model = OURS[name]()
        cases = {"ours": our_step(name, work, device, model), "product": lambda: matrix @ matrix}
        for peer, make_step in peer_steps(name).items():
            cases[peer] = make_step(name, work._replace(amp="off"), device)
            if work.amp != "off":
                cases[f"{peer} {work.amp}"] = make_step(name, work, device)
        times = time_interleaved(cases, args.rounds, device)
        product_pace = 2 * side ** 3 / median(times.pop("product"))
        row = report_ratios(f"{name} R-50, step of {work}{', compiled' if work.compile else ''}", times)
        # The counter sees operators, which a compiled step does not call.
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            cases["ours"]()
        pace = counter.get_total_flops() / median(times["ours"])
        row["peak"] = pace / product_pace
        print(f"    {pace / 1e12:.3f} Tflop/s, {100 * row['peak']:.0f} % of a matrix product's")
        if isinstance(model, (FCOS, FSAF)):
            row["losses"] = loss_seconds(model, work, device) / median(times["ours"])
            print(f"    targets and losses, with their backward: {100 * row['losses']:.1f} % of the step")
        row["operators"] = {case: count_operators(cases[case]) for case in ("ours", *peer_steps(name))}
        for case, count in row["operators"].items():
            print(f"    {case}: {count['operators']} operators, {count['nms']} more in the plain NMS; "
                  f"{count['waits']} waits for the device, {count['nms_waits']} more in the plain NMS")
        yield row


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that a device would be given, and how often the host waits for a result of it.

    A view is no operator, because it computes nothing. The host waits for every value that it reads and for
    every output with a shape that depends on values.
    """

    def __init__(self):
        super().__init__()
        self.operators = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += not func.is_view
        self.waits += _depends_on_values(func, args)
        return func(*args, **(kwargs or {}))


def _depends_on_values(func, args: tuple) -> bool:
    """Whether the host needs values of the device to know the output, or its shape."""
    if func._schema.name in ("aten::index", "aten::index_put", "aten::index_put_"):  # only with a mask
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return torch.Tag.dynamic_output_shape in func.tags or torch.Tag.data_dependent_output in func.tags


def count_operators(step) -> dict[str, int]:
    """Operators and waits of a step, from the batch to the gradients.

    The optimizer is left out: it takes parameters one by one on a CPU and all at once on a GPU. The plain NMS
    is counted apart, because a GPU has one operator for it.
    """
    nms_counter = OperatorCounter()

    def counted_nms(*args, **limit):
        with nms_counter:
            return nms_plain(*args, **limit)

    with (OperatorCounter() as counter, mock.patch.object(ops, "nms_plain", counted_nms),
          mock.patch.object(torch.optim.SGD, "step"), torch.compiler.set_stance("force_eager")):
        step()
    return {"operators": counter.operators - nms_counter.operators, "nms": nms_counter.operators,
            "waits": counter.waits - nms_counter.waits, "nms_waits": nms_counter.waits}


def loss_seconds(model: FCOS | FSAF, work: Workload, device: torch.device) -> float:
    """Median time from the outputs of the network to their gradients."""
    images, sizes, *objects = synthetic_batch(work, device)
    with torch.no_grad(), runtime.autocast(device, AMP[work.amp]):
        outputs = model.network(images.contiguous(memory_format=runtime.memory_format(device)), sizes)
    outputs = {key: value.detach().requires_grad_() if torch.is_tensor(value) else value
               for key, value in outputs.items()}
    targets = objects if isinstance(model, FCOS) else (sizes, *objects)

    def losses():
        sum(model.losses(outputs, *targets).values()).backward()
    return median(time_interleaved({"": losses}, 5, device)[""])


def memory_part(args, device: torch.device):
    work = workload(args)
    suffix = "" if work.amp == "off" else f" {work.amp}"  # as `train_part` names the cases
    for name in args.models:
        peaks = {"ours": [in_new_process(peak_of_steps, our_step, name, work, device.type)]}
        for peer, make_step in peer_steps(name).items():
            peaks[peer + suffix] = [in_new_process(peak_of_steps, make_step, name, work, device.type)]
        yield report_ratios(f"{name} R-50, peak memory of steps of {work}", peaks, unit="MB")


def peak_of_steps(make_step, name: str, work: Workload, device_type: str) -> float:
    """Memory in GB that a model and two steps add at their peak: on the device, or resident on a CPU."""
    device = runtime.setup_device(device_type).device
    peak = resident_peak if device.type == "cpu" else partial(peak_memory, device)
    before = peak()
    step = make_step(name, work, device)
    for _ in range(2):
        step()
    return peak() - before


def first_images(args) -> DetectionDataset:
    """The first --pictures images of --data, with their objects left out."""
    whole = open_dataset(args.data, args.split)
    count = min(args.pictures, len(whole))
    dataset = Subset(whole, range(count), [()] * count, whole.names)
    dataset.category_ids = list(range(CLASSES))  # the models detect as many in any data
    return dataset


def infer_part(args, device: torch.device):
    dataset = first_images(args)
    ours = OURS["FCOS"]().to(device, memory_format=runtime.memory_format(device))
    theirs = torchvision_model("FCOS", args.min_size, args.max_size).to(device).eval()
    settings = EvalSettings(args.min_size, args.max_size, args.batch_size, amp=AMP[args.amp])

    @torch.inference_mode()
    def their_loop(amp: str):
        for i in range(len(dataset)):
            image = torch.from_numpy(np.asarray(dataset.image(i)).copy()).permute(2, 0, 1).to(device)
            with runtime.autocast(device, AMP[amp]):
                theirs([image.float() / 255])[0]["boxes"].cpu()

    cases = {"ours": lambda: detect(ours, dataset, runtime.Place(device), settings),
             "torchvision": lambda: their_loop("off")}
    if args.amp != "off":
        cases[f"torchvision {args.amp}"] = lambda: their_loop(args.amp)
    times = time_interleaved(cases, max(1, args.rounds // 2), device)
    title = f"FCOS R-50, {len(dataset)} images at {args.min_size}/{args.max_size}, {args.amp}, per image"
    yield report_ratios(title, times, per=len(dataset))


def nms_part(args, device: torch.device):
    """Candidates as the detectors make them: many boxes around few objects."""
    yield from nms_ratios(args, device, "")
    if args.load:
        with busy_processes(args.load):
            yield from nms_ratios(args, device, f", beside {args.load} busy processes")


@contextlib.contextmanager
def busy_processes(count: int):
    """Other processes that use the cores: each multiplies matrices with two threads until the block ends."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=multiply_forever, daemon=True) for _ in range(count)]
    try:
        for process in processes:
            process.start()
        time.sleep(5)  # they import torch first
        yield
    finally:
        for process in processes:
            if process.pid:
                process.kill()
                process.join()


def multiply_forever():
    torch.set_num_threads(2)
    matrix = torch.randn(1024, 1024)
    while True:
        matrix @ matrix


def nms_ratios(args, device: torch.device, situation: str):
    from torchvision.ops import batched_nms, nms
    generator = torch.Generator().manual_seed(0)
    for title, count, keep, threshold, classes in (("class-wise, 5000 to 100", 5000, 100, 0.6, CLASSES),
                                                   ("RPN, 6000 to 1000", 6000, 1000, 0.7, None),
                                                   ("RPN, 12000 to 2000", 12000, 2000, 0.7, None)):
        objects = torch.rand(60 if classes else 1500, 2, generator=generator) * 800
        index = torch.randint(0, len(objects), (count,), generator=generator)
        center = objects[index] + torch.randn(count, 2, generator=generator) * 12
        half = 10 + torch.rand(len(objects), 2, generator=generator)[index] * 60
        boxes = torch.cat((center - half, center + half), dim=1).clamp(min=0).to(device)
        scores = torch.rand(count, generator=generator).to(device)
        labels = (index % classes).to(device) if classes else None
        plain = partial(nms_plain, boxes, scores, threshold, labels, keep)
        kernel = (partial(batched_nms, boxes, scores, labels, threshold) if classes else
                  partial(nms, boxes, scores, threshold))
        assert torch.equal(plain(), kernel()[:keep])
        times = time_interleaved({"ours": plain, "torchvision": kernel}, max(20, args.rounds), device)
        yield report_ratios(f"NMS {title}{situation}", times)


def loader_part(args, device: torch.device):
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms.v2 import functional as F
    dataset = first_images(args)
    samples = TrainSamples(dataset, [args.min_size], args.max_size)
    transform = GeneralizedRCNNTransform(args.min_size, args.max_size, [0.485, 0.456, 0.406],
                                         [0.229, 0.224, 0.225])
    pairs = torch.arange(len(dataset)).split(2)

    def our_batches():
        for pair in pairs:
            collate([samples[0, i] for i in pair.tolist()])

    def their_sample(i: int) -> torch.Tensor:  # as in torchvision's references/detection
        image = (dataset.image(i) if args.data == "shapes" else
                 Image.open(os.fsdecode(dataset.paths[i])).convert("RGB"))
        tensor = F.pil_to_tensor(image)
        return F.to_dtype(F.horizontal_flip(tensor) if i % 2 else tensor, torch.float32, scale=True)

    def their_batches():
        for pair in pairs:
            transform([their_sample(i) for i in pair.tolist()])

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    times = time_interleaved({"ours": our_batches, "torchvision": their_batches}, args.rounds, CPU)
    torch.set_num_threads(threads)
    title = (f"{len(dataset)} images at {args.min_size}/{args.max_size} to batches of 2, one process, per "
             f"image")
    yield report_ratios(title, times, per=len(dataset))


def growth_part(args, device: torch.device):
    work = workload(args)
    half = work._replace(size=tuple(side // 64 * 32 for side in work.size))
    variants = {"size": {"{} x {}".format(*case.size): case for case in (half, work)},
                "batch size": {f"{n}": half._replace(batch_size=n) for n in (1, 2, 4)},
                "objects": {f"{n}": half._replace(objects=n) for n in (1, 10, 50, 200)}}
    for name in args.models:
        for what, cases in variants.items():
            model = OURS[name]()
            steps = {label: our_step(name, case, device, model) for label, case in cases.items()}
            times = time_interleaved(steps, max(1, args.rounds // 2), device)
            yield report_ratios(f"{name}, a step by {what}", times)
        peaks = {f"{n} objects": [in_new_process(peak_of_steps, our_step, name, half._replace(objects=n),
                                                 device.type)] for n in (10, 200)}
        yield report_ratios(f"{name}, peak memory", peaks, unit="MB")
    yield growth_of_ranks(args)
    yield from growth_of_data(args)


def growth_of_ranks(args) -> dict:
    """Steps of train.py on the CPU with one and with two ranks."""
    times = {"1 rank(s)": [], "2 rank(s)": []}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    script = (Path(__file__).with_name("train.py"), "--device", "cpu", "--no-eval", "--max-steps", "30",
              "--log-every", "20")
    with tempfile.TemporaryDirectory() as out:
        for _ in range(max(1, args.rounds // 2)):
            for ranks, seconds in enumerate(times.values(), start=1):
                subprocess.run([*torchrun, f"--nproc_per_node={ranks}", *script, "--out", out,
                                "--batch-size", str(4 * ranks)], check=True, capture_output=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
                *_, last = (Path(out) / "log.jsonl").read_text().splitlines()
                seconds.append(json.loads(last)["step_s"])
    return report_ratios("train.py on shapes, 4 images and 1 thread per rank, a step", times)


def growth_of_data(args):
    """Start-up and batches of two images for datasets of three sizes."""
    reading, batches = {}, {}
    for images in (1000, 10_000, TRAIN2017[0]):
        with tempfile.TemporaryDirectory() as folder:
            dataset, seconds, _ = start_up(coco_file(Path(folder), images, 7 * images))
            reading[f"{images} images"] = [seconds]
            sampler = TrainBatchSampler(dataset, np.arange(images), 2, stop=20)
            loader = iter(DataLoader(TrainSamples(dataset, [args.min_size], args.max_size),
                                     batch_sampler=sampler, collate_fn=collate))
            batches[f"of {images}"] = time_interleaved({"": partial(next, loader)}, 19, CPU)[""]
    yield report_ratios("start-up with files of", reading)
    yield report_ratios("a batch of two images", batches)


def coco_file(folder: Path, images: int, boxes: int) -> Path:
    """Writes a COCO file of random boxes with outlines of 30 corners. All images are links to one JPEG."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8))
    noise.resize((640, 480), Image.BICUBIC).save(folder / "image.jpg", quality=90)
    (folder / "images").mkdir()
    for i in range(images):
        os.symlink(folder / "image.jpg", folder / "images" / f"{i}.jpg")
    image_id = rng.integers(0, images, boxes).tolist()
    xywh = rng.uniform(1, 200, (boxes, 4)).round(2).tolist()
    category = rng.integers(1, CLASSES + 1, boxes).tolist()
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 480, "width": 640} for i in range(images)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
        "annotations": [{"id": i + 1, "image_id": image_id[i], "category_id": category[i], "bbox": xywh[i],
                         "area": xywh[i][2] * xywh[i][3], "iscrowd": 0} for i in range(boxes)]}
    outline = json.dumps([rng.uniform(1, 640, 60).round(2).tolist()])
    text = json.dumps(content).replace('"iscrowd": 0', f'"iscrowd": 0, "segmentation": {outline}')
    (folder / "boxes.json").write_text(text)
    return folder / "boxes.json"


def start_up(path: Path) -> tuple[DetectionDataset, float, float]:
    """Dataset of a file, seconds that train.py takes to its first batch of indices, peak memory in GB."""
    start = time.perf_counter()
    dataset = load_coco([(path, path.parent / "images")])
    dataset.table()
    next(iter(TrainBatchSampler(dataset, dataset.non_empty(), 16, stop=1)))
    return dataset, time.perf_counter() - start, resident_peak()


def read_by_pycocotools(path: Path) -> tuple[None, float, float]:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        COCO(path)
    return None, time.perf_counter() - start, resident_peak()


def startup_part(args, device: torch.device):
    with tempfile.TemporaryDirectory() as folder:
        path = coco_file(Path(folder), *TRAIN2017)
        cases = {"ours": in_new_process(start_up, path),
                 "pycocotools, reading alone": in_new_process(read_by_pycocotools, path)}
    title = "{:,} images and {:,} boxes, file to first batch".format(*TRAIN2017)
    yield report_ratios(f"{title}: time", {case: [seconds] for case, (_, seconds, _) in cases.items()})
    yield report_ratios(f"{title}: peak of the process", {case: [peak] for case, (*_, peak) in cases.items()},
                        unit="MB")


def score_part(args, device: torch.device):
    rng, count = np.random.default_rng(0), 500_000
    xywh, scores = rng.uniform(1, 200, (count, 4)).round(2).tolist(), rng.random(count).round(4).tolist()
    category = rng.integers(1, CLASSES + 1, count).tolist()
    results = [{"image_id": i // 100, "category_id": category[i], "bbox": xywh[i], "score": scores[i]}
               for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = coco_file(Path(folder), 5000, 36_000)
        dataset = load_coco([(path, path.parent / "images")])

        def pycocotools():
            truth = COCO(path)
            evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()

        cases = {"ours": lambda: score(dataset, results), "pycocotools": pycocotools}
        times = time_interleaved(cases, 2, CPU)
    yield report_ratios("COCO scores of 5000 x 100 detections", times)


def learn_part(args, device: torch.device):
    """Trainings from random weights, one after another: every model, library and seed."""
    train_set = open_dataset(args.data, default_splits(args.data)[0])
    val_set = open_dataset(args.data, args.split, names=train_set.names)
    curves = {}
    for name in filter(MODELS.get, args.models):
        recipe = training_args(name, args.data, min_size=args.min_size, max_size=args.max_size,
                               batch_size=args.batch_size, max_steps=args.steps)
        training = Training(train_set, val_set, recipe, max(1, args.steps // 4))
        cases = {"ours": partial(build_model, vars(recipe))}
        if "torchvision" in peer_steps(name):
            cases["torchvision"] = partial(TorchvisionDetector, name)
        rows = {case: [] for case in cases}
        for seed in args.seeds:
            for case, make_model in cases.items():
                rows[case].append(learning_curve(make_model, training, seed, runtime.Place(device)))
                print(f"{name} {case}, seed {seed}, AP AP50 after", *(
                    f"{row['step']} steps, {row['seconds']:.0f} s: {shown(row['AP'])} {shown(row['AP50'])}"
                    for row in rows[case][-1]), sep="\n    ", flush=True)
        curves |= {f"{name} {case}": seeds for case, seeds in rows.items()}
        draw_learning(curves, args.out / "learning.png")
        yield {"title": f"{name} R-18, {args.steps} steps of {args.batch_size} on {args.data}", "cases": {},
               "curves": rows}


# ---------------------------------------------------------------------------------------------- script

PARTS = {"train": train_part, "memory": memory_part, "infer": infer_part, "nms": nms_part,
         "loader": loader_part, "growth": growth_part, "startup": startup_part, "score": score_part,
         "learn": learn_part}


def plot(rows: list[dict], path: Path):
    """Draws a bar for every ratio of a peer to ours, with a line from the least to the greatest."""
    bars = [(f"{row['title']}: {name} {case['ratio']:.2f}x", case) for row in rows
            for name, case in row["cases"].items() if name.startswith((*PEERS, "pycocotools"))]
    path.unlink(missing_ok=True)  # of an earlier run
    if not bars:
        return
    scale = 640 / max(1.5, *(case["ratio"] for _, case in bars))
    image = Image.new("RGB", (760, 36 * len(bars) + 30), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((10, 8), "theirs / ours (time, memory): right of the red mark ours is better", fill="red")
    for i, (label, case) in enumerate(bars):
        y = 36 * i + 50  # middle of the bar
        least, ratio, most, one = (10 + min(740, scale * value) for value in
                                   (case["least"], case["ratio"], case["most"], 1))
        canvas.text((10, y - 20), label, fill="black")
        canvas.rectangle((10, y - 6, ratio, y + 6), fill="steelblue")
        canvas.line((least, y, most, y), fill="black")
        canvas.line((one, y - 8, one, y + 8), fill="red", width=2)
    image.save(path)


def parse_args() -> argparse.Namespace:
    parser = runtime.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all but learn)")
    add("--models", nargs="+", choices=OURS, default=["FCOS", "RetinaNet", "FSAF", "Faster R-CNN"],
        help="models of train, memory, growth and learn")
    add("--size", type=int, nargs=2, default=(512, 672), metavar=("H", "W"), help="size of their images, px")
    add("--batch-size", type=int, default=2, help="images per step and per batch of infer")
    add("--objects", type=int, default=10, help="objects per image")
    add("--amp", default="off", choices=AMP, help="mixed precision")
    add("--compile", action="store_true", help="compile our training step with torch.compile")
    add("--data", default="shapes", help="dataset of infer, loader and learn")
    add("--split", help="its split to detect in (default: that of the layout, such as val2017)")
    add("--min-size", type=int, default=800, help="short side of its resized images, px")
    add("--max-size", type=int, default=1333, help="limit of their long side, px")
    add("--pictures", type=int, default=20, help="number of images of infer and loader")
    add("--rounds", type=int, default=5, help="how often a case is timed")
    add("--steps", type=int, default=240, help="length of the trainings of learn")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of learn")
    add("--load", type=int, default=0, metavar="N", help="time nms also beside N busy processes")
    add("--device", default="auto", type=runtime.device_name, metavar="NAME",
        help="auto, cuda, npu, cpu; one by its number: npu:3")
    add("--out", type=Path, default=Path("runs/benchmark"), help="folder of the results")
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    for name, least in (("rounds", 1), ("batch_size", 1), ("objects", 1), ("pictures", 1), ("min_size", 32),
                        ("max_size", 32), ("steps", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    for name, numbers in (("load", [args.load]), ("seeds", args.seeds)):
        if min(numbers) < 0:
            parser.error(f"--{name} must be at least 0, not {min(numbers)}")
    if "learn" in args.parts and not set(args.models) & set(MODELS):
        parser.error(f"learn is for --models {' '.join(MODELS)}, not {' '.join(args.models)}")
    if min(args.size) < 64:
        parser.error(f"--size must be at least 64 64, not {args.size[0]} {args.size[1]}")
    args.parts = args.parts or [part for part in PARTS if part != "learn"]
    args.split = args.split or default_splits(args.data)[1]
    return args


def main():
    args = parse_args()
    device = runtime.setup_device(args.device, args.amp).device
    torch.manual_seed(0)
    runtime.make_folder(args.out)
    content = {"machine": device_name(device), "torch": torch.__version__,
               "args": {key: str(value) for key, value in vars(args).items()}, "rows": []}
    print(f"{content['machine']}, torch {content['torch']}")
    for part in args.parts:
        content["rows"] += PARTS[part](args, device)
        runtime.write_json(args.out / "benchmark.json", content)
    plot(content["rows"], args.out / "benchmark.png")


if __name__ == "__main__":
    runtime.run_main(main)

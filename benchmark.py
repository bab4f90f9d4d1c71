"""Ours against torchvision, and mmdetection if installed, in one run: what a step, a picture, a call costs.

    python benchmark.py                                  all parts, some minutes on a CPU
    python benchmark.py train --size 800 1344 --batch-size 4 --amp bf16 --compile
    python benchmark.py infer loader --data coco --split val2017

Competitors take turns, round by round, so that a machine that changes its pace hits all alike. A ratio is the
median over rounds of theirs / ours, with the least and the greatest: above 1, ours is faster. Everything is
printed, and written to --out as benchmark.json and, the ratios, benchmark.png.

    train     forward, losses, backward and SGD on one synthetic batch, same freezing; share of the losses,
              and of the machine's peak (a large matrix product)
    memory    peak of that step
    infer     pictures of --data to detections: evaluate.py's loop, and a plain loop over torchvision's model
    nms       plain torch and torchvision's kernel, for the calls that the detectors make
    loader    pictures of --data to batches, in one process
    growth    a step against sizes of image and batch, objects, ranks; start-up and batches against the data
    startup   a COCO-format file of the size of train2017 to the first batch, its time and memory
    score     COCO scores of 5000 pictures with 100 detections each, and pycocotools alone
"""
import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # before torch: see evaluate.py

import argparse
import contextlib
import importlib.util
import io
import json
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from checkpoint import memory_format
from data import DetectionDataset, StepBatches, TrainSamples, collate, load_coco, open_dataset
from defrcn import POST_NMS_TOP_K, PRE_NMS_TOP_K, DeFRCN
from evaluate import (
    AMP,
    Parser,
    autocast,
    detect,
    make_folder,
    run_script,
    score,
    setup_device,
    synchronize,
    write_json,
)
from fcos import FCOS
from fsaf import FSAF
from ops import nms_plain
from train import device_name, peak_memory

CLASSES = 80


# ---------------------------------------------------------------------------------------------- measuring

def take_turns(cases: dict, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every case in every round; a round before the first is not counted."""
    times = {name: [] for name in cases}
    for i in range(rounds + 1):
        for name, work in cases.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            if i:
                times[name].append(time.perf_counter() - start)
    return times


def compared(title: str, times: dict[str, list[float]], per: float = 1.0, unit: str = "ms") -> dict:
    """Prints and returns what the cases take, of which the first is ours, and the ratios of the others.

    times: seconds (shown as ms) or, with unit="MB", GB. per: how many steps, pictures or calls they are for.
    """
    ours = next(iter(times))
    row = {"title": title, "unit": unit, "cases": {}}
    for name, values in times.items():
        ratios = [value / mine for value, mine in zip(values, times[ours])]
        row["cases"][name] = {"value": 1000 * statistics.median(values) / per,
                              "ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}
    print(f"{title}: " + ", ".join(
        f"{name} {case['value']:.1f} {unit}"
        + ("" if name == ours else f" ({case['ratio']:.2f}x, {case['least']:.2f} to {case['most']:.2f})")
        for name, case in row["cases"].items()), flush=True)
    return row


def matrix_product(device: torch.device, dtype: torch.dtype):
    """A function that makes a large matrix product, and its operations."""
    size = 2048 if device.type == "cpu" else 8192
    a = torch.randn(size, size, device=device, dtype=dtype)
    return lambda: a @ a, 2 * size ** 3


# ---------------------------------------------------------------------------------------------- train

def batch(count: int, height: int, width: int, objects: int, device) -> tuple[torch.Tensor, ...]:
    """images, sizes, gt_boxes, gt_labels of random pictures with `objects` objects each."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    corner = torch.rand(count, objects, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    side = torch.rand(count, objects, 2, generator=generator) * torch.tensor([width, height]) * 0.28 + 8
    boxes = torch.cat((corner, corner + side), dim=-1)
    labels = torch.randint(0, CLASSES, (count, objects), generator=generator)
    sizes = torch.tensor([[height, width]] * count)
    return tuple(t.to(device) for t in (images, sizes, boxes, labels))


def stepper(model: torch.nn.Module, loss, amp: torch.dtype | None, device: torch.device):
    """A function that makes a training step. loss: a function that gives the sum of the model's losses."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-5, momentum=0.9)

    def step():
        with autocast(device, amp):
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def torchvision_model(name: str, height: int, width: int) -> torch.nn.Module:
    """torchvision's detector on ResNet-50 with the published freezing, without resizing. Its Faster R-CNN is
    put together from its parts as C4, the form of DeFRCN."""
    import torchvision
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    options = {"min_size": min(height, width), "max_size": max(height, width)}
    if name != "Faster R-CNN":
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3,
                                       returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
        return {"FCOS": detection.FCOS, "RetinaNet": detection.RetinaNet}[name](backbone, CLASSES, **options)
    body = torchvision.models.resnet50(weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d)
    backbone = torch.nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool, body.layer1, body.layer2,
                                   body.layer3)
    backbone[:5].requires_grad_(False)
    backbone.out_channels = 1024
    head = torch.nn.Sequential(body.layer4, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    return detection.FasterRCNN(
        backbone, rpn_anchor_generator=detection.rpn.AnchorGenerator(((32, 64, 128, 256, 512),),
                                                                     ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=PRE_NMS_TOP_K[0], rpn_post_nms_top_n_train=POST_NMS_TOP_K[0],
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], 14, sampling_ratio=0), box_head=head,
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(2048, CLASSES + 1), **options)


TORCHVISION, TWO_STAGE = ("FCOS", "RetinaNet", "Faster R-CNN"), ("Faster R-CNN", "DeFRCN")
MMDET = {"FCOS": "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
         "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py", "FSAF": "fsaf/fsaf_r50_fpn_1x_coco.py",
         "Faster R-CNN": "faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py"}
OURS = {"FCOS": lambda: FCOS(CLASSES), "RetinaNet": lambda: FSAF(CLASSES, anchor_only=True, norm="frozen"),
        "FSAF": lambda: FSAF(CLASSES), "FSAF joint": lambda: FSAF(CLASSES, joint=True),
        "Faster R-CNN": lambda: DeFRCN(CLASSES, "resnet50", decouple=False, pool_size=14, freeze_at=2),
        "DeFRCN": lambda: DeFRCN(CLASSES, "resnet50")}


def our_step(args, name: str, device: torch.device, model=None):
    """A training step of ours, the model (new, if none is given) and its inputs."""
    torch.manual_seed(0)
    images, *rest = batch(args.batch_size, *args.size, args.objects, device)
    inputs = (images.contiguous(memory_format=memory_format(device)), *rest)
    model = model or OURS[name]().to(device, memory_format=memory_format(device))
    if args.compile:
        model.compile(dynamic=False)
    return stepper(model, lambda: sum(model(*inputs).values()), AMP[args.amp], device), model, inputs


def their_step(args, name: str, device: torch.device, amp: torch.dtype | None):
    """A training step of torchvision's, from where it starts: images between 0 and 1, boxes in dicts."""
    images, _, boxes, labels = batch(args.batch_size, *args.size, args.objects, device)
    targets = [{"boxes": b, "labels": n + (name == "Faster R-CNN")} for b, n in zip(boxes, labels)]
    model = torchvision_model(name, *args.size).to(device)
    return stepper(model, lambda: sum(model(list(images.float() / 255), targets).values()), amp, device)


def mmdet_step(args, name: str, device: torch.device, amp: torch.dtype | None):
    """A training step of mmdetection 3's published recipe, likewise."""
    import mmdet.utils
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.structures import InstanceData
    mmdet.utils.register_all_modules()
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / MMDET[name]).model
    config.backbone.init_cfg = None  # random weights
    model = MODELS.build(config).to(device)
    images, _, boxes, labels = batch(args.batch_size, *args.size, args.objects, device)
    samples = [DetDataSample(metainfo={"img_shape": args.size, "ori_shape": args.size},
                             gt_instances=InstanceData(bboxes=b, labels=n)) for b, n in zip(boxes, labels)]

    def loss():
        data = model.data_preprocessor({"inputs": list(images), "data_samples": samples}, training=True)
        return model.parse_losses(model(**data, mode="loss"))[0]
    return stepper(model, loss, amp, device)


def peers(name: str) -> dict:
    """Who else has this detector and is installed: name, function that makes a step."""
    return ({"torchvision": their_step} if name in TORCHVISION else {}) | (
        {"mmdetection": mmdet_step} if name in MMDET and importlib.util.find_spec("mmdet") else {})


def train_part(args, device: torch.device) -> list[dict]:
    rows, amp = [], AMP[args.amp]
    for name in args.models:
        step, ours, inputs = our_step(args, name, device)
        cases = {"ours": step}
        for peer, make_step in peers(name).items():
            cases[peer] = make_step(args, name, device, None)
            if amp:
                cases[f"{peer} {args.amp}"] = make_step(args, name, device, amp)
        title = (f"{name} R-50, step of {args.batch_size} x {args.size[0]} x {args.size[1]}, {args.amp}"
                 + (", compiled" if args.compile else ""))
        product, operations = matrix_product(device, amp or torch.float32)
        times = take_turns({**cases, "product": product}, args.rounds, device)
        peak = operations / statistics.median(times.pop("product"))
        row = compared(title, times)
        rows.append(row)
        with FlopCounterMode(display=False) as counter, torch.compiler.set_stance("force_eager"):
            step()  # not compiled: operators are counted
        reached = counter.get_total_flops() / (row["cases"]["ours"]["value"] / 1000)
        row["peak"] = reached / peak
        print(f"    {reached / 1e12:.3f} Tflop/s, {100 * row['peak']:.0f} % of a matrix product's")
        if name not in TWO_STAGE:
            row["losses"] = share_of_losses(ours, inputs, amp, device, row["cases"]["ours"]["value"])
            print(f"    targets and losses, with their backward: {100 * row['losses']:.1f} % of the step")
    return rows


def memory(args, device: torch.device) -> list[dict]:
    """Peak memory of two steps, each case in a process of its own."""
    rows = []
    for name in args.models:
        title = (f"{name} R-50, peak memory of steps of {args.batch_size} x {args.size[0]} x {args.size[1]}, "
                 f"{args.amp}")
        peaks = {case: [in_a_process(peak_of_steps, args, name, case, device)]
                 for case in ("ours", *peers(name))}
        suffix = "" if args.amp == "off" else f" {args.amp}"  # as in the other parts
        rows.append(compared(title, {case + suffix * (case != "ours"): peak for case, peak in peaks.items()},
                             unit="MB"))
    return rows


def in_a_process(function, *arguments):
    """The result of a function called in a fresh process: its memory begins anew."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def resident_peak() -> float:
    """GB of this process. Not getrusage's: that outlives exec, so a child's begins with its parent's."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9


def peak_of_steps(args, name: str, case: str, device: torch.device) -> float:
    """GB, without what the process takes before it builds a model; of the device, or resident on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).set_device(device)
    peak = resident_peak if device.type == "cpu" else partial(peak_memory, device)
    before = peak()
    step = (our_step(args, name, device)[0] if case == "ours" else
            peers(name)[case](args, name, device, AMP[args.amp]))
    for _ in range(2):
        step()
    return peak() - before


def share_of_losses(model, inputs, amp, device, step_ms: float) -> float:
    """Time from the network's outputs to their gradients, in parts of the step."""
    images, sizes, boxes, labels = inputs
    with torch.no_grad(), autocast(device, amp):
        outputs = model.network(images, sizes)
    outputs = {key: value.detach().requires_grad_() if torch.is_tensor(value) else value
               for key, value in outputs.items()}
    arguments = (boxes, labels) if isinstance(model, FCOS) else (sizes, boxes, labels)

    def losses():
        sum(model.losses(outputs, *arguments).values()).backward()
    return 1000 * statistics.median(take_turns({"": losses}, 5, device)[""]) / step_ms


# ---------------------------------------------------------------------------------------------- infer, loader

def pictures(args) -> DetectionDataset:
    """The first pictures of the data, without objects."""
    whole, none = open_dataset(args.data, args.split), np.zeros(0)
    part = slice(args.pictures)
    dataset = DetectionDataset(whole.names, whole.category_ids, whole.image_ids[part],
                               [os.fsdecode(path) for path in whole.paths[part]], whole.sizes[part],
                               np.zeros((0, 4)), none, none, none, none, none.astype(np.int64))
    dataset.image = whole.image  # shapes draws them
    return dataset


def infer(args, device: torch.device) -> list[dict]:
    dataset = pictures(args)
    ours = FCOS(CLASSES).to(device, memory_format=memory_format(device)).eval()
    theirs = torchvision_model("FCOS", args.min_size, args.max_size).to(device).eval()
    theirs.transform.min_size, theirs.transform.max_size = (args.min_size,), args.max_size
    amp = AMP[args.amp]

    def our_loop():
        detect(ours, dataset, device, args.min_size, args.max_size, args.batch_size, 2, amp)

    @torch.inference_mode()
    def their_loop(dtype=None):
        for i in range(len(dataset)):
            image = torch.from_numpy(np.asarray(dataset.image(i)).copy()).permute(2, 0, 1).to(device)
            with autocast(device, dtype):
                theirs([image.float() / 255])[0]["boxes"].cpu()

    cases = {"ours": our_loop, "torchvision": their_loop}
    if amp:
        cases[f"torchvision {args.amp}"] = partial(their_loop, amp)
    times = take_turns(cases, max(1, args.rounds // 2), device)
    return [compared(f"FCOS R-50, {len(dataset)} pictures at {args.min_size}/{args.max_size}, {args.amp}, "
                     f"per picture", times, per=len(dataset))]


def loader(args, device: torch.device) -> list[dict]:
    """One process, no network: decode, resize, flip, batch."""
    from torchvision.models.detection.transform import GeneralizedRCNNTransform
    from torchvision.transforms.v2 import functional as F
    dataset = pictures(args)
    samples, count = TrainSamples(dataset, [args.min_size], args.max_size), len(dataset)
    transform = GeneralizedRCNNTransform(args.min_size, args.max_size, [0.485, 0.456, 0.406],
                                         [0.229, 0.224, 0.225])
    groups = [range(i, min(i + 2, count)) for i in range(0, count, 2)]

    def our_batches():
        for group in groups:
            collate([samples[0, i] for i in group])

    def their_batches():  # references/detection: PIL, to tensor, flip; the model's transform makes the batch
        for group in groups:
            images = []
            for i in group:
                image = (dataset.image(i) if args.data == "shapes" else
                         Image.open(os.fsdecode(dataset.paths[i])).convert("RGB"))
                tensor = F.pil_to_tensor(image)
                tensor = F.horizontal_flip(tensor) if i % 2 else tensor
                images.append(F.to_dtype(tensor, torch.float32, scale=True))
            transform(images)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a loader process
    times = take_turns({"ours": our_batches, "torchvision": their_batches}, args.rounds, torch.device("cpu"))
    torch.set_num_threads(threads)
    return [compared(f"{count} pictures at {args.min_size}/{args.max_size} to batches of 2, one process, per "
                     f"picture", times, per=count)]


# ---------------------------------------------------------------------------------------------- nms

def nms(args, device: torch.device) -> list[dict]:
    """Candidates as detectors make them: many boxes around few objects."""
    import torchvision
    rows, generator = [], torch.Generator().manual_seed(0)
    for title, count, keep, threshold, classes in (("class-wise, 5000 to 100", 5000, 100, 0.6, CLASSES),
                                                   ("RPN, 6000 to 1000", 6000, 1000, 0.7, None),
                                                   ("RPN, 12000 to 2000", 12000, 2000, 0.7, None)):
        center = torch.rand(60 if classes else 1500, 2, generator=generator) * 800
        which = torch.randint(0, len(center), (count,), generator=generator)
        middle = center[which] + torch.randn(count, 2, generator=generator) * 12
        half = 10 + torch.rand(len(center), 2, generator=generator)[which] * 60
        boxes = torch.cat((middle - half, middle + half), dim=1).clamp(min=0).to(device)
        scores = torch.rand(count, generator=generator).to(device)
        labels = None if classes is None else (which % classes).to(device)

        def plain(boxes=boxes, scores=scores, labels=labels, keep=keep, threshold=threshold):
            return nms_plain(boxes, scores, threshold, labels, keep)

        def kernel(boxes=boxes, scores=scores, labels=labels, keep=keep, threshold=threshold):
            if labels is None:
                return torchvision.ops.nms(boxes, scores, threshold)[:keep]
            return torchvision.ops.batched_nms(boxes, scores, labels, threshold)[:keep]

        assert torch.equal(plain(), kernel())
        rows.append(compared(f"NMS {title}", take_turns({"ours": plain, "torchvision": kernel},
                                                        max(20, args.rounds), device)))
    return rows


# ---------------------------------------------------------------------------------------------- growth

def growth(args, device: torch.device) -> list[dict]:
    rows, (height, width) = [], args.size
    half = (height // 64 * 32, width // 64 * 32)
    variants = {"size": [{"size": half}, {"size": args.size}],
                "batch_size": [{"size": half, "batch_size": count} for count in (1, 2, 4)],
                "objects": [{"size": half, "objects": count} for count in (1, 10, 50, 200)]}
    for name in args.models:
        for what, changes in variants.items():
            model, steps = None, {}
            for change in changes:
                changed = argparse.Namespace(**{**vars(args), **change})
                steps[f"{change[what]}"], model, _ = our_step(changed, name, device, model)
            rows.append(compared(f"{name}, a step by {what.replace('_', ' ')}",
                                 take_turns(steps, max(1, args.rounds // 2), device)))
        peaks = {f"{change['objects']} objects": [in_a_process(
            peak_of_steps, argparse.Namespace(**{**vars(args), **change}), name, "ours", device)]
            for change in variants["objects"][1::2]}
        rows.append(compared(f"{name}, peak memory", peaks, unit="MB"))
    return [*rows, growth_of_ranks(args), *growth_of_data(args)]


def growth_of_ranks(args) -> dict:
    """Steps of train.py on the CPU, four pictures and one thread per rank."""
    times = {ranks: [] for ranks in (1, 2)}
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    run = (Path(__file__).with_name("train.py"), "--device", "cpu", "--no-eval", "--max-steps", "30",
           "--log-every", "20")
    with tempfile.TemporaryDirectory() as out:
        for _ in range(max(1, args.rounds // 2)):
            for ranks, values in times.items():
                subprocess.run([*torchrun, f"--nproc_per_node={ranks}", *run, "--batch-size", str(4 * ranks),
                                "--out", out], check=True, capture_output=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
                *_, last = (Path(out) / "log.jsonl").read_text().splitlines()
                values.append(json.loads(last)["step_s"])
    return compared("train.py on shapes, 4 pictures and 1 thread per rank, a step",
                    {f"{ranks} rank(s)": values for ranks, values in times.items()})


def growth_of_data(args) -> list[dict]:
    """What a data set costs that is 10 and 118 times as large: reading it, and a batch of two pictures."""
    reading, batches = {}, {}
    for images in (1000, 10_000, 118_287):
        with tempfile.TemporaryDirectory() as name:
            dataset, seconds, _ = start_up(coco_file(Path(name), images, 7 * images))
            reading[f"{images} pictures"] = [seconds]
            loader = iter(DataLoader(
                TrainSamples(dataset, [args.min_size], args.max_size), collate_fn=collate,
                batch_sampler=StepBatches(dataset, np.arange(images), 2, stop=20)))
            batches[f"of {images}"] = take_turns({"": partial(next, loader)}, 19, torch.device("cpu"))[""]
    return [compared("start-up with files of", reading), compared("a batch of two pictures", batches)]


# --------------------------------------------------------------------------------------------- startup, score

def coco_file(folder: Path, images: int, boxes: int) -> Path:
    """A COCO-format file: random boxes, outlines of 30 corners, one picture under many names."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    picture = Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).resize((640, 480), Image.BICUBIC)
    picture.save(folder / "picture.jpg", quality=90)
    image_of, xywh = rng.integers(0, images, boxes), rng.uniform(1, 200, (boxes, 4)).round(2).tolist()
    category = rng.integers(1, CLASSES + 1, boxes).tolist()
    content = {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "height": 480, "width": 640}
                   for i in range(images)],
        "categories": [{"id": i, "name": f"class {i}"} for i in range(1, CLASSES + 1)],
        "annotations": [{"id": i + 1, "image_id": int(image_of[i]), "category_id": category[i],
                         "bbox": xywh[i], "area": xywh[i][2] * xywh[i][3], "iscrowd": 0}
                        for i in range(boxes)]}
    for image in content["images"]:
        os.symlink(folder / "picture.jpg", folder / "pictures" / image["file_name"])
    outline = json.dumps([rng.uniform(1, 640, 60).round(2).tolist()])
    text = json.dumps(content).replace('"iscrowd": 0', f'"iscrowd": 0, "segmentation": {outline}')
    (folder / "boxes.json").write_text(text)
    return folder / "boxes.json"


def start_up(path: Path) -> tuple[DetectionDataset, float, float]:
    """The data set of a file, the seconds that train.py takes to its first batch of indices, and the peak of
    memory in GB."""
    start = time.perf_counter()
    dataset = load_coco([(path, path.parent / "pictures")])
    dataset.table()
    next(iter(StepBatches(dataset, dataset.non_empty(), 16, stop=1)))
    return dataset, time.perf_counter() - start, resident_peak()


def read_by_pycocotools(path: Path) -> tuple[None, float, float]:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        COCO(path)
    return None, time.perf_counter() - start, resident_peak()


def startup(args, device: torch.device) -> list[dict]:
    """A file as large as instances_train2017.json."""
    with tempfile.TemporaryDirectory() as name:
        path = coco_file(Path(name), 118_287, 860_001)
        cases = {"ours": in_a_process(start_up, path),
                 "pycocotools, reading alone": in_a_process(read_by_pycocotools, path)}
    title = "118,287 pictures and 860,001 boxes, file to first batch"
    return [compared(f"{title}: {what}", {case: [values[i]] for case, values in cases.items()}, unit=unit)
            for i, what, unit in ((1, "time", "ms"), (2, "peak of the process", "MB"))]


def score_part(args, device: torch.device) -> list[dict]:
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        path = coco_file(Path(name), 5000, 36_000)
        dataset = load_coco([(path, path.parent / "pictures")])
        xywh = rng.uniform(1, 200, (500_000, 4)).round(2).tolist()
        scores = rng.random(500_000).round(4).tolist()
        category = rng.integers(1, CLASSES + 1, 500_000).tolist()
        results = [{"image_id": i // 100, "category_id": category[i], "bbox": xywh[i], "score": scores[i]}
                   for i in range(500_000)]

        def ours():
            with contextlib.redirect_stdout(io.StringIO()):
                score(dataset, results)

        def pycocotools():
            with contextlib.redirect_stdout(io.StringIO()):
                truth = COCO(path)
                evaluation = COCOeval(truth, truth.loadRes([dict(result) for result in results]), "bbox")
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()

        times = take_turns({"ours": ours, "pycocotools": pycocotools}, 2, torch.device("cpu"))
        return [compared("COCO scores of 5000 x 100 detections", times)]


# ---------------------------------------------------------------------------------------------- script

def plot(rows: list[dict], path: Path):
    """A bar for every ratio of a peer to ours, with a line from the least to the greatest; red: 1."""
    bars = [(f"{row['title']}: {name}", case) for row in rows for name, case in row["cases"].items()
            if name.startswith(("torchvision", "mmdetection", "pycocotools"))]
    path.unlink(missing_ok=True)  # of an earlier run
    if not bars:
        return
    scale = 600 / max(1.5, *(case["ratio"] for _, case in bars))
    image = Image.new("RGB", (760, 36 * len(bars) + 30), "white")
    canvas = ImageDraw.Draw(image)
    canvas.text((10, 8), "theirs / ours (time, memory): right of the red mark ours is better", fill="red")
    for i, (label, case) in enumerate(bars):
        top = 30 + 36 * i
        canvas.text((10, top), label, fill="black")
        least, ratio, most, one = (10 + min(640, scale * value) for value in
                                   (case["least"], case["ratio"], case["most"], 1))
        canvas.rectangle((10, top + 14, ratio, top + 26), fill="steelblue")
        canvas.line((least, top + 20, most, top + 20), fill="black")
        canvas.line((one, top + 12, one, top + 28), fill="red", width=2)
        canvas.text((670, top + 14), f"{case['ratio']:.2f}x", fill="black")
    image.save(path)


PARTS = {"train": train_part, "memory": memory, "infer": infer, "nms": nms, "loader": loader,
         "growth": growth, "startup": startup, "score": score_part}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--models", nargs="+", choices=OURS, default=["FCOS", "RetinaNet", "FSAF"])
    parser.add_argument("--size", type=int, nargs=2, default=(512, 672), metavar=("H", "W"))
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--objects", type=int, default=10, help="per picture of the training step")
    parser.add_argument("--amp", default="off", choices=AMP)
    parser.add_argument("--compile", action="store_true", help="ours with torch.compile")
    parser.add_argument("--data", default="shapes", help="pictures of infer and loader")
    parser.add_argument("--split", help="default: val of shapes, val2017")
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--max-size", type=int, default=1333)
    parser.add_argument("--pictures", type=int, default=20, help="of infer and loader")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "npu", "cpu"))
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    for name, least in (("rounds", 1), ("batch_size", 1), ("objects", 1), ("pictures", 1), ("min_size", 32),
                        ("max_size", 32)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(args, name)}")
    if min(args.size) < 64:
        parser.error(f"--size must be at least 64 64, not {args.size[0]} {args.size[1]}")
    args.split = args.split or ("val" if args.data == "shapes" else "val2017")
    device = setup_device(args.device, args.amp)[0]
    make_folder(args.out)
    machine = device_name(device)
    print(f"{machine}, torch {torch.__version__}")
    rows = []
    for part in args.parts or PARTS:
        rows += PARTS[part](args, device)
        write_json(args.out / "benchmark.json",
                   {"machine": machine, "torch": torch.__version__,
                    "args": {key: str(value) for key, value in vars(args).items()}, "rows": rows})
    plot(rows, args.out / "benchmark.png")


if __name__ == "__main__":
    run_script(main)

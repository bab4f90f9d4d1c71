"""benchmark.py measures what it says. How long anything takes is not asserted."""
import json
import math
import multiprocessing
from functools import partial

import pytest
import torch
from PIL import Image

import benchmark
import ops
from learning import TorchvisionDetector
from peers import OURS


@pytest.fixture
def bench(in_process, tmp_path):
    """Runs parts with one round on the CPU; gives the rows of benchmark.json and what was printed."""
    def run(*words):
        out = in_process(benchmark.main, *words, "--device", "cpu", "--rounds", 1, "--out", tmp_path)
        return json.loads((tmp_path / "benchmark.json").read_text())["rows"], out
    return run


@pytest.mark.slow
def test_parts_write_ratios_and_a_plot(bench, tmp_path):
    pytest.importorskip("torchvision")
    rows, out = bench("nms", "loader", "--pictures", 4, "--min-size", 64, "--max-size", 96)
    assert [row["title"].split()[0] for row in rows] == ["NMS", "NMS", "NMS", "4"]
    for row in rows:
        assert list(row["cases"]) == ["ours", "torchvision"] and row["cases"]["ours"]["ratio"] == 1
        assert row["cases"]["torchvision"]["least"] <= row["cases"]["torchvision"]["most"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    assert "torchvision" in out


@pytest.mark.slow
@pytest.mark.parametrize("model", OURS)
def test_a_training_step_of_every_model_is_measured(bench, model):
    (row,), _ = bench("train", "--models", model, "--size", 64, 96, "--batch-size", 1)
    assert row["cases"]["ours"]["value"] > 0 and 0 < row["peak"]
    operators = {case: count["operators"] for case, count in row["operators"].items()}
    assert operators["ours"] <= 0.8 * operators.get("torchvision", math.inf)
    if model not in ("Faster R-CNN", "DeFRCN"):  # the shapes of proposals depend on values
        assert row["operators"]["ours"]["waits"] == 0
    assert ("torchvision" in row["cases"]) == (model in ("FCOS", "RetinaNet", "Faster R-CNN"))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["FCOS", "RetinaNet"])
def test_both_libraries_learn_and_their_curves_are_drawn(bench, small_shapes, tmp_path, model):
    pytest.importorskip("torchvision")
    (row,), out = bench("learn", "--models", model, "--steps", 40, "--batch-size", 4, "--min-size", 128,
                        "--max-size", 128)
    for case in ("ours", "torchvision"):
        (curve,) = row["curves"][case]
        assert [point["step"] for point in curve] == [10, 20, 30, 40] and f"{model} {case}, seed 0" in out
        assert all(later["seconds"] > sooner["seconds"] for sooner, later in zip(curve, curve[1:]))
        assert all(point["AP"] is not None for point in curve)
    assert (tmp_path / "learning.png").stat().st_size > 1000


def test_torchvision_trains_on_the_same_images_and_objects():
    """torchvision's model gets every image without its padding, and neither padding nor crowds as objects."""
    pytest.importorskip("torchvision")
    model = TorchvisionDetector("FCOS", 2).train()
    seen = []
    model.detector.forward = lambda images, targets: seen.append((images, targets)) or {}
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    boxes = torch.tensor([[[1., 2, 30, 40], [0, 0, 0, 0]], [[3., 4, 20, 20], [5, 5, 9, 9]]])
    model(images, torch.tensor([[48, 64], [64, 32]]), boxes, torch.tensor([[1, -1], [0, -2]]))
    (pictures, targets), = seen
    assert [tuple(picture.shape) for picture in pictures] == [(3, 48, 64), (3, 64, 32)]
    assert all(picture.max() == 1 for picture in pictures)
    assert [target["labels"].tolist() for target in targets] == [[1], [0]]
    assert [target["boxes"].tolist() for target in targets] == [[[1, 2, 30, 40]], [[3, 4, 20, 20]]]


def test_torchvision_detects_at_the_size_of_the_images():
    pytest.importorskip("torchvision")
    model = TorchvisionDetector("FCOS", 2).eval()
    seen = []
    model.detector.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        model.network(torch.zeros(1, 3, 64, 96, dtype=torch.uint8), torch.tensor([[64, 96]]))
    assert seen == [(1, 3, 64, 96)]


def test_views_are_no_operators_and_only_values_and_masks_are_waited_for():
    values, index = torch.arange(4.), torch.tensor([0, 2])

    def step():
        square = values.view(2, 2) * 2  # one operator
        positive = values[values > 0]  # two operators and a wait for the number of elements
        total = positive.sum() + values[index].sum()  # four operators
        assert (total + square.sum()).item() == 20  # three operators; item waits

    assert benchmark.count_operators(step) == {"operators": 10, "nms": 0, "waits": 2, "nms_waits": 0}


def test_the_plain_nms_is_counted_apart():
    few, many = (benchmark.count_operators(partial(ops.nms, torch.rand(count, 4), torch.rand(count), 0.5))
                 for count in (10, 500))
    assert few["operators"] == many["operators"] == few["waits"] == many["waits"] == 0
    assert 0 < few["nms"] < many["nms"] and 0 < few["nms_waits"] < many["nms_waits"]


def test_busy_processes_end_with_the_block_also_after_an_error(monkeypatch):
    monkeypatch.setattr(benchmark.time, "sleep", lambda seconds: None)
    with pytest.raises(KeyError), benchmark.busy_processes(2):
        running = multiprocessing.active_children()
        assert len(running) == 2
        raise KeyError
    assert not any(process.is_alive() for process in running) and not multiprocessing.active_children()


def test_ratios_are_theirs_over_ours():
    row = benchmark.report_ratios("x", {"ours": [1.0, 2.0, 2.0], "theirs": [2.0, 3.0, 8.0]}, per=10)
    assert row["cases"]["ours"]["value"] == 200 and row["cases"]["theirs"]["value"] == 300
    theirs = row["cases"]["theirs"]
    assert (theirs["ratio"], theirs["least"], theirs["most"]) == (2.0, 1.5, 4.0)


@pytest.mark.parametrize(("words", "message"), [
    (["trian"], "there is no part trian; parts are train, memory, infer"),
    (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    (["nms", "--load", "-1"], "--load must be at least 0, not -1"),
    (["--size", "50", "60"], "--size must be at least 64"),
    (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU or NPU")])
def test_wrong_arguments_are_named(mistake, words, message):
    assert message in mistake(benchmark.main, *words)


def test_the_plot_has_a_bar_per_peer_and_is_absent_without_peers(tmp_path):
    path = tmp_path / "benchmark.png"
    times = {"ours": [1.0], "torchvision": [2.0], "torchvision bf16": [30.0]}
    benchmark.plot([benchmark.report_ratios("x" * 80, times)], path)
    with Image.open(path) as image:
        assert image.height == 2 * 36 + 30
    benchmark.plot([], path)
    assert not path.exists()


def test_every_round_times_all_cases_in_turn():
    order = []
    cases = {name: lambda name=name: order.append(name) for name in "ab"}
    times = benchmark.time_interleaved(cases, 2, torch.device("cpu"))
    assert order == list("ababab") and [len(values) for values in times.values()] == [2, 2]

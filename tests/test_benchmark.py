"""benchmark.py measures what it says it does; how long anything takes is not asserted."""
import json

import pytest
import torch
from PIL import Image

import benchmark


@pytest.fixture
def bench(tmp_path, monkeypatch):
    def run(*words):
        monkeypatch.setattr("sys.argv", ["benchmark.py", *map(str, words), "--device", "cpu", "--rounds", "1",
                                         "--out", str(tmp_path)])
        benchmark.main()
        return json.loads((tmp_path / "benchmark.json").read_text())["rows"]
    return run


@pytest.mark.slow
def test_parts_write_ratios_and_a_plot(bench, tmp_path, capsys):
    pytest.importorskip("torchvision")
    rows = bench("nms", "loader", "--pictures", 4, "--min-size", 64, "--max-size", 96)
    assert [row["title"].split()[0] for row in rows] == ["NMS", "NMS", "NMS", "4"]
    for row in rows:
        assert list(row["cases"]) == ["ours", "torchvision"] and row["cases"]["ours"]["ratio"] == 1
        assert row["cases"]["torchvision"]["least"] <= row["cases"]["torchvision"]["most"]
    assert (tmp_path / "benchmark.png").stat().st_size > 1000
    assert "torchvision" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("model", benchmark.OURS)
def test_a_training_step_of_every_model_is_measured(bench, model):
    row, = bench("train", "--models", model, "--size", 64, 96, "--batch-size", 1)
    assert row["cases"]["ours"]["value"] > 0 and 0 < row["peak"]
    assert ("torchvision" in row["cases"]) == (model in ("FCOS", "RetinaNet", "Faster R-CNN"))


def test_ratios_are_theirs_over_ours(capsys):
    row = benchmark.compared("x", {"ours": [1.0, 2.0, 2.0], "theirs": [2.0, 3.0, 8.0]}, per=10)
    assert row["cases"]["ours"]["value"] == 200 and row["cases"]["theirs"]["value"] == 300
    assert (row["cases"]["theirs"]["ratio"], row["cases"]["theirs"]["least"],
            row["cases"]["theirs"]["most"]) == (2.0, 1.5, 4.0)


@pytest.mark.parametrize(("words", "message"), [
    (["trian"], "there is no part trian; parts are train, memory, infer"),
    (["--rounds", "0"], "--rounds must be at least 1, not 0"),
    (["--size", "50", "60"], "--size must be at least 64"),
    (["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU or NPU")])
def test_wrong_arguments_are_named(mistake, words, message):
    assert message in mistake(benchmark.main, *words)


def test_the_plot_names_the_peers_or_is_not_there(tmp_path):
    path = tmp_path / "benchmark.png"
    rows = [benchmark.compared("x" * 80, {"ours": [1.0], "torchvision": [2.0], "torchvision bf16": [30.0]})]
    benchmark.plot(rows, path)
    with Image.open(path) as image:
        assert image.height == 2 * 36 + 30
    benchmark.plot([], path)
    assert not path.exists()


def test_turns_are_taken_round_by_round():
    order = []
    times = benchmark.take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2,
                                 torch.device("cpu"))
    assert order == list("ababab") and [len(values) for values in times.values()] == [2, 2]

"""With torch alone, torchvision not to be imported, everything but its own weight files works."""
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import ops

BLOCKED = """
import sys
sys.modules["torchvision"] = None  # importing it raises ImportError
sys.path.insert(0, sys.argv[1])
import data, evaluate, train
data.SHAPES_IMAGES = {"train": 40, "val": 8}

def run(module, *words):
    sys.argv = ["script.py", *words]
    evaluate.run_script(module.main)

tiny = ("--device", "cpu", "--workers", "0", "--batch-size", "2", "--max-steps", "2", "--no-eval")
for model in ("fcos", "fsaf", "faster_rcnn"):
    run(train, "--model", model, "--out", model, *tiny)
    run(evaluate, "--ckpt", model + "/last.pth", "--device", "cpu", "--workers", "0", "--pictures", "0")
assert not any(name.startswith("torchvision.") for name in sys.modules)
"""


@pytest.mark.slow
def test_training_and_scoring_need_torch_alone(tmp_path):
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(ROOT)], cwd=tmp_path, capture_output=True,
                          text=True, timeout=500, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    for model in ("fcos", "fsaf", "faster_rcnn"):
        assert set(json.loads((tmp_path / model / "metrics.json").read_text())) > {"AP", "AP50"}


def test_a_torchvision_that_cannot_be_imported_is_done_without(monkeypatch):
    """A build that does not fit torch raises RuntimeError, not ImportError."""
    class Broken:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "torchvision":
                raise RuntimeError("operator torchvision::nms does not exist")

    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    ops._torchvision_ops.cache_clear()
    try:
        assert ops._torchvision_ops("cpu") is None
        boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.], [20., 20., 30., 30.]])
        assert ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    finally:
        ops._torchvision_ops.cache_clear()

"""With torch alone, where torchvision cannot be imported, everything except its own weight files works."""
import json
import subprocess
import sys

import pytest
import torch
from conftest import PROGRAMS, environment

import ops


@pytest.mark.slow
def test_training_and_scoring_need_torch_alone(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAMS / "without_torchvision.py")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=500, env=environment())
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

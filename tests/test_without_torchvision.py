"""With torch alone, where torchvision cannot be imported, everything except its own weight files works."""
import json
import subprocess
import sys

import pytest
from conftest import PROGRAMS, environment


@pytest.mark.slow
def test_training_and_scoring_need_torch_alone(tmp_path):
    done = subprocess.run([sys.executable, str(PROGRAMS / "without_torchvision.py")], cwd=tmp_path,
                          capture_output=True, text=True, timeout=500, env=environment())
    assert done.returncode == 0, done.stderr
    for model in ("fcos", "fsaf", "faster_rcnn"):
        assert set(json.loads((tmp_path / model / "metrics.json").read_text())) > {"AP", "AP50"}

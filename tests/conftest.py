"""Paths and small inputs that several test files share."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("DETECTION_SHARED", ROOT.parent / "shared"))
DATA = Path(os.environ.get("DETECTION_DATA", SHARED / "data"))
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402


@pytest.fixture
def coco_mini() -> Path:
    return _data("coco-mini")


@pytest.fixture
def bccd() -> Path:
    return _data("bccd")


def _data(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent (set DETECTION_DATA)")
    return DATA / name


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """Runs a script's main() in this process, in a fresh folder; gives the line with which it stops."""
    def run(main, *words) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            evaluate.run_script(main)
        return stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    return run


@pytest.fixture
def script(tmp_path):
    """Runs a command line of the repository in a fresh folder; gives (exit code, stdout, stderr)."""
    def run(*words, ranks: int = 1, timeout: int = 300, env: dict | None = None):
        command = [sys.executable]
        if ranks > 1:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command += [str(ROOT / words[0]), *map(str, words[1:])]
        environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, 2 // ranks)), "CUDA_VISIBLE_DEVICES": "",
                       **(env or {})}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=timeout)
        return done.returncode, done.stdout, done.stderr
    return run

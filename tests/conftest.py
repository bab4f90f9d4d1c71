"""Paths, data and ways to run a script that several test files share."""
import contextlib
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "programs"
SHARED = Path(os.environ.get("DETECTION_SHARED", ROOT.parent / "shared"))
DATA = Path(os.environ.get("DETECTION_DATA", SHARED / "data"))
sys.path.insert(0, str(ROOT))
import checkpoint  # noqa: E402
import recipes  # noqa: E402
import shapes  # noqa: E402
from runtime import run_main  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """The recorded gradients were made with two threads; their last digits depend on it."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def float32_recipe(monkeypatch):
    """The defaults for shapes, whatever the processor."""
    monkeypatch.setattr(recipes, "has_bf16", lambda device: False)


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    return _data("coco-mini")


@pytest.fixture(scope="session")
def bccd() -> Path:
    return _data("bccd")


def _data(name: str) -> Path:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is absent (set DETECTION_DATA)")
    return DATA / name


@pytest.fixture
def small_shapes(monkeypatch):
    """The built-in set with few images."""
    monkeypatch.setattr(shapes, "SHAPES_IMAGES", {"train": 80, "val": 16})


# ---------------------------------------------------------------------------- scripts

def train_small(folder: Path, *words) -> str:
    """A short training on few images in this process; gives what it printed. For fixtures of a module."""
    import train
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setattr(shapes, "SHAPES_IMAGES", {"train": 80, "val": 16})
        patch.setattr(sys, "argv", ["train.py", "--device", "cpu", "--workers", "0", "--no-eval",
                                    "--out", str(folder), *map(str, words)])
        train.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return printed.getvalue()


@pytest.fixture
def in_process(tmp_path, monkeypatch, capsys, small_shapes):
    """Runs a script's main() in this process, in a fresh folder; gives what it printed."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(main, *words) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out
    yield run
    for number, handler in handlers.items():  # train.py replaces them
        signal.signal(number, handler)


@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys, small_shapes):
    """Runs a script's main() in this process, in a fresh folder; gives the line with which it stops."""
    def run(main, *words) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        return stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    return run


def write_checkpoint(path: Path, *words, names=("a", "b", "c"), leave_out=(), **args):
    """A checkpoint with random weights, as train.py with these words writes it. args: other arguments."""
    args = {**vars(recipes.parse_args([str(word) for word in words])[0]), **args}
    args = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()
            if key not in leave_out}
    model = checkpoint.build_model({"fpn": False, **args}, len(names))
    checkpoint.save_checkpoint(path, {"model": model.state_dict(), "args": args, "names": list(names),
                                      "category_ids": list(range(1, len(names) + 1)), "step": 1})


def environment(threads: int = 1, **more) -> dict:
    """Variables of a process that a test starts: no GPU, output line by line."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": "",
            "PYTHONUNBUFFERED": "1", **more}


def torchrun(ranks: int) -> tuple:
    return ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}") if ranks > 1 else ()


@pytest.fixture
def script(tmp_path):
    """Runs a script of the repository as a process in a fresh folder; gives (exit code, stdout, stderr)."""
    def run(*words, ranks: int = 1, timeout: int = 300):
        command = [sys.executable, *torchrun(ranks), str(ROOT / words[0]), *map(str, words[1:])]
        done = subprocess.run(command, cwd=tmp_path, env=environment(max(1, 2 // ranks)), capture_output=True,
                              text=True, timeout=timeout)
        return done.returncode, done.stdout, done.stderr
    return run


@pytest.fixture
def background():
    """Starts a script in the background in a process group of its own; kills what is left at the end."""
    started = []

    def start(folder, *words, launcher=(), **more) -> subprocess.Popen:
        command = [sys.executable, *launcher, str(ROOT / words[0]), *map(str, words[1:])]
        run = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True, env=environment(**more))
        started.append(run)
        return run
    yield start
    for run in started:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.communicate()


def wait_for(run: subprocess.Popen, start_of_line: str) -> str:
    """The first line of a background script that starts so."""
    deadline = time.monotonic() + 120
    while not (line := run.stdout.readline()).startswith(start_of_line):
        assert (line or run.poll() is None) and time.monotonic() < deadline, f"ended before {start_of_line!r}"
    return line

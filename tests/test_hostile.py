"""Damaged and hostile inputs: one line each, no crash, no memory beyond what a file declares, no escape."""
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROGRAMS, ROOT, environment, train_small
from PIL import Image

import data
import runtime
from data import DataError, DetectionDataset, read_image
from runtime import atomic_write, harmless
from subsets import k_shot_subset
from weights import WeightsError, read_file, read_weight_file

# ---------------------------------------------------------------------------- random damage

def fuzz(kinds, seed, count):
    words = [sys.executable, PROGRAMS / "fuzz.py", kinds, str(seed), str(count)]
    return subprocess.run(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, timeout=600)


@pytest.mark.parametrize(("kinds", "count"), [
    ("pickles,archives,images,coco_files,voc_files,yolo_files,result_files,metrics_files,commands", 60),
    pytest.param("checkpoints", 15, marks=pytest.mark.slow)])
def test_random_damage_never_ends_in_a_traceback(kinds, count):
    done = fuzz(kinds, 0, count)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(f"{count} cases") == len(kinds.split(","))
    assert " 0 accepted" not in done.stdout  # some cases are harmless, so the inputs are read to their end


@pytest.mark.slow
def test_ten_thousand_damaged_pickles_crash_nothing():
    done = fuzz("pickles", 1, 10_000)
    assert done.returncode == 0, done.stdout


# ---------------------------------------------------------------------------- pickles

class Calls:
    """Is pickled as a call, and a state for its result."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def fields_of_objects():
    """A dtype whose state makes an array of Python objects out of the bytes of the file."""
    inner = Calls(np.dtype, "O", False, True)
    return Calls(np.dtype, "V8", False, True,
                 state=(3, "|", (inner, (1,)), None, None, 8, 1, 0))


@pytest.mark.parametrize(("content", "words"), [
    (lambda: np.array(["a", None], object), "refused dtype 'O8'"),
    (fields_of_objects, "refused dtype"),
    (lambda: Calls(np.dtype, "f4", state=(3, "<", None, ("a",), {"a": (1, 2)}, 4, 4, 0)), "with fields"),
    (lambda: np.zeros(2, [("a", "f4")]), "refused dtype 'V4'"),
    (lambda: Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b",
                   state=(1, (10 ** 9,), np.dtype("f4"), False, b"1234")), "do not fit its content"),
    (lambda: Calls(np._core.multiarray._reconstruct, np.ndarray, (0,), b"b",
                   state=(1, (-1,), np.dtype("f4"), False, b"")), "do not fit its content"),
    (lambda: Calls(np.frombuffer, b"1234"), "code"),
    (lambda: Calls(np.ndarray, (10 ** 9,)), "cannot be read as weights")])
def test_pickles_hold_plain_arrays_only(tmp_path, content, words):
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"conv1_w": content()}, 2))
    with pytest.raises(WeightsError, match=words):
        read_weight_file(path)


def test_pickled_arrays_of_every_layout_are_read(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"c": rng.normal(size=(3, 4, 5)), "f": np.asfortranarray(rng.normal(size=(3, 4))),
              "big": np.arange(5, dtype=">i4"), "half": np.ones(3, np.float16), "none": np.zeros((0, 2)),
              "point": np.array(2.5), "strided": np.arange(12.0)[::3], "u": np.arange(4, dtype=np.uint8)}
    for protocol in range(2, 6):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
        found = read_weight_file(tmp_path / "x.pkl")
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[key].numpy(), arrays[key]) for key in arrays)


# ---------------------------------------------------------------------------- memory

def grows_by(function) -> float:
    """GB that a function takes at its peak."""
    def peak() -> float:
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = peak()
    function()
    return peak() - before


def test_the_peak_of_memory_is_seen():
    assert 0.39 < grows_by(lambda: bytearray(b"x") * 400_000_000) < 0.5


def test_a_small_file_takes_little_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        text = b"X" + (400_000_000).to_bytes(4, "little") + bytes(400_000_000)
        archive.writestr("x/data.pkl", b"\x80\x02" + text)
    length = (2 * 10 ** 9).to_bytes(8, "little")
    (tmp_path / "long_text.pkl").write_bytes(b"\x80\x04\x8e" + length + b"abc.")
    (tmp_path / "long_bytes.pkl").write_bytes(b"\x80\x05\x96" + length + b"abc.")
    (tmp_path / "far_memo.pkl").write_bytes(b"\x80\x02}r" + (2 ** 28).to_bytes(4, "little") + b".")
    nested = [1] * 10
    for _ in range(12):
        nested = [nested] * 10
    (tmp_path / "nested.pkl").write_bytes(pickle.dumps(nested))

    def read_all():
        for path in tmp_path.iterdir():
            with suppress(WeightsError):  # far_memo.pkl is an empty dict
                read_weight_file(path)
    assert grows_by(read_all) < 0.3


def test_an_image_of_another_size_is_not_decoded(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 50_000

    def read():
        with pytest.raises(DataError, match="the image is 9000 x 9000 .* its annotation says 100 x 100"):
            read_image(str(tmp_path / "a.png"), (100, 100))
    assert grows_by(read) < 0.05


# ---------------------------------------------------------------------------- damage that is noticed

def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model": {"w": torch.randn(3000)}, "step": 3}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data/0"))
    start = whole.index(torch.load(path, weights_only=True)["model"]["w"].numpy().tobytes())
    for offset in range(start, start + entry.file_size, 997):
        damaged = bytearray(whole)
        damaged[offset] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(WeightsError, match="x.pth: .*checksum of .*data/0"):
            read_file(path)


def test_only_regular_files_are_written(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "pipe"):
        with pytest.raises(OSError, match="is not a regular file"), atomic_write(tmp_path / name) as file:
            file.write(b"x")
    with pytest.raises(OSError, match="is not a regular file"), atomic_write(Path("/dev/null")):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_bytes() == b"x"
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "pipe", "link", "target"}
    with pytest.raises(DataError, match="no such image file"):
        read_image(str(tmp_path / "pipe"))


# ---------------------------------------------------------------------------- names

@pytest.mark.parametrize("voc", [True, False])
def test_class_names_do_not_lead_out_of_the_folder(tmp_path, voc):
    names = ["../../escaped", "a/b", "a_b", "n" * 300, "traffic light"]
    dataset = DetectionDataset(names, range(1, 6), image_ids=range(5), paths=[f"{i}.jpg" for i in range(5)],
                               sizes=[(9, 9)] * 5, boxes=[[0, 0, 5, 5]] * 5, classes=range(5),
                               image_index=range(5), voc=voc)
    k_shot_subset(dataset, names, 1, 0, None, tmp_path / "out" / "run")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5 and all((tmp_path / "out" / "run") in path.parents for path in files)
    lists = tmp_path / "out" / "run" / ("vocsplit" if voc else "cocosplit")
    assert len(k_shot_subset(dataset, names, 1, 0, lists, None).boxes) == 5
    assert any("1shot_traffic light_train" in path.name for path in files)  # the published form


def test_what_is_printed_cannot_steer_the_terminal(capsys, monkeypatch):
    assert harmless("a\x1b[2J\x07\r\ud800b") == "a\\x1b[2J\\x07\\r\\ud800b"
    assert harmless("b\tc\nd \u00e4\u4e2d") == "b\tc\nd \u00e4\u4e2d"
    runtime.print0("x\x1b]0;title\x07")
    assert capsys.readouterr().out == "x\\x1b]0;title\\x07\n"

    def fails():
        raise DataError("bad \x1b[31mname\ud800")
    with pytest.raises(SystemExit) as stop:
        runtime.run_main(fails)
    assert stop.value.code == "error: bad \\x1b[31mname\\ud800"
    with pytest.raises(DataError, match=r"'a\\x1bb' cannot be a class name"):
        data.check_names(["ok", "a\x1bb"], "file")


# ---------------------------------------------------------------------------- the screen

@pytest.mark.slow
@pytest.mark.parametrize(("script", "moments"), [("train", (0.3, 0.8, 1.5)), *(
    (script, (0.8,)) for script in ("evaluate", "browse", "export", "fewshot", "benchmark"))])
def test_ctrl_c_while_importing_is_one_line(script, moments):
    for seconds in moments:
        run = subprocess.Popen([sys.executable, ROOT / f"{script}.py", "--nonsense"], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, env=environment())
        time.sleep(seconds)
        run.send_signal(signal.SIGINT)
        out = run.communicate(timeout=60)[0]
        assert "Traceback" not in out and len(out.splitlines()) <= 1, out


@pytest.mark.slow
@pytest.mark.parametrize(("pipe", "words"), [
    ("best.pth", ["train.py", "--resume", "run/last.pth", "--max-steps", 2]),
    ("log.jsonl", ["train.py", "--resume", "run/last.pth", "--max-steps", 2]),
    ("metrics.json", ["fewshot.py", "aggregate", "run"]),
    ("detections.json", ["evaluate.py", "--detections", "run/detections.json", "--data", "shapes"]),
    ("weights.pth", ["evaluate.py", "--ckpt", "run/weights.pth"])])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(pipe, words, script, tmp_path):
    if words[0] == "train.py":
        train_small(tmp_path / "run", "--max-steps", 1, "--batch-size", 2, "--log-every", 1)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / pipe).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "run" / pipe)
    more = ("--device", "cpu", "--workers", 0, "--pictures", 0) if words[0] == "train.py" else ()
    code, _, err = script(*words, *more, timeout=120)
    assert code == 1 and err.startswith("error: ") and f"run/{pipe}" in err and err.count("\n") == 1

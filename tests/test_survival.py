"""Runs that are killed, interrupted, cut off from disk or workers, and spread over ranks and nodes."""
import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress

import pytest
import torch
from conftest import PROGRAMS, torchrun, wait_for, write_checkpoint

import train
from runlog import open_log, trim_log
from shapes import OUTLINES

TINY = ("train.py", "--device", "cpu", "--workers", 1, "--log-every", 1, "--out", "out", "--no-eval",
        "--train-split", "val")  # the small one
FILES = {"last.pth", "log.jsonl", "log.txt", "curves.png", ".lock"}  # that a run without evaluation leaves
TIMES = ("data_s", "step_s", "images_per_s", "memory_gb", "eta_s")


def rows(folder):
    """log.jsonl without what the clock says."""
    lines = (folder / "out" / "log.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def losses(folder):
    return [row["loss"] for row in rows(folder)]


def weights(folder):
    return torch.load(folder / "out" / "last.pth", weights_only=True)


def assert_equal_weights(one, two):
    assert one["step"] == two["step"] and one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][key]) for key, value in one["model"].items())


def being_written(folder, size=0):
    """Whether a checkpoint of at least `size` bytes is half written."""
    with suppress(FileNotFoundError):  # it was moved to its place at this moment
        return any(path.stat().st_size >= size for path in folder.glob("last.pth.*.tmp"))


# ---------------------------------------------------------------------------------------------- killed

@pytest.mark.slow
def test_twenty_kills_cost_nothing(background, tmp_path):
    """kill -9 at random moments and in the middle of writing a checkpoint; then all is as without."""
    steps = 45
    command = (*TINY, "--batch-size", 2, "--min-size", 64, "--max-size", 64, "--max-steps", steps,
               "--save-every", 1, "--log-every", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    out = background(whole, *command).communicate(timeout=300)[0]
    assert len(rows(whole)) == steps // 2 + 1, out
    moments = random.Random(0)
    in_writing = reached = 0
    for kill in range(20):
        resume = ("--resume",) if (killed / "out" / "last.pth").exists() else ()
        run = background(killed, *command, *resume)
        wait_for(run, "step ")
        time.sleep(moments.uniform(0, 0.6))
        while kill % 2 and not being_written(killed / "out", 10 ** 6):
            assert run.poll() is None, f"kill {kill}: the run came to its end"
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        in_writing += being_written(killed / "out")
        checkpoint = weights(killed)  # whole, whatever happened
        assert checkpoint["step"] >= reached
        reached = checkpoint["step"]
    print(f"20 kills, {in_writing} of them in the middle of writing; reached step {reached} of {steps}")
    assert in_writing >= 5 and reached < steps
    out = background(killed, *command, "--resume").communicate(timeout=300)[0]
    assert f"step {steps}/{steps}" in out
    assert_equal_weights(weights(killed), weights(whole))
    assert rows(killed) == rows(whole)
    assert {p.name for p in (killed / "out").iterdir()} == FILES


@pytest.mark.slow
def test_a_killed_rank_takes_the_others_with_it(background, tmp_path):
    run = background(tmp_path, *TINY, "--batch-size", 4, "--max-steps", 500, launcher=torchrun(2))
    wait_for(run, "step 3/")
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[1]), signal.SIGKILL)
    out = run.communicate(timeout=90)[0]
    assert run.returncode != 0 and "Signal 9 (SIGKILL)" in out


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    trim_log(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    path.unlink()
    trim_log(path, 2)
    assert path.read_text() == ""


@pytest.mark.slow
def test_a_run_on_a_full_disk_stops_with_one_line_and_goes_on_later(background, tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the checkpoint does not fit, the log does."""
    command = (*TINY, "--batch-size", 2, "--min-size", 64, "--max-size", 64, "--max-steps", 8)
    background(tmp_path, *command[:-1], 2).communicate(timeout=120)
    before = (tmp_path / "out" / "last.pth").read_bytes()
    run = background(tmp_path, *command, "--save-every", 2, "--resume",
                     launcher=(PROGRAMS / "limited_file_size.py",))
    out = run.communicate(timeout=120)[0]
    assert run.returncode == 1 and "Traceback" not in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: out/last.pth cannot be written") and "too large" in last
    assert (tmp_path / "out" / "last.pth").read_bytes() == before
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    out = background(tmp_path, *command, "--resume").communicate(timeout=120)[0]
    assert "step 8/8" in out and [row["step"] for row in rows(tmp_path)] == list(range(1, 9))


@pytest.mark.slow
def test_one_folder_takes_one_run(background, script, tmp_path):
    command = (*TINY, "--batch-size", 2, "--min-size", 64, "--max-size", 64, "--save-every", 2)
    run = background(tmp_path, *command, "--max-steps", 500)
    wait_for(run, "step 3/")
    for words in (command, (*command, "--resume"), (*command, "--out", "elsewhere/../out")):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        code, out, err = script(*words, "--max-steps", 600)
        assert code == 1 and "another run is writing there; choose another folder" in err
        assert "step" not in out.partition("lr ")[2] and "is now" not in out
    run.send_signal(signal.SIGTERM)
    out = run.communicate(timeout=60)[0]
    assert "interrupted: saved out/last.pth" in out
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, weights(tmp_path)["step"] + 1))
    half = tmp_path / "out" / "last.pth.0123abcd.tmp"  # of a process that was killed
    half.touch()
    code, out, err = script(*command, "--resume", "--max-steps", weights(tmp_path)["step"] + 1)
    assert code == 0 and not half.exists(), err


def test_a_new_run_keeps_the_files_of_an_earlier_one(tmp_path):
    (tmp_path / "last.pth").write_text("of the earlier run")
    (tmp_path / "log.jsonl").touch()
    with open_log(argparse.Namespace(out=tmp_path, resume=None), 0):
        assert {path.name for path in tmp_path.iterdir()} == {"earlier1_last.pth", "earlier1_log.jsonl",
                                                              "log.jsonl"}


def test_a_run_resumed_elsewhere_keeps_what_it_finds_there(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    for folder in (own, other):
        folder.mkdir()
        (folder / "last.pth").write_text("weights")
        (folder / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    with open_log(argparse.Namespace(out=own, resume=tmp_path / "other" / ".." / "own" / "last.pth"), 1):
        assert (own / "last.pth").exists() and (own / "log.jsonl").read_text() == '{"step": 1}\n'
    with open_log(argparse.Namespace(out=other, resume=own / "last.pth"), 1):
        assert (other / "log.jsonl").read_text() == "" and not (other / "last.pth").exists()
        assert (other / "earlier1_last.pth").read_text() == "weights"
        assert len((other / "earlier1_log.jsonl").read_text().splitlines()) == 2


# ---------------------------------------------------------------------------------------------- workers

@pytest.mark.slow
def test_a_loader_process_that_dies_is_named_with_its_image(script, tmp_path):
    deadly = PROGRAMS / "deadly_loader.py"
    command = (deadly, "train", *TINY[1:], "--batch-size", 2, "--min-size", 64, "--max-size", 64)
    code, _, err = script(*command, "--train-split", "train", "--max-steps", 1)
    assert code == 0, err
    for words in ((deadly, "evaluate", "--ckpt", "out/last.pth", "--workers", 1),
                  (*command, "--max-steps", 100)):
        code, _, err = script(*words)
        last = err.strip().splitlines()[-1]
        assert code == 1 and "Traceback" not in err
        assert last.startswith("error: a loader process died at image 8 (shapes_val_00007) (")


# ---------------------------------------------------------------------------------------------- ranks

@pytest.mark.slow
@pytest.mark.parametrize(("words", "message"), [
    (("--batch-size", 3), "error: --batch-size 3 is not divisible by 2 ranks"),
    (("--data", "nowhere", "--batch-size", 4), "error: data folder nowhere does not exist"),
    (("--batch-size", -4), "error: --batch-size must be positive")])
def test_of_several_ranks_one_says_why(script, words, message):
    code, out, err = script(*TINY, *words, "--max-steps", 2, ranks=2)
    assert code != 0 and (out + err).count(message) == 1, err
    assert err.count("Traceback") == 1 and "ChildFailedError" in err  # torchrun's own


@pytest.mark.slow
def test_a_rank_that_fails_alone_stops_all_with_its_reason_once(script, tmp_path, coco_mini):
    """One broken image, which one of two ranks meets in the middle of the run."""
    folder = tmp_path / "coco"
    (folder / "train2017").mkdir(parents=True)
    (folder / "annotations").symlink_to(coco_mini / "annotations")
    for number, image in enumerate(sorted((coco_mini / "train2017").iterdir())):
        if number == 50:
            (folder / "train2017" / image.name).write_bytes(b"\xff\xd8 this is no image")
        else:
            (folder / "train2017" / image.name).symlink_to(image)
    began = time.time()
    code, out, err = script(*TINY, "--data", folder, "--weights", "none", "--backbone", "resnet18",
                            "--fpn-channels", 64, "--min-size", 64, "--max-size", 96, "--batch-size", 2,
                            "--train-split", "train2017", "--max-steps", 111, "--no-verify-images",
                            ranks=2, timeout=200)
    assert code != 0 and "step 1/111" in out and "step 111/" not in out and time.time() - began < 120
    assert (out + err).count("cannot be read as an image") == 1 and "go on with --resume out/last.pth" in err
    saved = torch.load(tmp_path / "out" / "last.pth", weights_only=True)
    assert 0 < saved["step"] < 111
    if saved["step"] > 1:  # both ranks stopped after the same step
        assert f"step {saved['step']}/111" in out and f"step {saved['step'] + 1}/111" not in out
    assert err.count("Traceback") == 1 and "ChildFailedError" in err  # torchrun's own


SPREAD = (*TINY, "--batch-size", 16, "--min-size", 64, "--max-size", 64, "--norm", "affine", "--max-steps", 3)


@pytest.mark.slow
def test_sixteen_images_are_sixteen_images_on_1_2_or_4_ranks(script, tmp_path):
    found = {}
    for ranks in (1, 2, 4):
        code, out, err = script(*SPREAD, ranks=ranks)
        assert code == 0 and f"batch 16 = {ranks} rank(s)" in out, err
        found[ranks] = losses(tmp_path)
    for ranks in (2, 4):
        assert found[ranks] == pytest.approx(found[1], rel=5e-4)


@pytest.mark.slow
def test_two_nodes_train_as_two_ranks_of_one(script, background, tmp_path):
    code, _, err = script(*SPREAD, ranks=2)
    assert code == 0, err
    expected = losses(tmp_path)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agent = ("-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
             f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test")
    nodes = [background(tmp_path, *SPREAD, launcher=agent) for _ in range(2)]
    outputs = [node.communicate(timeout=200)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("batch 16 = 2 rank(s)" in out for out in outputs) == 1  # rank 0 speaks, on one of the nodes
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_resuming_says_what_changes(script, tmp_path):
    command = (*TINY, "--min-size", 64, "--max-size", 64)
    assert script(*command, "--batch-size", 4, "--max-steps", 2, ranks=2)[0] == 0
    code, out, err = script(*command, "--batch-size", 2, "--max-steps", 3, "--train-split", "train",
                            "--resume")
    assert code == 0, err
    assert "resume changes the number of ranks: 2 -> 1" in out
    assert "resume changes batch_size: 4 -> 2" in out and "resume changes train_split: val -> train" in out
    assert re.search(r"resume changes the data: 200 images, \d+ boxes -> 4000, 12761", out)


@pytest.mark.slow
def test_an_interruption_of_one_rank_stops_all_after_the_step(background, tmp_path):
    run = background(tmp_path, *TINY, "--batch-size", 4, "--max-steps", 500, "--log-every", 3,
                     launcher=torchrun(2))
    wait_for(run, "step 3/")
    ranks = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    with suppress(ProcessLookupError):
        os.kill(int(ranks[1]), signal.SIGTERM)
    out = run.communicate(timeout=90)[0]
    assert run.returncode == 0 and "interrupted: saved out/last.pth" in out
    assert 3 <= weights(tmp_path)["step"] < 500


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_to_every_process_saves(background, tmp_path, ranks):
    """Schedulers signal the whole group: torchrun, the ranks and their loader processes, more than once."""
    run = background(tmp_path, *TINY, "--batch-size", 4, "--max-steps", 500, "--save-every", 1000,
                     launcher=torchrun(ranks))
    wait_for(run, "step 3/")
    os.killpg(run.pid, signal.SIGTERM)
    time.sleep(0.05)
    os.killpg(run.pid, signal.SIGTERM)
    out = run.communicate(timeout=90)[0]
    assert "interrupted: saved out/last.pth" in out and "loader process" not in out and "memory" not in out
    assert 3 <= weights(tmp_path)["step"] < 500
    assert subprocess.run(["pgrep", "-g", str(run.pid)]).returncode == 1  # nobody is left


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_a_killed_parent_leaves_behind_ends_by_itself(background, tmp_path, ranks):
    """Loader processes without their training; ranks without their torchrun, which save first."""
    run = background(tmp_path, *TINY, "--batch-size", 4, "--max-steps", 500, "--save-every", 1000,
                     launcher=torchrun(ranks))
    wait_for(run, "step 3/")
    children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
    assert len(children) == ranks  # a loader process, or two ranks
    run.kill()
    run.wait()
    deadline = time.time() + 60
    while any(os.path.exists(f"/proc/{child}") for child in children):
        assert time.time() < deadline, "they go on"
        time.sleep(0.2)
    if ranks > 1:
        assert 3 <= weights(tmp_path)["step"] < 500


def test_a_file_without_a_training_state_cannot_be_resumed(tmp_path, mistake):
    write_checkpoint(tmp_path / "last.pth", "--max-steps", "2", names=OUTLINES)
    line = mistake(train.main, "--resume", tmp_path / "last.pth", "--device", "cpu")
    assert "last.pth: holds weights but no training to go on with: give it as --init" in line

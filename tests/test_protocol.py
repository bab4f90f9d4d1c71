"""The few-shot protocol as one command: interrupted and continued, refused, printed; published rows."""
import shlex
import signal

import pytest
from conftest import train_small, wait_for

import fewshot
from data import COCO_NOVEL, VOC_NOVEL
from protocol import PUBLISHED, SHOTS, forgetting_table, published_table, read_run, seed_range

TINY = ("--device", "cpu", "--batch-size", 2, "--workers", 0, "--roi-samples", 4, "--proposals", 10, 5,
        "--min-size", 64, "--max-size", 86)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    train_small(folder, "--model", "defrcn", "--stage", "base", "--max-steps", 2, *TINY)
    return folder / "last.pth"


@pytest.mark.slow
def test_an_interrupted_protocol_goes_on_to_the_same_table(base, script, background, tmp_path):
    words = ("fewshot.py", "run", "--base", base, "--shots", 1, "--seeds", "0-1", "--generalized")
    training = ("--", *TINY, "--max-steps", 6, "--log-every", 1, "--save-every", 1, "--pictures", 0)
    code, whole, err = script(*words, "--out", "all", *training)
    assert code == 0, err

    run = background(tmp_path, *words, "--out", "cut", *training)
    wait_for(run, "step 2/6")
    run.send_signal(signal.SIGTERM)  # to this process alone; it passes the signal on
    out, _ = run.communicate(timeout=120)
    assert "interrupted: saved" in out and "interrupted in cut/1shot_seed0; the same command goes on" in out
    assert run.returncode == 1 and not (tmp_path / "cut/1shot_seed1").exists()
    code, out, err = script(*words, "--out", "cut", *training)
    assert code == 0, err
    assert "--resume cut/1shot_seed0/last.pth" in out
    table = [text[text.index("\nrun "):] for text in (whole, out)]
    assert table[0].replace("all/", "cut/") == table[1] and "±" in table[1]
    (tmp_path / "cut/1shot_seed1/metrics.json").unlink()  # as if it had been killed while it was scored
    code, out, err = script(*words, "--out", "cut", *training)
    assert code == 0 and "evaluate.py --ckpt" in out and out.count("train.py") == 0, err
    assert out[out.index("\nrun "):] == table[1]
    code, out, err = script(*words, "--out", "cut", *training, "--clip", 1)
    assert code == 1 and "cut/protocol.json: the runs there have other settings" in err


def test_the_commands_are_printed(base, in_process, mistake):
    out = in_process(fewshot.main, "run", "--base", base, "--shots", 1, 5, "--seeds", "0-2", "--print",
                     "--", "--data", "my data")
    commands = [shlex.split(line) for line in out.splitlines()]
    assert len(commands) == 6 and commands[-1][-2:] == ["--data", "my data"]
    assert commands[4][2:10] == ["--model", "defrcn", "--stage", "novel", "--shots", "5", "--seed", "1"]
    assert commands[4][10:12] == ["--init", str(base)]
    assert "does not exist" in mistake(fewshot.main, "run", "--base", "no.pth", "--print")
    assert "invalid seed_range value: '3-1'" in mistake(fewshot.main, "run", "--base", base, "--seeds", "3-1")
    assert seed_range("7") == [7]


def test_published_rows_belong_to_classes_and_setting():
    assert "There are no published figures" in published_table(["arrow", "heart"], False)
    coco = published_table(list(COCO_NOVEL), False).splitlines()
    assert coco[0].startswith("published nAP on COCO") and coco[1].split()[-1] == "22.6"
    assert "nAP50_VOC07 on VOC, split 3" in published_table(list(VOC_NOVEL[3]), True)
    for (data, _), rows in PUBLISHED.items():
        assert all(len(values.split()) == (6 if data == "coco" else 5) for values in rows.values())
    assert len(SHOTS) == 6


def test_forgetting_is_the_change_of_the_base_classes():
    few_shot = {"stage": "novel", "data": "d", "model": "defrcn", "backbone": "r", "novel": ["c"], "seed": 0,
                "decouple": None, "shots": 1, "nAP": 0.1}
    runs = [read_run("r", {"AP": 0.2, "few_shot": few_shot, "per_class": {"a": ap, "b": 0.1, "c": 0.1}})
            for ap in (0.4, 0.5)]
    rows = forgetting_table({"a": 0.6, "b": 0.2, "empty": None}, runs).splitlines()[1:]
    assert [row.split() for row in rows] == [["a", "60.00", "45.00", "-15.00"],
                                             ["b", "20.00", "10.00", "-10.00"],
                                             ["mean", "40.00", "27.50", "-12.50"]]


def test_scores_that_are_not_of_a_run_end_in_one_line(mistake, tmp_path):
    (tmp_path / "a").mkdir()
    for content in ('{"few_shot": 3}', "[]", "[" * 100_000, "nul", '{"few_shot": {"stage": "novel"}}'):
        (tmp_path / "a" / "metrics.json").write_text(content)
        assert "error: a" in mistake(fewshot.main, "aggregate", "a")

"""The few-shot protocol: fine-tunings for every number of shots and seed, and their table.

`fewshot.py run` and `fewshot.py aggregate` are the commands. A run is a folder that train.py has written.
"""
from runtime import Place, UserError, blame, make_folder, print0, write_json  # before torch, see runtime.py

# isort: split
import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from checkpoint import ABLATION_ARGS, read_checkpoint
from data import COCO_NOVEL, VOC_NOVEL, DataError, read_text
from runlog import lock_folder

# ---------------------------------------------------------------------------------------------- table

# Runs that differ in one setting are in different rows.
SETTING_KEYS = ("data", "novel", "model", "fpn", "backbone", "cosine", "decouple", *ABLATION_ARGS,
                "calibrated", "generalized", "shots")
TABLE_KEYS = ("nAP", "nAP50", "nAP75", "nAP_VOC07", "nAP50_VOC07", "nAP75_VOC07", "bAP", "bAP50", "bAP_VOC07",
              "bAP50_VOC07", "AP")


class Run(NamedTuple):
    """A fine-tuned detector in the table."""
    name: str
    setting: dict  # of SETTING_KEYS
    seed: int
    shot_seed: int  # number of its list of shots
    scores: dict  # of TABLE_KEYS; None for a measure that it has not
    per_class: dict  # AP of every class


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """The few-shot scores of the runs in these folders. A calibrated run is there twice: after and before.

    Raises DataError that names the run.
    """
    runs = []
    for folder in folders:
        metrics = read_metrics(folder)
        runs.append(read_run(str(folder), metrics))
        if "before_calibration" in metrics:
            runs.append(read_run(str(folder), metrics["before_calibration"]))
    return runs


def read_run(name: str, metrics) -> Run:
    """The few-shot scores of a run. metrics: content of metrics.json. Raises DataError that names the run."""
    few_shot = metrics.get("few_shot") if isinstance(metrics, dict) else None
    if not isinstance(few_shot, dict) or few_shot.get("stage") != "novel":
        raise DataError(f"{name}: has no scores of --stage novel, so there is nothing to aggregate")
    with blame(name, DataError, "not the scores of a few-shot run"):
        setting = {key: few_shot.get(key, False) for key in SETTING_KEYS}
        scores = {key: metrics["AP"] if key == "AP" else few_shot.get(key) for key in TABLE_KEYS}
        run = Run(name, setting, few_shot["seed"], few_shot.get("shot_seed", few_shot["seed"]), scores,
                  metrics.get("per_class", {}))
        texts = [setting["data"], setting["model"], setting["backbone"], *setting["novel"]]
        scales, aps = setting["decouple"] or (0, 0), [ap for ap in scores.values() if ap is not None]
        if not (all(isinstance(text, str) for text in texts) and len(scales) == 2
                and all(isinstance(scale, (int, float)) and 0 <= scale < 1e9 for scale in scales)
                and all(isinstance(ap, (int, float)) and 0 <= ap <= 1 for ap in aps)
                and all(type(number) is int for number in (run.seed, run.shot_seed, setting["shots"]))):
            raise ValueError("an entry has an impossible value")
    return run


def aggregate(runs: list[Run]) -> list[dict]:
    """Mean and 95 % confidence interval over seeds, one row per setting and protocol.

    "lists" of a row is "own" if every run has the list of shots of its own seed, else the number of the list
    that all its runs have. The interval is 1.96 standard deviations (of the population, as TFA computes it)
    over the square root of the number of runs; None for a single run. Raises DataError for two runs of a row
    with the same seed.
    """
    runs_of = {}
    for run in runs:
        *words, shots = run.setting.values()
        runs_of.setdefault((*map(str, words), shots), []).append(run)
    rows = []
    for _, members in sorted(runs_of.items()):
        for lists, part in _by_lists(members):
            for one, other in combinations(part, 2):
                if (one.seed, one.shot_seed) == (other.seed, other.shot_seed):
                    raise DataError(f"{one.name} and {other.name} have the same setting and seed, {one.seed}")
            row = {**part[0].setting, "lists": lists, "seeds": sorted(run.seed for run in part)}
            for key in TABLE_KEYS:
                values = [run.scores[key] for run in part]
                if None not in values:
                    interval = float(1.96 * np.std(values) / np.sqrt(len(values)))
                    row[key] = [float(np.mean(values)), interval if len(values) > 1 else None]
            rows.append(row)
    return rows


def _by_lists(runs: list[Run]) -> list[tuple]:
    """The runs of a setting by protocol: ("own" or the number of a list of shots, runs).

    A run whose seed is also the number of its list belongs to both protocols.
    """
    numbers = sorted({run.shot_seed for run in runs if run.seed != run.shot_seed})
    own = [run for run in runs if run.seed == run.shot_seed]
    parts = [(number, [run for run in runs if run.shot_seed == number]) for number in numbers]
    has_own = any(run.shot_seed not in numbers for run in own)  # else they are only a part of the others
    return [("own", own), *parts] if has_own else parts


def aggregate_table(rows: list[dict]) -> str:
    """The rows of `aggregate` as text, in percent."""
    keys = [key for key in TABLE_KEYS if any(key in row for row in rows)]
    lines = [f"{'data':16} {'novel':20} {'model':12} {'scales':8} {'calibrated':10} {'setting':7} lists "
             "shots runs  " + "  ".join(f"{key:>13}" for key in keys)]
    for row in rows:
        cells = [_cell(*row[key]) if key in row else "" for key in keys]
        setting = "gFSOD" if row["generalized"] else "FSOD"
        scales = "{:g}, {:g}".format(*row["decouple"]) if row["decouple"] else "none"
        lines.append(f"{row['data'][-16:]:16} {','.join(row['novel'])[:20]:20} {row['model']:12} {scales:8} "
                     f"{'yes' if row['calibrated'] else 'no':10} {setting:7} {row['lists']!s:>5} "
                     f"{row['shots']:5} {len(row['seeds']):4}  " + "  ".join(f"{cell:>13}" for cell in cells)
                     + "".join(f"  {key} {row[key]}" for key in ABLATION_ARGS if row[key] is not False))
    return "\n".join(lines)


def _cell(mean: float, interval: float | None) -> str:
    return f"{100 * mean:6.2f}" + (" " * 7 if interval is None else f" ± {100 * interval:4.2f}")



# ---------------------------------------------------------------------------------------------- published

# Novel AP in percent (VOC: AP50) at SHOTS, from the papers and repositories that are named, not from here.
# "paper" and "repository" are DeFRCN's (arXiv 2108.09017). TFA's FSOD figures are those that DeFRCN cites.
SHOTS = (1, 2, 3, 5, 10, 30)
PUBLISHED = {
    ("coco", False): {"DeFRCN, paper": "9.3 12.9 14.8 16.1 18.5 22.6",
                      "DeFRCN, repository": "9.7 13.1 14.5 15.6 18.4 22.6",
                      "TFA": "4.4 5.4 6.0 7.7 10.0 13.7",
                      "MindSpore port": "5.9 8.1 11.0 11.0 13.4 15.9"},
    ("coco", True): {"DeFRCN, paper": "4.8 8.5 10.7 13.6 16.8 21.2",
                     "DeFRCN, repository": "4.8 8.5 10.7 13.5 16.7 21.0",
                     "TFA": "1.9 3.9 5.1 7.0 9.1 12.1",
                     "MindSpore port": "5.0 8.0 10.6 11.7 13.5 17.6"},
    (1, False): {"DeFRCN, paper": "53.6 57.5 61.5 64.1 60.8",
               "DeFRCN, repository": "55.1 57.4 61.1 64.6 61.5",
               "TFA": "39.8 36.1 44.7 55.7 56.0"},
    (1, True): {"DeFRCN, paper": "40.2 53.6 58.2 63.6 66.5",
               "DeFRCN, repository": "43.8 57.5 61.4 65.3 67.0",
               "TFA": "25.3 36.4 42.1 47.9 52.8"},
    (2, False): {"DeFRCN, paper": "30.1 38.1 47.0 53.3 47.9",
               "DeFRCN, repository": "32.1 40.5 47.9 52.9 47.5",
               "TFA": "23.5 26.9 34.1 35.1 39.1"},
    (2, True): {"DeFRCN, paper": "29.5 39.7 43.4 48.1 52.8",
               "DeFRCN, repository": "31.5 40.9 45.6 50.1 52.9",
               "TFA": "18.3 27.5 30.9 34.1 39.5"},
    (3, False): {"DeFRCN, paper": "48.4 50.9 52.3 54.9 57.4",
               "DeFRCN, repository": "48.9 51.9 52.3 55.7 59.0",
               "TFA": "30.8 34.8 42.8 49.5 49.8"},
    (3, True): {"DeFRCN, paper": "35.0 38.3 52.9 57.7 60.8",
               "DeFRCN, repository": "38.2 50.9 54.1 59.2 61.9",
               "TFA": "17.9 27.2 34.3 40.8 45.6"}}


def published_table(novel: list[str], generalized: bool) -> str:
    """The published rows for these novel classes as text; one line that says so where there are none."""
    splits = {"coco": COCO_NOVEL, **VOC_NOVEL}
    key = next((key for key, names in splits.items() if set(names) == set(novel)), None)
    if key is None:
        return "There are no published figures for these novel classes."
    what = "nAP on COCO" if key == "coco" else f"nAP50_VOC07 on VOC, split {key}"
    lines = [f"{f'published {what}, shots:':36} " + " ".join(f"{shots:5}" for shots in SHOTS)]
    for method, values in PUBLISHED[key, generalized].items():
        lines.append(f"{method:36} " + " ".join(f"{value:>5}" for value in values.split()))
    return "\n".join(lines)


def forgetting_table(before: dict, runs: list[Run]) -> str:
    """AP of the base classes before and after a generalized fine-tuning, in percent, as text.

    before: {class name: AP} of the base stage. "after" is the mean over the runs. A class without objects has
    no row.
    """
    lines = [f"{'AP of base classes':20} {'before':>7} {'after':>7} {'change':>7}"]
    pairs = {name: (ap, float(np.mean([run.per_class[name] for run in runs]))) for name, ap in before.items()
             if ap is not None and all(run.per_class.get(name) is not None for run in runs)}
    if pairs:
        pairs["mean"] = tuple(np.mean(list(pairs.values()), axis=0))
    for name, (old, new) in pairs.items():
        lines.append(f"{name[:20]:20} {100 * old:7.2f} {100 * new:7.2f} {100 * (new - old):+7.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- run

def add_run_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("--base", type=Path, required=True, metavar="CKPT", help="of the base stage")
    parser.add_argument("--shots", type=int, nargs="+", default=SHOTS, metavar="K",
                        help="default: 1 2 3 5 10 30")
    parser.add_argument("--seeds", type=seed_range, default="0-9", metavar="A-B", help="default: 0-9")
    parser.add_argument("--generalized", action="store_true", help="K shots of all classes")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/fewshot, generalized: "
                                                 "runs/fewshot_all)")
    parser.add_argument("--ranks", type=int, help="devices of a run (default: all GPUs, else one)")
    parser.add_argument("--print", action="store_true", help="print the commands, one per line, and stop")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="-- ...",
                        help="after --: what every run gives train.py, such as --data, --pcb-weights")


def seed_range(text: str) -> list[int]:
    """"3" or "0-9" as numbers."""
    first, _, last = text.partition("-")
    seeds = list(range(int(first), int(last or first) + 1))
    if not seeds:
        raise ValueError(text)
    return seeds


def run_protocol(args: argparse.Namespace):
    """Fine-tunes for every number of shots and seed, one run after another, and prints the tables.

    A run that is complete is not repeated, an interrupted one goes on. Raises UserError if a run fails.
    """
    model = read_checkpoint(args.base)["args"]["model"]
    args.out = args.out or Path("runs") / ("fewshot_all" if args.generalized else "fewshot")
    commands = {}  # {folder of a run: its command}
    for shots in args.shots:
        for seed in args.seeds:
            folder = args.out / f"{shots}shot_seed{seed}"
            commands[folder] = _training(args, model, folder, shots, seed)
    if args.print:
        for command in commands.values():
            print0(shlex.join(command))
        return
    make_folder(args.out)
    lock_folder(args.out, Place(torch.device("cpu")))
    _keep_settings(args)
    for folder, command in commands.items():
        last = folder / "last.pth"
        if not is_trained(folder):
            resume = [*_script(args, "train.py"), "--resume", str(last)]
            _call(resume if last.exists() else command, folder)
        if not is_trained(folder):
            raise UserError(f"{folder}: ended before its last step; the same command goes on")
        if not is_scored(folder):  # it was interrupted while it was scored
            _call([*_script(args, "evaluate.py"), "--ckpt", str(last)], folder)
    print_tables(args, read_runs(commands))


def _training(args: argparse.Namespace, model: str, folder: Path, shots: int, seed: int) -> list[str]:
    """The command of one fine-tuning."""
    return [*_script(args, "train.py"), "--model", model, "--stage", "novel", "--shots", str(shots),
            "--seed", str(seed), *["--generalized"] * args.generalized, "--init", str(args.base),
            "--out", str(folder), *(word for word in args.words if word != "--")]


def _script(args: argparse.Namespace, name: str) -> list[str]:
    """The beginning of a command: a script on --ranks devices."""
    ranks = args.ranks or max(1, torch.cuda.device_count())
    torchrun = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    return [sys.executable, *torchrun, str(Path(__file__).with_name(name))]


def _keep_settings(args: argparse.Namespace):
    """Writes protocol.json. Raises UserError if the folder holds runs of other settings."""
    path = args.out / "protocol.json"
    settings = {"base": str(args.base.resolve()), "generalized": args.generalized, "words": args.words}
    with blame(path, what="does not say what the runs there are; give another --out"):
        if path.exists() and json.loads(read_text(path)) != settings:
            raise UserError(f"{path}: the runs there have other settings; give another --out")
    write_json(path, settings)


def is_trained(folder: Path) -> bool:
    """Whether the training in a folder has made its last step: a line of its log has no time left."""
    if not (folder / "last.pth").exists():
        return False
    try:
        rows = [json.loads(line) for line in read_text(folder / "log.jsonl").splitlines()]
        return any(row.get("eta_s") == 0 for row in rows)
    except (DataError, ValueError, AttributeError):  # killed while it wrote a line
        return False


def is_scored(folder: Path) -> bool:
    """Whether the last checkpoint of a complete training has been scored."""
    metrics, last = folder / "metrics.json", folder / "last.pth"
    return is_trained(folder) and metrics.exists() and metrics.stat().st_mtime >= last.stat().st_mtime


def _call(words: list[str], folder: Path):
    """Runs a command to its end. A signal is passed on, so that the run saves its checkpoint."""
    print0(shlex.join(words))
    process, received = subprocess.Popen(words), []

    def pass_on(number, _):
        received.append(number)
        process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    code = process.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    if received:
        raise SystemExit(f"interrupted in {folder}; the same command goes on")
    if code:
        raise UserError(f"{folder}: the run failed with exit status {code}; the same command goes on")


def print_tables(args: argparse.Namespace, runs: list[Run]):
    """Every run, means and intervals, published rows, forgetting."""
    keys = [key for key in TABLE_KEYS if all(run.scores[key] is not None for run in runs)]
    print0(f"{'run':40} calibrated " + " ".join(f"{key:>11}" for key in keys))
    for run in runs:
        print0(f"{run.name[-40:]:40} {'yes' if run.setting['calibrated'] else 'no':10} "
               + " ".join(f"{100 * run.scores[key]:11.2f}" for key in keys))
    rows = aggregate(runs)
    write_json(args.out / "aggregate.json", rows)
    print0(aggregate_table(rows))
    print0(published_table(runs[0].setting["novel"], args.generalized))
    base_scores = args.base.parent / "metrics.json"
    if args.generalized and base_scores.exists():
        before = read_metrics(args.base.parent)["per_class"]
        for shots in args.shots:
            print0(f"{shots} shots:")
            print0(forgetting_table(before, [run for run in runs if run.setting["shots"] == shots]))


# ---------------------------------------------------------------------------------------------- aggregate

def read_metrics(folder: Path) -> dict:
    """metrics.json of a run. Raises DataError that names the file."""
    try:
        return json.loads(read_text(folder / "metrics.json"))
    except (DataError, ValueError, RecursionError) as error:
        raise DataError(f"{folder / 'metrics.json'}: cannot be read ({error})") from error


def aggregate_runs(args: argparse.Namespace):
    """Prints the table of runs, and writes it to --out."""
    rows = aggregate(read_runs(args.runs))
    print(aggregate_table(rows))
    if args.out:
        make_folder(args.out)
        write_json(args.out / "aggregate.json", rows)

"""README.md and docs/ agree with the code: files, flags, links, departures and the Python example."""
import ast
import importlib
import io
import re
import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from PIL import Image

import recipes
from checkpoint import build_model, save_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8")
         for path in (ROOT / "README.md", ROOT / "README_CN.md", *sorted(ROOT.glob("docs/*.md")))}
MODULES = sorted(path.stem for path in ROOT.glob("*.py"))
# The words after the script's name that select a parser.
SCRIPTS = {"train": [[]], "evaluate": [[]], "browse": [[]], "export": [[]], "benchmark": [[]],
           "fewshot": [["run"], ["aggregate"], ["convert"]]}
FOREIGN_FLAGS = {"--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint",  # torchrun
                 "--framework", "--model", "--output", "--input_shape", "--soc_version",  # atc
                 "--data_path", "--device_id", "--npu-ids", "--opt-level", "--cfg-options",  # ports
                 "--cfg", "--config-file", "--skip-test"}  # Detectron, FCOS's authors
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def commands() -> list[tuple[str, str]]:
    """(page, command) for every code span and every line of a code block; continued lines are joined."""
    found = []
    for path, text in PAGES.items():
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        lines = [line for block in blocks for line in block.replace("\\\n", " ").split("\n")]
        found += [(path.name, part) for line in lines + spans for part in re.split(r"&&|;|#", line)]
    return found


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Flags of every script, from its help text."""
    return {script: set().union(*(_flags_of(script, words) for words in variants))
            for script, variants in SCRIPTS.items()}


def _flags_of(script: str, words: list[str]) -> set[str]:
    screen = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(screen), pytest.raises(SystemExit):
        patch.setattr(sys, "argv", [f"{script}.py", *words, "--help"])
        importlib.import_module(script).main()
    return set(re.findall(r"--[a-z][\w-]*", screen.getvalue()))


# ---------------------------------------------------------------------------------------------- pages

def test_readme_is_short_and_complete():
    assert len(README.splitlines()) <= 300 and len(PAGES[ROOT / "README_CN.md"].splitlines()) <= 75
    assert not any(re.search(r"@@|TODO|FIXME", text) for text in PAGES.values())


def test_every_link_and_image_leads_somewhere():
    for path, text in PAGES.items():
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            assert file.is_file(), f"{path.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, headings), f"{path.name}: {target}"


def test_every_page_and_every_image_is_linked():
    linked = {(path.parent / target.partition("#")[0]).resolve() for path, text in PAGES.items()
              for target in re.findall(r"\]\((?!https?:)([^)]+)\)", text)}
    assert {path for path in (ROOT / "docs").iterdir() if path.suffix in (".md", ".png")} <= linked


# ---------------------------------------------------------------------------------------------- files

def test_reading_order_lists_every_file_once():
    assert sorted(re.findall(r"^\| `(\w+)\.py` \|", section("Reading order"), re.MULTILINE)) == MODULES


def test_files_to_copy_together_import_nothing_else():
    table = section("The tensors, and what to copy")
    rows = re.findall(r"^\| [^|]+ \| (`\w+\.py`[^|]*) \|", table, re.MULTILINE)
    assert len(rows) == 4
    for row in rows:
        copied = re.findall(r"`(\w+)\.py`", row)
        for module in copied:
            assert imports(module) <= {*copied, "torch", *sys.stdlib_module_names}, module


def imports(module: str) -> set[str]:
    """Top-level names that a file imports when it is imported."""
    names = set()
    for node in ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_every_departure_marked_in_the_code_is_in_the_table():
    table = PAGES[ROOT / "docs" / "differences.md"].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)\.(\w+)`", table, re.MULTILINE)
    assert sorted(rows) == sorted((module, name) for module in MODULES for name in marked_names(module))


def marked_names(module: str) -> list[str]:
    """For every comment `# DIFFERS:` the function, class or constant that it is in or in front of."""
    source = (ROOT / f"{module}.py").read_text(encoding="utf-8")
    names = []
    for number, line in enumerate(source.splitlines(), start=1):
        if re.search(r"(?<!`)# DIFFERS:", line):
            node = next(node for node in ast.parse(source).body if node.end_lineno >= number)
            names.append(node.targets[0].id if isinstance(node, ast.Assign) else node.name)
    return names


def test_every_name_of_a_module_that_the_text_mentions_exists():
    for path, text in PAGES.items():
        for module, name in re.findall(rf"\b({'|'.join(MODULES)})\.(?!(?:py|md|onnx|yaml)\b)(\w+)", text):
            assert hasattr(importlib.import_module(module), name), f"{path.name}: {module}.{name}"


# ---------------------------------------------------------------------------------------------- commands

def test_commands_name_scripts_that_exist():
    for page, command in commands():
        for script in re.findall(r"(?:python|torchrun [^`]*?) (\w+)\.py", command):
            assert script in SCRIPTS, f"{page}: {command}"


def test_flags_that_the_text_mentions_exist(flags):
    known = set().union(FOREIGN_FLAGS, *flags.values())
    for page, command in commands():
        before, script, after = re.fullmatch(rf"(.*?)(?:\b({'|'.join(SCRIPTS)})\.py(.*))?", command).groups()
        for flag in FLAG.findall(after or ""):
            assert flag in flags[script], f"{page}: {command}: {script}.py has no {flag}"
        for flag in FLAG.findall(before):
            assert flag in known, f"{page}: {command}: no script has {flag}"


def test_training_commands_are_accepted():
    training = PAGES[ROOT / "docs" / "training.md"]
    recipe_rows = training.split("command after `train.py --data coco --drop-empty`")[1].split("\n## ")[0]
    words = [f"--data coco --drop-empty {row}" for row in
             re.findall(r"^\| [^|]+ \| `([^`]+)` \|", recipe_rows, re.MULTILINE)]
    words += [f"--model fsaf {row}" for row in
              re.findall(r"^\| `(--[^`]+)` \|", section("FSAF"), re.MULTILINE)]
    words += re.findall(r"^(?:python|torchrun .*) train\.py (.*)", "\n".join(line for _, line in commands()),
                        re.MULTILINE)
    # --init and --resume read a file; $, ... and N stand for something else.
    words = [line for line in words if not re.search(r"--init|--resume|[$]|[.]{3}|\b[A-Z]\b", line)]
    assert len(words) > 25
    for line in words:
        with pytest.raises(SystemExit) as stop:
            recipes.parse_args([*shlex.split(line), "--show-recipe"])
        assert not stop.value.code, line


def test_python_example_detects(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args, _ = recipes.parse_args([])
    args = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    model = build_model(args, 2)
    torch.nn.init.zeros_(model.head.cls_logits.bias)  # class scores near 0.5: all points are candidates
    Path("runs/fcos").mkdir(parents=True)
    save_checkpoint(Path("runs/fcos/last.pth"), {"model": model.state_dict(), "args": args, "step": 0,
                                                 "names": ["cat", "dog"], "category_ids": [1, 2]})
    Image.new("RGB", (500, 250), "green").save("photo.jpg")
    names = {}
    exec(re.search(r"```python\n(.*?)```", section("Detect on your own photos"), re.DOTALL)[1], names)
    lines = capsys.readouterr().out.splitlines()
    boxes = [re.fullmatch(r"(?:cat|dog) 0\.\d\d \[(.*)\]", line)[1].split(", ") for line in lines]
    assert boxes and all(0 <= float(x) <= 500 for box in boxes for x in box[::2])

"""The commands that docs/ascend.md gives in place of other projects' scripts run, with tiny settings."""
import re
import shlex

import pytest
from conftest import ROOT
from PIL import Image

import evaluate
import export
import train

MAINS = {"train": train.main, "evaluate": evaluate.main, "export": export.main}
SMALL = {"train": ("--max-steps", 2, "--batch-size", 4, "--min-size", 64, "--max-size", 64, "--workers", 0,
                   "--device", "cpu", "--pictures", 0),
         "evaluate": ("--workers", 0, "--device", "cpu", "--pictures", 0), "export": ()}
# COCO becomes the built-in shapes; a length of its own gives way to 2 steps.
TINY = ((r" --data coco", ""), (r" \$C", ""), (r" --epochs 1\b", ""), (r" --max-steps 100", ""),
        (r"--micro-batch 4", "--micro-batch 2"), (r"--shots K", "--shots 1"),
        (r"C\.pth", "runs/fcos/last.pth"), (r"--size 1344 1344", "--size 64 64"))


def table_commands() -> list[str]:
    """The commands of the table, in its order."""
    page = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
    table = page.split("| script | here |")[1].split("\n\n")[0]
    return re.findall(r"`((?:python|torchrun [^`]*?) \w+\.py[^`]*)`", table)


@pytest.mark.slow
def test_every_command_of_the_script_table_runs(in_process, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (tmp_path / "photos").mkdir()
    Image.effect_noise((90, 60), 60).convert("RGB").save(tmp_path / "photos" / "a.png")
    commands = table_commands()
    assert len(commands) > 12
    assert {name for command in commands for name in MAINS if f" {name}.py" in command} == set(MAINS)
    for command in commands:
        for pattern, replacement in TINY:
            command = re.sub(pattern, replacement, command)
        # torchrun's own words are left out: one rank computes what several do.
        script, words = re.fullmatch(r".*? ?(\w+)\.py(.*)", command).groups()
        in_process(MAINS[script], *shlex.split(words), *SMALL[script])
    for made in ("runs/fcos/last.pth", "runs/defrcn_base/last.pth", "runs/defrcn_novel_1shot_seed0/last.pth",
                 "fcos.onnx", "onnx/metrics.json", "runs/fcos/images/detections.json"):
        assert (tmp_path / made).is_file(), made

"""The README's walk-through from a folder of images to a detector, command by command, with fewer steps."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from PIL import Image
from test_readme import section

import layouts


def shell(command: str, folder: Path) -> tuple[int, str]:
    """Runs a line of the README in `folder`: (exit status, what it printed)."""
    command = re.sub(r"\bpython (\w+\.py)", rf"{sys.executable} {ROOT}/\1", command)
    done = subprocess.run(command, shell=True, cwd=folder, env=environment(2), text=True, timeout=300,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode, done.stdout


def as_yolo(bccd: Path, root: Path):
    """100 images of BCCD in YOLO layout: 80 to train, 20 to score."""
    dataset = layouts.open_folder(str(bccd), "2007_trainval")
    for i in range(100):
        split, image = "train" if i < 80 else "val", Path(os.fsdecode(dataset.paths[i]))
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        shutil.copy(image, root / "images" / split / image.name)
        height, width = dataset.sizes[i]
        rows = dataset.box_slice(i)
        lines = [f"{label} {(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f} "
                 f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
                 for label, (x1, y1, x2, y2) in zip(dataset.classes[rows], dataset.boxes[rows])]
        (root / "labels" / split / f"{image.stem}.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames: {dataset.names}\n")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_every_step_of_the_walk_through(bccd, tmp_path, kind):
    if kind == "voc":
        (tmp_path / "bccd").symlink_to(bccd)
    else:
        as_yolo(bccd, tmp_path / "bccd")
    photos = sorted((bccd / "VOC2007" / "JPEGImages").iterdir())
    (tmp_path / "new" / "more").mkdir(parents=True)
    shutil.copy(photos[0], tmp_path / "new" / "a.jpg")
    shutil.copy(photos[1], tmp_path / "new" / "more" / "b.jpg")
    (tmp_path / "new" / "cut.jpg").write_bytes(photos[2].read_bytes()[:3000])
    (tmp_path / "new" / "text.png").write_text("not an image")

    block = re.search(r"```\n(SMALL=.*?)```", section("Your own data"), re.DOTALL)[1]
    small, *steps = [re.sub(r"\s+#.*", "", line) for line in block.splitlines()]
    assert [re.search(r"(\w+)\.py", step)[1] for step in steps] == [
        "browse", "browse", "train", "browse", "evaluate", "evaluate", "export"]
    printed = []
    for step in steps:
        step = step.replace("--epochs 10 --eval-every 100", "--max-steps 60 --eval-every 30 --device cpu")
        code, out = shell(f"{small}; {step}", tmp_path)
        assert code == (1 if "--images" in step else 0) and "Traceback" not in out, out
        printed.append(out)
    boxes, augmented, trained, log, scored, detected, exported = printed

    assert "RBC" in boxes and "RBC" in augmented
    for split in {"voc": (292, 72), "yolo": (80, 20)}[kind]:
        assert f"reading {split} images" in trained
    run = tmp_path / "runs" / "cells"
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "AP" in row] == [30, 60]
    for picture in (run / "curves.png", tmp_path / "runs" / "browse" / "curves.png", run / "curves_pr.png"):
        assert min(Image.open(picture).size) > 300
    assert "best F1" in scored and len(list((run / "worst").iterdir())) == 20
    assert "cut.jpg" in detected and "text.png" in detected and "2 images could not be read" in detected
    assert sorted(path.stem for path in (run / "images" / "pictures").iterdir()) == ["a", "more_b"]
    found = json.loads((run / "images" / "detections.json").read_text())
    assert {result["image_id"] for result in found} <= {"a.jpg", "more/b.jpg"}
    assert len(json.loads((run / "images" / "classes.json").read_text())["skipped"]) == 2
    assert (tmp_path / "cells.onnx").is_file()

    shutil.copy(photos[0], tmp_path / "photo.jpg")
    example = re.search(r"```python\n(.*?)```", section("Detect on your own photos"), re.DOTALL)[1]
    (tmp_path / "five.py").write_text(example.replace("runs/fcos/last.pth", "runs/cells/best.pth"))
    done = subprocess.run([sys.executable, "five.py"], cwd=tmp_path, capture_output=True, text=True,
                          env=environment(2, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    same = [f"{result['score']:.2f}" for result in found if result["image_id"] == "a.jpg"]
    assert [line.split()[1] for line in done.stdout.splitlines()] == same

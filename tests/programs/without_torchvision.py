"""Trains and scores three models in a process where torchvision cannot be imported."""
import sys
from pathlib import Path

sys.modules["torchvision"] = None  # importing it raises ImportError
sys.path.insert(0, str(Path(__file__).parents[2]))
import evaluate
import shapes
import train
from runtime import run_main

shapes.SHAPES_IMAGES.update(train=40, val=8)
SMALL = ("--device", "cpu", "--workers", "0", "--batch-size", "2", "--max-steps", "2", "--no-eval")


def run(main, *words):
    sys.argv = ["script.py", *words]
    run_main(main)


if __name__ == "__main__":
    for model in ("fcos", "fsaf", "faster_rcnn"):
        run(train.main, "--model", model, "--out", model, *SMALL)
        run(evaluate.main, "--ckpt", f"{model}/last.pth", "--device", "cpu", "--workers", "0",
            "--pictures", "0")
    assert not any(name.startswith("torchvision.") for name in sys.modules)

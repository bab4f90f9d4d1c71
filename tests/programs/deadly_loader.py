"""Runs train.py or evaluate.py on shapes. Reading image 7 kills the process, as the kernel does for memory.

    python deadly_loader.py train|evaluate ARGUMENTS
"""
import importlib
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import shapes
from data import death_of_a_loader
from runtime import run_main

read = shapes.Shapes.image


def image(self, index, shrink=1.0):
    if index == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index, shrink)


if __name__ == "__main__":
    shapes.Shapes.image = image
    module = importlib.import_module(sys.argv.pop(1))
    run_main(module.main, death_of_a_loader)

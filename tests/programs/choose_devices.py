"""Asks for every kind of device and prints its name first: shows when torch_npu is imported."""
import sys
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import evaluate  # noqa: F401
import train  # noqa: F401
from runtime import setup_device

for name in ("cpu", "auto", "cuda", "npu"):
    print(name, flush=True)
    with suppress(SystemExit):
        setup_device(name)

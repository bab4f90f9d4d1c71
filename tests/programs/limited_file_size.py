"""Runs a script that cannot write files over 1 MB: RLIMIT_FSIZE stands for a full disk.

    python limited_file_size.py SCRIPT ARGUMENTS
"""
import resource
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 ** 6, -1))
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")

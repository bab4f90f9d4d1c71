"""One trade per file, arrows only downward: a file imports only from lower layers."""
import ast

import pytest
from conftest import ROOT

LAYERS = (("ops", "runtime", "augment", "safe_pickle"),
          ("data", "layouts", "yolo", "shapes", "subsets", "backbone", "metrics", "analysis", "draw",
           "runlog", "onnx_model"),
          ("fcos", "fsaf", "faster_rcnn", "weights"),
          ("defrcn", "convert"),
          ("checkpoint", "protocol", "fewshot"),
          ("evaluate", "recipes", "resume"),
          ("train", "peers"),
          ("learning",),
          ("browse", "export", "benchmark"))
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
WITHIN_A_LAYER = {("layouts", "data"), ("yolo", "data"), ("yolo", "layouts"), ("shapes", "data"),
                  ("shapes", "layouts"), ("shapes", "yolo"), ("subsets", "data"), ("metrics", "data"),
                  ("analysis", "data"), ("analysis", "metrics"),
                  ("draw", "data"), ("runlog", "draw"), ("convert", "defrcn"), ("fewshot", "checkpoint"),
                  ("protocol", "checkpoint"), ("fewshot", "protocol")}
# The files that people copy: no files, no command line, no other code base.
ALGORITHMS = ("ops", "backbone", "fcos", "fsaf", "faster_rcnn", "defrcn")
COPIED_TOGETHER = {"fcos": {"backbone", "ops"}, "fsaf": {"backbone", "ops"},
                   "faster_rcnn": {"backbone", "ops"}, "defrcn": {"backbone", "ops", "faster_rcnn"},
                   "backbone": set(), "ops": set()}


def imports(name: str) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


def test_every_file_has_a_layer():
    assert {path.stem for path in ROOT.glob("*.py")} == set(LAYER)


@pytest.mark.parametrize("name", LAYER)
def test_a_file_imports_only_from_below(name):
    wrong = [other for other in imports(name) & set(LAYER)
             if LAYER[other] >= LAYER[name] and (name, other) not in WITHIN_A_LAYER]
    assert not wrong, f"{name}.py imports {wrong}"


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_copied_file_needs_torch_and_its_neighbours_only(name):
    assert imports(name) & set(LAYER) == COPIED_TOGETHER[name]
    assert imports(name) - set(LAYER) <= {"math", "collections", "functools", "typing", "torch",
                                          "torchvision"}

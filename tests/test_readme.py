"""What the README points to is there."""
import re

from conftest import ROOT

TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_pictures_exist_and_nothing_is_left_to_fill_in():
    pictures = re.findall(r"\]\((docs/[^)]+)\)", TEXT)
    assert pictures and all((ROOT / path).is_file() for path in pictures)
    assert "@@" not in TEXT and "TODO" not in TEXT


def test_every_departure_marked_in_the_code_is_in_the_table():
    marks = [(path.stem, line) for path in sorted(ROOT.glob("*.py"))
             for line in path.read_text(encoding="utf-8").splitlines() if re.search(r"^\s*# DIFFERS:", line)]
    table = TEXT.split("## Differences")[1].split("Not departures")[0]
    rows = re.findall(r"^\| `(\w+)\.(\w+)`", table, re.MULTILINE)
    assert sorted(module for module, _ in marks) == sorted(module for module, _ in rows)
    for module, name in rows:
        assert re.search(rf"^(class |def )?{name}\b", (ROOT / f"{module}.py").read_text(), re.MULTILINE), name

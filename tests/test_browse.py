import numpy as np
from PIL import Image

from browse import PANEL, draw_targets
from data import open_dataset


def test_boxes_and_targets_are_drawn(script, tmp_path):
    for words, name in (((), "1.png"), (("--targets",), "1_targets.png")):
        code, out, err = script("browse.py", "--count", 2, "--out", "out", *words)
        assert code == 0, err
        assert "heart" in out and "2 drawings in out" in out and (tmp_path / "out" / name).exists()


def test_each_level_has_a_panel_and_dots_only_where_points_are_positive():
    dataset = open_dataset("shapes", "val")
    empty = int(np.flatnonzero(np.diff(dataset.first) == 0)[0])
    for index, dotted in ((empty, False), (0, True)):
        picture = np.asarray(draw_targets(dataset, index, 96, 128, original=False))
        height, width = dataset.sizes[index]
        panel = round(width * PANEL / max(height, width))
        assert picture.shape[1] == 5 * panel + 4 * 4
        plain = np.asarray(dataset.image(index).resize((panel, picture.shape[0])))
        below_the_text = picture[40:, :panel] != plain[40:]
        assert below_the_text.any() == dotted


def test_a_mistake_ends_in_one_line(script, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    code, _, err = script("browse.py", "--data", tmp_path)
    assert code != 0 and "neither COCO layout" in err and "Traceback" not in err

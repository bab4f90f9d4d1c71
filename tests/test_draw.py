"""draw.py: detections drawn on images."""
import numpy as np
from PIL import Image

from draw import class_colour, draw_detections, file_name
from shapes import open_dataset


def test_drawings_show_objects_and_detections(tmp_path):
    dataset = open_dataset("shapes", "val")
    x1, y1, x2, y2 = dataset.boxes[0].tolist()
    draw_detections(dataset, [{"image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1],
                               "score": 0.9},
                              {"image_id": 1, "category_id": 2, "bbox": [0, 0, 5, 5], "score": 0.1}],
                    tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.png", "2.png"]
    drawn = np.asarray(Image.open(tmp_path / "1.png"))
    assert drawn.shape == (dataset.sizes[0][0] * 4, dataset.sizes[0][1] * 4, 3)
    plain = np.asarray(dataset.image(0).resize(drawn.shape[1::-1]))
    # Scores under 0.2 are not drawn.
    assert (drawn != plain).any() and (drawn[:8, :8] == plain[:8, :8]).all()
    assert (drawn == class_colour(0)).all(axis=-1).any() and not (drawn == class_colour(1)).all(axis=-1).any()


def test_ids_with_folders_become_file_names():
    assert file_name("set/a b.jpg") == "set_a_b.jpg" and file_name(7) == "7"

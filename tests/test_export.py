"""The ONNX files, run by onnxruntime, give the detections of the models."""
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import train_small
from PIL import Image
from torch import nn

import evaluate
import export
import fsaf
from checkpoint import build_model, save_checkpoint
from defrcn import DeFRCN
from export import OneImage, compare, fit, write_onnx
from faster_rcnn import FasterRCNN
from fcos import FCOS
from fsaf import FSAF
from metrics import shown
from ops import batched_nms, final_detections
from recipes import parse_args

NAMES = ["a", "b", "c", "d", "e"]
SMALL = {"backbone": "resnet18", "fpn_channels": 64}
C4 = {"backbone": "resnet18", "caffe": False, "post_nms_top_k": (100, 30)}
MODELS = {
    "fcos": lambda: FCOS(5, **SMALL),
    "fcos-original": lambda: FCOS(5, original=True, **SMALL),
    "fsaf": lambda: FSAF(5, **SMALL),
    "fsaf-joint": lambda: FSAF(5, joint=True, **SMALL),
    "fsaf-anchor": lambda: FSAF(5, anchor_only=True, **SMALL),
    "defrcn": lambda: DeFRCN(5, **C4),
    "faster_rcnn": lambda: FasterRCNN(5, **C4),
    "faster_rcnn c4": lambda: FasterRCNN(5, fpn=False, **C4),
}
HEIGHT, WIDTH = 96, 128


def detecting(model, cls_std=0.05, seed=0):
    """The model in evaluation mode, with weights that detect many objects of several classes and sizes."""
    torch.manual_seed(seed)
    model.pixel_std.fill_(58.0)
    for name, parameter in model.named_parameters():
        if name.endswith("bn3.weight"):  # without statistics the features of a deep network would overflow
            nn.init.constant_(parameter, 0.2)
        if name.endswith(("logits.weight", "ltrb.weight", "tblr.weight", "anchor_deltas.weight",
                          "rpn.deltas.weight", "objectness.weight", "predictor.deltas.weight")):
            nn.init.normal_(parameter, std=0.05)
        if name.endswith("cls_score.weight"):
            nn.init.normal_(parameter, std=cls_std)
        if name.endswith("logits.bias"):
            nn.init.constant_(parameter, -2.0)
    return model.eval()


def noise_images(height, width):
    """Inputs: noise that fills the input, noise in a part of it, and an image without pixels."""
    noise = torch.randint(256, (1, 3, height, width), dtype=torch.uint8,
                          generator=torch.Generator().manual_seed(0))
    return [(noise, torch.tensor([size])) for size in
            ((height, width), (height * 2 // 3, width - 9), (0, 0))]


def need_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


def assert_same_file(model, height, width, path, nms, names=NAMES):
    """Exports the model and compares the outputs on `noise_images`; the first two must show detections."""
    need_onnx()
    write_onnx(model, names, height, width, path, nms)
    run = export.run_onnx(path)
    for (image, sizes), shows_objects in zip(noise_images(height, width), (True, True, False)):
        boxes, scores, labels = outputs = run(image, sizes)
        with torch.inference_mode():
            expected = model(image, sizes)[0]
        assert boxes.shape == (len(scores), 4) and labels.shape == scores.shape
        assert boxes.dtype == scores.dtype == torch.float32 and labels.dtype == torch.int64
        if nms:
            assert len(scores) == 100 and (scores[:-1] >= scores[1:]).all()
            assert ((labels == -1) == (scores == 0)).all() and (boxes[scores == 0] == 0).all()
            found = {key: value[scores > 0] for key, value in
                     (("boxes", boxes), ("scores", scores), ("labels", labels))}
        else:
            found = final_detections(*outputs, *sizes[0], model.nms_threshold, 100)
        unmatched, px, score = compare(expected, found)
        print(f"{len(expected['boxes'])} detections, {unmatched} unmatched; {px:.1e} px, {score:.1e} score")
        assert unmatched == 0 and px < 0.01 and score < 1e-4
        assert (len(found["boxes"]) >= 10 and len(found["labels"].unique()) > 1) == shows_objects
        assert shows_objects or len(found["boxes"]) == 0


# ---------------------------------------------------------------------------- the graph, without ONNX

@pytest.mark.parametrize("form", MODELS)
def test_the_graph_gives_the_detections_of_the_model(form):
    model = detecting(MODELS[form]())
    counts = set()
    for image, sizes in noise_images(HEIGHT, WIDTH):
        with torch.inference_mode():
            expected = model(image, sizes)[0]
            boxes, scores, labels = OneImage(model, NAMES)(image, sizes)
            best = OneImage(model, NAMES, nms=True)(image, sizes)
        counts.add(len(scores))
        for outputs in ((boxes, scores, labels), best):
            found = final_detections(*outputs, *sizes[0], model.nms_threshold, 100)
            torch.testing.assert_close(found, expected)
        assert (best[2] >= 0).sum() == len(expected["boxes"])
        width_height = sizes[0].flip(0).repeat(2)
        assert (boxes >= 0).all() and (boxes <= width_height).all()
    assert len(counts) == 1  # the number of candidates does not depend on the image


def test_only_the_best_candidates_leave_a_model_that_has_too_many(monkeypatch):
    model = detecting(MODELS["defrcn"]())  # 30 proposals x 5 classes
    image, sizes = noise_images(HEIGHT, WIDTH)[0]
    monkeypatch.setattr(export, "MAX_CANDIDATES", 70)
    with torch.inference_mode():
        scores = model.candidates(model.network(image, sizes))[0][1]
        boxes, kept, labels = OneImage(model, NAMES)(image, sizes)
    assert len(scores) == 150 and torch.equal(kept, scores.sort(descending=True).values[:70])
    assert len(boxes) == len(labels) == 70


# ---------------------------------------------------------------------------- the files

@pytest.mark.slow
@pytest.mark.parametrize(("form", "nms"), [("fcos", True)])
def test_onnxruntime_finds_what_pytorch_finds(form, nms, tmp_path, monkeypatch):
    monkeypatch.setattr(fsaf, "TOWER_CONVS", 1)  # for speed
    assert_same_file(detecting(MODELS[form]()), HEIGHT, WIDTH, tmp_path / "m.onnx", nms)


@pytest.mark.slow
@pytest.mark.parametrize("nms", [False, True])
@pytest.mark.parametrize("form", MODELS)
def test_every_form_in_onnxruntime(form, nms, tmp_path):
    assert_same_file(detecting(MODELS[form]()), HEIGHT, WIDTH, tmp_path / "m.onnx", nms)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "size"), [
    (lambda: FCOS(80), (512, 672)), (lambda: FSAF(80, joint=True), (512, 672)),
    (lambda: DeFRCN(80), (608, 800))])
def test_published_sizes(make, size, tmp_path):
    model = detecting(make(), cls_std=1.0)
    if isinstance(model, DeFRCN):  # the part that all RoIs share would give them all one class
        with torch.inference_mode():
            common = model.network(*noise_images(*size)[0])["logits"].mean(dim=(0, 1))
        model.predictor.cls_score.bias.data -= common
    assert_same_file(model, *size, tmp_path / "m.onnx", True, [str(i) for i in range(80)])


class PixelsAsBoxes(nn.Module):
    """A detector that reads 512 candidates from the pixels: x, y, width, height, label and score.

    Boxes with whole pixels often have an IoU of exactly 3/5.
    """

    size_divisor, nms_threshold = 1, 0.6

    def network(self, image, sizes):
        return image.flatten().view(6, -1)

    def candidates(self, values):
        x, y, w, h = (values[:4] // 16).float()
        tie_break = torch.arange(values.shape[1]) * 1e-5
        boxes = torch.stack((x, y, x + w, y + h), dim=-1)
        return [(boxes, values[5] / 256 + tie_break, (values[4] % 5).long())]


@pytest.mark.slow
def test_nms_in_onnx_is_class_wise_and_equals_ours_at_the_threshold(tmp_path):
    need_onnx()
    model = PixelsAsBoxes()
    write_onnx(model, NAMES, 32, 32, tmp_path / "nms.onnx", nms=True)
    run, sizes = export.run_onnx(tmp_path / "nms.onnx"), torch.tensor([[32, 32]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        image = torch.randint(256, (1, 3, 32, 32), generator=generator, dtype=torch.uint8)
        boxes, scores, labels = model.candidates(model.network(image, sizes))[0]
        valid = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
        boxes, scores, labels = boxes[valid], scores[valid], labels[valid]
        kept = batched_nms(boxes, scores, labels, 0.6)[:100]
        found = run(image, sizes)
        assert torch.equal(found[0], boxes[kept]) and torch.equal(found[2], labels[kept])
        assert torch.equal(found[1], scores[kept]) and len(kept) == 100


def assert_fixed_shapes_and_class_names(path):
    import onnx

    content = onnx.load(path)
    onnx.checker.check_model(content, full_check=True)
    assert [(o.domain, o.version) for o in content.opset_import] == [("", export.OPSET)]
    facts = {p.key: json.loads(p.value) for p in content.metadata_props}
    assert facts["names"] == NAMES and facts["size"] == [64, 96] and facts["padding"] == "right and bottom"
    assert (facts["min_size"], facts["max_size"]) == (64, 96)  # the run had 128 and 128
    inferred = onnx.shape_inference.infer_shapes(content, strict_mode=True).graph
    values = [*inferred.input, *inferred.output, *inferred.value_info]
    assert len(values) > 100
    assert all(d.HasField("dim_value") for v in values for d in v.type.tensor_type.shape.dim)
    assert not {"NonMaxSuppression", "NonZero", "Loop", "If"} & {node.op_type for node in inferred.node}
    assert [i.name for i in inferred.input] == ["image", "sizes"]


# ---------------------------------------------------------------------------- the script

@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    args, _ = parse_args(["--backbone", "resnet18", "--fpn-channels", "64", "--weights", "none"])
    args = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
    path, model = tmp_path_factory.mktemp("run") / "last.pth", detecting(build_model(args, 5))
    save_checkpoint(path, {"model": model.state_dict(), "args": args, "names": NAMES,
                           "category_ids": [1, 2, 3, 4, 5], "step": 1})
    return path


@pytest.mark.slow
def test_the_script_writes_and_checks_a_file(checkpoint, in_process, tmp_path):
    need_onnx()
    Image.effect_noise((200, 90), 60).save(tmp_path / "photo.png")
    out = in_process(export.main, "--ckpt", checkpoint, "--size", 64, 96, "--out", "new/m.onnx",
                     "--check", "photo.png")
    first, noise, photo = out.splitlines()
    assert first.startswith("new/m.onnx: ") and first.endswith(f" MB, opset {export.OPSET}, 5 classes")
    for line, name in ((noise, "noise"), (photo, "photo.png")):
        assert line.startswith(f"{name}: 100 detections in PyTorch, 100 in onnxruntime; largest difference ")
        assert line.endswith("; 0 without a match")

    assert_fixed_shapes_and_class_names(tmp_path / "new/m.onnx")
    other = detecting(MODELS["fcos"](), seed=1)
    with pytest.raises(ValueError, match="new/m.onnx: its detections are not those of the checkpoint"):
        export.check(Path("new/m.onnx"), other, export.check_inputs(64, 96, []))


def test_an_image_is_fitted_into_the_upper_left_corner(tmp_path):
    Image.new("RGB", (40, 10), (9, 8, 7)).save(tmp_path / "wide.png")
    image, sizes = fit(tmp_path / "wide.png", 64, 96)
    assert sizes.tolist() == [[24, 96]] and image.shape == (1, 3, 64, 96)
    assert (image[0, :, :24].flatten(1) == torch.tensor([[9], [8], [7]])).all()
    assert (image[0, :, 24:] == 0).all()


def test_an_image_is_checked_at_the_size_at_which_it_is_scored(tmp_path):
    Image.new("RGB", (40, 20), (9, 8, 7)).save(tmp_path / "a.png")
    # Short side 24 -> 24 x 48; a long side of at most 36 -> 18 x 36; an input of 16 x 96 px -> 16 x 32.
    for size, resizing, expected in (((64, 96), (24, 99), [24, 48]), ((64, 96), (24, 36), [18, 36]),
                                     ((16, 96), (24, 99), [16, 32])):
        assert fit(tmp_path / "a.png", *size, *resizing)[1].tolist() == [expected]


@pytest.mark.slow
@pytest.mark.parametrize(("form", "lr", "nms"), [("fcos", 0.02, False), ("fsaf", 0.002, True)])
def test_a_file_scores_like_its_checkpoint_at_the_size_of_the_file(form, lr, nms, in_process, tmp_path):
    need_onnx()
    # FSAF diverges with 0.02. Its scores are then 1.0, and rounding orders the ties.
    train_small(tmp_path / "run", "--model", form, "--max-steps", 40, "--batch-size", 4, "--lr", lr)
    # Larger than the images, which are 128 x 128: the group norm of FCOS sees the padding.
    in_process(export.main, "--ckpt", "run/last.pth", "--size", 160, 192, "--out", "m.onnx",
               *["--nms"] * nms)
    out = in_process(evaluate.main, "--onnx", "m.onnx", "--ckpt", "run/last.pth", "--workers", 0,
                     "--pictures", 0)
    assert "m.onnx: step 40, 8 classes; 16 images, short side 128, long side at most 128 px" in out
    metrics = [json.loads((tmp_path / folder / "metrics.json").read_text())
               for folder in ("onnx", "onnx/checkpoint")]
    assert metrics[0]["AP"] == pytest.approx(metrics[1]["AP"], abs=1e-4)
    assert out.splitlines()[-1] == (f"AP {shown(metrics[0]['AP'])} of m.onnx, {shown(metrics[1]['AP'])} of "
                                    "run/last.pth")
    found = [json.loads((tmp_path / folder / "detections.json").read_text())
             for folder in ("onnx", "onnx/checkpoint")]
    assert len(found[0]) == pytest.approx(len(found[1]), rel=0.02) and len(found[0]) > 20
    # Alone, from its metadata; and with --pad-to, the checkpoint gives the same.
    in_process(evaluate.main, "--onnx", "m.onnx", "--workers", 0, "--pictures", 0, "--out", "alone")
    in_process(evaluate.main, "--ckpt", "run/last.pth", "--pad-to", 160, 192, "--workers", 0, "--pictures", 0,
               "--out", "padded")
    scores = [json.loads((tmp_path / folder / "detections.json").read_text())
              for folder in ("alone", "padded")]
    assert scores == found


@pytest.mark.parametrize(("words", "message"), [
    (["--onnx", "no.onnx"], "error: no.onnx: there is no such file"),
    (["--onnx", "text.onnx"], "error: text.onnx: onnxruntime cannot read it ("),
    (["--onnx", "m.onnx", "--pad-to", 64, 64], "error: --pad-to does not go with --onnx: the file decides"),
    (["--onnx", "m.onnx", "--nms-threshold", 0.4], "error: --nms-threshold does not go with --onnx"),
])
def test_a_file_that_cannot_be_scored_ends_in_one_line(mistake, tmp_path, words, message):
    need_onnx()
    (tmp_path / "text.onnx").write_text("no protobuf")
    line = mistake(evaluate.main, *words)
    assert message in line and "\n" not in line[line.index("error:"):].rstrip()


@pytest.mark.slow
def test_a_file_without_metadata_is_named(mistake, tmp_path):
    need_onnx()
    write_onnx(PixelsAsBoxes(), NAMES, 32, 32, tmp_path / "m.onnx")
    assert "error: m.onnx: not a file of export.py (KeyError: " in mistake(evaluate.main, "--onnx", "m.onnx")


def test_detections_are_compared_label_by_label():
    ours = {"boxes": torch.tensor([[0., 0., 9., 9.], [5., 5., 8., 8.]]), "scores": torch.tensor([0.9, 0.5]),
            "labels": torch.tensor([1, 2])}
    theirs = {"boxes": torch.tensor([[5., 5., 8., 8.], [0., 0., 9., 9.25]]), "labels": torch.tensor([3, 1]),
              "scores": torch.tensor([0.5, 0.899])}
    # The second of ours and the first of theirs have the same box but different labels.
    unmatched, px, score = compare(ours, theirs)
    assert (unmatched, px) == (2, 0.25) and score == pytest.approx(0.001, rel=1e-4)
    none = {key: value[:0] for key, value in ours.items()}
    assert compare(ours, none) == compare(none, ours) == (2, 0.0, 0.0)
    assert compare(none, none) == (0, 0.0, 0.0)


def test_a_missing_package_is_named_in_one_line(checkpoint, mistake, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    line = mistake(export.main, "--ckpt", checkpoint, "--size", 64, 96, "--out", "m.onnx")
    assert line == ("error: export.py needs onnx and onnxscript: pip install onnx onnxscript onnxruntime "
                    "(import of onnx halted; None in sys.modules)")


@pytest.mark.parametrize(("words", "message"), [
    (["--ckpt", "no.pth"], "error: checkpoint no.pth does not exist"),
    (["--size", 64, 100], "error: --size 64 100: both must be multiples of 32"),
    (["--size", 0, 64], "error: --size must be positive, not [0, 64]"),
    (["--out", "file/m.onnx"], "error: --out file: cannot be used as a folder"),
    (["--out", "."], "error: --out must be a file, not the folder ."),
    (["--check", "no.jpg"], "error: no.jpg: there is no such image file"),
])
def test_mistakes_end_in_one_line(checkpoint, mistake, tmp_path, words, message):
    need_onnx()
    (tmp_path / "file").touch()
    given = dict(zip(("--ckpt", "--size", "--out"), ([checkpoint], [64, 96], ["m.onnx"])))
    given[words[0]] = words[1:]
    line = mistake(export.main, *[word for flag, values in given.items() for word in (flag, *values)])
    assert message in line and "\n" not in line[line.index("error:"):].rstrip()

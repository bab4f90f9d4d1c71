"""Detectors of other code bases: recognised by their keys, exact after renaming, refused if incomplete."""
import builtins
import hashlib
import json
import os
import pickle
import re
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import SHARED
from helpers import GOLDEN

import convert
import evaluate
from backbone import TORCHVISION_PIXELS
from checkpoint import load_init, load_model, read_checkpoint
from convert import fcos_from_mmdet, fsaf_from_mmdet, rcnn_from_detectron2
from data import COCO_CLASSES, COCO_IDS
from defrcn import DeFRCN
from faster_rcnn import FasterRCNN
from fcos import FCOS
from fsaf import FSAF, base_anchors
from layouts import load_coco
from weights import WeightsError, read_weight_file

BASIC = {"backbone": "resnet18", "norm": "frozen", "freeze_at": 2}


def filled(model):
    """The model with random weights: batch norms near the identity, head outputs that spread."""
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.9, 1.1, generator=generator)
        elif key.endswith("running_mean"):
            value.uniform_(-0.1, 0.1, generator=generator)
        elif key.endswith(("bn3.weight", "bn2.weight")) and value.ndim == 1:
            value.fill_(0.3)
        elif ("head" in key or "predictor" in key) and value.ndim > 1:
            value.normal_(std=value[0].numel() ** -0.5, generator=generator)
    return model.eval()


def smooth_image(height, width, size_divisor=32):
    """A smooth random image (3, height, width) uint8, and the batch (images, sizes) of it alone."""
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(1)) * 255
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0].to(torch.uint8)
    padded = (-(-side // size_divisor) * size_divisor for side in (height, width))
    batch = torch.zeros(1, 3, *padded, dtype=torch.uint8)
    batch[0, :, :height, :width] = image
    return image, batch, torch.tensor([[height, width]])


def assert_matching(found, expected, rtol):
    """The same detections, except that those with nearly equal scores may change places.

    The last places may go to others of nearly equal score. rtol: of scores and boxes; boxes may also
    differ by 1e-3 px.
    """
    count = min(len(found["scores"]), len(expected["scores"]))
    torch.testing.assert_close(found["scores"][:count], expected["scores"][:count], rtol=rtol, atol=1e-5)
    last = max(found["scores"][count - 1], expected["scores"][count - 1])
    clear = expected["scores"] > last * (1 + rtol) + 1e-5  # not in the last places
    assert clear.sum() > 0.9 * count - 2
    for i in clear.nonzero().flatten():
        same = found["labels"] == expected["labels"][i]
        same &= found["boxes"].isclose(expected["boxes"][i], rtol=rtol, atol=1e-3).all(dim=1)
        same &= found["scores"].isclose(expected["scores"][i], rtol=rtol, atol=1e-5)
        assert same.sum() == 1, f"detection {i}"


@torch.no_grad()
def assert_same_detections(ours, other):
    for model in (ours, other):
        model.score_threshold = 0.01
        if isinstance(model, FasterRCNN):
            model.post_nms_top_k = (100, 30)
    _, batch, sizes = smooth_image(160, 200, ours.size_divisor)
    one, two = ours(batch, sizes)[0], other(batch, sizes)[0]
    assert len(one["scores"]) == len(two["scores"]) > 5, "nothing is compared"
    assert_matching(two, one, rtol=1e-4)


# ---------------------------------------------------------------------------- their names for our weights

def detectron2_resnet(key, prefix):
    """detectron2's name for our `backbone.layer1.0.bn1.weight`."""
    key = re.sub(r"^backbone\.(conv1|bn1)", r"stem.\1", key)
    key = re.sub(r"^backbone\.layer(\d)", lambda m: f"res{int(m[1]) + 1}", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return prefix + re.sub(r"bn(\d)", r"conv\1.norm", key)


def authors_head(key, centerness):
    key = key.removeprefix("head.").replace("box_tower", "bbox_tower").replace("ltrb", "bbox_pred")
    return re.sub(r"^scales\.(\d)$", r"scales.\1.scale", key.replace("centerness", centerness))


def adelaidet(key):
    if key.startswith("backbone."):
        return detectron2_resnet(key, "backbone.bottom_up.")
    if key.startswith("fpn."):
        key = re.sub(r"fpn\.(lateral|output)\.(\d)", lambda m: f"fpn_{m[1]}{int(m[2]) + 3}", key)
        return "backbone." + key.replace("fpn.", "top_block.")
    return "proposal_generator.fcos_head." + authors_head(key, "ctrness")


def first_repository(key):
    if key.startswith("backbone."):
        return "module." + re.sub(r"^backbone\.(?=conv1|bn1)", "backbone.body.stem.", key).replace(
            "backbone.layer", "backbone.body.layer")
    if key.startswith("fpn."):
        names = {"lateral": "inner", "output": "layer"}
        key = re.sub(r"fpn\.(lateral|output)\.(\d)", lambda m: f"fpn.fpn_{names[m[1]]}{int(m[2]) + 2}", key)
        return "module.backbone." + re.sub(r"fpn\.(p\d)", r"fpn.top_blocks.\1", key)
    return "module.rpn.head." + authors_head(key, "centerness")


def detectron2_c4(key):
    if key.startswith("backbone.layer4"):
        return detectron2_resnet(key, "roi_heads.")
    if key.startswith("backbone."):
        return detectron2_resnet(key, "backbone.")
    for ours, theirs in (("rpn.conv", "rpn_head.conv"), ("rpn.objectness", "rpn_head.objectness_logits"),
                         ("rpn.deltas", "rpn_head.anchor_deltas")):
        if key.startswith(ours):
            return "proposal_generator." + key.replace(ours, theirs)
    key = key.replace("predictor.deltas", "predictor.bbox_pred").replace("affine_roi", "affine_rcnn")
    return "roi_heads.box_" + key if key.startswith("predictor.") else key


def mmdetection(key):
    neck = {"lateral.": "lateral_convs.", "output.": "fpn_convs.", "p6": "fpn_convs.3", "p7": "fpn_convs.4"}
    head = {"head.cls_logits": "retina_cls", "head.tblr": "retina_reg"}
    if key.startswith("fpn."):
        key = key.removeprefix("fpn.")
        key = next(key.replace(ours, theirs) for ours, theirs in neck.items() if key.startswith(ours))
        return "neck." + re.sub(r"\.(weight|bias)$", r".conv.\1", key)
    key = re.sub(r"^head\.(cls|box)_tower\.(\d)",
                 lambda m: f"bbox_head.{m[1].replace('box', 'reg')}_convs.{int(m[2]) // 2}.conv", key)
    for ours, theirs in head.items():
        key = key.replace(ours, f"bbox_head.{theirs}")
    return key


def mmdetection_fcos(key):
    key = re.sub(r"^head\.(cls|box)_tower\.(\d+)", lambda m: f"bbox_head.{m[1].replace('box', 'reg')}_convs."
                                                             f"{int(m[2]) // 3}.conv", key)
    key = re.sub(r"^head\.scales\.(\d)", r"bbox_head.scales.\1.scale", key)
    for ours, theirs in (("cls_logits", "cls"), ("ltrb", "reg"), ("centerness", "centerness")):
        key = key.replace(f"head.{ours}", f"bbox_head.conv_{theirs}")
    return mmdetection(key)


def as_theirs(model, name, bgr=True, exact_norm=False, batches=False):
    """The weights of one of our models as another code base would save them."""
    state = {}
    for key, value in model.state_dict().items():
        if key in ("pixel_mean", "pixel_std") or "num_batches_tracked" in key and not batches:
            continue
        if key == "backbone.conv1.weight" and bgr:
            value = value.flip(1)
        if key.endswith("running_var") and exact_norm:  # the first repository adds no epsilon
            value = value + 1e-5
        if re.match(r"head\.scales\.\d", key):
            value = value.reshape(1)
        state[name(key)] = value.clone()
    return state


def detectron2_fpn(key):
    if key.startswith("backbone."):
        return detectron2_resnet(key, "backbone.bottom_up.")
    key = re.sub(r"^fpn\.(lateral|output)\.(\d)", lambda m: f"backbone.fpn_{m[1]}{int(m[2]) + 2}", key)
    for ours, theirs in {"rpn.objectness": "rpn.objectness_logits", "rpn.deltas": "rpn.anchor_deltas",
                         "predictor.deltas": "predictor.bbox_pred", "rpn.": "proposal_generator.rpn_head.",
                         "box_head": "roi_heads.box_head", "predictor": "roi_heads.box_predictor"}.items():
        key = key.replace(ours, theirs, 1)
    return key


def mmdetection_rcnn(key):
    key = re.sub(r"^fpn\.(lateral|output)\.(\d)",
                 lambda m: f"neck.{m[1].replace('output', 'fpn')}_convs.{m[2]}.conv", key)
    for ours, theirs in {"rpn.objectness": "rpn.rpn_cls", "rpn.deltas": "rpn.rpn_reg",
                         "rpn.conv": "rpn.rpn_conv", "box_head.fc1": "shared_fcs.0",
                         "box_head.fc2": "shared_fcs.1", "predictor.cls_score": "fc_cls",
                         "predictor.deltas": "fc_reg"}.items():
        key = key.replace(ours, theirs)
    return re.sub(r"^(shared_fcs|fc_)", r"roi_head.bbox_head.\1", re.sub(r"^rpn\.", "rpn_head.", key))


CASES = {
    "AdelaiDet": (lambda: FCOS(7, caffe=True, **BASIC), adelaidet, {},
                  {"model": "fcos", "original": False, "caffe": True}),
    "first FCOS repository": (lambda: FCOS(7, caffe=True, tower_bias=True, **BASIC), first_repository,
                              {"exact_norm": True}, {"model": "fcos", "original": False, "caffe": True}),
    "DeFRCN": (lambda: DeFRCN(7, caffe=True, **BASIC), detectron2_c4, {},
               {"model": "defrcn", "decouple": True, "pool_size": 7, "cosine": False}),
    "Faster R-CNN C4": (lambda: FasterRCNN(7, fpn=False, **BASIC), detectron2_c4, {},
                        {"model": "faster_rcnn", "fpn": False, "decouple": False, "pool_size": 14}),
    "Faster R-CNN of detectron2": (lambda: FasterRCNN(7, **BASIC), detectron2_fpn, {},
                                   {"model": "faster_rcnn", "fpn": True, "pool_size": 7, "caffe": True}),
    "Faster R-CNN of mmdetection": (lambda: FasterRCNN(7, caffe=False, **{**BASIC, "norm": "affine"}),
                                    mmdetection_rcnn, {"bgr": False, "batches": True},
                                    {"model": "faster_rcnn", "fpn": True, "caffe": False}),
    "FSAF of mmdetection": (lambda: FSAF(7, **{**BASIC, "norm": "affine"}), mmdetection,
                            {"bgr": False, "batches": True},
                            {"model": "fsaf", "fsaf_branch": "free", "caffe": False})}


@pytest.mark.parametrize("case", CASES)
def test_a_detector_is_recognised_and_detects_what_it_did(case, tmp_path):
    make, name, options, expected = CASES[case]
    torch.manual_seed(0)
    model = filled(make())
    if case == "Faster R-CNN of mmdetection":
        for name_, value in zip(("pixel_mean", "pixel_std"), TORCHVISION_PIXELS):
            getattr(model, name_).copy_(torch.tensor(value).view(3, 1, 1))
    if case == "first FCOS repository":
        model.pixel_mean.copy_(torch.tensor([122.7717, 115.9465, 102.9801]).view(3, 1, 1))
    torch.save({"model": as_theirs(model, name, **options), "iteration": 90000}, tmp_path / "theirs.pth")
    loaded, info = load_model(tmp_path / "theirs.pth")
    assert {key: info["args"][key] for key in expected} == expected
    assert info["args"]["backbone"] == "resnet18" and len(info["names"]) == 7 and not info["named"]
    assert "7 classes" in info["notes"][0] and len(info["notes"]) == 1
    assert_same_detections(model, loaded)


def test_the_first_form_of_the_first_repository_is_asked_for(tmp_path):
    torch.manual_seed(0)
    model = filled(FCOS(7, caffe=True, original=True, tower_bias=True, **BASIC))
    torch.save({"model": as_theirs(model, first_repository, exact_norm=True)}, tmp_path / "FCOS_R_50.pth")
    loaded, info = load_model(tmp_path / "FCOS_R_50.pth", original=True)
    assert info["args"]["original"] and info["args"]["tower_bias"]
    assert_same_detections(model, loaded)


def test_an_fcos_of_mmdetection_without_group_norm_has_the_original_form(tmp_path):
    """The form of mmdetection's configs without "gn-head", which the Ascend port trains."""
    torch.manual_seed(0)
    model = filled(FCOS(7, caffe=True, original=True, group_norm=False, **BASIC))
    theirs = {key: value.reshape(()) if ".scales." in key else value
              for key, value in as_theirs(model, mmdetection_fcos, batches=True).items()}
    assert not [key for key in theirs if ".gn." in key] and "bbox_head.cls_convs.3.conv.bias" in theirs
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "epoch_12.pth")
    loaded, info = load_model(tmp_path / "epoch_12.pth")
    assert info["args"]["original"] and info["args"]["head_norm"] == "none"
    assert_same_detections(model, loaded)


def test_a_detectron2_pickle_is_read(tmp_path):
    torch.manual_seed(0)
    model = filled(FasterRCNN(3, fpn=False, **BASIC))
    theirs = {key: value.numpy() for key, value in as_theirs(model, detectron2_c4).items()}
    (tmp_path / "model_final.pkl").write_bytes(pickle.dumps({"model": theirs, "__author__": "D2"}))
    loaded, info = load_model(tmp_path / "model_final.pkl")
    assert info["args"]["model"] == "faster_rcnn"
    assert_same_detections(model, loaded)


# ---------------------------------------------------------------------------- readers

def mmdet_shapes(kind):
    return dict(json.loads((GOLDEN / "mmdet_keys.json").read_text())[kind])


def mmdet_state(kind):
    return {key: torch.zeros(shape) for key, shape in mmdet_shapes(kind).items()}


def test_both_published_forms_of_fcos_load_strictly():
    for kind, original in (("fcos_a", True), ("fcos_b", False)):
        state = mmdet_state(kind)
        state["backbone.conv1.weight"] = torch.arange(64 * 3 * 49.).reshape(64, 3, 7, 7)
        renamed = fcos_from_mmdet(state)
        FCOS(80, "resnet50", caffe=True, original=original).load_state_dict(renamed, strict=True)
        # Caffe weights saw BGR: red and blue change places.
        assert torch.equal(renamed["backbone.conv1.weight"][:, 0], state["backbone.conv1.weight"][:, 2])
    assert renamed["pixel_mean"].flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])


def test_retinanet_of_mmdetection_loads_into_the_anchor_branch():
    shapes = mmdet_shapes("fsaf")
    for name, channels in (("retina_cls", 720), ("retina_reg", 36)):
        shapes[f"bbox_head.{name}.weight"] = [channels, 256, 3, 3]
        shapes[f"bbox_head.{name}.bias"] = [channels]
    state = fsaf_from_mmdet({key: torch.zeros(shape) for key, shape in shapes.items()})
    model = FSAF(80, anchor_only=True)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.base_anchors, base_anchors())


@pytest.mark.parametrize("reader, state, complaint", [
    (fcos_from_mmdet, {"a": torch.zeros(1)}, "not an FCOS of mmdetection: it has keys like .'a'"),
    (fsaf_from_mmdet, {"a": torch.zeros(1)}, "not an FSAF or RetinaNet"),
    (fsaf_from_mmdet, {"bbox_head.retina_reg.weight": torch.zeros(12, 1, 1, 1)}, "not an FSAF or RetinaNet"),
    (rcnn_from_detectron2, {"fc.weight": torch.zeros(1)}, "not a Faster R-CNN of detectron2")])
def test_a_reader_refuses_other_models(reader, state, complaint):
    with pytest.raises(WeightsError, match=complaint):
        reader(state)


# ---------------------------------------------------------------------------- torchvision, against itself

@pytest.mark.parametrize("which", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn",
                                   pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow)])
@torch.no_grad()
def test_torchvisions_weights_give_torchvisions_detections(which, tmp_path):
    detection = pytest.importorskip("torchvision.models.detection")
    torch.manual_seed(0)
    height, width = 200, 333  # 7 x 11 cells on P5, 4 x 6 on P6: torchvision's cells are not a stride apart
    theirs = getattr(detection, which)(weights=None, weights_backbone=None, num_classes=5, min_size=height,
                                       max_size=width)
    filled(theirs)
    if which.startswith("fasterrcnn"):
        theirs.roi_heads.score_thresh = 0.02
    else:
        theirs.head.regression_head.bbox_reg.bias += 1.5 if which.startswith("fcos") else 0
        theirs.head.classification_head.cls_logits.bias += 2.5
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, info = load_model(tmp_path / "theirs.pth")
    assert info["args"]["torchvision"] and not info["args"]["caffe"]
    if which.startswith("fasterrcnn"):
        ours.score_threshold = 0.02
    image, batch, sizes = smooth_image(height, width)
    expected, found = theirs([image / 255])[0], ours(batch, sizes)[0]
    # Two rules differ: torchvision keeps boxes that clipping left empty, and RetinaNet's 300 best detections.
    if which.startswith("fasterrcnn"):
        expected["labels"] -= 1  # 0 is the background
    valid = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)
    assert min(int(valid.sum()), len(found["scores"])) > 90
    assert_matching(found, {key: value[valid] for key, value in expected.items()}, rtol=1e-5)


def test_torchvisions_published_faster_rcnn_has_80_of_its_90_classes(tmp_path):
    detection = pytest.importorskip("torchvision.models.detection")
    theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    read = read_checkpoint(tmp_path / "theirs.pth")
    assert read["names"] == COCO_CLASSES and read["category_ids"] == COCO_IDS
    layers = theirs.roi_heads.box_predictor
    assert torch.equal(read["model"]["predictor.cls_score.bias"],
                       layers.cls_score.bias[[*COCO_IDS, 0]])  # background last
    assert torch.equal(read["model"]["predictor.deltas.bias"],
                       layers.bbox_pred.bias.view(91, 4)[COCO_IDS].flatten())


def test_torchvisions_published_files_have_no_epsilon(tmp_path, monkeypatch):
    detection = pytest.importorskip("torchvision.models.detection")
    theirs = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    plain = read_checkpoint(tmp_path / "theirs.pth")
    assert plain["named"] and plain["names"] == COCO_CLASSES and plain["category_ids"] == COCO_IDS
    rows = theirs.head.classification_head.cls_logits.weight
    # 80 of the 91 rows belong to a category.
    assert torch.equal(plain["model"]["head.cls_logits.weight"], rows[COCO_IDS])
    digest = hashlib.sha256((tmp_path / "theirs.pth").read_bytes()).hexdigest()
    monkeypatch.setattr(convert, "WITHOUT_EPS", (digest[:8],))
    published = read_checkpoint(tmp_path / "theirs.pth")
    key = "backbone.layer1.0.bn1.running_var"
    torch.testing.assert_close(plain["model"][key] - published["model"][key], torch.full((64,), 1e-5),
                               rtol=1e-2, atol=0)


# ---------------------------------------------------------------------------- mmdetection's meta

@pytest.mark.parametrize("meta, named", [
    ({"CLASSES": tuple(f"thing {i}" for i in range(80)), "config": "x", "time": "today"}, True),  # 2.x
    ({"dataset_meta": {"classes": tuple(f"thing {i}" for i in range(80))}, "cfg": "y"}, True),  # 3.x
    ({"dataset_meta": {"CLASSES": ("other",)}}, False), (None, False)])
def test_classes_of_mmdetection_come_from_its_meta(tmp_path, meta, named):
    torch.save({"state_dict": mmdet_state("fcos_a"), "meta": meta}, tmp_path / "epoch_12.pth")
    read = read_checkpoint(tmp_path / "epoch_12.pth")
    assert read["args"]["model"] == "fcos" and read["args"]["original"] and read["args"]["caffe"]
    assert read["names"] == ([f"thing {i}" for i in range(80)] if named else COCO_CLASSES)


@pytest.mark.parametrize(("model", "count", "first"), [
    ("fcos", 20, "aeroplane"), ("faster_rcnn", 20, "aeroplane"), ("defrcn", 20, "person"),
    ("faster_rcnn", 60, "truck"), ("faster_rcnn", 80, "person"), ("fcos", 60, None)])
def test_the_number_of_classes_tells_their_names(model, count, first):
    names, _ = convert._class_names({}, count, model)
    assert (names and names[0]) == first


@pytest.mark.parametrize("style", ["caffe", "pytorch"])
def test_the_config_in_the_file_tells_the_style_of_the_backbone(tmp_path, style):
    state = mmdet_state("fcos_b")
    state["backbone.conv1.weight"][:, 0] = 1.0
    torch.save({"state_dict": state, "meta": {"cfg": f"backbone=dict(depth=50, style='{style}')"}},
               tmp_path / "epoch_12.pth")
    read = read_checkpoint(tmp_path / "epoch_12.pth")
    assert read["args"]["caffe"] is (style == "caffe")
    assert read["model"]["backbone.conv1.weight"][0, 2 if style == "caffe" else 0, 0, 0] == 1  # BGR or RGB


def test_the_config_in_the_file_tells_the_form_of_fcos(tmp_path):
    for norm_on_bbox in (True, False):
        config = f"bbox_head=dict(type='FCOSHead', norm_on_bbox={norm_on_bbox})"
        torch.save({"state_dict": mmdet_state("fcos_a"), "meta": {"config": config}}, tmp_path / "x.pth")
        read = read_checkpoint(tmp_path / "x.pth")
        assert read["args"]["original"] is not norm_on_bbox and read["args"]["tower_bias"] is False
        assert ("improved" if norm_on_bbox else "original") in read["notes"][0]


def test_objects_of_mmengine_are_skipped(tmp_path, monkeypatch):
    """A log as mmengine 0.x saves it: an object of its own class, with methods and numpy arrays inside."""
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self):
            self.history, self.methods = np.zeros(3), {"mean": HistoryBuffer.mean}

        def mean(self):
            raise AssertionError("called")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    module.HistoryBuffer = HistoryBuffer
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.save({"state_dict": mmdet_state("fsaf"), "meta": {}, "message_hub": {"log": HistoryBuffer()}},
               tmp_path / "epoch_12.pth")
    monkeypatch.undo()
    assert read_checkpoint(tmp_path / "epoch_12.pth")["args"]["model"] == "fsaf"


class Attack:
    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function, argument", [(os.system, "echo > {}"), (builtins.eval, "open('{}', 'w')")])
def test_a_hostile_checkpoint_is_refused_and_runs_nothing(tmp_path, function, argument, legacy):
    trace, path = tmp_path / "trace", tmp_path / "epoch_12.pth"
    torch.save({"state_dict": mmdet_state("fsaf"), "meta": Attack(function, argument.format(trace))}, path,
               _use_new_zipfile_serialization=not legacy)
    torch.load(path, weights_only=False)  # the attack is real
    trace.unlink()
    for read in (read_checkpoint, read_weight_file):
        with pytest.raises(WeightsError, match="epoch_12.pth: cannot be read as weights"):
            read(path)
    assert not trace.exists()


# ---------------------------------------------------------------------------- refused files

def test_an_unknown_file_says_what_was_found(tmp_path):
    path = tmp_path / "yolo.pth"
    torch.save({"model": {"model.0.conv.weight": torch.zeros(1)}}, path)
    with pytest.raises(WeightsError, match="yolo.pth: not a detector that is known.*model.0.conv.weight"):
        read_checkpoint(path)
    torch.save({"conv1.weight": torch.zeros(1), "fc.weight": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="an ImageNet backbone. train.py takes it as --weights"):
        read_checkpoint(path)
    torch.save(torch.nn.Linear(1, 1), path)
    with pytest.raises(WeightsError, match=r"holds torch.nn.modules.linear.Linear, which is code: save the"):
        read_checkpoint(path)
    torch.save([1], path)
    with pytest.raises(WeightsError, match="holds a list"):
        read_checkpoint(path)


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s.pop("neck.lateral_convs.1.conv.bias"), r"1 tensors are missing.*fpn.lateral.1.bias"),
    (lambda s: s.update({"backbone.layer4.0.conv2_offset.weight": torch.zeros(1)}),
     r"1 have no place.*conv2_offset"),
    (lambda s: [s.pop(key) for key in list(s) if "layer4.2" in key],
     r"backbone is none of .*\(3, 4, 6, 2\)"),
    (lambda s: [s.pop(key) for key in list(s) if key.startswith("backbone.")], "without a ResNet")])
def test_an_incomplete_detector_says_what_does_not_match(tmp_path, change, complaint):
    state = mmdet_state("fsaf")
    change(state)
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=f"x.pth.*mmdetection.*{complaint}"):
        read_checkpoint(tmp_path / "x.pth")


def test_tensors_outside_the_detector_are_listed(tmp_path):
    state = {**mmdet_state("fsaf"), "mask_head.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "x.pth")
    notes = read_checkpoint(tmp_path / "x.pth")["notes"]
    assert "left out 1 tensors without a place here: mask_head.weight" in notes[1]


def test_a_training_starts_from_a_detector_without_a_predictor(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = filled(DeFRCN(5, **BASIC))
    state = {key: v for key, v in as_theirs(theirs, detectron2_c4).items() if "box_predictor" not in key}
    torch.save({"model": state}, tmp_path / "model_reset_remove.pth")
    read = read_checkpoint(tmp_path / "model_reset_remove.pth")
    assert read["names"] == [] and not any(key.startswith("predictor.") for key in read["model"])
    mine = DeFRCN(2, **BASIC)
    load_init(mine, read, ["a", "b"])
    assert torch.equal(mine.rpn.conv.weight, theirs.rpn.conv.weight)
    out = capsys.readouterr().out
    assert "an official DeFRCN, resnet18, 0 classes, without a predictor" in out and "new are a, b" in out
    with pytest.raises(WeightsError, match="remove.pth: has no predictor.*train.py --init"):
        load_model(tmp_path / "model_reset_remove.pth")


@pytest.mark.parametrize(("count", "split", "first", "last"), [
    (15, 1, "aeroplane", "tvmonitor"), (15, 2, "bicycle", "tvmonitor"), (20, 1, "aeroplane", "sofa"),
    (20, 3, "aeroplane", "sofa"), (5, 3, "boat", "sofa"), (80, 1, "person", "toothbrush")])
def test_official_voc_detectors_have_the_classes_of_their_split(tmp_path, count, split, first, last):
    torch.save({"model": as_theirs(DeFRCN(count, **BASIC), detectron2_c4)}, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth", voc_split=split)
    assert len(read["names"]) == count and (read["names"][0], read["names"][-1]) == (first, last)
    assert "taken for" in read["notes"][0]
    golden = SHARED / "golden" / "fewshot_data.json"
    if count < 80 and golden.is_file():
        parts = json.loads(golden.read_text())["voc_classes"][str(split)]
        assert read["names"] == parts[{15: "base", 20: "all", 5: "novel"}[count]]


def test_classes_that_the_number_does_not_tell(tmp_path):
    for count, remark in ((15, "VOC's base classes? Then give --voc-split"), (20, "VOC's: give --voc-split")):
        torch.save({"model": as_theirs(DeFRCN(count, **BASIC), detectron2_c4)}, tmp_path / "x.pth")
        assert remark in read_checkpoint(tmp_path / "x.pth")["notes"][0]
    read = read_checkpoint(tmp_path / "x.pth", classes=[f"thing {i}" for i in range(20)])
    assert read["names"][3] == "thing 3" and read["named"]


# ---------------------------------------------------------------------------- scoring, training

@pytest.mark.slow
def test_evaluate_scores_foreign_files_on_coco(coco_mini, tmp_path, monkeypatch, capsys):
    """80 classes in the order of COCO, on a folder in COCO's layout, from the file alone."""
    torch.manual_seed(0)
    model = filled(FCOS(80, caffe=True, **BASIC))
    torch.save({"model": as_theirs(model, adelaidet)}, tmp_path / "theirs.pth")
    words = ["evaluate.py", "--ckpt", tmp_path / "theirs.pth", "--data", coco_mini, "--split", "val2017",
             "--min-size", 64, "--max-size", 96, "--pictures", 0, "--workers", 0, "--score-threshold", 0.011]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    evaluate.main()
    assert "an FCOS of AdelaiDet, improved form, resnet18, 80 classes" in capsys.readouterr().out
    found = json.loads((tmp_path / "detections.json").read_text())
    dataset = load_coco([(coco_mini / "annotations/instances_val2017.json", coco_mini / "val2017")])
    assert dataset.names == COCO_CLASSES and dataset.category_ids == COCO_IDS
    assert found and {row["category_id"] for row in found} <= set(COCO_IDS)


def test_the_data_must_have_as_many_classes_as_a_file_that_names_none(tmp_path, mistake):
    torch.save({"model": as_theirs(FCOS(7, caffe=True, **BASIC), adelaidet)}, tmp_path / "theirs.pth")
    line = mistake(evaluate.main, "--ckpt", tmp_path / "theirs.pth", "--data", "shapes", "--split", "val")
    assert "7 classes and does not name them; the data have 8" in line and "--classes" in line
    line = mistake(evaluate.main, "--ckpt", tmp_path / "theirs.pth")
    assert "Name the data with --data" in line
    line = mistake(evaluate.main, "--ckpt", tmp_path / "theirs.pth", "--data", "shapes", "--split", "val",
                   "--classes", "disc,square")
    assert "--classes names 2 classes (2 different)" in line and "has 7" in line


def test_classes_can_be_named_for_a_file_that_does_not(tmp_path):
    torch.save({"model": as_theirs(FCOS(2, caffe=True, **BASIC), adelaidet)}, tmp_path / "theirs.pth")
    info = load_model(tmp_path / "theirs.pth", classes=["star", "ring"])[1]
    assert info["names"] == ["star", "ring"] and info["named"]
    for names in (["star"], ["star", "star"]):
        with pytest.raises(WeightsError, match=f"{len(names)} classes .1 different., .*theirs.pth has 2"):
            load_model(tmp_path / "theirs.pth", classes=names)


def test_training_starts_from_foreign_weights(tmp_path, capsys):
    torch.manual_seed(0)
    theirs = filled(FCOS(7, caffe=True, **BASIC))
    torch.save({"model": as_theirs(theirs, adelaidet)}, tmp_path / "theirs.pth")
    mine = FCOS(3, caffe=True, **BASIC)
    load_init(mine, read_checkpoint(tmp_path / "theirs.pth"), ["a", "b", "c"])
    assert torch.equal(mine.head.ltrb.weight, theirs.head.ltrb.weight)
    assert ("7 classes, which it does not name: new head.cls_logits.weight, head.cls_logits.bias"
            in capsys.readouterr().out)



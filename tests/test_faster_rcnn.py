"""Faster R-CNN by hand and against numbers that were recorded from detectron2 and the official DeFRCN."""
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, small_batch

import ops
from convert import rcnn_from_detectron2
from defrcn import DeFRCN
from faster_rcnn import (
    FasterRCNN,
    all_anchors,
    roi_losses,
    rpn_losses,
    rpn_proposals,
    sample_rois,
    subsample_labels,
)
from ops import match_anchors

sys.path.insert(0, str(GOLDEN))
import defrcn_rules as rules  # noqa: E402


def in_index_order(count, device):
    """Priorities of the recorded runs: the first elements are sampled."""
    return torch.arange(count, device=device).float()


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "defrcn.json").read_text()), np.load(GOLDEN / "defrcn.npz")


def recorded_weights(keys, num_classes, decouple=True):
    """The weights of the recorded runs under the names of the official code: {name: tensor}."""
    row_counts = {"cls_score": num_classes + 1, "bbox_pred": 4 * num_classes}
    state = {}
    for key, shape in keys.items():
        if "cell_anchors" in key or not decouple and key.startswith("affine"):
            continue
        for layer, rows in row_counts.items():
            shape = [rows, *shape[1:]] if layer in key else shape
        state[key] = torch.from_numpy(rules.weight(key, shape))
    return state


def recorded_batch(which):
    """The recorded images (RGB) and objects under our tensor contract."""
    records = [rules.batch()[i] for i in which]
    height, width = (max(record[0].shape[axis] for record in records) for axis in (0, 1))
    count = max(1, *(len(record[1]) for record in records), 1)
    images = torch.zeros(len(records), 3, height, width, dtype=torch.uint8)
    boxes, labels = torch.zeros(len(records), count, 4), torch.full((len(records), count), -1)
    for i, (image, gt, classes) in enumerate(records):
        images[i, :, :image.shape[0], :image.shape[1]] = torch.from_numpy(
            image[:, :, ::-1].copy()).permute(2, 0, 1)
        boxes[i, :len(gt)], labels[i, :len(gt)] = torch.from_numpy(gt), torch.from_numpy(classes)
    return images, torch.tensor([record[0].shape[:2] for record in records]), boxes, labels


def assert_recorded_losses_and_gradients(model, weights, record):
    """Losses and gradient norms of a model that holds the recorded weights equal those of a recorded case."""
    images, sizes, boxes, labels = recorded_batch(record["images"])
    losses = model.train()(images, sizes, boxes, torch.where(labels >= 0, labels % model.num_classes, labels))
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_box_reg"), ("rpn_cls", "loss_rpn_cls"),
                         ("rpn_box", "loss_rpn_loc")):
        assert losses[ours].item() == pytest.approx(record["losses"][theirs], rel=1e-5, abs=1e-9)
    sum(losses.values()).backward()
    # A tensor filled with its own number shows under which name the reader puts it.
    names = list(weights)
    numbered = {key: torch.full_like(value, i) for i, (key, value) in enumerate(weights.items())}
    ours = {names[int(value.flatten()[0])]: key for key, value in rcnn_from_detectron2(numbered).items()
            if not key.startswith("pixel_") and "num_batches" not in key}
    parameters = dict(model.named_parameters())
    for key, norm in record["grad_norm"].items():
        parameter = parameters.get(ours.get(key))
        if isinstance(norm, str):  # "frozen" or "none"
            assert parameter is None or parameter.grad is None
        else:
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=5e-3, abs=1e-9), key


# ---------------------------------------------------------------------------- published numbers

def test_proposals_and_their_targets_equal_the_published_ones(golden):
    records, arrays = golden
    model = DeFRCN(60, "resnet50").train()  # the recorded network has DeFRCN's affine layers
    model.load_state_dict(rcnn_from_detectron2(recorded_weights(records["keys"], 60)), strict=True)
    images, sizes, boxes, labels = recorded_batch([0, 1, 2])
    with torch.no_grad():
        feature, _ = model.features(images, sizes)
        objectness, deltas = model.rpn(feature)
    anchors = all_anchors(*feature.shape[-2:])
    np.testing.assert_array_equal(anchors[:15], arrays["rpn/cell_anchors"])
    np.testing.assert_allclose(objectness[:, ::29], arrays["rpn/objectness"], atol=1e-4)
    np.testing.assert_allclose(deltas[:, ::29], arrays["rpn/deltas"], atol=1e-4)
    for i in range(3):
        match = match_anchors(anchors, boxes[i], labels[i], 0.7, 0.3)
        found = torch.where(match >= 0, 1, torch.where(match == -1, 0, -1))
        assert found.tolist() == arrays["rpn/labels_before_sampling"][i].tolist()
        assert match[match >= 0].tolist() == arrays["rpn/matched_idx"][i][match >= 0].tolist()
        positive, negative = subsample_labels(match >= 0, match == -1, 256, 128,
                                              in_index_order(len(match), None))
        found = torch.where(positive, 1, torch.where(negative, 0, -1))
        assert found.tolist() == arrays["rpn/labels_after_first_k"][i].tolist()
        _, valid = rpn_proposals(objectness[i], deltas[i], anchors, sizes[i], 12000, 2000)
        assert valid.sum() == arrays[f"rpn/train_num_proposals_{i}"]


def test_losses_and_gradients_equal_the_published_ones(golden):
    record = golden[0]["train"]["plain_no_decouple"]
    # The recorded network has DeFRCN's RoIAlign grid and frozen stages.
    model = FasterRCNN(record["num_classes"], "resnet50", pool_size=7, freeze_at=3, roi_samples=64,
                       sample_order=in_index_order)
    weights = recorded_weights(golden[0]["keys"], record["num_classes"], decouple=False)
    model.load_state_dict(rcnn_from_detectron2(weights), strict=True)
    assert_recorded_losses_and_gradients(model, weights, record)


def test_detections_equal_the_published_ones(golden):
    arrays = golden[1]
    logits, deltas, proposals, boxes, scores, classes = (
        torch.from_numpy(arrays[f"eval/fc_{key}"]) for key in
        ("logits", "deltas", "proposals_0", "boxes_0", "scores_0", "classes_0"))
    with torch.device("meta"):
        model = FasterRCNN(logits.shape[1] - 1, "resnet18")
    outputs = {"logits": logits[None], "deltas": deltas.unflatten(1, (-1, 4))[None],
               "proposals": proposals[None], "valid": torch.ones(1, len(logits)).bool()}
    found, = model.detections(outputs, torch.tensor([[192, 256]]))
    # Recorded at twice the size of the network input.
    torch.testing.assert_close(found["boxes"] * 2, boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found["scores"], scores, rtol=0, atol=1e-6)
    assert found["labels"].tolist() == classes.tolist()


@pytest.mark.parametrize("function", [ops.roi_align, ops.roi_align_plain])
def test_roi_align_and_its_gradient_equal_the_published_ones(golden, function):
    arrays = golden[1]
    x = torch.from_numpy(arrays["roialign/x"]).requires_grad_()
    rois_of_first, rois_of_second = (torch.from_numpy(arrays[f"roialign/rois_img{i}"]) for i in (0, 1))
    boxes = torch.stack((rois_of_first, F.pad(rois_of_second, (0, 0, 0, 4))))
    for name, size, scale in (("out_s32_1x1", 1, 1 / 32), ("out_s16_7x7", 7, 1 / 16)):
        out = function(x, boxes, size, scale)[:12]
        np.testing.assert_allclose(out.detach(), arrays[f"roialign/{name}"], atol=1e-5)
    (out * torch.from_numpy(arrays["roialign/grad_w"])).sum().backward()
    np.testing.assert_allclose(x.grad, arrays["roialign/grad_x_s16_7x7"], atol=1e-5)


# ---------------------------------------------------------------------------- parts by hand

def test_sampling_takes_positives_first_and_fills_up_with_negatives():
    positive = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    priorities = torch.tensor([0.9, 0.5, 0.1, 0.2, 0.3, 0.4])
    positives, negatives = subsample_labels(positive, ~positive, 4, 2, priorities)
    assert positives.tolist() == [False, False, True, True, False, False]
    assert negatives.tolist() == [False, False, False, False, True, True]
    nothing = torch.zeros(6, dtype=torch.bool)
    positives, negatives = subsample_labels(nothing, nothing, 4, 2, priorities)
    assert not positives.any() and not negatives.any()


def test_proposals_without_area_and_not_finite_ones_are_padding_rows():
    anchors = torch.tensor([[0., 0., 10., 10.], [20., 20., 30., 30.], [90., 90., 99., 99.], [0., 0., 9., 9.]])
    objectness = torch.tensor([1.0, 3.0, 4.0, math.nan])  # the third anchor is outside the image
    boxes, valid = rpn_proposals(objectness, torch.zeros(4, 4), anchors, torch.tensor([50, 60]), 4, 3)
    assert boxes.tolist() == [[20, 20, 30, 30], [0, 0, 10, 10], [0, 0, 0, 0]]
    assert valid.tolist() == [True, True, False]


def test_rpn_losses_by_hand():
    anchors = torch.tensor([[0., 0., 10., 10.], [40., 40., 50., 50.]])
    gt, labels = torch.tensor([[[1., 0., 11., 10.]]]), torch.tensor([[2]])
    losses = rpn_losses(torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, gt, labels)
    assert losses["rpn_cls"].item() == pytest.approx(2 * math.log(2) / 256)  # two anchors of ln 2
    assert losses["rpn_box"].item() == pytest.approx(0.1 / 256)  # a shift of a tenth of the anchor's width


def test_rois_are_positives_then_background_then_padding():
    proposals = torch.tensor([[0., 0., 10., 10.], [50., 50., 60., 60.], [0., 0., 0., 0.]])
    valid = torch.tensor([True, True, False])
    gt, labels = torch.tensor([[0., 0., 10., 9.], [20., 20., 30., 30.]]), torch.tensor([1, -2])
    rois, cls, targets = sample_rois(proposals, valid, gt, labels, 3, count=8, sample_order=in_index_order)
    # The proposal with IoU 0.9 and the object itself; one background RoI. The crowd is no RoI.
    assert cls.tolist() == [1, 1, 3, -1, -1, -1, -1, -1]
    assert rois[:3].tolist() == [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]
    assert targets[:2].tolist() == [[0, 0, 10, 9]] * 2
    rois, cls, _ = sample_rois(proposals, valid, gt[:0], labels[:0], 3, count=4)
    assert cls.tolist() == [3, 3, -1, -1] and rois.shape == (4, 4)


def test_roi_losses_by_hand():
    rois = torch.tensor([[0., 0., 10., 10.], [5., 5., 9., 9.], [0., 0., 0., 0.]])
    targets = torch.tensor([[1., 0., 11., 10.], [0., 0., 0., 0.], [0., 0., 0., 0.]])
    deltas = torch.zeros(3, 2, 4)
    losses = roi_losses(torch.zeros(3, 3), deltas, rois, torch.tensor([1, 2, -1]), targets)
    assert losses["cls"].item() == pytest.approx(math.log(3))  # two RoIs of ln 3, divided by two
    assert losses["box"].item() == pytest.approx(10 * 0.1 / 2)  # 10 x a shift of a tenth, divided by two RoIs


# ---------------------------------------------------------------------------- the whole model

def small_model(model=FasterRCNN, pool_size=7, **kwargs):
    """A small FasterRCNN or DeFRCN with weights from a fixed seed; a grid of 14 is four times slower."""
    torch.manual_seed(0)
    model = model(3, "resnet18", norm="affine", freeze_at=0, caffe=False, pool_size=pool_size, roi_samples=16,
                  post_nms_top_k=(50, 20), sample_order=in_index_order, **kwargs)
    # Scores far from ties: rounding does not change the order of the proposals.
    torch.nn.init.normal_(model.rpn.objectness.weight, std=0.1)
    return model


def assert_no_box_loss_without_objects(model):
    """The box losses are 0, and every parameter still has a finite gradient."""
    images, sizes, boxes, labels = small_batch((0, 0))
    for gt in ((boxes, labels), (boxes[:, :0], labels[:, :0])):
        losses = model.train()(images, sizes, *gt)
        assert losses["box"] == 0 and losses["rpn_box"] == 0 and losses["cls"] > 0
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_images_without_objects_have_no_box_loss_but_gradients():
    assert_no_box_loss_without_objects(small_model())


def test_losses_are_float32_and_finite_under_autocast():
    model = small_model().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*small_batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_detections_are_inside_the_image_and_sorted():
    model = small_model(score_threshold=0.0).eval()
    images, sizes, _, _ = small_batch()
    with torch.no_grad():
        for found, size in zip(model(images, sizes), sizes.tolist()):
            assert 0 < len(found["boxes"]) <= 100
            assert (found["boxes"] >= 0).all() and (found["boxes"][:, 2::2] <= size[1]).all()
            assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3

"""Faster R-CNN by hand and against numbers that were recorded from detectron2 and the official DeFRCN."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_no_box_loss_without_objects,
    assert_recorded_losses_and_gradients,
    golden_rcnn_records,
    in_index_order,
    recorded_batch,
    recorded_weights,
    small_batch,
    small_two_stage,
)

import ops
from convert import rcnn_from_detectron2
from defrcn import DeFRCN
from faster_rcnn import (
    FasterRCNN,
    all_anchors,
    base_anchors,
    roi_losses,
    rpn_losses,
    rpn_proposals,
    sample_rois,
    subsample_labels,
)
from ops import match_anchors


@pytest.fixture(scope="module")
def golden():
    return golden_rcnn_records()


# ---------------------------------------------------------------------------- published numbers

def test_proposals_and_their_targets_equal_the_published_ones(golden):
    records, arrays = golden
    model = DeFRCN(60, "resnet50").train()  # the recorded network has DeFRCN's affine layers
    model.load_state_dict(rcnn_from_detectron2(recorded_weights(records["keys"], 60)), strict=True)
    images, sizes, boxes, labels = recorded_batch([0, 1, 2])
    with torch.no_grad():
        feature, _ = model.features(images, sizes)
        objectness, deltas = model.rpn(feature)
    anchors = all_anchors(base_anchors(), *feature.shape[-2:])
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

def test_images_without_objects_have_no_box_loss_but_gradients():
    assert_no_box_loss_without_objects(small_two_stage())


def test_losses_are_float32_and_finite_under_autocast():
    model = small_two_stage().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*small_batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_detections_are_inside_the_image_and_sorted():
    model = small_two_stage(score_threshold=0.0).eval()
    images, sizes, _, _ = small_batch()
    with torch.no_grad():
        for found, size in zip(model(images, sizes), sizes.tolist()):
            assert 0 < len(found["boxes"]) <= 100
            assert (found["boxes"] >= 0).all() and (found["boxes"][:, 2::2] <= size[1]).all()
            assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3

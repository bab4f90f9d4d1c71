"""Faster R-CNN by hand and against numbers that were recorded from detectron2 and the official DeFRCN."""
import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    assert_no_box_loss_without_objects,
    assert_recorded_losses_and_gradients,
    assert_static_shapes,
    assert_two_ranks_equal_one,
    fpn_records,
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
    pool_rois,
    roi_levels,
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
        features, _ = model.features(images, sizes)
        objectness, deltas = model.rpn(features)
    anchors = model.anchors([features[0].shape[-2:]])
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
        _, valid = rpn_proposals(objectness[i], deltas[i], anchors, sizes[i], [len(anchors)], 12000, 2000)
        assert valid.sum() == arrays[f"rpn/train_num_proposals_{i}"]


def test_losses_and_gradients_equal_the_published_ones(golden):
    record = golden[0]["train"]["plain_no_decouple"]
    # The recorded network has DeFRCN's RoIAlign grid and frozen stages.
    model = FasterRCNN(record["num_classes"], "resnet50", fpn=False, pool_size=7, freeze_at=3, roi_samples=64,
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


# ---------------------------------------------------------------------------- published numbers, FPN

@pytest.fixture(scope="module")
def golden_fpn():
    numbers, arrays, weights = fpn_records()
    model = FasterRCNN(80, "resnet50", roi_samples=64, sample_order=in_index_order)
    model.load_state_dict(rcnn_from_detectron2(weights), strict=True)
    return numbers, arrays, weights, model


def test_proposals_with_fpn_equal_the_published_ones(golden_fpn):
    _, arrays, _, model = golden_fpn
    images, sizes, boxes, labels = recorded_batch([0, 1, 2], model.size_divisor)
    with torch.no_grad():
        features, _ = model.train().features(images, sizes)
        objectness, deltas = model.rpn(features)
    shapes = [feature.shape[-2:] for feature in features]
    anchors, level_sizes = model.anchors(shapes), [3 * height * width for height, width in shapes]
    np.testing.assert_array_equal(model.base_anchors, arrays["cell_anchors"])
    recorded = [(arrays["logits_0"], arrays["deltas_0"], 1),
                *((arrays[f"logits_{i}_part"], arrays[f"deltas_{i}_part"], 29) for i in (1, 2))]
    for i, (logits, box_deltas, stride) in enumerate(recorded):
        np.testing.assert_allclose(objectness[i, ::stride], logits, atol=1e-4 * 6.8)
        np.testing.assert_allclose(deltas[i, ::stride], box_deltas, atol=1e-4)
        match = match_anchors(anchors, boxes[i], labels[i], 0.7, 0.3)
        before = torch.where(match >= 0, 1, torch.where(match == -1, 0, -1))
        np.testing.assert_array_equal(before, arrays["labels_before_sampling"][i])
        np.testing.assert_array_equal(match[match >= 0], arrays["matched_idx"][i][match >= 0])
        positive, negative = subsample_labels(match >= 0, match == -1, 256, 128,
                                              in_index_order(len(match), None))
        after = torch.where(positive, 1, torch.where(negative, 0, -1))
        np.testing.assert_array_equal(after, arrays["labels_after_first_k"][i])
    logits, box_deltas = (torch.from_numpy(arrays[f"{name}_0"]) for name in ("logits", "deltas"))
    found, valid = rpn_proposals(logits, box_deltas, anchors, sizes[0], level_sizes, 2000, 1000)
    assert valid.all()
    np.testing.assert_array_equal(found, arrays["train_proposals_0"])


@pytest.mark.parametrize("case", ["faster_64", "faster_64_gtfree"])
def test_losses_and_gradients_with_fpn_equal_the_published_ones(golden_fpn, case):
    numbers, _, weights, model = golden_fpn
    model.zero_grad(set_to_none=True)
    assert_recorded_losses_and_gradients(model, weights, numbers["train"][case])


def test_sampled_rois_with_fpn_read_the_published_levels(golden_fpn):
    numbers, _, _, model = golden_fpn
    images, sizes, boxes, labels = recorded_batch([0, 1, 2], model.size_divisor)
    labels = torch.where(labels >= 0, labels % 80, labels)
    with torch.no_grad():
        found = model.train().propose(model.features(images, sizes)[0], sizes)
    rois, sampled, _ = sample_rois(found["proposals"], found["valid"], boxes, labels, 80, 64, in_index_order)
    counts = roi_levels(rois[sampled >= 0]).bincount(minlength=4)
    assert counts.tolist() == numbers["train"]["faster_64"]["roi_level_counts"]


def test_detections_with_fpn_equal_the_published_ones(golden_fpn):
    _, arrays, _, model = golden_fpn
    images, sizes, _, _ = recorded_batch([0, 1, 2], model.size_divisor)
    with torch.no_grad():
        found = {key: value.numpy() for key, value in model.eval()(images, sizes)[0].items()}
    for case, zoom in (("faster_0", 1), ("faster_2x_0", 2)):  # at the size of the input, at twice that size
        boxes, scores, classes = (arrays[f"detections/{case}_{key}"]
                                  for key in ("boxes", "scores", "classes"))
        assert len(found["boxes"]) == len(boxes) == 100
        for box, score, label in zip(boxes, scores, classes):
            same = ((found["labels"] == label) & (np.abs(found["scores"] - score) < 1e-3)
                    & (np.abs(found["boxes"] * zoom - box).max(axis=1) < 0.05))
            assert same.any()


# ---------------------------------------------------------------------------- parts by hand

def test_the_level_of_a_roi_by_hand():
    sides = torch.tensor([0.0, 10.0, 111.0, 112.0, 223.0, 224.0, 447.0, 448.0, 3000.0])
    rois = torch.stack((sides * 0, sides * 0, sides / 2, sides * 2), dim=1)  # the area counts, not the shape
    assert roi_levels(rois).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("use_torchvision", [True, False])
def test_rois_are_pooled_from_their_own_level(use_torchvision, monkeypatch):
    monkeypatch.setattr(ops, "USE_TORCHVISION", use_torchvision)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, 3, 640 // stride, 512 // stride, generator=generator, requires_grad=True)
                for stride in (4, 8, 16, 32)]
    corner = torch.rand(2, 12, 2, generator=generator) * 40
    side = 2 ** torch.linspace(4, 8.9, 24).view(2, 12, 1)
    rois = torch.cat((corner, corner + side), dim=2)
    rois[0, 0] = 0  # a padding row
    pooled = pool_rois(features, rois, 7)
    levels = roi_levels(rois)
    assert set(levels.flatten().tolist()) == {0, 1, 2, 3}
    loop = torch.cat([ops.roi_align_plain(features[levels[b, r]][b:b + 1], rois[b:b + 1, r:r + 1], 7,
                                          1 / (4, 8, 16, 32)[levels[b, r]])
                      for b in range(2) for r in range(12)])
    torch.testing.assert_close(pooled, loop, rtol=1e-4, atol=1e-5)
    weight = torch.randn(pooled.shape, generator=generator)
    for ours, theirs in zip(torch.autograd.grad((pooled * weight).sum(), features),
                            torch.autograd.grad((loop * weight).sum(), features)):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_proposals_by_level_equal_a_slow_loop():
    generator = torch.Generator().manual_seed(0)
    level_sizes = [300, 80, 20]
    corner = torch.rand(400, 2, generator=generator) * 80
    anchors = torch.cat((corner, corner + 20 + 20 * torch.rand(400, 2, generator=generator)), dim=1)
    objectness, size = torch.randn(400, generator=generator), torch.tensor([100, 120])
    boxes, valid = rpn_proposals(objectness, torch.zeros(400, 4), anchors, size, level_sizes, 50, 60)
    kept, start = [], 0
    for count in level_sizes:
        in_level = []
        best = sorted(range(start, start + count), key=lambda i: -objectness[i])[:50]
        for i in best:
            box = anchors[i].clamp(max=torch.tensor([120.0, 100.0, 120.0, 100.0]))
            if all(ops.pairwise_iou(box[None], other[None]) <= 0.7 for _, other in in_level):
                in_level.append((objectness[i], box))
        kept, start = kept + in_level, start + count
    kept = sorted(kept, key=lambda pair: -pair[0])[:60]
    assert valid.sum() == len(kept) == 60
    torch.testing.assert_close(boxes, torch.stack([box for _, box in kept]))
    assert len({tuple(box.tolist()) for box in boxes}) == 60


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
    boxes, valid = rpn_proposals(objectness, torch.zeros(4, 4), anchors, torch.tensor([50, 60]), [4], 4, 3)
    assert boxes.tolist() == [[20, 20, 30, 30], [0, 0, 10, 10], [0, 0, 0, 0]]
    assert valid.tolist() == [True, True, False]


def test_rpn_losses_by_hand():
    anchors = torch.tensor([[0., 0., 10., 10.], [40., 40., 50., 50.]])
    gt, labels = torch.tensor([[[1., 0., 11., 10.]]]), torch.tensor([[2]])
    losses = rpn_losses(torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, gt, labels)
    assert losses["rpn_cls"].item() == pytest.approx(2 * math.log(2) / 256)  # two anchors of ln 2
    assert losses["rpn_box"].item() == pytest.approx(0.1 / 256)  # a shift of a tenth of the anchor's width


def test_rois_are_positives_then_background_then_padding():
    proposals = torch.tensor([[[0., 0., 10., 10.], [50., 50., 60., 60.], [0., 0., 0., 0.]]] * 2)
    valid = torch.tensor([[True, True, False]] * 2)
    gt = torch.tensor([[[0., 0., 10., 9.], [20., 20., 30., 30.]]] * 2)
    labels = torch.tensor([[1, -2], [-1, -1]])  # the second image has no object
    rois, cls, targets = sample_rois(proposals, valid, gt, labels, 3, count=8, sample_order=in_index_order)
    # The proposal with IoU 0.9 and the object itself; one background RoI. The crowd is no RoI.
    assert cls[0].tolist() == [1, 1, 3, -1, -1, -1, -1, -1]
    assert rois[0, :3].tolist() == [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]
    assert targets[0, :3].tolist() == [[0, 0, 10, 9], [0, 0, 10, 9], [0, 0, 0, 0]]
    assert cls[1].tolist() == [3, 3, -1, -1, -1, -1, -1, -1] and not targets[1].any()
    assert rois[1, :2].tolist() == [[0, 0, 10, 10], [50, 50, 60, 60]]
    rois, cls, _ = sample_rois(proposals, valid, gt[:, :0], labels[:, :0], 3, count=4)
    assert cls.tolist() == [[3, 3, -1, -1]] * 2 and rois.shape == (2, 4, 4)


def test_roi_losses_by_hand():
    rois = torch.tensor([[0., 0., 10., 10.], [5., 5., 9., 9.], [0., 0., 0., 0.]])
    targets = torch.tensor([[1., 0., 11., 10.], [0., 0., 0., 0.], [0., 0., 0., 0.]])
    deltas = torch.zeros(3, 2, 4)
    losses = roi_losses(torch.zeros(3, 3), deltas, rois, torch.tensor([1, 2, -1]), targets)
    assert losses["cls"].item() == pytest.approx(math.log(3))  # two RoIs of ln 3, divided by two
    assert losses["box"].item() == pytest.approx(10 * 0.1 / 2)  # 10 x a shift of a tenth, divided by two RoIs


# ---------------------------------------------------------------------------- the whole model

small_fpn = functools.partial(small_two_stage, fpn=True, fpn_channels=32)
FORMS = pytest.mark.parametrize("make", [small_two_stage, small_fpn], ids=["c4", "fpn"])


@FORMS
def test_images_without_objects_have_no_box_loss_but_gradients(make):
    assert_no_box_loss_without_objects(make())


@FORMS
def test_losses_are_float32_and_finite_under_autocast(make):
    model = make().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*small_batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.slow
def test_the_compiled_step_with_fpn_equals_the_eager_one():
    model, batch = small_fpn().train(), small_batch()
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    for ours, theirs in zip(compiled(*batch).values(), model(*batch).values()):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_two_ranks_with_fpn_give_the_gradients_of_one_process(tmp_path):
    assert_two_ranks_equal_one(small_fpn, small_batch((3, 0)), tmp_path, rtol=1e-2)


def test_the_step_with_fpn_has_fixed_shapes_outside_the_nms():
    model, batch = small_fpn().train(), small_batch()
    found = model.propose(model.features(*batch[:2])[0], batch[1])
    model.proposals = lambda *_: (found["proposals"], found["valid"])
    assert_static_shapes(model, batch)


@FORMS
def test_detections_are_inside_the_image_and_sorted(make):
    model = make(score_threshold=0.0).eval()
    images, sizes, _, _ = small_batch()
    with torch.no_grad():
        for found, size in zip(model(images, sizes), sizes.tolist()):
            assert 0 < len(found["boxes"]) <= 100
            assert (found["boxes"] >= 0).all() and (found["boxes"][:, 2::2] <= size[1]).all()
            assert (found["scores"].diff() <= 0).all() and found["labels"].max() < 3

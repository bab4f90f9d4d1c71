"""FSAF and RetinaNet against recorded numbers of mmdetection, torchvision, sums by hand and two ranks."""
import math

import numpy as np
import pytest
import torch
from helpers import (
    BATCHES,
    assert_compiles,
    assert_golden_detections,
    assert_golden_features,
    assert_golden_gradients,
    assert_static_shapes,
    assert_two_ranks_equal_one,
    golden_batch,
    golden_records,
    level_major,
    load_golden_weights,
    per_level,
    small_batch,
)

import convert
import fsaf
from backbone import FixedStatsBatchNorm2d
from fsaf import (
    FSAF,
    AnchorFreeTargets,
    all_anchors,
    all_points,
    anchor_losses,
    base_anchors,
    class_weights,
    fsaf_decode,
    fsaf_losses,
    fsaf_targets,
    level_losses,
    matched_targets,
    select_level,
    valid_points,
    with_padding_row,
)
from ops import iou_loss


@pytest.fixture(scope="module")
def golden():
    return golden_records("fsaf", "fsaf.npz")


@pytest.fixture(scope="module")
def published(golden):
    """FSAF with the weights of the recorded run, and {mmdetection's key: ours}."""
    model = FSAF(80, "resnet50")
    return model, load_golden_weights(model, golden[2]["fsaf"], "fsaf", convert.fsaf_from_mmdet)


def recorded_batch(name):
    """A golden batch with crowds as padding: the recorded runs saw no crowds."""
    images, sizes, boxes, labels = golden_batch(BATCHES[name])
    return images, sizes, boxes, torch.where(labels == -2, -1, labels)


def loss_arguments(model, images, sizes, boxes, labels):
    """What `level_losses` and `fsaf_losses` need."""
    gt = with_padding_row(boxes, labels)
    return model.train().anchor_free_targets(model.network(images, sizes), sizes, *gt)


# ---------------------------------------------------------------------------- published numbers

@pytest.mark.parametrize("name", BATCHES)
def test_targets_equal_the_published_ones(golden, name):
    images, sizes, boxes, labels = recorded_batch(name)
    shapes = [(math.ceil(images.shape[2] / s), math.ceil(images.shape[3] / s)) for s in fsaf.STRIDES]
    points, strides = all_points(shapes)
    for i in range(len(images)):
        found = fsaf_targets(points, strides, boxes[i], labels[i], valid_points(points, sizes)[i])
        positive = (found.gt_index >= 0).nonzero().squeeze(1)
        record = {key: golden[1][f"{name}/img{i}/{key}"] for key in
                  ("pos_idx", "pos_label", "pos_gt", "pos_box", "invalid_idx", "zero_label_weight")}
        assert positive.tolist() == record["pos_idx"].tolist()
        assert found.gt_index[positive].tolist() == record["pos_gt"].tolist()
        assert labels[i][found.gt_index[positive]].tolist() == record["pos_label"].tolist()
        np.testing.assert_allclose(boxes[i][found.gt_index[positive]], record["pos_box"].reshape(-1, 4))
        assert found.ignored.nonzero().squeeze(1).tolist() == record["invalid_idx"].tolist()
        gt_labels = torch.cat((labels[i], torch.tensor([-1])))  # the last row is that of gt_index -1
        weights = class_weights(found.ignore_region, torch.zeros_like(found.ignored),
                                gt_labels[found.gt_index], gt_labels[:found.ignore_region.shape[1]], 80)
        assert sorted(map(tuple, (weights == 0).nonzero().tolist())) == sorted(
            map(tuple, record["zero_label_weight"].tolist()))


@pytest.mark.parametrize("name", BATCHES)
def test_level_losses_and_the_selection_equal_the_published_ones(golden, published, name):
    batch = recorded_batch(name)
    with torch.no_grad():
        logits, boxes, targets, gt_boxes, gt_labels, level_sizes = loss_arguments(published[0], *batch)
        means = level_losses(logits, boxes, targets, gt_boxes, gt_labels, level_sizes)
        losses = fsaf_losses(logits, boxes, targets, gt_boxes, gt_labels, level_sizes)
    np.testing.assert_allclose(means[gt_labels >= 0].T, golden[1][f"{name}/level_loss"], rtol=1e-5)

    # The recorded loss is a list over levels. A point counts on its level only.
    level = select_level(means)
    level_of_point = torch.arange(5).repeat_interleave(torch.tensor(level_sizes))
    selected = (targets.gt_index >= 0) & (level.gather(1, targets.gt_index.clamp(min=0)) == level_of_point)
    assert level_major(list(selected), level_sizes).nonzero().squeeze(1).tolist() == golden[1][
        f"{name}/pos_after_select"].tolist()
    labels, target_boxes = matched_targets(torch.where(selected, targets.gt_index, -1), gt_boxes, gt_labels)
    cls, box = fsaf.point_losses(logits, boxes, labels, target_boxes)
    cls = (cls * class_weights(targets.ignore_region, targets.ignored, labels, gt_labels, 80)).sum(-1)
    norm = selected.sum() if selected.any() else (~targets.ignored).sum()
    expected = golden[0]["loss"][name]
    for found, theirs, total in ((cls, "loss_cls", losses["cls"]), (box, "loss_bbox", losses["box"])):
        levels = torch.stack([part.sum() for part in found.split(level_sizes, dim=1)]) / norm
        np.testing.assert_allclose(levels, expected[theirs], rtol=1e-5, atol=1e-9)
        assert total.item() == pytest.approx(sum(expected[theirs]), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("name", BATCHES)
def test_gradients_equal_the_published_ones(golden, published, name):
    model, ours = published
    model.train().zero_grad()
    losses = model(*recorded_batch(name))
    assert sum(losses.values()).item() == pytest.approx(golden[0]["loss"][name]["total"], rel=1e-5)
    sum(losses.values()).backward()
    assert_golden_gradients(model, golden[0], name, ours)


def test_features_and_head_outputs_equal_the_published_ones(golden, published):
    model, _ = published
    images, sizes, _, _ = recorded_batch("b01")
    model.eval()
    with torch.no_grad():
        stages = model.backbone(fsaf.normalise_images(images, sizes, model.pixel_mean, model.pixel_std))
        levels = model.fpn(stages[1:])
        outputs = model.head(levels)
    boxes = per_level(outputs["tblr"], levels)
    assert_golden_features(golden[0], backbone=stages, fpn=levels,
                           head_cls=per_level(outputs["logits"], levels), head_reg_eval=boxes,
                           head_reg_train=boxes)


@pytest.mark.parametrize(("case", "top_k", "threshold"), [("det", 1000, 0.05),
                                                          ("det_pre60_thr003_v3.3.0", 60, 0.03)])
def test_detections_equal_the_published_ones(golden, published, monkeypatch, case, top_k, threshold):
    model, _ = published
    monkeypatch.setattr(fsaf, "PRE_NMS_TOP_K", top_k)
    monkeypatch.setattr(model, "score_threshold", threshold)
    assert_golden_detections(model, golden[1], case)


def test_published_size_freezing_and_start():
    model = FSAF(80)
    assert sum(p.numel() for p in model.parameters()) == 36_419_732
    assert all(isinstance(m, FixedStatsBatchNorm2d) for m in model.modules()
               if isinstance(m, torch.nn.BatchNorm2d))
    assert not model.backbone.layer1[0].bn1.weight.requires_grad
    assert model.backbone.layer2[0].bn1.weight.requires_grad
    assert model.head.cls_logits.bias[0].item() == pytest.approx(-4.59512, abs=1e-5)
    assert model.head.tblr.bias.tolist() == [0.25] * 4


# ---------------------------------------------------------------------------- anchor-free branch: targets

def slow_shrink(box, scale):
    cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    w, h = (box[2] - box[0]) * scale / 2, (box[3] - box[1]) * scale / 2
    return cx - w, cy - h, cx + w, cy + h


def slow_covers(box, x, y, s):
    w = max(0, min(x + s / 2, box[2]) - max(x - s / 2, box[0]))
    h = max(0, min(y + s / 2, box[3]) - max(y - s / 2, box[1]))
    return w * h / s ** 2 > 0.01


def slow_inside(box, x, y):
    return box[0] < x < box[2] and box[1] < y < box[3]


def slow_targets(points, strides, boxes, labels, valid, ignore_scale):
    """The assignment rules, one point and one object at a time: gt_index, {(point, object)}, ignored."""
    gt_index, ignore_region, ignored = [], set(), []
    objects = list(zip(boxes.tolist(), labels.tolist()))
    for p, ((x, y), s, is_valid) in enumerate(zip(points.tolist(), strides.tolist(), valid.tolist())):
        is_ignored = not is_valid or any(label == -2 and slow_inside(slow_shrink(box, 0.5), x, y)
                                         for box, label in objects)
        possible = [(g, box) for g, (box, label) in enumerate(objects) if is_valid and label >= 0]
        effective = [g for g, box in possible
                     if slow_inside(box, x, y) and slow_covers(slow_shrink(box, 0.2), x, y, s)]
        ring = [g for g, box in possible
                if g not in effective and slow_covers(slow_shrink(box, ignore_scale), x, y, s)]
        best = min(effective, default=-1,
                   key=lambda g: ((boxes[g, 2] - boxes[g, 0]) * (boxes[g, 3] - boxes[g, 1])).item())
        others = ring + [g for g in effective if g != best]
        if is_ignored or best >= 0 and any(labels[g] == labels[best] for g in others):
            best = -1
        gt_index.append(best)
        ignored.append(is_ignored)
        ignore_region |= {(p, g) for g in effective + ring}
    return gt_index, ignore_region, ignored


@pytest.mark.parametrize("ignore_scale", [0.2, 0.5])
@pytest.mark.parametrize("count", [0, 1, 14])
def test_targets_equal_a_slow_loop(count, ignore_scale):
    generator = torch.Generator().manual_seed(count)
    points, strides = all_points([(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)])
    corner = torch.rand(count, 2, generator=generator) * 120
    boxes = torch.cat((corner, corner + 4 + torch.rand(count, 2, generator=generator) * 150), dim=1)
    labels = torch.randint(-2, 3, (count,), generator=generator)
    valid = (points < torch.tensor([160., 128.])).all(dim=1)
    found = fsaf_targets(points, strides, boxes, labels, valid, ignore_scale=ignore_scale)
    gt_index, ignore_region, ignored = slow_targets(points, strides, boxes, labels, valid, ignore_scale)
    assert found.gt_index.tolist() == gt_index and found.ignored.tolist() == ignored
    assert set(map(tuple, found.ignore_region.nonzero().tolist())) == ignore_region
    # The case holds several positive objects and a crowd.
    assert count < 14 or len(set(gt_index)) > 4 and (found.ignored & valid).any()


def test_a_ring_surrounds_the_effective_region():
    points, strides = all_points([(16, 16)])
    box = torch.tensor([[0., 0., 128., 128.]])
    valid = torch.ones(256, dtype=torch.bool)
    found = fsaf_targets(points, strides, box, torch.tensor([0]), valid, ignore_scale=0.5)
    # The effective region is 51.2 .. 76.8. It reaches the squares around 48 .. 80, which are cells 6 .. 10.
    # Of the first, 44 .. 52, it covers 0.8 px. In a corner the share is 0.8 * 0.8 / 64 = 0.01, and rounding
    # decides: one of the 25 cells is missing.
    positive = (found.gt_index >= 0).view(16, 16)
    assert positive[6:11, 6:11].sum() == positive.sum() == 24
    # The ignore region is 32 .. 96. It reaches the squares around 32 .. 96, which are cells 4 .. 12.
    assert found.ignore_region.view(16, 16)[4:13, 4:13].all() and found.ignore_region.sum() == 81


def test_in_a_crowd_nothing_is_learned():
    points, strides = all_points([(8, 8)])
    boxes = torch.tensor([[0., 0., 64., 64.], [24., 24., 40., 40.]])
    found = fsaf_targets(points, strides, boxes, torch.tensor([-2, 1]), torch.ones(64, dtype=torch.bool))
    # The points strictly inside the middle half of the crowd, 16 .. 48, are at 24, 32, 40.
    assert found.ignored.view(8, 8)[3:6, 3:6].all() and found.ignored.sum() == 9
    assert (found.gt_index == -1).all()


# ---------------------------------------------------------------------------- anchor-free branch: losses

def two_level_case():
    """One image with two objects of classes 0 and 1. Points 0..3 are on the first level, 4 on the second."""
    gt_index = torch.tensor([[0, 0, 1, -1, 0]])
    ignore_region = torch.zeros(1, 5, 2, dtype=torch.bool)
    ignore_region[0, [0, 1, 4], 0] = ignore_region[0, [2, 3], 1] = True  # point 3 is positive for no object
    targets = AnchorFreeTargets(gt_index, ignore_region, ignored=torch.zeros(1, 5, dtype=torch.bool))
    gt_boxes, gt_labels = torch.tensor([[[0., 0., 10., 10.], [0., 0., 4., 4.]]]), torch.tensor([[0, 1]])
    logits = torch.zeros(1, 5, 2)
    boxes = torch.tensor([[[0., 0., 10., 5.], [0., 0., 10., 10.], [0., 0., 4., 4.], [0., 0., 1., 1.],
                           [0., 0., 10., 8.]]])
    return logits, boxes, targets, gt_boxes, gt_labels, [4, 1]


POSITIVE, NEGATIVE = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)  # focal loss at logit 0


def test_level_losses_by_hand():
    means = level_losses(*two_level_case())
    both_classes = POSITIVE + NEGATIVE
    # Object 0: IoU 0.5 and 1 on the first level, 0.8 on the second. Object 1: IoU 1, no point on the second.
    expected = [[both_classes + math.log(2) / 2, both_classes - math.log(0.8)], [both_classes, 1e6]]
    torch.testing.assert_close(means[0], torch.tensor(expected))
    assert select_level(means).tolist() == [[1, 0]]
    assert select_level(torch.full((2, 5), 1e6)).tolist() == [0, 0]
    assert select_level(torch.zeros(0, 5)).shape == (0,)


def test_losses_by_hand():
    # Positives: point 4 (object 0) and point 2 (object 1). Points 0 and 1 are those of object 0 on the level
    # that it did not select: class 0 has no loss there, class 1 is negative. At point 3 class 1 is ignored.
    losses = fsaf_losses(*two_level_case())
    cls = 2 * (POSITIVE + NEGATIVE) + 2 * NEGATIVE + NEGATIVE
    assert losses["cls"].item() == pytest.approx(cls / 2, rel=1e-6)
    assert losses["box"].item() == pytest.approx(-math.log(0.8) / 2, rel=1e-5)


def test_the_papers_rule_ignores_an_object_only_beside_its_level():
    # Four levels of one point each, and one object, which is easiest on the first level.
    targets = AnchorFreeTargets(gt_index=torch.zeros(1, 4, dtype=torch.int64),
                                ignore_region=torch.ones(1, 4, 1, dtype=torch.bool),
                                ignored=torch.zeros(1, 4, dtype=torch.bool))
    boxes = torch.tensor([[[0., 0., 10., 10.], [0., 0., 10., 5.], [0., 0., 10., 5.], [0., 0., 10., 5.]]])
    arguments = (torch.zeros(1, 4, 1), boxes, targets, torch.tensor([[[0., 0., 10., 10.]]]),
                 torch.tensor([[0]]), [1] * 4)
    assert fsaf_losses(*arguments)["cls"].item() == pytest.approx(POSITIVE)
    # Level 1 is ignored, levels 2 and 3 are background.
    assert fsaf_losses(*arguments, ignore_adjacent=True)["cls"].item() == pytest.approx(
        POSITIVE + 2 * NEGATIVE)


def test_a_distance_of_zero_leaves_the_others_a_gradient():
    points, strides = torch.tensor([[40., 40.]]), torch.tensor([8.])
    tblr = torch.tensor([[[0.0, 0.5, 0.5, 0.5]]], requires_grad=True)
    target = torch.tensor([[[24., 24., 56., 56.]]])
    iou_loss(fsaf_decode(points, strides, tblr.clamp(min=fsaf.MIN_DISTANCE)), target).sum().backward()
    assert tblr.grad[0, 0, 0] == 0 and (tblr.grad[0, 0, 1:] < 0).all()
    # The model has this limit in training only.
    model = small_model()
    torch.nn.init.zeros_(model.head.tblr.weight)
    torch.nn.init.constant_(model.head.tblr.bias, -1.0)
    images, sizes, boxes, labels = small_batch()
    trained = loss_arguments(model, images, sizes, boxes, labels).boxes
    assert (trained[..., 2:] > trained[..., :2]).all()
    with torch.no_grad():
        assert [len(d["boxes"]) for d in model.eval()(images, sizes)] == [0, 0]


def test_distances_are_top_bottom_left_right_in_units_of_four_strides():
    boxes = fsaf_decode(torch.tensor([[100., 200.]]), torch.tensor([16.]), torch.tensor([[1., 2., 3., 4.]]))
    assert boxes.tolist() == [[100 - 3 * 64, 200 - 64, 100 + 4 * 64, 200 + 2 * 64]]


# ---------------------------------------------------------------------------- anchor-based branch

@pytest.fixture(scope="module")
def torchvision_pair():
    """Our RetinaNet and torchvision's with the same head and anchors, features, anchors of all levels."""
    detection = pytest.importorskip("torchvision.models.detection")
    model = small_model(anchor_only=True)
    stub = torch.nn.Identity()
    stub.out_channels = 64
    theirs = detection.RetinaNet(stub, 3, topk_candidates=50, detections_per_img=9999, nms_thresh=0.5)
    mine = model.head
    towers = ((theirs.head.classification_head, mine.cls_tower, mine.anchor_logits, "cls_logits"),
              (theirs.head.regression_head, mine.box_tower, mine.anchor_deltas, "bbox_reg"))
    torch.manual_seed(3)
    for head, tower, predictor, name in towers:
        for layer in (*tower, predictor):
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.normal_(layer.weight, std=0.05)
        with torch.no_grad():
            for theirs_layer, layer in zip(head.conv, tower[::2]):
                theirs_layer[0].weight.copy_(layer.weight)
                theirs_layer[0].bias.copy_(layer.bias)
            getattr(head, name).load_state_dict(predictor.state_dict())
    features = [torch.randn(1, 64, *shape) for shape in ((32, 48), (16, 24), (8, 12), (4, 6), (2, 3))]
    image = detection.image_list.ImageList(torch.zeros(1, 3, 256, 384), [(256, 384)])
    model.base_anchors.copy_(torch.stack(theirs.anchor_generator.cell_anchors))
    return model, theirs, features, theirs.anchor_generator(image, features)


GT = torch.tensor([[10., 12., 50., 60.], [60., 20., 150., 110.], [100., 100., 106., 107.],
                   [20., 30., 90., 120.], [-1., -1., -1., -1.]])  # the last row is padding
GT_LABELS = torch.tensor([0, 2, 1, 1, -1])


def test_anchors_are_retinanets(torchvision_pair):
    model, _, features, anchors = torchvision_pair
    shapes = [tuple(f.shape[-2:]) for f in features]
    assert torch.equal(all_anchors(model.base_anchors, shapes), anchors[0])
    # torchvision rounds sides and corners. The published anchors are exact, e.g. 32 px and 1:1.
    assert base_anchors()[0, 3].tolist() == [-16, -16, 16, 16]
    assert base_anchors()[1, 0].tolist() == pytest.approx([-45.2548, -22.6274, 45.2548, 22.6274], abs=1e-3)
    assert (base_anchors() - model.base_anchors).abs().max() < 1.5


def test_losses_equal_torchvisions(torchvision_pair):
    model, theirs, features, (anchors,) = torchvision_pair
    outputs = model.head(features)
    outputs["shapes"] = [tuple(f.shape[-2:]) for f in features]
    mine = model.losses(outputs, torch.tensor([[256, 384]]), GT[None], GT_LABELS[None])
    truth = [{"boxes": GT[:4], "labels": GT_LABELS[:4]}]
    expected = theirs.compute_loss(truth, theirs.head(features), [anchors])
    assert mine["cls"].item() == pytest.approx(expected["classification"].item(), rel=1e-5)
    assert mine["box"].item() == pytest.approx(expected["bbox_regression"].item(), rel=1e-5)


def test_boxes_equal_torchvisions(torchvision_pair, monkeypatch):
    model, theirs, features, (anchors,) = torchvision_pair
    monkeypatch.setattr(fsaf, "PRE_NMS_TOP_K", 50)
    sizes = [9 * f.shape[2] * f.shape[3] for f in features]
    with torch.no_grad():
        outputs = model.head(features)
        outputs["anchor_logits"] += 4.0  # scores around 0.35
        head = theirs.head(features)
        head["cls_logits"] += 4.0
        split = {key: list(value.split(sizes, dim=1)) for key, value in head.items()}
        expected, = theirs.postprocess_detections(split, [list(anchors.split(sizes))], [(256, 384)])
        outputs["shapes"] = [tuple(f.shape[-2:]) for f in features]
        found, = model.detections(outputs, torch.tensor([[256, 384]]))
    # torchvision keeps boxes that are empty after clipping. They overlap nothing and suppress nothing.
    not_empty = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)
    assert not_empty.sum() > 100
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(found[key], expected[key][not_empty][:100], rtol=1e-5, atol=1e-4)


def test_anchors_between_the_thresholds_have_no_loss():
    anchors, gt = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.]]), torch.tensor([[[0., 0., 10., 10.]]])
    losses = anchor_losses(torch.zeros(1, 2, 1), torch.zeros(1, 2, 4), anchors, torch.tensor([[0, -2]]), gt,
                           torch.tensor([[0]]))
    assert losses["cls"].item() == pytest.approx(POSITIVE) and losses["box"] == 0


# ---------------------------------------------------------------------------- the joint form

def small_model(**kwargs):
    torch.manual_seed(0)
    return FSAF(3, "resnet18", fpn_channels=64, norm="affine", freeze_at=0, **kwargs)


def small_joint():
    return small_model(joint=True)


def test_the_joint_loss_is_the_anchor_based_loss_plus_half_the_anchor_free_loss():
    joint = small_joint().train()
    anchor_free = small_model(ignore_scale=0.5, ignore_adjacent=True).train()
    anchor_based = small_model(anchor_only=True).train()
    for part in (anchor_free, anchor_based):
        part.load_state_dict({k: v for k, v in joint.state_dict().items() if k in part.state_dict()})
    batch = small_batch((3, 1))
    losses, free, retinanet = joint(*batch), anchor_free(*batch), anchor_based(*batch)
    assert list(losses) == ["anchor_cls", "anchor_box", "free_cls", "free_box"]
    for name in ("cls", "box"):
        assert losses[f"anchor_{name}"].item() == pytest.approx(retinanet[name].item(), rel=1e-6)
        assert losses[f"free_{name}"].item() == pytest.approx(0.5 * free[name].item(), rel=1e-6)


def test_both_branches_meet_in_one_class_wise_nms():
    model = small_joint().eval()
    model.base_anchors.zero_()
    model.base_anchors[:, :, 2:] = 16.0  # every anchor: 16 x 16 px to the lower right of its point
    logits, tblr = torch.full((1, 4, 3), -9.0), torch.zeros(1, 4, 4)
    anchor_logits, deltas = torch.full((1, 36, 3), -9.0), torch.zeros(1, 36, 4)
    # The box of point (0, 0), class 1, reaches 17 px right and down: its IoU with the anchor is 256 / 289.
    logits[0, 0, 1], tblr[0, 0] = 1.0, torch.tensor([0., 17 / 32, 0., 17 / 32])
    anchor_logits[0, 0, 1] = 2.0  # the better box of class 1 suppresses that of the point
    anchor_logits[0, 0, 2] = 0.0  # a box of another class at the same place stays
    logits[0, 3, 1], tblr[0, 3] = 0.5, torch.tensor([0., 0.25, 0., 0.25])  # at another place, 8 .. 16 px
    outputs = {"logits": logits, "tblr": tblr, "anchor_logits": anchor_logits, "anchor_deltas": deltas,
               "shapes": [(2, 2)]}
    found, = model.detections(outputs, torch.tensor([[32, 32]]))
    assert found["labels"].tolist() == [1, 1, 2]
    assert found["boxes"].tolist() == [[0, 0, 16, 16], [8, 8, 16, 16], [0, 0, 16, 16]]
    assert found["scores"].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (2.0, 0.5, 0.0)])


def test_forms_and_scales():
    assert FSAF(3, "resnet18").ignore_scale == 0.2 and not FSAF(3, "resnet18").ignore_adjacent
    assert small_joint().ignore_scale == 0.5 and small_joint().ignore_adjacent
    with pytest.raises(ValueError, match="give only one"):
        FSAF(3, "resnet18", joint=True, anchor_only=True)
    with pytest.raises(ValueError, match="ignore_scale 0.1"):
        FSAF(3, "resnet18", ignore_scale=0.1)


# ---------------------------------------------------------------------------- the model as a whole

FORMS = pytest.mark.parametrize("form", [{}, {"joint": True}, {"anchor_only": True}],
                                ids=["anchor_free", "joint", "anchor_based"])


@FORMS
def test_empty_images_give_zero_box_loss_with_a_graph(form):
    model = small_model(**form).train()
    images, sizes, boxes, labels = small_batch((0, 0))
    for gt in ((boxes, labels), (boxes[:, :0], labels[:, :0])):
        losses = model(images, sizes, *gt)
        assert all((loss == 0) == name.endswith("box") for name, loss in losses.items())
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_cells_beyond_an_images_own_padding_learn_nothing():
    # An image of 40 x 50 px is padded to 64 x 64; the batch is 64 x 96. Outputs beyond 64 cannot matter.
    model = small_joint().train()
    images, sizes, boxes, labels = small_batch((2, 2))
    sizes[1] = torch.tensor([40, 50])
    outputs = model.network(images, sizes)
    points, _ = all_points(outputs["shapes"])
    beyond = points[:, 0] >= 64
    losses = model.losses(outputs, sizes, boxes, labels)
    outputs["logits"][1, beyond] = 5.0
    outputs["anchor_logits"][1, beyond.repeat_interleave(9)] = 5.0
    assert beyond.any()
    for name, loss in model.losses(outputs, sizes, boxes, labels).items():
        assert torch.equal(loss, losses[name])


@FORMS
def test_losses_are_float32_and_finite_under_autocast(form):
    model = small_model(**form).train()
    images, sizes, boxes, labels = small_batch()
    boxes[0, 0] = torch.tensor([-2000., -2000., 4000., 4000.])  # its area overflows float16
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, sizes, boxes, labels)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_autocast_does_not_change_the_selected_levels():
    model = small_model().train()
    arguments = loss_arguments(model, *small_batch((3, 2)))
    plain, loss = level_losses(*arguments), fsaf_losses(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(level_losses(*arguments), plain)
        assert fsaf_losses(*arguments) == loss


def test_a_batch_equals_its_images_alone():
    model = small_joint().eval()
    model.score_threshold = 0.0
    images, sizes, _, _ = small_batch()
    with torch.no_grad():
        together = model(images, sizes)
        alone = [model(images[i:i + 1], sizes[i:i + 1])[0] for i in range(2)]
    for a, b in zip(together, alone):
        assert len(a["boxes"]) > 0
        torch.testing.assert_close(a["scores"], b["scores"], atol=1e-5, rtol=1e-4)


@FORMS
def test_the_training_step_has_no_data_dependent_shape(form):
    assert_static_shapes(small_model(**form), small_batch())


@pytest.mark.slow
@pytest.mark.parametrize("objects", [(3, 2), (0, 0)])
def test_the_loss_step_compiles_without_graph_breaks(objects):
    assert_compiles(small_joint(), small_batch(objects))


class TwoForms(torch.nn.Module):
    """The anchor-free and the joint form side by side, so that one start of two ranks tests both."""

    def __init__(self):
        super().__init__()
        self.forms = torch.nn.ModuleList((small_model(), small_joint()))

    def forward(self, *batch):
        return {f"{name}_{i}": loss for i, form in enumerate(self.forms)
                for name, loss in form(*batch).items()}


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    assert_two_ranks_equal_one(TwoForms, small_batch((3, 0)), tmp_path)  # rank 1 has no object

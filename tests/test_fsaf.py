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

import fsaf
from backbone import FixedStatsBatchNorm2d, WeightsError
from fsaf import (
    FSAF,
    FreeTargets,
    anchor_losses,
    base_anchors,
    class_weights,
    fsaf_decode,
    fsaf_losses,
    fsaf_targets,
    image_anchors,
    image_points,
    level_losses,
    select_level,
)
from ops import decode_boxes, encode_boxes, iou_loss, match_anchors, sigmoid_focal_loss


@pytest.fixture(scope="module")
def golden():
    return golden_records("fsaf", "fsaf.npz")


@pytest.fixture(scope="module")
def published(golden):
    """FSAF with the rule-made weights of the golden run, and {mmdetection's key: ours}."""
    model = FSAF(80, "resnet50")
    return model, load_golden_weights(model, golden[2]["fsaf"], "fsaf", fsaf.rename_mmdet)


def recorded_batch(name):
    """The recorded runs saw no crowds."""
    images, sizes, boxes, labels = golden_batch(BATCHES[name])
    return images, sizes, boxes, torch.where(labels == -2, -1, labels)


def free_arguments(model, images, sizes, boxes, labels):
    gt = fsaf._at_least_one_row(boxes, labels)
    return model.train().free_targets(model.network(images, sizes), sizes, *gt)


# ---------------------------------------------------------------------------- published numbers

@pytest.mark.parametrize("name", BATCHES)
def test_targets_equal_the_published_ones(golden, name):
    images, sizes, boxes, labels = recorded_batch(name)
    shapes = [(math.ceil(images.shape[2] / s), math.ceil(images.shape[3] / s)) for s in fsaf.STRIDES]
    points, strides = image_points(shapes)
    for i in range(len(images)):
        found = fsaf_targets(points, strides, boxes[i], labels[i], fsaf._inside(points, sizes)[i])
        positive = (found.owner >= 0).nonzero().squeeze(1)
        record = {key: golden[1][f"{name}/img{i}/{key}"] for key in
                  ("pos_idx", "pos_label", "pos_gt", "pos_box", "invalid_idx", "zero_label_weight")}
        assert positive.tolist() == record["pos_idx"].tolist()
        assert found.owner[positive].tolist() == record["pos_gt"].tolist()
        assert labels[i][found.owner[positive]].tolist() == record["pos_label"].tolist()
        np.testing.assert_allclose(boxes[i][found.owner[positive]], record["pos_box"].reshape(-1, 4))
        assert found.dropped.nonzero().squeeze(1).tolist() == record["invalid_idx"].tolist()
        gt_labels = torch.cat((labels[i], torch.tensor([-1])))  # owner -1 is the last row
        weights = class_weights(found.region, torch.zeros_like(found.dropped), gt_labels[found.owner],
                                gt_labels[:found.region.shape[1]], 80)
        assert sorted(map(tuple, (weights == 0).nonzero().tolist())) == sorted(
            map(tuple, record["zero_label_weight"].tolist()))


@pytest.mark.parametrize("name", BATCHES)
def test_level_losses_and_the_selection_equal_the_published_ones(golden, published, name):
    batch = recorded_batch(name)
    with torch.no_grad():
        logits, boxes, targets, gt_boxes, gt_labels, level_sizes = free_arguments(published[0], *batch)
        means = level_losses(logits, boxes, targets, gt_boxes, gt_labels, level_sizes)
        losses = fsaf_losses(logits, boxes, targets, gt_boxes, gt_labels, level_sizes)
    real = gt_labels >= 0
    np.testing.assert_allclose(means[real].T, golden[1][f"{name}/level_loss"], rtol=1e-5)

    # The recorded loss is a list of levels. A point of level l counts there and nowhere else.
    level = select_level(means)
    of_point = torch.arange(5).repeat_interleave(torch.tensor(level_sizes))
    chosen = (targets.owner >= 0) & (level.gather(1, targets.owner.clamp(min=0)) == of_point)
    assert level_major(list(chosen), level_sizes).nonzero().squeeze(1).tolist() == golden[1][
        f"{name}/pos_after_select"].tolist()
    labels, target_boxes = fsaf._targets_of(torch.where(chosen, targets.owner, -1), gt_boxes, gt_labels)
    cls, box = fsaf.point_losses(logits, boxes, labels, target_boxes)
    cls = (cls * class_weights(targets.region, targets.dropped, labels, gt_labels, 80)).sum(-1)
    norm = chosen.sum() if chosen.any() else (~targets.dropped).sum()
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


def test_retinanet_of_mmdetection_loads_into_the_anchor_branch(golden):
    shapes = dict(golden[2]["fsaf"])
    for name, channels in (("retina_cls", 720), ("retina_reg", 36)):
        shapes[f"bbox_head.{name}.weight"] = [channels, 256, 3, 3]
        shapes[f"bbox_head.{name}.bias"] = [channels]
    state = fsaf.rename_mmdet({key: torch.zeros(shape) for key, shape in shapes.items()})
    model = FSAF(80, anchor_only=True)
    model.load_state_dict(state, strict=True)
    assert torch.equal(model.base_anchors, base_anchors())
    for wrong in ({"a": torch.zeros(1)}, {"bbox_head.retina_reg.weight": torch.zeros(12, 256, 3, 3)}):
        with pytest.raises(WeightsError, match="not an FSAF or RetinaNet"):
            fsaf.rename_mmdet(wrong)


# ---------------------------------------------------------------------------- targets of the free branch

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


def slow_targets(points, strides, boxes, labels, inside, ignore_scale):
    """The assignment rules, one point and one object at a time: owner, {(point, object)}, dropped."""
    owner, region, dropped = [], [], []
    objects = list(zip(boxes.tolist(), labels.tolist()))
    for p, ((x, y), s, valid) in enumerate(zip(points.tolist(), strides.tolist(), inside.tolist())):
        lost = not valid or any(label == -2 and slow_inside(slow_shrink(box, 0.5), x, y)
                                for box, label in objects)
        real = [(g, box) for g, (box, label) in enumerate(objects) if valid and label >= 0]
        core = [g for g, box in real
                if slow_inside(box, x, y) and slow_covers(slow_shrink(box, 0.2), x, y, s)]
        ring = [g for g, box in real
                if g not in core and slow_covers(slow_shrink(box, ignore_scale), x, y, s)]
        best = min(core, key=lambda g: ((boxes[g, 2] - boxes[g, 0]) * (boxes[g, 3] - boxes[g, 1])).item(),
                   default=-1)
        shadow = ring + [g for g in core if g != best]
        if lost or best >= 0 and any(labels[g] == labels[best] for g in shadow):
            best = -1
        owner.append(best)
        dropped.append(lost)
        region += [(p, g) for g in core + ring]
    return owner, set(region), dropped


@pytest.mark.parametrize("ignore_scale", [0.2, 0.5])
@pytest.mark.parametrize("count", [0, 1, 14])
def test_targets_equal_a_slow_loop(count, ignore_scale):
    generator = torch.Generator().manual_seed(count)
    points, strides = image_points([(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)])
    corner = torch.rand(count, 2, generator=generator) * 120
    boxes = torch.cat((corner, corner + 4 + torch.rand(count, 2, generator=generator) * 150), dim=1)
    labels = torch.randint(-2, 3, (count,), generator=generator)
    inside = (points < torch.tensor([160., 128.])).all(dim=1)
    found = fsaf_targets(points, strides, boxes, labels, inside, ignore_scale=ignore_scale)
    owner, region, dropped = slow_targets(points, strides, boxes, labels, inside, ignore_scale)
    assert found.owner.tolist() == owner and found.dropped.tolist() == dropped
    assert set(map(tuple, found.region.nonzero().tolist())) == region
    assert count < 14 or len(set(owner)) > 4 and any(d and v for d, v in zip(dropped, inside.tolist()))


def test_a_ring_surrounds_the_effective_region():
    points, strides = image_points([(16, 16)])
    box = torch.tensor([[0., 0., 128., 128.]])
    everywhere = torch.ones(256, dtype=torch.bool)
    found = fsaf_targets(points, strides, box, torch.tensor([0]), everywhere, ignore_scale=0.5)
    # Effective 51.2 .. 76.8: the squares around 48 .. 80 (44-52 covers 0.8 px of 8) are the cells 6 .. 10.
    positive = (found.owner >= 0).view(16, 16)
    assert positive[6:11, 6:11].sum() == positive.sum() == 24  # a corner square has 0.8 * 0.8 / 64 = 0.01
    # Ignore 32 .. 96: the squares around 32 .. 96, cells 4 .. 12.
    assert found.region.view(16, 16)[4:13, 4:13].all() and found.region.sum() == 81


def test_in_a_crowd_nothing_is_learned():
    points, strides = image_points([(8, 8)])
    boxes = torch.tensor([[0., 0., 64., 64.], [24., 24., 40., 40.]])
    found = fsaf_targets(points, strides, boxes, torch.tensor([-2, 1]), torch.ones(64, dtype=torch.bool))
    # The middle half of the crowd, 16 .. 48, strictly: the points at 24, 32, 40.
    assert found.dropped.view(8, 8)[3:6, 3:6].all() and found.dropped.sum() == 9
    assert (found.owner == -1).all()


# ---------------------------------------------------------------------------- level selection and losses

def two_level_case():
    """One image, levels of 4 and 1 points, two objects of classes 0 and 1; point 4 is the second level's."""
    owner = torch.tensor([[0, 0, 1, -1, 0]])
    region = torch.zeros(1, 5, 2, dtype=torch.bool)
    region[0, [0, 1, 4], 0] = region[0, [2, 3], 1] = True  # point 3: only ignored for object 1
    targets = FreeTargets(owner, region, torch.zeros(1, 5, dtype=torch.bool))
    gt_boxes, gt_labels = torch.tensor([[[0., 0., 10., 10.], [0., 0., 4., 4.]]]), torch.tensor([[0, 1]])
    logits = torch.zeros(1, 5, 2)
    boxes = torch.tensor([[[0., 0., 10., 5.], [0., 0., 10., 10.], [0., 0., 4., 4.], [0., 0., 1., 1.],
                           [0., 0., 10., 8.]]])
    return logits, boxes, targets, gt_boxes, gt_labels, [4, 1]


POSITIVE, NEGATIVE = 0.25 * 0.25 * math.log(2), 0.75 * 0.25 * math.log(2)  # focal loss at logit 0


def test_level_losses_by_hand():
    means = level_losses(*two_level_case())
    both_classes = POSITIVE + NEGATIVE
    # Object 0: IoU 0.5 and 1 on the first level, 0.8 on the second. Object 1: IoU 1; no cell on the second.
    expected = [[both_classes + math.log(2) / 2, both_classes - math.log(0.8)], [both_classes, 1e6]]
    torch.testing.assert_close(means[0], torch.tensor(expected))
    assert select_level(means).tolist() == [[1, 0]]
    assert select_level(torch.full((2, 5), 1e6)).tolist() == [0, 0]
    assert select_level(torch.zeros(0, 5)).shape == (0,)


def test_losses_by_hand():
    # Positives: point 4 (object 0) and point 2 (object 1). Points 0 and 1 are cells of object 0 on the level
    # it did not choose: class 0 has no loss there, class 1 is negative. Point 3: class 1 is ignored.
    losses = fsaf_losses(*two_level_case())
    cls = 2 * (POSITIVE + NEGATIVE) + 2 * NEGATIVE + NEGATIVE
    assert losses["cls"].item() == pytest.approx(cls / 2, rel=1e-6)
    assert losses["box"].item() == pytest.approx(-math.log(0.8) / 2, rel=1e-5)


def test_the_papers_rule_ignores_an_object_only_beside_its_level():
    # Four levels of one point each, one object, easiest on the first.
    region = torch.ones(1, 4, 1, dtype=torch.bool)
    targets = FreeTargets(torch.zeros(1, 4, dtype=torch.int64), region, torch.zeros(1, 4, dtype=torch.bool))
    boxes = torch.tensor([[[0., 0., 10., 10.], [0., 0., 10., 5.], [0., 0., 10., 5.], [0., 0., 10., 5.]]])
    arguments = (torch.zeros(1, 4, 1), boxes, targets, torch.tensor([[[0., 0., 10., 10.]]]),
                 torch.tensor([[0]]), [1] * 4)
    assert fsaf_losses(*arguments)["cls"].item() == pytest.approx(POSITIVE)
    # Level 1 is ignored, levels 2 and 3 are background.
    assert fsaf_losses(*arguments, ignore_adjacent=True)["cls"].item() == pytest.approx(
        POSITIVE + 2 * NEGATIVE)


def test_a_side_of_length_zero_leaves_the_others_a_gradient():
    points, strides = torch.tensor([[40., 40.]]), torch.tensor([8.])
    tblr = torch.tensor([[[0.0, 0.5, 0.5, 0.5]]], requires_grad=True)
    target = torch.tensor([[[24., 24., 56., 56.]]])
    iou_loss(fsaf_decode(points, strides, tblr.clamp(min=fsaf.MIN_DISTANCE)), target).sum().backward()
    assert tblr.grad[0, 0, 0] == 0 and (tblr.grad[0, 0, 1:] < 0).all()
    # The model does so in training, and not when it detects.
    model = small_model()
    torch.nn.init.zeros_(model.head.tblr.weight)
    torch.nn.init.constant_(model.head.tblr.bias, -1.0)
    images, sizes, boxes, labels = small_batch()
    _, trained, *_ = free_arguments(model, images, sizes, boxes, labels)
    assert (trained[..., 2:] > trained[..., :2]).all()
    with torch.no_grad():
        assert [len(d["boxes"]) for d in model.eval()(images, sizes)] == [0, 0]


def test_distances_are_top_bottom_left_right_in_units_of_four_strides():
    boxes = fsaf_decode(torch.tensor([[100., 200.]]), torch.tensor([16.]), torch.tensor([[1., 2., 3., 4.]]))
    assert boxes.tolist() == [[100 - 3 * 64, 200 - 64, 100 + 4 * 64, 200 + 2 * 64]]


# ---------------------------------------------------------------------------- anchor branch and torchvision

@pytest.fixture(scope="module")
def torchvision_pair():
    """Our anchor branch and torchvision's RetinaNet with the same head, fed with the same features."""
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
    assert torch.equal(image_anchors(model.base_anchors, shapes), anchors[0])
    # torchvision rounds sides and corners; the published anchors are exact: 32 px, 1:1, at the origin.
    assert base_anchors()[0, 3].tolist() == [-16, -16, 16, 16]
    assert base_anchors()[1, 0].tolist() == pytest.approx([-45.2548, -22.6274, 45.2548, 22.6274], abs=1e-3)
    assert (base_anchors() - model.base_anchors).abs().max() < 1.5


def test_matches_equal_torchvisions(torchvision_pair):
    _, theirs, _, (anchors,) = torchvision_pair
    from torchvision.ops import box_iou
    expected = theirs.proposal_matcher(box_iou(GT[:4], anchors))
    found = match_anchors(anchors, GT, GT_LABELS, 0.5, 0.4)
    assert torch.equal(found, expected)
    assert set(found.tolist()) == {-2, -1, 0, 1, 2, 3}  # object 2 is small: only the low-quality rule gets it
    assert (match_anchors(anchors, GT[:0], GT_LABELS[:0], 0.5, 0.4) == -1).all()
    usable = torch.arange(len(anchors)) % 2 == 0  # the rest match nothing, as if they were not there
    again = match_anchors(anchors, GT, GT_LABELS, 0.5, 0.4, usable)
    assert torch.equal(again[usable], match_anchors(anchors[usable], GT, GT_LABELS, 0.5, 0.4))
    assert (again[~usable] == -2).all()


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
    # torchvision keeps boxes that are empty after clipping; they overlap nothing, so they suppress nothing.
    not_empty = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(dim=1)
    assert not_empty.sum() > 100
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(found[key], expected[key][not_empty][:100], rtol=1e-5, atol=1e-4)


def test_box_code_by_hand_and_back():
    anchors, boxes = torch.tensor([[10., 10., 30., 50.]]), torch.tensor([[15., 30., 55., 50.]])
    # Centres (20, 30) and (35, 40): 15 / 20 and 10 / 40; sizes 40 x 20 over 20 x 40.
    deltas = encode_boxes(boxes, anchors)
    assert deltas[0].tolist() == pytest.approx([0.75, 0.25, math.log(2), -math.log(2)])
    torch.testing.assert_close(decode_boxes(deltas, anchors), boxes)
    huge = decode_boxes(torch.tensor([[0., 0., 99., 0.]]), anchors)
    assert (huge[0, 2] - huge[0, 0]).item() == pytest.approx(20 * 1000 / 16)


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


def test_the_joint_loss_is_the_anchor_loss_plus_half_the_free_one():
    joint = small_joint().train()
    free = small_model(ignore_scale=0.5, ignore_adjacent=True).train()
    anchor = small_model(anchor_only=True).train()
    for part in (free, anchor):
        part.load_state_dict({k: v for k, v in joint.state_dict().items() if k in part.state_dict()})
    batch = small_batch((3, 1))
    losses, alone, retina = joint(*batch), free(*batch), anchor(*batch)
    assert list(losses) == ["anchor_cls", "anchor_box", "free_cls", "free_box"]
    for name in ("cls", "box"):
        assert losses[f"anchor_{name}"].item() == pytest.approx(retina[name].item(), rel=1e-6)
        assert losses[f"free_{name}"].item() == pytest.approx(0.5 * alone[name].item(), rel=1e-6)


def test_both_branches_meet_in_one_class_wise_nms():
    model = small_joint().eval()
    model.base_anchors.zero_()
    model.base_anchors[:, :, 2:] = 16.0  # every anchor: 16 x 16 px to the lower right of its point
    logits, tblr = torch.full((1, 4, 3), -9.0), torch.zeros(1, 4, 4)
    anchor_logits, deltas = torch.full((1, 36, 3), -9.0), torch.zeros(1, 36, 4)
    # Free: point (0, 0) of stride 8, class 1, reaches 17 px right and down: IoU with the anchor 256 / 289.
    logits[0, 0, 1], tblr[0, 0] = 1.0, torch.tensor([0., 17 / 32, 0., 17 / 32])
    anchor_logits[0, 0, 1] = 2.0  # the better one of class 1: suppresses the free box
    anchor_logits[0, 0, 2] = 0.0  # another class at the same place stays
    logits[0, 3, 1], tblr[0, 3] = 0.5, torch.tensor([0., 0.25, 0., 0.25])  # elsewhere: 8 .. 16 px
    outputs = {"logits": logits, "tblr": tblr, "anchor_logits": anchor_logits, "anchor_deltas": deltas,
               "shapes": [(2, 2)]}
    found, = model.detections(outputs, torch.tensor([[32, 32]]))
    assert found["labels"].tolist() == [1, 1, 2]
    assert found["boxes"].tolist() == [[0, 0, 16, 16], [8, 8, 16, 16], [0, 0, 16, 16]]
    assert found["scores"].tolist() == pytest.approx([1 / (1 + math.exp(-x)) for x in (2.0, 0.5, 0.0)])


def test_forms_and_scales():
    assert FSAF(3, "resnet18").ignore_scale == 0.2 and not FSAF(3, "resnet18").ignore_adjacent
    assert small_joint().ignore_scale == 0.5 and small_joint().ignore_adjacent
    with pytest.raises(ValueError, match="give one"):
        FSAF(3, "resnet18", joint=True, anchor_only=True)
    with pytest.raises(ValueError, match="ignore_scale 0.1"):
        FSAF(3, "resnet18", ignore_scale=0.1)


# ---------------------------------------------------------------------------- the model as a whole

FORMS = pytest.mark.parametrize("form", [{}, {"joint": True}, {"anchor_only": True}],
                                ids=["free", "joint", "anchor"])


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
    # 40 x 50 px are padded to 64 x 64; the batch is 64 x 96. What the padding beyond holds cannot matter.
    model = small_joint().train()
    images, sizes, boxes, labels = small_batch((2, 2))
    sizes[1] = torch.tensor([40, 50])
    outputs = model.network(images, sizes)
    points, _ = image_points(outputs["shapes"])
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


def test_levels_are_selected_alike_under_autocast():
    model = small_model().train()
    arguments = free_arguments(model, *small_batch((3, 2)))
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


@pytest.mark.parametrize("objects", [(3, 2), pytest.param((0, 0), marks=pytest.mark.slow)])
def test_the_loss_step_compiles_without_graph_breaks(objects):
    assert_compiles(small_joint(), small_batch(objects))


@pytest.mark.parametrize("make_model", [small_model, small_joint])
def test_two_ranks_give_the_gradients_of_one_process(tmp_path, make_model):
    assert_two_ranks_equal_one(make_model, small_batch((3, 0)), tmp_path)  # rank 1 has no object


def test_focal_loss_at_logit_zero():
    assert sigmoid_focal_loss(torch.zeros(2), torch.tensor([1., 0.])).tolist() == pytest.approx(
        [POSITIVE, NEGATIVE])

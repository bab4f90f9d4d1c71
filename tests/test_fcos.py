"""FCOS against recorded numbers of mmdetection, sums by hand, slow Python loops and two ranks."""
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
import fcos
from backbone import FixedStatsBatchNorm2d
from fcos import (
    FCOS,
    all_points,
    centerness_targets,
    fcos_candidates,
    fcos_decode,
    fcos_losses,
    fcos_targets,
)
from ops import final_detections


@pytest.fixture(scope="module")
def golden():
    return golden_records("fcos_original", "fcos.npz")


@pytest.fixture(scope="module")
def published(golden):
    """FCOS in the original form with the weights of the recorded run, and {mmdetection's key: ours}."""
    model = FCOS(80, "resnet50", caffe=True, original=True)
    return model, load_golden_weights(model, golden[2]["fcos_a"], "fcos_a", convert.fcos_from_mmdet)


# ---------------------------------------------------------------------------- published numbers

def test_targets_equal_the_published_ones(golden):
    for name, indices in BATCHES.items():
        images, _, boxes, labels = golden_batch(indices)
        shapes = [(math.ceil(images.shape[2] / s), math.ceil(images.shape[3] / s)) for s in fcos.STRIDES]
        points, strides, ranges = all_points(shapes)
        found = [fcos_targets(points, strides, ranges, b, label, original=True)
                 for b, label in zip(boxes, labels)]
        cls, ltrb = (level_major([t[k] for t in found], [h * w for h, w in shapes]) for k in (0, 1))
        positive = (cls >= 0).nonzero().squeeze(1)
        assert positive.tolist() == golden[1][f"{name}/pos_idx"].tolist()
        assert cls[positive].tolist() == golden[1][f"{name}/pos_label"].tolist()
        np.testing.assert_allclose(ltrb[positive], golden[1][f"{name}/pos_ltrb"].reshape(-1, 4), atol=1e-4)
        np.testing.assert_allclose(centerness_targets(ltrb[positive]), golden[1][f"{name}/pos_centerness"],
                                   atol=1e-5)


@pytest.mark.parametrize("name", BATCHES)
def test_losses_and_gradients_equal_the_published_ones(golden, published, name):
    model, ours = published
    model.train().zero_grad()
    losses = model(*golden_batch(BATCHES[name]))
    expected = golden[0]["loss"][name]
    for key, theirs in (("cls", "loss_cls"), ("box", "loss_bbox"), ("centerness", "loss_centerness")):
        assert losses[key].item() == pytest.approx(expected[theirs], rel=1e-5, abs=1e-7)
    sum(losses.values()).backward()
    assert_golden_gradients(model, golden[0], name, ours)


def test_features_and_head_outputs_equal_the_published_ones(golden, published):
    model, _ = published
    images, sizes, _, _ = golden_batch(BATCHES["b01"])
    model.eval()
    with torch.no_grad():
        x = fcos.normalise_images(images, sizes, model.pixel_mean, model.pixel_std)
        stages = model.backbone(x)
        levels = model.fpn(stages[1:])
        logits, ltrb, centerness = model.head(levels)
    assert_golden_features(golden[0], backbone=stages, fpn=levels, head_cls=per_level(logits, levels),
                           head_reg_eval=per_level(ltrb, levels),
                           head_ctr=per_level(centerness[..., None], levels))


@pytest.mark.parametrize(("case", "top_k", "threshold"), [("det", 1000, 0.05),
                                                          ("det_pre60_thr003_v3.3.0", 60, 0.03)])
def test_detections_equal_the_published_ones(golden, published, monkeypatch, case, top_k, threshold):
    model, _ = published
    monkeypatch.setattr(fcos, "PRE_NMS_TOP_K", top_k)
    monkeypatch.setattr(model, "score_threshold", threshold)
    assert_golden_detections(model, golden[1], case)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        assert sum(p.numel() for p in FCOS(80, original=True).parameters()) == 32_295_322
        assert sum(p.numel() for p in FCOS(80).parameters()) == 32_297_370


# ---------------------------------------------------------------------------- targets

def slow_targets(points, strides, ranges, boxes, labels, original):
    """The rules of the paper, one point and one object at a time: labels (P,), ltrb (P, 4)."""
    found = []
    for (x, y), stride, (low, high) in zip(points.tolist(), strides.tolist(), ranges.tolist()):
        best = None
        for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist()):
            ltrb = (x - x1, y - y1, x2 - x, y2 - y)
            if label < 0 or min(ltrb) <= 0 or not low <= max(ltrb) <= high:
                continue
            from_center = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2))
            if not original and from_center >= 1.5 * stride:
                continue
            area = (x2 - x1) * (y2 - y1)
            if best is None or area < best[0]:
                best = (area, label, ltrb)
        found.append((-1, (1, 1, 1, 1)) if best is None else best[1:])
    return torch.tensor([label for label, _ in found]), torch.tensor([ltrb for _, ltrb in found]).float()


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("count", [0, 1, 12])
def test_targets_equal_a_slow_loop(original, count):
    generator = torch.Generator().manual_seed(count)
    shapes = [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)]
    points, strides, ranges = all_points(shapes)
    corner = torch.randint(0, 120, (count, 2), generator=generator).float()
    boxes = torch.cat((corner, corner + torch.randint(4, 160, (count, 2), generator=generator)), dim=1)
    labels = torch.randint(-2, 5, (count,), generator=generator)
    cls, ltrb, index = fcos_targets(points, strides, ranges, boxes, labels, original)
    slow_cls, slow_ltrb = slow_targets(points, strides, ranges, boxes, labels, original)
    assert torch.equal(cls, slow_cls)
    assert torch.equal(ltrb, slow_ltrb)
    assert torch.equal(index >= 0, cls >= 0)
    assert count < 12 or (cls >= 0).any()


def test_the_smaller_of_two_nested_objects_wins():
    points, strides, ranges = all_points([(4, 4)])
    boxes = torch.tensor([[0., 0., 32., 32.], [8., 8., 24., 24.]])
    cls, ltrb, index = fcos_targets(points, strides, ranges, boxes, torch.tensor([3, 7]), original=True)
    assert cls.view(4, 4)[1:3, 1:3].eq(7).all() and cls.eq(7).sum() == 4 and cls.eq(3).sum() == 12
    # Point (12, 12) in the small box: 12 - 8 to the left and top, 24 - 12 to the right and bottom.
    assert ltrb[5].tolist() == [4, 4, 12, 12] and index[5] == 1


def test_points_lie_at_half_strides():
    assert fcos.level_points(2, 2, 8).tolist() == [[4, 4], [12, 4], [4, 12], [12, 12]]


def test_centerness_middle_and_off_centre():
    ltrb = torch.tensor([[2., 3., 2., 3.],   # the middle of its box
                         [1., 2., 4., 8.]])  # sqrt(1/4 * 2/8) = 0.25
    assert centerness_targets(ltrb).tolist() == [1.0, 0.25]
    assert centerness_targets(torch.zeros(0, 4)).shape == (0,)


def test_the_box_loss_weighs_points_by_centerness_or_all_alike():
    target = torch.tensor([[[2., 3., 2., 3.], [1., 2., 4., 8.], [1., 1., 1., 1.]]])  # centerness 1 and 1/4
    ltrb = torch.tensor([[[2., 3., 2., 3.], [.5, 1., 2., 4.], [9., 9., 9., 9.]]])  # GIoU 1 and 1/4
    labels = torch.tensor([[0, 0, -1]])
    for center_weights, box in ((True, 0.75 / 4 / (1 + 1 / 4)), (False, 0.75 / 2)):
        losses = fcos_losses(torch.zeros(1, 3, 1), ltrb, torch.zeros(1, 3), labels, target,
                             center_weights=center_weights)
        assert losses["box"].item() == pytest.approx(box, rel=1e-5)


# ---------------------------------------------------------------------------- model

def small_model(**kwargs):
    torch.manual_seed(0)
    return FCOS(3, "resnet18", fpn_channels=64, norm="affine", freeze_at=0, **kwargs)


def test_no_side_of_the_boxes_is_cut_off_at_the_start():
    """Where ReLU cuts a distance off it has no gradient: a side that is cut off everywhere never learns."""
    images, sizes, boxes, labels = small_batch((2, 1))
    for initial_distance in (0.0, 1.0):
        model = small_model(initial_distance=initial_distance).train()
        outputs = model.network(images, sizes)
        cut_off = (outputs["ltrb"] == 0).float().mean().item()
        assert cut_off == 0 if initial_distance else cut_off > 0.2
    model.losses(outputs, boxes, labels)["box"].backward()
    assert (model.head.ltrb.bias.grad != 0).all()


@pytest.mark.parametrize("original", [True, False])
def test_empty_images_give_zero_box_loss_with_a_graph(original):
    model = small_model(original=original).train()
    images, sizes, boxes, labels = small_batch((0, 0))
    for gt in ((boxes, labels), (boxes[:, :0], labels[:, :0])):
        losses = model(images, sizes, *gt)
        assert losses["box"] == 0 and losses["centerness"] == 0 and losses["cls"] > 0
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_crowds_are_background():
    model = small_model().train()
    images, sizes, boxes, labels = small_batch((2, 1))
    without = model(images, sizes, boxes, labels)
    boxes[:, 3], labels[:, 3] = torch.tensor([0., 0., 90., 60.]), -2
    assert model(images, sizes, boxes, labels) == without


def test_a_batch_equals_its_images_alone():
    model = small_model(score_threshold=0.0).eval()
    images, sizes, _, _ = small_batch()
    with torch.no_grad():
        model.head.cls_logits.bias += 2.0
        together = model(images, sizes)
        alone = [model(images[i:i + 1], sizes[i:i + 1])[0] for i in range(2)]
    for a, b in zip(together, alone):
        assert len(a["boxes"]) > 0 and torch.equal(a["labels"], b["labels"])
        torch.testing.assert_close(a["boxes"], b["boxes"], atol=1e-3, rtol=1e-4)


def test_padding_is_zero_after_normalising():
    model = small_model().eval()
    images, sizes, _, _ = small_batch()
    dirty = images.clone()
    dirty[:, :, :, 80:] = 255
    images[:, :, :, 80:] = 0
    sizes[:, 1] = 80
    with torch.no_grad():
        for a, b in zip(model.network(dirty, sizes).values(), model.network(images, sizes).values()):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("original", [True, False])
def test_losses_are_float32_and_finite_under_autocast(original):
    model = small_model(original=original).train()
    images, sizes, boxes, labels = small_batch()
    boxes[0, 0] = torch.tensor([-2000., -2000., 4000., 4000.])  # its area overflows float16
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, sizes, boxes, labels)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_state_dict_carries_the_pixel_format():
    state = FCOS(3, "resnet18").state_dict()
    assert state["pixel_mean"].shape == state["pixel_std"].shape == (3, 1, 1)
    assert state["pixel_std"].flatten().tolist() == pytest.approx([58.395, 57.12, 57.375])


def test_published_freezing():
    with torch.device("meta"):
        model = FCOS(3, "resnet50")
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all(n.startswith("backbone.") for n in frozen)
    assert {"backbone.conv1.weight", "backbone.layer1.2.conv3.weight",
            "backbone.layer4.0.bn1.weight"} <= frozen
    assert "backbone.layer2.0.conv1.weight" not in frozen
    assert all(isinstance(m, FixedStatsBatchNorm2d) for m in model.modules()
               if type(m).__name__.startswith("Batch") or isinstance(m, torch.nn.BatchNorm2d))


# ---------------------------------------------------------------------------- decoding

def detect(logits, boxes, centerness, level_sizes, height=64, width=64):
    candidates = fcos_candidates(logits, boxes, centerness, level_sizes, score_threshold=0.05)
    return final_detections(*candidates, height, width, nms_threshold=0.6, max_detections=100)


def test_score_is_class_score_times_centerness_and_the_threshold_sees_the_class_score_alone():
    logits = torch.tensor([[0.0, -9.0], [-2.9, -9.0], [-3.0, -9.0]])  # sigmoid: 0.5, 0.0522, 0.0474
    boxes = torch.tensor([[0., 0., 10., 10.], [20., 0., 30., 10.], [40., 0., 50., 10.]])
    found = detect(logits, boxes, torch.tensor([0.0, -4.0, 4.0]), [3])
    # 0.5 * sigmoid(0) = 0.25. 0.0522 * sigmoid(-4) = 0.0522 * 0.01799 = 0.00094: the product may be below the
    # threshold. The third class score is below it.
    assert found["scores"].tolist() == pytest.approx([0.25, 0.000938], abs=1e-5)
    assert found["boxes"].tolist() == boxes[:2].tolist()


def test_boxes_are_clipped_to_the_image_and_empty_ones_dropped():
    logits = torch.zeros(3, 1)
    boxes = torch.tensor([[-5., -5., 20., 70.], [40., 10., 60., 20.], [5., 5., 5., 9.]])
    found = detect(logits, boxes, torch.zeros(3), [3], height=50, width=30)
    assert found["boxes"].tolist() == [[0, 0, 20, 50]]  # the second lies beyond x = 30


def test_nothing_above_the_threshold_gives_empty_tensors():
    found = detect(torch.full((4, 2), -9.0), torch.zeros(4, 4), torch.zeros(4), [3, 1])
    assert found["boxes"].shape == (0, 4) and found["scores"].shape == found["labels"].shape == (0,)
    assert found["labels"].dtype == torch.int64


def test_top_k_counts_point_class_pairs_per_level(monkeypatch):
    monkeypatch.setattr(fcos, "PRE_NMS_TOP_K", 2)
    logits = torch.tensor([[3.0, 2.0], [1.0, -9.0], [0.5, 0.4]])
    boxes = torch.tensor([[0., 0., 4., 4.], [10., 0., 14., 4.], [20., 0., 24., 4.]])
    found = detect(logits, boxes, torch.zeros(3), [2, 1])
    # The first level keeps both classes of its first point, the second both classes of its only point.
    assert found["labels"].tolist() == [0, 1, 0, 1] and found["boxes"][:, 0].tolist() == [0, 0, 20, 20]


def test_decoding_inverts_the_targets():
    boxes = torch.tensor([[10., 20., 50., 44.]])
    points, strides, ranges = all_points([(8, 8)])
    cls, ltrb, _ = fcos_targets(points, strides, ranges, boxes, torch.tensor([0]))
    assert torch.equal(fcos_decode(points, ltrb)[cls == 0], boxes.expand((cls == 0).sum(), 4))


# ---------------------------------------------------------------------------- static shapes, ranks

@pytest.mark.parametrize("original", [True, False])
def test_the_training_step_has_no_data_dependent_shape(original):
    assert_static_shapes(small_model(original=original), small_batch())


@pytest.mark.slow
def test_the_loss_step_compiles_without_graph_breaks():
    assert_compiles(small_model(), small_batch())


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    assert_two_ranks_equal_one(small_model, small_batch((3, 0)), tmp_path)  # rank 1 has no object

"""Boxes, anchors, losses and NMS against sums by hand, slow Python loops and torchvision."""
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ops

ROOT = Path(__file__).resolve().parents[1]
EMPTY = torch.zeros(0, 4)
LN2 = math.log(2)


def make_boxes(count, seed, side=200.0):
    """Boxes (count, 4) with positive area."""
    generator = torch.Generator().manual_seed(seed)
    corner, size = torch.rand(2, count, 2, generator=generator) * side
    return torch.cat((corner, corner + size + 1), dim=1)


def make_crowd(count, seed):
    """Clustered integer boxes, some without area, with equal scores and three labels.

    Integers avoid rounding in every IoU, and in the class offset that torchvision's batched_nms adds.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high, *shape):
        return torch.randint(high, shape, generator=generator)

    centres = draw(300, count // 10 + 1, 2)
    corner = centres[draw(len(centres), count)] + draw(8, count, 2)
    boxes = torch.cat((corner, corner + draw(25, count, 2)), dim=1).float()
    return boxes, draw(30, count) / 30, draw(3, count)


def slow_iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return width * height / union if union else 0.0


def slow_nms(boxes, scores, threshold, labels):
    boxes, scores, labels, kept = boxes.tolist(), scores.tolist(), labels.tolist(), []
    for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
        if not any(labels[i] == labels[j] and slow_iou(boxes[i], boxes[j]) > threshold for j in kept):
            kept.append(i)
    return kept


# ---------------------------------------------------------------------------------------------- boxes

def test_box_area_of_any_leading_shape():
    boxes = torch.tensor([[[1., 2., 4., 6.], [5., 5., 5., 9.]]])  # 3 * 4; 0 * 4
    assert ops.box_area(boxes).tolist() == [[12.0, 0.0]]
    assert ops.box_area(EMPTY).shape == (0,)


def test_pairwise_iou_by_hand():
    boxes1 = torch.tensor([[0., 0., 4., 2.]])
    boxes2 = torch.tensor([[0., 0., 4., 2.],   # itself
                           [2., 1., 6., 3.],   # 2*1 / (8 + 8 - 2) = 1/7
                           [4., 0., 6., 2.],   # touches
                           [5., 5., 6., 6.],   # disjoint on both axes
                           [1., 0., 2., 2.]])  # inside: 2 / 8
    torch.testing.assert_close(ops.pairwise_iou(boxes1, boxes2), torch.tensor([[1, 1 / 7, 0, 0, 0.25]]))


def test_two_boxes_without_area_have_iou_0():
    point = torch.tensor([[3., 3., 3., 3.]])
    assert ops.pairwise_iou(point, point).tolist() == [[0.0]]


@pytest.mark.parametrize("count1, count2", [(40, 30), (0, 30), (40, 0), (0, 0)])
def test_pairwise_iou_equals_slow_loop_and_torchvision(count1, count2):
    boxes1, boxes2 = make_boxes(count1, seed=1), make_boxes(count2, seed=2)
    iou = ops.pairwise_iou(boxes1, boxes2)
    slow = [[slow_iou(a, b) for b in boxes2.tolist()] for a in boxes1.tolist()]
    torch.testing.assert_close(iou, torch.tensor(slow).reshape(count1, count2))
    torchvision_ops = pytest.importorskip("torchvision.ops")
    torch.testing.assert_close(iou, torchvision_ops.box_iou(boxes1, boxes2))


def test_clip_boxes_by_hand():
    boxes = torch.tensor([[-5., -1., 50., 20.], [3., 4., 5., 6.], [40., 90., 45., 95.]])
    clipped = [[0., 0., 30., 10.], [3., 4., 5., 6.], [30., 10., 30., 10.]]
    assert ops.clip_boxes(boxes, 10, 30).tolist() == clipped
    assert ops.clip_boxes(boxes[None], torch.tensor(10), torch.tensor(30)).tolist() == [clipped]


@pytest.mark.parametrize("count", [0, 50])
def test_clip_boxes_equals_torchvision(count):
    torchvision_ops = pytest.importorskip("torchvision.ops")
    boxes = make_boxes(count, seed=3) - 60
    assert torch.equal(ops.clip_boxes(boxes, 70, 90), torchvision_ops.clip_boxes_to_image(boxes, (70, 90)))


def test_box_code_by_hand_and_back():
    anchors, boxes = torch.tensor([[10., 10., 30., 50.]]), torch.tensor([[15., 30., 55., 50.]])
    # Centres (20, 30) and (35, 40): 15 / 20 and 10 / 40. Sizes 20 x 40 and 40 x 20: ratios 2 and 1/2.
    deltas = ops.encode_boxes(boxes, anchors)
    assert deltas[0].tolist() == pytest.approx([0.75, 0.25, LN2, -LN2])
    torch.testing.assert_close(ops.decode_boxes(deltas, anchors), boxes)
    assert ops.encode_boxes(EMPTY, EMPTY).shape == ops.decode_boxes(EMPTY, EMPTY).shape == (0, 4)


def test_a_decoded_side_grows_at_most_1000_sixteenths_times():
    huge = ops.decode_boxes(torch.tensor([[0., 0., 99., 0.]]), torch.tensor([[10., 10., 30., 50.]]))
    assert (huge[0, 2] - huge[0, 0]).item() == pytest.approx(20 * 1000 / 16)


# ------------------------------------------------------------------------- points, anchors, predictions

def test_grid_points_run_along_the_rows():
    assert ops.grid_points(2, 3, 8, 4).tolist() == [[0, 0], [4, 0], [8, 0], [0, 8], [4, 8], [8, 8]]


def test_cell_anchors_by_hand():
    anchors = ops.cell_anchors(torch.tensor([8., 16.]), (1.0, 4.0))
    # Size 8, ratio 4: width 8 / 2, height 8 * 2.
    assert anchors.tolist() == [[[-4, -4, 4, 4], [-8, -8, 8, 8]], [[-2, -8, 2, 8], [-4, -16, 4, 16]]]


def test_the_anchors_of_a_point_follow_each_other():
    anchors = torch.tensor([[-1., -1., 1., 1.], [-2., -3., 2., 3.]])
    placed = ops.place_anchors(anchors, torch.tensor([[10., 20.], [0., 5.]]))
    assert placed.tolist() == [[9, 19, 11, 21], [8, 17, 12, 23], [-1, 4, 1, 6], [-2, 2, 2, 8]]


def test_predictions_are_in_the_order_of_points_and_anchors():
    # Each number tells its place: 100 * channel + 10 * row + column, channel = 2 * anchor + number.
    channel, row, column = torch.meshgrid(torch.arange(4), torch.arange(2), torch.arange(3), indexing="ij")
    level = (100 * channel + 10 * row + column)[None].half()
    flat = ops.flatten_predictions([level, level[..., :1, :1]], 2)
    expected = [[200 * a + 10 * y + x, 200 * a + 100 + 10 * y + x]
                for points in ([(y, x) for y in range(2) for x in range(3)], [(0, 0)])
                for y, x in points for a in range(2)]
    assert flat.dtype == torch.float32 and flat.tolist() == [expected]


def test_matches_equal_torchvisions_and_anchors_that_are_not_valid_match_nothing():
    matcher = pytest.importorskip("torchvision.models.detection._utils").Matcher(
        0.5, 0.4, allow_low_quality_matches=True)
    unit = ops.cell_anchors(torch.tensor([4., 5., 6.3]), (0.5, 1.0, 2.0)).flatten(0, 1)  # in strides
    anchors = torch.cat([ops.place_anchors(unit * s, ops.grid_points(256 // s, 384 // s, s, s))
                         for s in (8, 16, 32, 64, 128)])
    boxes = torch.tensor([[10., 12., 50., 60.], [60., 20., 150., 110.], [100., 100., 106., 107.],
                          [20., 30., 90., 120.], [-1., -1., -1., -1.]])  # the last row is padding
    labels = torch.tensor([0, 2, 1, 1, -1])
    found = ops.match_anchors(anchors, boxes, labels, 0.5, 0.4)
    assert torch.equal(found, matcher(ops.pairwise_iou(boxes[:4], anchors)))
    assert set(found.tolist()) == {-2, -1, 0, 1, 2, 3}  # only the low-quality rule finds the small object 2
    assert (ops.match_anchors(anchors, boxes[:0], labels[:0], 0.5, 0.4) == -1).all()
    valid = torch.arange(len(anchors)) % 2 == 0  # the others match nothing, as if they were not there
    again = ops.match_anchors(anchors, boxes, labels, 0.5, 0.4, valid)
    assert torch.equal(again[valid], ops.match_anchors(anchors[valid], boxes, labels, 0.5, 0.4))
    assert (again[~valid] == -2).all()


# ---------------------------------------------------------------------------------------------- losses

def test_focal_loss_by_hand():
    logits = torch.tensor([0., 0., math.log(3)])  # p = 1/2, 1/2, 3/4
    targets = torch.tensor([1., 0., 1.])
    expected = torch.tensor([0.25 * 0.5 ** 2 * LN2,
                             0.75 * 0.5 ** 2 * LN2,
                             0.25 * 0.25 ** 2 * math.log(4 / 3)])
    torch.testing.assert_close(ops.sigmoid_focal_loss(logits, targets), expected)


@pytest.mark.parametrize("shape", [(60, 7), (0, 7)])
@pytest.mark.parametrize("alpha, gamma", [(0.25, 2.0), (0.5, 1.5)])
def test_focal_loss_and_gradient_equal_torchvision(shape, alpha, gamma):
    torchvision_ops = pytest.importorskip("torchvision.ops")
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(shape, generator=generator) * 4).requires_grad_()
    targets = (torch.rand(shape, generator=generator) < 0.3).float()
    losses = [focal_loss(logits, targets, alpha=alpha, gamma=gamma)
              for focal_loss in (ops.sigmoid_focal_loss, torchvision_ops.sigmoid_focal_loss)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), logits) for loss in losses))


def test_focal_loss_of_extreme_logits_is_finite():
    logits = torch.tensor([-1e4, -100., 100., 1e4]).repeat(2).requires_grad_()
    loss = ops.sigmoid_focal_loss(logits, torch.tensor([0., 1.]).repeat_interleave(4))
    loss.sum().backward()
    assert loss.isfinite().all() and logits.grad.isfinite().all()


MATCHED = torch.tensor([[0., 0., 3., 1.]] * 4)
OTHERS = torch.tensor([[0., 0., 3., 1.],    # the same box
                       [1., 0., 4., 1.],    # IoU 2 / (3 + 3 - 2), the union fills the hull
                       [3., 0., 6., 1.],    # touches: IoU 0, the union fills the hull
                       [9., 0., 12., 1.]])  # IoU 0; hull 12, union 6: GIoU = 0 - 6/12


def test_iou_loss_by_hand():
    expected = torch.tensor([0, LN2, -math.log(1e-6), -math.log(1e-6)])
    torch.testing.assert_close(ops.iou_loss(OTHERS, MATCHED), expected)


def test_giou_loss_by_hand():
    assert ops.giou_loss(OTHERS, MATCHED).tolist() == [0.0, 0.5, 1.0, 1.5]


@pytest.mark.parametrize("count", [0, 1, 200])
def test_iou_loss_equals_slow_loop(count):
    pred, target = make_boxes(count, seed=4), make_boxes(count, seed=5)
    slow = [-math.log(max(slow_iou(a, b), 1e-6)) for a, b in zip(pred.tolist(), target.tolist())]
    torch.testing.assert_close(ops.iou_loss(pred, target), torch.tensor(slow))


@pytest.mark.parametrize("count", [0, 1, 200])
def test_giou_loss_and_gradient_equal_torchvision(count):
    torchvision_ops = pytest.importorskip("torchvision.ops")
    pred, target = make_boxes(count, seed=6).requires_grad_(), make_boxes(count, seed=7)
    losses = ops.giou_loss(pred, target), torchvision_ops.generalized_box_iou_loss(pred, target)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss.sum(), pred) for loss in losses))


@pytest.mark.parametrize("loss", [ops.iou_loss, ops.giou_loss])
def test_gradients_of_equal_and_disjoint_boxes_and_of_boxes_without_area_are_finite(loss):
    point = torch.tensor([[2., 2., 2., 2.]])
    pred = torch.cat((OTHERS, point)).requires_grad_()
    values = loss(pred, torch.cat((MATCHED, point)))
    values.sum().backward()
    assert values.isfinite().all() and pred.grad.isfinite().all()


def test_giou_moves_a_disjoint_box_although_its_iou_is_zero():
    pred = OTHERS[3:].clone().requires_grad_()
    ops.giou_loss(pred, MATCHED[3:]).sum().backward()
    # The loss is 2 - union / hull; union = 3 + x2 - x1 = 6, hull = x2 = 12. By x1: 1/12, by x2: 6/144 - 1/12.
    torch.testing.assert_close(pred.grad[0, 0::2], torch.tensor([1 / 12, -1 / 24]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_areas_of_4000_px_boxes_do_not_overflow_half_precision(dtype):
    whole = torch.tensor([[0., 0., 4000., 4000.]], dtype=dtype)
    half = torch.tensor([[0., 0., 4000., 2000.]], dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        results = [ops.box_area(whole), ops.pairwise_iou(whole, half), ops.iou_loss(half, whole),
                   ops.giou_loss(half, whole)]
    assert all(result.dtype == torch.float32 for result in results)
    torch.testing.assert_close(torch.cat([result.flatten() for result in results]),
                               torch.tensor([16e6, 0.5, LN2, 0.5]))
    boxes, scores = torch.cat((whole, half)), torch.tensor([0.5, 0.75], dtype=dtype)
    for keep in (ops.nms(boxes, scores, 0.4), ops.nms_plain(boxes, scores, 0.4)):
        assert keep.tolist() == [1]


def test_mean_over_one_rank_is_the_value_without_gradient():
    value = torch.tensor([3., 5.], requires_grad=True)
    mean = ops.mean_over_ranks(value * 2)
    assert mean.tolist() == [6.0, 10.0] and not mean.requires_grad


# ------------------------------------------------------------------------- non-maximum suppression

def test_a_suppressed_box_suppresses_nothing():
    # A chain of boxes, longer than two blocks of the plain form. The IoU of neighbours is 6 / 14, of the next
    # but one 2 / 18: each box is either kept or suppressed by a kept neighbour.
    left = torch.arange(2 * ops.NMS_BLOCK_CPU + 88.) * 4
    boxes = torch.stack((left, left * 0, left + 10, left * 0 + 10), dim=1)
    scores = torch.linspace(1, 0, len(left))
    every_other = list(range(0, len(left), 2))
    assert ops.nms_plain(boxes, scores, 0.3).tolist() == every_other
    assert ops.nms(boxes, scores, 0.3).tolist() == every_other


def test_the_plain_nms_starts_no_threads():
    # torch gives tensors of 32768 elements or more to several threads, and triu any tensor.
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert "triu" not in str(func)
            result = func(*args, **(kwargs or {}))
            if torch.is_tensor(result) and not func.is_view:
                self.elements = max(self.elements, result.numel())
            return result

    boxes, scores, labels = make_crowd(9000, 0)
    with Largest() as largest:
        ops.nms_plain(boxes, scores, 0.7, labels)
    assert 0 < largest.elements < 32768


@pytest.mark.parametrize("shift, threshold, kept", [
    (1, 0.5, [0, 1]),    # IoU 2 / 4 is not above 0.5
    (1, 0.4999, [0]),
    (0.75, 0.6, [0])])   # IoU 2.25 / 3.75 = 3/5, and float32(3/5) is above the double 0.6, as in torchvision
def test_iou_exactly_at_the_threshold(shift, threshold, kept):
    boxes = torch.tensor([[0., 0., 3., 1.], [shift, 0., 3 + shift, 1.]])
    scores = torch.tensor([0.9, 0.8])
    assert ops.nms_plain(boxes, scores, threshold).tolist() == kept
    torchvision_ops = pytest.importorskip("torchvision.ops")
    assert torchvision_ops.nms(boxes, scores, threshold).tolist() == kept


def test_boxes_of_other_classes_and_boxes_without_area_survive():
    boxes = torch.tensor([[0., 0., 8., 8.]] * 3 + [[2., 2., 2., 6.]] * 2)
    scores, labels = torch.tensor([0.7, 0.9, 0.8, 0.6, 0.6]), torch.tensor([0, 0, 5, 0, 0])
    assert ops.nms_plain(boxes, scores, 0.5, labels).tolist() == [1, 2, 3, 4]  # ties in input order
    assert ops.nms_plain(boxes, scores, 0.5).tolist() == [1, 3, 4]


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_plain_nms_equals_slow_loop(count):
    for seed in range(10):
        boxes, scores, labels = make_crowd(count, seed)
        kept = ops.nms_plain(boxes, scores, 0.5, labels)
        assert kept.dtype == torch.int64 and kept.tolist() == slow_nms(boxes, scores, 0.5, labels)


@pytest.mark.parametrize("count", [0, 1, 2, 50, 1000])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.6])
def test_plain_nms_equals_torchvision(count, threshold):
    torchvision_ops = pytest.importorskip("torchvision.ops")
    for seed in range(10):
        boxes, scores, labels = make_crowd(count, seed)
        assert torch.equal(ops.nms_plain(boxes, scores, threshold),
                           torchvision_ops.nms(boxes, scores, threshold))
        assert torch.equal(ops.nms_plain(boxes, scores, threshold, labels),
                           torchvision_ops.batched_nms(boxes, scores, labels, threshold))


def test_plain_nms_equals_torchvision_on_fractional_boxes():
    torchvision_ops = pytest.importorskip("torchvision.ops")
    for seed in range(10):
        boxes, scores = make_boxes(1000, seed), make_boxes(1000, seed + 10)[:, 0]
        assert torch.equal(ops.nms_plain(boxes, scores, 0.6), torchvision_ops.nms(boxes, scores, 0.6))


@pytest.mark.parametrize("count", [0, 1, 300])
def test_results_are_the_same_without_torchvision(count, monkeypatch):
    pytest.importorskip("torchvision.ops")
    boxes, scores, labels = make_crowd(count, seed=11)
    features = torch.randn(2, 3, 20, 24, generator=torch.Generator().manual_seed(12))
    # On a CPU torchvision's NMS is used in compiled graphs only.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    def run():
        return (ops.nms(boxes, scores, 0.6), ops.batched_nms(boxes, scores, labels, 0.6),
                ops.roi_align(features, boxes.clamp(max=300).expand(2, -1, -1), 7, 1 / 16))

    fast = run()
    monkeypatch.setattr(ops, "USE_TORCHVISION", False)
    for with_torchvision, without in zip(fast, run()):
        torch.testing.assert_close(with_torchvision, without)


def test_ops_works_where_torchvision_is_absent_or_broken(tmp_path):
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision/__init__.py").write_text("raise RuntimeError('made for another torch')")
    program = """
import sys, torch
boxes = torch.tensor([[0., 0., 4., 4.], [0., 0., 4., 3.], [8., 8., 9., 9.]])
scores = torch.tensor([0.5, 0.6, 0.7])
def show():
    import ops
    print(ops.roi_align(torch.ones(1, 1, 9, 9), boxes[None], 1, 1.0).flatten().tolist(),
          ops.nms(boxes, scores, 0.5).tolist(),
          ops.batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist())
sys.modules["torchvision"] = None  # absent
show()
del sys.modules["torchvision"], sys.modules["ops"]  # broken: the folder on PYTHONPATH
show()
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True)
    assert done.stdout.splitlines() == ["[1.0, 1.0, 1.0] [2, 1] [2, 1, 0]"] * 2, done.stderr


@pytest.mark.parametrize("compiling", [False, True])  # True: torchvision's NMS, where it can be imported
def test_classes_do_not_meet_at_negative_coordinates(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    # torchvision shifts the second class by the largest coordinate + 1 = 21, which would put it on the first.
    boxes = torch.tensor([[10., 10., 20., 20.], [-11., -11., -1., -1.]])
    scores, labels = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    assert ops.batched_nms(boxes, scores, labels, 0.5).tolist() == [0, 1]


@pytest.mark.parametrize("limit", [0, 1, 7, 300, 5000])
def test_a_limit_keeps_the_best_of_the_kept_boxes(limit):
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(2000, 2, generator=generator) * 300
    boxes = torch.cat((corner, corner + 5 + torch.rand(2000, 2, generator=generator) * 40), dim=1)
    scores, labels = torch.rand(2000, generator=generator), torch.randint(0, 3, (2000,), generator=generator)
    for call in (ops.nms, ops.nms_plain):
        assert torch.equal(call(boxes, scores, 0.5, limit=limit), call(boxes, scores, 0.5)[:limit])
    for call in (lambda **limit: ops.batched_nms(boxes, scores, labels, 0.5, **limit),
                 lambda **limit: ops.nms_plain(boxes, scores, 0.5, labels, **limit)):
        assert torch.equal(call(limit=limit), call()[:limit])

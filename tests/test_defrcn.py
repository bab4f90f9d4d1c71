import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import GOLDEN, assert_two_ranks_equal_one, small_batch

import defrcn
import ops
from backbone import WeightsError
from defrcn import (
    CalibrationNet,
    CosineClassifier,
    DeFRCN,
    calibrate,
    class_prototypes,
    image_anchors,
    rename_detectron2,
    roi_detections,
    roi_losses,
    rpn_proposals,
    sample,
    sample_rois,
    scale_gradient,
    transfer_predictor,
)
from ops import match_anchors

sys.path.insert(0, str(GOLDEN))
import defrcn_rules as rules  # noqa: E402


def in_index_order(count, device):
    """The deterministic sampler of the recorded runs: the first ones in index order."""
    return torch.arange(count, device=device).float()


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "defrcn.json").read_text()), np.load(GOLDEN / "defrcn.npz")


def golden_weights(keys, num_classes, decouple=True):
    shapes = {"cls_score": num_classes + 1, "bbox_pred": 4 * num_classes}
    state = {}
    for key, shape in keys.items():
        if "cell_anchors" in key or not decouple and key.startswith("affine"):
            continue
        for name, rows in shapes.items():
            shape = [rows, *shape[1:]] if name in key else shape
        state[key] = torch.from_numpy(rules.weight(key, shape))
    return state


def golden_batch(which):
    """The recorded pictures (RGB) and objects under our tensor contract."""
    pictures = [rules.batch()[i] for i in which]
    height, width = (max(p[0].shape[axis] for p in pictures) for axis in (0, 1))
    most = max(1, *(len(p[1]) for p in pictures), 1)
    images = torch.zeros(len(pictures), 3, height, width, dtype=torch.uint8)
    boxes, labels = torch.zeros(len(pictures), most, 4), torch.full((len(pictures), most), -1)
    for i, (image, gt, classes) in enumerate(pictures):
        images[i, :, :image.shape[0], :image.shape[1]] = torch.from_numpy(
            image[:, :, ::-1].copy()).permute(2, 0, 1)
        boxes[i, :len(gt)], labels[i, :len(gt)] = torch.from_numpy(gt), torch.from_numpy(classes)
    return images, torch.tensor([p[0].shape[:2] for p in pictures]), boxes, labels


class RecordedDropout(torch.nn.Module):
    def forward(self, x):
        return x * torch.from_numpy(rules.dropout_mask(x.shape))


# ---------------------------------------------------------------------------- published numbers

def test_proposals_and_their_targets_equal_the_published_ones(golden):
    records, arrays = golden
    model = DeFRCN(60, "resnet50").train()
    model.load_state_dict(rename_detectron2(golden_weights(records["keys"], 60)), strict=True)
    images, sizes, boxes, labels = golden_batch([0, 1, 2])
    with torch.no_grad():
        feature, _ = model.features(images, sizes)
        objectness, deltas = model.rpn(feature)
    anchors = image_anchors(*feature.shape[-2:])
    np.testing.assert_array_equal(anchors[:15], arrays["rpn/cell_anchors"])
    np.testing.assert_allclose(objectness[:, ::29], arrays["rpn/objectness"], atol=1e-4)
    np.testing.assert_allclose(deltas[:, ::29], arrays["rpn/deltas"], atol=1e-4)
    for i in range(3):
        match = match_anchors(anchors, boxes[i], labels[i], 0.7, 0.3)
        found = torch.where(match >= 0, 1, torch.where(match == -1, 0, -1))
        assert found.tolist() == arrays["rpn/labels_before_sampling"][i].tolist()
        assert match[match >= 0].tolist() == arrays["rpn/matched_idx"][i][match >= 0].tolist()
        positive, negative = sample(match >= 0, match == -1, 256, 128, in_index_order(len(match), None))
        found = torch.where(positive, 1, torch.where(negative, 0, -1))
        assert found.tolist() == arrays["rpn/labels_after_first_k"][i].tolist()
        _, real = rpn_proposals(objectness[i], deltas[i], anchors, sizes[i], 12000, 2000)
        assert real.sum() == arrays[f"rpn/train_num_proposals_{i}"]


@pytest.mark.parametrize("case", ["base_coco", "fsod_coco", "fsod_coco_dropout_off", "gfsod_coco",
                                  "plain_no_decouple", "base_coco_gtfree_only"])
def test_losses_and_gradients_equal_the_published_ones(golden, case):
    record, keys = golden[0]["train"][case], golden[0]["keys"]
    count, decouple = record["num_classes"], record["roi_decouple"][0]
    model = DeFRCN(count, "resnet50", decouple=decouple, rpn_grad_scale=record["rpn_decouple"][1],
                   roi_grad_scale=record["roi_decouple"][1], freeze_res5=record["freeze"]["roi_feat"],
                   roi_samples=64, sample_order=in_index_order).train()
    weights = golden_weights(keys, count, decouple)
    model.load_state_dict(rename_detectron2(weights), strict=True)
    if record["freeze"]["roi_feat"] and record["dropout"] == "mask":
        model.predictor.dropout = RecordedDropout()
    images, sizes, boxes, labels = golden_batch(record["images"])
    losses = model(images, sizes, boxes, torch.where(labels >= 0, labels % count, labels))
    for ours, theirs in (("cls", "loss_cls"), ("box", "loss_box_reg"), ("rpn_cls", "loss_rpn_cls"),
                         ("rpn_box", "loss_rpn_loc")):
        assert losses[ours].item() == pytest.approx(record["losses"][theirs], rel=1e-5, abs=1e-9)
    sum(losses.values()).backward()
    names = list(weights)
    numbered = {key: torch.full_like(value, i) for i, (key, value) in enumerate(weights.items())}
    ours = {names[int(v.flatten()[0])]: key for key, v in rename_detectron2(numbered).items()
            if not key.startswith("pixel_") and "num_batches" not in key}
    parameters = dict(model.named_parameters())
    for key, norm in record["grad_norm"].items():
        parameter = parameters.get(ours.get(key))
        if isinstance(norm, str):  # "frozen" or "none"
            assert parameter is None or parameter.grad is None
        else:
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=5e-3, abs=1e-9), key


def test_detections_equal_the_published_ones(golden):
    arrays = golden[1]
    logits, deltas, proposals, boxes, scores, classes = (
        torch.from_numpy(arrays[f"eval/fc_{key}"]) for key in
        ("logits", "deltas", "proposals_0", "boxes_0", "scores_0", "classes_0"))
    found = roi_detections(logits, deltas.unflatten(1, (-1, 4)), proposals, torch.ones(len(logits)).bool(),
                           torch.tensor([192, 256]), 0.05)
    # Recorded at twice the size of the network input.
    torch.testing.assert_close(found["boxes"] * 2, boxes, rtol=0, atol=1e-3)
    torch.testing.assert_close(found["scores"], scores, rtol=0, atol=1e-6)
    assert found["labels"].tolist() == classes.tolist()


def test_published_sizes_and_what_trains(golden):
    with torch.device("meta"):
        base, novel = DeFRCN(60), DeFRCN(20, freeze_res5=True, cls_dropout=0.8)
    buffers = sum(b.numel() for m in base.modules() if isinstance(m, torch.nn.BatchNorm2d)
                  for b in m.parameters())  # the norms are buffers in detectron2
    total, trained = golden[0]["n_params"]
    assert sum(p.numel() for p in base.parameters()) - buffers == total
    assert sum(p.numel() for p in base.parameters() if p.requires_grad) == trained
    assert sum(p.requires_grad for p in base.parameters()) == len(golden[0]["base_trainable"])
    assert sum(p.requires_grad for p in novel.parameters()) == len(golden[0]["fsod_trainable"])
    with pytest.raises(WeightsError, match="not a Faster R-CNN C4"):
        rename_detectron2({"fc.weight": torch.zeros(1)})


@pytest.mark.parametrize("case", ["coco", "voc"])
def test_surgery_copies_the_published_rows(golden, case):
    record = golden[0]["surgery"][f"{case}_randinit"]
    rows = record["src_row_of_cls_score_bias"]
    old_count, new_count = max(r for r in rows if r is not None), len(rows) - 1
    old_names = [f"base{i}" for i in range(old_count)]
    new_names = [f"new{i}" if row is None else old_names[row] for i, row in enumerate(rows[:-1])]
    old, new = (defrcn.Predictor(8, count).state_dict(prefix="predictor.")
                for count in (old_count, new_count))
    moved = transfer_predictor(new, old, old_names, new_names)
    for i, row in enumerate(rows):
        if row is not None:
            assert torch.equal(moved["predictor.cls_score.weight"][i], old["predictor.cls_score.weight"][row])
    for i, row in enumerate(record["src_row_of_bbox_pred_weight"]):
        if row is not None:
            assert torch.equal(moved["predictor.deltas.weight"][i], old["predictor.deltas.weight"][row])
    fresh = [i for i, row in enumerate(rows) if row is None]
    assert (moved["predictor.cls_score.bias"][fresh] == 0).all()
    assert moved["predictor.cls_score.weight"][fresh].std().item() == pytest.approx(0.01, rel=0.3)
    cosine = defrcn.Predictor(8, new_count, cosine=True).state_dict(prefix="predictor.")
    moved = transfer_predictor(cosine, old, old_names, new_names)
    assert all(torch.equal(moved[key], cosine[key]) for key in cosine)  # its weights mean something else
    # Novel classes alone share none with the base: everything stays as initialised.
    alone = transfer_predictor(new, old, old_names, [f"new{i}" for i in range(new_count)])
    assert all(torch.equal(alone[key], new[key]) for key in new)


def test_calibration_equals_the_published_one(golden):
    records, arrays = golden[0]["pcb"], golden[1]
    scores, features = (torch.from_numpy(arrays[f"pcb/{key}"]) for key in ("det_scores", "query_features"))
    prototypes = torch.stack([torch.from_numpy(arrays[f"pcb/prototype_{c}"]) for c in range(6)])

    def check(name, prototypes, *args, **kwargs):
        labels = torch.from_numpy(arrays[f"pcb/{name}_classes"])
        found = calibrate(scores, labels, features, prototypes, *args, **kwargs)
        np.testing.assert_allclose(found, arrays[f"pcb/{name}_scores"], atol=1e-6)

    check("fsod", prototypes)
    check("fsod_alpha03", prototypes, alpha=0.3)
    check("fsod_upper09", prototypes, window=(0.05, 0.9))
    every, excluded = torch.zeros(80, 1000), torch.zeros(80, dtype=torch.bool)
    every[list(records["map80"].values())] = prototypes
    excluded[records["exclude_coco_all"]] = True
    check("gfsod", every, excluded)
    assert calibrate(scores[:0], torch.zeros(0, dtype=torch.int64), features[:0], prototypes).shape == (0,)


def test_prototypes_and_features_equal_the_published_ones(golden):
    records, arrays = golden[0]["pcb"], golden[1]
    net = CalibrationNet()
    net.load_state_dict({key: torch.from_numpy(np.asarray(rules.weight(
        key.removeprefix("backbone."), value.shape, "pcb"))) for key, value in net.state_dict().items()})

    def describe(name, height, width, boxes):
        image = torch.from_numpy(rules.image(f"pcb_{name}", height, width)[:, :, ::-1].copy())
        return net(image.permute(2, 0, 1), torch.as_tensor(boxes, dtype=torch.float32))

    with torch.no_grad():
        query = describe(*records["query"].values(), arrays["pcb/det_boxes"])
        np.testing.assert_allclose(query, arrays["pcb/query_features"], atol=2e-3)
        features, labels = [], []
        for support in records["support"]:
            objects = [o for o in support["objects"] if not o[5]]  # without crowds
            features.append(describe(support["name"], support["h"], support["w"], [o[:4] for o in objects]))
            labels += [o[4] for o in objects]
        prototypes = class_prototypes(torch.cat(features), torch.tensor(labels), 6)
    for c in range(6):
        np.testing.assert_allclose(prototypes[c], arrays[f"pcb/prototype_undistorted_{c}"], atol=2e-3)


# ---------------------------------------------------------------------------- RoIAlign

@pytest.mark.parametrize("function", [ops.roi_align, ops.roi_align_plain])
def test_roi_align_and_its_gradient_equal_the_published_ones(golden, function):
    arrays = golden[1]
    x = torch.from_numpy(arrays["roialign/x"]).requires_grad_()
    first, second = (torch.from_numpy(arrays[f"roialign/rois_img{i}"]) for i in (0, 1))
    boxes = torch.stack((first, F.pad(second, (0, 0, 0, 4))))
    for name, size, scale in (("out_s32_1x1", 1, 1 / 32), ("out_s16_7x7", 7, 1 / 16)):
        out = function(x, boxes, size, scale)[:12]
        np.testing.assert_allclose(out.detach(), arrays[f"roialign/{name}"], atol=1e-5)
    (out * torch.from_numpy(arrays["roialign/grad_w"])).sum().backward()
    np.testing.assert_allclose(x.grad, arrays["roialign/grad_x_s16_7x7"], atol=1e-5)


# ---------------------------------------------------------------------------- the parts by hand

def test_gradients_are_scaled_and_values_are_not():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([4.0, 8.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0]
    x.grad = None
    scale_gradient(x, 0.0).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]  # zero, not missing


def test_sampling_takes_positives_first_and_fills_up_with_negatives():
    positive = torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    order = torch.tensor([0.9, 0.5, 0.1, 0.2, 0.3, 0.4])
    taken, filled = sample(positive, ~positive, 4, 2, order)
    assert taken.tolist() == [False, False, True, True, False, False]
    assert filled.tolist() == [False, False, False, False, True, True]
    taken, filled = sample(torch.zeros(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool), 4, 2, order)
    assert not taken.any() and not filled.any()


def test_rois_are_positives_then_background_then_padding():
    proposals = torch.tensor([[0., 0., 10., 10.], [50., 50., 60., 60.], [0., 0., 0., 0.]])
    gt, labels = torch.tensor([[0., 0., 10., 9.], [20., 20., 30., 30.]]), torch.tensor([1, -2])
    rois, cls, targets = sample_rois(proposals, torch.tensor([True, True, False]), gt, labels, 3, count=8,
                                     sample_order=in_index_order)
    # The proposal with IoU 0.9 and the object itself; one background; the crowd is none of them.
    assert cls.tolist() == [1, 1, 3, -1, -1, -1, -1, -1]
    assert rois[:3].tolist() == [[0, 0, 10, 10], [0, 0, 10, 9], [50, 50, 60, 60]]
    assert targets[:2].tolist() == [[0, 0, 10, 9]] * 2
    rois, cls, _ = sample_rois(proposals, torch.tensor([True, True, False]), gt[:0], labels[:0], 3, count=4)
    assert cls.tolist() == [3, 3, -1, -1] and rois.shape == (4, 4)


def test_roi_losses_by_hand():
    rois = torch.tensor([[0., 0., 10., 10.], [5., 5., 9., 9.], [0., 0., 0., 0.]])
    targets = torch.tensor([[1., 0., 11., 10.], [0., 0., 0., 0.], [0., 0., 0., 0.]])
    deltas = torch.zeros(3, 2, 4)
    losses = roi_losses(torch.zeros(3, 3), deltas, rois, torch.tensor([1, 2, -1]), targets)
    assert losses["cls"].item() == pytest.approx(math.log(3))  # two RoIs of ln 3, over two
    assert losses["box"].item() == pytest.approx(10 * 0.1 / 2)  # 10 x a shift of a tenth, over two RoIs


def test_cosine_scores_ignore_the_length_of_features_and_weights():
    layer = CosineClassifier(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    # cos 45 degrees = 0.7071, times 20
    assert layer(torch.tensor([[9.0, 9.0]])).tolist()[0] == pytest.approx([14.142, 14.142], rel=1e-3)


# ---------------------------------------------------------------------------- the model as a whole

def small_model(**kwargs):
    torch.manual_seed(0)
    model = DeFRCN(3, "resnet18", norm="affine", freeze_at=0, caffe=False, roi_samples=16,
                   post_nms_top_k=(50, 20), sample_order=in_index_order, **kwargs)
    # Far from ties: rounding does not reorder the proposals.
    torch.nn.init.normal_(model.rpn.objectness.weight, std=0.1)
    return model


@pytest.mark.parametrize("kwargs", [{}, {"decouple": False}, {"cosine": True}, {"pool_size": 14}])
def test_images_without_objects_have_no_box_loss_but_a_graph(kwargs):
    model = small_model(**kwargs).train()
    images, sizes, boxes, labels = small_batch((0, 0))
    for gt in ((boxes, labels), (boxes[:, :0], labels[:, :0])):
        losses = model(images, sizes, *gt)
        assert losses["box"] == 0 and losses["rpn_box"] == 0 and losses["cls"] > 0
        model.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


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


def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    # Rank 1 has no object. With random weights the losses are large sums that cancel: rounding is 3e-3.
    assert_two_ranks_equal_one(small_model, small_batch((3, 0)), tmp_path, rtol=1e-2)

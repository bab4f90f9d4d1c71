"""What DeFRCN adds to Faster R-CNN, by hand and against numbers recorded from the official code."""
import functools

import numpy as np
import pytest
import torch
from helpers import (
    assert_no_box_loss_without_objects,
    assert_recorded_losses_and_gradients,
    assert_two_ranks_equal_one,
    defrcn_rules,
    golden_rcnn_records,
    in_index_order,
    recorded_weights,
    small_batch,
    small_two_stage,
)

from convert import rcnn_from_detectron2
from defrcn import (
    CalibrationNet,
    CosineClassifier,
    DeFRCN,
    FineTuningPredictor,
    calibrate,
    class_prototypes,
    scale_gradient,
    train_only,
    transfer_class_rows,
)
from weights import WeightsError


class RecordedDropout(torch.nn.Module):
    def forward(self, x):
        return x * torch.from_numpy(defrcn_rules.dropout_mask(x.shape))


@pytest.fixture(scope="module")
def golden():
    return golden_rcnn_records()


# ---------------------------------------------------------------------------- published numbers

@pytest.mark.parametrize("case", [
    "base_coco", "fsod_coco", "gfsod_coco", pytest.param("fsod_coco_dropout_off", marks=pytest.mark.slow),
    pytest.param("base_coco_gtfree_only", marks=pytest.mark.slow)])
def test_losses_and_gradients_equal_the_published_ones(golden, case):
    record = golden[0]["train"][case]
    count, freeze_res5 = record["num_classes"], record["freeze"]["roi_feat"]
    model = DeFRCN(count, "resnet50", decouple=record["roi_decouple"][0],
                   rpn_grad_scale=record["rpn_decouple"][1], roi_grad_scale=record["roi_decouple"][1],
                   freeze_res5=freeze_res5, roi_samples=64, sample_order=in_index_order)
    weights = recorded_weights(golden[0]["keys"], count, record["roi_decouple"][0])
    model.load_state_dict(rcnn_from_detectron2(weights), strict=True)
    if freeze_res5 and record["dropout"] == "mask":
        model.predictor.dropout = RecordedDropout()
    assert_recorded_losses_and_gradients(model, weights, record)


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
    with pytest.raises(WeightsError, match="not a Faster R-CNN of detectron2"):
        rcnn_from_detectron2({"fc.weight": torch.zeros(1)})


@pytest.mark.parametrize("case", ["coco", "voc"])
def test_surgery_copies_the_published_rows(golden, case):
    record = golden[0]["surgery"][f"{case}_randinit"]
    rows = record["src_row_of_cls_score_bias"]
    old_count, new_count = max(r for r in rows if r is not None), len(rows) - 1
    old_names = [f"base{i}" for i in range(old_count)]
    new_names = [f"new{i}" if row is None else old_names[row] for i, row in enumerate(rows[:-1])]
    old, new = (FineTuningPredictor(8, count).state_dict(prefix="predictor.")
                for count in (old_count, new_count))
    moved = transfer_class_rows(new, old, old_names, new_names)
    for i, row in enumerate(rows):
        if row is not None:
            assert torch.equal(moved["predictor.cls_score.weight"][i], old["predictor.cls_score.weight"][row])
    for i, row in enumerate(record["src_row_of_bbox_pred_weight"]):
        if row is not None:
            assert torch.equal(moved["predictor.deltas.weight"][i], old["predictor.deltas.weight"][row])
    fresh = [i for i, row in enumerate(rows) if row is None]
    assert (moved["predictor.cls_score.bias"][fresh] == 0).all()
    assert moved["predictor.cls_score.weight"][fresh].std().item() == pytest.approx(0.01, rel=0.3)
    cosine = FineTuningPredictor(8, new_count, cosine=True).state_dict(prefix="predictor.")
    moved = transfer_class_rows(cosine, old, old_names, new_names)
    assert all(torch.equal(moved[key], cosine[key]) for key in cosine)  # its weights mean something else
    # Novel classes alone share none with the base model: everything stays as initialised.
    alone = transfer_class_rows(new, old, old_names, [f"new{i}" for i in range(new_count)])
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
    of_80_classes, excluded = torch.zeros(80, 1000), torch.zeros(80, dtype=torch.bool)
    of_80_classes[list(records["map80"].values())] = prototypes
    excluded[records["exclude_coco_all"]] = True
    check("gfsod", of_80_classes, excluded)
    assert calibrate(scores[:0], torch.zeros(0, dtype=torch.int64), features[:0], prototypes).shape == (0,)


def test_prototypes_and_features_equal_the_published_ones(golden):
    records, arrays = golden[0]["pcb"], golden[1]
    net = CalibrationNet()
    net.load_state_dict({key: torch.from_numpy(np.asarray(defrcn_rules.weight(
        key.removeprefix("backbone."), value.shape, "pcb"))) for key, value in net.state_dict().items()})

    def describe(name, height, width, boxes):
        image = torch.from_numpy(defrcn_rules.image(f"pcb_{name}", height, width)[:, :, ::-1].copy())
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


# ---------------------------------------------------------------------------- parts by hand

def test_gradients_are_scaled_and_values_are_not():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.tensor([4.0, 8.0])).sum().backward()
    assert x.grad.tolist() == [1.0, 2.0]
    x.grad = None
    scale_gradient(x, 0.0).sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]  # zero, not missing


def test_cosine_scores_ignore_the_length_of_features_and_weights():
    layer = CosineClassifier(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 5.0]]))
    # cos 45 degrees = 0.7071, times 20
    assert layer(torch.tensor([[9.0, 9.0]])).tolist()[0] == pytest.approx([14.142, 14.142], rel=1e-3)


def test_parameters_keep_the_order_in_which_checkpoints_store_optimizer_state():
    with torch.device("meta"):
        modules = [name for name, _ in DeFRCN(3, "resnet18").named_children()]
    assert modules == ["backbone", "affine_rpn", "affine_roi", "rpn", "predictor"]


# ---------------------------------------------------------------------------- the whole model

small_defrcn = functools.partial(small_two_stage, DeFRCN)


def test_without_decoupling_it_is_faster_rcnn():
    # test_faster_rcnn.py has the published numbers of this network.
    models = small_defrcn(decouple=False).train(), small_two_stage().train()
    ours, theirs = (model.state_dict() for model in models)
    assert list(ours) == list(theirs) and all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (model(*small_batch()) for model in models)
    assert ours == theirs


@pytest.mark.parametrize("kwargs", [{}, {"decouple": False}, {"cosine": True}, {"pool_size": 14}])
def test_images_without_objects_have_no_box_loss_but_gradients(kwargs):
    assert_no_box_loss_without_objects(small_defrcn(**kwargs))


def test_losses_are_float32_and_finite_under_autocast():
    model = small_defrcn().train()
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(*small_batch())
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


@pytest.mark.slow
def test_two_ranks_give_the_gradients_of_one_process(tmp_path):
    # Rank 1 has no object. With random weights the losses are large sums that cancel: rounding is 3e-3.
    assert_two_ranks_equal_one(small_defrcn, small_batch((3, 0)), tmp_path, rtol=1e-2)


# ---------------------------------------------------------------------------- ablations

@pytest.mark.parametrize(("parts", "trained"), [
    (["predictor"], {"predictor.cls_score.weight", "predictor.cls_score.bias", "predictor.deltas.weight",
                     "predictor.deltas.bias"}),
    (["rpn"], {f"rpn.{layer}.{kind}" for layer in ("conv", "objectness", "deltas")
               for kind in ("weight", "bias")} | {"affine_rpn.weight", "affine_rpn.bias"})])
def test_only_the_named_parts_train(parts, trained):
    model = small_two_stage(DeFRCN)
    train_only(model, parts)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


def test_res5_and_backbone_are_parts_of_their_own():
    model = small_two_stage(DeFRCN)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    train_only(model, ["res5", "backbone"])
    after = {name for name, p in model.named_parameters() if p.requires_grad}
    others = ("predictor.", "rpn.", "affine_rpn.")
    assert before - after == {name for name in before if name.startswith(others)}
    assert any(name.startswith("backbone.layer4") for name in after) and "affine_roi.weight" in after


def test_the_scale_of_the_cosine_classifier():
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    layer, tripled = CosineClassifier(8, 4), CosineClassifier(8, 4, scale=60.0)
    torch.nn.init.normal_(layer.weight)
    tripled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(tripled(x), 3 * layer(x))

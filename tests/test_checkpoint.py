"""Checkpoints: they rebuild their models, start trainings, and are written whole or not at all."""
import pytest
import torch

from checkpoint import ABLATION_ARGS, build_model, load_init, load_model, read_checkpoint, save_checkpoint
from convert import TorchvisionFasterRCNN, TorchvisionFCOS, TorchvisionRetinaNet
from defrcn import CLS_DROPOUT, ROI_GRAD_SCALE_BASE, DeFRCN
from faster_rcnn import FasterRCNN
from fcos import FCOS
from fsaf import FSAF
from weights import WeightsError

NAMES = ["a", "b", "c"]
# As train.py writes them; other keys of its arguments are left out.
ARGS = {"model": "fcos", "backbone": "resnet18", "caffe": False, "norm": "batch", "freeze_at": 0,
        "fpn_channels": 64, "original": False, "tower_bias": None, "torchvision": False,
        "fsaf_branch": "free", "ignore_scale": None, "decouple": True, "cosine": False, "rpn_grad_scale": 0.0,
        "roi_grad_scale": None, "pool_size": 4, "roi_samples": 32, "proposals": [200, 100], "stage": None,
        "fpn": True, "min_size": [128], "max_size": 128, "data": "shapes", "train_split": "train",
        "val_split": "val", "center_weights": True, "initial_distance": 0.0,
        **dict.fromkeys(("train_json", "train_images", "val_json", "val_images", "pad_to", "pcb_weights",
                         "shot_lists", "shots", "shot_seed", "generalized", "novel_classes",
                         *ABLATION_ARGS))}
RCNN = {"model": "faster_rcnn", "fpn": True, "decouple": False}
MODELS = {
    "fcos": (FCOS, {}),
    "fcos original": (FCOS, {"original": True}),
    "fcos caffe": (FCOS, {"caffe": True, "tower_bias": False}),
    "fcos torchvision": (TorchvisionFCOS, {"torchvision": True}),
    "fsaf": (FSAF, {"model": "fsaf"}),
    "fsaf joint": (FSAF, {"model": "fsaf", "fsaf_branch": "both"}),
    "fsaf anchor": (FSAF, {"model": "fsaf", "fsaf_branch": "anchor"}),
    "fsaf torchvision": (TorchvisionRetinaNet,
                         {"model": "fsaf", "fsaf_branch": "anchor", "torchvision": True}),
    "defrcn": (DeFRCN, {"model": "defrcn"}),
    "defrcn novel": (DeFRCN, {"model": "defrcn", "stage": "novel", "roi_grad_scale": 0.01}),
    "defrcn cosine": (DeFRCN, {"model": "defrcn", "cosine": True}),
    "faster_rcnn": (FasterRCNN, RCNN),
    "faster_rcnn c4": (FasterRCNN, {**RCNN, "fpn": False}),
    "faster_rcnn torchvision": (TorchvisionFasterRCNN, {**RCNN, "torchvision": True}),
    "faster_rcnn cosine": (FasterRCNN, {**RCNN, "cosine": True})}


def saved(path, args, names=NAMES, change=lambda state: None):
    """A checkpoint of a random model; gives the model."""
    torch.manual_seed(0)
    model = build_model(args, len(names)).eval()
    state = model.state_dict()
    change(state)
    save_checkpoint(path, {"model": state, "args": args, "names": names,
                           "category_ids": list(range(1, len(names) + 1)), "step": 5})
    return model


# ---------------------------------------------------------------------------- build, load

@pytest.mark.parametrize("case", MODELS)
def test_a_model_is_rebuilt_from_its_arguments(case, tmp_path):
    model_class, args = MODELS[case]
    model = saved(tmp_path / "last.pth", ARGS | args)
    loaded, info = load_model(tmp_path / "last.pth")
    assert type(model) is type(loaded) is model_class and not loaded.training
    assert info == {"args": ARGS | args, "names": NAMES, "category_ids": [1, 2, 3], "step": 5, "notes": [],
                    "named": True}
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_arguments_reach_the_model():
    base = build_model(ARGS | {"model": "defrcn"}, 3)
    assert base.roi_grad_scale == ROI_GRAD_SCALE_BASE and base.predictor.dropout.p == 0
    assert base.post_nms_top_k == (200, 100) and base.roi_samples == 32 and base.pool_size == 4
    assert all(p.requires_grad for p in base.backbone.layer4.parameters())
    novel = build_model(ARGS | {"model": "defrcn", "stage": "novel", "roi_grad_scale": 0.01}, 3)
    assert novel.roi_grad_scale == 0.01 and novel.predictor.dropout.p == CLS_DROPOUT
    assert not any(p.requires_grad for p in novel.backbone.layer4.parameters())
    assert build_model(ARGS | {"model": "fsaf", "fsaf_branch": "both"}, 3).joint
    assert build_model(ARGS | {"torchvision": True}, 3).score_threshold == 0.2
    assert build_model(ARGS | {"caffe": True}, 3).pixel_std.flatten().tolist() == [1, 1, 1]


def test_arguments_that_older_checkpoints_lack_have_defaults():
    older = {key: value for key, value in ARGS.items() if key not in ("tower_bias", "torchvision", "fpn")}
    assert build_model(older, 3).state_dict().keys() == build_model(ARGS, 3).state_dict().keys()


def test_class_names_can_be_replaced(tmp_path):
    saved(tmp_path / "c.pth", ARGS)
    assert load_model(tmp_path / "c.pth", classes=["x", "y", "z"])[1]["names"] == ["x", "y", "z"]
    with pytest.raises(WeightsError, match=r"--classes names 3 classes \(2 different\), .*c.pth has 3"):
        load_model(tmp_path / "c.pth", classes=["x", "y", "x"])


def set_nan(state):
    state["head.cls_logits.bias"][0] = float("nan")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    saved(tmp_path / "c.pth", ARGS, change=set_nan)
    with pytest.raises(WeightsError, match="1 tensors hold values that are not finite.*head.cls_logits.bias"):
        load_model(tmp_path / "c.pth")


def test_wrong_checkpoints_are_named(tmp_path):
    saved(tmp_path / "whole.pth", ARGS)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    content = torch.load(tmp_path / "whole.pth", weights_only=True)
    torch.save({**content, "args": ARGS | {"backbone": "resnet34"}}, tmp_path / "mixed.pth")
    torch.save({key: content[key] for key in ("model", "args", "names")}, tmp_path / "part.pth")
    for name, words in (("none.pth", "checkpoint .*none.pth does not exist"),
                        ("cut.pth", "cut.pth: cannot be read"),
                        ("mixed.pth", "mixed.pth: its weights do not fit the model .*layer1.2"),
                        ("part.pth", "part.pth: not a complete checkpoint .* it lacks category_ids, step")):
        with pytest.raises(WeightsError, match=words):
            load_model(tmp_path / name)


# ---------------------------------------------------------------------------- start from

def test_fine_tuning_replaces_the_class_scores_of_other_classes(tmp_path, capsys):
    old = saved(tmp_path / "old.pth", ARGS)
    checkpoint = read_checkpoint(tmp_path / "old.pth")
    new = build_model(ARGS, 2)
    before = new.head.cls_logits.weight.clone()
    load_init(new, checkpoint, ["x", "y"])
    assert "knows 3 other classes: new head.cls_logits.weight" in capsys.readouterr().out
    assert (torch.equal(new.head.cls_logits.weight, before)
            and torch.equal(new.head.ltrb.weight, old.head.ltrb.weight))
    same = build_model(ARGS, 3)
    load_init(same, checkpoint, NAMES)
    assert torch.equal(same.head.cls_logits.weight, old.head.cls_logits.weight)
    assert capsys.readouterr().out == ""
    with pytest.raises(WeightsError, match="old.pth: not this model .* backbone resnet18, .*fpn_channels 64"):
        load_init(build_model(ARGS | {"backbone": "resnet34"}, 2), checkpoint, ["x", "y"])


def test_the_anchor_branch_gets_new_class_scores_as_well(tmp_path):
    args = ARGS | {"model": "fsaf", "fsaf_branch": "both"}
    old = saved(tmp_path / "old.pth", args)
    new = build_model(args, 2)
    load_init(new, read_checkpoint(tmp_path / "old.pth"), ["x", "y"])
    assert torch.equal(new.head.anchor_deltas.weight, old.head.anchor_deltas.weight)
    assert new.head.anchor_logits.weight.shape[0] == 2 * 9


@pytest.mark.parametrize("model", ["defrcn", "faster_rcnn"])
def test_a_two_stage_detector_keeps_the_rows_of_common_classes(model, tmp_path, capsys):
    args = ARGS | {"model": model, "fpn": True, "decouple": model == "defrcn"}
    old = saved(tmp_path / "old.pth", args)
    checkpoint = read_checkpoint(tmp_path / "old.pth")
    new = build_model(args, 2)
    load_init(new, checkpoint, ["c", "x"])
    assert "keeps the rows of c, background, new are x" in capsys.readouterr().out
    rows, old_rows = new.predictor.cls_score.weight, old.predictor.cls_score.weight
    assert torch.equal(rows[0], old_rows[2]) and torch.equal(rows[2], old_rows[3])
    assert torch.equal(new.rpn.conv.weight, old.rpn.conv.weight)
    cosine = build_model(args | {"cosine": True}, 2)
    load_init(cosine, checkpoint, ["c", "x"])  # a cosine classifier has other weights: no row is kept
    assert "keeps the rows of none, new are c, x" in capsys.readouterr().out


# ---------------------------------------------------------------------------- save

def test_checkpoints_are_whole_or_absent(tmp_path):
    save_checkpoint(tmp_path / "c.pth", {"step": 1})

    class Unsaveable:
        def __reduce__(self):
            raise RuntimeError("in the middle of writing")

    with pytest.raises(OSError, match="c.pth cannot be written .*in the middle of writing"):
        save_checkpoint(tmp_path / "c.pth", {"weights": torch.zeros(1000), "step": Unsaveable()})
    assert torch.load(tmp_path / "c.pth", weights_only=True) == {"step": 1}


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    """RLIMIT_FSIZE stands for a full disk: a write beyond it fails half-way."""
    resource, signal = pytest.importorskip("resource"), pytest.importorskip("signal")
    path = tmp_path / "last.pth"
    save_checkpoint(path, {"step": 1})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        with pytest.raises(OSError, match="last.pth cannot be written .*too large.*; what was there before"):
            save_checkpoint(path, {"step": 2, "model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]

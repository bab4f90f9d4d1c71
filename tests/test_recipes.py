"""Which value an argument takes, and where it comes from."""
from pathlib import Path

import pytest
from conftest import write_checkpoint

import recipes
from checkpoint import read_checkpoint
from recipes import parse_args as parse
from recipes import resolve, voc_split_of
from train import make_schedule


def parse_args(words):
    return parse(words)[0]


def test_defaults_depend_on_the_data():
    shapes, coco, scratch = (parse_args([]), parse_args(["--data", "coco"]),
                             parse_args(["--data", "c", "--weights", "none"]))
    assert ((shapes.backbone, shapes.min_size, shapes.norm, shapes.freeze_at)
            == ("resnet18", [128], "batch", 0))
    assert ((coco.backbone, coco.weights, coco.min_size, coco.max_size)
            == ("resnet50", "resnet50", [800], 1333))
    assert (coco.norm, coco.freeze_at, coco.lr, coco.epochs) == ("frozen", 2, 0.01, None)
    assert (coco.optimizer, coco.weight_decay, coco.batch_size) == ("sgd", 1e-4, 16)
    # Random weights must not be frozen.
    assert (scratch.norm, scratch.freeze_at, scratch.optimizer) == ("batch", 0, "adamw")
    assert ((scratch.center_weights, scratch.initial_distance), (coco.center_weights, coco.initial_distance)
            ) == ((False, 1), (True, 0))
    original = parse_args(["--original"])  # exp in place of ReLU: no side can die
    assert (original.norm, original.center_weights, original.initial_distance) == ("batch", True, 0)
    fsaf = parse_args(["--data", "coco", "--model", "fsaf"])
    assert (fsaf.norm, fsaf.clip, coco.clip, fsaf.fsaf_branch, fsaf.out) == (
        "affine", 10, 35, "free", Path("runs/fsaf"))
    joint = parse_args(["--model", "fsaf", "--fsaf-joint"])
    assert (joint.fsaf_branch, joint.ignore_scale, fsaf.ignore_scale) == ("both", 0.5, 0.2)
    assert joint.out == Path("runs/fsaf_joint")
    files = parse_args(["--train-json", "a", "--train-images", "b", "--no-eval"])  # not the built-in set
    assert (files.backbone, files.min_size, files.batch_size) == ("resnet50", [800], 16)


def test_fcos_on_shapes_takes_bf16_where_the_device_has_it(monkeypatch):
    asked = []
    monkeypatch.setattr(recipes, "has_bf16", lambda device: asked.append(device) or True)

    def values(*words):
        args = parse_args([*words])
        return args.amp, args.min_size, args.max_size, args.epochs, args.max_steps
    assert values() == values("--device", "cpu", "--batch-size", "4") == ("bf16", [128], 171, 1.8, None)
    assert asked == ["auto", "cpu"]
    assert values("--amp", "off") == values("--epochs", "1.75") == ("off", [128], 128, 1.75, None)
    assert values("--max-steps", "9") == ("off", [128], 128, None, 9)
    for words in (("--model", "fsaf"), ("--data", "coco"), ("--max-size", "128"), ("--min-size", "96")):
        assert parse_args([*words]).amp == "off"


def test_a_layer_decides_and_is_named(tmp_path, capsys):
    """The command line wins over the checkpoint, this over the built-in set, this over the recipe."""
    write_checkpoint(tmp_path / "c.pth", "--original", lr=5.0)
    with pytest.raises(SystemExit) as stop:
        parse(["--init", str(tmp_path / "c.pth"), "--show-recipe", "--batch-size", "2"])
    assert not stop.value.code
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    for name, value, source in (("batch_size", "2", "command line"), ("original", "True", "c.pth"),
                                ("min_size", "[128]", "built-in shapes"), ("lr", "0.01", "recipe of fcos"),
                                ("clip", "35.0", "recipe of fcos"), ("amp", "off", "default"),
                                ("schedule_steps", "130000", "published")):
        assert f" {value} " in rows[name] and source in rows[name], rows[name]


def test_a_length_in_steps_replaces_one_in_epochs():
    steps, epochs = parse_args(["--max-steps", "5"]), parse_args(["--epochs", "2"])
    assert (steps.max_steps, steps.epochs) == (5, None) and (epochs.max_steps, epochs.epochs) == (None, 2)
    saved = {"path": "c.pth", "args": {"model": "fcos", "max_steps": 7, "epochs": None}}
    names = list(vars(steps))
    values, sources = resolve({"resume": "c.pth"}, saved, names)
    assert (values["max_steps"], values["epochs"], sources["max_steps"]) == (7, None, "c.pth")
    values, _ = resolve({"resume": "c.pth", "epochs": 3.0}, saved, names)
    assert (values["max_steps"], values["epochs"]) == (None, 3)


def test_a_run_of_an_older_version_goes_on_with_the_losses_it_began_with(tmp_path):
    """Its checkpoint does not name what random weights change by now."""
    write_checkpoint(tmp_path / "last.pth", leave_out=("center_weights", "initial_distance"))
    saved = read_checkpoint(tmp_path / "last.pth")
    values, _ = resolve({"resume": "last.pth"}, saved, list(vars(parse_args([]))))
    assert (values["norm"], values["center_weights"], values["initial_distance"]) == ("batch", True, 0)


def test_voc_data_change_the_few_shot_stages(tmp_path):
    (tmp_path / "VOC2007").mkdir()
    given = {"data": str(tmp_path), "model": "defrcn", "stage": "novel", "shots": 10, "init": "c.pth"}
    names = list(vars(parse_args([])))
    values, sources = resolve(given, None, names)
    assert (values["roi_grad_scale"], values["use_difficult"]) == (0.001, True)
    assert values["min_size"] == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800]
    assert resolve({**given, "stage": "base"}, None, names)[0]["warmup_steps"] == 100
    assert sources["roi_grad_scale"] == "published recipe, few-shot on VOC"
    assert (values["schedule_steps"], values["schedule_drops"]) == (4000, (3200,))
    values, _ = resolve({**given, "data": "coco"}, None, names)
    assert (values["roi_grad_scale"], values["use_difficult"]) == (0.01, False)


def test_the_novel_stage_goes_on_with_data_and_sizes_of_the_base_stage(tmp_path):
    (tmp_path / "VOC2007").mkdir()
    names = list(vars(parse_args([])))
    base = resolve({"data": str(tmp_path), "model": "defrcn", "stage": "base", "min_size": [300],
                    "voc_split": 2, "train_split": "2007_train"}, None, names)[0]
    checkpoint = {"path": "base.pth", "args": base}
    novel = {"model": "defrcn", "stage": "novel", "shots": 1, "init": "base.pth"}
    values, sources = resolve(novel, checkpoint, names)
    assert [values[key] for key in ("data", "train_split", "min_size", "voc_split")] == [
        str(tmp_path), "2007_train", [300], 2] and sources["min_size"] == "base.pth"
    assert values["roi_grad_scale"] == 0.001  # the recipe of the data that are taken over
    values, _ = resolve({**novel, "data": "coco", "min_size": [400]}, checkpoint, names)
    assert (values["data"], values["train_split"], values["min_size"]) == ("coco", "train2017", [400])
    values, _ = resolve({"model": "defrcn", "init": "base.pth"}, checkpoint, names)  # any other training
    assert values["data"] == "shapes" and values["min_size"] == [160]


def test_voc_data_name_the_split_of_an_init(tmp_path):
    (tmp_path / "VOC2007").mkdir()
    voc = {"data": str(tmp_path)}
    assert [voc_split_of(given) for given in ({}, voc, {**voc, "voc_split": 3}, {"voc_split": 2},
                                              {**voc, "train_json": "x"})] == [None, 1, 3, 2, None]


@pytest.mark.parametrize(("words", "message"), [
    (["--batch-size", "-2"], "--batch-size must be positive"), (["--lr", "0"], "--lr must be positive"),
    (["--backbone", "vgg"], "invalid choice: 'vgg'"), (["--epochs", "1", "--max-steps", "5"], "not both"),
    (["--clip", "-1"], "--clip must not be negative"), (["--lr", "nan"], "--lr must be positive"),
    (["--train-json", "a", "--train-images", "b"], "give --val-json"),
    (["--pad-to", "0", "9"], "--pad-to must be positive"),
    (["--pad-to", "128", "150"], "--pad-to must be multiples of 32"),
    (["--fpn-channels", "40"], "multiple of 64"), (["--freeze-at", "9"], "0..5"),
    (["--loss-scale", "big"], "'dynamic' or a positive number"),
    (["--min-size", "0"], "--min-size must be positive"),
    (["--model", "fsaf", "--original"], "--original is a form of FCOS"),
    (["--fsaf-joint"], "belong to --model fsaf"),
    (["--model", "fsaf", "--fsaf-branch", "anchor", "--ignore-scale", "0.5"], "anchor has none"),
    (["--model", "fsaf", "--ignore-scale", "0.1"], "--ignore-scale must be 0.2 (no ring) to 1, not 0.1")])
def test_wrong_arguments_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        parse_args(words)
    assert message in capsys.readouterr().err




def test_published_settings_by_stage(tmp_path):
    base = tmp_path / "base.pth"
    write_checkpoint(base, "--model", "defrcn", "--stage", "base")
    settings = ["--data", "coco", "--model", "defrcn"]
    first = parse_args([*settings, "--stage", "base", "--weights", "R.pkl"])
    assert (first.lr, first.weight_decay, first.freeze_at, first.clip, first.warmup_steps) == (
        0.02, 5e-5, 3, 0, 1000)
    assert first.min_size == [640, 672, 704, 736, 768, 800] and str(first.out) == "runs/defrcn_base"
    tuned = parse_args([*settings, "--stage", "novel", "--shots", "5", "--init", str(base)])
    assert (tuned.lr, tuned.warmup_steps, tuned.norm, tuned.backbone) == (0.01, 0, "frozen", "resnet18")
    plain = parse_args([*settings[:2], "--model", "faster_rcnn"])
    assert (plain.decouple, plain.freeze_at, plain.weight_decay) == (False, 2, 1e-4)


def test_the_two_forms_of_faster_rcnn_have_their_recipes(tmp_path):
    words = ["--data", "coco", "--model", "faster_rcnn"]
    fpn, c4 = parse_args(words), parse_args([*words, "--c4"])
    assert (fpn.fpn, fpn.pool_size, fpn.proposals, fpn.min_size) == (True, 7, [1000, 1000], [800])
    assert (fpn.lr, fpn.warmup_steps, fpn.warmup_factor, fpn.clip) == (0.02, 500, 1 / 3, 0.0)
    assert (c4.fpn, c4.pool_size, c4.proposals, c4.warmup_steps) == (False, 14, [2000, 1000], 1000)
    assert c4.min_size == [640, 672, 704, 736, 768, 800] and str(c4.out) == "runs/faster_rcnn_c4"
    tutorial = parse_args([*words, "--schedule", "tutorial", "--batch-size", "2"])
    schedule = make_schedule(tutorial, 1000)
    assert (schedule.max_steps, schedule.drops, schedule.base_lr) == (60_000, [30_000, 40_000], 0.0025)
    # A checkpoint of C4 from before the form with FPN does not name its form.
    write_checkpoint(tmp_path / "old.pth", "--model", "faster_rcnn", "--c4", leave_out=["fpn"])
    assert not parse_args([*words, "--init", str(tmp_path / "old.pth")]).fpn

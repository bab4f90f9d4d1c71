"""Weight files of every kind, valid, wrong or hostile: reading, downloading, filling a backbone."""
import builtins
import hashlib
import json
import os
import pickle
import re
import tempfile
import zlib
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from conftest import SHARED

from backbone import ARCHITECTURES, CAFFE_PIXELS, TORCHVISION_PIXELS, FixedStatsBatchNorm2d, ResNet
from defrcn import CalibrationNet
from weights import TORCHVISION_FILES, WeightsError, load_classifier, load_imagenet, read_weight_file

NORM_KINDS = ("weight", "bias", "running_mean", "running_var")


def on_meta(name, **options):
    """A backbone without memory: names and shapes only."""
    with torch.device("meta"):
        return ResNet(name, **options)


def blank(name, **options):
    """A backbone full of NaN: a tensor that the loader forgets stays visible."""
    model = on_meta(name, **options).to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(torch.nan if value.is_floating_point() else 0)
    return model


def is_norm(key):
    return bool(re.search(r"bn\d|downsample\.1", key))


@pytest.fixture
def folder():
    """Like tmp_path, but emptied at once: the weight files are large."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ---------------------------------------------------------------------------- valid files

def file_key_detectron(key, norms):
    """Detectron's blob name for a key of torchvision. norms: the endings for NORM_KINDS."""
    branches = {"conv1": "2a", "bn1": "2a", "conv2": "2b", "bn2": "2b", "conv3": "2c", "bn3": "2c",
                "downsample": "1"}
    ending = dict(zip(NORM_KINDS, norms))[key.split(".")[-1]] if is_norm(key) else "_w"
    if not key.startswith("layer"):
        return ("res_conv1" if is_norm(key) else "conv1") + ending
    stage, block, module = key.split(".")[:3]
    return f"res{int(stage[-1]) + 1}_{block}_branch{branches[module]}{ending}"


def file_key_detectron2(key):
    """detectron2's name for a key of torchvision, by the steps of detectron2's own converter."""
    key = key if key.startswith("layer") else "stem." + key
    for i in (4, 3, 2, 1):
        key = key.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


FUSED = ("_bn_s", "_bn_b")
UNFUSED = ("_bn_gamma", "_bn_beta", "_bn_running_mean", "_bn_running_var")
UNFUSED_SHORT = ("_bn_gamma", "_bn_beta", "_bn_rm", "_bn_riv")
FC = np.zeros((2, 2), np.float32)  # a classifier: it is never loaded, so it may be small


def random_weights(name):
    """{key of torchvision: array}, a different array for each key."""
    state = on_meta(name).state_dict()
    return {key: np.random.default_rng(zlib.crc32(key.encode())).standard_normal(value.shape, np.float32)
            for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.fixture
def weights50(monkeypatch):
    """Weights of a ResNet-50 with fewer blocks per stage: its file has 32 MB instead of 94."""
    monkeypatch.setitem(ARCHITECTURES, "resnet50", ((2, 1, 1, 1), True, 1, 64))
    return random_weights("resnet50")


def write(path, content):
    if path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return path


def tensors(arrays):
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def load(path, name="resnet50", **options):
    """(state_dict, pixels) after the file was read into a backbone full of NaN."""
    model = blank(name, **options)
    pixels = load_imagenet(model, str(path))
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, pixels


def assert_state(state, arrays, flipped):
    assert state.keys() == arrays.keys()
    for key, value in arrays.items():
        value = value[:, ::-1].copy() if flipped and key == "conv1.weight" else value  # BGR to RGB
        assert torch.equal(state[key], torch.from_numpy(value)), key


@pytest.mark.parametrize("norms", [UNFUSED, UNFUSED_SHORT])
def test_detectron_file_with_statistics(weights50, folder, norms):
    blobs = {file_key_detectron(key, norms): value for key, value in weights50.items()}
    extra = {"conv1_b": np.zeros(64), "res2_0_branch2a_b": np.zeros(64), "fc1000_w": FC,
             "conv1_w_momentum": np.zeros(3), "res_conv1_bn_gamma_momentum": np.zeros(3),
             "lr": np.float32(0.1)}
    state, pixels = load(write(folder / "R-50.pkl", {"blobs": {**blobs, **extra}}), caffe=True)
    assert_state(state, weights50, flipped=True)
    assert pixels == CAFFE_PIXELS


def test_detectron_file_with_fused_norms(weights50, folder):
    affine = {key: value for key, value in weights50.items() if "running" not in key}
    blobs = {file_key_detectron(key, FUSED): value for key, value in affine.items()}
    state, pixels = load(write(folder / "R-50.pkl", blobs), caffe=True)
    assert_state({key: state[key] for key in affine}, affine, flipped=True)
    assert pixels == CAFFE_PIXELS
    norm = FixedStatsBatchNorm2d(128)
    norm.load_state_dict({kind: state[f"layer2.0.bn2.{kind}"] for kind in NORM_KINDS}, strict=False)
    x = torch.randn(2, 128, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = x * norm.weight[:, None, None] + norm.bias[:, None, None]
    torch.testing.assert_close(norm(x), expected, rtol=0, atol=1e-6)
    for key in weights50.keys() - affine.keys():
        assert (state[key] == (0 if key.endswith("mean") else torch.tensor(1 - 1e-5))).all(), key


@pytest.mark.parametrize("name", ["R-50", "R-101"])
@pytest.mark.parametrize("norms, form", [(FUSED, "fused"), (UNFUSED, "unfused")])
def test_blob_names_are_those_of_the_published_files(name, norms, form):
    golden = SHARED / "golden/msra_mapping.json"
    if not golden.is_file():
        pytest.skip(f"{golden} is absent (set DETECTION_SHARED)")
    published = json.loads(golden.read_text())[f"{name}/{form}"]["model_key_from_c2"]
    published = {re.sub(r"^(backbone|roi_heads)\.", "", key): blob for key, blob in published.items()}
    ours = {file_key_detectron2(key): file_key_detectron(key, norms)
            for key in on_meta(name.replace("R-", "resnet")).state_dict()
            if not is_norm(key) or key.split(".")[-1] in NORM_KINDS[:len(norms)]}
    assert ours == published


@pytest.mark.parametrize("prefix", ["", "backbone.bottom_up."])
def test_detectron2_file(weights50, folder, prefix):
    content = {prefix + file_key_detectron2(key): value for key, value in weights50.items()}
    state, pixels = load(write(folder / "R-50.pkl", {"model": content, "__author__": "x"}), caffe=True)
    assert_state(state, weights50, flipped=True)
    assert pixels == CAFFE_PIXELS


def test_torchvision_file_in_detectron2s_format_stays_rgb(weights50, folder):
    content = {file_key_detectron2(key): value for key, value in {**weights50, "fc.weight": FC}.items()}
    state, pixels = load(write(folder / "r50.pkl", {"model": content, "__author__": "torchvision"}))
    assert_state(state, weights50, flipped=False)
    assert pixels == TORCHVISION_PIXELS


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "meta": {}}])
def test_mmdetection_caffe_file(weights50, folder, wrap):
    content = {**tensors(weights50), "conv1.bias": torch.zeros(64)}
    state, pixels = load(write(folder / "msra.pth", wrap(content)), caffe=True)
    assert_state(state, weights50, flipped=True)
    assert pixels == CAFFE_PIXELS


def test_torchvision_file(weights50, folder):
    content = tensors({**weights50, "fc.weight": FC, "fc.bias": FC[0]})
    state, pixels = load(write(folder / "r50.pth", content))
    assert_state(state, weights50, flipped=False)
    assert pixels == TORCHVISION_PIXELS


@pytest.mark.parametrize("name, flipped", [("resnext101_32x8d", True), ("resnext101_64x4d", False)])
def test_only_one_resnext_of_mmdetection_saw_bgr(folder, monkeypatch, name, flipped):
    monkeypatch.setitem(ARCHITECTURES, name, ((1, 1, 1, 1), *ARCHITECTURES[name][1:]))
    weights = random_weights(name)
    state, pixels = load(write(folder / "x101.pth", tensors(weights)), name)  # the file has no classifier
    assert_state(state, weights, flipped)
    assert pixels == TORCHVISION_PIXELS


def test_basic_blocks_have_no_caffe_style(folder):
    weights = random_weights("resnet18")
    path = write(folder / "r18.pth", tensors(weights))  # no classifier, as in mmdetection's caffe files
    for caffe in (False, True):
        state, pixels = load(path, "resnet18", caffe=caffe)
        assert_state(state, weights, flipped=False)
        assert pixels == TORCHVISION_PIXELS


@pytest.mark.parametrize("name, pixels", [("resnext101_32x8d", TORCHVISION_PIXELS),
                                          ("resnext101_64x4d", CAFFE_PIXELS)])
def test_detectron_resnext_is_bgr_with_the_stride_on_the_3x3(folder, monkeypatch, name, pixels):
    # One block per stage instead of up to 23: the file would have 350 MB.
    monkeypatch.setitem(ARCHITECTURES, name, ((1, 1, 1, 1), *ARCHITECTURES[name][1:]))
    weights = random_weights(name)
    blobs = {file_key_detectron(key, UNFUSED): value for key, value in weights.items()}
    state, found = load(write(folder / "X-101.pkl", blobs), name)
    assert_state(state, weights, flipped=True)
    assert found == pixels


def test_pickles_of_python2_and_of_every_protocol_are_read(folder):
    path, array = folder / "x.pkl", np.array([1, -2.5], np.float32)
    python2 = (b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
               b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xff"
               b"J\xff\xff\xff\xffK\x00tb\x89U\x08" + array.tobytes() + b"tbs.")
    protocols = range(2, pickle.HIGHEST_PROTOCOL + 1)
    for content in [python2, *(pickle.dumps({"conv1_w": array}, protocol) for protocol in protocols)]:
        path.write_bytes(content)
        assert read_weight_file(path)["conv1_w"].tolist() == [1.0, -2.5]


@pytest.fixture
def small101(monkeypatch):
    """Weights of a ResNet-101 with one block per stage."""
    monkeypatch.setitem(ARCHITECTURES, "resnet101", ((1, 1, 1, 1), True, 1, 64))
    return random_weights("resnet101")


def test_the_classifier_of_the_calibration_is_torchvisions(small101, folder):
    fc = {"fc.weight": torch.randn(1000, 2048), "fc.bias": torch.randn(1000)}
    net = CalibrationNet()
    load_classifier(net, str(write(folder / "r101.pth", tensors(small101) | fc)))
    for key, value in (tensors(small101) | fc).items():
        assert torch.equal(net.state_dict()[key if key in fc else f"backbone.{key}"], value), key


def test_a_classifier_that_is_another_network_is_refused(small101, folder):
    path = write(folder / "msra.pth", tensors(small101))  # without fc
    with pytest.raises(WeightsError, match=r"msra.pth: not torchvision's ResNet-101 \(.*fc.weight"):
        load_classifier(CalibrationNet(), str(path))
    with pytest.raises(WeightsError, match="--pcb-weights resnet50: the calibration needs a resnet101"):
        load_classifier(CalibrationNet(), "resnet50")


# ---------------------------------------------------------------------------- wrong files

CONV1 = np.zeros((64, 3, 7, 7), np.float32)


def sizeless(name):
    """Content of a torchvision file that takes no room: every tensor repeats one number."""
    state = on_meta(name).state_dict()
    return {key: torch.tensor(0.0).expand(state[key].shape) for key in state} | {"fc.weight": torch.zeros(1)}


@pytest.mark.parametrize("file, content, caffe, advice", [
    ("torchvision.pth", tensors({"conv1.weight": CONV1, "fc.weight": FC}), True, "pytorch.*drop --caffe"),
    ("mmdetection.pth", tensors({"conv1.weight": CONV1}), False, "caffe style.*add --caffe"),
    ("detectron.pkl", {"conv1_w": CONV1}, False, "caffe style.*add --caffe"),
    ("detectron2.pkl", {"model": {"stem.conv1.weight": CONV1}}, False, "caffe style.*add --caffe"),
    ("detectron2.pkl", {"stem.conv1.weight": CONV1, "stem.fc.weight": FC}, True, "pytorch.*drop --caffe")])
def test_wrong_stride_style_says_what_to_do(folder, file, content, caffe, advice):
    path = write(folder / file, content)
    with pytest.raises(WeightsError, match=f"{file}.*{advice}"):
        load_imagenet(blank("resnet50", caffe=caffe), str(path))


@pytest.mark.parametrize("file_of, network, complaint", [
    ("resnet18", "resnet34", r"[1-9]\d* keys missing \['layer1.2"),
    ("resnet34", "resnet18", r"[1-9]\d* unknown \['layer1.2"),
    ("resnet18", "resnet50", r"another shape \['layer1.0.conv1.weight \(64, 64, 3, 3\) for \(64, 64, 1, 1\)"),
    ("resnext101_32x8d", "resnext101_64x4d", r" 0 keys missing .* 0 unknown .* [1-9]\d* of another shape")])
def test_weights_of_another_architecture_are_refused(folder, file_of, network, complaint):
    path = write(folder / "weights.pth", sizeless(file_of))
    with pytest.raises(WeightsError, match=f"does not fit {network}.*{complaint}"):
        load_imagenet(on_meta(network), str(path))


@pytest.mark.parametrize("file, content, complaint", [
    ("vgg.pth", {"features.0.weight": torch.zeros(2)}, "not an ImageNet ResNet.*features.0.weight"),
    ("list.pth", [torch.zeros(2)], "holds a list"),
    ("head.pkl", {"fc6_w": FC}, r"does not fit resnet18: [1-9]\d* keys missing"),
    ("words.pkl", {"stem.conv1.weight": np.array(["a"])}, "refused dtype 'U1'")])
def test_files_without_a_backbone_are_refused(folder, file, content, complaint):
    with pytest.raises(WeightsError, match=f"{file}.*{complaint}"):
        load_imagenet(blank("resnet18"), str(write(folder / file, content)))


def test_missing_file_names_the_choices(folder):
    with pytest.raises(WeightsError, match="gone.pth does not exist.*resnet18, .*resnext101_64x4d"):
        load_imagenet(blank("resnet18"), str(folder / "gone.pth"))


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_truncated_file_is_refused_by_name(folder, suffix, part):
    path = write(folder / f"half{suffix}", tensors({"conv1.weight": CONV1}) if suffix == ".pth" else
                 {"conv1_w": CONV1})
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(WeightsError, match=rf"half{suffix}: cannot be read as weights \(\w+"):
        load_imagenet(blank("resnet18"), str(path))


class Attack:
    """Calls a function when it is unpickled without care."""

    def __init__(self, function, argument):
        self.call = function, (argument,)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize("function, argument", [(os.system, "echo > '{}'"),
                                                (builtins.eval, "open('{}', 'w')")])
def test_hostile_file_is_refused_and_runs_nothing(folder, suffix, function, argument):
    trace = folder / "trace"
    path = write(folder / f"weights{suffix}", {"conv1.weight": Attack(function, argument.format(trace))})
    if suffix == ".pkl":  # the attack is real: careless reading runs it
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    trace.unlink()
    with pytest.raises(WeightsError, match="cannot be read as weights"):
        load_imagenet(blank("resnet18"), str(path))
    assert not trace.exists()


def test_a_hostile_file_cannot_hide_behind_getattr(folder):
    """A file may name getattr, but what it would fetch is never called: here os.system through a module."""
    class Fetch:
        def __reduce__(self):
            return getattr, (os, "system")

    class Run:
        def __reduce__(self):
            return builtins.getattr, (Fetch(), "__call__")

    trace, path = folder / "trace", folder / "x.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": [Attack(np.fromfile, str(trace))]}, path)
    assert read_weight_file(path)["a"].tolist() == [0.0]  # numpy.fromfile was named, and not called
    with pytest.raises((WeightsError, pickle.PicklingError, TypeError)):
        torch.save({"meta": Run()}, path)
        read_weight_file(path)


# ---------------------------------------------------------------------------- downloads

@pytest.fixture
def cached(folder, monkeypatch):
    """Path of torchvision's ResNet-18 in an empty cache; every download fails, as without internet."""
    def fail(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    (folder / "checkpoints").mkdir()
    return folder / "checkpoints/resnet18-f37072fd.pth"


def test_failed_download_names_the_url_and_the_place(cached):
    with pytest.raises(WeightsError) as error:
        load_imagenet(blank("resnet18"), "resnet18")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(error.value)
    assert f"put it at {cached}" in str(error.value) and "no route to host" in str(error.value)
    assert "or give --weights FILE, or --weights none" in str(error.value)
    with pytest.raises(WeightsError, match="resnet101-.*or give --pcb-weights FILE, or --pcb-weights none"):
        load_classifier(torch.nn.Module(), "resnet101")


def test_damaged_download_is_refused_by_its_checksum(cached):
    write(cached, sizeless("resnet18"))  # it can be read and it fits, but it is not the published file
    with pytest.raises(WeightsError, match=f"{cached}: damaged .*not f37072fd.*; delete it"):
        load_imagenet(blank("resnet18"), "resnet18")


def test_a_valid_file_in_the_cache_needs_no_internet(cached, monkeypatch):
    weights = random_weights("resnet18")
    write(cached, {**tensors(weights), "fc.weight": torch.zeros(1)})
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()[:8]
    cached.rename(cached.with_name(f"resnet18-{digest}.pth"))
    monkeypatch.setitem(TORCHVISION_FILES, "resnet18", f"resnet18-{digest}.pth")
    state, pixels = load("resnet18", "resnet18")
    assert_state(state, weights, flipped=False)
    assert pixels == TORCHVISION_PIXELS


def test_named_weights_of_another_architecture_are_refused(cached):
    with pytest.raises(WeightsError, match="resnet34 does not fit the backbone resnet18"):
        load_imagenet(blank("resnet18"), "resnet34")

"""Networks against torchvision and hand-made sums; weight files of every kind, sound, wrong or hostile."""
import builtins
import copy
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
from torch import nn

import backbone
from backbone import CAFFE_PIXELS, FPN, TORCHVISION_PIXELS, FixedStatsBatchNorm2d, ResNet, WeightsError

NORM_KINDS = ("weight", "bias", "running_mean", "running_var")


def on_meta(name, **options):
    """A backbone without memory: names, shapes and `requires_grad` only."""
    with torch.device("meta"):
        return ResNet(name, **options)


def blank(name, **options):
    """A backbone full of NaN: what a loader forgets stays visible."""
    model = on_meta(name, **options).to_empty(device="cpu")
    for value in model.state_dict().values():
        value.fill_(torch.nan if value.is_floating_point() else 0)
    return model


def torchvision_resnet(name, **options):
    return getattr(pytest.importorskip("torchvision.models"), name)(weights=None, **options)


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def is_norm(key):
    return bool(re.search(r"bn\d|downsample\.1", key))


@pytest.fixture
def folder():
    """Like tmp_path, but emptied at once: the weight files are large."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


# ---------------------------------------------------------------------------------------------- ResNet

@pytest.mark.parametrize("name", backbone.ARCHITECTURES)
def test_keys_and_shapes_are_torchvisions(name):
    with torch.device("meta"):
        theirs = shapes(torchvision_resnet(name).state_dict())
    del theirs["fc.weight"], theirs["fc.bias"]
    for norm in ("frozen", "batch"):
        assert shapes(on_meta(name, norm=norm).state_dict()) == theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions(name):
    with torch.device("meta"):
        theirs = torchvision_resnet(name).eval()
    theirs.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for value in theirs.state_dict().values():
        if value.ndim > 1:
            nn.init.kaiming_normal_(value, generator=generator)
        elif value.is_floating_point():  # fresh statistics of 0 and 1 would hide a mistake
            value.uniform_(0.5, 1.0, generator=generator)
    ours = blank(name).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")})

    images = torch.randn(2, 3, 64, 96, generator=generator)
    with torch.no_grad():
        features = ours(images)
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(images))))
        for i in range(4):
            x = getattr(theirs, f"layer{i + 1}")(x)
            torch.testing.assert_close(features[i], x, rtol=0, atol=1e-5 * x.abs().max().item())
            assert features[i].shape[1] == ours.out_channels[i]


@pytest.mark.parametrize("caffe, strides", [(False, (1, 2)), (True, (2, 1))])
def test_caffe_style_moves_the_stride_to_conv1(caffe, strides):
    model = on_meta("resnet50", caffe=caffe)
    for stage in (model.layer2, model.layer3, model.layer4):
        assert (stage[0].conv1.stride[0], stage[0].conv2.stride[0]) == strides
        assert stage[1].conv1.stride == stage[1].conv2.stride == (1, 1)
    features = model(torch.empty(1, 3, 65, 97, device="meta"))
    assert [tuple(f.shape[1:]) for f in features] == [  # 65 / 4, / 8, / 16, / 32, rounded up; 97 likewise
        (256, 17, 25), (512, 9, 13), (1024, 5, 7), (2048, 3, 4)]


@pytest.mark.parametrize("options, words", [
    ({"name": "resnet51"}, "unknown backbone 'resnet51'.*resnet18, .*resnext101_64x4d"),
    ({"name": "resnet18", "norm": "sync"}, "unknown norm 'sync'; choose frozen, affine or batch")])
def test_unknown_names_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        ResNet(**options)


@pytest.mark.parametrize("norm", ["frozen", "affine", "batch"])
@pytest.mark.parametrize("freeze_at", range(6))
def test_exactly_the_wanted_parameters_train(norm, freeze_at):
    stages = [("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",)]
    trainable = tuple(prefix for stage in stages[freeze_at:] for prefix in stage)
    for name, parameter in on_meta("resnet50", norm=norm, freeze_at=freeze_at).named_parameters():
        wanted = name.startswith(trainable) and not (norm == "frozen" and is_norm(name))
        assert parameter.requires_grad == wanted, name


@pytest.mark.parametrize("norm, updates", [("frozen", False), ("affine", False), ("batch", True)])
def test_only_batch_norm_mode_updates_statistics(norm, updates):
    model = ResNet("resnet18", norm=norm)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fresh = model(images)  # a new module is in training mode, whether train() was called or not
    trained = model.train()(images)
    statistics = [key for key in before if "running" in key or "tracked" in key]
    assert len(statistics) == 3 * 20
    for key in statistics:
        assert torch.equal(before[key], model.state_dict()[key]) != updates, key
    for features in (fresh, trained):
        assert torch.equal(features[-1], model.eval()(images)[-1]) != updates


# ---------------------------------------------------------------------------------------------- FPN

def simple_fpn(**options):
    """One channel; every convolution copies its input (the centre weight is 1)."""
    fpn = FPN([1, 1, 1], channels=1, **options)
    for conv in fpn.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.dirac_(conv.weight)
    return fpn


def test_fpn_shapes_for_an_odd_image():
    with torch.device("meta"):
        network, fpn = ResNet("resnet18"), FPN([128, 256, 512], channels=32)
        levels = fpn(network(torch.empty(2, 3, 201, 333))[1:])
    assert [tuple(level.shape) for level in levels] == [  # 201 / 8 = 25.1, 333 / 8 = 41.6, then halves, up
        (2, 32, 26, 42), (2, 32, 13, 21), (2, 32, 7, 11), (2, 32, 4, 6), (2, 32, 2, 3)]


def test_fpn_adds_the_upsampled_coarser_level():
    c4 = torch.tensor([[[[1., 2.], [3., 4.]]]])
    p3, p4, p5, _, _ = simple_fpn()([torch.zeros(1, 1, 3, 3), c4, torch.full((1, 1, 1, 1), 10.0)])
    assert p5.tolist() == [[[[10.0]]]]
    assert p4[0, 0].tolist() == [[11.0, 12.0], [13.0, 14.0]]
    # Nearest cell of 2 for each of 3: 0 * 2/3 -> 0, 1 * 2/3 -> 0, 2 * 2/3 -> 1.
    assert p3[0, 0].tolist() == [[11.0, 11.0, 12.0], [11.0, 11.0, 12.0], [13.0, 13.0, 14.0]]


@pytest.mark.parametrize("p6_from, p6", [("p5", 6.0), ("c5", 5.0)])
def test_p6_starts_from_the_chosen_level(p6_from, p6):
    fpn = simple_fpn(p6_from=p6_from)
    fpn.output[2].bias.data.fill_(1)  # P5 = C5 + 1
    c5 = torch.full((1, 1, 1, 1), 5.0)
    assert fpn([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2), c5])[3].item() == p6


@pytest.mark.parametrize("relu, p7", [(True, 0.5), (False, -1.5)])
def test_relu_before_p7_drops_what_is_negative_in_p6(relu, p7):
    fpn = simple_fpn(relu_before_p7=relu)
    fpn.p7.bias.data.fill_(0.5)  # P6 = C5 = -2; P7 = max(-2, 0) + 0.5 or -2 + 0.5
    levels = fpn([torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 2, 2), torch.full((1, 1, 1, 1), -2.0)])
    assert levels[3].item() == -2.0 and levels[4].item() == p7


def test_fpn_is_torchvisions():
    theirs_ops = pytest.importorskip("torchvision.ops.feature_pyramid_network")
    ours = FPN([3, 4, 5], channels=6, p6_from="c5")
    theirs = theirs_ops.FeaturePyramidNetwork([3, 4, 5], 6, theirs_ops.LastLevelP6P7(5, 6))
    renamed = {}
    for key, value in ours.state_dict().items():
        key = re.sub(r"lateral\.(\d)", r"inner_blocks.\1.0", re.sub(r"^p(\d)", r"extra_blocks.p\1", key))
        renamed[re.sub(r"output\.(\d)", r"layer_blocks.\1.0", key)] = value
    theirs.load_state_dict(renamed)
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(2, c, h, w, generator=generator)
                for c, h, w in [(3, 13, 18), (4, 7, 9), (5, 4, 5)]]
    for our_level, their_level in zip(ours(features), theirs(dict(enumerate(features))).values()):
        torch.testing.assert_close(our_level, their_level)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalised_images_are_zero_outside(dtype):
    images = torch.full((2, 3, 3, 4), 100, dtype=dtype)
    mean, std = torch.tensor([100., 90., 0.]).view(3, 1, 1), torch.tensor([1., 5., 50.]).view(3, 1, 1)
    result = backbone.normalise_images(images, torch.tensor([[2, 4], [3, 1]]), mean, std)
    inside = torch.zeros(2, 1, 3, 4)
    inside[0, :, :2, :] = inside[1, :, :, :1] = 1
    # (100 - 100) / 1, (100 - 90) / 5, (100 - 0) / 50
    assert result.dtype == torch.float32
    assert torch.equal(result, inside * torch.tensor([0., 2., 2.]).view(3, 1, 1))


# ---------------------------------------------------------------------- weight files that are right

def file_key_detectron(key, norms):
    """Detectron's blob of one of torchvision's names; norms: its endings for NORM_KINDS."""
    branches = {"conv1": "2a", "bn1": "2a", "conv2": "2b", "bn2": "2b", "conv3": "2c", "bn3": "2c",
                "downsample": "1"}
    ending = dict(zip(NORM_KINDS, norms))[key.split(".")[-1]] if is_norm(key) else "_w"
    if not key.startswith("layer"):
        return ("res_conv1" if is_norm(key) else "conv1") + ending
    stage, block, module = key.split(".")[:3]
    return f"res{int(stage[-1]) + 1}_{block}_branch{branches[module]}{ending}"


def file_key_detectron2(key):
    """detectron2's name, by the steps of its own converter of torchvision files."""
    key = key if key.startswith("layer") else "stem." + key
    for i in (4, 3, 2, 1):
        key = key.replace(f"layer{i}", f"res{i + 1}").replace(f"bn{i}", f"conv{i}.norm")
    return key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


FUSED = ("_bn_s", "_bn_b")
UNFUSED = ("_bn_gamma", "_bn_beta", "_bn_running_mean", "_bn_running_var")
UNFUSED_SHORT = ("_bn_gamma", "_bn_beta", "_bn_rm", "_bn_riv")
FC = np.zeros((2, 2), np.float32)  # a classifier: never loaded, so its size is free


def random_weights(name):
    """torchvision key -> array, another one for each key."""
    state = on_meta(name).state_dict()
    return {key: np.random.default_rng(zlib.crc32(key.encode())).standard_normal(value.shape, np.float32)
            for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.fixture
def weights50(monkeypatch):
    """For a ResNet-50 with fewer blocks per stage, so that its file has 32 MB instead of 94."""
    monkeypatch.setitem(backbone.ARCHITECTURES, "resnet50", ((2, 1, 1, 1), True, 1, 64))
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
    """(state dict, pixels) after reading the file into a backbone full of NaN."""
    model = blank(name, **options)
    pixels = backbone.load_imagenet(model, str(path))
    return {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}, pixels


def assert_state(state, arrays, flipped):
    assert state.keys() == arrays.keys()
    for key, value in arrays.items():
        value = value[:, ::-1].copy() if flipped and key == "conv1.weight" else value  # BGR to RGB
        assert torch.equal(state[key], torch.from_numpy(value)), key


@pytest.mark.parametrize("norms", [UNFUSED, UNFUSED_SHORT])
def test_detectron_file_with_statistics(weights50, folder, norms):
    blobs = {file_key_detectron(key, norms): value for key, value in weights50.items()}
    extra = {"conv1_b": np.zeros(64), "fc1000_w": FC, "conv1_w_momentum": np.zeros(3),
             "res_conv1_bn_gamma_momentum": np.zeros(3), "lr": np.float32(0.1)}
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


def test_basic_blocks_have_no_caffe_style(folder):
    weights = random_weights("resnet18")
    path = write(folder / "r18.pth", tensors(weights))  # without classifier, like mmdetection's caffe files
    for caffe in (False, True):
        state, pixels = load(path, "resnet18", caffe=caffe)
        assert_state(state, weights, flipped=False)
        assert pixels == TORCHVISION_PIXELS


@pytest.mark.parametrize("name, pixels", [("resnext101_32x8d", TORCHVISION_PIXELS),
                                          ("resnext101_64x4d", CAFFE_PIXELS)])
def test_detectron_resnext_is_bgr_with_the_stride_on_the_3x3(folder, monkeypatch, name, pixels):
    # One block per stage instead of up to 23: the file would have 350 MB.
    monkeypatch.setitem(backbone.ARCHITECTURES, name, ((1, 1, 1, 1), *backbone.ARCHITECTURES[name][1:]))
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
        assert backbone.read_weight_file(path)["conv1_w"].tolist() == [1.0, -2.5]


@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_in_its_convolution_is_the_norm_after_it(trained):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), FixedStatsBatchNorm2d(6)
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    norm.requires_grad_(trained)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    inputs = [x, conv.weight, *(norm.parameters() if trained else ())]
    together, apart = backbone.conv_norm(x, conv, norm), norm(conv(x))
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(apart)
    for one, two in zip(torch.autograd.grad((together * weight).sum(), inputs),
                        torch.autograd.grad((apart * weight).sum(), inputs)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------- weight files that are wrong

CONV1 = np.zeros((64, 3, 7, 7), np.float32)


def sizeless(name):
    """A torchvision file's content that takes no room: every tensor repeats one number."""
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
        backbone.load_imagenet(blank("resnet50", caffe=caffe), str(path))


@pytest.mark.parametrize("file_of, network, complaint", [
    ("resnet18", "resnet34", r"[1-9]\d* keys missing \['layer1.2"),
    ("resnet34", "resnet18", r"[1-9]\d* unknown \['layer1.2"),
    ("resnet18", "resnet50", r"another shape \['layer1.0.conv1.weight \(64, 64, 3, 3\) for \(64, 64, 1, 1\)"),
    ("resnext101_32x8d", "resnext101_64x4d", r" 0 keys missing .* 0 unknown .* [1-9]\d* of another shape")])
def test_weights_of_another_architecture_are_refused(folder, file_of, network, complaint):
    path = write(folder / "weights.pth", sizeless(file_of))
    with pytest.raises(WeightsError, match=f"does not fit {network}.*{complaint}"):
        backbone.load_imagenet(on_meta(network), str(path))


@pytest.mark.parametrize("file, content, complaint", [
    ("vgg.pth", {"features.0.weight": torch.zeros(2)}, "not an ImageNet ResNet.*features.0.weight"),
    ("list.pth", [torch.zeros(2)], "holds a list"),
    ("head.pkl", {"fc6_w": FC}, r"does not fit resnet18: [1-9]\d* keys missing"),
    ("words.pkl", {"stem.conv1.weight": np.array(["a"])}, "not an ImageNet ResNet")])
def test_files_that_are_no_backbone_are_refused(folder, file, content, complaint):
    with pytest.raises(WeightsError, match=f"{file}.*{complaint}"):
        backbone.load_imagenet(blank("resnet18"), str(write(folder / file, content)))


def test_missing_file_names_the_choices(folder):
    with pytest.raises(WeightsError, match="gone.pth does not exist.*resnet18, .*resnext101_64x4d"):
        backbone.load_imagenet(blank("resnet18"), str(folder / "gone.pth"))


@pytest.mark.parametrize("part", [0, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_truncated_file_is_refused_by_name(folder, suffix, part):
    path = write(folder / f"half{suffix}", tensors({"conv1.weight": CONV1}) if suffix == ".pth" else
                 {"conv1_w": CONV1})
    path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])
    with pytest.raises(WeightsError, match=rf"half{suffix}: cannot be read as weights \(\w+"):
        backbone.load_imagenet(blank("resnet18"), str(path))


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
        backbone.load_imagenet(blank("resnet18"), str(path))
    assert not trace.exists()


# -------------------------------------------------------------------------------------------- download

@pytest.fixture
def cached(folder, monkeypatch):
    """Path of torchvision's ResNet-18 in an empty cache; every download fails as without internet."""
    def fail(*args, **options):
        raise URLError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folder))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    (folder / "checkpoints").mkdir()
    return folder / "checkpoints/resnet18-f37072fd.pth"


def test_failed_download_names_the_url_and_the_place(cached):
    with pytest.raises(WeightsError) as error:
        backbone.load_imagenet(blank("resnet18"), "resnet18")
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in str(error.value)
    assert f"put it at {cached}" in str(error.value) and "no route to host" in str(error.value)


def test_damaged_download_is_refused_by_its_checksum(cached):
    write(cached, sizeless("resnet18"))  # readable and fitting, but not the published file
    with pytest.raises(WeightsError, match=f"{cached}: damaged .*not f37072fd.*; delete it"):
        backbone.load_imagenet(blank("resnet18"), "resnet18")


def test_sound_file_in_the_cache_needs_no_internet(cached, monkeypatch):
    weights = random_weights("resnet18")
    write(cached, {**tensors(weights), "fc.weight": torch.zeros(1)})
    digest = hashlib.sha256(cached.read_bytes()).hexdigest()[:8]
    cached.rename(cached.with_name(f"resnet18-{digest}.pth"))
    monkeypatch.setitem(backbone.TORCHVISION_FILES, "resnet18", f"resnet18-{digest}.pth")
    state, pixels = load("resnet18", "resnet18")
    assert_state(state, weights, flipped=False)
    assert pixels == TORCHVISION_PIXELS


def test_named_weights_of_another_architecture_are_refused(cached):
    with pytest.raises(WeightsError, match="resnet34 does not fit the backbone resnet18"):
        backbone.load_imagenet(blank("resnet18"), "resnet34")

"""ResNet, FPN and the normalising of images against torchvision and sums by hand."""
import copy
import re

import pytest
import torch
from torch import nn

from backbone import ARCHITECTURES, FPN, FixedStatsBatchNorm2d, ResNet, conv_bn, fold_norms, normalise_images


def on_meta(name, **options):
    """A backbone without memory: names, shapes and `requires_grad` only."""
    with torch.device("meta"):
        return ResNet(name, **options)


def torchvision_resnet(name):
    """torchvision's network without memory."""
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        return getattr(models, name)(weights=None)


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


# ---------------------------------------------------------------------------------------------- ResNet

@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keys_and_shapes_are_torchvisions(name):
    theirs = shapes(torchvision_resnet(name).state_dict())
    del theirs["fc.weight"], theirs["fc.bias"]
    for norm in ("frozen", "batch"):
        assert shapes(on_meta(name, norm=norm).state_dict()) == theirs


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_torchvisions(name):
    theirs = torchvision_resnet(name).eval().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for value in theirs.state_dict().values():
        if value.ndim > 1:
            nn.init.kaiming_normal_(value, generator=generator)
        elif value.is_floating_point():  # fresh statistics of 0 and 1 would hide a mistake
            value.uniform_(0.5, 1.0, generator=generator)
    ours = on_meta(name).to_empty(device="cpu").eval()
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
    assert [tuple(f.shape[1:]) for f in features] == [  # 65 and 97, each / 4, / 8, / 16, / 32, rounded up
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
        is_norm = re.search(r"bn\d|downsample\.1", name)
        wanted = name.startswith(trainable) and not (norm == "frozen" and is_norm)
        assert parameter.requires_grad == wanted, name


@pytest.mark.parametrize("norm, updates", [("frozen", False), ("affine", False), ("batch", True)])
def test_only_batch_norm_mode_updates_statistics(norm, updates):
    model = ResNet("resnet18", norm=norm)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    fresh = model(images)  # a new module is in training mode without a call of train()
    trained = model.train()(images)
    statistics = [key for key in before if "running" in key or "tracked" in key]
    assert len(statistics) == 3 * 20
    for key in statistics:
        assert torch.equal(before[key], model.state_dict()[key]) != updates, key
    for features in (fresh, trained):
        assert torch.equal(features[-1], model.eval()(images)[-1]) != updates


@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_folded_into_its_convolution_is_the_norm_after_it(trained):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(4, 6, 3, 2, 1, groups=2, bias=False), FixedStatsBatchNorm2d(6)
    for value in norm.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5)
    norm.requires_grad_(trained)
    x = torch.randn(2, 4, 9, 8, requires_grad=True)
    inputs = [x, conv.weight, *(norm.parameters() if trained else ())]
    folded, separate = conv_bn(x, conv, norm, fold_norms(norm)), norm(conv(x))
    torch.testing.assert_close(folded, separate, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(separate)
    for one, two in zip(torch.autograd.grad((folded * weight).sum(), inputs),
                        torch.autograd.grad((separate * weight).sum(), inputs)):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


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
    assert [tuple(level.shape) for level in levels] == [  # 201 / 8 and 333 / 8, then halves, rounded up
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
def test_relu_before_p7_removes_negative_values_of_p6(relu, p7):
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


def test_normalised_images_are_zero_outside():
    images = torch.full((2, 3, 3, 4), 100, dtype=torch.uint8)
    mean, std = torch.tensor([100., 90., 0.]).view(3, 1, 1), torch.tensor([1., 5., 50.]).view(3, 1, 1)
    result = normalise_images(images, torch.tensor([[2, 4], [3, 1]]), mean, std)
    inside = torch.zeros(2, 1, 3, 4)
    inside[0, :, :2, :] = inside[1, :, :, :1] = 1
    # (100 - 100) / 1, (100 - 90) / 5, (100 - 0) / 50
    assert result.dtype == torch.float32
    assert torch.equal(result, inside * torch.tensor([0., 2., 2.]).view(3, 1, 1))
    for wrong, sizes in ((images / 255, [[3, 4]] * 2), (images[0], [[3, 4]]), (images[:, :1], [[3, 4]] * 2),
                         (images, [3, 4])):
        with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\) uint8, RGB in 0..255"):
            normalise_images(wrong, torch.tensor(sizes), mean, std)

"""Weight files: safe reading, downloads from torchvision, ImageNet weights for a backbone.

Backbones have torchvision's names (`layer1.0.conv1.weight`) and see RGB. Other files are renamed here. Where
they were trained on BGR, the input channels of the first convolution are flipped, once.
"""
import hashlib
import os
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from backbone import ARCHITECTURES, BN_EPS, CAFFE_PIXELS, TORCHVISION_PIXELS, ResNet
from runtime import UserError, blame, refuse_special
from safe_pickle import read_pickle

# torchvision's IMAGENET1K_V1 files, from which the published detection recipes start. Each name ends in the
# first 8 digits of the file's SHA-256.
TORCHVISION_URL = "https://download.pytorch.org/models/"
TORCHVISION_FILES = {
    "resnet18": "resnet18-f37072fd.pth",
    "resnet34": "resnet34-b627a593.pth",
    "resnet50": "resnet50-0676ba61.pth",
    "resnet101": "resnet101-63fe2227.pth",
    "resnet152": "resnet152-394f9c45.pth",
    "resnext101_32x8d": "resnext101_32x8d-8ba56ff5.pth",
    "resnext101_64x4d": "resnext101_64x4d-173b62eb.pth",
}

# Beside its tensors a file may hold objects of these modules (a log, a config). They are read as empty
# objects and never called. getattr is how pickle refers to a method of such an object.
FOREIGN_MODULES = ("mmengine.", "mmcv.", "mmdet.", "numpy.", "yacs.", "fvcore.", "argparse.Namespace",
                   "builtins.getattr", "__builtin__.getattr")

# Detectron's blob names to detectron2's: rules of `rename_keys` for the endings, then for the layers.
BLOB_ENDINGS = [(r"_w$", ".weight"), (r"_bn_(s|gamma)$", ".norm.weight"), (r"_bn_(b|beta)$", ".norm.bias"),
                (r"_bn_(running_mean|rm)$", ".norm.running_mean"),
                (r"_bn_(running_var|riv)$", ".norm.running_var")]
BLOB_LAYERS = [(r"^(res_)?conv1\.", "stem.conv1."), (r"^res(\d)_(\d+)_branch1\.", r"res\1.\2.shortcut."),
               (r"^res(\d)_(\d+)_branch2([abc])\.", lambda m: f"res{m[1]}.{m[2]}.conv{' abc'.index(m[3])}.")]


class WeightsError(UserError):
    """A weight file is missing, damaged, or not what the model needs. The message says what to do."""


# ---------------------------------------------------------------------------------------------- any file

def read_weight_file(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a `.pth` or Detectron `.pkl` file. Raises WeightsError that names the file."""
    return extract_state_dict(read_file(path), path)


def read_file(path: str | Path):
    """Content of a `.pth` or `.pkl` file. Raises WeightsError that names the file.

    Nothing in the file is executed: `.pth` files are read with weights_only, `.pkl` files by safe_pickle.py.
    A file takes at most about three times its size in memory.
    """
    try:
        refuse_special(path)
        if str(path).endswith(".pkl"):
            return read_pickle(path)
        _refuse_damaged_archive(path)
        with torch.serialization.safe_globals(_inert_globals(path)):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The type comes first because some errors have no message (EOFError of an empty file).
        reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0]
        reason += "; the file is empty, cut off, or not written by torch.save"
        code = re.search(r"(?:GLOBAL|refused to load) (\S+)", str(error))
        if code:
            reason = f"it holds {code[1]}, which is code: save the state_dict() of the model instead"
        raise WeightsError(f"{path}: cannot be read as weights ({reason})") from error


def _refuse_damaged_archive(path: str | Path):
    """Raises ValueError for a .pth file with flipped bits, or one whose content is larger than the file.

    torch.save writes a zip archive without compression and with checksums; torch.load does not look at them.
    """
    if not zipfile.is_zipfile(path):  # the format of torch before 1.6
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
                or sum(entry.file_size for entry in entries) > os.path.getsize(path)):
            raise ValueError("it is compressed or holds more than its size")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"damaged: the checksum of {damaged} does not fit its content")


class _Inert:
    """Takes the place of another code base's object. It keeps nothing."""

    def __new__(cls, *_):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


def _inert_globals(path: str | Path) -> list[tuple[type, str]]:
    """Classes and functions of FOREIGN_MODULES that a file names, each to be read as `_Inert`."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):  # the format of torch before 1.6, or no file of torch
        return []
    return [(_Inert, name) for name in names if name.startswith(FOREIGN_MODULES)]


def extract_state_dict(content, path: str | Path) -> dict[str, Tensor]:
    """Tensors of what `read_file` returned, maybe under state_dict, model or blobs. Raises WeightsError."""
    for wrapper in ("state_dict", "model", "blobs"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    state = {key: torch.as_tensor(value) for key, value in content.items() if isinstance(key, str)
             and (isinstance(value, Tensor) or isinstance(value, np.ndarray) and value.dtype.kind in "fiu")}
    for key, value in state.items():
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.is_meta:
            raise WeightsError(f"{path}: {key} is no ordinary tensor ({value.dtype}, {value.layout})")
    return state


def refuse_nonfinite(state: dict[str, Tensor], path: str | Path):
    """Raises WeightsError if a tensor holds infinity or NaN. Compare shapes first: it reads all elements."""
    nonfinite = [key for key, value in state.items() if not value.isfinite().all()]
    if nonfinite:
        raise WeightsError(f"{path}: {len(nonfinite)} tensors hold values that are not finite, the first is "
                           f"{nonfinite[0]}")


# ---------------------------------------------------------------------------------------------- names

def rename_keys(state_dict: dict[str, Tensor], rules: list[tuple]) -> dict[str, Tensor]:
    """Renames every key with the first rule (regex, replacement) that matches it."""
    renamed = {}
    for key, value in state_dict.items():
        for pattern, replacement in rules:
            key, hits = re.subn(pattern, replacement, key, count=1)
            if hits:
                break
        renamed[key] = value
    return renamed


def rename_detectron2_resnet(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a ResNet from detectron2's names (`res2.0.conv1.norm.weight`); other keys are left out."""
    state = {}
    for key, value in weights.items():
        key = key.removeprefix("backbone.").removeprefix("bottom_up.").removeprefix("stem.")
        key = re.sub(r"^res(\d)\.", lambda match: f"layer{int(match[1]) - 1}.", key)
        key = re.sub(r"conv(\d)\.norm\.", r"bn\1.", key)
        key = key.replace("shortcut.norm.", "downsample.1.").replace("shortcut.", "downsample.0.")
        if re.match(r"conv1|bn1|layer\d", key):
            state[key] = value
    return fill_missing_bn_stats(state)


def _rename_detectron_resnet(blobs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Renames a ResNet from Detectron's blob names (`res2_0_branch2a_w`); other blobs are left out."""
    # Only renamed endings have a dot: biases in front of a batch norm and momentum blobs go here.
    state = {key: value for key, value in rename_keys(blobs, BLOB_ENDINGS).items() if "." in key}
    return rename_detectron2_resnet(rename_keys(state, BLOB_LAYERS))


def fill_missing_bn_stats(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds mean 0 and variance 1 - BN_EPS to a batch norm without statistics: it is then x * weight + bias.

    Files with fused batch norms hold only this weight and bias. Changes `state` and returns it.
    """
    for key in [key for key in state if re.search(r"(bn\d|downsample\.1)\.weight$", key)]:
        norm = key.removesuffix("weight")
        state.setdefault(norm + "running_mean", torch.zeros_like(state[key]))
        state.setdefault(norm + "running_var", torch.ones_like(state[key]) - BN_EPS)
        state.setdefault(norm + "num_batches_tracked", torch.tensor(0))
    return state


# ---------------------------------------------------------------------------------------------- ImageNet

def load_imagenet(backbone: ResNet, path_or_name: str) -> tuple[tuple, tuple]:
    """Fills a backbone with ImageNet weights and returns the pixel mean and std that they expect.

    path_or_name: a file, or a key of TORCHVISION_FILES for torchvision's file, which is downloaded once.
    Formats: torchvision's `.pth`; Detectron's `.pkl` (MSRA R-50 and R-101, X-101-32x8d, X-101-64x4d, batch
    norms fused or separate); detectron2's `.pkl`; mmdetection's `.pth` conversions of Detectron's files.
    Returns ((r, g, b) mean, (r, g, b) std) on the 0..255 scale. Raises WeightsError.
    """
    if path_or_name in TORCHVISION_FILES and path_or_name != backbone.name:
        raise WeightsError(f"--weights {path_or_name} does not fit the backbone {backbone.name}")
    path = imagenet_file(path_or_name)
    with blame(path, WeightsError, "not an ImageNet ResNet"):
        state, caffe, bgr, pixels = _read_imagenet(path, backbone.name)
    _, bottleneck, _, _ = ARCHITECTURES[backbone.name]
    if bottleneck and caffe != backbone.caffe:
        style, place, advice = ("caffe", "first 1x1", "add") if caffe else ("pytorch", "3x3", "drop")
        raise WeightsError(f"{path}: these weights are {style} style (stride on the {place} convolution): "
                           f"build the backbone with caffe={caffe} (train.py: {advice} --caffe)")
    state = {k: value for k, value in state.items() if not k.startswith("fc.") and k != "conv1.bias"}
    if bgr and "conv1.weight" in state:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    _load_backbone(backbone, state, path)
    return pixels


def _read_imagenet(path: Path, name: str) -> tuple[dict[str, Tensor], bool, bool, tuple]:
    """ImageNet weights for the backbone `name`, under torchvision's names. Raises WeightsError.

    Returns the state_dict, caffe (the stride is on the first 1x1 convolution), bgr (the weights saw BGR) and
    the (mean, std) of the pixels.
    """
    state = read_weight_file(path)
    _, bottleneck, groups, _ = ARCHITECTURES[name]
    torchvision = (False, False, TORCHVISION_PIXELS)
    # Detectron's ResNets have the stride on the first 1x1 convolution, its ResNeXts on the 3x3. The pixel std
    # is absorbed in conv1, except in X-101-32x8d.
    detectron = (groups == 1, True, TORCHVISION_PIXELS if name == "resnext101_32x8d" else CAFFE_PIXELS)
    if any(key.endswith(("_w", "_bn_s", "_bn_beta")) for key in state):
        return _rename_detectron_resnet(state), *detectron
    if "stem.fc.weight" in state:  # detectron2's conversion of a torchvision file
        return rename_detectron2_resnet(state), *torchvision
    if "stem.conv1.weight" in state or "backbone.bottom_up.stem.conv1.weight" in state:
        return rename_detectron2_resnet(state), *detectron
    if "conv1.weight" in state and "fc.weight" in state:
        return state, *torchvision
    if "conv1.weight" in state:  # mmdetection's conversions have no classifier
        from_detectron = bottleneck and name != "resnext101_64x4d"
        return state, *(detectron if from_detectron else torchvision)
    raise WeightsError(f"{path}: not an ImageNet ResNet (a whole detector goes to --init); it has keys like "
                       f"{sorted(state)[:3]}")


def _load_backbone(backbone: ResNet, state: dict[str, Tensor], path: Path):
    """Strict load, except that batch norms may lack num_batches_tracked. Raises WeightsError."""
    own = backbone.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in own]
    wrong = [f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in own
             if key in state and state[key].shape != own[key].shape]
    if missing or unknown or wrong:
        raise WeightsError(f"{path}: does not fit {backbone.name}: {len(missing)} keys missing "
                           f"{missing[:3]}, {len(unknown)} unknown {unknown[:3]}, {len(wrong)} of another "
                           f"shape {wrong[:3]}")
    refuse_nonfinite(state, path)
    backbone.load_state_dict(state, strict=False)


def load_classifier(net: nn.Module, path_or_name: str):
    """Fills DeFRCN's `CalibrationNet` (backbone and fc) with torchvision's ResNet-101 classifier.

    path_or_name: a file, or "resnet101" for torchvision's. Raises WeightsError.
    """
    if path_or_name in TORCHVISION_FILES and path_or_name != "resnet101":
        raise WeightsError(f"--pcb-weights {path_or_name}: the calibration needs a resnet101")
    path = imagenet_file(path_or_name, "--pcb-weights")
    state = {key if key.startswith("fc.") else f"backbone.{key}": value
             for key, value in read_weight_file(path).items()}
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{path}: not torchvision's ResNet-101 ({reason})") from error
    refuse_nonfinite(state, path)


def imagenet_file(path_or_name: str, flag: str = "--weights") -> Path:
    """The file at a path, or torchvision's for a key of TORCHVISION_FILES. Raises WeightsError.

    flag: the argument that the message names.
    """
    if path_or_name in TORCHVISION_FILES:
        return _download(TORCHVISION_FILES[path_or_name], flag)
    if not Path(path_or_name).is_file():
        raise WeightsError(f"{flag} {path_or_name} does not exist; give a path, none, or one of "
                           f"{', '.join(TORCHVISION_FILES)}")
    return Path(path_or_name)


def _download(file_name: str, flag: str) -> Path:
    """Path of a torchvision file in torch's cache. The checksum in its name is verified at every call."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path, url = folder / file_name, TORCHVISION_URL + file_name
    if not path.exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=file_name[-12:-4])
        except Exception as error:
            raise WeightsError(f"cannot download {url} ({error}). Without internet, fetch that file "
                               f"elsewhere and put it at {path}, or give {flag} FILE, or {flag} none"
                               ) from error
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(file_name[-12:-4]):
        raise WeightsError(f"{path}: damaged (SHA-256 starts with {digest[:8]}, not {file_name[-12:-4]}); "
                           f"delete it and run again")
    return path

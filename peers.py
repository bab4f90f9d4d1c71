"""Training steps to compare: our models, and the same models of torchvision and mmdetection.

A step is a function without arguments: forward, losses, backward and SGD on one synthetic batch. All models
have a ResNet-50 with random weights and freeze the layers that the published recipes freeze. The other
libraries are imported only when one of their steps is made.
"""
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from defrcn import DeFRCN
from faster_rcnn import FasterRCNN
from fcos import FCOS
from fsaf import FSAF
from runtime import AMP, autocast, memory_format

CLASSES = 80
OURS = {"FCOS": lambda: FCOS(CLASSES),
        "RetinaNet": lambda: FSAF(CLASSES, anchor_only=True, norm="frozen"),
        "FSAF": lambda: FSAF(CLASSES),
        "FSAF joint": lambda: FSAF(CLASSES, joint=True),
        "Faster R-CNN": lambda: FasterRCNN(CLASSES),
        "DeFRCN": lambda: DeFRCN(CLASSES, "resnet50")}
TORCHVISION = ("FCOS", "RetinaNet", "Faster R-CNN")
MMDET = {"FCOS": "fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py",
         "RetinaNet": "retinanet/retinanet_r50_fpn_1x_coco.py",
         "FSAF": "fsaf/fsaf_r50_fpn_1x_coco.py",
         "Faster R-CNN": "faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py"}


class Workload(NamedTuple):
    """The batch of a training step and how the step is made."""
    batch_size: int
    size: tuple[int, int]  # height, width of every image, px
    objects: int  # per image
    amp: str  # a key of AMP
    compile: bool  # our model with torch.compile

    def __str__(self) -> str:
        return f"{self.batch_size} x {self.size[0]} x {self.size[1]}, {self.amp}"


def synthetic_batch(work: Workload, device: torch.device) -> tuple[torch.Tensor, ...]:
    """images, sizes, gt_boxes, gt_labels as in training: noise with random boxes, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    count, (height, width), objects = work[:3]
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    corner = torch.rand(count, objects, 2, generator=generator) * torch.tensor([width, height]) * 0.7
    side = torch.rand(count, objects, 2, generator=generator) * torch.tensor([width, height]) * 0.28 + 8
    boxes = torch.cat((corner, corner + side), dim=-1)
    labels = torch.randint(0, CLASSES, (count, objects), generator=generator)
    sizes = torch.tensor([[height, width]] * count)
    return tuple(tensor.to(device) for tensor in (images, sizes, boxes, labels))


def training_step(model: torch.nn.Module, loss: Callable, work: Workload, device: torch.device) -> Callable:
    """A step of any model. loss: a function that returns the sum of its losses."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    # The weights stay as they are. Otherwise the proposals drift within a few steps, and with them the number
    # of samples that RoIAlign takes.
    optimizer = torch.optim.SGD(trained, lr=0.0, momentum=0.9)

    def step():
        with autocast(device, AMP[work.amp]):
            total = loss()
        total.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


# ---------------------------------------------------------------------------------------------- libraries

def our_step(name: str, work: Workload, device: torch.device,
             model: torch.nn.Module | None = None) -> Callable:
    """A step of our model. model: an existing one of that name; by default a new one is made."""
    layout = memory_format(device)
    images, *targets = synthetic_batch(work, device)
    images = images.contiguous(memory_format=layout)
    model = (model or OURS[name]()).to(device, memory_format=layout)
    if work.compile:
        model.compile(dynamic=False)
    return training_step(model, lambda: sum(model(images, *targets).values()), work, device)


def torchvision_model(name: str, min_size: int, max_size: int) -> torch.nn.Module:
    """torchvision's detector on ResNet-50, with the same layers frozen as ours."""
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7
    if name == "Faster R-CNN":
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3)
        return detection.FasterRCNN(backbone, CLASSES + 1, min_size=min_size, max_size=max_size)
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3,
                                   returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    return getattr(detection, name)(backbone, CLASSES, min_size=min_size, max_size=max_size)


def torchvision_step(name: str, work: Workload, device: torch.device) -> Callable:
    """A step of torchvision. It starts from images in 0..1 and a dict of objects for each."""
    images, _, boxes, labels = synthetic_batch(work, device)
    labels = labels + (name == "Faster R-CNN")  # its label 0 is the background
    targets = [{"boxes": b, "labels": n} for b, n in zip(boxes, labels)]
    model = torchvision_model(name, min(work.size), max(work.size)).to(device)

    def loss():
        return sum(model(list(images.float() / 255), targets).values())
    return training_step(model, loss, work, device)


def mmdet_step(name: str, work: Workload, device: torch.device) -> Callable:
    """A step of mmdetection 3's published recipe. It starts from bytes and a sample of objects per image."""
    import mmdet.utils
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmengine.config import Config
    from mmengine.structures import InstanceData
    mmdet.utils.register_all_modules()
    config = Config.fromfile(Path(mmdet.__file__).parent / ".mim" / "configs" / MMDET[name]).model
    config.backbone.init_cfg = None  # random weights
    model = MODELS.build(config).to(device)
    images, _, boxes, labels = synthetic_batch(work, device)
    samples = [DetDataSample(metainfo={"img_shape": work.size, "ori_shape": work.size},
                             gt_instances=InstanceData(bboxes=b, labels=n)) for b, n in zip(boxes, labels)]

    def loss():
        data = model.data_preprocessor({"inputs": list(images), "data_samples": samples}, training=True)
        return model.parse_losses(model(**data, mode="loss"))[0]
    return training_step(model, loss, work, device)


class Peer(NamedTuple):
    """A library that has some of our models."""
    package: str  # must be installed
    models: tuple[str, ...]
    make_step: Callable  # (model name, workload, device) -> step


PEERS = {"torchvision": Peer("torchvision", TORCHVISION, torchvision_step),
         "mmdetection": Peer("mmdet", tuple(MMDET), mmdet_step)}


def peer_steps(name: str) -> dict[str, Callable]:
    """{peer: its make_step} for the installed peers that have the model."""
    return {peer: make_step for peer, (package, models, make_step) in PEERS.items()
            if name in models and importlib.util.find_spec(package)}

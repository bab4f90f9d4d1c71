"""A detector in an ONNX file of export.py, run by onnxruntime on the CPU.

`load_onnx` gives it the interface that `evaluate.detect` needs, so one loop scores a file and a checkpoint.
"""
from runtime import UserError, blame  # before torch: see the first lines of runtime.py

# isort: split
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ops import final_detections

MAX_DETECTIONS = 100


def file_metadata(info: dict, model: nn.Module, height: int, width: int) -> dict[str, str]:
    """What an ONNX file says about itself, as JSON texts.

    info: from `checkpoint.load_model`; height, width: size of the input, px. Images are resized to a short
    side of min_size, or to a long side of max_size if that is smaller, and lie at the top left of the input.
    """
    args = info["args"]
    facts = {"names": info["names"], "category_ids": info["category_ids"], "step": info["step"],
             "size": [height, width], "min_size": min(max(args["min_size"]), height, width),
             "max_size": min(args["max_size"], max(height, width)), "padding": "right and bottom",
             "score_threshold": model.score_threshold, "nms_threshold": model.nms_threshold, "args": args}
    return {key: json.dumps(value) for key, value in facts.items()}


def run_onnx(path: str | Path, metadata: bool = False):
    """A function (image, sizes) -> (boxes, scores, labels) that runs the file in onnxruntime.

    metadata: also returns the texts of `file_metadata`. Raises UserError for a file that is no ONNX file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{path} needs onnxruntime: pip install onnxruntime ({error})") from error
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base class but this one
        raise UserError(f"{path}: onnxruntime cannot read it ({str(error).splitlines()[0]})") from error

    def run(image: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(
            ["boxes", "scores", "labels"], {"image": image.numpy(), "sizes": sizes.numpy()})))

    return (run, session.get_modelmeta().custom_metadata_map) if metadata else run


class OnnxModel(nn.Module):
    """A detector for images of the one size of its file.

    run: from `run_onnx`. The score threshold is part of the file. In a file with NMS, a second NMS changes
    nothing.
    """

    size_divisor = 1
    max_detections = MAX_DETECTIONS

    def __init__(self, run, score_threshold: float, nms_threshold: float):
        super().__init__()
        self.run, self.score_threshold, self.nms_threshold = run, score_threshold, nms_threshold

    def network(self, images: Tensor, sizes: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes, scores and labels of every image: the file takes one at a time."""
        images, sizes = images.cpu().contiguous(), sizes.cpu()
        return [self.run(images[i:i + 1], sizes[i:i + 1]) for i in range(len(images))]

    def detections(self, outputs: list[tuple], sizes: Tensor) -> list[dict[str, Tensor]]:
        return [final_detections(*image, *size, self.nms_threshold, self.max_detections)
                for image, size in zip(outputs, sizes.cpu())]


def load_onnx(path: str | Path) -> tuple[OnnxModel, dict]:
    """The detector of a file, and its facts in the form of `checkpoint.load_model`. Raises UserError."""
    run, texts = run_onnx(path, metadata=True)
    with blame(path, what="not a file of export.py"):
        facts = {key: json.loads(text) for key, text in texts.items()}
        args = {**facts["args"], "pad_to": facts["size"], "min_size": [facts["min_size"]],
                "max_size": facts["max_size"]}
        model = OnnxModel(run, facts["score_threshold"], facts["nms_threshold"])
        info = {"args": args, "notes": [], "named": True,
                **{key: facts[key] for key in ("names", "category_ids", "step")}}
    return model.eval(), info

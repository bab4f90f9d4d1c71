"""Write a trained detector as an ONNX file for one image of one size, and compare the file with PyTorch.

    python export.py --ckpt runs/fcos/last.pth --size 512 672 --out fcos.onnx
    python export.py --ckpt runs/fcos/last.pth --size 512 672 --out fcos.onnx --nms
    python export.py --ckpt runs/fcos/last.pth --size 512 672 --out fcos.onnx --check photo.jpg

inputs   image   (1, 3, H, W) uint8 RGB, your image at the top left; the file normalises it
         sizes   (1, 2) int64, height and width of your image: the rest is masked, boxes are clipped to it
outputs  boxes   (N, 4) float32 x1 y1 x2 y2, px of the input
         scores  (N,) float32; 0 marks a row that is no detection: low score or empty box
         labels  (N,) int64, index into the class names, which are in the file's metadata under "names"

N is fixed. Without --nms the rows are the candidates for NMS, at most MAX_CANDIDATES, in no particular order.
With --nms they are the MAX_DETECTIONS best detections, best first; rows left over have label -1 and score 0.
All shapes are fixed, except those from NonMaxSuppression to the padding after it. That operator occurs with
--nms, and always in the two-stage detectors, because their proposals need NMS.
"""
import runtime  # first: torch must not be imported before it

# isort: split
import importlib
import json
import math
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoint import load_model
from data import read_image, resize
from faster_rcnn import FasterRCNN
from onnx_model import MAX_DETECTIONS, file_metadata, run_onnx
from ops import batched_nms, clip_candidates, final_detections, float32_below, torchvision_operators
from runtime import UserError

# The opset that torch.onnx writes directly; it would have to convert to a lower one. RoiAlign with half-pixel
# offsets needs 16. Huawei's operator list of CANN 8.0 has RoiAlign for 10 to 18 (not tried on an Ascend).
OPSET = 18
MAX_CANDIDATES = 10000  # only two-stage detectors have more: all classes of all proposals, most with score 0
MATCH_PX, MATCH_SCORE = 1.0, 0.01  # two detections with one label match if they differ by less
MAX_UNMATCHED = 0.05  # share of detections: rounding decides about scores and IoUs at their thresholds


# ---------------------------------------------------------------------------------------------- graph

@torch.library.custom_op("detectors::class_nms", mutates_args=())
def class_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`ops.batched_nms` as one operator, so that torch.export does not trace into it.

    boxes (N, 4), scores (C, N): every box has a score for one class and 0 for the others. Returns the kept
    indices (M,).
    """
    return batched_nms(boxes, scores.amax(dim=0), scores.argmax(dim=0), iou_threshold)


@class_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def onnx_class_nms(boxes, scores, iou_threshold: float):
    """`class_nms` in ONNX. It never selects a box with score 0, and at most MAX_DETECTIONS per class."""
    from onnxscript import opset18 as op

    selected = op.NonMaxSuppression(op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0]), MAX_DETECTIONS,
                                    float32_below(iou_threshold), 0.0)  # (M, 3): image, class, box
    return op.Reshape(op.Slice(selected, [2], [3], [1]), [-1])


class OneImage(nn.Module):
    """The detector with the inputs and outputs listed at the top of this file.

    names: class names. nms: with NMS.
    """

    def __init__(self, model: nn.Module, names: list[str], nms: bool = False):
        super().__init__()
        self.model, self.num_classes, self.nms = model, len(names), nms

    def forward(self, image: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        boxes, scores, labels = self.model.candidates(self.model.network(image, sizes))[0]
        boxes, scores = clip_candidates(boxes, scores, *sizes[0])
        if len(scores) > MAX_CANDIDATES:
            scores, best = scores.topk(MAX_CANDIDATES)
            boxes, labels = boxes[best], labels[best]
        if not self.nms:
            return boxes, scores, labels
        classes = torch.arange(self.num_classes, device=labels.device)[:, None]
        kept = class_nms(boxes, torch.where(labels == classes, scores, 0.0), self.model.nms_threshold)
        # NMS keeps an unknown number of boxes. Rows with score 0 make the number of outputs fixed.
        scores, best = torch.cat((scores[kept], scores.new_zeros(MAX_DETECTIONS))).topk(MAX_DETECTIONS)
        kept = torch.cat((kept, kept.new_zeros(MAX_DETECTIONS)))[best]
        valid = scores > 0
        return torch.where(valid[:, None], boxes[kept], 0.0), scores, torch.where(valid, labels[kept], -1)


def require_packages(*names: str):
    """Stops with one line if a package is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(f"error: export.py needs {' and '.join(names)}: pip install onnx onnxscript "
                             f"onnxruntime ({error})") from error


def write_onnx(model: nn.Module, names: list[str], height: int, width: int, path: Path, nms: bool = False,
               metadata: dict[str, str] | None = None):
    """Writes the detector as an ONNX file. Raises UserError, or OSError for the file.

    names: class names. metadata: from `file_metadata`, by default the names alone.
    """
    require_packages("onnx", "onnxscript")
    if height % model.size_divisor or width % model.size_divisor:
        raise UserError(f"--size {height} {width}: both must be multiples of {model.size_divisor}")
    # This call imports torchvision, if it can: torch.onnx looks for its operators before it traces the model.
    if torchvision_operators("cpu") is None and isinstance(model, FasterRCNN):
        raise UserError("the export of a two-stage detector needs torchvision, which cannot be imported here")
    graph = OneImage(model, names, nms).eval()
    example = torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.tensor([[height, width]])
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # torch.onnx warns about its own code
            program = torch.onnx.export(
                graph, example, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["image", "sizes"], output_names=["boxes", "scores", "labels"],
                custom_translation_table={torch.ops.detectors.class_nms.default: onnx_class_nms})
    except torch.onnx.OnnxExporterError as error:
        raise UserError(f"torch.onnx could not write the detector: {str(error).splitlines()[0]}") from error
    program.model.metadata_props.update(metadata or {"names": json.dumps(names)})
    with runtime.atomic_write(path) as file:
        file.write(program.model_proto.SerializeToString())


# ---------------------------------------------------------------------------------------------- check

def fit(path: Path, height: int, width: int, min_size: float = math.inf,
        max_size: float = math.inf) -> tuple[Tensor, Tensor]:
    """Image of a file as `evaluate.py --pad-to` prepares it, or smaller where that would not fit.

    height, width: size of the input; min_size, max_size: see `data.resized_shape`, all in px.
    Returns image (1, 3, height, width) uint8, sizes (1, 2). Raises DataError for a missing or broken file.
    """
    original = np.array(read_image(str(path)))
    sides = original.shape[:2]
    scale = min(height / sides[0], width / sides[1], min_size / min(sides), max_size / max(sides))
    size = [max(1, int(side * scale + 0.5)) for side in sides]
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    image[0, :, :size[0], :size[1]] = torch.from_numpy(resize(original, *size)).permute(2, 0, 1)
    return image, torch.tensor([size])


def compare(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[int, float, float]:
    """Compares two sets of detections; each of them may be empty.

    Returns the number of detections without a match in the other set, and the largest difference between
    matches in px and in score, 0 without matches.
    """
    box_gap = (ours["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=-1)  # (N, M)
    score_gap = (ours["scores"][:, None] - theirs["scores"]).abs()
    is_match = ((ours["labels"][:, None] == theirs["labels"]) & (box_gap < MATCH_PX)
                & (score_gap < MATCH_SCORE))
    unmatched = (~is_match.any(dim=1)).sum() + (~is_match.any(dim=0)).sum()
    box_gap, score_gap = box_gap[is_match].tolist(), score_gap[is_match].tolist()
    return int(unmatched), max(box_gap, default=0.0), max(score_gap, default=0.0)


def check_inputs(height: int, width: int, paths: list[Path], min_size: float = math.inf,
                 max_size: float = math.inf) -> list[tuple]:
    """(name, image, sizes) for noise and for every file, see `fit`."""
    noise = torch.randint(256, (1, 3, height, width), generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    return [("noise", noise, torch.tensor([[height, width]])),
            *((path, *fit(path, height, width, min_size, max_size)) for path in paths)]


def check(path: Path, model: nn.Module, inputs: list[tuple]):
    """Prints how the detections of the file differ from those of the model on `check_inputs`.

    Raises UserError if more than MAX_UNMATCHED of them have no match.
    """
    run = run_onnx(path)
    for name, image, sizes in inputs:
        with torch.inference_mode():
            ours = model(image, sizes)[0]
        # A file without NMS needs it here. For a file with NMS a second one changes nothing.
        theirs = final_detections(*run(image, sizes), *sizes[0], model.nms_threshold, MAX_DETECTIONS)
        unmatched, px, score = compare(ours, theirs)
        print(f"{name}: {len(ours['boxes'])} detections in PyTorch, {len(theirs['boxes'])} in onnxruntime; "
              f"largest difference {px:.1e} px, {score:.1e} in score; {unmatched} without a match")
        if len(ours["boxes"]) + len(theirs["boxes"]) == 0:
            print("    This shows nothing. Check with images in which the model detects something.")
        if unmatched > MAX_UNMATCHED * max(len(ours["boxes"]), len(theirs["boxes"])):
            raise UserError(f"{path}: its detections are not those of the checkpoint")


def main():
    parser = runtime.Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="checkpoint")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"),
                        help="height and width of the input, px")
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--classes", metavar="NAME,NAME", type=lambda text: text.split(","),
                        help="class names in the checkpoint's order, if it does not hold them")
    parser.add_argument("--nms", action="store_true", help="include NMS")
    parser.add_argument("--check", type=Path, nargs="*", metavar="IMAGE",
                        help="compare the file with PyTorch on noise and on these images")
    args = parser.parse_args()
    require_packages("onnx", "onnxscript")
    if args.check is not None:
        require_packages("onnxruntime")
    if min(args.size) < 1:
        parser.error(f"--size must be positive, not {args.size}")
    if args.out.is_dir():
        parser.error(f"--out must be a file, not the folder {args.out}")
    model, info = load_model(args.ckpt, classes=args.classes)
    for note in info["notes"]:
        print(note)
    metadata = file_metadata(info, model, *args.size)
    resizing = [json.loads(metadata[key]) for key in ("min_size", "max_size")]
    inputs = [] if args.check is None else check_inputs(*args.size, args.check, *resizing)
    runtime.make_folder(args.out.parent)
    write_onnx(model, info["names"], *args.size, args.out, args.nms, metadata)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, opset {OPSET}, {len(info['names'])} classes")
    if inputs:
        check(args.out, model, inputs)


if __name__ == "__main__":
    runtime.run_main(main)

"""Write a trained detector as ONNX, for one image of one fixed size, and compare the file with PyTorch.

    python export.py --ckpt runs/fcos/last.pth --size 512 672 --out fcos.onnx
    python export.py --ckpt runs/fcos/last.pth --size 512 672 --out fcos.onnx --nms
    python export.py --ckpt runs/fcos/last.pth --size 512 672 --out fcos.onnx --check photo.jpg

inputs   image   (1, 3, H, W) uint8 RGB, the picture at the top left; it is normalised inside
         sizes   (1, 2) int64, height and width of the picture: beyond, pixels are masked and boxes are cut
outputs  boxes   (N, 4) float32 x1 y1 x2 y2, px of the image
         scores  (N,) float32, 0 for a row without a detection: not above the threshold, or an empty box
         labels  (N,) int64, index into the class names, which the file's metadata hold under "names"

N is fixed. Without --nms the rows are the candidates that the model hands to its NMS (at most MAX_CANDIDATES,
in no particular order); with it the MAX_DETECTIONS best detections, best first, then label -1 and score 0.
All shapes are fixed except between NonMaxSuppression and the rows that are filled up behind it; that operator
occurs with --nms, and in DeFRCN, whose proposals need one.
"""
import os

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # before torch: see evaluate.py

import importlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import defrcn
import ops
from checkpoint import load_model, whole_file
from data import DataError, read_image
from evaluate import Parser, make_folder, run_script
from ops import batched_nms, clip_candidates, final_detections, float32_below

# What torch.onnx writes by itself: to older ones it has to convert. RoiAlign's half-pixel form needs 16, and
# Huawei's operator list of CANN 8.0 names opsets 10 to 18 for RoiAlign (read there, not tried on an Ascend).
OPSET = 18
MAX_CANDIDATES = 10000  # only DeFRCN has more: every class of every proposal, nearly all with score 0
MAX_DETECTIONS = 100
PARTNER_PX, PARTNER_SCORE = 1.0, 0.01  # two detections of one label that differ less are the same one
EDGE_CASES = 0.05  # share that may have no partner: rounding decides at a threshold, of scores or of IoU


# ---------------------------------------------------------------------------------------------- graph

@torch.library.custom_op("detectors::class_nms", mutates_args=())
def class_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """`ops.batched_nms` as one operator, which torch.export does not look into.

    boxes (N, 4), scores (C, N): each box has a score for one class, 0 for the others. Returns indices (M,).
    """
    return batched_nms(boxes, scores.amax(dim=0), scores.argmax(dim=0), iou_threshold)


@class_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


class OneImage(nn.Module):
    """The detector with the inputs and outputs described at the top.

    names: class names. nms: whether NMS is inside.
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
        kept = class_nms(boxes, torch.where(labels == classes, scores, 0.0), nms_threshold(self.model))
        # Rows of score 0 fill up what NMS leaves, whose number is the one thing not known in advance.
        scores, best = torch.cat((scores[kept], scores.new_zeros(MAX_DETECTIONS))).topk(MAX_DETECTIONS)
        kept = torch.cat((kept, kept.new_zeros(MAX_DETECTIONS)))[best]
        real = scores > 0
        return torch.where(real[:, None], boxes[kept], 0.0), scores, torch.where(real, labels[kept], -1)


def nms_threshold(model: nn.Module) -> float:
    return getattr(model, "nms_threshold", defrcn.NMS_THRESHOLD)


def onnx_class_nms(boxes, scores, iou_threshold: float):
    """`class_nms` in ONNX. A box of score 0 is not selected, a class selects at most MAX_DETECTIONS."""
    from onnxscript import opset18 as op

    selected = op.NonMaxSuppression(op.Unsqueeze(boxes, [0]), op.Unsqueeze(scores, [0]), MAX_DETECTIONS,
                                    float32_below(iou_threshold), 0.0)  # (M, 3): image, class, box
    return op.Reshape(op.Slice(selected, [2], [3], [1]), [-1])


def import_onnx(*names: str):
    """Stops with one line where a package is missing."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise SystemExit(f"error: export.py needs {' and '.join(names)}: pip install onnx onnxscript "
                             f"onnxruntime ({error})") from error


def write_onnx(model: nn.Module, names: list[str], height: int, width: int, path: Path, nms: bool = False):
    """The detector in evaluation mode as an ONNX file; names: class names. Raises DataError, OSError."""
    import_onnx("onnx", "onnxscript")
    if height % model.divisor or width % model.divisor:
        raise DataError(f"--size {height} {width}: both must be multiples of {model.divisor}")
    # Imports torchvision, whose operators torch.onnx looks up before it sees the model.
    if ops._torchvision_ops("cpu") is None and isinstance(model, defrcn.DeFRCN):
        raise DataError("the export of DeFRCN needs torchvision, which cannot be imported here")
    graph = OneImage(model, names, nms).eval()
    example = torch.zeros(1, 3, height, width, dtype=torch.uint8), torch.tensor([[height, width]])
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.onnx about its own parts
            program = torch.onnx.export(
                graph, example, dynamo=True, opset_version=OPSET, verbose=False,
                input_names=["image", "sizes"], output_names=["boxes", "scores", "labels"],
                custom_translation_table={torch.ops.detectors.class_nms.default: onnx_class_nms})
    except torch.onnx.OnnxExporterError as error:
        raise DataError(f"torch.onnx could not write the detector: {str(error).splitlines()[0]}") from error
    program.model.metadata_props["names"] = json.dumps(names)
    with whole_file(path) as file:
        file.write(program.model_proto.SerializeToString())


# ---------------------------------------------------------------------------------------------- check

def run_onnx(path: Path):
    """The file in onnxruntime, as a function (image, sizes) -> (boxes, scores, labels)."""
    import_onnx("onnxruntime")
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda image, sizes: tuple(map(torch.from_numpy, session.run(
        ["boxes", "scores", "labels"], {"image": image.numpy(), "sizes": sizes.numpy()})))


def fit(path: Path, height: int, width: int) -> tuple[Tensor, Tensor]:
    """A picture as large as fits into the input, ratio kept: image (1, 3, height, width), sizes (1, 2)."""
    picture = read_image(str(path))
    scale = min(height / picture.height, width / picture.width)
    size = [max(1, min(limit, round(side * scale))) for side, limit in zip(picture.size, (width, height))]
    pixels = torch.from_numpy(np.array(picture.resize(size, Image.BILINEAR))).permute(2, 0, 1)
    image = torch.zeros(1, 3, height, width, dtype=torch.uint8)
    image[0, :, :size[1], :size[0]] = pixels
    return image, torch.tensor([size[::-1]])


def compare(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> tuple[int, float, float]:
    """Two sets of detections, N and M, either may be 0: how many have no partner in the other set, and the
    largest difference of partners in px and in score, 0 without partners."""
    apart = (mine["boxes"][:, None] - theirs["boxes"]).abs().amax(dim=-1)  # (N, M)
    score = (mine["scores"][:, None] - theirs["scores"]).abs()
    alike = (mine["labels"][:, None] == theirs["labels"]) & (apart < PARTNER_PX) & (score < PARTNER_SCORE)
    lonely = (~alike.any(dim=1)).sum() + (~alike.any(dim=0)).sum()
    largest = (torch.where(alike, value, 0.0).flatten() for value in (apart, score))
    return int(lonely), *(float(value.max()) if len(value) else 0.0 for value in largest)


def check_inputs(height: int, width: int, pictures: list[Path]) -> list[tuple]:
    """(name, image, sizes) of noise and of the pictures."""
    noise = torch.randint(256, (1, 3, height, width), generator=torch.Generator().manual_seed(0),
                          dtype=torch.uint8)
    return [("noise", noise, torch.tensor([[height, width]])),
            *((picture, *fit(picture, height, width)) for picture in pictures)]


def check(path: Path, model: nn.Module, inputs: list[tuple]):
    """Detections of `check_inputs` by the file and by the model, compared and printed. Raises DataError if
    they are not the same."""
    run = run_onnx(path)
    for name, image, sizes in inputs:
        with torch.inference_mode():
            mine = model(image, sizes)[0]
        # A file without NMS gets it here; where it is inside, a second one changes nothing.
        theirs = final_detections(*run(image, sizes), *sizes[0], nms_threshold(model), MAX_DETECTIONS)
        lonely, px, score = compare(mine, theirs)
        print(f"{name}: {len(mine['boxes'])} detections in PyTorch, {len(theirs['boxes'])} in onnxruntime; "
              f"largest difference {px:.1e} px, {score:.1e} in score; {lonely} without a partner")
        if not len(mine["boxes"]) + len(theirs["boxes"]):
            print("    which shows nothing: check with pictures in which the model finds something")
        if lonely > EDGE_CASES * max(len(mine["boxes"]), len(theirs["boxes"])):
            raise DataError(f"{path}: does not detect what the checkpoint does")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", required=True, help="checkpoint of train.py")
    parser.add_argument("--size", type=int, nargs=2, required=True, metavar=("H", "W"), help="input, px")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    parser.add_argument("--classes", metavar="NAME,NAME", type=lambda text: text.split(","),
                        help="the classes of a --ckpt that does not name them, in its order")
    parser.add_argument("--nms", action="store_true", help="NMS inside")
    parser.add_argument("--check", type=Path, nargs="*", metavar="PICTURE",
                        help="compare with PyTorch on noise and on these pictures")
    args = parser.parse_args()
    import_onnx("onnx", "onnxscript")
    if args.check is not None:
        import_onnx("onnxruntime")
    if min(args.size) < 1:
        parser.error(f"--size must be positive, not {args.size}")
    if args.out.is_dir():
        parser.error(f"--out must be a file, not the folder {args.out}")
    model, info = load_model(args.ckpt, classes=args.classes)
    for note in info["notes"]:
        print(note)
    inputs = [] if args.check is None else check_inputs(*args.size, args.check)
    make_folder(args.out.parent)
    write_onnx(model, info["names"], *args.size, args.out, args.nms)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.1f} MB, opset {OPSET}, {len(info['names'])} classes")
    if inputs:
        check(args.out, model, inputs)


if __name__ == "__main__":
    run_script(main)

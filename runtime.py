"""Where a script runs and how it ends: device, ranks, precision, atomic files, one-line errors."""
import os

# Import this file before torch. Otherwise torch imports an installed torch_npu, even without --device npu.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import argparse
import importlib.util
import json
import multiprocessing
import re
import signal
import sys
import uuid
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple


def _interrupted_while_importing(kind, error, trace):
    """Ctrl-C in the seconds before `run_main` takes over: a line in place of a traceback."""
    if kind is KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if os.path.dirname(os.path.realpath(sys.argv[0])) == os.path.dirname(os.path.realpath(__file__)):
    sys.excepthook = _interrupted_while_importing  # only for the scripts of this folder

import torch
import torch.distributed as dist

AMP = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}
VISIBLE_DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
# Rank 0 scores while the others wait in a collective, so the limit is far above torch's 10 minutes.
COLLECTIVE_TIMEOUT = timedelta(hours=2)
TEMPORARY = ".tmp"  # ends the name of a file that is being written


class UserError(ValueError):
    """A mistake that the user can mend. The message names the file or value and says what to do."""


@contextmanager
def blame(source, error_class: type[UserError] = UserError, what: str = "cannot be used"):
    """What fails inside becomes an error_class that names its source: a file whose content fits no rule."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise error_class(f"{source}: {what} ({reason})") from error


def harmless(text: str) -> str:
    """Text for the screen: control characters, which may steer a terminal, and lone surrogates as escapes."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", lambda m: ascii(m[0])[1:-1], text)


# ------------------------------------------------------------------------------------------ device and ranks

class Place(NamedTuple):
    """Where this process runs."""
    device: torch.device
    rank: int = 0
    world: int = 1  # number of ranks


def device_name(text: str) -> str:
    """The value of --device: auto, cpu, cuda, npu, or one device by its number, such as npu:3."""
    if not re.fullmatch(r"auto|cpu|(cuda|npu)(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cuda, npu, cpu or a number like npu:3")
    return text


def device_type(name: str) -> str:
    """cuda, npu or cpu, for a value of --device; auto is cuda if there is one, else cpu."""
    name = name.partition(":")[0]
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def setup_device(name: str, amp: str = "off") -> Place:
    """Chooses the device; under torchrun it also starts the process group.

    name: from `device_name`. amp: a key of AMP that the device must support. Raises SystemExit with one line.
    """
    number, name = name.partition(":")[2], device_type(name)
    if number and "LOCAL_RANK" in os.environ:
        raise SystemExit(f"error: --device {name}:{number} does not go with torchrun, which gives each rank "
                         f"a device: use --device {name} and {VISIBLE_DEVICES[name]}")
    if amp == "fp16" and name == "cpu":
        raise SystemExit("error: --amp fp16 needs a GPU or NPU; on a CPU use --amp bf16")
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no CUDA GPU "
                         "(use --device cpu, or check the driver)")
    if name == "npu":
        _import_npu()
    local_rank, world = int(number or os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if name != "cpu":
        module = torch.get_device_module(name)
        if local_rank >= module.device_count():
            wanted = (f"--device {name}:{number}" if number else
                      f"{os.environ.get('LOCAL_WORLD_SIZE', world)} ranks on this machine")
            raise SystemExit(f"error: {wanted}, but {module.device_count()} {name} devices")
        device = torch.device(name, local_rank)
        module.set_device(device)
    if name == "npu" and amp == "bf16" and not torch.npu.is_bf16_supported():
        raise SystemExit("error: --amp bf16: this NPU has no bfloat16; use --amp fp16 (docs/ascend.md)")
    if world > 1:
        dist.init_process_group(BACKENDS[name], timeout=COLLECTIVE_TIMEOUT)
    return Place(device, int(os.environ.get("RANK", 0)), world)


def _import_npu():
    found = importlib.util.find_spec("torch_npu")
    if found is None or not found.origin:  # a folder with that name has no origin
        raise SystemExit("error: --device npu: torch_npu is not installed (see docs/ascend.md)")
    # A CUDA build with torch_npu aborts the process. The stand-in of the tests runs on every build.
    if torch.version.cuda and "STAND_IN = True" not in Path(found.origin).read_text(encoding="utf-8"):
        raise SystemExit("error: --device npu needs torch's CPU build, this is a CUDA build (docs/ascend.md)")
    try:
        importlib.import_module("torch_npu")
    except Exception as error:  # ImportError without CANN; any error with another torch release
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SystemExit(f"error: --device npu: torch_npu cannot be imported ({reason}); it needs CANN and "
                         f"the torch_npu release that matches torch {torch.__version__}") from None
    if torch.npu.device_count() == 0:
        raise SystemExit("error: --device npu, but torch_npu sees no NPU (npu-smi info lists them)")
    torch.npu.set_compile_mode(jit_compile=False)  # else every new image size compiles every operator
    torch.npu.config.allow_internal_format = False  # else convolutions convert to another layout and back


def saturates(device: torch.device) -> bool:
    """Whether the device has no infinity: overflow gives the largest number there, and NaN becomes 0."""
    # torch_npu calls the other form the INF_NAN mode. The stand-in of the tests need not have the function.
    utils = getattr(torch.npu, "utils", None) if device.type == "npu" else None
    return hasattr(utils, "is_support_inf_nan") and not utils.is_support_inf_nan()


def take_overflow_flag() -> bool:
    """Whether something overflowed since the last call, on an NPU that `saturates`. Waits for the NPU."""
    overflow = torch.npu.get_npu_overflow_flag()
    if overflow:
        torch.npu.clear_npu_overflow_flag()
    return overflow


def autocast(device: torch.device, amp: torch.dtype | None):
    """Context of mixed precision in the type `amp`; None switches it off."""
    return torch.autocast(device.type, amp or torch.bfloat16, enabled=amp is not None)


def has_bf16(name: str) -> bool:
    """Whether a device computes in bf16, rather than in float32 behind bf16; False where it is not known.

    name: as in `setup_device`.
    """
    name = device_type(name)
    if name == "cuda":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    # Older releases of torch do not tell what a processor can do.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if name == "cpu" else {}
    return any(capabilities.get(key, False) for key in ("avx512_bf16", "amx_bf16"))


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Layout of weights and images: channels last, except on an NPU, where torch_npu refuses it."""
    return torch.contiguous_format if torch.device(device).type == "npu" else torch.channels_last


def synchronize(device: torch.device):
    """Waits until the device has finished."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def gather_objects(value, world: int) -> list:
    """The value of every rank, in the order of ranks. Every rank must call it."""
    if world == 1:
        return [value]
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


_printed = {"lines": [], "file": None}  # what print0 printed before `copy_prints` named a file; that file


def print0(*args):
    """print on rank 0 only, also into the file of `copy_prints`."""
    if int(os.environ.get("RANK", 0)) == 0:
        text = harmless(" ".join(map(str, args)))
        print(text, flush=True)
        if _printed["file"]:
            print(text, file=_printed["file"], flush=True)
        else:
            _printed["lines"].append(text)


def copy_prints(path: Path | None):
    """Appends everything that print0 printed and will print to a file. None: forgets what it printed."""
    if _printed["file"]:
        _printed["file"].close()
    _printed["file"] = open(path, "a", encoding="utf-8") if path else None
    if path:
        print(*_printed["lines"], sep="\n", file=_printed["file"], flush=True)
    _printed["lines"] = []


# ------------------------------------------------------------------------------------------ files

def make_folder(path: Path):
    """Makes an output folder and checks that it is writable. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write there")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be used as a folder ({error})") from error


def refuse_special(path: Path | str):
    """Raises OSError for a pipe or a device: to read or write it could wait for ever."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise OSError(f"{path} is not a regular file")


@contextmanager
def atomic_write(path: Path):
    """A binary file that appears at `path` complete or not at all.

    It is written under a temporary name that no other writer has, flushed to disk, then moved. Raises OSError
    that names the path; a file that was there before is then untouched. A folder, a device or a pipe at
    `path` is refused.
    """
    target = Path(os.path.realpath(path))  # a link stays, and the file it leads to is replaced
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is not a regular file: give another name to write to")
    temporary = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}{TEMPORARY}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch.save wraps a full disk in a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = f"{error.__context__ or error}".splitlines()[0]
        raise OSError(f"{path} cannot be written ({reason}); what was there before is untouched") from error


def write_json(path: Path, content):
    """A JSON file, see `atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(content).encode())


# ------------------------------------------------------------------------------------------ end of a script

class Parser(argparse.ArgumentParser):
    """An ArgumentParser with one-line errors, printed by rank 0 only: all ranks have the same arguments."""

    def error(self, message: str):
        if int(os.environ.get("RANK", 0)):
            raise SystemExit(2)
        self.exit(2, f"error: {message} ({self.prog} --help lists the arguments)\n")


class Interrupts:
    """Ctrl-C and SIGTERM. The training loop then finishes its step, saves and ends.

    A rank whose torchrun was killed is interrupted too: it would train on as an orphan.
    """

    def __init__(self):
        self._signal = False
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._default = {number: signal.signal(number, self._note)
                         for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, *_):
        self._signal = True

    @property
    def received(self) -> bool:
        return self._signal or self._torchrun not in (None, os.getppid())

    @contextmanager
    def at_once(self):
        """Inside, a signal stops the process at once: nothing there has to be saved."""
        for number, handler in self._default.items():
            signal.signal(number, handler)
        yield
        for number in self._default:
            signal.signal(number, self._note)


def run_main(main, explain=None):
    """Calls main() and turns a user's mistake into one line instead of a traceback.

    explain: takes an unexpected error; returns one line for the user, or None if it is a bug. With several
    ranks, only the first to fail prints the reason; the others usually fail as a consequence.
    """
    try:
        _run_main(main, explain)
    finally:
        # Loader processes ignore SIGTERM, with which multiprocessing would end them, and wait for them.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes the death of one for an error
        for process in multiprocessing.active_children():
            process.kill()


def _run_main(main, explain):
    try:
        main()
        if dist.is_initialized():  # after a failure this could wait for ranks that never come
            dist.destroy_process_group()
        return
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise
        reason = stop.code
    except KeyboardInterrupt:
        reason = "interrupted"
    except torch.OutOfMemoryError as error:
        reason = (f"error: out of memory: {str(error).splitlines()[0]} Try smaller parts: --micro-batch in "
                  f"training, --batch-size in evaluation")
    except UserError as error:
        # An error in a loader process arrives with the traceback of that process around its message.
        reason = f"error: {str(error).rsplit(f'{type(error).__name__}: ', 1)[-1].strip()}"
    except Exception as error:
        known = (explain and explain(error)) or (isinstance(error, OSError) and error)
        if not known and _fails_first():
            raise
        reason = f"error: {known}" if known else 1
    reason = reason if reason == 1 else harmless(reason)
    if reason != 1 and _printed["file"]:
        print(reason, file=_printed["file"], flush=True)
    raise SystemExit(reason if reason == 1 or _fails_first() else 1)


def _fails_first() -> bool:
    """Whether this rank is the first of its run to fail. The ranks count failures in torchrun's store."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                              timeout=timedelta(seconds=10))
        return store.add(f"failed {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except (RuntimeError, ValueError, KeyError):  # rank 0 held the store and has ended
        return int(os.environ["RANK"]) == 0

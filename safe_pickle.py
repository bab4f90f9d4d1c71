"""Reads Detectron's .pkl files: arrays, text and numbers in dicts and lists. Nothing in a file is executed.

A pickle names functions and has them called. The few names that an array of numpy needs lead to the functions
of this file, which check what they are given. numpy sees nothing of the file but bytes and a plain dtype.
Reading takes about three times the memory of the file: the file, its arrays, and one copy of an array.
"""
import io
import math
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np

PLAIN = re.compile(r"[<>=|]?(f[248]|[iu][1248]|b1)")  # numbers and truth values; no objects, fields or text
MAX_DIMENSIONS = 32  # numpy's limit


def read_pickle(path: str | Path):
    """Content of a .pkl file, with numpy arrays in the machine's byte order.

    Raises UnpicklingError for anything but arrays and builtins, and other exceptions for a damaged file.
    """
    content = Path(path).read_bytes()
    return _with_arrays(_Unpickler(io.BytesIO(content), encoding="latin1").load(), {})


class _DType:
    """What the file says about a numpy dtype."""

    def __init__(self, code, *_):
        if not (isinstance(code, str) and PLAIN.fullmatch(code)):
            raise pickle.UnpicklingError(f"refused dtype {str(code)[:20]!r}")
        self.dtype = np.dtype(code)

    def set_state(self, state):
        """state: version, byte order, subarray, names, fields, item size, alignment, maybe flags."""
        if not (isinstance(state, tuple) and len(state) in (7, 8) and state[1] in ("<", ">", "=", "|")
                and state[2:5] == (None, None, None) and not any(state[7:])):
            raise pickle.UnpicklingError("refused a dtype with fields, subarrays or flags")
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """An array of the file. `value` is None until its content was read."""

    def __init__(self, value: np.ndarray | None = None):
        self.value = value

    def set_state(self, state):
        """state: version, shape, dtype, whether in Fortran order, content."""
        _, shape, dtype, fortran, content = state
        self.value = _make_array(content, dtype, shape, "F" if fortran else "C")


class _NdArray:
    """Stands for the class numpy.ndarray, which files name and never call."""


def _make_array(content, dtype, shape, order: str) -> np.ndarray:
    """A contiguous array from its bytes, which must be as many as shape and dtype say."""
    content = content.encode("latin1") if isinstance(content, str) else content  # text of Python 2
    if not (isinstance(content, (bytes, bytearray)) and isinstance(dtype, _DType) and isinstance(shape, tuple)
            and len(shape) <= MAX_DIMENSIONS and all(type(n) is int and n >= 0 for n in shape)
            and math.prod(shape) * dtype.dtype.itemsize == len(content)):
        raise pickle.UnpicklingError("refused an array whose shape and dtype do not fit its content")
    array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    return array.astype(dtype.dtype.newbyteorder("="))


# ---- the functions that a file may call, under the names that it knows

def _reconstruct(*_) -> _Array:
    return _Array()


def _from_buffer(content, dtype, shape, order) -> _Array:
    return _Array(_make_array(content, dtype, shape, order))


def _scalar(dtype, content):
    return _make_array(content, dtype, (), "C")[()]


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused the encoding {str(encoding)[:20]!r}")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


_ALLOWED = {("numpy", "ndarray"): _NdArray, ("numpy", "dtype"): _DType, ("_codecs", "encode"): _encode,
            ("__builtin__", "bytes"): _no_bytes,  # protocol 2 writes empty bytes as bytes()
            ("collections", "OrderedDict"): OrderedDict}
for _core in ("numpy.core", "numpy._core"):
    _ALLOWED |= {(f"{_core}.multiarray", "_reconstruct"): _reconstruct,
                 (f"{_core}.multiarray", "scalar"): _scalar,
                 (f"{_core}.numeric", "_frombuffer"): _from_buffer}


class _Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python. That in C allocates whatever sizes a file states."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return _ALLOWED[module, name]

    def load_build(self):
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_DType, _Array)):
            raise pickle.UnpicklingError(f"refused a state for a {type(self.stack[-1]).__name__}")
        self.stack[-1].set_state(state)

    def load_bytearray8(self):
        length = int.from_bytes(self.read(8), "little")
        self.append(bytearray(self.read(length)))  # read gives no more than the file has

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8


def _with_arrays(content, seen: dict):
    """The content's dicts with numpy arrays in place of `_Array`. seen: {id: dict} of the finished ones."""
    if isinstance(content, _Array):
        return content.value
    if isinstance(content, dict) and id(content) not in seen:
        seen[id(content)] = result = {}
        result.update({key: _with_arrays(value, seen) for key, value in content.items()})
    return seen.get(id(content), content) if isinstance(content, dict) else content

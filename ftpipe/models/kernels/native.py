"""The parts of a decoder layer in compiled code (`native*.c`).

The element-wise parts are memory-bound, so what counts is how often the data pass by: a norm takes 5 passes in torch's operations and its backward pass 9, a
gate 2 and 6, and each takes one here. Linear layers with LoRA and attention (bfloat16, on processors with AVX512-BF16 and no AMX) are a few calls a layer
in place of a hundred, and their products do not wait for weights that come from memory.

The code is compiled with the machine's C compiler when it is first wanted and kept in the user's cache folder; where that cannot be done everything is
computed by torch's operations as before, only slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCES = sorted(Path(__file__).parent.glob("native*.[ch]"))
DEFINES = {torch.bfloat16: (), torch.float32: ("-DFLOAT32",)}
"""Types of tensors that it can be compiled for."""
FLAGS = ("-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
SWITCH = "FTPIPE_NATIVE"
"""Environment variable: 0 leaves everything to torch's operations."""


class _Data:
    """A tensor, or None, as an argument."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


_P, _N, _F = _Data, ctypes.c_int64, ctypes.c_float
_ARGUMENTS = {
    "norm": (_P, _P, _P, _F, _P, _P, _N, _N), "scaled": (_P, _P, _P, _P, _N, _N), "norm_backward": (_P, _P, _P, _P, _P, _P, _N, _N),
    "gate": (_P, _P, _N, _N), "gate_backward": (_P, _P, _P, _P, _N, _N),
    "gather": (_P, _P, _P, _P, _P, _N, _N, _N, _N), "gather_backward": (_P, _P, _P, _P, _P, _N, _N, _N, _N),
    "rotate": (_P, _P, _P, _N, _N, _N, _N, ctypes.c_int),
    "causal_softmax": (_P, _P, _N, _N, _N, _N), "causal_softmax_backward": (_P, _P, _N, _N), "token_losses": (_P, _P, _P, _N, _N, ctypes.c_int),
}
_PRODUCTS = {
    "project": (*[_P] * 8, _N, _N, _N, _P, _P), "input_backward": (*[_P] * 6, _N, _N, _N, _P, _P), "pair_backward": (*[_P] * 6, _N, _N, _N, _P, _P),
    "attend": (*[_P, _N, _N] * 4, _P, _P, _N, _N, _N, _N, _F),
    "attend_backward": (*[_P, _N, _N] * 4, *[_P] * 5, _N, _N, _N, _N, _F),
}
"""They return 0 if there is too little memory."""
_loaded: dict[torch.dtype, Any] = {}
_log = logging.getLogger(__name__)


def load(dtype: torch.dtype) -> bool:
    """Compile it for tensors of this type on a CPU, if that was not done before, and use it from now on; whether it is there."""
    if dtype in DEFINES and dtype not in _loaded and os.environ.get(SWITCH, "1") != "0":
        found = _library(dtype)
        if found is not None:
            _loaded[dtype] = found
    return dtype in _loaded


def of(*tensors: Tensor) -> Any | None:
    """The compiled functions for these tensors; None where there are none, or they are not of one type, dense and on a CPU."""
    found = _loaded.get(tensors[0].dtype)
    if found is None or any(t.dtype != tensors[0].dtype or not t.is_cpu or not t.is_contiguous() for t in tensors):
        return None
    return found


def products(*tensors: Tensor | None, even: Sequence[int] = ()) -> Any | None:
    """The same if they have matrix products, which take pairs: `even` are the lengths that have to be so. A tensor may be missing."""
    found = _loaded.get(tensors[0].dtype)
    if found is None or not found.products or any(n % 2 for n in even):
        return None
    return of(*(t for t in tensors if t is not None))


@contextmanager
def aside() -> Iterator[None]:
    """Leave everything to torch's operations meanwhile, in all threads."""
    held = dict(_loaded)
    _loaded.clear()
    try:
        yield
    finally:
        _loaded.update(held)


@cache
def _library(dtype: torch.dtype) -> Any | None:
    try:
        found = ctypes.CDLL(str(_compiled(DEFINES[dtype])))
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        _log.warning("parts of the model's layers are computed by slower functions, as native.c could not be compiled: %s", said[-1] if said else error)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(found, name)
        function.argtypes, function.restype = arguments, None
    found.products = bool(found.has_products())
    for name, arguments in _PRODUCTS.items() if found.products else ():
        function = getattr(found, name)
        function.argtypes, function.errcheck = arguments, _enough
    return found


def _enough(ok: int, *_: Any) -> None:
    if not ok:
        raise MemoryError("there is too little memory for a product")


def _compiled(defines: tuple[str, ...]) -> Path:
    """The library for this source and processor, made if it is not there, whole. Raises OSError or SubprocessError."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ftpipe"
    key = hashlib.sha256(repr(([s.read_bytes() for s in SOURCES], FLAGS, defines, _processor())).encode()).hexdigest()[:16]
    library = folder / f"native-{key}.so"
    if not library.exists() or not _whole(library.read_bytes()):
        compiler = shlex.split(os.environ.get("CC", "")) or [shutil.which("cc") or shutil.which("gcc") or "cc"]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            sources, made = [s for s in SOURCES if s.suffix == ".c"], Path(work, "native.so")
            # Linked without -fopenmp: with a set of OpenMP threads of its own beside torch's, each would wait, spinning, for processors that the other has.
            for command in ([*compiler, *FLAGS, "-fopenmp", *defines, "-c", *map(str, sources)],
                            [*compiler, "-shared", *(f"{s.stem}.o" for s in sources), "-o", str(made), "-lm"]):
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=300, cwd=work)
            data = made.read_bytes()
            made.write_bytes(data + hashlib.sha256(data).digest())
            made.replace(library)
    return library


def _whole(data: bytes) -> bool:
    """Whether a library ends with the hash of the rest. The system's loader dies of one that is cut off."""
    return hashlib.sha256(data[:-32]).digest() == data[-32:]


def _processor() -> str:
    """What the code is compiled for: a home folder may serve several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})])

"""How this process allocates memory."""

from __future__ import annotations

import ctypes
import os
import sys
from functools import lru_cache

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8


SHAPES = 96
"""How many of the kernels that are made for one shape of operands are kept: about those of one micro-batch."""


def remember_few_shapes() -> None:
    """Have torch and oneDNN, which make a kernel for every shape of a product on a CPU, keep `SHAPES` of them each in place of 1024.

    No two micro-batches have the same number of tokens, so what is kept is rarely used again: on a 135M model it grew by 40 MB a step. Called before the
    first product; nothing is done where the user has set the variable.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(SHAPES))


@lru_cache
def keep_freed_memory() -> bool:
    """Have the C library keep freed blocks for the next use; returns whether it will.

    Activations are allocated and freed at every layer. Left to itself glibc hands large blocks back to the kernel and gets them again page by page,
    which takes a third of the time of attention over 512 tokens. All threads allocate from one heap, so that one uses what another freed.
    Nothing is done where the user has set MALLOC_ variables, or the library is another.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return all([mallopt(M_MMAP_THRESHOLD, 2**30), mallopt(M_TRIM_THRESHOLD, 2**31 - 1), mallopt(M_TOP_PAD, 2**26), mallopt(M_ARENA_MAX, 1)])

"""What is kept for each shape of a product does not grow with the number of shapes."""

from __future__ import annotations

import subprocess
import sys

from tests.train.planted import environment

CHILD = """
import ctypes
import torch
from ftpipe.models.memory import remember_few_shapes

remember_few_shapes()

class Info(ctypes.Structure):
    _fields_ = [(k, ctypes.c_size_t) for k in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
weight = torch.ones(576, 576, dtype=torch.bfloat16)
used = []
for n in range(1, 401):
    torch.ones(n, 576, dtype=torch.bfloat16) @ weight
    used.append(libc.mallinfo2().uordblks)
print(used[-1] - used[99])
"""


def test_three_hundred_more_shapes_take_no_more_memory():
    """180 MB without the bound, 1 MB with it."""
    said = subprocess.run([sys.executable, "-c", CHILD], env=environment(), capture_output=True, text=True, check=True)
    assert int(said.stdout) < 20e6

"""Random numbers that belong to rows: stable between machines and versions, and independent of the rows' order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def uniforms(row_ids: pa.ChunkedArray | pa.Array, *words: str | int) -> np.ndarray:
    """(n,) float64 in [0, 1), one for each row id: 53 bits of BLAKE2b over the id, keyed by `words` (a seed and a purpose)."""
    import numpy as np

    key = hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=32).digest()
    start = hashlib.blake2b(key=key, digest_size=8)
    raw = bytearray()
    for row_id in row_ids.to_pylist():
        one = start.copy()
        one.update(row_id.encode())
        raw += one.digest()
    return (np.frombuffer(bytes(raw), dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53

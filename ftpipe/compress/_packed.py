"""What methods share that keep an adapter in a form of their own: one file of packed tensors, and facts that say how to unpack it.

The packed folder holds `packed.safetensors` and `ftpipe_adapter.json`, whose entry `packed` names the method and keeps what it needs beside the tensors.
`ftpipe.models.adapters.plain` unpacks it whenever the adapter is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ftpipe.slots import Method

FILE, FACTS = "packed.safetensors", "ftpipe_adapter.json"


def facts_to_pack(adapter: Path) -> dict[str, Any]:
    """The facts of an adapter that may be packed. Raises ConfigError for one that is packed already, and for whole weights beside a quantised base, which
    could not be written when it is unpacked."""
    from ftpipe.models.adapters import read_manifest
    from ftpipe.train.adapt._weights import tensor_files

    facts = read_manifest(adapter)
    if "packed" in facts:
        raise ConfigError(f"the adapter is packed already, by {next(iter(facts['packed']['method']))}",
                          where=str(adapter), remedy="pack the one it was made of")
    if facts.get("quantize") and tensor_files(adapter):
        raise ConfigError("whole weights that were trained beside a quantised base cannot be packed", where=str(adapter), remedy="use half_precision")
    return facts


def write_packed(out: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], method: Method, extra: Mapping[str, Any]) -> None:
    """Write the packed folder."""
    from safetensors.torch import save_file

    out.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in sorted(tensors.items())}, out / FILE, metadata={"format": "pt"})
    facts = dict(facts) | {"packed": {"method": method.dump(), **extra}}
    (out / FACTS).write_text(json.dumps(facts, separators=(",", ":"), sort_keys=True) + "\n", encoding="utf-8")


def read_packed(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The facts of the adapter that was packed, and the entry `packed`. Raises ArtifactError."""
    from ftpipe.models.adapters import read_manifest

    facts = read_manifest(folder)
    packed = facts.pop("packed", None)
    if not isinstance(packed, dict) or not (folder / FILE).is_file():
        raise ArtifactError("this is no packed adapter", where=str(folder))
    return facts, packed


def to_bits(flags: Any) -> torch.Tensor:
    """ceil(n / 8) bytes (uint8) of n truth values, the first in the highest bit."""
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(np.asarray(flags, dtype=bool).ravel()))


def from_bits(packed: torch.Tensor, count: int) -> np.ndarray:
    """The first `count` truth values of `to_bits`, as 0 and 1 (uint8)."""
    import numpy as np

    return np.unpackbits(packed.numpy(), count=count)

"""Round an adapter's tensors to 16 bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ftpipe.compress.base import Compressor

if TYPE_CHECKING:
    from ftpipe.merge._given import Given


class HalfPrecision(Compressor):
    """Halves the size. A value is off by at most 2^-11 of itself in float16 (by 2^-25 where it is smaller than 2^-14), by 2^-9 in bfloat16.

    `lost` is the norm of the rounding of all tensors as a share of their norm.
    """

    dtype: Literal["float16", "bfloat16"] = Field(default="float16", description="Type the tensors are kept in: float16 is finer, bfloat16 reaches further.")

    def compress(self, adapter: Path, out: Path, given: Given) -> dict[str, Any]:
        import torch
        from safetensors.torch import load_file, save_file

        shutil.copytree(adapter, out)
        lost = whole = 0.0
        for file in sorted(out.glob("*.safetensors")):
            kept = {}
            for name, tensor in sorted(load_file(file).items()):
                kept[name] = tensor
                if tensor.is_floating_point() and tensor.element_size() > 2:
                    rounded = tensor.to(getattr(torch, self.dtype))
                    if bool(rounded.isfinite().all()):  # a value beyond float16's range keeps its tensor as it is
                        kept[name] = rounded
                if tensor.is_floating_point():
                    lost += float((tensor.double() - kept[name].double()).pow(2).sum())
                    whole += float(tensor.double().pow(2).sum())
            save_file(kept, file, metadata={"format": "pt"})
        return {"lost": (lost / whole) ** 0.5 if whole else 0.0}

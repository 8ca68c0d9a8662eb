"""BitDelta (Liu et al. 2024): of a full fine-tune one sign bit for each weight, and one scale for each matrix."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.compress.base import Compressor
from ftpipe.errors import ConfigError
from ftpipe.slots import Pattern
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._given import Given


class BitDelta(Compressor):
    """`W = W_base + a S` for each matrix of attention and MLP, with S the signs of its change (+1 for no change) and a its mean magnitude, which is the
    least-squares scale. Whatever else was tuned (embeddings, norms, output layer) is kept as it is, unless it did not change, and so is a matrix that the
    adapter keeps as entries, rows or columns.

    With `rows` the scales, and nothing else, are then trained so that the logits are those of the tuned model: mean squared error over all positions and
    the vocabulary, padding left out. A LoRA is smaller than the bits of its product, so it is refused.
    """

    paper: ClassVar[str] = "BitDelta: Your Fine-Tune May Only Be Worth One Bit"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "numpy")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas", "ftpipe.merge._given", "ftpipe.compress._packed", "ftpipe.compress._distil")

    parameters: Pattern = Field(default=r"\.(self_attn|attn|attention|mlp|feed_forward)\.", description="Regular expression; matrices whose name it is found "
                                "in are packed.")
    rows: Ref | None = Field(default=None, description="Stage whose train rows the scales are distilled on; without it they stay the mean magnitudes.")
    steps: int = Field(default=200, ge=1, description="Steps of the distillation.")
    learning_rate: float = Field(default=1e-4, gt=0, description="Learning rate (AdamW) at its first step; a cosine brings it to 0.")
    batch_size: int = Field(default=4, ge=1, description="Rows of a step.")
    max_length: int = Field(default=128, ge=2, description="Tokens a row is cut to.")

    def compress(self, adapter: Path, out: Path, given: Given) -> dict[str, Any]:
        import torch

        from ftpipe.compress._packed import facts_to_pack, to_bits, write_packed
        from ftpipe.merge._deltas import read
        from ftpipe.models.sparse import keys
        from ftpipe.models.weights import tensor
        from ftpipe.train.adapt._weights import tensor_files

        facts, files = facts_to_pack(adapter), tensor_files(adapter)
        parts = keys(files, str(adapter))
        if not files:
            raise ConfigError("bitdelta packs whole weights; the bits of this adapter's change would be larger than the adapter", where=str(adapter),
                              remedy="use compeft or half_precision for it")
        packed: dict[str, torch.Tensor] = {}
        sums: dict[str, tuple[int, float, float]] = {}
        for name, delta in read(adapter, given.base).items():
            change = delta.dense()
            if parts[name].kind == "whole" and change.dim() == 2 and re.search(self.parameters, name):
                sums[name] = change.numel(), float(change.double().abs().sum()), float(change.double().pow(2).sum())
                packed[f"{name}.signs"] = to_bits(change >= 0)
                packed[f"{name}.scale"] = torch.tensor([sums[name][1] / sums[name][0]], dtype=torch.float32)
            elif bool(change.any()):
                packed |= {key: tensor(files[key], key) for key in parts[name].names}
        if not sums:
            raise ConfigError(f"no matrix that the adapter keeps whole matches {self.parameters!r}", where=str(adapter), remedy="set `parameters`")
        said: dict[str, Any] = {"packed": len(sums), "kept_whole": len(packed) - 2 * len(sums)}
        squares = sum(s for _, _, s in sums.values())
        rest = sum(float(d.dense().double().pow(2).sum()) for n, d in read(adapter, given.base).items() if n not in sums)

        def lost() -> float:
            scales = {n: float(packed[f"{n}.scale"]) for n in sums}
            error = sum(s - 2 * scales[n] * m + c * scales[n] ** 2 for n, (c, m, s) in sums.items())
            return (max(error, 0.0) / (squares + rest)) ** 0.5 if squares + rest else 0.0

        said["lost_before_distillation"] = lost()
        if self.rows:
            from ftpipe.compress._distil import distil

            scales, told = distil(given, adapter, {n: packed[f"{n}.signs"] for n in sums}, {n: packed[f"{n}.scale"] for n in sums}, self)
            packed |= {f"{n}.scale": s for n, s in scales.items()}
            said["distillation"] = told
        write_packed(out, packed, facts, self, {"shapes": {n: list(given.base()[n].shape) for n in sorted(sums)}})
        return said | {"lost": lost()}

    def expand(self, folder: Path, out: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        from safetensors import safe_open

        from ftpipe.compress._packed import FILE, read_packed
        from ftpipe.merge._weights import Writer
        from ftpipe.models.weights import tensor

        facts, packed = read_packed(folder)
        writer = Writer(out, facts, base, whole=True)
        with safe_open(folder / FILE, framework="pt") as f:
            whole = sorted(n for n in f.keys() if not n.endswith((".signs", ".scale")))  # noqa: SIM118 (not a dict)
        for name, shape in packed["shapes"].items():
            writer.add(name, change(tensor(folder / FILE, f"{name}.signs"), tensor(folder / FILE, f"{name}.scale"), shape))
        for name in whole:
            writer.put(name, tensor(folder / FILE, name))
        writer.close()


def change(signs: torch.Tensor, scale: torch.Tensor, shape: list[int]) -> Any:
    """The change that packed signs and a scale stand for."""
    from ftpipe.merge._deltas import Delta

    return Delta(dense_=plus_minus(signs, shape).float() * scale)


def plus_minus(signs: torch.Tensor, shape: Any) -> torch.Tensor:
    """Packed signs as +1 and -1, int8."""
    import torch

    from ftpipe.compress._packed import from_bits

    return (torch.from_numpy(from_bits(signs, torch.Size(shape).numel())).to(torch.int8) * 2 - 1).view(*shape)

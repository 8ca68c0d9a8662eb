"""What diagnostics share: tables, and the weights that adapters changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ftpipe.evaluate.diagnostics.base import Evidence


def table(columns: dict[str, str], rows: list[tuple]) -> Any:
    """An Arrow table of rows; `columns` gives each column's name and Arrow type."""
    import pyarrow as pa

    types = [pa.type_for_alias(t) for t in columns.values()]
    return pa.table({name: pa.array([r[i] for r in rows], t) for i, (name, t) in enumerate(zip(columns, types))})


def called(system: str) -> str:
    """A system in a sentence."""
    return f"the {system}" if system in ("base", "adapter", "champion") else system


def each(told: dict[str, str]) -> str:
    """`the base 3 %, the adapter 4 %` from what is told of each system; the base first, the champion last."""
    rank = {"base": 0, "adapter": 1, "champion": 3}
    return ", ".join(f"{called(system)} {words}" for system, words in sorted(told.items(), key=lambda item: rank.get(item[0], 2)))


def changed_matrices(evidence: Evidence) -> Iterator[tuple[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]]:
    """Each system with the weight matrices that its adapter changed, by name in order: (before, after), float32 on the CPU."""
    from ftpipe import slots
    from ftpipe.models.adapters import read_manifest
    from ftpipe.models.loading import load_adapted, load_model, quantized_base

    def matrices(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {n: p.detach() for n, p in model.named_parameters() if p.dim() == 2}

    whole = matrices(load_model(evidence.model, evidence.env, dtype="float32", device="cpu"))
    for system, tuned in evidence.adapters.items():
        told = read_manifest(tuned.folder)
        method = slots.parse("train/adapt", told["method"])
        small = quantized_base(evidence.model, evidence.env, told)  # the adapter's own change is what is looked at, not the rounding of its base
        base = whole if small is None else matrices(small)
        merged = method.merge(load_adapted(evidence.model, evidence.env, tuned.folder, dtype="float32", device="cpu",  # type: ignore[attr-defined]
                                           allow_zero=True, dequantized=True))
        yield system, {n: (base[n], p.detach()) for n, p in sorted(merged.named_parameters())
                       if n in base and p.shape == base[n].shape and bool((p != base[n]).any())}

"""Take away what an adapter learnt: unlearning by negation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from ftpipe.edit.base import Editor

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta, Deltas


class Negate(Editor):
    """`W = W_base - scale * D` for the change D of an adapter that was trained on what is to be unlearnt.

    The larger the scale, the more is unlearnt, of other things too: let an evaluation on general text choose it. Exact for LoRA and for full
    weights; the rank stays the same.
    """

    scale: float = Field(default=1.0, gt=0, le=10, description="How much of the change is taken away.")

    def edit(self, deltas: Deltas) -> tuple[dict[str, Delta], dict[str, Any]]:
        return {name: delta.times(-self.scale) for name, delta in deltas.items()}, {"scale": -self.scale}

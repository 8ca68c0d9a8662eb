"""Shares of sources by size, flattened by a temperature."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.mix._sources import RateMixer

if TYPE_CHECKING:
    import numpy as np


class Temperature(RateMixer):
    """Gives source i a share of the epoch proportional to weight_i * min(n_i, cap)^(1 / temperature), n_i its size in rows (or tokens, by `unit`).

    T5 (Raffel et al., 2020, section 3.5.2) calls it temperature-scaled mixing. Temperature 1 is `proportional`, or with a cap `capped`; a large one
    (1000) shows all sources alike.
    """

    temperature: float = Field(default=1.0, gt=0, description="1: in proportion to size; larger: more equal; large (1000): equal.")
    cap: int | None = Field(default=None, ge=1, description="Size that a source counts for at most.")

    def rates(self, size: np.ndarray) -> np.ndarray:
        import numpy as np

        return (np.minimum(size, self.cap) if self.cap else size) ** (1 / self.temperature)

"""Shares of sources in proportion to their size, up to a cap."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from ftpipe.curate.mix._sources import RateMixer, Sources

if TYPE_CHECKING:
    import numpy as np


class Capped(RateMixer):
    """Gives source i a share of the epoch proportional to weight_i * min(n_i, cap), n_i its size in rows (or tokens, by `unit`).

    T5 (Raffel et al., 2020, section 3.5.2) calls the cap K an artificial limit of the data set's size: one huge source does not crowd out the others. If no
    size of the epoch is set it is the sum of min(n_i, cap), so that without weights no row is shown twice: small sources whole, of large ones a sample.
    """

    cap: int = Field(ge=1, description="Size that a source counts for at most, in `unit`.")

    def rates(self, size: np.ndarray) -> np.ndarray:
        import numpy as np

        return np.minimum(size, self.cap).astype(float)

    def usual(self, sources: Sources) -> int:
        return int(self.rates(sources.size).sum())

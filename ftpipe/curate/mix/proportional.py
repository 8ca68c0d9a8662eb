"""Shares of sources in proportion to their size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.curate.mix._sources import RateMixer

if TYPE_CHECKING:
    import numpy as np


class Proportional(RateMixer):
    """Gives source i a share of the epoch proportional to weight_i * n_i, n_i its size in rows (or tokens, by `unit`): T5's examples-proportional mixing.

    With neither weights nor a size of the epoch every row is shown once. A smaller epoch is a sample that keeps the shares of the sources exactly, which
    a random one keeps on average only; a larger one repeats all sources alike.
    """

    def rates(self, size: np.ndarray) -> np.ndarray:
        return size.astype(float)

"""The base of methods that make an adapter smaller."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class Compressor(Method):
    """Makes an adapter smaller and says what was lost."""

    slot: ClassVar[str] = "compress"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas",)

    @abstractmethod
    def compress(self, adapter: Path, out: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> dict[str, Any]:
        """Write the smaller adapter's folder.

        Args:
            adapter: folder with `ftpipe_adapter.json`. out: folder to write; it does not exist.
            base: gives the base model's weights by name, should the method need them.
        Returns JSON with at least `lost`: the norm of what was lost as a share of the norm of the change.
        """

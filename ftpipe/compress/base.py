"""The base of methods that make an adapter smaller."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.errors import ArtifactError
from ftpipe.slots import Method

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._given import Given


class Compressor(Method):
    """Makes an adapter smaller and says what was lost."""

    slot: ClassVar[str] = "compress"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas", "ftpipe.merge._given")

    @abstractmethod
    def compress(self, adapter: Path, out: Path, given: Given) -> dict[str, Any]:
        """Write the smaller adapter's folder.

        Args:
            adapter: folder with `ftpipe_adapter.json`. out: folder to write; it does not exist.
            given: the base model's weights and the surroundings; its `adapters` are empty.
        Returns JSON with at least `lost`: the norm of what was lost as a share of the norm of the change.
        """

    def expand(self, folder: Path, out: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Write into `out`, which does not exist, the plain adapter that a packed one stands for, in the form of the method it was trained by.

        Only for methods that write `packed` into the adapter's facts (see `ftpipe/compress/_packed.py`); such an adapter is expanded whenever it is loaded.
        """
        raise ArtifactError(f"{self.name()} packs nothing, so there is nothing to unpack", where=str(folder))

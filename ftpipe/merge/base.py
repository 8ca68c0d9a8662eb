"""The base of methods that make one adapter out of several."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.slots import Method

if TYPE_CHECKING:
    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class Merger(Method):
    """Combines changes of weights, one weight at a time. A method writes `combine`; reading, checking and writing adapters is done by the stage.

    Class attributes:
        keeps_rank: the combination of low-rank changes is of low rank, so that LoRA adapters give a LoRA adapter without any loss.
    """

    slot: ClassVar[str] = "merge"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.merge._deltas", "ftpipe.merge._given")
    keeps_rank: ClassVar[bool] = False

    rank: int | None = Field(default=None, ge=1, description="Largest rank of the result: each weight's change is cut to its best approximation (SVD), and "
                             "what that loses is stated. Without it nothing is cut.")
    whole: bool = Field(default=False, description="Write whole weights, as a full fine-tune does, and not a LoRA.")

    def low_rank(self) -> bool:
        """Whether low-rank changes stay of low rank under this method with these settings."""
        return type(self).keeps_rank

    def check(self, given: Given) -> None:
        """Raises ConfigError for settings that do not fit the adapters, before long work. Ask `super().check` too."""
        quantised = bool(given.facts.get("quantize"))
        if quantised and self.whole:
            raise ConfigError("whole weights have no place in a quantised base, on which the adapters were trained",
                              remedy="leave `whole` out, or train on the base as it is")
        if self.rank or self.whole or self.low_rank() or not given.adapters:
            return
        first = next(iter(given.names), None)
        if first and all(d.low_rank for d in given.parts(first).values()):
            raise ConfigError(f"{self.name()} makes changes of full rank out of LoRA adapters, so the result is no LoRA",
                              remedy="set `rank` (say 16): the change is cut to it by SVD, and merge.json states what is lost"
                                     + ("" if quantised else "; or set `whole: true` for a set of whole weights"))

    def prepare(self, given: Given) -> Any:
        """What has to be found out over all weights before the first is combined; handed to `combine` as `state`."""
        return None

    @abstractmethod
    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        """The merged change of the weight `name`.

        parts: its changes by adapter, in the order given, at least one. An adapter that leaves the weight alone is not among them: its change is zero.
        """

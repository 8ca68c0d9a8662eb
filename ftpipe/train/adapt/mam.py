"""MAM adapter (He et al. 2022): a short prefix at every attention, and a scaled parallel adapter at every feed-forward network.

The prefix is PEFT's prefix tuning with its network (embedding, tanh, 2 x layers x heads x size), which trains and is folded into the prefix when it is
saved. Where the paper leaves a choice: prefix keys are not rotated (RoPE), the tokens' positions start behind them, and under grouped queries there is one
prefix for each key head. With a prefix attention is (1 - w) Attn(x) + w softmax(x W_q P_k') P_v, so the start is not the base model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.train.adapt._inserted import WEIGHTS
from ftpipe.train.adapt.parallel import Parallel
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch

PREFIX = "prefix."
WRAPPED = "base_model."


class Mam(Parallel):
    """The parallel adapter's settings, and the prefix's."""

    libraries: ClassVar[tuple[str, ...]] = ("peft", "transformers", "torch")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._inserted", "ftpipe.train.adapt._peft_family", "ftpipe.train.adapt._peft")
    packs: ClassVar[bool] = False

    prefix: int = Field(default=30, ge=1, description="Number of prefix positions at every attention.")
    prefix_network: int = Field(default=800, ge=1, description="Inner width of the network that the prefix comes from during training.")

    def _prefix(self) -> Any:
        from ftpipe.slots import parse

        settings = {"num_virtual_tokens": self.prefix, "prefix_projection": True, "encoder_hidden_size": self.prefix_network}
        return parse("train/adapt", {"prefix_tuning": settings})

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        # PEFT freezes what it wraps, so the parallel adapters come second.
        return super().prepare(self._prefix().prepare(model, run), run)

    @contextmanager
    def without(self, model: torch.nn.Module) -> Iterator[None]:
        with model.disable_adapter(), super().without(model):
            yield

    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        own = {n.removeprefix(WRAPPED): v for n, v in state.items() if n.startswith(WRAPPED)}
        super().save(model, own | {PREFIX + n: v for n, v in self._prefix().learnt(model, state).items()}, folder)

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        from safetensors.torch import load_file

        saved, method = load_file(folder / WEIGHTS), self._prefix()
        model = self.put_on(model, {n: v for n, v in saved.items() if not n.startswith(PREFIX)}, str(folder))
        return method.put_on(model, method.config(), {n.removeprefix(PREFIX): v for n, v in saved.items() if n.startswith(PREFIX)}, str(folder))

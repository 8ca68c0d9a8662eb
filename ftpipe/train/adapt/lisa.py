"""LISA (Pan et al. 2024): embedding, last norm and head train throughout; of the layers a few, drawn anew every so many steps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._blocks import by_block
from ftpipe.train.adapt._weights import WeightsAdapt
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Change, Run, derive_seed

if TYPE_CHECKING:
    import torch


class Lisa(WeightsAdapt):
    """At steps 0, K, 2K, ... `active` of the layers are drawn uniformly without replacement and train until the next draw.

    A layer that leaves keeps its values, and its optimizer state is dropped: one that is drawn again starts from zero moments. A layer that stays keeps
    its state. Layers that have trained stay float32, so that what they learnt is not rounded away; the others are in the base model's type. Each step
    records the layers that train, in ascending order, as `lisa_layer_1`, `lisa_layer_2`, ... (numbers from 0).

    "Importance" sampling means only that embedding and head have probability 1: neither gradients nor rates are weighted by 1/p.
    """

    paper: ClassVar[str] = "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning"
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._weights", "ftpipe.models.sparse", "ftpipe.train.adapt._blocks")

    active: int = Field(default=2, ge=1, description="Layers that train at a time (gamma).")
    every: int = Field(default=20, ge=1, description="Optimizer steps between draws (K).")
    forget_shared: bool = Field(default=False, description="Start the optimizer state of embedding, last norm and head anew at each draw too, as the paper's "
                                "own runs did by saving and loading the model.")

    def sized(self, size: int) -> Adapt:
        return self.with_fields(active=size)

    def drawn(self, layers: int, seed: int, period: int) -> list[int]:
        """Numbers of the layers that train in a period, ascending: a function of the seed and the period alone."""
        import torch

        generator = torch.Generator().manual_seed(derive_seed(seed, "lisa", period))
        return sorted(torch.randperm(layers, generator=generator)[:self.active].tolist())

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        outside, inside = by_block(model)
        if self.active > len(inside):
            raise ConfigError(f"{self.active} layers cannot train at a time: the model has {len(inside)}", remedy=f"set active to {len(inside)} or less")
        return outside + [n for i in self.drawn(len(inside), run.seed, run.step // self.every) for n in inside[i]]

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """A group for each layer: under ZeRO a group has one count of steps, and layers that were drawn at different times need their own."""
        outside, inside = by_block(model)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        groups = [[parameters[n] for n in names if n in parameters] for names in (outside, *inside)]
        return [{"params": group} for group in groups if group]

    def before_step(self, run: Run) -> Change | None:
        outside, inside = by_block(run.model)
        now = self.drawn(len(inside), run.seed, run.step // self.every)
        run.metrics |= {f"lisa_layer_{place}": float(layer) for place, layer in enumerate(now, start=1)}
        if run.step == 0 or run.step % self.every:
            return None
        run.log.info("step %d: layers %s train", run.step + 1, ", ".join(map(str, now)))
        wanted = frozenset(outside + [n for i in now for n in inside[i]])
        forget = frozenset(outside if self.forget_shared else ())
        return Change(wanted, forget) if forget or wanted != frozenset(run.engine.names) else None

"""DEFT: a loss on how many intermediate units of the feed-forward layers are active."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError, TrainingError
from ftpipe.train.regularizer._hooks import at_rows, blocks
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Batch, Run

if TYPE_CHECKING:
    import torch


class ActivationDensity(Regularizer):
    """strength * mean tanh(sharpness |o|), o what the activation functions in all blocks give, over blocks, units and the places whose token is trained.

    tanh(sharpness |o|) is a smooth count of o that are not zero: 0 for zero, nearly 1 from |o| = 2 / sharpness on. In a gated layer o is the activated gate,
    whose zeros are zeros of the product too. The base stays as it is where an adapter trains (Runwal et al. 2024; the surrogate and its sharpness are inferred
    from the paper's abstract). `active_share` records the share of |o| above `threshold`.
    """

    paper: ClassVar[str] = "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")

    strength: float = Field(default=1.0, ge=0, description="Weight of the density; 0 leaves training as it is.")
    sharpness: float = Field(default=10.0, gt=0, description="How steeply the smooth count climbs.")
    threshold: float = Field(default=0.1, ge=0, description="Size from which a unit counts as active in `active_share`.")

    def prepare(self, run: Run) -> None:
        if not activations(run.model):
            raise ConfigError(f"no activation function in the blocks of {type(run.model).__name__}",
                              remedy="activation_density needs blocks that hold their activation function as a module")

    def density(self, values: torch.Tensor) -> torch.Tensor:
        """The smooth share of values that are not zero: a scalar."""
        return (self.sharpness * values.float().abs()).tanh().mean()

    @contextmanager
    def forward(self, run: Run, batch: Batch) -> Iterator[None]:
        seen = run.cache["activation_density"] = []

        with ExitStack() as stack:
            for module, activate in activations(run.model):
                def watch(module: Any, _: Any, out: torch.Tensor, activate: Any = activate) -> None:
                    if module.training:  # not in a reference
                        places = activate(at_rows(out, batch)[batch.sources])
                        seen.append((self.density(places), (places.detach().abs() > self.threshold).float().mean()))

                stack.callback(module.register_forward_hook(watch).remove)
            yield

    def penalty(self, run: Run, batch: Batch) -> torch.Tensor:
        seen = run.cache.pop("activation_density")
        if not seen:
            raise TrainingError("activation_density saw no activation in the forward pass of the objective",
                                remedy="leave it out: this model computes its feed-forward layers without calling their modules")
        density, active = (sum(values) / len(seen) for values in zip(*seen, strict=True))
        for name, value in (("density", density), ("active_share", active)):
            run.sums[name] = run.sums.get(name, 0.0) + float(value.detach()) * batch.count * batch.weight
        return self.strength * density


def activations(model: Any) -> list[tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor]]]:
    """The modules in the blocks of a model whose output, put through the function beside them, is what an activation function gives.

    In a gated layer that is the gate and the layer's activation: the layer may compute both in one piece and never call the activation as a module.
    """
    modules = list(blocks(model).modules())
    gated = [m for m in modules if hasattr(m, "gate_proj") and hasattr(m, "act_fn")]
    inside = {id(m.act_fn) for m in gated}
    others = [m for m in modules if type(m).__module__ in ("transformers.activations", "torch.nn.modules.activation") and id(m) not in inside]
    return [(m.gate_proj, m.act_fn) for m in gated] + [(m, _itself) for m in others if not list(m.children())]


def _itself(values: torch.Tensor) -> torch.Tensor:
    return values

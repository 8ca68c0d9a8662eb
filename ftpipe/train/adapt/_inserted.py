"""What methods share that put small networks of their own into a frozen decoder.

A network is a child module `adapter` of an attention or feed-forward module, and a forward hook on that module takes it into account; a normalisation layer
that trains is a copy beside the frozen one. So the base model stays whole inside, `without` is exact, and ZeRO 3 gathers each network when it runs.

The adapter folder holds `adapter.safetensors`: what was trained, by its name in the model.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter.safetensors"
NAME = "adapter"
ATTENTION, FEED_FORWARD = ("attention", "attn"), ("mlp", "feedforward", "ffn", "moe")
Activation = Literal["gelu", "relu", "silu"]


@dataclass(frozen=True)
class Block:
    """One decoder layer: its attention and feed-forward modules, whose outputs are what is added to the residual stream."""

    attention: torch.nn.Module
    feed_forward: torch.nn.Module


def blocks(model: torch.nn.Module) -> list[Block]:
    """The decoder's layers in order, found by structure: the list of `num_hidden_layers` modules that each have one child whose class is an attention and
    one whose class is a feed-forward network. Raises ConfigError, with what was found, for a model that is built otherwise."""
    import torch

    count = getattr(model.config, "num_hidden_layers", None)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    why = f"no list of {count} layers"
    for layers in lists:
        found = []
        for number, layer in enumerate(layers):
            kinds = {kind: [c for c in layer.children() if any(w in type(c).__name__.lower() for w in kind)] for kind in (ATTENTION, FEED_FORWARD)}
            if wrong := [k for k, c in kinds.items() if len(c) != 1]:
                what = "attention" if wrong[0] is ATTENTION else "feed-forward"
                why = f"layer {number} ({type(layer).__name__}) has {len(kinds[wrong[0]])} {what} modules among {sorted(n for n, _ in layer.named_children())}"
                break
            block = Block(kinds[ATTENTION][0], kinds[FEED_FORWARD][0])
            if own := [m for m in (block.attention, block.feed_forward) if "residual" in inspect.signature(m.forward).parameters]:
                why = f"{type(own[0]).__name__} adds the residual itself, so nothing can be put before it"
                break
            found.append(block)
        else:
            return found
    raise ConfigError(f"adapters cannot be put into {type(model).__name__}: {why}", remedy="use a low-rank method such as lora for this model")


@cache
def _classes() -> tuple[type, type]:
    """The module classes, made when torch is first needed."""
    import torch
    from torch.nn import functional

    class Bottleneck(torch.nn.Module):
        """scale * (W_up f(W_down x + b_down) + b_up), with dropout after f. x [..., d]; the result has x's type and no residual in it."""

        def __init__(self, width: int, size: int, activation: Activation, scale: float, dropout: float):
            super().__init__()
            self.down, self.up = torch.nn.Linear(width, size), torch.nn.Linear(size, width)
            self.activation, self.scale, self.dropout, self.off = getattr(functional, activation), scale, dropout, False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = functional.dropout(self.activation(self.down(x.to(self.down.weight.dtype))), self.dropout, self.training)
            return (self.scale * self.up(inner)).to(x.dtype)

    class Switched(torch.nn.Module):
        """A frozen layer and a trained copy of it; `off` chooses the frozen one."""

        def __init__(self, base: torch.nn.Module):
            import copy

            super().__init__()
            self.base, self.own, self.off = base, copy.deepcopy(base), False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (self.base if self.off else self.own)(x).to(x.dtype)

    return Bottleneck, Switched


def bottleneck(model: torch.nn.Module, size: int, activation: Activation, scale: float = 1.0, dropout: float = 0.0) -> torch.nn.Module:
    """A bottleneck of the model's width, float32 on the CPU, with all values zero."""
    import torch

    made = _classes()[0](model.config.hidden_size, size, activation, scale, dropout)
    for parameter in made.parameters():
        torch.nn.init.zeros_(parameter)
    return made


def insert(module: torch.nn.Module, network: torch.nn.Module, hook: Any) -> None:
    """Make a network the module's child, on its device, and let the hook use it."""
    if hasattr(module, NAME):
        raise ConfigError(f"{type(module).__name__} already has something called {NAME!r}", remedy="put one adapter on a model")
    module.add_module(NAME, network.to(next(module.parameters()).device))
    module.register_forward_hook(hook, with_kwargs=True)


def after(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Sequential: the module's output h becomes h + network(h)."""
    return None if module.adapter.off else _with_hidden(out, lambda h: h + module.adapter(h))


def beside(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
    """Parallel: the network reads what the module reads, and is added to the module's output."""
    given = args[0] if args else kwargs["hidden_states"]
    return None if module.adapter.off else _with_hidden(out, lambda h: h + module.adapter(given))


def _with_hidden(out: Any, change: Any) -> Any:
    return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


def copy_norms(model: torch.nn.Module) -> None:
    """Give every normalisation layer a copy that can train."""
    kind = _classes()[1]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if "norm" in type(child).__name__.lower() and any(True for _ in child.parameters(recurse=False)):
                setattr(parent, name, kind(child))


class InsertedAdapt(Adapt):
    """Networks of its own inside a frozen decoder. A subclass says which by `install`; everything it adds trains."""

    libraries: ClassVar[tuple[str, ...]] = ("transformers", "torch")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._inserted",)

    @abstractmethod
    def install(self, model: torch.nn.Module, generator: torch.Generator | None) -> None:
        """Put the networks into the model, float32, drawn from the generator; without one their values do not matter."""

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        for _, parameter in self._add(model, run.generator(self.name())):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return model

    def _add(self, model: torch.nn.Module, generator: torch.Generator | None) -> list[tuple[str, torch.nn.Parameter]]:
        """Install, and return what was added."""
        before = {id(p) for p in model.parameters()}
        self.install(model, generator)
        return [(n, p) for n, p in model.named_parameters() if id(p) not in before]

    def groups(self, model: torch.nn.Module) -> list[dict[str, Any]]:
        """Matrices as the optimizer has it; biases and normalisation without weight decay."""
        trained = [p for p in model.parameters() if p.requires_grad]
        # Under ZeRO 3 a parameter has lost its shape.
        plain = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
        ids = {id(p) for p in plain}
        return [g for g in ({"params": plain}, {"params": [p for p in trained if id(p) not in ids], "weight_decay": 0.0}) if g["params"]]

    @contextmanager
    def without(self, model: torch.nn.Module) -> Iterator[None]:
        switched = [m for m in model.modules() if isinstance(m, _classes())]
        for module in switched:
            module.off = True
        try:
            yield
        finally:
            for module in switched:
                module.off = False

    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        save_file({n: state[n].contiguous().clone() for n in sorted(state)}, folder / WEIGHTS, metadata={"format": "pt"})

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        from safetensors.torch import load_file

        return self.put_on(model, load_file(folder / WEIGHTS), str(folder))

    def put_on(self, model: torch.nn.Module, saved: Mapping[str, torch.Tensor], where: str) -> torch.nn.Module:
        """The base model with what `save` wrote, by name, for inference."""
        import torch

        dtype = next(model.parameters()).dtype
        added = dict(self._add(model, None))
        wrong = sorted(set(added) ^ set(saved)) or [n for n in added if added[n].shape != saved[n].shape]
        if wrong:
            raise ArtifactError(f"the adapter and {self.name()} disagree on {len(wrong)} tensors, the first is {wrong[0]}", where=where)
        with torch.no_grad():
            for name, parameter in added.items():
                parameter.data = saved[name].to(parameter.device, dtype)
                parameter.requires_grad_(False)
        return model.eval()

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        raise ConfigError(f"{self.name()} cannot be merged into the base model: its networks are not linear, and no weight of the base could hold them",
                          remedy="keep the adapter beside the base")

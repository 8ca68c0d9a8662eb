"""Low-rank pairs that do not start at zero: what PiSSA and CorDA share.

Such a method takes a part s B0 A0 out of a weight W and trains it: h = (W - s B0 A0) x + s B A x. The frozen difference W - s B0 A0 is never formed
here. With W as it is, the same function is

    h = W x + s (B A - B0 A0) x = W x + s (B (A - A0) + (B - B0) A0) x

and it is computed by its right side, from the float32 masters A and B: two products of rank r, as a LoRA of rank 2r. Why not the difference:

* A difference rounded to bf16 is another model than the base before anything is learnt. Here the two terms are exactly zero at the start, in any type.
* In bf16 a weight A of 0.1 has a spacing of 5e-4, so that a pair computed as B A loses most steps of a learning rate of 2e-4 to rounding; A - A0 is
  rounded after the subtraction, and keeps them.
* The base stays the base: the adapter can be switched off (the reference of DPO), a base that shares a weight between layers is not changed in both,
  and there is no frozen weight to be changed again after a kill.

The gradients of A and B are those of the usual form. What is saved is the right side written out, a LoRA of rank 2r over the unchanged base.
Dropout, where it is set, is over the input of both terms, so that it disturbs what is learnt and not the part that was taken out.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._lora import LoraFamily, lora_layers
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig

A, B = "lora_A.weight", "lora_B.weight"
START = {A: "lora_A.start", B: "lora_B.start"}


class MovedLora(LoraFamily):
    """A LoRA that starts at a pair (A0, B0) of each layer which `starts` finds, and whose change is counted from there."""

    alpha: float | None = Field(default=None, gt=0, description="Scale of the pair: it is multiplied by alpha / r (alpha / sqrt(r) with rslora). r if not set, "
                                "as in the paper.")

    support: ClassVar[tuple[str, ...]] = (*LoraFamily.support, "ftpipe.train.adapt._moved")

    @abstractmethod
    def starts(self, model: torch.nn.Module, layers: Mapping[str, Any], run: Run) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """(name, A0 [r, inputs], B0 [outputs, r]) of every one of PEFT's LoRA layers, such that B0 A0 is what is taken out of its weight.

        `model` is the wrapped base model; its adapter is at zero still.
        """

    def config(self) -> LoraConfig:
        return self.lora_config(lora_alpha=self.alpha or self.r)

    def outline(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        wrapped = super().outline(model, run)
        for name, layer in lora_layers(wrapped, self.name()).items():
            most = min(layer.in_features, layer.out_features)
            if self.r > most:
                raise ConfigError(f"{name} has rank {most} at most, so that {self.name()} cannot take a part of rank {self.r} out of it",
                                  remedy=f"set r to {most} or less, or leave it out of target_modules")
        return wrapped

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        wrapped = self.outline(model, run)
        layers = lora_layers(wrapped, self.name())
        if not self._kept(run):
            for name, a, b in self.starts(wrapped, layers, run):
                root = math.sqrt(layers[name].scaling["default"])
                for side, value in ((A, a), (B, b)):
                    run.memory[self._key(name, side)] = run.agreed((value / root).float().contiguous()).cpu()
                run.alive(f"{self.name()} starts {name}")
        first, second = _modules()
        for name, layer in layers.items():
            device = layer.get_base_layer().weight.device
            a, b = (run.memory[self._key(name, side)].to(device) for side in (A, B))
            layer.lora_A["default"], layer.lora_B["default"] = first(a), second(b)
        return wrapped

    def resumed(self, run: Run) -> None:
        """Put back the start that the trained pair is counted from."""
        for name, layer in lora_layers(run.model, self.name()).items():
            for side, module in ((A, layer.lora_A["default"]), (B, layer.lora_B["default"])):
                module.start.copy_(run.memory[self._key(name, side)])

    def written(self, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The change as a plain LoRA of rank 2r at the same scale: A' = [A - A0; A0], B' = [B, B - B0]. A layer that did not move is written as zeros."""
        import torch

        found = {}
        for path in (n.removesuffix(A) for n in tensors if n.endswith(A)):
            (a, a0), (b, b0) = ((tensors[path + s].float(), tensors[path + START[s]].float()) for s in (A, B))
            moved = not (a.equal(a0) and b.equal(b0))
            found[path + A] = torch.cat([a - a0, a0])
            found[path + B] = torch.cat([b, b - b0], 1) if moved else torch.zeros(b.shape[0], 2 * self.r)
        scale = config["lora_alpha"] * (math.sqrt(2) if self.rslora else 2)
        return found, config | {"r": 2 * self.r, "lora_alpha": scale, "init_lora_weights": True}

    def _key(self, name: str, side: str) -> str:
        return f"{self.name()}/{name}/{side}"

    def _kept(self, run: Run) -> bool:
        return any(key.startswith(f"{self.name()}/") for key in run.memory)


def halves(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(S^1/2 V^T, U S^1/2) of singular triples. The sign of each is free: the largest entry of its right vector is made positive."""
    import torch

    signs = torch.sign(vh.gather(1, vh.abs().argmax(1, keepdim=True)))
    root = s.sqrt()
    return root[:, None] * vh * signs, u * signs.T * root


@lru_cache
def _modules() -> tuple[type, type]:
    """The modules that stand where PEFT has its linear layers A and B. Each owns what it reads, so that ZeRO 3 finds it."""
    import torch
    from torch.nn.functional import linear

    class Moved(torch.nn.Module):
        """A trained matrix and where it started."""

        def __init__(self, start: torch.Tensor):
            super().__init__()
            self.weight = torch.nn.Parameter(start.clone())
            self.register_buffer("start", start.clone())

    class First(Moved):
        """x -> [(A - A0) x, A0 x]"""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([linear(x, self.weight - self.start), linear(x, self.start)], -1)

    class Second(Moved):
        """[u, v] -> B u + (B - B0) v"""

        def forward(self, both: torch.Tensor) -> torch.Tensor:
            return linear(both, torch.cat([self.weight, self.weight - self.start], 1))

    return First, Second


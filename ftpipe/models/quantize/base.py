"""The base of quantisation methods: smaller weights for a frozen base model, with the loss stated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.slots import Method

if TYPE_CHECKING:
    import torch

    from ftpipe.data.render import Rendered


@dataclass(frozen=True)
class Loss:
    """What quantisation cost and saved.

    layers: how many were quantised. bytes_before, bytes_after: of all parameters, buffers and quantisation constants. nll_before, nll_after: mean loss (nats
    a trained token) of the probe rows; None without a probe.
    """

    layers: int
    bytes_before: int
    bytes_after: int
    nll_before: float | None = None
    nll_after: float | None = None


class Quantizer(Method):
    """Replaces the linear layers of a base model by smaller ones. A subclass writes `quantize`, `is_small` and `weight`. The result is for inference and for
    training adapters beside it; its own weights do not train. A small layer keeps `in_features`, `out_features` and `bias` of the layer it stands for, and
    passes gradients on to its input.

    Class attributes:
        zero_stages: ZeRO stages under which an adapter trains on such a base.
    """

    slot: ClassVar[str] = "models/quantize"
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2)

    def ready(self) -> None:
        """Raise ConfigError if something the method needs is not installed. Called before anything runs; imports nothing heavy."""

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """What to tell transformers' `from_pretrained` so that it makes the layers small while it reads them, and the model is never whole in memory;
        nothing if the method can only work on a model in memory. `quantize` is called afterwards either way."""
        return {}

    @abstractmethod
    def quantize(self, model: Any) -> Any:
        """The model with its `layers` quantised, perhaps the same object changed in place. The same model gives the same bits every time."""

    @abstractmethod
    def is_small(self, module: torch.nn.Module) -> bool:
        """Whether a module is a layer that this method made."""

    @abstractmethod
    def weight(self, layer: Any) -> torch.Tensor:
        """The weight (out, in) that a small layer stands for, in floating point: what its forward pass multiplies with."""

    def constants(self, layer: Any) -> Iterator[torch.Tensor]:
        """Tensors that a small layer keeps beside its parameters and buffers."""
        return iter(())

    def layers(self, model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
        """Linear layers by name, without the output head: its rounding falls on every logit, and it often shares its weights with the input embedding."""
        import torch

        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear and module is not head:
                yield name, module

    def small(self, model: torch.nn.Module) -> dict[str, Any]:
        """The layers of a model that this method made, by name."""
        return {name: module for name, module in model.named_modules() if self.is_small(module)}

    def dequantized(self, model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """The quantised model with plain layers in its small layers' place, which hold the weights those stand for; everything in `dtype`. Changed in place."""
        import torch

        for name, layer in self.small(model).items():
            weight = self.weight(layer).to(dtype)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                plain.bias = torch.nn.Parameter(layer.bias.detach(), requires_grad=False)
            replace(model, name, plain.train(layer.training))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)  # not model.to(dtype): transformers refuses it for a model that was read quantised
        return model

    def parameters(self, model: torch.nn.Module) -> int:
        """How many parameters the quantised model stands for: those of its small layers count one by one, however they are packed."""
        small = self.small(model)
        inside = {id(t) for layer in small.values() for t in layer.parameters(recurse=False)}
        whole = sum(layer.out_features * (layer.in_features + (layer.bias is not None)) for layer in small.values())
        return whole + sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in inside)

    def bytes(self, model: torch.nn.Module) -> int:
        """Bytes of all different tensors of a model, quantised by this method or not."""
        constants = [t for layer in self.small(model).values() for t in self.constants(layer)]
        tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers(), *constants]}
        return sum(tensors.values())

    def apply(self, model: Any, tokenizer: Any, probe: Sequence[Rendered] = ()) -> tuple[Any, Loss]:
        """Quantise and say what it cost: sizes, and the mean loss of the `probe` rows before and after."""
        from ftpipe.models.service import ModelService

        def mean_loss(m: Any) -> float | None:
            scores = ModelService(m, tokenizer).score(probe)
            tokens = sum(s.trained_tokens for s in scores)
            return sum(s.nll or 0.0 for s in scores) / tokens if tokens else None

        layers, size, before = len(list(self.layers(model))), self.bytes(model), mean_loss(model)
        small = self.quantize(model)
        return small, Loss(layers, size, self.bytes(small), before, mean_loss(small))


def replace(model: torch.nn.Module, name: str, layer: torch.nn.Module) -> None:
    """Put `layer` in the place of the module called `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)

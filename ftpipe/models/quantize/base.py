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

    layers: how many were quantised. bytes_before, bytes_after: of all parameters and buffers. nll_before, nll_after: mean loss (nats a trained token) of the
    probe rows; None without a probe.
    """

    layers: int
    bytes_before: int
    bytes_after: int
    nll_before: float | None = None
    nll_after: float | None = None


class Quantizer(Method):
    """Replaces the linear layers of a base model by smaller ones. A subclass writes `quantize`. The result is for inference and for training adapters beside
    it; its own weights do not train."""

    slot: ClassVar[str] = "models/quantize"

    @abstractmethod
    def quantize(self, model: Any) -> Any:
        """The model with its `layers` quantised, perhaps the same object changed in place. The same model gives the same bits every time."""

    def layers(self, model: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
        """Linear layers by name, without the output head: its rounding falls on every logit, and it often shares its weights with the input embedding."""
        import torch

        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        for name, module in model.named_modules():
            if type(module) is torch.nn.Linear and module is not head:
                yield name, module

    def apply(self, model: Any, tokenizer: Any, probe: Sequence[Rendered] = ()) -> tuple[Any, Loss]:
        """Quantise and say what it cost: sizes, and the mean loss of the `probe` rows before and after."""
        from ftpipe.models.service import ModelService

        def mean_loss(m: Any) -> float | None:
            scores = ModelService(m, tokenizer).score(probe)
            tokens = sum(s.trained_tokens for s in scores)
            return sum(s.nll or 0.0 for s in scores) / tokens if tokens else None

        layers, size, before = len(list(self.layers(model))), _bytes(model), mean_loss(model)
        small = self.quantize(model)
        return small, Loss(layers, size, _bytes(small), before, mean_loss(small))


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of all different tensors of a model."""
    tensors = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(tensors.values())

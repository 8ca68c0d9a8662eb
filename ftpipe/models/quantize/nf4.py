"""Weights in four bits, for training adapters beside them (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.models.quantize.base import Quantizer, replace

if TYPE_CHECKING:
    import torch


def bitsandbytes() -> Any:
    """The library, imported without what it would fetch: where the package `kernels` is installed it downloads and runs a kernel from the
    hub for CPUs with AVX512-BF16, which nobody asked for and nothing here uses."""
    hidden = "kernels" not in sys.modules and "bitsandbytes" not in sys.modules
    if hidden:
        sys.modules["kernels"] = None  # type: ignore[assignment]
    try:
        import bitsandbytes
    finally:
        if hidden:
            del sys.modules["kernels"]
    return bitsandbytes


class Nf4(Quantizer):
    """Each weight becomes one of 16 levels times a constant of its block: the largest |w| among 64 neighbours (row-major).

    The levels of `nf4` are quantiles of the normal distribution, scaled to [-1, 1], zero among them: about equally many weights fall on each if weights are
    normal, and the rounding error is smaller than that of the 16 floating-point numbers of `fp4`. A block's constant takes 32 bits, half a bit a weight;
    double quantisation keeps the constants themselves in 8 bits, in blocks of 256 around their mean, 8/64 + 32/(64 256) = 0.127 bits a weight.

    The forward and the backward pass widen a layer's weight when they come to it. The base's other parameters (embeddings, norms, output head) stay in the
    type of the run, as beside a LoRA on a whole base; PEFT's `prepare_model_for_kbit_training`, which makes them float32, is not called: what trains is float32
    anyway, norms compute in float32 inside, and a tied embedding is the larger part of a small model. The paper's third part, paged optimizers, is a
    matter of the optimizer, not of this method.

    ZeRO 3 spreads the packed weights over the ranks; the blocks' constants stay whole on each.

    The eval-time repacking that bitsandbytes does on CPUs with AVX512-BF16 is turned off: it rounds the constants once more, for good, and has no gradient,
    so that one evaluation would change the base that goes on training.
    """

    paper: ClassVar[str] = "QLoRA: Efficient Finetuning of Quantized LLMs"
    needs: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "bitsandbytes")
    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)

    levels: Literal["nf4", "fp4"] = Field(default="nf4", description="The 16 values that a weight can have: quantiles of the normal distribution, or "
                                          "floating-point numbers of 4 bits.")
    double: bool = Field(default=True, description="Keep the blocks' constants in 8 bits too (double quantisation).")
    compute: Literal["model", "bfloat16", "float32"] = Field(default="model", description="Type that a layer multiplies in; `model`: that of the run.")

    def ready(self) -> None:
        if find_spec("bitsandbytes") is None:
            raise ConfigError(f"{self.name()} keeps weights with bitsandbytes, which is not installed",
                              remedy="pip install 'ftpipe[gpu]' (it works on a CPU too)")

    def _compute(self, dtype: torch.dtype) -> torch.dtype:
        import torch

        return dtype if self.compute == "model" else getattr(torch, self.compute)

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        self.ready()
        bitsandbytes()
        from transformers import BitsAndBytesConfig

        return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=self.levels, bnb_4bit_use_double_quant=self.double,
                                                          bnb_4bit_compute_dtype=self._compute(dtype))}

    def quantize(self, model: Any) -> Any:
        self.ready()
        nn = bitsandbytes().nn
        for name, layer in list(self.layers(model)):
            small = nn.Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=self._compute(layer.weight.dtype),
                                  compress_statistics=self.double, quant_type=self.levels, device="meta")
            small.weight = nn.Params4bit(layer.weight.detach(), requires_grad=False, compress_statistics=self.double, quant_type=self.levels,
                                         module=small).to(layer.weight.device)
            small.bias = layer.bias
            replace(model, name, small.train(layer.training))
        seen: set[int] = set()
        for name, layer in self.small(model).items():
            layer.requires_grad_(False)
            layer.support_avx512bf16_for_cpu = False
            if layer.in_features not in seen:
                seen.add(layer.in_features)
                self._prove(name, layer)
        model.is_loaded_in_4bit = True  # by this PEFT chooses its layers
        return model

    def _prove(self, name: str, layer: Any) -> None:
        """Widen a layer by table, block by block, and compare: bitsandbytes 0.50.2 mixes up the blocks on a CPU with AVX512 where a layer has a multiple
        of 16, but not of 64, inputs."""
        import torch

        state, packed = layer.weight.quant_state, layer.weight.data.flatten().view(torch.uint8)
        blocks = bitsandbytes().functional.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: state.shape.numel()].long()
        table = state.code[codes] * blocks.float().repeat_interleave(state.blocksize)[: codes.numel()]
        away = float((self.weight(layer).flatten().float() - table).abs().max())
        if not away <= 0.01 * float(table.abs().max()):
            raise ConfigError(f"bitsandbytes widens 4-bit layers of {layer.in_features} inputs wrongly on this {layer.weight.device.type}: weights are off by "
                              f"{away:.2g}", where=name, remedy="quantise with `int8`, train on a GPU, or use a model whose layers have 64 n inputs")

    def is_small(self, module: torch.nn.Module) -> bool:
        # by name: no module of another kind has it, and the library need not be there to tell
        return type(module).__name__ == "Linear4bit" and type(module).__module__.startswith("bitsandbytes.")

    def weight(self, layer: Any) -> torch.Tensor:
        """In the type the layer multiplies in, to the bit as its forward pass sees it."""
        state = copy.copy(layer.weight.quant_state)
        state.dtype = layer.compute_dtype
        return bitsandbytes().functional.dequantize_4bit(layer.weight.data, state).reshape(state.shape)

    def constants(self, layer: Any) -> Iterator[torch.Tensor]:
        state = layer.weight.quant_state
        yield from (state.absmax, state.code)
        if state.nested:
            yield from (state.offset, state.state2.absmax, state.state2.code)

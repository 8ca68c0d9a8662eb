"""LoRA (Hu et al. 2021): frozen W, trained low-rank change. h = W x + s B A x, with s = alpha / r."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.train.adapt._lora import LoraFamily

if TYPE_CHECKING:
    from peft import PeftConfig


class Lora(LoraFamily):
    """A is drawn at random and B starts at zero, so that training starts at the base model exactly. Trains r (d_in + d_out) parameters a layer."""

    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models"
    quantized: ClassVar[tuple[str, ...]] = ("int8", "nf4")

    dora: bool = Field(default=False, description="Train the length of each weight column apart from its direction (DoRA).")
    init: Literal["default", "gaussian", "orthogonal"] = Field(default="default", description="How A is drawn: uniform (Kaiming), normal, or orthogonal pairs.")

    def trains_beside(self, quantize: str) -> bool:
        # DoRA needs the length of each column of the base's weight, and PEFT knows how to widen those of bitsandbytes alone
        return super().trains_beside(quantize) and not (self.dora and quantize == "int8")

    def config(self) -> PeftConfig:
        return self.lora_config(use_dora=self.dora, init_lora_weights=True if self.init == "default" else self.init)

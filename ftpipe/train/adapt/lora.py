"""LoRA (Hu et al. 2021): frozen W, trained low-rank change. h = W x + s B A x, with s = alpha / r."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ftpipe.train.adapt._peft import PeftAdapt

if TYPE_CHECKING:
    from peft import PeftConfig


class Lora(PeftAdapt):
    """A is drawn at random and B starts at zero, so that training starts at the base model exactly. Trains r (d_in + d_out) parameters a layer."""

    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models"
    quantized: ClassVar[tuple[str, ...]] = ("int8", "nf4")

    r: int = Field(default=16, ge=1, description="Rank of the change.")
    alpha: float = Field(default=32, gt=0, description="Scale of the change: it is multiplied by alpha / r (alpha / sqrt(r) with rslora).")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Share of a layer's inputs that are dropped before A, during training.")
    target_modules: list[str] | str = Field(default="all-linear", description="Names (or ends of names) of the layers to adapt, a regular expression, or "
                                            "`all-linear` for every linear layer but the output layer.")
    layers: list[int] | None = Field(default=None, description="Numbers of the transformer layers to adapt, from 0; all if not set.")
    rslora: bool = Field(default=False, description="Scale by alpha / sqrt(r), so that a higher rank does not learn more slowly.")
    dora: bool = Field(default=False, description="Train the length of each weight column apart from its direction (DoRA).")
    init: Literal["default", "gaussian", "orthogonal"] = Field(default="default", description="How A is drawn: uniform (Kaiming), normal, or orthogonal pairs.")

    def trains_beside(self, quantize: str) -> bool:
        # DoRA needs the length of each column of the base's weight, and PEFT knows how to widen those of bitsandbytes alone
        return super().trains_beside(quantize) and not (self.dora and quantize == "int8")

    def config(self) -> PeftConfig:
        from peft import LoraConfig

        return LoraConfig(r=self.r, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=self.target_modules, layers_to_transform=self.layers,
                          use_rslora=self.rslora, use_dora=self.dora, init_lora_weights=True if self.init == "default" else self.init,
                          bias="none", task_type="CAUSAL_LM")

"""Trainable tokens: the embeddings of a few chosen tokens train, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field, model_validator

from ftpipe.errors import ConfigError
from ftpipe.train.adapt._peft import PeftAdapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig


class TrainableTokens(PeftAdapt):
    """PEFT's TrainableTokens: trains (and saves) one vector a token. Where the output layer is tied to the embeddings, it is trained with them.

    PEFT reads the embedding table from outside the layer that owns it, where ZeRO 3 has not gathered it.
    """

    zero_stages: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)

    tokens: list[str] = Field(default=[], description="Tokens as text, each one token of the base model's tokenizer, such as `<|im_start|>`.")
    token_ids: list[int] = Field(default=[], description="Tokens by number, beside those of `tokens`.")
    target_modules: list[str] | str | None = Field(default=None, description="Names of embedding layers; the model's input embedding if not set.")

    @model_validator(mode="after")
    def _some(self) -> TrainableTokens:
        if not self.tokens and not self.token_ids:
            raise ValueError("name the tokens to train in `tokens` (as text) or `token_ids`")
        return self

    def config(self) -> PeftConfig:
        from peft import TrainableTokensConfig

        return TrainableTokensConfig(token_indices=sorted(set(self.token_ids)), target_modules=self.target_modules, task_type="CAUSAL_LM")

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        size = model.get_input_embeddings().weight.shape[0]
        if wrong := [i for i in self.token_ids if not 0 <= i < size]:
            raise ConfigError(f"token {wrong[0]} is not among the model's {size}", remedy="name tokens as text in `tokens`")
        found = list(self.token_ids)
        tokenizer = run.load_tokenizer() if self.tokens else None
        for text in self.tokens:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise ConfigError(f"{text!r} is {len(ids)} tokens to this model: {tokenizer.convert_ids_to_tokens(ids)}", remedy="name single tokens")
            found += ids
        return super(TrainableTokens, self.model_copy(update={"token_ids": found})).prepare(model, run)

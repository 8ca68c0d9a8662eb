"""PEFT's tuners as methods, each under PEFT's name with PEFT's settings (`_peft_source.py` reads them).

What is written here is only what PEFT's source cannot say: which tuners need something that a training run does not have, which ZeRO stages a tuner's
forward pass breaks under, and which paper of the catalogue a tuner is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, create_model, model_validator

from ftpipe.errors import ConfigError
from ftpipe.slots import Method
from ftpipe.train.adapt import _peft_source as source
from ftpipe.train.adapt._peft import PeftAdapt
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

SET_BY_US = {"inference_mode", "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "runtime_config",
             "tokenizer_kwargs"}
REFUSED = {"xlora": "it mixes adapters that were trained before and learns how much of each to take; combine them in a merge stage instead",
           "mixed": "it stacks adapters of several kinds that were trained before; chain train stages or merge their adapters"}
LEFT_OUT = {"adamss": {"use_asa", "asa_target_subspaces", "init_warmup", "final_warmup", "mask_interval", "asa_importance_beta", "asa_uncertainty_beta",
                       "asa_schedule_exponent"}, "shadow": {"auxiliary_loss_weight"}, "cpt": {"num_virtual_tokens", "tokenizer_name_or_path",
            "opt_weighted_loss_type", "opt_loss_decay_factor"}}
"""Settings that would do nothing here: they act through a callback of PEFT's, or in a loss that the model computes itself, or PEFT overwrites them."""
ZERO_STAGES: dict[str, tuple[int, ...]] = {"cpt": (0,)}
"""Tuners that do not work under all. CPT puts its prompt back into its ball by giving the parameter new memory in the forward pass, which DeepSpeed misses."""
OWN_TARGETS = {"ia3", "ln_tuning", "adaption_prompt", "shadow"}
"""Tuners that do something else than adapt linear layers, so that `all-linear` is no stand-in for the layers they need."""
PAPERS = {
    "prefix_tuning": ("Prefix-Tuning: Optimizing Continuous Prompts for Generation",
                      "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks"),
    "ln_tuning": "LayerNorm: A key component in parameter-efficient fine-tuning",
    "randlora": "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
    "miss": "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models",
}
"""Exact titles. `prefix_tuning` is the first with `prefix_projection`, the second without; `miss` is Bone with `init_weights: bat`."""


SIZES = ("r", "n_frequency", "num_virtual_tokens")
"""The settings by which PEFT's tuners say how much trains, where they have one."""
NOT_SIZES = {"oft", "randlora", "tinylora", "unilora"}
"""Tuners whose `r` says something else: with a larger one as many parameters train, or fewer."""


class PeftTuner(PeftAdapt):
    """A tuner of PEFT with PEFT's own settings."""

    config_class: ClassVar[str] = ""
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._peft", "ftpipe.train.adapt._peft_family", "ftpipe.train.adapt._peft_source")

    @model_validator(mode="after")
    def _one_task(self) -> PeftTuner:
        for name in ("n_tasks", "num_tasks"):
            if getattr(self, name, 1) not in (1, None):
                raise ValueError(f"{name} must be 1: rows carry no number of their task, so all of them are one")
        return self

    def sized(self, size: int) -> Adapt | None:
        name = next((n for n in SIZES if n in type(self).model_fields and self.name() not in NOT_SIZES), None)
        return self.with_fields(**{name: size}) if name else None

    def config(self) -> PeftConfig:
        import peft

        try:
            return getattr(peft, self.config_class)(**{n: getattr(self, n) for n in type(self).model_fields}, task_type="CAUSAL_LM")
        except (ValueError, TypeError) as error:
            raise ConfigError(f"PEFT refuses these settings of {self.name()}: {error}") from error

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """As PEFT does it; where it knows no target modules for an architecture and none are set, all linear layers."""
        try:
            return self.dressed(super().prepare(model, run))
        except ConfigError as error:
            if "target_modules" not in error.what or getattr(self, "target_modules", "") is not None or self.name() in OWN_TARGETS:
                raise
            return self.model_copy(update={"target_modules": "all-linear"}).prepare(model, run)

    def put_on(self, model: torch.nn.Module, config: PeftConfig, tensors: dict[str, torch.Tensor], where: str) -> torch.nn.Module:
        return self.dressed(super().put_on(model, config, tensors, where))

    def dressed(self, model: torch.nn.Module) -> torch.nn.Module:
        """The wrapped model, told that every row is of task 0 where a tuner asks for tasks."""
        import torch

        def task(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            zeros = torch.zeros(args[0].shape[0], dtype=torch.int64, device=args[0].device)
            return args[:1], {**kwargs, "task_ids": zeros}

        for module in model.modules():
            if hasattr(module, "poly_router") or hasattr(module, "prefix_task_cols"):
                module.register_forward_pre_hook(task, with_kwargs=True)
        return model


class PeftPrompt(PeftTuner):
    """A tuner of PEFT that puts something in front of the sequence. PEFT keeps it beside the base model, in `prompt_encoder`."""

    packs: ClassVar[bool] = False

    @model_validator(mode="after")
    def _no_pickle(self) -> PeftPrompt:
        path = getattr(self, "prompt_tuning_init_state_dict_path", None)
        if path and not path.endswith(".safetensors"):
            raise ValueError("prompt_tuning_init_state_dict_path must name a safetensors file; pickle files can run code and are never read")
        return self

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        """As PEFT does it; a prompt that starts from a text is given the base model's tokenizer."""
        if getattr(self, "prompt_tuning_init", "") != "TEXT" or self.tokenizer_name_or_path:
            return super().prepare(model, run)
        with tempfile.TemporaryDirectory() as folder:
            run.load_tokenizer().save_pretrained(folder)
            wrapped = self.model_copy(update={"tokenizer_name_or_path": folder}).prepare(model, run)
        wrapped.peft_config["default"].tokenizer_name_or_path = run.identity.get("model", "")
        return wrapped

    def keeps(self, model: torch.nn.Module) -> list[str]:
        return [n for n, p in model.named_parameters() if n.startswith("prompt_encoder.") and not p.requires_grad]

    def learnt(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        # PEFT computes what it saves from the encoder's own parameters, which hold nothing under ZeRO 3.
        encoder = model.prompt_encoder["default"]
        model.prompt_encoder["default"] = _copy(encoder, state, "prompt_encoder.default.")
        try:
            return super().learnt(model, state)
        finally:
            model.prompt_encoder["default"] = encoder

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        raise ConfigError(f"{self.name()} cannot be merged into the base model: what it learnt stands in front of the sequence, not in the weights",
                          remedy="keep the adapter beside the base")


def _copy(module: torch.nn.Module, values: Mapping[str, torch.Tensor], prefix: str) -> torch.nn.Module:
    """A copy of a small module on the CPU with these values as its parameters, without the hooks that DeepSpeed hung on it."""
    import copy
    from collections import OrderedDict

    import torch

    new = copy.copy(module)
    new.__dict__.update({k: OrderedDict() for k in vars(module) if k.endswith("_hooks") and isinstance(vars(module)[k], dict)})
    new._parameters = {n: None if p is None else torch.nn.Parameter(values[prefix + n].detach().cpu(), requires_grad=False)
                       for n, p in module._parameters.items()}
    new._modules = {n: None if m is None else _copy(m, values, f"{prefix}{n}.") for n, m in module._modules.items()}
    return new.eval()


def methods() -> dict[str, Callable[[], type[Method]]]:
    """Every tuner by PEFT's name for it that a training run can serve."""
    return {name: partial(_method, name) for name in source.tuners() if name not in REFUSED}


@lru_cache
def _method(name: str) -> type[Method]:
    cls = source.tuners()[name]
    base = PeftPrompt if source.PROMPT in source.lineage(cls) else PeftTuner
    fields = source.fields(cls, SET_BY_US | LEFT_OUT.get(name, set()))
    fields |= {n: (int, Field(default=20, ge=1, description="Number of virtual tokens.")) for n in ("num_virtual_tokens",) if n in fields}
    made = create_model(cls.removesuffix("Config"), __base__=base, __module__=__name__, __doc__=source.described(cls), **fields)
    made.config_class, made.method_name, made.paper = cls, name, PAPERS.get(name)
    made.zero_stages = ZERO_STAGES.get(name, base.zero_stages)
    return made

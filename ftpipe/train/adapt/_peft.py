"""What all methods share that PEFT implements: wrapping, fp32 masters, and an adapter folder that plain PEFT loads."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


class PeftAdapt(Adapt):
    """A tuner of PEFT. A subclass says which by `config`, and adds what PEFT leaves out by the other hooks."""

    libraries: ClassVar[tuple[str, ...]] = ("peft", "transformers", "torch")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.adapt._peft",)

    @abstractmethod
    def config(self) -> PeftConfig:
        """PEFT's configuration of the tuner."""

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        from peft import get_peft_model

        try:
            wrapped = get_peft_model(model, self.config(), autocast_adapter_dtype=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ConfigError(f"PEFT cannot put {self.name()} on this model: {str(error)[:500]}", remedy="change its settings, target_modules first") from error
        # PEFT writes down the folder the model was read from, which may be a cache of this machine; what the user called it means something elsewhere.
        named = wrapped.peft_config["default"]
        named.base_model_name_or_path, named.revision = run.identity.get("model", ""), run.identity.get("revision")
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return wrapped

    def without(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        return model.disable_adapter()

    def keeps(self, model: torch.nn.Module) -> list[str]:
        prefix = getattr(model.base_model, "prefix", "")
        return [n for n, p in model.named_parameters() if prefix and prefix in n and not p.requires_grad]

    def learnt(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What PEFT saves of the adapter, by PEFT's names, with the values of `state`."""
        from peft.utils import get_peft_model_state_dict

        names = {id(p): n for n, p in model.named_parameters()}
        # Every entry PEFT may ask for (shared parameters under each of their names, fixed buffers), with the trained values in place.
        whole = {k: state.get(names.get(id(v), ""), v.detach()) for k, v in model.state_dict(keep_vars=True).items()}
        chosen = get_peft_model_state_dict(model, state_dict=whole, adapter_name="default", save_embedding_layers=False)
        if not chosen:
            raise ArtifactError(f"PEFT found nothing to save for {self.name()}")
        return {n: t.detach().cpu().contiguous().clone() for n, t in sorted(chosen.items())}

    def save(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor], folder: Path) -> None:
        from safetensors.torch import save_file

        chosen, config = self.written(self.learnt(model, state), model.peft_config["default"].to_dict() | {"inference_mode": True})
        save_file({n: t.contiguous() for n, t in sorted(chosen.items())}, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(_plain(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")

    def written(self, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What `save` writes, from the tensors and the configuration that PEFT would write: those, unless the method trains in another form."""
        return tensors, config

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        from peft import PeftConfig
        from safetensors.torch import load_file

        return self.put_on(model, PeftConfig.from_pretrained(str(folder)), load_file(folder / WEIGHTS), str(folder))

    def put_on(self, model: torch.nn.Module, config: PeftConfig, tensors: dict[str, torch.Tensor], where: str) -> torch.nn.Module:
        """The base model with what `learnt` gave, for inference."""
        from peft import PeftModelForCausalLM
        from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

        config.inference_mode = True
        config.init_lora_weights = getattr(config, "init_lora_weights", None) if config.peft_type != "LORA" else True
        loaded = PeftModelForCausalLM(model, config, autocast_adapter_dtype=False)
        expected = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
        if different := sorted(expected ^ set(tensors)):
            raise ArtifactError(f"the adapter and {self.name()} disagree on {len(different)} tensors, the first is {different[0]}", where=where)
        set_peft_model_state_dict(loaded, tensors)
        return loaded.eval()

    def merge(self, model: torch.nn.Module) -> torch.nn.Module:
        if getattr(model.get_base_model(), "quantized_by", None) is not None:
            raise ConfigError("the adapter is on a quantised base, whose weights cannot hold its change",
                              remedy="load it with `load_merged`, or with `load_adapted(dequantized=True)`, which put whole weights in their place")
        try:
            return model.merge_and_unload(safe_merge=True)
        except (AttributeError, NotImplementedError, ValueError) as error:
            raise ConfigError(f"{self.name()} cannot be merged into the base model: {error}", remedy="keep the adapter beside the base") from error


def _plain(value: Any) -> Any:
    """JSON in one fixed form: PEFT holds module names in sets, whose order changes from process to process."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value.value if isinstance(value, Enum) else value

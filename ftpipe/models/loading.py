"""Base models: identity (without loading anything), a folder transformers can read, the tokenizer, and the model itself."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftpipe.canonical import digest
from ftpipe.errors import ConfigError
from ftpipe.models import light
from ftpipe.models.hashes import cached_digest
from ftpipe.models.locate import Source, locate, weight_files
from ftpipe.models.memory import keep_freed_memory, remember_few_shapes
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
                   "tokenizer.model", "spiece.model")
NO_TEMPLATE = "none"
DType = Literal["bfloat16", "float32"]
log = logging.getLogger("ftpipe")


def identity(model: str, env: Environment) -> dict[str, str]:
    """What a base model is, as hashes.

    Returns `model` (as written), and SHA-256 (64 hex digits) of `weights`, `config`, `tokenizer` and `chat_template` (`none` if the tokenizer has no
    template); for a hub id also `revision`, the commit. A GGUF file holds all four, so each is the hash of the whole file. Nothing is loaded; file hashes are
    remembered in `env.cache` by path, size and modification time. Raises ConfigError for a model that does not exist or cannot be had.
    """
    source = locate(model, env)
    if source.gguf:
        sha256 = cached_digest(source.gguf, env.cache)
        return {"model": model, "weights": sha256, "config": sha256, "tokenizer": sha256, "chat_template": sha256}
    folder = source.folder
    weights = {p.name: cached_digest(p, env.cache) for p in weight_files(folder)}
    found = {"model": model, "weights": digest(weights), "config": cached_digest(folder / "config.json", env.cache), **_tokenizer(folder, env)}
    return found | ({"revision": source.revision} if source.revision else {})


def _tokenizer(folder: Path, env: Environment) -> dict[str, str]:
    """Hashes of a folder's tokenizer without its chat template, and of the template, wherever it is written."""
    files: dict[str, Any] = {name: cached_digest(folder / name, env.cache) for name in TOKENIZER_FILES if (folder / name).is_file()}
    if not files:
        raise ConfigError("the model folder has no tokenizer", where=str(folder), remedy="copy tokenizer.json and tokenizer_config.json of the model into it")
    template = None
    if "tokenizer_config.json" in files:
        settings = _json(folder / "tokenizer_config.json")
        template = settings.pop("chat_template", None)
        files["tokenizer_config.json"] = digest(settings)
    templates = [p for p in (folder / "chat_template.jinja", folder / "chat_template.json") if p.is_file()]
    templates += sorted(folder.glob("additional_chat_templates/*.jinja"))
    if templates:
        template = {p.name: cached_digest(p, env.cache) for p in templates}
    return {"tokenizer": digest(files), "chat_template": digest(template) if template else NO_TEMPLATE}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", where=str(path), remedy="copy the model again") from error


def folder(model: str, env: Environment) -> Path:
    """A folder that transformers loads with `from_pretrained`; a GGUF model is converted once, into the workspace's cache (see `convert`)."""
    source = locate(model, env)
    if source.gguf is None:
        return source.folder
    from ftpipe.models.convert import converted

    return converted(source.gguf, cached_digest(source.gguf, env.cache), env.cache / "models")


def load_tokenizer(model: str, env: Environment) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, with its own chat template."""
    from transformers import AutoTokenizer

    where = folder(model, env)
    try:
        return AutoTokenizer.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"the tokenizer of {model!r} cannot be loaded: {error}", where=str(where)) from error


def load_model(model: str, env: Environment, *, dtype: DType = "bfloat16", device: str | None = None, quantize: Any = None) -> PreTrainedModel:
    """The causal language model, in evaluation mode, without a key-value cache unless asked for.

    Args:
        dtype: floating-point type of the weights.
        device: torch device; by default `cuda` if there is one, else `cpu`.
        quantize: a method of the slot `models/quantize` that makes the weights smaller, while they are read if it can; the model then says so in its attribute
            `quantized_by`. (Not typed: an import would put its code into the key of every stage.)
    Raises ConfigError for a model that transformers cannot load (unknown architecture, or code of its own: such code is never run), and for one that is to be
    quantised and is so already.
    """
    import torch

    remember_few_shapes()
    light.load("transformers.modeling_utils")
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    where, place = folder(model, env), device or default_device()
    if quantize is not None and (already := quantized_on_disk(model, env)):
        raise ConfigError(f"the model {model!r} is stored quantised already, by {already}; quantising it again with {quantize.name()} would add its own error",
                          where=str(where), remedy="name the model with whole weights")
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "local_files_only": True, "trust_remote_code": False, "use_safetensors": True}
    small = quantize.options(options["dtype"]) if quantize is not None else {}
    if small:
        options |= small | {"device_map": {"": place}}
    try:
        try:
            loaded = AutoModelForCausalLM.from_pretrained(where, attn_implementation="sdpa", **options)
        except (ValueError, ImportError) as error:
            if "attention" not in str(error) and "sdpa" not in str(error).lower():
                raise
            loaded = AutoModelForCausalLM.from_pretrained(where, **options)  # an architecture without sdpa takes its own default
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ConfigError(f"the model {model!r} cannot be loaded: {str(error)[:500]}", where=str(where)) from error
    loaded.config.use_cache = False
    loaded = (loaded if small else loaded.to(place)).eval()
    keep_freed_memory()
    if quantize is not None:
        loaded = quantize.quantize(loaded)
        loaded.quantized_by = quantize
    return loaded


def quantized_on_disk(model: str, env: Environment) -> str | None:
    """By what the model's files say their weights are quantised (`gptq`, `bitsandbytes`, ...), or None. A GGUF file is unpacked when it is read."""
    source = locate(model, env)
    if source.gguf:
        return None
    found = _json(source.folder / "config.json").get("quantization_config")
    return str(found.get("quant_method") or "a method it does not name") if isinstance(found, dict) else None


def quiet_libraries() -> None:
    """No progress bars for the reading of weights, no guess of DeepSpeed's (which PEFT imports where it is installed) about the device, and no word of
    bitsandbytes' (likewise) about a kernel for CPUs that nothing here uses."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    os.environ.setdefault("DS_ACCELERATOR", default_device())


def default_device() -> str:
    """`cuda` if torch sees a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_adapted(model: str, env: Environment, adapter: Path, *, dtype: DType = "bfloat16", device: str | None = None, allow_zero: bool = False,
                 dequantized: bool = False) -> Any:
    """The base model with an adapter on it, in evaluation mode, after the checks of `adapters.checked`.

    An adapter that was trained on a quantised base is put on a base quantised in the same way. Its bits depend on the type the weights were read in, so it
    is read in the type of the training, whatever `dtype` says.

    Args:
        adapter: folder with `ftpipe_adapter.json` and safetensors.
        allow_zero: load an adapter that changes nothing (one that training left where it started) instead of raising ArtifactError.
        dequantized: put it on plain layers in `dtype` that hold the weights a quantised base stands for; such a model can be merged.
    """
    import torch

    from ftpipe.models.adapters import read_manifest

    told, place = read_manifest(adapter), device or default_device()
    base = quantized_base(model, env, told, dtype=dtype, device=place, dequantized=dequantized)
    base = load_model(model, env, dtype=dtype, device="cpu") if base is None else base
    _, loaded = _put_on(base, model, env, Path(adapter), told, allow_zero=allow_zero)
    return loaded.to(torch.device(place)).eval()


def _put_on(base: Any, model: str, env: Environment, adapter: Path, told: Mapping[str, Any], *, allow_zero: bool) -> tuple[Any, Any]:
    """An adapter's method, and the model `base` with the adapter on it, after the checks; a packed adapter is unpacked first, and then checked again."""
    from ftpipe import slots
    from ftpipe.models.adapters import checked, plain
    from ftpipe.models.weights import base_weights

    who = identity(model, env)
    manifest = checked(adapter, who, base, allow_zero=allow_zero)
    with plain(adapter, base_weights(model, env, told)) as folder:
        if folder != adapter:
            manifest = checked(folder, who, base, allow_zero=allow_zero)
        method: Any = slots.parse("train/adapt", manifest["method"])
        if "peft" in type(method).libraries:
            light.load("peft")
        return method, method.load(base, folder)


def quantized_base(model: str, env: Environment, told: Mapping[str, Any], *, dtype: DType = "float32", device: str = "cpu", dequantized: bool = True) -> Any:
    """The quantised base that an adapter's manifest `told` tells of, None if it was trained on the base as it is.

    Args:
        dequantized: plain layers in `dtype`, which hold the weights that the quantised ones stand for; otherwise the small layers, in the type of training.
    """
    import torch

    from ftpipe import slots

    if not told.get("quantize"):
        return None
    method: Any = slots.parse("models/quantize", told["quantize"])
    method.ready()
    small = load_model(model, env, dtype=told.get("dtype", dtype), device=device, quantize=method)
    if not dequantized:
        return small
    del small.quantized_by
    return method.dequantized(small, getattr(torch, dtype))


def load_merged(model: str, env: Environment, adapter: Path, *, base: Literal["trained", "original"] = "trained", dtype: DType = "bfloat16",
                device: str | None = None) -> PreTrainedModel:
    """A plain model with an adapter folded into its weights: added in float32, then rounded to `dtype` once.

    Args:
        base: what an adapter that was trained on a quantised base is added to; without effect on others. `trained`: the weights that the quantised base stands
            for. The result computes what was trained, but for the rounding to `dtype`. `original`: the base's own weights, which the adapter has never seen:
            another model, nearer to the original base, that was not evaluated; evaluate it before you use it.
    Raises ConfigError if the method has no such form, ArtifactError if the adapter is not one for this base.
    """
    import torch

    from ftpipe.models.adapters import read_manifest

    told = read_manifest(adapter)
    start = quantized_base(model, env, told) if base == "trained" else None
    if told.get("quantize"):
        log.info("%s was trained on a base quantised by %s; it is merged into %s", adapter, next(iter(told["quantize"])),
                 "the weights that base stands for" if base == "trained" else "the original base, which makes another model than the one trained")
    start = load_model(model, env, dtype="float32", device="cpu") if start is None else start
    method, loaded = _put_on(start, model, env, Path(adapter), told, allow_zero=True)
    merged = method.merge(loaded)
    for tensor in merged.parameters():
        tensor.data = tensor.data.to(getattr(torch, dtype))
    return merged.to(torch.device(device or default_device())).eval()


__all__ = ["Source", "default_device", "folder", "identity", "load_adapted", "load_merged", "load_model", "load_tokenizer", "locate", "quantized_base",
           "quantized_on_disk"]

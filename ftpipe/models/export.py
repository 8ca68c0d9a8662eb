"""Adapters in the forms that other programs load."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment

PEFT = "adapter_config.json"


@contextmanager
def written(out: Path, *, folder: bool = True) -> Iterator[Path]:
    """A folder (or the name of a file) beside `out` that becomes `out` when the block ends well. Raises ConfigError if `out` is there."""
    if out.exists():
        raise ConfigError("it is there already", where=str(out), remedy=f"name a {'folder' if folder else 'file'} that is not there yet")
    new = out.with_name(f".{out.name}.{uuid.uuid4().hex[:6]}")
    (new if folder else new.parent).mkdir(parents=True, exist_ok=not folder)
    try:
        yield new
        new.rename(out)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        if not folder:
            new.unlink(missing_ok=True)
        raise


def export_adapter(model: str, env: Environment, adapter: Path, out: Path) -> Path:
    """The adapter as PEFT, vLLM and the hub load it: `adapter_config.json` and `adapter_model.safetensors`, the tokenizer beside them.

    A packed adapter is unpacked. Raises ConfigError for a method that PEFT has no form of (full weights, sparse changes): those can be merged.
    """
    import json

    from ftpipe.models.adapters import plain, read_manifest
    from ftpipe.models.loading import load_tokenizer
    from ftpipe.models.weights import base_weights

    told = read_manifest(adapter)
    with plain(adapter, base_weights(model, env, told)) as folder, written(out) as new:
        if not (folder / PEFT).exists():
            raise ConfigError(f"an adapter trained by {next(iter(told['method']))} has no form that PEFT loads", where=str(adapter),
                              remedy="export it merged: --form merged")
        for path in folder.iterdir():
            if path.is_file() and (path.suffix in (".safetensors", ".md") or path.name in (PEFT, "ftpipe_adapter.json")):
                shutil.copyfile(path, new / path.name)
        config = json.loads((new / PEFT).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = _published(model, env)
        (new / PEFT).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        load_tokenizer(model, env).save_pretrained(new)
    return out


def export_merged(model: str, env: Environment, adapter: Path, out: Path, *, base: Literal["trained", "original"] = "trained",
                  dtype: Literal["bfloat16", "float32"] = "bfloat16") -> Path:
    """The whole model with the adapter folded in, as safetensors with config and tokenizer: what any program that loads transformers' models loads.

    `base`: see `models.loading.load_merged`.
    """
    from ftpipe.models.loading import load_merged, load_tokenizer

    with written(out) as new:
        merged: Any = load_merged(model, env, adapter, base=base, dtype=dtype, device="cpu")
        merged.save_pretrained(new, safe_serialization=True)
        load_tokenizer(model, env).save_pretrained(new)
        if (card := adapter / "README.md").exists():
            shutil.copyfile(card, new / "README.md")
    return out


def _published(model: str, env: Environment) -> str:
    """What others can load the base by: a hub id as it is, otherwise the folder it lies in on this machine."""
    from ftpipe.models.loading import folder

    is_hub_id = model.count("/") == 1 and not env.path(model).exists() and not model.startswith((".", "~", "/"))
    return model if is_hub_id else str(folder(model, env))

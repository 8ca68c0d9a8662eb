"""GGUF to safetensors, once per file: the weights are unpacked to bfloat16, everything else is taken from the file's metadata."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from importlib.metadata import version
from pathlib import Path

from ftpipe.canonical import digest
from ftpipe.errors import ConfigError

RECORD = "conversion.json"
log = logging.getLogger("ftpipe")


def converted(gguf: Path, sha256: str, cache: Path) -> Path:
    """The folder below `cache` with the model of a GGUF file as transformers writes it.

    It is named after the file's hash and the versions of the libraries that unpack it, written beside and renamed into place under a file lock: two processes
    convert it once. A folder that is not whole (file sizes differ from the record) is made again.
    """
    from filelock import FileLock

    material = {"gguf": sha256, "dtype": "bfloat16", "libraries": {n: version(n) for n in ("transformers", "gguf")}}
    target = cache / digest(material)[:32]
    if _whole(target):
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if _whole(target):
            return target
        log.info("unpacking %s to bfloat16, once", gguf.name)
        temporary = cache / f".{target.name}.{uuid.uuid4().hex[:8]}"
        try:
            _convert(gguf, temporary)
            files = {p.name: p.stat().st_size for p in sorted(temporary.iterdir())}
            (temporary / RECORD).write_text(json.dumps(material | {"source": gguf.name, "files": files}, indent=1), encoding="utf-8")
            if target.exists():
                shutil.rmtree(target)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _whole(target: Path) -> bool:
    try:
        files = json.loads((target / RECORD).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((target / n).is_file() and (target / n).stat().st_size == size for n, size in files.items())


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from ftpipe.models.loading import quiet_libraries

    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        # dequantize: plain dense weights, which can be saved; packed blocks cannot
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, config=config, dtype=torch.bfloat16, local_files_only=True,
                                                     quantization_config=GgufConfig(dequantize=True))
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ConfigError(f"the GGUF file cannot be unpacked: {str(error)[:500]}", where=str(gguf),
                          remedy="name the model's safetensors folder or hub id instead") from error
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

"""An adapter, merged into its base, as a GGUF file, by llama.cpp's own converter, and the proof that the file holds that model.

The converter is llama.cpp's `convert_hf_to_gguf.py`, which its maintainers keep in their repository and on no package index; the user says where it is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any, Literal

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.models.export import export_merged, written
from ftpipe.stages.base import Environment

CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "FTPIPE_GGUF_CONVERTER"
LAST_LINES = 12
MOVED = 1e-3
"""How far the norm of a weight may be from the merged model's, as a share of it: rounding to 8 bits moves it by less than a tenth of this."""
GgufType = Literal["f32", "f16", "bf16", "q8_0"]


def find_converter(given: Path | None = None) -> list[str]:
    """The start of the converter's argument list: `given`, else what the environment variable names, else what is on the PATH under the converter's name.

    Raises ConfigError if there is none.
    """
    named = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        found = shutil.which(CONVERTER)
        if found is None:
            raise ConfigError(f"llama.cpp's converter {CONVERTER} is not on the PATH", remedy="get llama.cpp (https://github.com/ggml-org/llama.cpp) and "
                              f"name the script: --converter PATH, or the environment variable {VARIABLE}")
        named = Path(found)
    named = named.expanduser()
    script = named / CONVERTER if named.is_dir() else named  # a checkout of llama.cpp
    if not script.is_file():
        raise ConfigError("there is no converter", where=str(script), remedy=f"name llama.cpp's {CONVERTER}, or the folder it is in")
    return [sys.executable, str(script.absolute())] if script.suffix == ".py" else [str(script.absolute())]


def export_gguf(model: str, env: Environment, adapter: Path, out: Path, *, converter: Path | None = None, kind: GgufType = "bf16",
                base: Literal["trained", "original"] = "trained") -> dict[str, Any]:
    """Write the merged model as the GGUF file `out`, which appears when it has been read back and found to be that model. Returns what `read_back` does.

    Args:
        converter: see `find_converter`. kind: type of the matrices in the file; weights are merged in float32 and rounded to it once.
        base: see `models.loading.load_merged`.

    Raises:
        ConfigError: without a converter, for an `out` that is there, or if the converter fails (an architecture or tokenizer that it does not know).
        ArtifactError: if the file does not hold the merged model.
    """
    start = find_converter(converter)
    with written(out, folder=False) as new:
        merged = out.with_name(f".{out.name}.{uuid.uuid4().hex[:6]}.merged")
        try:
            export_merged(model, env, adapter, merged, base=base, dtype="bfloat16" if kind == "bf16" else "float32")
            done = subprocess.run([*start, str(merged.absolute()), "--outfile", str(new.absolute()), "--outtype", kind, "--model-name", out.stem],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
                                  env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False)
            if done.returncode or not new.is_file():
                said = "\n".join(f"    {line[:300]}" for line in done.stdout.splitlines()[-LAST_LINES:])
                remedy = "install what llama.cpp's requirements/requirements-convert_hf_to_gguf.txt names" if "No module named" in done.stdout else \
                    "a newer llama.cpp may know this model; `--form merged` writes what it converts"
                raise ConfigError(f"the converter ended with status {done.returncode} and no usable file\n{said}", where=start[-1], remedy=remedy)
            return read_back(new, merged)
        finally:
            shutil.rmtree(merged, ignore_errors=True)


def read_back(path: Path, merged: Path) -> dict[str, Any]:
    """What a GGUF file holds, compared with the model folder it was made from.

    Its numbers of layers and of dimensions must be the model's, it must embed as many tokens as its tokenizer has, and every matrix that both have must
    have the same norm (converters reorder rows of some, which leaves it as it is).

    Returns: {"architecture", "tensors": how many, "compared": how many of them}. Raises ArtifactError if something is missing or different.
    """
    import numpy as np
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map
    from gguf.quants import dequantize

    from ftpipe.models.locate import weight_files
    from ftpipe.models.weights import tensor

    def wrong(what: str) -> ArtifactError:
        return ArtifactError(f"the file that the converter wrote is not the model: {what}", where=str(path), remedy="try another version of llama.cpp")

    try:
        reader = GGUFReader(path)
        kind = str(reader.fields["general.architecture"].contents())
        tensors = {t.name: t for t in reader.tensors}
    except (ValueError, IndexError, KeyError, OSError, EOFError) as error:
        raise wrong(f"it cannot be read ({error})") from error
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    for key, name in ((f"{kind}.block_count", "num_hidden_layers"), (f"{kind}.embedding_length", "hidden_size")):
        held = reader.fields[key].contents() if key in reader.fields else None
        if name in config and held != config[name]:
            raise wrong(f"its {key} is {held}, and {name} is {config[name]}")
    tokens = len(reader.fields["tokenizer.ggml.tokens"].data) if "tokenizer.ggml.tokens" in reader.fields else 0
    embedded = int(tensors["token_embd.weight"].shape[-1]) if "token_embd.weight" in tensors else None
    if not tokens or embedded not in (None, tokens):
        raise wrong(f"its tokenizer has {tokens} tokens, and {embedded} are embedded")
    arch = next((a for a, name in MODEL_ARCH_NAMES.items() if name == kind), None)
    names = get_tensor_name_map(arch, config["num_hidden_layers"]) if arch is not None else None
    compared = 0
    for name, file in ((n, f) for f in weight_files(merged) for n in _names(f)):
        found = tensors.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "") if names else None
        weight = tensor(file, name).float().numpy() if found is not None else None
        if weight is None or weight.ndim < 2 or weight.size != found.n_elements:
            continue
        ours, theirs = (float(np.linalg.norm(w.astype(np.float64))) for w in (weight, dequantize(found.data, found.tensor_type)))
        if not abs(theirs - ours) <= MOVED * ours:
            raise wrong(f"{found.name} has norm {theirs:.6g}, and {name} {ours:.6g}")
        compared += 1
    if not compared:
        raise wrong("not one of its matrices has the name and size of one of the model's")
    return {"architecture": kind, "tensors": len(tensors), "compared": compared}


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as f:
        return list(f.keys())

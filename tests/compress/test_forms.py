"""Adapters kept sparsely, in several files or packed, and those trained beside a quantised base: every stage reads them all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftpipe import slots
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.merge._deltas import facts_of, read
from ftpipe.models import sparse
from ftpipe.models.loading import load_adapted, load_merged, load_model, quantized_base
from ftpipe.models.weights import base_weights
from ftpipe.registry.versions import probe_logits
from ftpipe.stages.base import Environment
from ftpipe.train.adapt._weights import INDEX, WEIGHTS
from tests.compress.test_packed import gaussian, tuned
from tests.evaluate.world import World
from tests.merge.test_merge import close, logits, stage

WHOLE, ENTRIES = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
ROWS, COLUMNS = "model.layers.1.self_attn.o_proj.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def parts(world: World, env: Environment, tmp_path: Path) -> dict[str, Path]:
    """An adapter of every kind of part."""
    g = torch.Generator().manual_seed(0)
    base = {n: p.detach() for n, p in load_model(str(world.model), env, dtype="float32").named_parameters()}
    at = torch.randperm(base[ENTRIES].numel(), generator=g)[:40].sort().values
    made = {WHOLE: sparse.Part("whole", base[WHOLE] + 0.1 * torch.randn(base[WHOLE].shape, generator=g)),
            ENTRIES: sparse.Part("entries", base[ENTRIES].flatten()[at] + 0.3 * torch.randn(40, generator=g), at),
            ROWS: sparse.Part("rows", 0.1 * torch.randn(2, base[ROWS].shape[1], generator=g), torch.tensor([1, 5])),
            COLUMNS: sparse.Part("columns", 0.1 * torch.randn(base[COLUMNS].shape[0], 3, generator=g), torch.tensor([0, 2, 9]))}
    folder = tuned(world, tmp_path / "parts", lambda name, p: 0.0)
    save_file({k: t for n, p in made.items() for k, t in p.tensors(n).items()}, folder / "adapter" / WEIGHTS)
    return {"parts": folder}


def split(folder: Path, out: Path) -> Path:
    """The same adapter with each tensor in a file of its own, so that the halves of a part are apart."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "adapter" / WEIGHTS)
    (out / "adapter" / WEIGHTS).unlink()
    files = {name: f"weights-{i}.safetensors" for i, name in enumerate(sorted(tensors))}
    for name, file in files.items():
        save_file({name: tensors[name]}, out / "adapter" / file)
    (out / "adapter" / INDEX).write_text(json.dumps({"weight_map": files}))
    return out


def by_hand(world: World, env: Environment, folder: Path) -> dict[str, torch.Tensor]:
    """Every parameter with the adapter's sparse changes, from the definition of the format."""
    weights = {n: p.detach().clone() for n, p in load_model(str(world.model), env, dtype="float32").named_parameters()}
    t = load_file(folder / "adapter" / WEIGHTS)
    weights[WHOLE] = t[WHOLE]
    weights[ENTRIES].view(-1)[t[f"{ENTRIES}::entries"].long()] = t[f"{ENTRIES}::values"]
    weights[ROWS][t[f"{ROWS}::rows"].long()] += t[f"{ROWS}::change"]
    weights[COLUMNS][:, t[f"{COLUMNS}::columns"].long()] += t[f"{COLUMNS}::change"]
    return weights


@pytest.mark.parametrize("apart", [False, True])
def test_sparse_parts_are_read_loaded_and_merged_bit_for_bit(world: World, env: Environment, parts: dict[str, Path], tmp_path: Path, apart: bool):
    folder = split(parts["parts"], tmp_path / "split") if apart else parts["parts"]
    expected, base = by_hand(world, env, parts["parts"]), base_weights(str(world.model), env)
    deltas = read(folder / "adapter", base)
    assert set(deltas) == {WHOLE, ENTRIES, ROWS, COLUMNS}
    assert all((base()[n].double() + d.dense()).float().equal(expected[n]) for n, d in deltas.items())
    for model in (load_adapted(str(world.model), env, folder / "adapter", dtype="float32"),
                  load_merged(str(world.model), env, folder / "adapter", dtype="float32")):
        assert all(p.equal(expected[n]) for n, p in model.named_parameters())
    made = stage(world, env, "merge", {"parts": folder}, method={"wise_ft": {"alpha": 1.0}})
    assert all(t.equal(expected[n]) for n, t in load_file(made.file(f"adapter/{WEIGHTS}")).items())
    assert torch.equal(logits(world, env, made.file("adapter")), logits(world, env, folder / "adapter"))
    gone = stage(world, env, "edit", {"parts": folder}, method={"negate": {"scale": 1.0}})
    assert load_file(gone.file(f"adapter/{WEIGHTS}"))[ROWS].equal((2 * base()[ROWS].double() - expected[ROWS].double()).float())


def test_of_an_adapter_only_the_tensors_of_the_weight_asked_for_are_read(world: World, env: Environment, parts: dict[str, Path], monkeypatch):
    from ftpipe.models import weights

    seen, real = [], weights.tensor
    monkeypatch.setattr(weights, "tensor", lambda file, name: (seen.append((file.name, name)), real(file, name))[1])
    deltas = read(parts["parts"] / "adapter", base_weights(str(world.model), env))
    assert len(deltas) == 4 and not seen
    assert deltas[ROWS].dense().any()
    assert sorted(n for f, n in seen if f == WEIGHTS) == [f"{ROWS}::change", f"{ROWS}::rows"]
    assert [n for f, n in seen if f != WEIGHTS] == [ROWS]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("change", "said"), [
    (lambda t: {k: v for k, v in t.items() if k != f"{ROWS}::change"}, "has no counterpart"),
    (lambda t: t | {f"{ROWS}::change": t[f"{ROWS}::change"][:1].clone()}, "does not fit the base"),
    (lambda t: t | {f"{ENTRIES}::entries": t[f"{ENTRIES}::entries"] + 10**6}, "does not fit the base"),
    (lambda t: t | {ROWS: torch.zeros(t[f"{ROWS}::change"].shape[1:])}, "in two ways|does not fit the base"),
])
def test_what_does_not_fit_is_refused_wherever_it_is_read(world: World, env: Environment, parts: dict[str, Path], tmp_path: Path, apart: bool, change,
                                                          said: str):
    file = parts["parts"] / "adapter" / WEIGHTS
    save_file(change(load_file(file)), file)
    folder = split(parts["parts"], tmp_path / "split") if apart else parts["parts"]
    with pytest.raises(ArtifactError, match=said):
        load_adapted(str(world.model), env, folder / "adapter", dtype="float32")
    with pytest.raises(ArtifactError, match=said):
        list(read(folder / "adapter", base_weights(str(world.model), env)).values())


def test_packing_leaves_alone_what_did_not_change(world: World, env: Environment, parts: dict[str, Path]):
    """ComPEFT may keep more entries than changed; BitDelta's signs would move every entry of a matrix of which a few changed."""
    base, before = base_weights(str(world.model), env), by_hand(world, env, parts["parts"])
    made = stage(world, env, "compress", parts, method={"compeft": {"density": 0.9}})
    after = dict(load_merged(str(world.model), env, made.file("adapter"), dtype="float32").named_parameters())
    magnitude = made.json("compress.json")["magnitude"]
    for name in (WHOLE, ENTRIES, ROWS, COLUMNS):
        change = torch.sign(before[name] - base()[name])
        assert torch.allclose(after[name] - base()[name], magnitude * change, atol=1e-6) and bool((change == 0).any()) == (name != WHOLE)
    with pytest.raises(ConfigError, match="no matrix that the adapter keeps whole"):
        stage(world, env, "compress", parts, method="bitdelta")
    file = parts["parts"] / "adapter" / WEIGHTS
    save_file(load_file(file) | {"model.layers.0.mlp.gate_proj.weight": base()["model.layers.0.mlp.gate_proj.weight"] + 0.01}, file)
    packed = stage(world, env, "compress", parts, method="bitdelta")
    after = dict(load_merged(str(world.model), env, packed.file("adapter"), dtype="float32").named_parameters())
    assert all(after[n].equal(before[n]) for n in (WHOLE, ENTRIES, ROWS, COLUMNS))
    assert torch.allclose(after["model.layers.0.mlp.gate_proj.weight"] - base()["model.layers.0.mlp.gate_proj.weight"], torch.tensor(0.01), atol=1e-6)


@pytest.mark.parametrize("method", ["bitdelta", {"compeft": {"density": 0.2}}])
def test_a_packed_adapter_is_unpacked_to_be_folded_in(world: World, env: Environment, tmp_path: Path, method):
    made = stage(world, env, "compress", {"full": tuned(world, tmp_path / "full", gaussian(0))}, method=method)
    probe = load_file(made.file("probe.safetensors"))
    merged = load_merged(str(world.model), env, made.file("adapter"), dtype="float32")
    assert close(probe_logits(merged, probe), probe["logits"])


@pytest.fixture
def beside(world: World, tmp_path: Path) -> dict[str, Path]:
    """The LoRA, said to have been trained beside an int8 base; and one twice as strong."""
    made = {}
    for name, factor in (("one", 1.0), ("two", 2.0)):
        made[name] = tmp_path / name
        shutil.copytree(world.adapters["good"], made[name])
        file = made[name] / "adapter" / "adapter_model.safetensors"
        save_file({n: t * (factor if "lora_B" in n else 1) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        facts = made[name] / "adapter" / "ftpipe_adapter.json"
        facts.write_text(json.dumps(json.loads(facts.read_text()) | {"quantize": slots.parse("models/quantize", "int8").dump()}))
    return made


def on_the_quantised(world: World, env: Environment, facts: dict, times: float, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of the dequantised base with the LoRA's products added, so many times."""
    model = quantized_base(str(world.model), env, facts)
    tensors, parameters = load_file(world.adapters["good"] / "adapter" / "adapter_model.safetensors"), dict(model.named_parameters())
    with torch.no_grad():
        for key in (k for k in tensors if k.endswith("lora_A.weight")):
            name = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            parameters[name] += times * 2.0 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return probe_logits(model, probe)


def test_what_is_made_of_adapters_beside_a_quantised_base_is_for_that_base(world: World, env: Environment, beside: dict[str, Path]):
    one = {"one": beside["one"]}
    for times, made in ((1.5, stage(world, env, "merge", beside, method="uniform_soup")), (-1.0, stage(world, env, "edit", one)),
                        (1.0, stage(world, env, "compress", one, method={"low_rank": {"rank": 64}}))):
        folder, facts, probe = made.file("adapter"), facts_of(made.file("adapter")), load_file(made.file("probe.safetensors"))
        assert facts["quantize"] == facts_of(beside["one"] / "adapter")["quantize"]
        expected = on_the_quantised(world, env, facts, times, probe)
        assert close(probe["logits"], expected)
        assert close(probe_logits(load_adapted(str(world.model), env, folder, dtype="float32"), probe), expected)
        assert close(probe_logits(load_merged(str(world.model), env, folder, dtype="float32"), probe), expected)
        assert not close(probe_logits(load_merged(str(world.model), env, folder, base="original", dtype="float32"), probe), expected), "it can tell"


def test_a_packed_adapter_sits_on_the_quantised_base_too(world: World, env: Environment, beside: dict[str, Path]):
    made = stage(world, env, "compress", {"one": beside["one"]}, method={"compeft": {"density": 0.9}})
    folder, probe = made.file("adapter"), load_file(made.file("probe.safetensors"))
    assert {"quantize", "packed"} <= set(facts_of(folder))
    assert close(probe_logits(load_adapted(str(world.model), env, folder, dtype="float32"), probe), probe["logits"])
    assert close(probe_logits(load_merged(str(world.model), env, folder, dtype="float32"), probe), probe["logits"])
    assert not close(probe_logits(load_merged(str(world.model), env, folder, base="original", dtype="float32"), probe), probe["logits"])


def test_whole_weights_are_refused_for_a_quantised_base(world: World, env: Environment, beside: dict[str, Path], parts: dict[str, Path]):
    with pytest.raises(ConfigError, match="no place in a quantised base") as caught:
        stage(world, env, "merge", beside, method={"linear": {"whole": True}})
    assert "leave `whole` out" in caught.value.remedy
    with pytest.raises(ConfigError, match="full rank") as caught:
        stage(world, env, "merge", beside, method="ties")
    assert "rank" in caught.value.remedy and "whole" not in caught.value.remedy
    path = parts["parts"] / "adapter" / "ftpipe_adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantize": slots.parse("models/quantize", "int8").dump()}))
    with pytest.raises(ConfigError, match="no longer of low rank, and whole weights have no place"):
        stage(world, env, "merge", parts)
    with pytest.raises(ConfigError, match="cannot be packed"):
        stage(world, env, "compress", parts, method="compeft")
    with pytest.raises(ConfigError, match="only adapters for one base"):
        stage(world, env, "merge", {"one": beside["one"], "good": world.adapters["good"]})

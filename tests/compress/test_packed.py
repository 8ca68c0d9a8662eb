"""BitDelta and ComPEFT: closed forms of their errors, their sizes to the byte, and that what is loaded is what was computed."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ftpipe import slots
from ftpipe.compress._packed import from_bits, to_bits
from ftpipe.compress._rice import decode, encode
from ftpipe.compress.bitdelta import plus_minus
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.merge._deltas import read
from ftpipe.models.loading import load_adapted, load_model
from ftpipe.models.weights import base_weights
from ftpipe.registry.versions import probe_logits
from ftpipe.stages.base import Environment
from tests.artifacts import rows_artifact
from tests.evaluate.world import World
from tests.merge.test_merge import close, folders, logits, stage


def tuned(world: World, folder: Path, change, facts: dict | None = None) -> Path:
    """A full fine-tune with `change(name, weight)` added to every parameter."""
    base = dict(load_model(str(world.model), Environment(folder, folder, "x"), dtype="float32").named_parameters())
    (folder / "adapter").mkdir(parents=True)
    save_file({n: (p + change(n, p)).detach() for n, p in base.items()}, folder / "adapter" / "weights.safetensors")
    known = json.loads((world.adapters["good"] / "adapter" / "ftpipe_adapter.json").read_text()) | {"method": {"full": {}}}
    (folder / "adapter" / "ftpipe_adapter.json").write_text(json.dumps(known | (facts or {})))
    return folder


def gaussian(seed: int, size: float = 0.02, only: str = ""):
    g = torch.Generator().manual_seed(seed)
    return lambda name, p: size * torch.randn(p.shape, generator=g) * (only in name)


@pytest.fixture
def full(world: World, tmp_path: Path) -> dict[str, Path]:
    return {"full": tuned(world, tmp_path / "full", gaussian(0))}


def held(world: World, env: Environment):
    return {"rows": rows_artifact(env.workspace, world.rows, name="rows")}


@pytest.mark.parametrize("count", [1, 7, 8, 9, 1000])
def test_bits_come_back(count: int):
    flags = np.random.default_rng(0).random(count) < 0.3
    packed = to_bits(flags)
    assert len(packed) == math.ceil(count / 8) and np.array_equal(from_bits(packed, count), flags)


def entropy(p: float) -> float:
    return -(1 - p) * math.log2(1 - p) - p * math.log2(p / 2)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_code_is_lossless_and_as_short_as_entropy_allows(share: float):
    draw, n = np.random.default_rng(1), 200_000
    scattered = np.sort(draw.choice(n, int(share * n), replace=False))
    ends = np.arange(int(share * n))
    clustered = np.sort(np.concatenate([ends[: len(ends) // 2], n - 1 - ends[: len(ends) - len(ends) // 2]]))
    for positions, bound in ((scattered, 1.05), (clustered, 1.15)):
        code = encode(positions)
        assert np.array_equal(decode(code), positions)
        bits = 8 * (len(code.unary) + len(code.low) + math.ceil(code.count / 8)) + 16
        assert bits <= bound * (entropy(share) * n + 16)
        assert share != 0.2 or 16 * n / bits >= 15
    assert len(decode(encode(np.array([], dtype=np.int64)))) == 0 and decode(encode(np.array([10**9]))).tolist() == [10**9]


def test_bitdelta_keeps_a_bit_and_a_scale_and_states_its_error(world: World, env: Environment, full: dict[str, Path]):
    made = stage(world, env, "compress", full, method="bitdelta", rows="rows", inputs=held(world, env))
    base = {n: p.detach() for n, p in load_model(str(world.model), env, dtype="float32").named_parameters()}
    before, packed = load_file(full["full"] / "adapter" / "weights.safetensors"), load_file(made.file("adapter/packed.safetensors"))
    matrices = [n for n in base if "_proj" in n]
    lost = whole = 0.0
    for name in base:
        change = (before[name].double() - base[name].double())
        whole += float(change.pow(2).sum())
        if name not in matrices:
            assert torch.equal(packed[name], before[name]), "what is no matrix of a block is kept as it is"
            continue
        scale = packed[f"{name}.scale"]
        assert packed[f"{name}.signs"].nbytes == math.ceil(change.numel() / 8) and scale.numel() == 1
        assert float(scale) == pytest.approx(float(change.abs().mean()), rel=1e-5)
        signs = plus_minus(packed[f"{name}.signs"], change.shape).double()
        assert torch.equal(signs, torch.where(change.float() >= 0, 1.0, -1.0).double())
        error = float((change - float(scale) * signs).pow(2).sum())
        assert error / float(change.pow(2).sum()) == pytest.approx(1 - float(change.abs().mean()) ** 2 / float(change.pow(2).mean()), abs=1e-5)
        assert error <= min(float((change - a * signs).pow(2).sum()) for a in torch.linspace(0, 0.1, 201).tolist()) + 1e-9
        assert error / float(change.pow(2).sum()) == pytest.approx(1 - 2 / math.pi, abs=0.05), "0.363 for a Gaussian change"
        lost += error
    said = made.json("compress.json")
    assert said["lost"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4) == pytest.approx(said["lost_of_the_change"], rel=1e-3)
    assert said["bytes_after"] < 0.6 * said["bytes_before"] and set(said["scores"]) == {"base", "before", "after"}
    losses = {k: v["heldout_loss"]["loss"] for k, v in said["scores"].items()}
    assert losses["before"] != losses["after"] != losses["base"]
    probe = load_file(made.file("probe.safetensors"))
    model = load_adapted(str(world.model), env, made.file("adapter"), dtype="float32")
    assert close(probe_logits(model, probe), probe["logits"]), "what is loaded is what was computed"
    parameters = dict(model.named_parameters())
    name = matrices[0]
    expected = base[name] + packed[f"{name}.scale"] * plus_minus(packed[f"{name}.signs"], base[name].shape)
    assert torch.allclose(parameters[name], expected, atol=1e-7)


def test_bitdelta_is_exact_where_all_changes_are_of_one_size(world: World, env: Environment, tmp_path: Path):
    def change(name: str, p: torch.Tensor) -> torch.Tensor:
        g = torch.Generator().manual_seed(7)
        return 0.25 * (torch.randint(0, 2, p.shape, generator=g) * 2 - 1) * ("_proj" in name)

    folder = tuned(world, tmp_path / "even", change)
    made = stage(world, env, "compress", {"even": folder}, method="bitdelta")
    assert made.json("compress.json")["lost"] < 1e-4 and made.json("compress.json")["kept_whole"] == 0
    assert made.json("compress.json")["bytes_after"] < made.json("compress.json")["bytes_before"] / 8
    assert close(logits(world, env, made.file("adapter")), logits(world, env, folder / "adapter"))


def test_distillation_moves_the_scales_alone_and_helps_on_rows_it_did_not_see(world: World, env: Environment, full: dict[str, Path]):
    plain = stage(world, env, "compress", full, method="bitdelta")
    method = {"bitdelta": {"rows": "rows", "steps": 25, "learning_rate": 1e-3, "max_length": 64}}
    made, again = (stage(world, env, "compress", full, method=method, inputs=held(world, env), seed=1) for _ in range(2))
    assert made.content == again.content, "the same seed gives the same bytes"
    before, after = (load_file(a.file("adapter/packed.safetensors")) for a in (plain, made))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) != name.endswith(".scale"), name
    told = made.json("compress.json")["distillation"]
    assert told["heldout_after"] < told["heldout_before"] and told["train_after"] < told["train_before"]
    assert made.json("compress.json")["lost"] > made.json("compress.json")["lost_before_distillation"], "the means were the least squares of the weights"

    def error(folder: Path) -> float:
        shown = torch.tensor([list(range(3, 40))])
        with torch.inference_mode():
            found = [load_adapted(str(world.model), env, f, dtype="float32")(input_ids=shown).logits for f in (folder, full["full"] / "adapter")]
        return float((found[0] - found[1]).pow(2).mean())

    assert error(made.file("adapter")) != error(plain.file("adapter"))


def test_bitdelta_refuses_a_lora_and_what_is_packed_already(world: World, env: Environment, full: dict[str, Path]):
    with pytest.raises(ConfigError, match="packs whole weights"):
        stage(world, env, "compress", folders(world, "good"), method="bitdelta")
    packed = stage(world, env, "compress", full, method="bitdelta")
    for again in ("bitdelta", "compeft"):
        with pytest.raises(ConfigError, match="packed already, by bitdelta"):
            stage(world, env, "compress", {"packed": packed.path}, method=again)
    with pytest.raises(ConfigError, match="no matrix"):
        stage(world, env, "compress", full, method={"bitdelta": {"parameters": "nothing"}})


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compeft_keeps_the_signs_of_the_largest(kind: str, world: World, env: Environment, full: dict[str, Path]):
    source = folders(world, "good") if kind == "lora" else full
    folder = next(iter(source.values())) / "adapter"
    made = stage(world, env, "compress", source, method={"compeft": {"density": 0.2, "alpha": 2.5}}, rows="rows", inputs=held(world, env))
    base = base_weights(str(world.model), env)
    if kind == "lora":
        tau = load_file(folder / "adapter_model.safetensors")
        model = load_adapted(str(world.model), env, made.file("adapter"), dtype="float32")
        found = {n.replace(".default", ""): p.detach() for n, p in model.named_parameters() if "lora_" in n}
    else:
        tau = {n: d.dense() for n, d in read(folder, base).items()}
        found = {n: d.dense() for n, d in read(made.file("adapter"), base).items()}
    assert found.keys() == tau.keys()
    names = sorted(tau)
    flat, decoded = (torch.cat([d[n].double().flatten() for n in names]) for d in (tau, found))
    c, count = 2.5 * float(flat.std()), int(0.2 * len(flat))
    kept = decoded.abs() > c / 2
    assert int(kept.sum()) == count and torch.allclose(decoded[~kept], torch.zeros(1).double(), atol=1e-6)
    assert torch.allclose(decoded[kept], c * flat[kept].sign(), atol=1e-6) and flat[kept].abs().min() >= flat[~kept].abs().max()
    said = made.json("compress.json")
    assert said["lost"] == pytest.approx(float((flat - decoded).norm() / flat.norm()), rel=1e-4)
    assert said["bits_per_parameter"] <= 1.15 * entropy(0.2) and said["bytes_after"] < said["bytes_before"] / (3 if kind == "lora" else 6)
    assert said["alpha"] == pytest.approx(2.5) and ("lora_B" in said["kept"]) == (kind == "lora")
    assert set(said["scores"]) == {"base", "before", "after"}
    probe = load_file(made.file("probe.safetensors"))
    assert close(probe_logits(load_adapted(str(world.model), env, made.file("adapter"), dtype="float32"), probe), probe["logits"])


def test_compeft_chooses_its_magnitude(world: World, env: Environment):
    tau = load_file(world.adapters["good"] / "adapter" / "adapter_model.safetensors")
    size = torch.cat([t.flatten() for t in tau.values()]).abs().sort(descending=True).values
    made = stage(world, env, "compress", folders(world, "good"), method={"compeft": {"density": 0.3}})
    assert made.json("compress.json")["magnitude"] == pytest.approx(float(size[: int(0.3 * len(size))].double().mean()), rel=1e-6)
    method = {"compeft": {"density": 0.3, "rows": "rows", "alphas": [0.1, 1.5, 6.0]}}
    found = stage(world, env, "compress", folders(world, "good"), method=method, rows="rows", inputs=held(world, env)).json("compress.json")
    best = max(found["tried"], key=found["tried"].get)
    assert len(found["tried"]) == 3 and found["alpha"] == pytest.approx(float(best))
    assert found["scores"]["after"]["heldout_loss"]["loss"] == pytest.approx(-found["tried"][best], rel=1e-6)
    with pytest.raises(ConfigError, match=r"nothing of any B|keeps none"):
        stage(world, env, "compress", folders(world, "zero"), method={"compeft": {"density": 0.01}})


def test_compeft_counts_ia3_from_one(world: World, env: Environment, tmp_path: Path):
    """A scale of 1 is no change, so it is 1 that a dropped entry goes back to."""
    from peft import IA3Config, get_peft_model

    method = slots.parse("train/adapt", {"ia3": {}})
    wrapped = get_peft_model(load_model(str(world.model), env, dtype="float32"),
                             IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"))
    g = torch.Generator().manual_seed(0)
    state = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=g) for n, p in wrapped.named_parameters() if p.requires_grad}
    folder = tmp_path / "ia3" / "adapter"
    folder.mkdir(parents=True)
    method.save(wrapped, state, folder)
    facts = json.loads((world.adapters["good"] / "adapter" / "ftpipe_adapter.json").read_text()) | {"method": method.dump()}
    (folder / "ftpipe_adapter.json").write_text(json.dumps(facts))
    save_file({"input_ids": torch.tensor([[3, 4]]), "logits": torch.zeros(1, 259)}, tmp_path / "ia3" / "probe.safetensors")
    made = stage(world, env, "compress", {"ia3": tmp_path / "ia3"}, method={"compeft": {"density": 0.25}})
    assert not made.has("probe.safetensors"), "the logits before are not those after"
    assert stage(world, env, "compress", {"ia3": tmp_path / "ia3"}).has("probe.safetensors"), "but rounding changes little"
    from ftpipe.models.adapters import plain

    with plain(made.file("adapter"), base_weights(str(world.model), env)) as back:
        values = torch.cat([t.flatten() for t in load_file(back / "adapter_model.safetensors").values()])
        assert json.loads((back / "ftpipe_adapter.json").read_text()) == facts
    assert int((values == 1).sum()) == len(values) - int(0.25 * len(values)) and len(values.unique()) == 3
    assert torch.isfinite(logits(world, env, made.file("adapter"))).all()


def test_a_packed_adapter_can_be_merged_and_damage_is_noticed(world: World, env: Environment, full: dict[str, Path]):
    packed = stage(world, env, "compress", folders(world, "good"), method={"compeft": {"density": 0.5}})
    half = stage(world, env, "merge", {"packed": packed.path}, method={"linear": {"weights": {"packed": 1.0}}})
    assert close(logits(world, env, half.file("adapter")), logits(world, env, packed.file("adapter")))
    assert not packed.has("adapter/adapter_config.json"), "plain PEFT must not take it for an adapter of its own"
    file = packed.file("adapter/packed.safetensors")
    tensors = load_file(file)
    tensors["unary"] = tensors["unary"][: len(tensors["unary"]) // 2]
    save_file(tensors, file)
    with pytest.raises(ArtifactError, match="cannot be read: the code is cut off"):
        logits(world, env, packed.file("adapter"))

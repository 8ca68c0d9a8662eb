"""Merging, editing and compressing, against weights added by hand and against PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ftpipe import slots
from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.models.loading import load_adapted, load_model
from ftpipe.pipeline.store import Store
from ftpipe.registry.versions import probe_logits
from ftpipe.stages.base import Environment
from tests.artifacts import run_stage
from tests.evaluate.world import World


def artifact(env: Environment, folder: Path, name: str) -> Artifact:
    store = Store(env.workspace)
    key = (name.encode().hex() + "0" * 64)[:64]
    with store.building("train", key) as out:
        shutil.copytree(folder, out, dirs_exist_ok=True)
        return store.commit(out, kind="train", name=name, key=key, material={}, inputs={}, counts={}, meta={}, notes={})


def stage(world: World, env: Environment, kind: str, names: dict[str, Path], **fields) -> Artifact:
    cls = slots.slots()["stages"].get(kind)
    refs = {"adapters": list(names)} if kind == "merge" else {"adapter": next(iter(names))}
    more = fields.pop("inputs", {})
    return run_stage(env.workspace, cls(model=str(world.model), **refs, **fields), {n: artifact(env, f, n) for n, f in names.items()} | more)


def logits(world: World, env: Environment, folder: Path):
    import torch
    from safetensors.torch import load_file

    probe = load_file(world.adapters["good"] / "probe.safetensors")
    model = load_adapted(str(world.model), env, folder, dtype="float32", allow_zero=True)
    with torch.inference_mode():
        return model(input_ids=probe["input_ids"]).logits


def by_hand(world: World, env: Environment, weights: dict[str, float]):
    """Logits of the base with `weight * scale * B @ A` added to each matrix, read from the files without any of the code under test."""
    import torch
    from safetensors.torch import load_file

    model = load_model(str(world.model), env, dtype="float32")
    parameters = dict(model.named_parameters())
    for name, weight in weights.items():
        tensors = load_file(world.adapters[name] / "adapter" / "adapter_model.safetensors")
        for key in (k for k in tensors if k.endswith("lora_A.weight")):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            parameters[f"{path}.weight"].data += weight * 2.0 * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    with torch.inference_mode():
        return model(input_ids=load_file(world.adapters["good"] / "probe.safetensors")["input_ids"]).logits


def close(one, two) -> bool:
    return float((one - two).abs().max()) < 2e-4 * float(two.abs().max())


def folders(world: World, *names: str) -> dict[str, Path]:
    return {n: world.adapters[n] for n in names}


def test_a_weighted_sum_is_exact_and_its_probe_holds(world: World, env: Environment):
    from safetensors.torch import load_file

    made = stage(world, env, "merge", folders(world, "good", "worse", "forgets"), method={"linear": {"weights": {"good": 0.7, "worse": -0.2}}})
    assert close(logits(world, env, made.file("adapter")), by_hand(world, env, {"good": 0.7, "worse": -0.2, "forgets": 1 / 3}))
    assert made.json("adapter/ftpipe_adapter.json")["method"]["lora"]["r"] == 12 and made.json("merge.json")["lost"] == 0
    probe = load_file(made.file("probe.safetensors"))
    model = load_adapted(str(world.model), env, made.file("adapter"), dtype="float32")
    assert close(probe_logits(model, probe), probe["logits"])


def test_the_average_of_one_adapter_and_itself_is_that_adapter(world: World, env: Environment):
    made = stage(world, env, "merge", {"good": world.adapters["good"], "again": world.adapters["good"]})
    assert close(logits(world, env, made.file("adapter")), logits(world, env, world.adapters["good"] / "adapter"))


def test_equal_to_pefts_concatenation(world: World, env: Environment):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    made = stage(world, env, "merge", folders(world, "good", "worse"), method={"linear": {"weights": {"good": 0.5, "worse": 0.25}}})
    theirs = PeftModel.from_pretrained(load_model(str(world.model), env, dtype="float32"), world.adapters["good"] / "adapter", adapter_name="good")
    theirs.load_adapter(world.adapters["worse"] / "adapter", "worse")
    theirs.add_weighted_adapter(["good", "worse"], [0.5, 0.25], "both", combination_type="cat")
    theirs.set_adapter("both")
    with torch.inference_mode():
        expected = theirs(input_ids=load_file(world.adapters["good"] / "probe.safetensors")["input_ids"]).logits
    assert close(logits(world, env, made.file("adapter")), expected)


def test_a_bounded_rank_is_the_best_of_its_rank_and_says_what_it_lost(world: World, env: Environment):
    import torch

    from ftpipe.merge._deltas import read
    from ftpipe.models.weights import base_weights

    exact = stage(world, env, "merge", folders(world, "good", "forgets"))
    cut = stage(world, env, "merge", folders(world, "good", "forgets"), method={"linear": {"rank": 3}})
    base = base_weights(str(world.model), env)
    a, b = read(exact.file("adapter"), base), read(cut.file("adapter"), base)
    lost = whole = 0.0
    for name, delta in a.items():
        s = torch.linalg.svdvals(delta.dense().double())
        assert float((delta.dense() - b[name].dense()).double().pow(2).sum()) == pytest.approx(float(s[3:].pow(2).sum()), rel=1e-3, abs=1e-8)
        lost, whole = lost + float(s[3:].pow(2).sum()), whole + float(s.pow(2).sum())
    assert cut.json("merge.json")["lost"] == pytest.approx((lost / whole) ** 0.5, rel=1e-3) and cut.json("adapter/adapter_config.json")["r"] == 3


def test_rank_stabilised_and_per_module_scales_are_respected(world: World, env: Environment, tmp_path: Path):
    from ftpipe.merge._deltas import read
    from ftpipe.models.weights import base_weights

    changed = tmp_path / "rslora"
    shutil.copytree(world.adapters["good"], changed)
    config = json.loads((changed / "adapter" / "adapter_config.json").read_text())
    (changed / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True, "alpha_pattern": {"layers.0.self_attn.q_proj": 2}}))
    base = base_weights(str(world.model), env)
    plain, scaled = (read(f / "adapter", base) for f in (world.adapters["good"], changed))
    for name, delta in plain.items():
        factor = (2 / 4**0.5) / (8 / 4) if name.endswith("layers.0.self_attn.q_proj.weight") else 4**0.5
        assert close(scaled[name].dense(), factor * delta.dense())
    made = stage(world, env, "merge", {"changed": changed})
    assert close(read(made.file("adapter"), base)["model.layers.0.self_attn.q_proj.weight"].dense(), scaled["model.layers.0.self_attn.q_proj.weight"].dense())


def test_adapters_for_different_bases_and_unknown_weights_are_refused(world: World, env: Environment, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(world.adapters["good"], other)
    facts = json.loads((other / "adapter" / "ftpipe_adapter.json").read_text())
    facts["base"]["weights"] = "0" * 64
    (other / "adapter" / "ftpipe_adapter.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="only adapters for one base"):
        stage(world, env, "merge", {"good": world.adapters["good"], "other": other})
    with pytest.raises(ConfigError, match="did you mean 'good'"):
        stage(world, env, "merge", folders(world, "good", "worse"), method={"linear": {"weights": {"god": 1.0}}})


def test_negation_takes_away_what_was_learnt(world: World, env: Environment):
    made = stage(world, env, "edit", folders(world, "good"), method={"negate": {"scale": 0.5}})
    assert close(logits(world, env, made.file("adapter")), by_hand(world, env, {"good": -0.5}))
    both = stage(world, env, "merge", {"good": world.adapters["good"], "negated": made.path}, method={"linear": {"weights": {"good": 0.5, "negated": 1.0}}})
    assert close(logits(world, env, both.file("adapter")), by_hand(world, env, {})), "half of it and minus half of it are nothing"


@pytest.mark.parametrize("dtype, bound", [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_half_precision_halves_the_size_and_states_its_rounding(world: World, env: Environment, dtype: str, bound: float):
    made = stage(world, env, "compress", folders(world, "good"), method={"half_precision": {"dtype": dtype}})
    said = made.json("compress.json")
    assert 0.4 < said["bytes_after"] / said["bytes_before"] < 0.75 and 0 < said["lost"] <= bound
    gap = (logits(world, env, made.file("adapter")) - logits(world, env, world.adapters["good"] / "adapter")).abs().max()
    assert 0 < float(gap) < 0.1


def test_full_weights_become_a_small_adapter(world: World, env: Environment, tmp_path: Path):
    """A full fine-tune whose changes have rank two is kept exactly by two directions."""
    import torch
    from safetensors.torch import save_file

    base = {n: p for n, p in load_model(str(world.model), env, dtype="float32").named_parameters() if ".mlp." in n}
    torch.manual_seed(0)
    weights = {n: (p + 0.05 * torch.randn(p.shape[0], 2) @ torch.randn(2, p.shape[1])).detach() for n, p in base.items()}
    folder = tmp_path / "full" / "adapter"
    folder.mkdir(parents=True)
    save_file(weights, folder / "weights.safetensors")
    facts = json.loads((world.adapters["good"] / "adapter" / "ftpipe_adapter.json").read_text()) | {"method": {"full": {}}}
    (folder / "ftpipe_adapter.json").write_text(json.dumps(facts))
    made = stage(world, env, "compress", {"full": tmp_path / "full"}, method={"low_rank": {"rank": 2}})
    assert made.json("compress.json")["lost"] < 1e-4 and made.json("compress.json")["bytes_after"] < 0.4 * made.json("compress.json")["bytes_before"]
    assert close(logits(world, env, made.file("adapter")), logits(world, env, folder))
    half = stage(world, env, "merge", {"full": tmp_path / "full", "good": world.adapters["good"]}, method={"linear": {"weights": {"full": 1.0, "good": 0.0}}})
    assert close(logits(world, env, half.file("adapter")), logits(world, env, folder)), "a LoRA and full weights sum to full weights"


def test_the_same_merge_twice_gives_the_same_bytes(world: World, env: Environment):
    one, two = (stage(world, env, "merge", folders(world, "good", "worse"), method={"linear": {"rank": 2}}) for _ in range(2))
    assert one.content == two.content


def test_a_merge_that_cancels_out_is_noticed_when_it_is_loaded(world: World, env: Environment):
    made = stage(world, env, "edit", folders(world, "zero"))
    with pytest.raises(ArtifactError, match="changes nothing"):
        load_adapted(str(world.model), env, made.file("adapter"))

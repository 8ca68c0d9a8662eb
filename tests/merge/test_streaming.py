"""Whole weights: end points bit for bit, shards, and memory that does not grow with the model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.models.loading import load_model
from ftpipe.stages.base import Environment
from tests.evaluate.world import World
from tests.merge.test_merge import folders, logits, stage


@pytest.fixture
def full(world: World, env: Environment, tmp_path: Path) -> dict[str, Path]:
    """Two full fine-tunes of every parameter."""
    base = dict(load_model(str(world.model), env, dtype="float32").named_parameters())
    facts = json.loads((world.adapters["good"] / "adapter" / "ftpipe_adapter.json").read_text()) | {"method": {"full": {}}}
    made = {}
    for seed, name in enumerate(("one", "two")):
        g = torch.Generator().manual_seed(seed)
        folder = tmp_path / name / "adapter"
        folder.mkdir(parents=True)
        save_file({n: (p + 0.02 * torch.randn(p.shape, generator=g)).detach() for n, p in base.items()}, folder / "weights.safetensors")
        (folder / "ftpipe_adapter.json").write_text(json.dumps(facts))
        made[name] = tmp_path / name
    return made


def test_wise_ft_at_its_ends_is_the_tuned_model_and_the_base_bit_for_bit(world: World, env: Environment, full: dict[str, Path]):
    tuned = stage(world, env, "merge", {"one": full["one"]}, method={"wise_ft": {"alpha": 1.0}})
    assert torch.equal(logits(world, env, tuned.file("adapter")), logits(world, env, full["one"] / "adapter"))
    theirs = load_file(full["one"] / "adapter" / "weights.safetensors")
    assert all(torch.equal(t, theirs[n]) for n, t in load_file(tuned.file("adapter/weights.safetensors")).items())
    none = stage(world, env, "merge", {"one": full["one"]}, method={"wise_ft": {"alpha": 0.0}})
    base = dict(load_model(str(world.model), env, dtype="float32").named_parameters())
    assert all(torch.equal(t, base[n]) for n, t in load_file(none.file("adapter/weights.safetensors")).items())
    lora = stage(world, env, "merge", folders(world, "good"), method={"wise_ft": {"alpha": 1.0}})
    assert torch.equal(logits(world, env, lora.file("adapter")), logits(world, env, world.adapters["good"] / "adapter"))


def test_averages_are_those_of_the_weights_bit_for_bit(world: World, env: Environment, full: dict[str, Path]):
    made = load_file(stage(world, env, "merge", full, method="uniform_soup").file("adapter/weights.safetensors"))
    one, two = (load_file(f / "adapter" / "weights.safetensors") for f in full.values())
    assert set(made) == set(one)
    for name, tensor in made.items():
        assert torch.equal(tensor, ((one[name].double() + two[name].double()) / 2).float()), name


def test_shards_hold_the_same_and_a_missing_one_is_noticed(world: World, env: Environment, full: dict[str, Path]):
    whole = stage(world, env, "merge", full, method="uniform_soup")
    parts = stage(world, env, "merge", full, method="uniform_soup", shard=2e-5)
    files = sorted(parts.file("adapter").glob("*.safetensors"))
    assert len(files) > 3 and not (parts.file("adapter") / "weights.safetensors").exists()
    merged = {n: t for f in files for n, t in load_file(f).items()}
    expected = load_file(whole.file("adapter/weights.safetensors"))
    assert merged.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in merged.items())
    assert torch.equal(logits(world, env, parts.file("adapter")), logits(world, env, whole.file("adapter")))
    again = stage(world, env, "merge", {"parts": parts.path}, method={"wise_ft": {"alpha": 1.0}})
    assert torch.equal(logits(world, env, again.file("adapter")), logits(world, env, whole.file("adapter")))
    files[0].unlink()
    with pytest.raises(ArtifactError, match="weight files are missing"):
        logits(world, env, parts.file("adapter"))


def test_ties_of_loras_is_cut_to_a_rank_or_written_whole(world: World, env: Environment):
    """Against PEFT's own, which trims each weight by itself too and cuts by the same SVD."""
    from peft import PeftModel

    from ftpipe.merge._deltas import read
    from ftpipe.models.weights import base_weights

    ties = {"scope": "tensor", "density": 0.3}
    with pytest.raises(ConfigError, match="set `rank`"):
        stage(world, env, "merge", folders(world, "good", "forgets"), method={"ties": ties})
    cut = stage(world, env, "merge", folders(world, "good", "forgets"), method={"ties": ties | {"rank": 6}})
    whole = stage(world, env, "merge", folders(world, "good", "forgets"), method={"ties": ties | {"whole": True}})
    assert cut.json("merge.json")["form"] == "lora" and whole.json("merge.json")["form"] == "whole"
    assert 0 < cut.json("merge.json")["lost"] < 1 and whole.json("merge.json")["lost"] == 0
    theirs = PeftModel.from_pretrained(load_model(str(world.model), env, dtype="float32"), world.adapters["good"] / "adapter", adapter_name="good")
    theirs.load_adapter(world.adapters["forgets"] / "adapter", "forgets")
    theirs.add_weighted_adapter(["good", "forgets"], [1.0, 1.0], "both", combination_type="ties_svd", density=0.3, svd_rank=6)
    mine = read(cut.file("adapter"), base_weights(str(world.model), env))
    for name, delta in mine.items():
        module = theirs.get_submodule("base_model.model." + name.removesuffix(".weight"))
        expected = module.scaling["both"] * module.lora_B["both"].weight @ module.lora_A["both"].weight
        assert torch.allclose(delta.dense(), expected, atol=2e-3 * float(expected.abs().max())), name
    lost = size = 0.0
    for delta in read(whole.file("adapter"), base_weights(str(world.model), env)).values():
        values = torch.linalg.svdvals(delta.dense().double())
        lost, size = lost + float(values[6:].pow(2).sum()), size + float(values.pow(2).sum())
    assert cut.json("merge.json")["lost"] == pytest.approx((lost / size) ** 0.5, rel=1e-3)


PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from tests.artifacts import run_stage
from tests.merge.test_merge import artifact
from ftpipe.stages.base import Environment
from ftpipe.stages.merge import Merge
from ftpipe.models.loading import identity
from ftpipe.models.weights import tensor
from ftpipe.train.adapt._weights import tensor_files
from tests.tiny import make_tiny_model

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024

def merge(folder, count, methods):
    env = Environment(folder, folder, "test")
    model = make_tiny_model(folder / "model")
    (model / "model.safetensors").unlink()
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(count)]
    def shards(out, scale, index):
        where = {}
        for start in range(0, count, 8):
            part, file = names[start:start + 8], f"{out.name}-{start}.safetensors"
            save_file({n: torch.full((512, 1024), scale * (i + 1)).bfloat16() for i, n in enumerate(part, start)}, out / file)
            where |= dict.fromkeys(part, file)
        (out / index).write_text(json.dumps({"weight_map": where}))
    shards(model, 1.0, "model.safetensors.index.json")
    facts, inputs = {"method": {"full": {}}, "base": identity(str(model), env), "dtype": "bfloat16"}, {}
    for name, scale in (("a", 2.0), ("b", 4.0)):
        out = folder / name / "adapter"
        out.mkdir(parents=True)
        shards(out, scale, "weights.safetensors.index.json")
        (out / "ftpipe_adapter.json").write_text(json.dumps(facts))
        inputs[name] = artifact(env, folder / name, name)
    peaks = []
    for method in methods:
        peak, before, stop = [0], anonymous(), threading.Event()
        def watch():
            while not stop.is_set():
                peak[0] = max(peak[0], anonymous() - before)
                time.sleep(0.002)
        thread = threading.Thread(target=watch)
        thread.start()
        made = run_stage(folder, Merge(adapters=["a", "b"], model=str(model), method=method, probe=False, shard=0.004), inputs)
        stop.set(); thread.join()
        peaks.append(peak[0])
        if method == "linear":
            files = tensor_files(made.file("adapter"))
            assert all(bool((tensor(files[n], n) == torch.tensor(3.0 * (i + 1)).bfloat16()).all()) for i, n in enumerate(names))
            assert len(set(files.values())) == count // 5 + 1, files.values()
    return peaks

folder, methods = Path(sys.argv[1]), ["linear", {"ties": {"density": 0.5}}]
merge(folder / "warm", 4, methods)
print(json.dumps({count: merge(folder / str(count), count, methods) for count in (8, 28)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path):
    """Three models of 28 MiB (bfloat16) are merged in the memory of a few weights of 1 MiB and one shard of 4 MiB; models of 8 MiB take about the same."""
    at_once = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}  # what is freed goes back to the system at once, so that what is seen is in use
    run = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, timeout=400, env=os.environ | at_once)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    for small, large in zip(found["8"], found["28"]):
        assert large < 36 * 2**20 and large < small + 12 * 2**20, found

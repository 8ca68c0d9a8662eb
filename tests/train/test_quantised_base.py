"""Adapters trained beside a quantised base: what trains, what is written, what loads and merges, and what is refused."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec

import pytest

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.stages.base import Environment
from tests.tiny import make_tiny_model
from tests.train import planted
from tests.train.small import examples, small_run, steps

needs_bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed (pip install 'ftpipe[gpu]')")
METHODS = ["int8", pytest.param("nf4", marks=needs_bitsandbytes)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """64 inputs a layer at least: a block of nf4. Its linear layers are six times as large as a new model's, whose logits are little but those of the
    embedding, so that what happens to the layers is seen."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = make_tiny_model(tmp_path_factory.mktemp("model"), hidden=64)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t * 6 if "_proj" in n else t for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    return folder


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    """A real rank, ZeRO 2, bfloat16, 4-bit base."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed (pip install 'ftpipe[gpu]')")
    return planted.train(tmp_path_factory.mktemp("trained"), model, quantize="nf4", dtype="bfloat16", zero=2, epochs=4, learning_rate=1e-2)


def frozen_bits(run):
    tensors = {**dict(run.model.named_parameters()), **dict(run.model.named_buffers())}
    return {n: t.detach().clone() for n, t in tensors.items() if ".lora_" not in n}


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1].float()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", METHODS)
def test_only_lora_changes_and_the_zero_stages_agree(name, model, tmp_path):
    import torch
    from safetensors.torch import load_file

    from ftpipe import slots

    found, probes, saved = {}, {}, {}
    for zero in slots.slots()["models/quantize"].get(name).zero_stages:
        run = small_run(model, quantize=name, zero=zero)
        assert len(run.quantize.small(run.model)) == 14 and all(".lora_" in n for n in run.trainable())
        assert not any(p.requires_grad for layer in run.quantize.small(run.model).values() for p in layer.parameters())
        before = frozen_bits(run) if zero < 3 else {}
        start = {n: run.engine.value(n) for n in run.engine.names}
        found[zero] = [(r["loss"], r["grad_norm"]) for r in steps(run, examples(), 3)]
        after = frozen_bits(run) if zero < 3 else {}
        assert before.keys() == after.keys() and all(after[n].equal(t) for n, t in before.items()), "the base keeps its bits"
        assert all(p.grad is None for n, p in run.model.named_parameters() if ".lora_" not in n)
        assert [n for n in start if run.engine.value(n).equal(start[n])] == []
        probes[zero] = run.engine.probe(torch.arange(5, 45)[None])
        (tmp_path / str(zero)).mkdir()
        run.adapt.save(run.model, run.engine.state(), tmp_path / str(zero))
        saved[zero] = load_file(tmp_path / str(zero) / "adapter_model.safetensors")
        run.engine.destroy()
    assert set(found) == {0, 1, 2, 3}
    for zero in found:
        torch.testing.assert_close(probes[zero], probes[0], rtol=1e-4, atol=1e-5)
        assert all((t - saved[0][n]).abs().max() < 1e-4 for n, t in saved[zero].items()) and saved[zero].keys() == saved[0].keys()
    for other in found.values():
        assert [v for r in other for v in r] == pytest.approx([v for r in found[0] for v in r], abs=2e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", METHODS)
def test_the_loss_falls_as_far_as_beside_the_whole_base(name, model):
    fall = {}
    for quantize in (None, name):
        losses = [r["loss"] for r in steps(small_run(model, quantize=quantize, adapt={"lora": {"r": 8}}), examples(8), 15)]
        fall[quantize] = losses[0] - losses[-1]
    assert fall[None] > 0.2 and fall[name] == pytest.approx(fall[None], rel=0.1), fall


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("adapt", [{"lora": {"r": 4}}, {"lora": {"r": 4, "dora": True}}, {"layer_norm": {}}], ids=["lora", "dora", "layer_norm"])
def test_it_starts_at_the_quantised_base_and_loads_to_what_was_trained(name, adapt, model, tmp_path):
    import torch

    ids = torch.arange(5, 45)[None]
    run = small_run(model, quantize=name, adapt=adapt)
    if not run.adapt.trains_beside(name):
        assert (name, adapt["lora"]["dora"]) == ("int8", True)
        return
    run.model.eval()
    torch.testing.assert_close(logits(run.model, ids), logits(run.load_base(), ids), rtol=1e-4, atol=1e-5)
    run.model.train()
    steps(run, examples(), 2)
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    run.model.eval()
    loaded = run.adapt.load(run.load_base(), tmp_path)
    torch.testing.assert_close(logits(loaded, ids), logits(run.model, ids), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(loaded, ids), logits(run.load_base(), ids), rtol=1e-4, atol=1e-5)
    if "lora" in adapt:
        with pytest.raises(ConfigError, match="on a quantised base, whose weights cannot hold its change"):
            run.adapt.merge(loaded)
    plain = run.adapt.load(run.quantize.dequantized(run.load_base(), torch.float32), tmp_path)
    plain.__dict__.pop("quantized_by", None)
    getattr(plain, "get_base_model", lambda: plain)().quantized_by = None
    torch.testing.assert_close(logits(run.adapt.merge(plain), ids), logits(loaded, ids), rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", METHODS)
def test_a_run_on_a_quantised_base_goes_on_after_a_kill_to_the_same_bytes(name, model, tmp_path, monkeypatch):
    """The loop as a rank runs it, stopped when it reports its fifth step, two steps behind a checkpoint of a base that is made small anew."""
    from ftpipe.train.lifeline import Reporter

    class Stops(Reporter):
        steps: list[int] = []

        def __call__(self, event, **values):
            if event == "step":
                self.steps.append(values["step"])
                if values["step"] == 5 and self.steps.count(5) == 1:
                    raise KeyboardInterrupt

    settings = {"quantize": name, "dtype": "bfloat16", "zero": 2, "epochs": 3, "checkpoint_every": 3, "adapt": {"lora": {"r": 4, "dropout": 0.2}}}
    report = Stops()
    report.steps.clear()
    with pytest.raises(KeyboardInterrupt):
        planted.in_process(tmp_path / "killed", model, monkeypatch, report=report, **settings)
    resumed = planted.in_process(tmp_path / "killed", model, monkeypatch, report=report, **settings)
    assert report.steps == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8, 9]
    straight = planted.in_process(tmp_path / "straight", model, monkeypatch, **settings)
    files = [p.relative_to(straight) for p in sorted(straight.rglob("*")) if p.is_file()]
    assert len(files) >= 4
    assert all((resumed / f).read_bytes() == (straight / f).read_bytes() for f in files)


def test_the_stage_says_what_the_base_was(trained, model):
    from transformers import AutoModelForCausalLM

    facts = json.loads((trained.out / "adapter" / "ftpipe_adapter.json").read_text())
    assert facts["quantize"] == {"nf4": {"levels": "nf4", "double": True, "compute": "model"}} and facts["dtype"] == "bfloat16"
    summary = json.loads((trained.out / "train.json").read_text())
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(model).parameters())
    assert summary["parameters"] == whole + summary["trainable"], "packed weights count one by one"
    losses = planted.losses(trained)
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 0.2, losses
    assert {n.split(".lora_")[1][0] for n in planted.tensors(trained)} == {"A", "B"}
    assert trained.notes["probe_difference"] < 0.02


def test_loaded_afresh_it_sits_on_the_same_quantised_base(trained, model):
    """And on another base, or the same one as it is, it computes something else: the comparison with the probe would tell."""
    from safetensors.torch import load_file

    from ftpipe.models.loading import load_adapted

    probe = load_file(trained.out / "probe.safetensors")
    path = trained.out / "adapter" / "ftpipe_adapter.json"
    kept = path.read_text()

    def away(quantize):
        facts = json.loads(kept) | {"quantize": quantize}
        path.write_text(json.dumps({k: v for k, v in facts.items() if v is not None}))
        found = logits(load_adapted(str(model), trained.env, trained.out / "adapter"), probe["input_ids"])
        return float((found - probe["logits"]).abs().max() / probe["logits"].abs().max())

    try:
        right = away(json.loads(kept)["quantize"])
        wrong = [away(q) for q in (None, {"nf4": {"levels": "fp4"}})]
        assert right < 0.02 and min(wrong) > 0.1, (right, wrong)
    finally:
        path.write_text(kept)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 0.01), ("bfloat16", 0.03)])
def test_merged_it_is_what_was_trained_and_on_the_original_base_it_is_not(trained, model, dtype, tolerance):
    """The tolerance is rounding: training computes in bfloat16, whose steps are 2^-8 of a number."""
    import torch
    from safetensors.torch import load_file

    from ftpipe.models.loading import load_adapted, load_merged

    ids = load_file(trained.out / "probe.safetensors")["input_ids"]
    expected = logits(load_adapted(str(model), trained.env, trained.out / "adapter"), ids)

    def away(base):
        merged = load_merged(str(model), trained.env, trained.out / "adapter", base=base, dtype=dtype)
        assert {p.dtype for p in merged.parameters()} == {getattr(torch, dtype)}
        assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {torch.nn.Linear}
        return float((logits(merged, ids) - expected).abs().max() / expected.abs().max())

    assert away("trained") < tolerance
    assert away("original") > 3 * tolerance


def test_merging_stages_keep_the_base_it_belongs_to(trained, model, tmp_path):
    """Read as changes, written again and probed, it loads to the same; it is not mixed with one for the base as it is, and not made whole weights."""
    import torch
    from safetensors.torch import load_file

    from ftpipe.merge._deltas import Delta, facts_of, read, same_base
    from ftpipe.merge._weights import probe, write
    from ftpipe.models.loading import load_adapted
    from ftpipe.models.weights import base_weights

    source, env = trained.out / "adapter", trained.env
    facts = facts_of(source)
    base = base_weights(str(model), env, facts)
    deltas = read(source, base)
    write(tmp_path / "again", deltas, facts, base)
    assert facts_of(tmp_path / "again")["quantize"] == facts["quantize"]
    probe(str(model), env, deltas, "bfloat16", tmp_path / "probe.safetensors", facts)
    told = load_file(tmp_path / "probe.safetensors")
    found = logits(load_adapted(str(model), env, tmp_path / "again"), told["input_ids"])
    assert float((found - told["logits"]).abs().max() / told["logits"].abs().max()) < 0.03
    other = tmp_path / "other"
    shutil.copytree(source, other)
    (other / "ftpipe_adapter.json").write_text(json.dumps({k: v for k, v in facts.items() if k != "quantize"}))
    with pytest.raises(ConfigError, match=r"was trained on the base quantised by .*nf4.*, b on the base as it is"):
        same_base({"a": source, "b": other})
    name, delta = next(iter(deltas.items()))
    with pytest.raises(ConfigError, match="no longer of low rank"):
        write(tmp_path / "whole", {name: Delta(dense_=delta.dense())}, facts, base)
    assert torch.isfinite(told["logits"]).all()


def test_an_adapter_of_the_wrong_shape_does_not_fit_packed_weights(trained, tmp_path):
    from ftpipe.models.loading import load_adapted

    other = make_tiny_model(tmp_path / "other", hidden=128)
    folder = tmp_path / "adapter"
    shutil.copytree(trained.out / "adapter", folder)
    from ftpipe.models.loading import identity

    facts = json.loads((folder / "ftpipe_adapter.json").read_text())
    (folder / "ftpipe_adapter.json").write_text(json.dumps(facts | {"base": identity(str(other), trained.env)}))
    with pytest.raises(ArtifactError, match=r"the module's weight is \[128, 256\]"):
        load_adapted(str(other), trained.env, folder)


def check(model, **settings):
    planted.stage(model, **settings).check(Environment(workspace=model, base=model, pipeline="t"), {})


@needs_bitsandbytes
@pytest.mark.parametrize(("settings", "said"), [
    ({"quantize": "nf4", "adapt": "full"}, "full, with these settings, does not train on a base quantised by nf4"),
    ({"quantize": "int8", "adapt": {"lora": {"dora": True}}}, "lora, with these settings, does not train on a base quantised by int8"),
])
def test_what_cannot_work_is_refused_before_anything_runs(model, settings, said):
    with pytest.raises(ConfigError, match=said):
        check(model, **settings)


@needs_bitsandbytes
def test_what_can_work_is_not_refused(model):
    check(model, quantize="nf4", adapt={"lora": {"dora": True}})
    check(model, quantize={"nf4": {"levels": "fp4", "double": False}})
    check(model, quantize="int8", zero=3, ranks=2)


def test_a_method_is_not_used_under_a_zero_stage_it_does_not_name(model, monkeypatch):
    from ftpipe.models.quantize.int8 import Int8

    monkeypatch.setattr(Int8, "zero_stages", (0, 1))
    with pytest.raises(ConfigError, match="int8 does not work under ZeRO stage 2") as caught:
        check(model, quantize="int8", zero=2)
    assert caught.value.remedy == "set zero to 0 or 1"


def test_without_the_library_the_plan_fails(model, monkeypatch):
    monkeypatch.setattr("ftpipe.models.quantize.nf4.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="bitsandbytes, which is not installed"):
        check(model, quantize="nf4")


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_that_is_stored_quantised_is_refused(model, tmp_path, quantize):
    there = tmp_path / "stored"
    shutil.copytree(model, there)
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}))
    with pytest.raises(ConfigError, match="stored quantised, by bitsandbytes"):
        check(there, quantize=quantize)


def test_a_subclass_of_lora_does_not_pass_for_lora(model):
    """One that reads the base's weights finds them packed, so each has to say for itself that it can."""
    from ftpipe.train.adapt.lora import Lora

    class Reads(Lora):
        pass

    assert Lora().trains_beside("nf4") and not Reads().trains_beside("nf4")


def test_how_the_base_is_kept_is_part_of_the_key(model):
    keys = [json.dumps(planted.stage(model, quantize=q).key_fields()) for q in (None, "nf4", "int8", {"nf4": {"double": False}})]
    assert len(set(keys)) == 4
    assert "nf4" in {m.name() for m in planted.stage(model, quantize="nf4").methods()}, "its code and libraries too"


def test_the_card_says_what_the_base_was():
    from ftpipe.registry.card import card

    given = {"base": {"model": "m", "weights": "w"}, "method": {"lora": {"r": 4}}, "verdict": {"rules": []}, "comparisons": [], "lineage": [], "peft": True}
    assert "quantised by `nf4` (levels nf4, double True)" in card("n", **given, quantize={"nf4": {"levels": "nf4", "double": True}})
    assert "quantised" not in card("n", **given)

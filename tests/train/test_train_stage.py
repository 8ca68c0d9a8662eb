"""The train stage with real ranks: what it leaves, what it refuses, what it says."""

from __future__ import annotations

import json

import pytest

from ftpipe.errors import ConfigError, DataError
from ftpipe.stages.base import Environment
from tests.train import planted
from tests.train.planted import lessons, messages


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """Two epochs of 24 lessons, one of them shown three times, one too long, one of a format that cannot be, one without an answer."""
    rows = [*lessons(), messages("long", "x" * 600), {"format": "messages", "messages": [{"role": "user", "content": "no answer"}]}]
    told = planted.Told()
    ctx = planted.train(tmp_path_factory.mktemp("trained"), tiny_model, rows, times=[3] + [1] * 25, listener=told, epochs=2, zero=2, regularizers=["l2_start"],
                        keep_optimizer=True)
    return ctx, told


def table(ctx, name):
    import pyarrow.parquet as pq

    return pq.read_table(ctx.out / name)


def test_the_payload_is_whole(trained):
    ctx, _ = trained
    files = {p.relative_to(ctx.out).as_posix() for p in ctx.out.rglob("*") if p.is_file()}
    assert files == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/ftpipe_adapter.json", "metrics.parquet", "seen.parquet",
                     "probe.safetensors", "train.json", "decisions.parquet", "optimizer.safetensors"}
    manifest = json.loads((ctx.out / "adapter" / "ftpipe_adapter.json").read_text())
    assert manifest["trainable"] == ctx.meta["trainable"] == 4 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert set(manifest) == {"method", "base", "tokenizer", "chat_template", "dtype", "trainable"}
    assert {t.dtype.is_floating_point for t in planted.tensors(ctx).values()} == {True}


def test_every_row_is_accounted_for(trained):
    ctx, _ = trained
    decisions = {d["row_id"]: d for d in table(ctx, "decisions.parquet").to_pylist()}
    assert len(decisions) == 26 and ctx.counts["rows_in"] == 26 and ctx.counts["rows_kept"] == 24
    assert decisions["r24"]["reason"] == "longer than 512 tokens"
    assert decisions["r25"]["reason"] == "no assistant turn to train on"
    seen = {s["row_id"]: s for s in table(ctx, "seen.parquet").to_pylist()}
    assert {r: s["times"] for r, s in seen.items()} == {f"r{i}": 6 if i == 0 else 2 for i in range(24)}
    assert all(1 <= s["first_step"] <= s["last_step"] <= ctx.counts["steps"] for s in seen.values())
    assert sum(s["times"] * s["tokens"] for s in seen.values()) == ctx.counts["tokens"]
    assert sum(s["times"] * s["trained_tokens"] for s in seen.values()) == ctx.counts["trained_tokens"]


def test_metrics_hold_each_step_and_only_what_a_second_run_repeats(trained):
    ctx, told = trained
    metrics = table(ctx, "metrics.parquet")
    assert metrics.column_names == ["step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "rows", "l2_start"]
    assert metrics["step"].to_pylist() == list(range(1, ctx.counts["steps"] + 1)) == [s["step"] for s in told.steps]
    assert metrics["loss"].to_pylist() == [s["loss"] for s in told.steps]
    assert sum(metrics["tokens"].to_pylist()) == ctx.counts["tokens"]
    assert sum(metrics["rows"].to_pylist()) == 2 * 26
    assert all(s["tokens_per_second"] > 0 and s["memory_bytes"] > 1e6 for s in told.steps)
    rates = metrics["learning_rate"].to_pylist()
    assert max(rates) == pytest.approx(0.01) and rates[-1] < 0.003


def test_only_answers_are_trained_on(trained):
    """By hand: bytes of the answers, and one end-of-turn token each."""
    ctx, _ = trained
    answers = [len(r["messages"][1]["content"]) + 1 for r in lessons()]
    assert ctx.counts["trained_tokens"] == 2 * (sum(answers) + 2 * answers[0])


def test_the_saved_adapter_is_what_was_trained(trained):
    ctx, _ = trained
    assert ctx.notes["probe_difference"] < 1e-5
    assert ctx.notes["packing_difference"] < 1e-5


def test_the_optimizers_state_is_kept_by_name_where_it_is_asked_for(trained, tiny_model):
    """By the names that the loaded adapter's parameters have: who asks what a row's next update would be finds each."""
    from safetensors.torch import load_file

    from ftpipe.models.loading import load_adapted

    ctx, _ = trained
    kept = load_file(ctx.out / "optimizer.safetensors")
    loaded = load_adapted(str(tiny_model), ctx.env, ctx.out / "adapter", dtype="float32", device="cpu")
    names = {n: p.shape for n, p in loaded.named_parameters() if "lora_" in n}
    assert set(kept) == {f"{n}/{k}" for n in names for k in ("exp_avg", "exp_avg_sq", "step")}
    for name, shape in names.items():
        assert kept[f"{name}/exp_avg"].shape == shape and (kept[f"{name}/exp_avg_sq"] > 0).any()
        assert float(kept[f"{name}/step"]) == ctx.counts["steps"]


def test_plain_peft_loads_it(trained, tiny_model):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    ctx, _ = trained
    probe = load_file(ctx.out / "probe.safetensors")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), str(ctx.out / "adapter")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=probe["input_ids"]).logits[:, -1], probe["logits"], rtol=1e-4, atol=1e-5)


def test_a_changed_adapter_does_not_pass_for_the_trained_one(trained, tiny_model):
    from safetensors.torch import load_file, save_file

    from ftpipe.errors import ArtifactError
    from ftpipe.train.outcome import verify

    ctx, _ = trained
    path = ctx.out / "adapter" / "adapter_model.safetensors"
    kept = path.read_bytes()
    try:
        save_file({n: t * 1.5 for n, t in load_file(path).items()}, path)
        with pytest.raises(ArtifactError, match="does not compute what was trained"):
            verify(str(tiny_model), ctx, planted.stage(tiny_model)._job(ctx, {}))
    finally:
        path.write_bytes(kept)


def test_a_killed_finish_does_not_train_again(trained, tiny_model):
    """The result of the ranks is there; only what follows is done again, and comes to the same."""
    ctx, _ = trained
    before = planted.payload(ctx)
    told = planted.Told()
    again = planted.context(ctx.out.parent, [], listener=told)
    planted.stage(tiny_model, epochs=2, zero=2, regularizers=["l2_start"], keep_optimizer=True).run(again)
    assert planted.payload(again) == before and not told.steps


def check(folder, **settings):
    planted.stage(folder, **settings).check(Environment(workspace=folder, base=folder, pipeline="t"), {})


@pytest.mark.parametrize(("settings", "said"), [
    ({"zero": 3, "ranks": 1}, "ZeRO stage 3 spreads the parameters over ranks"),
    ({"ranks": 1000}, "1000 ranks"),
    ({"model": ""}, "no base model"),
])
def test_what_cannot_work_is_refused_before_anything_runs(tiny_model, settings, said):
    with pytest.raises(ConfigError, match=said):
        check(tiny_model, **settings)


def test_methods_that_do_not_work_under_the_stage_are_refused_with_one_they_all_know(tiny_model, monkeypatch):
    from ftpipe.train.optimizer.adamw import Adamw

    monkeypatch.setattr(Adamw, "zero_stages", (0, 1))
    with pytest.raises(ConfigError, match="adamw does not work under ZeRO stage 2") as caught:
        check(tiny_model, zero=2)
    assert caught.value.remedy == "set zero to 0 or 1"


@pytest.mark.parametrize("settings", [{"epochs": 1, "steps": 3}, {"rows_per_step": 4, "tokens_per_step": 100}, {"ranks": 0}, {"learning_rate": -1},
                                      {"dtype": "float8"}, {"adapt": {"lora": {"r": 0}}}, {"adapt": "lorra"}, {"batch_tokens": 200, "tokens_per_step": 100,
                                                                                                             "rows_per_step": None}])
def test_settings_that_mean_nothing_are_refused_when_read(tiny_model, settings):
    with pytest.raises(ValueError):
        planted.stage(tiny_model, **settings)


def test_no_rows_and_no_usable_rows_are_told_apart(tiny_model, tmp_path):
    with pytest.raises(DataError, match="no rows to train on"):
        planted.train(tmp_path / "none", tiny_model, [])
    with pytest.raises(DataError, match="none of 2 rows can be trained on; the commonest reason: longer than 20 tokens"):
        planted.train(tmp_path / "long", tiny_model, lessons(2), max_tokens=20)
    assert not planted.left(tmp_path)


def test_how_the_work_is_spread_is_no_part_of_the_key(tiny_model):
    plain = planted.stage(tiny_model).key_fields()
    assert planted.stage(tiny_model, zero=0, ranks=2, offload="optimizer", checkpoint_every=3, heartbeat=5).key_fields() == plain
    assert planted.stage(tiny_model, learning_rate=1e-3).key_fields() != plain


def test_training_told_to_learn_nothing_leaves_an_adapter_that_says_so(trained, tiny_model, tmp_path):
    """With another seed, so that it also shows that the seed decides the start: that the same one gives the same bytes, every test of resuming shows."""
    from ftpipe.models.loading import load_adapted

    ctx = planted.train(tmp_path, tiny_model, lessons(8), learning_rate=0.0, steps=1, seed=2)
    ours, theirs = planted.tensors(ctx), planted.tensors(trained[0])
    alike = {n: float((t * theirs[n]).sum() / (t.norm() * theirs[n].norm())) for n, t in ours.items() if "lora_A" in n}
    assert alike and all(abs(c) < 0.5 for c in alike.values()), "training turns a start by far less than that"
    assert json.loads((ctx.out / "adapter" / "ftpipe_adapter.json").read_text())["zero_delta"] is True
    assert all(not t.any() for n, t in planted.tensors(ctx).items() if "lora_B" in n)
    load_adapted(str(tiny_model), ctx.env, ctx.out / "adapter", dtype="float32")


def test_an_adapter_is_kept_while_few_rows_changed_and_never_for_a_forgotten_one(tmp_path):
    """Decided from the artifacts alone, so nothing is trained here."""
    import pyarrow as pa

    from ftpipe.artifacts import Artifact
    from ftpipe.data.forgotten import forget

    ctx = planted.context(tmp_path, lessons(10))
    ctx.decide(pa.table({"row_id": [f"r{i}" for i in range(10)], "kept": [True] * 10}))
    last, rows, env = Artifact(ctx.out), ctx.inputs["rows"], ctx.env

    def now(n: int) -> Artifact:
        folder = tmp_path / f"now{n}"
        return Artifact(folder) if folder.exists() else planted.rows_artifact(folder, lessons(n))

    def asked(retrain: float, artifact: Artifact) -> str | None:
        return planted.stage(tmp_path, retrain=retrain).good_enough(last, {"rows": artifact}, env)

    assert asked(0.0, rows) is None and "0.0% of the rows" in asked(0.1, rows)
    assert "16.7% of the rows changed" in asked(0.2, now(12)) and asked(0.15, now(12)) is None
    assert asked(0.2, now(9)) is not None and asked(0.2, now(7)) is None
    assert planted.stage(tmp_path, retrain=0.3).key_fields() == planted.stage(tmp_path).key_fields()
    forget(env.workspace, ["r3"])
    assert asked(0.2, now(12)) is None

"""Starts of LoRA that come from the weights (PiSSA) or from what layers read (EVA, CorDA), against closed forms, brute force and PEFT's own."""

from __future__ import annotations

import json

import pytest

from ftpipe.errors import ConfigError, DataError, TrainingError
from ftpipe.train import checkpoint
from ftpipe.train.adapt._lora import lora_layers, weight_of
from ftpipe.train.adapt.eva import Eva
from tests.train.small import examples, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")
METHODS = {"pissa": {"pissa": {"r": 4}}, "pissa fast": {"pissa": {"r": 4, "iterations": 8}}, "corda": {"corda": {"r": 4}},
           "corda kpm": {"corda": {"r": 4, "mode": "kpm"}}, "eva": {"eva": {"r": 4}}, "eva rslora": {"eva": {"r": 4, "rslora": True}},
           "pissa rslora": {"pissa": {"r": 4, "alpha": 6, "rslora": True}}}
ONE_EACH = ["pissa fast", "corda", "eva"]


def layers_of(run):
    return lora_layers(run.model, run.adapt.name())


def pair(run, name):
    """The scaled pair (s B0, A0) a layer starts from."""
    layer = layers_of(run)[name]
    a, b = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
    return layer.scaling["default"] * b, a


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float()


def ids():
    import torch

    return torch.arange(5, 85).view(2, 40)


def inputs_of(run, rows):
    """By brute force: what each layer of the base model reads over these rows, one row at a time: float64 [tokens, inputs]."""
    import torch

    base = run.load_base()
    found: dict = {}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda m, given, out, name=name: found.setdefault("base_model.model." + name, []).append(given[0][0].double()))
    for row in rows:
        logits(base, torch.tensor([row.input_ids[0]]))
    return {name: torch.cat(pieces) for name, pieces in found.items()}


@pytest.mark.parametrize(("name", "dtype"), [*((n, "float32") for n in METHODS), *((n, "bfloat16") for n in ONE_EACH)])
def test_training_starts_at_the_base_model_exactly(model, name, dtype):
    """Also in bf16, where a frozen difference W - B0 A0 would be rounded; and the start is no start at zero."""
    import torch

    run = small_run(model, adapt=METHODS[name], dtype=dtype)
    base = run.load_base()
    run.model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        assert logits(run.model, ids()).equal(logits(base, ids()))
    layers = layers_of(run)
    assert layers and all(p.abs().max() > 0 for n in layers for p in (pair(run, n) if "eva" not in name else pair(run, n)[1:]))


def test_pissa_takes_the_leading_directions_out(model):
    import torch

    for settings, close in (({"r": 4}, 1e-5), ({"r": 4, "alpha": 12}, 1e-5), ({"r": 4, "rslora": True}, 1e-5), ({"r": 4, "iterations": 16}, 1e-3)):
        run = small_run(model, adapt={"pissa": settings})
        for name, layer in layers_of(run).items():
            weight = weight_of(layer).double()
            b, a = pair(run, name)
            values = torch.linalg.svdvals(weight)
            torch.testing.assert_close(torch.linalg.svdvals(b @ a)[:4], values[:4], rtol=close, atol=0)
            assert float(torch.linalg.matrix_norm(weight - b @ a, 2)) == pytest.approx(float(values[4]), rel=20 * close)
            assert float((b / layer.scaling["default"]).norm()) == pytest.approx(float(a.norm()), rel=1e-5), "both sides hold the same share"


def peft_losses(base, config, rows, n, *, prepared=lambda model: None):
    """Losses of `n` steps of PEFT's own form (a frozen difference, a LoRA of rank r), by plain torch in float32."""
    import torch
    from peft import get_peft_model
    from torch.nn.functional import cross_entropy

    from ftpipe.train.batches import Plan

    prepared(base)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    found = []
    for _, numbers in Plan([e.tokens for e in rows], [1] * len(rows), 1, 100, rows_per_step=8).steps(steps=n):
        total, count = 0.0, 0
        for row in (rows[i] for i in numbers):
            tokens, mask = torch.tensor([row.input_ids[0]]), torch.tensor(row.trained[0])
            out = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            total = total + cross_entropy(out[mask[1:]], tokens[0, 1:][mask[1:]], reduction="sum")
            count += int(mask[1:].sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach() / count))
    return model, found


def test_pissa_takes_the_steps_of_pefts_frozen_difference(model):
    """The same starting pair but for signs, and the same losses step for step: counting the change from the start is the same method."""
    import torch
    from peft import LoraConfig

    run = small_run(model, adapt={"pissa": {"r": 4}})
    started = {n: pair(run, n) for n in layers_of(run)}
    found = [r["loss"] for r in steps(run, examples(), 4)]
    config = LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa", task_type="CAUSAL_LM")
    theirs, wanted = peft_losses(run.load_base(), config, examples(), 0)
    for name, layer in lora_layers(theirs, "pissa").items():
        b, a = started[name]
        torch.testing.assert_close(a.abs(), layer.lora_A["default"].weight.double().abs(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(b @ a, (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double(), rtol=1e-3, atol=1e-5)
    _, wanted = peft_losses(run.load_base(), config, examples(), 4)
    assert wanted[0] - wanted[-1] > 1e-2
    assert found == pytest.approx(wanted, abs=1e-4)


def test_pissa_learns_faster_than_lora(model):
    """At the same rank, scale and rate, over the same rows again and again."""
    lora, pissa = ([r["loss"] for r in steps(small_run(model, adapt=a), examples(8), 10, rate=2e-3, batch_tokens=1000)]
                   for a in ({"lora": {"r": 4, "alpha": 4}}, {"pissa": {"r": 4}}))
    assert lora[0] == pytest.approx(pissa[0], abs=1e-5)
    assert pissa[-1] < lora[-1] - 0.2 * (lora[0] - lora[-1]), (lora[-1], pissa[-1])


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_the_steps_of_pefts(model, mode):
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    rows = examples(6)
    run = small_run(model, adapt={"corda": {"r": 4, "mode": mode}}, rows=rows)
    started = {n: pair(run, n) for n in layers_of(run)}
    found = [r["loss"] for r in steps(run, examples(), 3)]
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode), task_type="CAUSAL_LM",
                        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])

    def prepared(base):
        preprocess_corda(base, config, run_model=lambda: [logits(base, torch.tensor([row.input_ids[0]])) for row in rows])

    theirs, _ = peft_losses(run.load_base(), config, examples(), 0, prepared=prepared)
    for name, layer in lora_layers(theirs, "corda").items():
        b, a = started[name]
        with torch.no_grad():
            want = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).double()
            assert float((b @ a - want).norm() / want.norm()) < 2e-3, name
            assert float(a.norm()) == pytest.approx(float(layer.lora_A["default"].weight.norm()), rel=1e-2), name
    _, wanted = peft_losses(run.load_base(), config, examples(), 3, prepared=prepared)
    assert found == pytest.approx(wanted, abs=2e-4)


def test_corda_is_the_decomposition_of_the_weight_times_the_second_moment(model):
    """By brute force from inputs collected apart; at full rank the pair is the whole weight; modes and rows matter."""
    import torch

    rows = examples()[:10]
    runs = {m: small_run(model, adapt={"corda": {"r": 4, "mode": m, "rows": 10}}, rows=rows) for m in ("ipm", "kpm")}
    other = small_run(model, adapt={"corda": {"r": 4, "rows": 10}}, rows=examples(10, seed=5))
    read = inputs_of(runs["ipm"], rows)
    for name, layer in layers_of(runs["ipm"]).items():
        weight, x = weight_of(layer).double(), read[name]
        c, start = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64), 0
        for row in rows:
            part = x[start:start + row.tokens]
            start += row.tokens
            c += part.T @ part / part.max() ** 2
        c += 0.01 * c.diagonal().mean() * torch.eye(len(c))
        u, s, vh = torch.linalg.svd(weight @ c, full_matrices=False)
        terms = [u[:, p] * s[p] @ vh[p] @ torch.linalg.inv(c) for p in (slice(4), slice(-4, None))]
        (b, a), (low_b, low_a) = (pair(runs[m], name) for m in ("ipm", "kpm"))
        torch.testing.assert_close(b @ a, terms[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(low_b @ low_a, terms[1], rtol=1e-3, atol=1e-5)
        assert float((x @ (low_b @ low_a).T).norm()) < 0.5 * float((x @ (b @ a).T).norm()), "what the rows need least is what kpm takes out"
        assert not torch.allclose(pair(other, name)[1], a, atol=1e-3), "other rows, another start"
    whole = small_run(model, adapt={"corda": {"r": 16, "target_modules": ["k_proj"]}})
    for name, layer in layers_of(whole).items():
        b, a = pair(whole, name)
        torch.testing.assert_close(b @ a, weight_of(layer).double(), rtol=1e-4, atol=1e-6)


def test_corda_looks_at_the_rows_of_the_stage_that_its_calibration_names(tiny_model, tmp_path):
    """Through the stage, without ranks: the rows rendered for it, what a rank's `run.calibration` gives, and the start that follows, kpm and ipm."""
    from pathlib import Path

    from ftpipe.data.rows import RowSet
    from ftpipe.errors import ConfigError
    from ftpipe.train import rendering, setup
    from ftpipe.train.lifeline import Reporter
    from tests.train import planted

    general = [planted.messages(f"Which {w}?", f"The {w} is {'xyz'[i % 3] * 9}.") for i, w in enumerate(("river", "king", "sea", "hill", "year"))]
    starts = {}
    for name, settings in {"own": {}, "kpm": {"calibration": "general"}, "ipm": {"calibration": "general", "mode": "ipm"}}.items():
        ctx = planted.context(tmp_path / name, planted.lessons(6))
        ctx.inputs["general"] = planted.rows_artifact(tmp_path / name / "general", [*general, {"format": "messages", "messages": general[0]["messages"][:1]}])
        stage = planted.stage(tiny_model, ranks=1, zero=0, adapt={"corda": {"r": 4, "mode": "kpm"} | settings})
        assert ("general" in stage.refs()) == (name != "own")
        job = stage._job(ctx, {})
        rendering.render(stage, ctx, RowSet(ctx.inputs["rows"]).table(), Path(job.tokens))
        run = setup.prepare(job, Reporter(), {})
        seen = [b.row_ids[0] for b in run.calibration(99)]
        assert len(seen) == (6 if name == "own" else 5) and (name == "own" or "r5" not in seen)
        if name != "own":
            tokenizer = run.load_tokenizer()
            asked = {tokenizer.decode(b.input_ids[0]).partition("Which ")[2].partition("?")[0] for b in run.calibration(99)}
            assert asked == {"river", "king", "sea", "hill", "year"}
        starts[name] = {n: pair(run, n)[1] for n in layers_of(run)}
    for name in starts["own"]:
        assert not starts["own"][name].allclose(starts["kpm"][name], atol=1e-3), "other rows, another start"
        assert not starts["ipm"][name].allclose(starts["kpm"][name], atol=1e-3), "another mode, another start"
    gate = type("Gate", (), {"produces": "verdict"})()
    with pytest.raises(ConfigError, match="corda's calibration names 'general', which makes verdict"):
        stage.check(planted.context(tmp_path / "check", []).env, {"general": gate})


def test_eva_finds_the_principal_directions_and_spends_its_rank_where_they_explain_most(model):
    import torch

    rows = examples(60, seed=3)
    run = small_run(model, adapt={"eva": {"r": 4, "tau": 1}}, rows=rows)
    layers, read = layers_of(run), inputs_of(run, rows)
    ranks = {}
    shares = []
    for name, x in read.items():
        if "lm_head" in name:
            continue
        x = x - x.mean(0)
        _, s, vh = torch.linalg.svd(x, full_matrices=False)
        share = s.square() / s.square().sum()
        shares += [(-float(v), name) for v in share[:8]]
        if name not in layers:
            ranks[name] = 0
            continue
        a = layers[name].lora_A["default"].weight.detach().double()
        ranks[name] = k = len(a)
        torch.testing.assert_close(a @ a.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-5)
        apart = s[:k] / s[1:k + 1] > 1.1  # of two directions of the same variance any turn is as good
        cosine = torch.nn.functional.cosine_similarity(a, vh[:k]).abs()
        assert bool((cosine[apart] > 0.99).all()), (name, cosine)
        assert float((a @ vh[:k].T).square().sum()) > 0.98 * k or not bool(apart[-1])
        assert not layers[name].lora_B["default"].weight.any()
        assert layers[name].scaling["default"] == pytest.approx(32 / 4)
    best = [n for _, n in sorted(shares)[:4 * len(ranks)]]
    assert sum(ranks.values()) == 4 * len(ranks) and max(ranks.values()) <= 8 and len(set(ranks.values())) > 1
    assert sum(abs(ranks[n] - best.count(n)) for n in ranks) <= 2, "the ranks that sorting exact shares gives, but for a tie"
    even = small_run(model, adapt={"eva": {"r": 4, "rho": 1}}, rows=rows)
    assert {len(la.lora_A["default"].weight) for la in layers_of(even).values()} == {4} and len(layers_of(even)) == len(ranks)


def test_eva_sees_what_is_planted(model):
    """Of layers whose inputs vary in one direction, in two alike, in all alike, the rank goes to the first two first."""
    import torch

    shares = {"one": torch.tensor([0.9, 0.05, 0.03, 0.02]), "two": torch.tensor([0.5, 0.4, 0.06, 0.04]), "all": torch.full((4,), 0.03)}
    assert Eva(r=1).spread(shares, 3) == {"one": 1, "two": 2, "all": 0}
    assert Eva(r=1).spread(shares, 12) == {"one": 4, "two": 4, "all": 4}
    assert Eva(r=1).spread({"a": torch.tensor([0.5]), "b": torch.tensor([0.5])}, 1) == {"a": 1, "b": 0}, "of equals the first"


def test_eva_can_look_at_trained_places_only_and_stops_when_nothing_turns(model):
    looked = []

    class Counting(Eva):
        def chosen(self, model, layers, run):
            give = run.calibration
            run.calibration = lambda n: [looked.append(b.row_ids[0]) or b for b in give(n)]
            alive = run.alive
            run.alive = lambda doing: (said.append(doing), alive(doing))
            return super().chosen(model, layers, run)

    said: list[str] = []
    one = examples(1)
    small_run(model, adapt=Counting(r=2, rows=200, tau=0.5), rows=examples(200))
    assert len(looked) == 200 and 0 < len(said) < 150, "rows of one kind: it need not see all"
    a = [la.lora_A["default"].weight for la in layers_of(small_run(model, adapt={"eva": {"r": 2, "tokens": "trained"}})).values()]
    b = [la.lora_A["default"].weight for la in layers_of(small_run(model, adapt={"eva": {"r": 2}})).values()]
    assert any(x.shape != y.shape or not x.equal(y) for x, y in zip(a, b))
    with pytest.raises(DataError, match="too few") as caught:
        small_run(model, adapt={"eva": {"r": 16, "rho": 4}}, rows=[type(one[0])("r", (one[0].input_ids[0][:6],), (one[0].trained[0][:6],))])
    assert "rows" in caught.value.remedy


@pytest.mark.parametrize(("name", "dtype"), [*((n, "float32") for n in METHODS), *((n, "bfloat16") for n in ONE_EACH)])
def test_plain_peft_loads_what_was_trained_on_the_base_as_it_was(model, name, dtype, tmp_path):
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    run = small_run(model, adapt=METHODS[name], dtype=dtype)
    steps(run, examples(), 3)
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    ranks = [len(t) for n, t in tensors.items() if "lora_A" in n]
    if "eva" in name:
        assert config["init_lora_weights"] == "eva" and config["r"] == 4
        assert {config["rank_pattern"].get(n.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), 4) == len(t)
                for n, t in tensors.items() if "lora_A" in n} == {True}
    else:
        assert config["init_lora_weights"] is True and config["r"] == 8 and set(ranks) == {8}
    run.model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        wanted = logits(run.model, ids())
    base = run.load_base()
    before = logits(base, ids())
    plain = PeftModel.from_pretrained(run.load_base(), tmp_path).eval()
    moved = float((wanted - before).abs().max())
    for loaded in (plain, run.adapt.load(run.load_base(), tmp_path)):
        away = float((logits(loaded, ids()) - wanted).abs().max())
        assert away <= (1e-4 if dtype == "float32" else 0.1) * moved, (away, moved)


def test_an_adapter_that_did_not_move_is_zero(model, tmp_path):
    from safetensors.torch import load_file

    run = small_run(model, adapt={"pissa": {"r": 4}})
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    assert not any(t.any() for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora_B" in n)


def test_small_changes_are_not_lost_in_bf16(model):
    """A change of A by 1e-4 in bf16: counted from the start it is computed to 2%; as B A x of rounded factors minus the start it is mostly rounding."""
    import torch

    run = small_run(model, adapt={"pissa": {"r": 4}}, dtype="bfloat16")
    errors = {"counted": [], "rounded": []}
    for layer in layers_of(run).values():
        first, second = layer.lora_A["default"], layer.lora_B["default"]
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            first.weight += 1e-4 * torch.randn(first.weight.shape, generator=torch.Generator().manual_seed(2))
            exact = x.double() @ (second.weight.double() @ (first.weight - first.start).double()).T
            rounded = (x @ first.weight.bfloat16().T) @ second.weight.bfloat16().T - (x @ first.start.bfloat16().T) @ second.start.bfloat16().T
            for kind, found in (("counted", second(first(x))), ("rounded", rounded)):
                errors[kind].append(float((found.double() - exact).norm() / exact.norm()))
    assert max(errors["counted"]) < 0.02 and min(errors["rounded"]) > 0.5, errors


def test_a_frozen_difference_in_bf16_is_not_the_base(model):
    """What is avoided here: PEFT's W - B0 A0 in bf16 changes the model before anything is learnt."""
    import torch
    from peft import LoraConfig, get_peft_model

    run = small_run(model, adapt={"pissa": {"r": 4}}, dtype="bfloat16")
    base = logits(run.load_base(), ids())
    theirs = get_peft_model(run.load_base(), LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights="pissa")).eval()
    with torch.autocast("cpu", torch.bfloat16):
        assert float((logits(theirs, ids()) - base).abs().max()) > 0
        assert logits(run.model.eval(), ids()).equal(base)


@pytest.mark.parametrize("name", ONE_EACH)
def test_every_zero_stage_takes_the_same_steps(model, name, tmp_path):
    import torch

    found = {}
    for zero in range(4):
        run = small_run(model, adapt=METHODS[name], zero=zero)
        records = steps(run, examples(), 2)
        found[zero] = [r[k] for r in records for k in ("loss", "grad_norm")]
        assert all(r["grad_norm"] > 0 for r in records)
    assert all(f == pytest.approx(found[0], rel=1e-4) for f in found.values())
    state = run.engine.state()  # of stage 3
    run.adapt.save(run.model, state, tmp_path)
    assert torch.allclose(logits(run.adapt.load(run.load_base(), tmp_path), ids()[:, -20:])[:, -1], run.engine.probe(ids()[:, -20:]), atol=1e-4)


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_same_seed_gives_the_same_start_and_what_is_looked_at_depends_on_it(model, name):
    method, = METHODS[name]
    adapt = {method: METHODS[name][method] | ({} if method == "pissa" else {"rows": 12})}
    first, again, other = (small_run(model, adapt=adapt, seed=s).trainable() for s in (1, 1, 2))
    assert all(p.equal(again[n]) for n, p in first.items())
    assert any(n not in other or other[n].shape != p.shape or not other[n].equal(p) for n, p in first.items())


@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("name", ONE_EACH)
def test_a_resumed_run_takes_its_start_from_the_checkpoint(model, name, zero, tmp_path):
    """Nothing is looked at or decomposed again: other rows and another random state change nothing, and the saved bytes are those of an unbroken run."""
    from ftpipe.train.engine import Engine
    from ftpipe.train.loop import _restore

    def saved(run, folder):
        folder.mkdir()
        run.adapt.save(run.model, run.engine.state(), folder)
        return [(p.name, p.read_bytes()) for p in sorted(folder.iterdir())]

    straight = small_run(model, adapt=METHODS[name], zero=zero)
    wanted = steps(straight, examples(), 5)
    broken = small_run(model, adapt=METHODS[name], zero=zero)
    steps(broken, examples(), 3)
    engine = broken.engine
    checkpoint.write(tmp_path / "c", checkpoint.Checkpoint(3, engine.trained(), engine.optimizer_state(), list(engine.names), broken.memory))
    kept = checkpoint.latest(tmp_path / "c")
    resumed = small_run(model, adapt=METHODS[name], zero=zero, rows=examples(2, seed=9), memory=kept.memory)
    start = small_run(model, adapt=METHODS[name]).trainable()
    assert all(p.equal(start[n]) for n, p in resumed.trainable().items()), "prepare gives the start, for those parts that remember it"
    resumed.engine.destroy()
    assert _restore(resumed, kept)[0] == 3
    resumed.engine = Engine(resumed, 1.0, touched=kept.parameters)
    resumed.engine.restore(kept.optimizer)
    assert steps(resumed, examples(), 5, first=3) == wanted[3:]
    assert saved(resumed, tmp_path / "b") == saved(straight, tmp_path / "a")


def test_what_cannot_start_so_is_refused(model):
    with pytest.raises(ConfigError, match="cannot take a part of rank 20") as caught:
        small_run(model, adapt={"pissa": {"r": 20}})
    assert "16 or less" in caught.value.remedy
    with pytest.raises(ConfigError, match=r"linear layers, and .*embed_tokens is a Embedding"):
        small_run(model, adapt={"corda": {"r": 4, "target_modules": ["embed_tokens"]}})
    from ftpipe import slots
    from ftpipe.train.run import Run

    with pytest.raises(TrainingError, match="no rows to look at"):
        slots.parse("train/adapt", "eva").prepare(small_run(model).load_base(), Run(model=None, load_base=None, identity={}, load_tokenizer=None))


@pytest.mark.parametrize("name", ONE_EACH)
def test_the_kernels_leave_a_start_that_is_not_a_plain_pair_alone(model, name):
    import torch

    from ftpipe.models import kernels

    run = small_run(model, adapt=METHODS[name])
    run.model.eval()
    base = logits(run.load_base(), ids())
    with torch.no_grad():
        for n, p in run.trainable().items():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n)))
    wanted = logits(run.model, ids())
    assert float((wanted - base).abs().max()) > 1e-2
    kernels.install(run.model)
    torch.testing.assert_close(logits(run.model, ids()), wanted, rtol=1e-3, atol=1e-4)
    with run.model.disable_adapter():
        torch.testing.assert_close(logits(run.model, ids()), base, rtol=1e-4, atol=1e-5)

"""Disturbances of the inputs and of the forward pass: what they do to the numbers, and that packing, ranks' stages and a kill change nothing."""

from __future__ import annotations

import math
import statistics
from typing import ClassVar

import pytest

from ftpipe.train.adapt._peft import PeftAdapt
from ftpipe.train.batches import lay_out
from ftpipe.train.draws import draws
from ftpipe.train.regularizer._hooks import blocks
from tests.train.small import examples, resumed, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")
ALL = {
    "noisefit": {"noisefit": {"layers": 1, "noise_std": 1.0}},
    "masked_thought": {"masked_thought": {"warmup": 0.0, "share": 0.8}},
    "random": {"masked_thought": {"warmup": 0.0, "replacement": "random"}},
    "neftune": {"neftune": {"alpha": 20.0}},
    "density": {"activation_density": {"strength": 3.0}},
}


@pytest.mark.parametrize("name", ALL)
def test_neither_micro_batches_nor_zero_stages_change_what_a_row_meets(model, name):
    """Eight rows in one micro-batch, in eight, and under every stage: the same loss and gradient, and not those without the disturbance."""
    settings = {"regularizers": (ALL[name],)}
    plain = steps(small_run(model), examples(8), 3, batch_tokens=10_000)
    one = steps(small_run(model, **settings), examples(8), 3, batch_tokens=10_000)
    assert abs(one[1]["loss"] - plain[1]["loss"]) > 5e-4
    for zero in (0, 3):  # tests/contract goes through the stages in between
        many = steps(small_run(model, zero=zero, **settings), examples(8), 3, alone=True)
        for a, b in zip(one, many, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], abs=3e-5) and b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-3)


@pytest.mark.parametrize("name", ALL)
def test_a_disturbed_run_goes_on_after_a_kill_as_if_nothing_had_been(model, tmp_path, name):
    straight = small_run(model, regularizers=(ALL[name],))
    wanted = steps(straight, examples(), 4)
    run, found = resumed(tmp_path, model, examples(), 4, 2, regularizers=(ALL[name],))
    assert found == wanted[2:]
    assert all(run.engine.value(n).equal(straight.engine.value(n)) for n in run.engine.names)


@pytest.mark.parametrize("name", ALL)
def test_outside_of_training_there_is_no_disturbance(model, name):
    """A rate of zero leaves the model at the base, bit for bit."""
    import torch

    run = small_run(model, regularizers=(ALL[name],))
    steps(run, examples(), 2, rate=0.0)
    ids = torch.arange(5, 60)[None]
    run.model.eval()
    with torch.no_grad():
        assert run.model(input_ids=ids).logits.equal(run.load_base()(input_ids=ids).logits)
    assert not any(len(m._forward_hooks) for m in (*blocks(run.model), run.model.get_input_embeddings()))


class Front(PeftAdapt):
    """Prompt tuning: three trained vectors in front of every row."""

    packs: ClassVar[bool] = False

    def config(self):
        from peft import PromptTuningConfig

        return PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")


@pytest.mark.parametrize("name", ALL)
def test_a_row_behind_an_adapters_own_tokens_is_disturbed_too(model, name):
    plain, disturbed = (steps(small_run(model, adapt=Front(), regularizers=r), examples(8), 2, alone=True) for r in ((), (ALL[name],)))
    assert math.isfinite(disturbed[1]["loss"]) and abs(disturbed[1]["loss"] - plain[1]["loss"]) > 1e-4


def test_tokens_that_an_adapter_puts_in_front_get_no_noise(model):
    import torch

    run, method, batch = prepared(model, ALL["noisefit"], examples(1), adapt=Front())
    run.memory["noisefit/blocks"] = [1]
    clean = layer_outputs(run, batch)[1]
    with method.noisy(run, batch, 1):
        noisy = layer_outputs(run, batch)[1]
    assert clean.shape[0] == batch.tokens + 3
    assert noisy[:3].equal(clean[:3]) and bool((noisy[3:] != clean[3:]).any(-1).all())
    assert torch.equal(noisy[3:], clean[3:] + method._noise(run, batch, clean[3:], "1/1"))


def prepared(model, settings, rows=None, **more):
    """A run with one regularizer, the regularizer, and a batch of all rows."""
    run = small_run(model, regularizers=(settings,), **more)
    rows = rows or examples(8)
    return run, run.regularizers[0], lay_out(rows, float(sum(e.targets for e in rows)))


def test_the_scale_of_the_noise_is_its_formula(model):
    import torch

    _, method, _ = prepared(model, {"noisefit": {"noise_std": 0.3, "decay": 0.7}})
    hidden = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1.0], [3.0], [0.5]])
    variances = [statistics.variance(row.tolist()) for row in hidden]
    everything = statistics.stdev(hidden.flatten().tolist())
    found = method.scale(hidden)
    for row, variance, got in zip(hidden.tolist(), variances, found.tolist(), strict=True):
        median = statistics.median(row)
        mad = statistics.median([abs(h - median) for h in row])
        factor = min(math.exp(variance / (statistics.mean(variances) + 1e-6)), 5.0)
        assert got == pytest.approx([0.3 * everything * mad * math.exp(-0.7 * abs(h - median) / (mad + 1e-6)) * factor for h in row], rel=1e-4)
    assert any(v / statistics.mean(variances) > math.log(5) for v in variances), "one token reaches the limit of the factor"
    assert bool((method.scale(torch.ones(2, 5)) == 0).all()), "no spread, no noise"


def test_the_noise_has_mean_zero_and_the_size_that_was_asked_for(model):
    import torch

    run, method, batch = prepared(model, {"noisefit": {"noise_std": 0.5}}, examples(1))
    rows = torch.randn(batch.tokens, 6, generator=torch.Generator().manual_seed(1))
    found = torch.stack([method._noise(run, batch, rows, str(i)) for i in range(5000)])
    size = method.scale(rows)
    assert bool((found.mean(0).abs() < 4 * size / 5000**0.5).all())
    assert bool(((found.std(0) / size - 1).abs() < 0.05).all())


def layer_outputs(run, batch):
    import torch

    from ftpipe.train.forward import logits

    seen = []
    handles = [b.register_forward_hook(lambda m, g, out: seen.append(out[0] if isinstance(out, tuple) else out)) for b in blocks(run.model)]
    with torch.no_grad():
        logits(run.model, batch)
    for h in handles:
        h.remove()
    return [s[0] for s in seen]


def test_noise_is_on_the_chosen_blocks_only(model):
    run, method, batch = prepared(model, {"noisefit": {"noise_std": 1.0}})
    clean = layer_outputs(run, batch)
    run.memory["noisefit/blocks"] = [1]
    with method.noisy(run, batch, 1):
        first = layer_outputs(run, batch)
        again = layer_outputs(run, batch)
    with method.noisy(run, batch, 2):
        second = layer_outputs(run, batch)
    assert first[0].equal(clean[0]) and second[0].equal(clean[0])
    assert first[1].equal(again[1]) and not first[1].equal(second[1])
    expected = clean[1] + 1.0 * method._noise(run, batch, clean[1], "1/1")
    assert (first[1] - expected).abs().max() < 1e-6 and not first[1].equal(clean[1])


def test_blocks_are_chosen_by_signal_over_noise(tmp_path):
    """Four blocks of planted size. The noise's expected size is S sqrt(2 / pi); it grows with the square of h, so large blocks have the smaller ratio."""
    import torch

    from tests.tiny import make_tiny_model

    model = make_tiny_model(tmp_path / "model", layers=4, seed=3)
    picked = {}
    for snr in ("largest", "lowest"):
        run, method, batch = prepared(model, {"noisefit": {"layers": 2, "snr": snr, "passes": 40}})
        with torch.no_grad():
            for i, block in enumerate(blocks(run.model)):
                for name, p in block.named_parameters():
                    if "down_proj.base_layer" in name:
                        p *= (1, 40, 1, 1)[i]
        ratios = []
        for hidden in layer_outputs(run, batch):
            noise = sum(float(method.scale(hidden[a:b]).sum()) for a, b, _ in draws(run, batch, "x")) * (2 / math.pi) ** 0.5
            ratios.append(float(hidden.abs().sum()) / noise)
        steps(run, examples(8), 1, rate=0.0)
        order = sorted(range(4), key=lambda i: ratios[i])
        assert len({round(math.log(r), 2) for r in ratios}) == 4, "the ratios are far enough apart to be told by 40 draws"
        picked[snr] = run.memory["noisefit/blocks"]
        assert picked[snr] == sorted(order[2:] if snr == "largest" else order[:2])
    assert set(picked["largest"]) | set(picked["lowest"]) == {0, 1, 2, 3}


def test_without_noise_what_is_left_is_alpha_times_the_objective(model):
    plain = steps(small_run(model), examples(), 1)[0]
    for zero, alpha in ((0, 0.5), (2, 0.8)):
        silent = steps(small_run(model, zero=zero, regularizers=({"noisefit": {"noise_std": 0.0, "alpha": alpha}},)), examples(), 1)[0]
        assert abs(silent["noise_divergence"]) < 1e-6 and abs(silent["noise_consistency"]) < 1e-6
        assert silent["loss"] == pytest.approx(alpha * plain["loss"], abs=1e-6)
        assert silent["grad_norm"] == pytest.approx(alpha * plain["grad_norm"], rel=1e-4)


def test_dropout_alone_makes_no_divergence(model):
    """All passes of a micro-batch drop the same: at zero noise there is nothing to tell them apart."""
    lora = {"lora": {"r": 4, "dropout": 0.3}}
    run = small_run(model, adapt=lora, regularizers=({"noisefit": {"noise_std": 0.0}},))
    found = steps(run, examples(), 3)
    assert max(abs(r["noise_divergence"]) for r in found) < 1e-6
    without = [0.5 * r["loss"] for r in steps(small_run(model, adapt=lora), examples(), 1)]
    assert found[0]["loss"] == pytest.approx(without[0], abs=1e-6)


def test_the_divergences_are_their_formula_and_grow_with_the_noise(model):
    import torch

    from ftpipe.train.forward import logits

    apart = []
    for size in (0.3, 1.0, 2.0):
        settings = {"noisefit": {"noise_std": size, "alpha": 0.7, "consistency": 0.2, "layers": 1}}
        run, method, batch = prepared(model, settings)
        found = steps(run, examples(8), 1, rate=0.0, batch_tokens=10_000)[0]
        with torch.no_grad():
            clean = logits(run.model, batch).double().softmax(-1)
            noisy = []
            for number in (1, 2):
                with method.noisy(run, batch, number):
                    noisy.append(logits(run.model, batch).double().softmax(-1))

        def kl(p, q):
            return sum(float((a * (a / b).log()).sum()) for a, b in zip(p, q, strict=True)) / len(p)

        divergence, between = (kl(clean, noisy[0]) + kl(clean, noisy[1])) / 2, kl(noisy[1], noisy[0])
        ce = -sum(math.log(float(p[t])) for p, t in zip(clean, batch.targets, strict=True)) / len(clean)
        assert found["noise_divergence"] == pytest.approx(divergence, rel=1e-3, abs=1e-6)
        assert found["noise_consistency"] == pytest.approx(between, rel=1e-3, abs=1e-6)
        assert found["loss"] == pytest.approx(0.7 * ce + 0.3 * divergence + 0.2 * between, abs=1e-4)
        apart.append(divergence)
    assert 0 < apart[0] < apart[1] < apart[2]


def test_masking_hides_the_share_of_the_answers_that_was_asked_for_and_nothing_else(model):
    rows = examples(120)
    run, method, batch = prepared(model, {"masked_thought": {"share": 0.3, "replacement": "random"}}, rows)
    answer = batch.sources + 1
    run.steps, run.step = 100, 80
    before = batch.input_ids.clone()
    masked = method.inputs(run, batch)
    hidden = masked.extra["masked_thought"]
    n = len(answer)
    assert n > 2000 and abs(float(hidden[answer].float().mean()) - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5
    assert int(hidden.sum()) == int(hidden[answer].sum()), "prompts are never hidden"
    assert masked.input_ids[0][~hidden].equal(batch.input_ids[0][~hidden]) and batch.input_ids.equal(before)
    assert masked.targets.equal(batch.targets) and masked.sources.equal(batch.sources) and masked.position_ids.equal(batch.position_ids)
    drawn = masked.input_ids[0][hidden]
    assert float((drawn != batch.input_ids[0][hidden]).float().mean()) > 0.97
    assert int(drawn.min()) < 15 and int(drawn.max()) > 243, "any token of the vocabulary"
    run.step = 81
    other = method.inputs(run, batch).extra["masked_thought"]
    assert 0.3 < float((other & hidden).sum()) / float(hidden.sum()) + 0.1 < 0.5, "the next step draws anew"


def test_the_share_climbs_from_nothing_to_its_end_in_the_first_two_thirds(model):
    run, method, _ = prepared(model, {"masked_thought": {}})
    run.steps = 300
    shares = []
    for run.step in range(300):
        shares.append(method.probability(run))
    assert shares[0] == 0.0 and shares[99] == pytest.approx(0.4 * 99 / 199) and shares[197] < 0.4
    assert shares[199:] == [0.4] * 101 and shares == sorted(shares)


def masking(model, replacement, **more):
    """A run with masked thought whose tokenizer is the model's own."""
    from transformers import AutoTokenizer

    from ftpipe import slots

    run = small_run(model)
    run.load_tokenizer = lambda: AutoTokenizer.from_pretrained(model)
    run.regularizers = (slots.parse("train/regularizer", {"masked_thought": {"replacement": replacement, **more}}),)
    run.regularizers[0].prepare(run)
    return run


@pytest.mark.parametrize("replacement", ["mask", "random", "pad"])
def test_the_first_step_of_masked_thought_is_plain_training(model, replacement):
    plain = steps(small_run(model), examples(), 2)
    found = steps(masking(model, replacement), examples(), 2)
    assert found[0]["loss"] == plain[0]["loss"] and found[0]["grad_norm"] == plain[0]["grad_norm"] and found[0]["masked_share"] == 0.0
    assert found[1]["masked_share"] > 0 and found[1]["loss"] != plain[1]["loss"]


@pytest.mark.parametrize("replacement", ["mask", "random", "pad"])
def test_what_is_predicted_from_masked_input_is_the_original(model, replacement):
    """The loss by hand: embeddings with replacements of our own making into the model, cross-entropy against the tokens as they were."""
    import torch
    from torch.nn.functional import cross_entropy

    rows = examples(8)
    run = masking(model, replacement, share=1.0, warmup=0.0)
    assert run.regularizers[0].probability(run) == 0.0
    run.steps, run.step = 2, 1
    record = steps(run, rows, 2, first=1, rate=0.0)[0]
    assert record["masked_share"] == 1.0
    table = run.model.get_input_embeddings().weight.detach()
    total, count = 0.0, 0
    for row in rows:
        batch = lay_out([row], 1.0)
        ids, mask = torch.tensor(row.input_ids[0]), torch.tensor(row.trained[0])
        embedded = table[ids].clone()
        embedded[mask] = {"mask": table.mean(0), "pad": table[0], "random": table[run.regularizers[0].inputs(run, batch).input_ids[0][mask]]}[replacement]
        with torch.no_grad():
            logits = run.model(inputs_embeds=embedded[None], use_cache=False).logits[0, :-1]
        total += float(cross_entropy(logits[mask[1:]], ids[1:][mask[1:]], reduction="sum"))
        count += int(mask[1:].sum())
    assert record["loss"] == pytest.approx(total / count, abs=1e-5)


def test_masked_tokens_are_embedded_as_the_mean_and_all_others_as_ever(model):
    import torch

    run, method, batch = prepared(model, {"masked_thought": {"warmup": 0.0}})
    run.step = 3
    batch = method.inputs(run, batch)
    embedding = run.model.get_input_embeddings()
    with torch.no_grad():
        clean = embedding(batch.input_ids)[0]
        with method.forward(run, batch):
            masked = embedding(batch.input_ids)[0]
    hidden = batch.extra["masked_thought"]
    assert 0 < int(hidden.sum()) < batch.sources.numel()
    assert masked[~hidden].equal(clean[~hidden])
    assert (masked[hidden] - embedding.weight.detach().mean(0)).abs().max() < 1e-6


def test_padding_needs_a_padding_token(model):
    from ftpipe.errors import ConfigError
    from ftpipe.train.regularizer.masked_thought import MaskedThought

    run = small_run(model)
    run.load_tokenizer = lambda: type("Tokenizer", (), {"pad_token_id": None})()
    with pytest.raises(ConfigError, match="no padding token"):
        MaskedThought(replacement="pad").prepare(run)


def test_neftune_is_uniform_within_its_bound_and_nothing_in_evaluation_mode(model):
    import torch

    run, method, batch = prepared(model, {"neftune": {"alpha": 7.0}}, examples(60))
    embedding = run.model.get_input_embeddings()
    width = embedding.weight.shape[1]
    with torch.no_grad():
        clean = embedding(batch.input_ids)[0]
        with method.forward(run, batch):
            noise = embedding(batch.input_ids)[0] - clean
            run.model.eval()
            assert embedding(batch.input_ids)[0].equal(clean)
            run.model.train()
    unit = torch.cat([noise[a:b] / (7.0 / math.sqrt((b - a) * width)) for a, b in batch.spans()])
    assert len(batch.spans()) == 60
    assert 0.999 < float(unit.abs().max()) <= 1 + 1e-4
    n = unit.numel()
    assert abs(float(unit.mean())) < 4 * (1 / 3 / n) ** 0.5
    assert float(unit.square().mean()) == pytest.approx(1 / 3, abs=4 * (4 / 45 / n) ** 0.5)


def test_neftune_of_size_zero_is_plain_training_bit_for_bit(model):
    runs = [small_run(model, regularizers=r) for r in ((), ({"neftune": {"alpha": 0.0}},))]
    plain, silent = (steps(r, examples(), 3) for r in runs)
    assert plain == silent
    assert all(runs[0].engine.value(n).equal(runs[1].engine.value(n)) for n in runs[0].engine.names)


def test_a_reference_sees_no_noise_in_its_inputs_embedding(model):
    """DPO starts where policy and reference agree; with noise on the policy alone they do not, while noise of both would cancel."""
    from ftpipe.train.objective.base import Example

    rows = [Example(a.row_id, (a.input_ids[0], b.input_ids[0]), (a.trained[0], b.trained[0])) for a, b in zip(examples(8), examples(8, seed=5), strict=True)]
    found = steps(small_run(model, objective="dpo", regularizers=({"neftune": {"alpha": 20.0}},)), rows, 1)[0]
    assert abs(found["margin"]) > 1e-4
    together = steps(small_run(model, objective="dpo", regularizers=tuple(ALL.values())), rows, 2)
    assert all(math.isfinite(r["loss"]) for r in together)

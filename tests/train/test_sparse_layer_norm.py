"""LayerNorm tuning: only norms move, and with Fisher information only the entries that have most of it."""

from __future__ import annotations

import pytest

from ftpipe.train.adapt.layer_norm import MEMORY
from tests.train.small import examples, small_run, steps
from tests.train.sparse import loaded, make_gpt2, moved, saved, stopped_and_resumed, whole

pytestmark = pytest.mark.usefixtures("alone")
DECAY = {"adamw": {"weight_decay": 0.1}}
LAYERS, HIDDEN = 2, 32


@pytest.mark.parametrize(("kind", "zero"), [("llama", 0), ("gpt2", 0), ("llama", 3)])
def test_every_norm_moves_and_nothing_else(model, tmp_path, kind, zero):
    """(2 L + 1) d scales, and as many shifts where there are some."""
    import torch

    folder = model if kind == "llama" else make_gpt2(tmp_path / "gpt2")
    run = small_run(folder, zero=zero, adapt="layer_norm", optimizer=DECAY)
    start = whole(run)
    norms = {n for n in start if "norm" in n or ".ln_" in n}
    assert sum(start[n].numel() for n in norms) == (2 * LAYERS + 1) * HIDDEN * (2 if kind == "gpt2" else 1)
    steps(run, examples(), 2)
    after = whole(run)
    assert moved(start, after) == norms == set(run.engine.names)
    fresh = loaded(run, tmp_path / "saved")
    assert all(p.equal(after[n]) for n, p in fresh.named_parameters())
    if not zero:
        ids = torch.arange(5, 60)[None]
        with torch.no_grad():
            before = run.model.eval()(input_ids=ids).logits
            torch.testing.assert_close(run.adapt.merge(fresh)(input_ids=ids).logits, before, rtol=0, atol=1e-6)


def test_norms_of_single_heads_rest_unless_asked_for(model):
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                        num_key_value_heads=2, head_dim=8))
    run = small_run(model, adapt="layer_norm")
    counts = [sum(dict(made.named_parameters())[n].numel() for n in run.adapt.model_copy(update={"heads": h}).chosen(made, run)) for h in (False, True)]
    assert counts == [(2 * 2 + 1) * 32, (2 * 2 + 1) * 32 + 2 * 2 * 8]


def by_hand(run, n):
    """Gradients of the log-likelihood of each of the first rows, by a loop over rows and `backward`: [{name: gradient}]."""
    import torch

    found = []
    base = run.load_base()
    for row in run.calibration(n):
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("norm" in name)
            parameter.grad = None
        ids = row.input_ids
        logp = torch.log_softmax(base(input_ids=ids).logits[0], -1)
        sum(logp[s, t] for s, t in zip(row.sources.tolist(), row.targets.tolist(), strict=True)).backward()
        found.append({n: p.grad.clone() for n, p in base.named_parameters() if p.requires_grad})
    return found


def test_fisher_information_is_the_mean_square_of_single_gradients_and_not_the_square_of_their_mean(model):
    import torch

    run = small_run(model, adapt={"layer_norm": {"fisher_share": 0.1, "fisher_rows": 8}})
    single = by_hand(run, 8)
    fresh = run.load_base()
    trained = {n: p.requires_grad_(True) for n, p in fresh.named_parameters() if "norm" in n}
    fisher = run.adapt.fisher(fresh, trained, run)
    assert len(single) == 8 and len({tuple(b.row_ids) for b in run.calibration(8)}) == 8
    for name, value in fisher.items():
        wanted = torch.stack([g[name] for g in single]).square().mean(0)
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)
        batch = torch.stack([g[name] for g in single]).mean(0).square()
        assert float((batch - wanted).abs().max()) > 0.1 * float(wanted.max())
    keep = run.adapt.selected(fisher)
    total = sum(f.numel() for f in fisher.values())
    assert sum(int(m.sum()) for m in keep.values()) == int(0.1 * total) == 16
    threshold = sorted((float(v) for f in fisher.values() for v in f.flatten()), reverse=True)[15]
    assert all(bool(((f >= threshold) == keep[n]).all()) for n, f in fisher.items())
    assert all(run.memory[MEMORY + n].equal(m) for n, m in keep.items())


@pytest.mark.parametrize("zero", range(4))
def test_precisely_the_selected_entries_differ_and_only_they_are_saved(model, tmp_path, zero):
    from safetensors.torch import load_file

    run = small_run(model, zero=zero, adapt={"layer_norm": {"fisher_share": 0.1, "fisher_rows": 4}}, optimizer=DECAY)
    start = whole(run)
    steps(run, examples(), 3)
    after = whole(run)
    for name, value in after.items():
        mask = run.memory.get(MEMORY + name)
        assert (value != start[name]).equal(mask) if mask is not None else value.equal(start[name])
    fresh = loaded(run, tmp_path / "saved")
    assert all(p.equal(after[n]) for n, p in fresh.named_parameters())
    kept = load_file(tmp_path / "saved" / "weights.safetensors")
    assert sum(t.numel() for n, t in kept.items() if t.is_floating_point() and "::" in n) + sum(
        int((t != start[n]).sum()) for n, t in kept.items() if "::" not in n) == 16


def test_a_kill_changes_nothing_and_does_not_look_at_the_rows_again(model, tmp_path):
    adapt = {"layer_norm": {"fisher_share": 0.2, "fisher_rows": 4}}
    straight = small_run(model, adapt=adapt, zero=2)
    wanted = steps(straight, examples(), 3)
    resumed, found = stopped_and_resumed(model, tmp_path / "checkpoints", 2, 3, adapt=adapt, zero=2)
    assert found == wanted[2:]
    assert saved(resumed, tmp_path / "a") == saved(straight, tmp_path / "b")
    again = small_run(model, adapt=adapt, memory=resumed.memory, rows=examples(1))
    assert all(again.memory[n].equal(straight.memory[n]) for n in straight.memory if n.startswith(MEMORY))

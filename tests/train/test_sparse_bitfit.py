"""BitFit: only biases move; which of them; and what is done where there are none."""

from __future__ import annotations

import pytest

from ftpipe.errors import ConfigError
from tests.train.small import examples, small_run, steps
from tests.train.sparse import batches_of, gradients, loaded, make_gpt2, moved, saved, stopped_and_resumed, whole

pytestmark = pytest.mark.usefixtures("alone")
DECAY = {"adamw": {"weight_decay": 0.1}}
HIDDEN = 32


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    return make_gpt2(tmp_path_factory.mktemp("gpt2"))


def thirds(tensor):
    return dict(zip(("query", "key", "value"), tensor.split(HIDDEN), strict=True))


@pytest.mark.parametrize("zero", [0, 3])
def test_every_bias_moves_but_the_keys_and_nothing_else(biased, tmp_path, zero):
    """With weight decay, which would move what rests; biases of d in a layer: 2 norms, 3 + 1 of attention, 4 + 1 feed-forward; 1 last norm."""
    run = small_run(biased, zero=zero, adapt="bitfit", optimizer=DECAY)
    start = whole(run)
    biases = {n for n in start if n.endswith(".bias")}
    assert set(run.engine.names) == biases
    assert sum(start[n].numel() for n in biases) == 2 * (2 + 3 + 1 + 4 + 1) * HIDDEN + HIDDEN
    steps(run, examples(), 3)
    after = whole(run)
    assert moved(start, after) == biases
    for name in biases:
        if "c_attn" in name:
            changed = {k: int((v != thirds(start[name])[k]).sum()) for k, v in thirds(after[name]).items()}
            assert changed == {"query": HIDDEN, "key": 0, "value": HIDDEN}
        else:
            assert bool((after[name] != start[name]).all())
    fresh = dict(loaded(run, tmp_path / "saved").named_parameters())
    assert all(fresh[n].equal(v) for n, v in after.items())


def test_the_gradient_of_a_key_bias_is_nothing_but_rounding_without_rotary_positions(biased, model):
    """Shift invariance of the softmax; with rotary positions the bias of the keys has an effect like any other."""
    run = small_run(biased, adapt="bitfit")
    for name, gradient in gradients(run.model, run, *one_batch(run))[0].items():
        if "c_attn" in name:
            size = {k: float(v.abs().max()) for k, v in thirds(gradient).items()}
            assert size["key"] < 1e-4 * size["value"] and size["query"] > 0
        else:
            assert float(gradient.abs().min()) > 0
    rotary = small_run(model, adapt={"bitfit": {"missing": "add"}})
    found = gradients(rotary.model, rotary, *one_batch(rotary))[0]
    # at biases of zero queries and keys meet as they are, so that a bias of the keys has a gradient wherever attention is not even
    assert all(float(g.abs().max()) > 1e-4 * float(found[n.replace("k_proj", "v_proj")].abs().max()) for n, g in found.items() if "k_proj" in n)
    assert sum("k_proj" in n for n in found) == 2 and not rotary.adapt.masks(rotary)


def one_batch(run):
    (batches, count), = batches_of(run, 1, batch_tokens=10_000)
    return batches, count


@pytest.mark.parametrize(("terms", "ends", "rows"), [
    (["query", "intermediate"], {"attn.c_attn.bias", "mlp.c_fc.bias"}, {"query"}),
    (["key", "value"], {"attn.c_attn.bias"}, {"key", "value"}),
    (["attention_norm", "output_norm", "attention_output", "output"], {"ln_1.bias", "ln_2.bias", "attn.c_proj.bias", "mlp.c_proj.bias"}, set()),
])
def test_terms_train_what_they_name(biased, terms, ends, rows):
    run = small_run(biased, adapt={"bitfit": {"terms": terms}})
    start = whole(run)
    steps(run, examples(), 1)
    after = whole(run)
    assert moved(start, after) == {f"transformer.h.{layer}.{end}" for layer in range(2) for end in ends}
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn.bias"
        assert {k for k, v in thirds(after[name]).items() if not v.equal(thirds(start[name])[k])} == rows


def test_a_model_without_biases_is_refused_unless_it_may_be_given_some(model):
    with pytest.raises(ConfigError, match="no bias to train") as caught:
        small_run(model, adapt="bitfit")
    assert "missing: add" in caught.value.remedy
    with pytest.raises(ConfigError, match="no bias of query"):
        small_run(model, adapt={"bitfit": {"terms": ["query"]}})


def test_added_biases_change_nothing_until_they_train_and_leave_the_weights_alone(model, tmp_path):
    """Trained, saved, loaded, merged, and then loaded by transformers from what it saved itself."""
    import torch
    from transformers import AutoModelForCausalLM

    run = small_run(model, adapt={"bitfit": {"missing": "add", "terms": ["query", "intermediate"]}})
    base, ids = run.load_base(), torch.arange(5, 60)[None]
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.model(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=1e-6)
    assert set(run.engine.names) == {f"model.layers.{i}.{m}.bias" for i in range(2) for m in ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj")}
    run.model.train()
    steps(run, examples(), 2)
    after = whole(run)
    assert all(after[n].equal(p) for n, p in base.named_parameters()), "the weights are bit for bit the base model's"
    assert all(bool(after[n].any()) for n in run.engine.names)
    fresh = loaded(run, tmp_path / "saved")
    with torch.no_grad():
        wanted = fresh(input_ids=ids).logits
        assert not torch.allclose(wanted, base(input_ids=ids).logits, atol=1e-4)
        merged = run.adapt.merge(fresh)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        assert again.config.attention_bias and again.config.mlp_bias
        torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=0, atol=1e-6)


def test_added_biases_have_no_place_in_an_architecture_that_has_no_setting_for_them(model, tmp_path):
    run = small_run(model, adapt={"bitfit": {"missing": "add"}})
    steps(run, examples(), 1)
    fresh = loaded(run, tmp_path / "saved")

    class Config:
        model_type, num_hidden_layers = "strange", 2

    fresh.config = Config()
    with pytest.raises(ConfigError, match="strange has no place for a bias of model"):
        run.adapt.merge(fresh)


@pytest.mark.parametrize("zero", [2])
def test_a_kill_changes_nothing(biased, tmp_path, zero):
    straight = small_run(biased, zero=zero, adapt="bitfit")
    wanted = steps(straight, examples(), 3)
    resumed, found = stopped_and_resumed(biased, tmp_path / "checkpoints", 2, 3, zero=zero, adapt="bitfit")
    assert found == wanted[2:]
    assert saved(resumed, tmp_path / "a") == saved(straight, tmp_path / "b")

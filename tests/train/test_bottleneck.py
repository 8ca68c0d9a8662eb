"""Bottleneck adapters, parallel adapters and MAM: where they sit, where they start, what trains, and that they come off without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest

from ftpipe import slots
from ftpipe.errors import ConfigError
from ftpipe.train.adapt._inserted import blocks
from tests.train.small import examples, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")
LAYERS, WIDTH, SIZE = 2, 32, 8
NETWORK = 2 * WIDTH * SIZE + WIDTH + SIZE
NORMS = (2 * LAYERS + 1) * WIDTH


def logits(model):
    import torch

    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 45)[None]).logits


def fill(model, std: float = 0.1) -> None:
    """Random values in every network, so that what it computes can be seen."""
    import torch

    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.normal_(std=std)


def hand(model, place: str, scale: float, activation):
    """Logits of the tiny Llama with the adapters written out layer by layer, from the networks' weights."""
    import torch

    inner = model.model
    ids = torch.arange(5, 45)[None]

    def network(a, x):
        return scale * (activation(x @ a.down.weight.T + a.down.bias) @ a.up.weight.T + a.up.bias)

    with torch.no_grad():
        x = inner.embed_tokens(ids)
        rope = inner.rotary_emb(x, position_ids=torch.arange(40)[None])
        mask = torch.full((40, 40), float("-inf")).triu(1)[None, None]
        for layer in inner.layers:
            attention, mlp = layer.self_attn, layer.mlp
            own = {m: m.__dict__["_forward_hooks"].copy() for m in (attention, mlp)}
            for m in own:
                m._forward_hooks.clear()
            h, _ = attention(hidden_states=layer.input_layernorm(x), position_embeddings=rope, attention_mask=mask)
            x = x + (h + network(attention.adapter, h) if place == "sequential" else h)
            u = layer.post_attention_layernorm(x)
            f = mlp(u)
            x = x + f + network(mlp.adapter, f if place == "sequential" else u)
            for m, hooks in own.items():
                m._forward_hooks.update(hooks)
        return model.lm_head(inner.norm(x))


def test_bottlenecks_sit_before_the_residual_addition_and_parallel_ones_read_the_norm(model):
    import torch
    from torch.nn import functional

    run = small_run(model, adapt={"bottleneck": {"size": SIZE}})
    fill(run.model)
    sequential = logits(run.model)
    torch.testing.assert_close(sequential, hand(run.model, "sequential", 1.0, functional.gelu), rtol=1e-4, atol=1e-5)
    beside = small_run(model, adapt={"parallel": {"size": SIZE, "scale": 3.0}})
    fill(beside.model)
    torch.testing.assert_close(logits(beside.model), hand(beside.model, "parallel", 3.0, functional.relu), rtol=1e-4, atol=1e-5)
    assert (logits(beside.model) - sequential).abs().max() > 1e-2


def test_the_start_is_the_base_or_near_it_by_the_square_of_the_spread(model):
    base = logits(small_run(model).load_base())
    moved = {}
    for std in (1e-3, 1e-2, 1e-1):
        moved[std] = float((logits(small_run(model, adapt={"bottleneck": {"std": std}}).model) - base).abs().max())
    assert 0 < moved[1e-3] < 1e-5
    assert 50 < moved[1e-1] / moved[1e-2] < 200, "a hundred times for ten times the spread"
    run = small_run(model, adapt={"bottleneck": {"init": "zero_up", "std": 0.1}})
    assert (logits(run.model) - base).abs().max() < 1e-6
    assert (logits(small_run(model, adapt={"parallel": {"size": SIZE}}).model) - base).abs().max() < 1e-6
    off = small_run(model, adapt={"parallel": {"size": SIZE, "scale": 0.0}})
    fill(off.model)
    assert logits(off.model).equal(base), "s = 0 adds nothing"


def test_what_trains_is_counted_and_the_base_stays_and_comes_back_to_the_bit(model):
    import torch

    run = small_run(model, adapt={"bottleneck": {"size": SIZE}})
    base = run.load_base()
    assert sum(p.numel() for p in run.trainable().values()) == 2 * LAYERS * NETWORK + NORMS
    start = {n: p.detach().clone() for n, p in run.trainable().items()}
    steps(run, examples(), 3)
    assert all(not p.equal(start[n]) for n, p in run.trainable().items()), "every network and every norm moves"
    theirs = dict(base.named_parameters())
    frozen = {n.replace(".base.weight", ".weight"): p for n, p in run.model.named_parameters() if not p.requires_grad}
    assert set(frozen) <= set(theirs) and all(p.equal(theirs[n]) for n, p in frozen.items())
    wanted = logits(base)
    assert not logits(run.model).equal(wanted)
    with run.adapt.without(run.model):
        assert logits(run.model).equal(wanted)
    without_norms = small_run(model, adapt={"bottleneck": {"size": SIZE, "norms": False}})
    assert sum(p.numel() for p in without_norms.trainable().values()) == 2 * LAYERS * NETWORK
    decay = [g.get("weight_decay") for g in run.adapt.groups(run.model)]
    assert decay == [None, 0.0] and all(p.dim() == 1 for p in run.adapt.groups(run.model)[1]["params"])
    assert torch.is_tensor(wanted)


def test_tasks_do_not_touch_each_other_because_each_keeps_its_norms(model, tmp_path):
    first, second = (small_run(model, adapt={"bottleneck": {"size": SIZE}}) for _ in range(2))
    steps(first, examples(seed=1), 3)
    first.adapt.save(first.model, first.engine.state(), tmp_path)
    wanted = logits(first.adapt.load(first.load_base(), tmp_path))
    steps(second, examples(seed=2), 3)
    assert logits(first.adapt.load(second.load_base(), tmp_path)).equal(wanted)
    with second.adapt.without(second.model):
        assert logits(second.model).equal(logits(second.load_base()))
    assert (logits(second.model) - wanted).abs().max() > 1e-4


def test_the_gradient_of_the_upper_weight_grows_with_the_scale(model):
    def gradient(scale: float):
        run = small_run(model, adapt={"parallel": {"size": SIZE, "scale": scale}}, clip=0.0)
        kept = {}
        object.__setattr__(run.adapt, "on_gradients", lambda r: kept.update({n: r.engine.gradient(n) for n in r.engine.names if "up.weight" in n}))
        steps(run, examples(), 1)
        return kept

    import torch

    one, four = gradient(1.0), gradient(4.0)
    assert len(one) == LAYERS
    for name in one:
        assert one[name].any()
        torch.testing.assert_close(four[name], 4 * one[name], rtol=1e-4, atol=1e-8)


MAM = {"mam": {"size": SIZE, "prefix": 4, "prefix_network": 16, "scale": 2.0}}


def test_mam_trains_prefix_and_parallel_networks_and_folds_the_prefix(model, tmp_path):
    import torch
    from safetensors.torch import load_file

    run = small_run(model, adapt=MAM)
    base = logits(run.load_base())
    assert (logits(run.model) - base).abs().max() > 1e-3, "a prefix takes a share of the attention, so the start is elsewhere"
    names = set(run.trainable())
    assert all(".adapter." in n or n.startswith("prompt_encoder.") for n in names)
    assert sum(p.numel() for n, p in run.trainable().items() if ".adapter." in n) == LAYERS * NETWORK
    found = steps(run, examples(8), 6)
    assert found[-1]["loss"] < found[0]["loss"]
    with run.adapt.without(run.model):
        assert logits(run.model).equal(base)
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert sum(v.numel() for n, v in saved.items() if n.startswith("prefix.")) == 2 * LAYERS * 4 * 2 * 8, "2 x layers x length x key heads x head size"
    loaded = run.adapt.load(run.load_base(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(run.model), rtol=0, atol=1e-6)
    assert (logits(loaded) - base).abs().max() > 1e-3
    with pytest.raises(ConfigError, match="cannot be merged"):
        run.adapt.merge(loaded)
    assert not type(run.adapt).packs


def test_a_prefix_is_attention_with_a_gate(model):
    """What the first layer's attention gives with the prefix is (1 - w) Attn(x) + w softmax(q P_k') P_v, w the prefix's share of the exponentials."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

    run = small_run(model, adapt=MAM)
    seen = {}
    attention = run.model.base_model.model.layers[0].self_attn
    handle = attention.register_forward_hook(
        lambda m, a, k, out: seen.update(x=k["hidden_states"], rope=k["position_embeddings"], out=out[0]), with_kwargs=True)
    logits(run.model)
    handle.remove()
    keys, values = run.model.get_prompt(1).layers[0].keys, run.model.get_prompt(1).layers[0].values
    with torch.no_grad():
        q, k, v = (p(seen["x"]).view(1, 40, -1, 8).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *seen["rope"])
        own = (q @ repeat_kv(k, 2).mT) * attention.scaling + torch.full((40, 40), float("-inf")).triu(1)
        prefix = (q @ repeat_kv(keys, 2).mT) * attention.scaling
        w = prefix.exp().sum(-1) / (prefix.exp().sum(-1) + own.exp().sum(-1))
        mixed = (1 - w)[..., None] * (own.softmax(-1) @ repeat_kv(v, 2)) + w[..., None] * (prefix.softmax(-1) @ repeat_kv(values, 2))
        torch.testing.assert_close(attention.o_proj(mixed.transpose(1, 2).reshape(1, 40, -1)), seen["out"], rtol=1e-4, atol=1e-5)
    assert 0.02 < float(w.mean()) < 0.98


def test_answers_are_the_same_with_and_without_the_cache(model, tmp_path):
    """Greedy answers token by token with a cache are those of whole forward passes, for each of the three."""
    import torch

    for n, adapt in enumerate(({"bottleneck": {"size": SIZE, "std": 0.2}}, {"parallel": {"size": SIZE}}, MAM)):
        run = small_run(model, adapt=adapt)
        steps(run, examples(8), 2, rate=5e-2)
        folder = tmp_path / str(n)
        folder.mkdir()
        run.adapt.save(run.model, run.engine.state(), folder)
        loaded = run.adapt.load(run.load_base(), folder)
        ids = torch.arange(5, 15)[None]
        with torch.no_grad():
            answer = loaded.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None)
            whole = ids
            for _ in range(6):
                whole = torch.cat([whole, loaded(input_ids=whole, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert answer.tolist() == whole.tolist()


def small(kind: str, folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, BloomConfig, GPT2Config, GPTNeoXConfig, OPTConfig, Qwen2Config

    made = {"gpt2": GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64),
            "gpt_neox": GPTNeoXConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, intermediate_size=64, vocab_size=64),
            "qwen2": Qwen2Config(num_hidden_layers=2, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, vocab_size=64),
            "bloom": BloomConfig(n_layer=2, hidden_size=32, n_head=4, vocab_size=64),
            "opt": OPTConfig(num_hidden_layers=2, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_attention_heads=4, vocab_size=64)}[kind]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(made).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neox", "qwen2"])
def test_other_decoders_are_found_by_their_structure(kind, tmp_path, model):
    run = small_run(model)
    for name in ("bottleneck", "parallel"):
        base = small(kind, tmp_path)
        wanted = logits(base)
        method = slots.parse("train/adapt", {name: {"size": SIZE}})
        prepared = method.prepare(base, run)
        assert len(blocks(prepared)) == 2 and (logits(prepared) - wanted).abs().max() < 1e-4
        fill(prepared)
        assert (logits(prepared) - wanted).abs().max() > 1e-2
        with method.without(prepared):
            assert logits(prepared).equal(wanted)


def test_a_model_that_does_not_fit_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ConfigError, match="BloomAttention adds the residual itself"):
        blocks(small("bloom", tmp_path))
    with pytest.raises(ConfigError, match="layer 0 \\(OPTDecoderLayer\\) has 0 feed-forward modules among"):
        blocks(small("opt", tmp_path))

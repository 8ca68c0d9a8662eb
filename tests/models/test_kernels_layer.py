"""A whole decoder layer as one function: the model computes what it computed before, and where it would not the layer's own forward pass is used."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

torch = pytest.importorskip("torch")

from ftpipe.models import kernels  # noqa: E402
from ftpipe.models.kernels import layer  # noqa: E402


@pytest.fixture
def pair(tiny_model):
    """The tiny model with a LoRA that is not zero, twice: as PEFT made it and with the kernels."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    made = []
    for with_kernels in (False, True):
        torch.manual_seed(3)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), LoraConfig(r=4, target_modules="all-linear"))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.05)
        if with_kernels:
            found = kernels.install(model)
            layers = model.config.num_hidden_layers
            assert found == {"attention": 1, "swiglu": layers, "lora": 7 * layers, "rms_norm": 2 * layers + 1, "layer": layers}
        made.append(model.train())
    return made


def run(model, **more):
    ids = torch.arange(3, 43)[None]
    model.zero_grad()
    out = model(input_ids=ids, use_cache=False, **more).logits
    out.square().mean().backward(retain_graph=True)
    out.square().mean().backward()  # what is kept for the backward pass is left as it was
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_a_model_with_kernels_gives_the_same_logits_and_gradients(pair):
    packed = torch.cat([torch.arange(n) for n in (20, 13, 7)])[None]
    for more in ({"position_ids": packed}, {}, {"attention_mask": torch.ones(1, 40, dtype=torch.long)}):
        (a, ga), (b, gb) = run(pair[0], **more), run(pair[1], **more)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert ga.keys() == gb.keys()
        for n in ga:
            torch.testing.assert_close(ga[n], gb[n], rtol=1e-3, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


def served(model, monkeypatch):
    """How many layers the whole-layer function computes in one pass of the model."""
    calls = []
    with monkeypatch.context() as patched:
        original = layer.DecoderLayer.apply
        patched.setattr(layer.DecoderLayer, "apply", lambda *args: calls.append(1) or original(*args))
        model(input_ids=torch.arange(3, 23)[None], use_cache=False)
    return len(calls)


def first_layer(model):
    return model.get_base_model().model.layers[0]


@pytest.mark.parametrize("change", ["hook", "weights", "unfrozen norm", "unfrozen weight", "dropout", "adapter off", "other forward"])
def test_one_layer_steps_back_and_the_others_do_not(pair, change, monkeypatch):
    """What happens to a layer after the kernels are in: the result is that of the stock model with the same change."""
    outs = []
    for number, model in enumerate(pair):
        one, heard, lora = first_layer(model), [], "default"
        layers = model.config.num_hidden_layers
        if number:
            assert served(model, monkeypatch) == layers
        if change == "hook":
            one.mlp.up_proj.register_forward_hook(lambda m, a, out, heard=heard: heard.append(1) or out * 2)
        elif change == "weights":
            one.self_attn.k_proj.base_layer.weight.data = one.self_attn.k_proj.base_layer.weight.data * 3
        elif change == "unfrozen norm":
            one.input_layernorm.weight.requires_grad_()
        elif change == "unfrozen weight":
            one.mlp.down_proj.base_layer.weight.requires_grad_()
        elif change == "dropout":
            one.self_attn.o_proj.lora_dropout[lora] = torch.nn.Dropout(0.5)
        elif change == "adapter off":
            one.mlp.gate_proj.enable_adapters(False)
        elif change == "other forward":
            one.self_attn.forward = lambda *args, inner=one.self_attn.forward, **kwargs: (inner(*args, **kwargs)[0] * 0, None)
        torch.manual_seed(5)
        outs.append(run(model))
        assert change != "hook" or heard
        if number:
            assert served(model, monkeypatch) == layers - 1
    (a, ga), (b, gb) = outs
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ga.keys() == gb.keys()
    for n in ga:
        torch.testing.assert_close(ga[n], gb[n], rtol=1e-3, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


def test_joined_weights_are_those_of_the_layers(pair):
    """Weights changed in place are seen by the joined product, and a file of the model holds each of them once."""
    stock, own = pair
    for model in pair:
        with torch.no_grad():
            first_layer(model).self_attn.v_proj.base_layer.weight.mul_(-2)
            first_layer(model).mlp.gate_proj.base_layer.weight.add_(0.1)
    torch.testing.assert_close(run(stock)[0], run(own)[0], rtol=1e-4, atol=1e-5)
    for (n, a), (m, b) in zip(stock.state_dict().items(), own.state_dict().items(), strict=True):
        assert n == m and torch.equal(a, b)


def test_adapters_of_some_layers_of_different_ranks_and_of_halves_that_do_not_train(tiny_model, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    outs = []
    for with_kernels in (False, True):
        torch.manual_seed(3)
        config = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern={"v_proj": 7}, use_rslora=True)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.data.normal_(0, 0.05)
            if "up_proj.lora_A" in name:
                p.requires_grad_(False)
        if with_kernels:
            kernels.install(model)
            assert served(model, monkeypatch) == model.config.num_hidden_layers
        outs.append(run(model.train()))
    (a, ga), (b, gb) = outs
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert ga.keys() == gb.keys() and not any("up_proj.lora_A" in n for n in ga)
    for n in ga:
        torch.testing.assert_close(ga[n], gb[n], rtol=1e-3, atol=1e-7, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("family, served_layers", [("Qwen2", 2), ("Mistral", 2), ("Qwen3", 0), ("Granite", 0), ("Olmo2", 0), ("Cohere", 0), ("SmolLM3", 1)])
def test_layers_of_other_models(family, served_layers):
    """Biases of queries, keys and values are part of it; norms of queries, scaled residuals, norms elsewhere and layers without positions are not."""
    import transformers

    more = {"Granite": {"residual_multiplier": 0.2}, "SmolLM3": {"no_rope_layers": [1, 0], "pad_token_id": 0}}.get(family, {})
    config = getattr(transformers, f"{family}Config")(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                                                      num_key_value_heads=2, head_dim=8, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        p.normal_(0, 0.3) if "bias" in name else p.mul_(3)
    model.set_attn_implementation("sdpa")
    call = {"input_ids": torch.arange(1, 31)[None], "position_ids": torch.cat([torch.arange(18), torch.arange(12)])[None], "use_cache": False}
    stock = model(**call).logits
    assert kernels.install(model)["layer"] == served_layers
    torch.testing.assert_close(model(**call).logits, stock, rtol=1e-4, atol=1e-4)


def test_weights_stay_where_they_are_if_the_layer_function_cannot_be_used(tiny_model):
    from transformers import AutoModelForCausalLM

    for change in ("attention", "training"):
        model = AutoModelForCausalLM.from_pretrained(tiny_model).requires_grad_(change == "training")
        if change == "attention":
            model.set_attn_implementation("eager")
        before = [p.data_ptr() for p in model.parameters()]
        assert kernels.install(model)["layer"] == 0
        assert [p.data_ptr() for p in model.parameters()] == before


def test_a_window_shorter_than_a_sequence_is_left_to_the_layer(monkeypatch):
    import transformers

    config = transformers.MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        sliding_window=6)
    model = transformers.MistralForCausalLM(config).requires_grad_(False).eval()
    ids = torch.arange(3, 23)[None]
    stock = model(input_ids=ids, use_cache=False).logits
    kernels.install(model)
    assert served(model, monkeypatch) == 0
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, stock, rtol=1e-4, atol=1e-4)


def test_bfloat16_layers_are_as_near_to_exact_as_stock_ones(tiny_model):
    from transformers import AutoModelForCausalLM

    exact = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).requires_grad_(False)
    ids = torch.arange(3, 43)[None]
    wanted = exact(input_ids=ids, use_cache=False).logits
    away = []
    for with_kernels in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).requires_grad_(False)
        if with_kernels:
            assert kernels.install(model)["layer"] == model.config.num_hidden_layers
        away.append((model(input_ids=ids, use_cache=False).logits.float() - wanted).norm())
    assert away[1] < 1.3 * away[0]


def test_kernels_step_back_where_they_do_not_apply(pair):
    """Adapter off, padded batches, generation with a cache, dropout, a second adapter: the stock model's own results."""
    from peft import LoraConfig

    stock, own = (m.eval() for m in pair)
    ids = torch.arange(3, 23)[None]
    with torch.no_grad(), stock.disable_adapter(), own.disable_adapter():
        torch.testing.assert_close(stock(input_ids=ids).logits, own(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    padded, mask = torch.cat([ids, ids]), torch.ones(2, 20, dtype=torch.long)
    mask[0, :6] = 0
    with torch.no_grad():
        a, b = (m(input_ids=padded, attention_mask=mask).logits[mask.bool()] for m in (stock, own))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert stock.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist() == own.generate(input_ids=ids, max_new_tokens=8, do_sample=False).tolist()
    for m in (stock, own):
        torch.manual_seed(9)
        m.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5))
        m.set_adapter("second")
        m.train()
    torch.manual_seed(1)
    a = stock(input_ids=ids, use_cache=False).logits
    torch.manual_seed(1)
    torch.testing.assert_close(a, own(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)


def test_what_a_layer_consists_of_is_found_once_while_nothing_changes(pair, monkeypatch):
    """And anew afterwards: an optimizer changes the adapters in place."""
    model, joined = pair[1], []
    original = layer.Joined.pair
    monkeypatch.setattr(layer.Joined, "pair", lambda self, adapters: joined.append(1) or original(self, adapters))
    with torch.no_grad(), layer.unchanging():
        first = model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits
        assert len(joined) == 4 * model.config.num_hidden_layers
        model(input_ids=torch.arange(3, 43)[None], use_cache=False)
        assert torch.equal(model(input_ids=torch.arange(3, 23)[None], use_cache=False).logits, first)
        assert len(joined) == 4 * model.config.num_hidden_layers
    for one in pair:
        first_layer(one).mlp.up_proj.lora_B["default"].weight.data *= 3
    for context in (layer.unchanging(), nullcontext()):
        with context:
            (a, ga), (b, gb) = run(pair[0]), run(model)
        assert not torch.allclose(b[:, :20], first, rtol=1e-3)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        assert all(torch.allclose(ga[n], gb[n], rtol=1e-3, atol=1e-6) for n in ga)

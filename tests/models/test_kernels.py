"""The kernels compute what torch, transformers and PEFT compute, forward and backward, and step back where they do not apply."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from ftpipe.models import kernels  # noqa: E402
from ftpipe.models.kernels import attention, layer, swiglu  # noqa: E402
from ftpipe.models.kernels.attention import PackedAttention  # noqa: E402
from ftpipe.models.kernels.cross_entropy import FrozenHeadLoss  # noqa: E402
from ftpipe.models.kernels.lora import LoraLinear  # noqa: E402

double = {"dtype": torch.float64}


def mask_of(lengths):
    number = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (number[:, None] == number[None]) & torch.ones(sum(lengths), sum(lengths)).tril().bool()


@pytest.mark.parametrize("lengths", [[1], [5, 3, 1], [300, 17, 600], [256, 257], [60, 60, 9, 100, 28, 1]])
@pytest.mark.parametrize("heads, keys", [(4, 4), (9, 3), (4, 1)])
def test_packed_attention_is_attention_under_the_block_mask(lengths, heads, keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(h, sum(lengths), 8, **double, requires_grad=True) for h in (heads, keys, keys))
    up = torch.randn(heads, sum(lengths), 8, **double)
    own = PackedAttention.apply(q, k, v, tuple(lengths), 0.3)
    wide = [t[None].repeat_interleave(heads // keys, 1) for t in (k, v)]
    reference = torch.nn.functional.scaled_dot_product_attention(q[None], *wide, attn_mask=mask_of(lengths), scale=0.3)[0]
    torch.testing.assert_close(own, reference)
    for a, b in zip(torch.autograd.grad(own, (q, k, v), up), torch.autograd.grad(reference, (q, k, v), up)):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # several blocks of one sequence add up in float32


def test_memory_of_long_sequences_grows_with_the_tokens():
    kept = []
    q, k, v = (torch.randn(2, 2000, 4, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        PackedAttention.apply(q, k, v, (2000,), 1.0)
    assert sum(kept) <= 3 * q.numel()


@pytest.mark.parametrize("bias", [False, True])
def test_loss_against_a_frozen_head(bias, monkeypatch):
    from ftpipe.models.kernels import cross_entropy

    monkeypatch.setattr(cross_entropy, "PRODUCT", 7 * 50)
    monkeypatch.setattr(cross_entropy, "SOFTMAX", 3 * 50)
    torch.manual_seed(0)
    h, w = torch.randn(23, 6, requires_grad=True), torch.randn(50, 6) * 3
    b = torch.randn(50) if bias else None
    targets, weights = torch.randint(0, 50, (23,)), torch.randn(23)
    own = FrozenHeadLoss.apply(h, w, b, targets)
    reference = torch.nn.functional.cross_entropy(torch.nn.functional.linear(h, w, b), targets, reduction="none")
    torch.testing.assert_close(own, reference)
    for f in (lambda x: (x * weights).sum(), lambda x: torch.nn.functional.logsigmoid(x.sum()), lambda x: (torch.exp(-x) * x).sum()):
        torch.testing.assert_close(torch.autograd.grad(f(own), h, retain_graph=True), torch.autograd.grad(f(reference), h, retain_graph=True))


def test_short_sequences_share_products_and_see_nothing_of_each_other():
    torch.manual_seed(0)
    lengths = (20,) * 16
    q, k, v = (torch.randn(2, 320, 4) for _ in range(3))
    shapes = set()
    product = torch.bmm

    def seen(a, b, **more):
        shapes.add(a.shape)
        return product(a, b, **more)

    attention.torch.bmm = seen
    try:
        before = PackedAttention.apply(q, k, v, lengths, 1.0)
    finally:
        attention.torch.bmm = product
    assert {s[-1] for s in shapes} == {120, 80}  # six, six and four
    for t in (q, k, v):
        t[:, 20:40] = 1e30
    after = PackedAttention.apply(q, k, v, lengths, 1.0)
    assert torch.equal(before[:, :20], after[:, :20]) and torch.equal(before[:, 40:], after[:, 40:])


def test_loss_of_logits_that_overflow_a_float_is_finite():
    h = torch.tensor([[300.0]], requires_grad=True)
    w = torch.tensor([[1.0], [-1.0]])
    losses = FrozenHeadLoss.apply(h, w, None, torch.tensor([1]))
    assert losses.item() == 600
    losses.sum().backward()
    assert h.grad.item() == 2


@pytest.mark.parametrize("bias", [False, True])
def test_lora_layer(bias):
    torch.manual_seed(0)
    x, a, b = (torch.randn(*s, **double, requires_grad=True) for s in ((2, 5, 6), (3, 6), (7, 3)))
    w, c = torch.randn(7, 6, **double), torch.randn(7, **double) if bias else None
    up = torch.randn(2, 5, 7, **double)
    own = LoraLinear.apply(x, w, c, a, b, 1.7)
    reference = torch.nn.functional.linear(x, w, c) + 1.7 * (x @ a.t() @ b.t())
    torch.testing.assert_close(own, reference)
    for one, two in zip(torch.autograd.grad(own, (x, a, b), up), torch.autograd.grad(reference, (x, a, b), up)):
        torch.testing.assert_close(one, two)


def test_rms_norm():
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    from ftpipe.models.kernels import rms_norm

    torch.manual_seed(0)
    norm = LlamaRMSNorm(6, eps=1e-3).requires_grad_(False)
    norm.weight.copy_(torch.randn(6))
    x, up = torch.randn(2, 5, 6, requires_grad=True), torch.randn(2, 5, 6)
    reference = norm(x)
    wanted = torch.autograd.grad(reference, x, up)
    assert rms_norm.install(norm) == 1
    own = norm(x)
    assert torch.equal(own, reference)
    for _ in range(2):  # what is kept for the backward pass is left as it was
        torch.testing.assert_close(torch.autograd.grad(own, x, up, retain_graph=True), wanted)
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad.abs().min() > 0  # trained weights: transformers' own
    other = GemmaRMSNorm(6).requires_grad_(False)
    other.weight.copy_(torch.randn(6))
    assert rms_norm.install(other) == 0


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


def test_a_layer_that_computes_something_else_is_left_alone():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (torch.nn.Linear(3, 3) for _ in range(3))
            self.act_fn = torch.nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))

    class Gelu(Other):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))

    gelu = Gelu()
    gelu.act_fn = torch.nn.GELU()
    assert swiglu.install(Other()) == 0 and swiglu.install(gelu) == 0 and swiglu.install(Gelu()) == 1


@pytest.mark.parametrize("what", [{"sliding_window": 4}, {"softcap": 30.0}, {"s_aux": torch.zeros(2)}, {"is_causal": False}])
def test_attention_of_another_kind_is_left_to_torch(what):
    module = torch.nn.Module()
    q = torch.randn(1, 2, 6, 4)
    assert attention._lengths(module, q, q, q, 0.0, torch.arange(6)[None], {}) == (6,)
    assert attention._lengths(module, q, q, q, 0.0, torch.arange(6)[None], what) is None
    assert attention._lengths(module, q, q, q, 0.1, torch.arange(6)[None], {}) is None
    assert attention._lengths(module, q[:, :, :1], q, q, 0.0, torch.tensor([[5]]), {}) is None


def test_what_acts_outside_of_the_backbone_is_not_passed_by(tiny_model):
    """A method that is without effect at the start cannot be found by its numbers, so its hooks are looked for."""
    from transformers import AutoModelForCausalLM

    from ftpipe.models.head import split

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert split(model) is not None
    other = AutoModelForCausalLM.from_pretrained(tiny_model)
    other.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    assert split(other) is None

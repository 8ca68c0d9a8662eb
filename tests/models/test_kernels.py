"""The kernels compute what torch, transformers and PEFT compute, forward and backward, and step back where they do not apply."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from ftpipe.models.kernels import attention, swiglu  # noqa: E402
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

    torch.bmm = seen
    try:
        before = PackedAttention.apply(q, k, v, lengths, 1.0)
    finally:
        torch.bmm = product
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
    torch.testing.assert_close(own, reference)
    for _ in range(2):  # what is kept for the backward pass is left as it was
        torch.testing.assert_close(torch.autograd.grad(own, x, up, retain_graph=True), wanted)
    norm.weight.requires_grad_()
    norm(x).sum().backward()
    assert norm.weight.grad.abs().min() > 0  # trained weights: transformers' own
    other = GemmaRMSNorm(6).requires_grad_(False)
    other.weight.copy_(torch.randn(6))
    assert rms_norm.install(other) == 0


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

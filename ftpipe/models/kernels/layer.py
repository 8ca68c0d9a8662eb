"""A whole decoder layer as one differentiable function: norm, attention, norm and gated feed-forward layer with frozen weights, each linear layer
perhaps with a LoRA.

Some 400 small operations of a layer become 150, or 25 calls of compiled functions. The layers that read the same input (queries, keys and values; gate and
up) are one matrix product, with one pair of thin products for the LoRA of all of them, and tensors that are cheap to compute again are not kept for the
backward pass. It serves the layers of Llama, Mistral, Qwen 2, SmolLM and those built like them; `install` finds them by what they consist of and compares
what they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ftpipe.models.kernels import attention, lora, native, rms_norm, swiglu

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
ALIKE = 0.03
"""Share of what a layer adds to its input by which this function may miss it on a sample, above the rounding of both."""


class Joined(NamedTuple):
    """Linear layers that read the same input: weight [sum of outs, in], bias, the size of each and the LoRA of those that have one."""

    weight: Tensor
    bias: Tensor | None
    blocks: lora.Blocks
    loras: tuple[lora.Adapted, ...]

    def pair(self, adapters: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
        """A [sum of r, in] and B [sum of outs, sum of r] of all LoRA, in the type of the weight: each layer's B in a block of its own, times its scale."""
        if not adapters:
            return None, None
        a = torch.cat([t.to(self.weight.dtype) for t in adapters[::2]])
        b = a.new_zeros(len(self.weight), len(a))
        for (rows, columns, scaling), t in zip(self.places(), adapters[1::2], strict=True):
            b[rows, columns] = t * scaling
        return a, b

    def parted(self, da: Tensor | None, db: Tensor | None, adapters: Sequence[tuple[torch.dtype, bool]]) -> list[Tensor | None]:
        """The gradients of single adapters from those of the pair: of each its type and whether it is wanted."""
        if da is None:
            return []
        found: list[Tensor | None] = []
        for (rows, columns, scaling), (a, b) in zip(self.places(), zip(adapters[::2], adapters[1::2]), strict=True):
            found += [da[columns].to(a[0]) if a[1] else None, db[rows, columns].to(b[0]) * scaling if b[1] else None]
        return found

    def places(self) -> list[tuple[slice, slice, float]]:
        """Of each LoRA: rows of B, columns of B (rows of A), and its scale."""
        found, row, column = [], 0, 0
        for out, rank, part in zip(*self.blocks, self.loras, strict=True):
            if part.a is not None:
                found.append((slice(row, row + out), slice(column, column + rank), part.scaling))
            row, column = row + out, column + rank
        return found


class Plan(NamedTuple):
    """What a layer consists of at a call. groups: queries, keys and values; output; gate and up; down. heads: of queries, keys and values."""

    norms: tuple[tuple[Tensor, float], tuple[Tensor, float]]
    groups: tuple[Joined, Joined, Joined, Joined]
    heads: tuple[int, int, int]
    scale: float
    lengths: tuple[int, ...]
    pairs: tuple[tuple[Tensor | None, Tensor | None], ...] | None = None
    """A and B of each group, where they are known already."""

    def adapters(self) -> list[Tensor]:
        """A and B of every LoRA, in the order in which the function takes them."""
        return [t.weight for g in self.groups for p in g.loras if p.a is not None for t in (p.a, p.b)]

    def paired(self, adapters: Sequence[Tensor]) -> tuple[tuple[Tensor | None, Tensor | None], ...]:
        """A and B of each group."""
        return tuple(g.pair(a) for g, a in zip(self.groups, self.split(adapters), strict=True))

    def split(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        """One value for each adapter, by group."""
        found, at = [], 0
        for group in self.groups:
            count = 2 * sum(p.a is not None for p in group.loras)
            found.append(values[at:at + count])
            at += count
        return found


class DecoderLayer(torch.autograd.Function):
    """x + attention(norm(x)), and to that its feed-forward layer: x [T, hidden]; cos and sin [T, d] of the rotary positions; T is the sum of `plan.lengths`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, plan: Plan, *adapters: Tensor) -> Tensor:
        qkv, output, gate_up, down = plan.groups
        pairs = plan.pairs or plan.paired(adapters)
        tokens = len(x)
        h, scale = rms_norm.norm(x, *plan.norms[0])
        joined, low_qkv = lora.project(h, qkv.weight, qkv.bias, *pairs[0], qkv.blocks)
        attended, kept = attention.packed(joined.view(tokens, sum(plan.heads), -1), plan.lengths, plan.heads, (cos, sin, sum(plan.heads[:2])), plan.scale,
                                          keep=any(ctx.needs_input_grad))
        middle, low_output = lora.project(attended, output.weight, output.bias, *pairs[1], output.blocks, more=x)
        h2, scale2 = rms_norm.norm(middle, *plan.norms[1])
        gated, low_gate_up = lora.project(h2, gate_up.weight, gate_up.bias, *pairs[2], gate_up.blocks)
        result, low_down = lora.project(swiglu.gate(gated), down.weight, down.bias, *pairs[3], down.blocks, more=middle)
        ctx.save_for_backward(x, cos, sin, scale, attended, middle, scale2, gated, low_qkv, low_output, low_gate_up, low_down,
                              *(t for pair in pairs for t in pair), *kept)
        ctx.plan, ctx.types = plan, [a.dtype for a in adapters]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        (x, cos, sin, scale, attended, middle, scale2, gated, low_qkv, low_output, low_gate_up, low_down, *pairs) = ctx.saved_tensors
        kept = pairs[8:]
        qkv, output, gate_up, down = plan.groups
        wanted = ctx.needs_input_grad[0]

        grad = grad.contiguous()
        d, back = lora.input_backward(grad, down.weight, *pairs[6:8], blocks=down.blocks)
        d_gated, product = swiglu.gate_backward(gated, d)
        da_down, db_down = lora.pair_backward(grad, back, product, low_down, down.blocks)
        h = rms_norm.scaled(middle, plan.norms[1][0], scale2)
        d, da_gate_up, db_gate_up = lora.project_backward(d_gated, h, low_gate_up, gate_up.weight, *pairs[4:6], blocks=gate_up.blocks)
        d_middle = rms_norm.norm_backward(d, middle, plan.norms[1][0], scale2, grad)

        d, da_output, db_output = lora.project_backward(d_middle, attended, low_output, output.weight, *pairs[2:4], blocks=output.blocks)
        d_heads = attention.packed_backward(d, kept, plan.lengths, plan.heads, (cos, sin, sum(plan.heads[:2])), plan.scale)
        h = rms_norm.scaled(x, plan.norms[0][0], scale)
        d, da_qkv, db_qkv = lora.project_backward(d_heads, h, low_qkv, qkv.weight, *pairs[0:2], wanted, qkv.blocks)
        dx = rms_norm.norm_backward(d, x, plan.norms[0][0], scale, d_middle) if wanted else None

        about = plan.split(list(zip(ctx.types, ctx.needs_input_grad[4:], strict=True)))
        found = ((da_qkv, db_qkv), (da_output, db_output), (da_gate_up, db_gate_up), (da_down, db_down))
        return dx, None, None, None, *(g for group, pair, a in zip(plan.groups, found, about, strict=True) for g in group.parted(*pair, a))


_found: dict[Forward, Plan] | None = None


@contextmanager
def unchanging() -> Iterator[None]:
    """Nothing that decides what a layer computes changes meanwhile, all calls are of one kind (packed rows of one type), in any number of threads: what
    consists of what, and the joined adapters, are found at a layer's first call only."""
    global _found
    before, _found = _found, {}
    try:
        yield
    finally:
        _found = before


def install(model: nn.Module) -> int:
    """Use it in every layer that consists of exactly this, with the other kernels in it, and computes the same on a sample; returns how many.

    The weights of layers that are joined then lie in one tensor, of which each layer holds its part.
    """
    found, joined = 0, set()
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != attention.NAME:
        return 0  # on a GPU, or with attention of another kind, it would never be used, and weights are not moved for nothing
    for module in model.modules():
        if _consists_of_this(module):
            forward = Forward(module)
            if forward.is_it(module):
                module.forward = MethodType(forward, module)
                found += 1
            joined |= {id(p) for group, j in zip(_groups(module), forward.joined, strict=True) if j for m in group for p in m.parameters()}
    for parameter in model.parameters() if joined else ():
        if id(parameter) not in joined and not parameter.requires_grad:
            parameter.data = parameter.data.clone()  # else the file that all weights were mapped from stays in memory for these
    return found


def serves(model: nn.Module) -> bool:
    """Whether every decoder layer would be computed by this function in the model's present mode, all that trains is in them, and nobody listens elsewhere."""
    forwards = {m: vars(m)["forward"].__func__ for m in model.modules() if isinstance(getattr(vars(m).get("forward"), "__func__", None), Forward)}
    if len(forwards) != model.config.num_hidden_layers or any(_hooked(m) for m in model.modules()):
        return False
    plans = [forward.plan(layer, **_sample(layer)) for layer, forward in forwards.items()]
    held = {id(p) for plan in plans if plan for p in plan.adapters()}
    return all(plans) and all(id(p) in held for p in model.parameters() if p.requires_grad)


def _consists_of_this(module: nn.Module) -> bool:
    if {n for n, _ in module.named_children()} != {"self_attn", "mlp", *NORMS} or list(module.parameters(recurse=False)):
        return False
    attn, mlp = module.self_attn, module.mlp
    return {n for n, _ in attn.named_children()} == set(ATTENTION) and not list(attn.parameters(recurse=False)) and all(hasattr(mlp, n) for n in FEED_FORWARD)


class Forward:
    """The forward pass of one layer: this function where it applies, and the layer's own where it does not."""

    def __init__(self, layer: Any):
        self.joined = [_join([getattr(m, "base_layer", m) for m in modules]) for modules in _groups(layer)]
        self.told: dict[str, Any] = {}
        """What the layer tells its attention beside tensors: the window it sees, and the like."""

    def __call__(self, layer: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = None if args else self.plan(layer, hidden_states, **kwargs)
        if plan is None:
            return type(layer).forward(layer, hidden_states, *args, **kwargs)
        cos, sin = (t[0] for t in kwargs["position_embeddings"])
        with torch.autocast("cpu", enabled=False):
            return DecoderLayer.apply(hidden_states.squeeze(0), cos, sin, plan, *plan.adapters()).unsqueeze(0)

    def plan(self, layer: Any, hidden_states: Tensor, position_ids: Tensor | None = None, past_key_values: Any = None,
             position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any) -> Plan | None:
        """What to compute, None where the layer's own forward pass has to."""
        attn, x = layer.self_attn, hidden_states
        if _found is not None and (known := _found.get(self)):
            lengths = attention.sequences(attn, x.shape[1], position_ids, {**kwargs, **self.told})
            return known._replace(lengths=lengths) if lengths else None
        if (x.dim() != 3 or x.shape[0] != 1 or x.device.type != "cpu" or past_key_values is not None or position_embeddings is None
                or kwargs.get("output_attentions") or attn.config._attn_implementation != attention.NAME
                or (layer.training and attn.attention_dropout) or (torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != x.dtype)):
            return None
        lengths = attention.sequences(attn, x.shape[1], position_ids, {**kwargs, **self.told})
        norms = [getattr(layer, n) for n in NORMS]
        if lengths is None or not (_own(layer.mlp, swiglu) and all(_own(n, rms_norm) and not n.weight.requires_grad for n in norms) and _untouched(attn)):
            return None
        groups = [_joined(modules, joined) for modules, joined in zip(_groups(layer), self.joined, strict=True)]
        size = attn.head_dim
        if (any(g is None for g in groups) or {t.dtype for t in (*(g.weight for g in groups), *(n.weight for n in norms), *position_embeddings)} != {x.dtype}
                or any(t.shape != (1, x.shape[1], size) for t in position_embeddings)):
            return None
        heads = tuple(out // size for out in groups[0].blocks.outs)
        plan = Plan(tuple((n.weight, rms_norm.eps_of(n)) for n in norms), tuple(groups), heads, attn.scaling, lengths)
        if _found is not None:
            with torch.no_grad():
                plan = _found[self] = plan._replace(pairs=plan.paired(plan.adapters()))
        return plan

    def is_it(self, layer: Any) -> bool:
        """Whether the layer itself computes this, seen on two short sequences and on what comes back through them."""
        call = _sample(layer)
        x = call.pop("hidden_states").requires_grad_()
        up = x.detach().flip(1)
        try:
            with torch.enable_grad():
                if self.plan(layer, x, **call) is None:
                    return False
                with attention.overheard() as self.told, native.aside():
                    other = type(layer).forward(layer, x, **call)
                    other_back = torch.autograd.grad(other, x, up)[0]
                own = self(layer, x, **call)
                own_back = torch.autograd.grad(own, x, up)[0]
        except (AttributeError, TypeError, ValueError, RuntimeError):  # it wants something else, or lacks something: another kind of layer
            return False
        return self.told.pop("scaling", None) == layer.self_attn.scaling and _alike(own, other, x) and _alike(own_back, other_back, up)


@torch.no_grad()
def _alike(own: Tensor, other: Tensor, given: Tensor) -> bool:
    """Whether two results that consist of `given` and what was added to it are the same but for rounding."""
    miss, added, norms = ((own.float() - other.float()).norm(), (other.float() - given.float()).norm(), other.float().norm() + given.float().norm())
    return bool(miss <= ALIKE * added * (given.dtype != torch.float32) + 8 * torch.finfo(given.dtype).eps * norms)


def _sample(layer: Any) -> dict[str, Any]:
    """A call of the layer on two short sequences."""
    weight, size = layer.input_layernorm.weight, getattr(layer.self_attn, "head_dim", 0)
    x = torch.linspace(-9, 9, 7 * len(weight), device=weight.device).view(1, 7, -1).mul(77).sin().to(weight.dtype)
    angle = torch.linspace(0, 3, 7 * (size // 2), device=weight.device).view(1, 7, -1).repeat(1, 1, 2)
    return {"hidden_states": x, "attention_mask": None, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
            "position_embeddings": (angle.cos().to(x), angle.sin().to(x))}


def _groups(layer: Any) -> list[list[nn.Module]]:
    """The linear layers, perhaps wrapped by PEFT, by what they read."""
    attn, mlp = layer.self_attn, layer.mlp
    return [[attn.q_proj, attn.k_proj, attn.v_proj], [attn.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]


def _join(bases: list[Any]) -> tuple[Tensor, Tensor | None] | None:
    """Put the weights of plain linear layers into one tensor, biases likewise. None if there is but one, or they are not of one kind."""
    first = bases[0]
    if len(bases) == 1 or any(type(b) is not nn.Linear or b.weight.requires_grad or b.weight.dtype != first.weight.dtype
                              or (b.bias is None) != (first.bias is None) for b in bases):
        return None
    weight = torch.cat([b.weight.detach() for b in bases])
    bias = None if first.bias is None else torch.cat([b.bias.detach() for b in bases])
    sizes = [b.out_features for b in bases]
    for base, part in zip(bases, weight.split(sizes), strict=True):
        base.weight.data = part
    for base, part in zip(bases, bias.split(sizes) if bias is not None else (), strict=False):
        base.bias.data = part
    return weight, bias


def _joined(modules: Sequence[Any], joined: tuple[Tensor, Tensor | None] | None) -> Joined | None:
    """The layers at this call; None if one of them is not what it was, or does more than to multiply."""
    parts = [lora.adapted(m) for m in modules]
    if any(p is None or not all(_untouched(m) for m in (p.base, p.a, p.b) if m is not None) for p in parts) or any(_hooked(m) for m in modules):
        return None
    outs = tuple(p.base.out_features for p in parts)
    blocks = lora.Blocks(outs, tuple(0 if p.a is None else p.a.weight.shape[0] for p in parts))
    if len(parts) == 1:
        return Joined(parts[0].base.weight, parts[0].base.bias, blocks, tuple(parts))
    if joined is None:
        return None
    for whole, ours in zip(joined, ([p.base.weight for p in parts], [p.base.bias for p in parts]), strict=True):
        if whole is not None and any(a.data_ptr() != b.data_ptr() or a.dtype != b.dtype for a, b in zip(whole.split(outs), ours, strict=True)):
            return None  # someone gave a layer other weights
    return Joined(*joined, blocks, tuple(parts))


def _own(module: nn.Module, kernel: Any) -> bool:
    """Whether a module computes by this kernel, and nobody listens."""
    return getattr(vars(module).get("forward"), "__func__", None) is kernel._forward and not _hooked(module)


def _untouched(module: nn.Module) -> bool:
    return "forward" not in vars(module) and not _hooked(module)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)

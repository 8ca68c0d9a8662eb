"""Trained rows or columns beside frozen linear layers, and the reordering of heads and channels that leaves a decoder's function as it is.

A slice is a parameter of its own, the change of the chosen rows (outputs) or columns (inputs) of a weight, zero at the start. The frozen layer runs as it
is; what the slice adds is computed beside it, from the chosen inputs alone. So autograd keeps only those inputs, makes only the slice's gradient, and
the optimizer holds state of the slice's shape: nothing has the size of the weight but the weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ftpipe.errors import ConfigError

if TYPE_CHECKING:
    import torch

ROWS, COLUMNS = "slice_rows", "slice_columns"
"""Names of the slices as parameters of the layers they belong to."""


def attach(layer: torch.nn.Linear, kind: str, numbers: Sequence[int], places: Sequence[int]) -> None:
    """Give a layer a trained slice.

    Args:
        kind: ROWS or COLUMNS. numbers: which rows or columns of the base model's weight. places: where they are in this layer, in the same order.
    """
    import torch
    from torch.nn.functional import linear

    weight = layer.weight
    at = torch.tensor(list(places), dtype=torch.int64, device=weight.device)
    shape = (len(at), weight.shape[1]) if kind == ROWS else (weight.shape[0], len(at))
    layer.register_parameter(kind, torch.nn.Parameter(torch.zeros(shape, device=weight.device)))
    layer.register_buffer("slice_at", at, persistent=False)
    layer.slice_numbers, layer.slice_on = list(numbers), True
    first, last = places[0], places[-1] + 1
    together = list(places) == list(range(first, last))

    def add(module: torch.nn.Module, given: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
        if not module.slice_on:
            return out
        x, change = given[0], getattr(module, kind)
        if kind == COLUMNS:
            # A copy in either case: a view would keep all of x in memory for the backward pass.
            part = x[..., first:last].contiguous() if together else x.index_select(-1, module.slice_at)
            return out + linear(part, change.to(x.dtype))
        return out.index_add(-1, module.slice_at, linear(x, change.to(x.dtype)).to(out.dtype))

    layer.register_forward_hook(add)


@contextmanager
def detached(model: torch.nn.Module) -> Iterator[None]:
    """Without what the slices add."""
    layers = [m for m in model.modules() if hasattr(m, "slice_on")]
    for layer in layers:
        layer.slice_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.slice_on = True


def parts_of(model: torch.nn.Module, block: str, which: str) -> dict[str, torch.nn.Linear]:
    """The linear layers of a layer's `self_attn` (q, k, v, o) or `mlp` (gate, up, down), by their letter or name. Raises ConfigError if it has others."""
    import torch

    parent = getattr(model.get_submodule(block), which, None)
    wanted = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"} if which == "self_attn" else {n: f"{n}_proj" for n in ("gate", "up", "down")}
    found = {short: getattr(parent, name, None) for short, name in wanted.items()}
    if strange := [wanted[short] for short, layer in found.items() if not isinstance(layer, torch.nn.Linear)]:
        raise ConfigError(f"{block}.{which} has no linear layer {strange[0]}: heads and channels are known for architectures like Llama only",
                          remedy="choose another method of train/adapt")
    return found


def head_sizes(model: torch.nn.Module, block: str) -> tuple[int, int, int]:
    """(query heads, key-value heads, width of a head) of a layer's attention."""
    attention = parts_of(model, block, "self_attn")
    heads = model.config.num_attention_heads
    width = attention["q"].out_features // heads
    return heads, attention["k"].out_features // width, width


def order_heads(queries: int, groups: int, first: set[int], first_groups: set[int]) -> tuple[list[int], list[int]]:
    """An order of query heads and one of key-value heads in which the chosen ones come first, as far as the function allows.

    Query heads share a key-value head in groups of `queries / groups`; groups move whole, and query heads only inside their group.
    """
    per = queries // groups
    members = [list(range(g * per, (g + 1) * per)) for g in range(groups)]
    kv = sorted(range(groups), key=lambda g: (g not in first_groups, not first & set(members[g]), g))
    return [q for g in kv for q in sorted(members[g], key=lambda q: (q not in first, q))], kv


def spread(heads: Sequence[int], width: int) -> list[int]:
    """The rows (or columns) of these heads."""
    return [h * width + i for h in heads for i in range(width)]


def reorder(layer: torch.nn.Linear, *, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None) -> None:
    """Put a frozen layer's rows (with their bias) or columns into this order."""
    import torch

    with torch.no_grad():
        if rows is not None:
            at = torch.tensor(rows, device=layer.weight.device)
            layer.weight.copy_(layer.weight[at])
            if layer.bias is not None:
                layer.bias.copy_(layer.bias[at])
        if columns is not None:
            layer.weight.copy_(layer.weight[:, torch.tensor(columns, device=layer.weight.device)])


def permute_channels(model: torch.nn.Module, block: str, first: Sequence[int]) -> list[int]:
    """Bring these feed-forward channels to the front, in the order given; the function is unchanged. Returns the order: the old number at each place."""
    layers = parts_of(model, block, "mlp")
    chosen = set(first)
    order = [*first, *(c for c in range(layers["down"].in_features) if c not in chosen)]
    reorder(layers["gate"], rows=order)
    reorder(layers["up"], rows=order)
    reorder(layers["down"], columns=order)
    return order


def permute_heads(model: torch.nn.Module, block: str, first: set[int], first_groups: set[int]) -> tuple[list[int], list[int]]:
    """Bring these query heads and key-value heads to the front, as `order_heads` can; the function is unchanged. Returns both orders.

    Rotary positions act inside a head, so whole heads may move. Raises ConfigError if the attention has parameters that would have to move along.
    """
    layers = parts_of(model, block, "self_attn")
    queries, groups, width = head_sizes(model, block)
    known = {id(p) for layer in layers.values() for p in layer.parameters()}
    if other := [n for n, p in model.get_submodule(block).self_attn.named_parameters() if id(p) not in known and p.numel() != width]:
        raise ConfigError(f"{block}.self_attn.{other[0]} belongs to single heads, so that they cannot be reordered", remedy="set permute: false")
    q, kv = order_heads(queries, groups, first, first_groups)
    reorder(layers["q"], rows=spread(q, width))
    reorder(layers["k"], rows=spread(kv, width))
    reorder(layers["v"], rows=spread(kv, width))
    reorder(layers["o"], columns=spread(q, width))
    return q, kv

"""An optimizer's state by parameter name, whole: put together from the flat pieces that the ranks hold under ZeRO, and taken apart into them again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ftpipe.train.engine import Engine

OptimizerState = dict[str, dict[str, Any]]
"""By parameter name: its state by torch's names, whole tensors of the parameter's shape, and numbers such as `step`."""


class Piece(NamedTuple):
    """`length` elements of a parameter, from `begin` on in it and from `start` on in the tensor that the optimizer holds."""

    name: str
    start: int
    begin: int
    length: int


class Held(NamedTuple):
    """A tensor that the torch optimizer steps on this rank: what of it lies here, and the names of all whose state it stands for."""

    tensor: torch.Tensor
    pieces: list[Piece]
    names: list[str]


def collected(engine: Engine) -> OptimizerState:
    """The state by parameter, on the CPU; all ranks call this together. Empty before the first step."""
    import torch
    import torch.distributed as dist

    run = engine.run
    found: OptimizerState = {n: {} for n in engine.names}
    for held in _held(engine):
        for key, value in engine.torch_optimizer.state.get(held.tensor, {}).items():
            split = run.zero and torch.is_tensor(value) and value.shape == held.tensor.shape
            for name in held.names:
                if split:
                    found[name][key] = torch.zeros(engine.shape(name), dtype=value.dtype, device=value.device)
                else:
                    found[name][key] = value.detach().clone() if torch.is_tensor(value) else value
            for name, start, begin, length in held.pieces if split else ():
                found[name][key].view(-1)[begin:begin + length] = value[start:start + length]
    if run.zero and run.world > 1:
        for name in engine.names:
            for key, value in found[name].items():
                if torch.is_tensor(value) and tuple(value.shape) == engine.shape(name) and value.dim():
                    whole = value.to(run.device)  # it may be offloaded, and NCCL sums on GPUs alone
                    dist.all_reduce(whole)
                    found[name][key] = whole.cpu()
    return {n: {k: v.cpu() if torch.is_tensor(v) else v for k, v in s.items()} for n, s in found.items() if s}


def put_back(engine: Engine, state: Mapping[str, Mapping[str, Any]]) -> None:
    """Give the optimizer this state; parameters that it does not name start from nothing."""
    import torch

    inner = engine.torch_optimizer
    for held in _held(engine) if state else ():
        flat = held.tensor
        named = [n for n in held.names if n in state]
        for key, sample in (state[named[0]] if named else {}).items():
            if engine.run.zero and torch.is_tensor(sample) and sample.dim():
                whole = torch.zeros_like(flat, dtype=sample.dtype)
                for name, start, begin, length in held.pieces:
                    if name in state:
                        whole[start:start + length] = state[name][key].flatten()[begin:begin + length].to(flat.device)
                inner.state[flat][key] = whole
            elif torch.is_tensor(sample):
                # torch keeps the step of an optimizer on the CPU unless it is capturable or fused
                stays = not sample.dim() and not (inner.defaults.get("fused") or inner.defaults.get("capturable"))
                inner.state[flat][key] = sample.clone() if stays else sample.clone().to(flat.device)
            else:
                inner.state[flat][key] = sample


def _held(engine: Engine) -> Iterable[Held]:
    inner, parameters = engine.optimizer, engine.parameters
    if engine.run.zero == 0:
        for name, p in parameters.items():
            yield Held(p, [Piece(name, 0, 0, p.numel())], [name])
    elif engine.run.zero == 3:
        for flat in inner.fp32_partitioned_groups_flat:
            pieces = []
            for name, p in parameters.items():
                group, start, length = inner.grad_position[inner.get_param_id(p)]
                if inner.fp32_partitioned_groups_flat[group] is flat:
                    begin = p.ds_tensor.ds_numel * engine.run.rank
                    pieces.append(Piece(name, start, begin, max(0, min(length, p.ds_numel - begin))))
            yield Held(flat, pieces, [piece.name for piece in pieces])
    else:
        for i, flat in enumerate(inner.single_partition_of_fp32_groups):
            own = {id(p) for p in inner.bit16_groups[i]}
            names = [n for n, p in parameters.items() if id(p) in own]
            where = {n: m for n in names if (m := parameters[n]._hp_mapping) is not None}
            yield Held(flat, [Piece(n, m.hp_fragment_address.start, m.lp_fragment_address.start, m.hp_fragment_address.numel) for n, m in where.items()], names)

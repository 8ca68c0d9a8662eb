"""Changes of a base model's weights in as few tensors as say them exactly: how methods that touch little of a model keep what they changed.

A safetensors file holds, for a parameter `w` of the base model, one of:

    w                              its new values, whole
    w::entries   w::values         flat positions (row-major), and the new values there
    w::rows      w::change         numbers along the first dimension, and what is added to those rows
    w::columns   w::change         numbers along the second dimension, and what is added to those columns

Positions are int32 where they fit and int64 elsewhere, each at most once. A parameter that is not named keeps its values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ftpipe.errors import ArtifactError

if TYPE_CHECKING:
    import torch

MARK = "::"
VALUE_OF = {"entries": "values", "rows": "change", "columns": "change"}
"""Kind of a part -> the other tensor that belongs to it."""


@dataclass(frozen=True)
class Part:
    """What a file says of one parameter. at: int positions [k]. value: the new values, or what is added, see the kinds above."""

    kind: Literal["whole", "entries", "rows", "columns"]
    value: torch.Tensor
    at: torch.Tensor | None = None

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why the part cannot belong to a parameter of this shape; empty if it can."""
        size = tuple(self.value.shape)
        if self.kind == "whole":
            return "" if size == shape else f"the base has {list(shape)} there"
        at, axis = self.at, 1 if self.kind == "columns" else 0
        if at.is_floating_point() or at.dim() != 1:
            return "its positions are no list of whole numbers"
        if axis >= len(shape):
            return f"the base has {list(shape)} there, without {self.kind}"
        limit = 1 if self.kind == "entries" else shape[axis]
        for n in shape if self.kind == "entries" else ():
            limit *= n
        wanted = (len(at),) if self.kind == "entries" else (*shape[:axis], len(at), *shape[axis + 1:])
        if size != wanted:
            return f"{len(at)} {self.kind} of {list(shape)} are {list(wanted)}"
        if len(at) and (int(at.min()) < 0 or int(at.max()) >= limit):
            return f"the base has {limit} {self.kind} there"
        return "" if len(at.unique()) == len(at) else f"one of its {self.kind} is named twice"

    def on(self, weight: torch.Tensor) -> torch.Tensor:
        """The parameter after the change, float32 (a copy), from the base model's."""
        if self.kind == "whole":
            return self.value.float().clone()
        found = weight.detach().float().clone().contiguous()
        at, value = self.at.long().to(found.device), self.value.float().to(found.device)
        if self.kind == "entries":
            found.view(-1)[at] = value
            return found
        return found.index_add_(1 if self.kind == "columns" else 0, at, value)

    def changes(self, weight: torch.Tensor) -> bool:
        """Whether the parameter differs from the base model's afterwards."""
        if self.kind in ("rows", "columns"):
            return bool(self.value.any())
        before = weight.detach() if self.kind == "whole" else weight.detach().flatten()[self.at.long()]
        return bool((self.value != before.to(self.value.dtype)).any())

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The part as entries of a safetensors file."""
        if self.kind == "whole":
            return {name: self.value.contiguous().clone()}
        return {f"{name}{MARK}{self.kind}": positions(self.at), f"{name}{MARK}{VALUE_OF[self.kind]}": self.value.contiguous().clone()}


def positions(at: torch.Tensor) -> torch.Tensor:
    """Whole numbers as int32 if they fit."""
    import torch

    return at.to(torch.int32 if not len(at) or int(at.max()) < 2**31 else torch.int64).contiguous()


def is_part(name: str) -> bool:
    """Whether a tensor of this name is half of a sparse part."""
    return MARK in name


@dataclass(frozen=True)
class Keys:
    """Which tensors of a file are one parameter's part: its kind, and the names of `Part.value` and `Part.at`."""

    kind: Literal["whole", "entries", "rows", "columns"]
    value: str
    at: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its tensors."""
        return (self.value,) if self.at is None else (self.at, self.value)

    def part(self, tensors: Mapping[str, torch.Tensor]) -> Part:
        """The part, of a file's tensors."""
        return Part(self.kind, tensors[self.value], None if self.at is None else tensors[self.at])


def keys(names: Iterable[str], where: str) -> dict[str, Keys]:
    """The parts that the tensors of these names are, by parameter and in their order. Raises ArtifactError if one half of a part is missing."""
    there = set(names)
    found: dict[str, Keys] = {}
    used = set()
    for key in sorted(there):
        name, mark, kind = key.partition(MARK)
        if not mark:
            used.add(key)
            found[name] = Keys("whole", key)
        elif (other := f"{name}{MARK}{VALUE_OF.get(kind)}") in there:
            if name in found:
                raise ArtifactError(f"the adapter changes {name} in two ways", where=where, remedy="train it again; the file was altered")
            used |= {key, other}
            found[name] = Keys(kind, other, key)  # type: ignore[arg-type]
    if lone := sorted(there - used):
        raise ArtifactError(f"tensor {lone[0]} has no counterpart", where=where, remedy="train the adapter again; the file was altered")
    return found


def read(tensors: Mapping[str, torch.Tensor], where: str) -> Iterator[tuple[str, Part]]:
    """The parts in a file's tensors by parameter, see `keys`. A part's tensors are asked for when it is its turn, so a mapping that reads them one at a time
    is enough."""
    for name, stored in keys(tensors, where).items():
        yield name, stored.part(tensors)


def smallest(value: torch.Tensor, base: torch.Tensor) -> Part | None:
    """The smallest part that makes `value` of `base` exactly, or None if they are equal. value: float32; base: the base model's parameter."""
    import torch

    at = (value != base.detach().to(value.device, value.dtype)).flatten().nonzero().flatten()
    if not len(at):
        return None
    wide = 4 if value.numel() < 2**31 else 8
    if len(at) * (wide + value.element_size()) >= value.numel() * value.element_size():
        return Part("whole", value)
    return Part("entries", torch.take(value, at), at)


def put(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], where: str, known: Callable[[str], bool] = lambda name: False) -> None:
    """Change a base model's parameters as a file says, in their own type. `known` says which of the file's names are not the base model's but looked after.

    Raises ArtifactError for a part that does not fit.
    """
    import torch

    parameters = dict(model.named_parameters())
    for name, part in read(tensors, where):
        if known(name):
            continue
        why = part.misfit(tuple(parameters[name].shape)) if name in parameters else "the base has none of that name"
        if why:
            raise ArtifactError(f"tensor {name} {list(part.value.shape)} does not fit the base model: {why}", where=where,
                                remedy="load it on the base it was trained on")
        with torch.no_grad():
            parameters[name].copy_(part.on(parameters[name]))

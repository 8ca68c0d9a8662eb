"""Adapters as changes of weights: what merging, editing and compressing work on.

A change of one weight is kept as the two thin factors of a LoRA where it is one, and as a full matrix otherwise. An adapter's changes are read one weight at
a time, when they are asked for, and nothing of them is kept: a merge needs the memory of a few weights and not of a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.models.weights import tensor

if TYPE_CHECKING:
    import torch

FACTS, WEIGHTS, CONFIG = "ftpipe_adapter.json", "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Delta:
    """The change of one weight (out x in, or any shape if dense): `dense_`, or `b @ a` with a (rank x in) and b (out x rank), the scale already in b.

    Factors are float32. A dense change is float32 or, where the tuned weight was kept in float32, float64, so that base + change is that weight bit for bit.
    """

    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    dense_: torch.Tensor | None = None

    @property
    def low_rank(self) -> bool:
        return self.dense_ is None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.b.shape[0], self.a.shape[1]) if self.low_rank else tuple(self.dense_.shape)

    def dense(self) -> torch.Tensor:
        """The whole change."""
        return self.b @ self.a if self.dense_ is None else self.dense_

    def times(self, factor: float) -> Delta:
        """The change, `factor` times as large."""
        return Delta(self.a, self.b * factor) if self.low_rank else Delta(dense_=self.dense_ * factor)


Deltas = Mapping[str, Delta]
"""Changes by the name of the base model's parameter."""


class Lazy(Mapping[str, Delta]):
    """Changes that are read when they are asked for, each time anew. `keep` is whatever must live as long as they may be read."""

    def __init__(self, loaders: Mapping[str, Callable[[], Delta]], keep: Any = None):
        self._loaders, self._keep = dict(sorted(loaders.items())), keep

    def __getitem__(self, name: str) -> Delta:
        return self._loaders[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaders)

    def __len__(self) -> int:
        return len(self._loaders)

    def __contains__(self, name: object) -> bool:
        return name in self._loaders


def add(parts: Sequence[Delta]) -> Delta:
    """The sum of changes of one weight. Low-rank changes stay so, exactly: their factors are put side by side, and the ranks add up.

    Averaging A and B apart, as is often done, is not that: mean(B) mean(A) is not the mean of B A.
    """
    import torch

    if all(p.low_rank for p in parts):
        return Delta(torch.cat([p.a for p in parts]), torch.cat([p.b for p in parts], dim=1))
    total = parts[0].dense().to(max((p.dense_.dtype for p in parts if not p.low_rank), key=lambda t: t.itemsize), copy=True)
    for part in parts[1:]:
        total += part.dense()
    return Delta(dense_=total)


def truncate(delta: Delta, rank: int) -> Delta:
    """The best change of at most `rank` in the Frobenius norm (Eckart and Young 1936); of a low-rank one without ever forming it, through QR of its factors."""
    import torch

    if delta.low_rank:
        if delta.a.shape[0] <= rank:
            return delta
        qb, rb = torch.linalg.qr(delta.b.double())
        qa, ra = torch.linalg.qr(delta.a.double().T)
        u, s, vh = torch.linalg.svd(rb @ ra.T)
        return _balanced(qb @ u[:, :rank], s[:rank], vh[:rank] @ qa.T)
    if delta.dense_.dim() != 2:
        return delta
    u, s, vh = torch.linalg.svd(delta.dense_.double(), full_matrices=False)
    return _balanced(u[:, :rank], s[:rank], vh[:rank])


def _balanced(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> Delta:
    root = s.sqrt()
    return Delta((root[:, None] * vh).float(), (u * root).float())


def inner(one: Delta, two: Delta) -> float:
    """Sum of the products of two changes' entries, in float64; of low-rank ones from the small products of their factors."""
    if one.low_rank and two.low_rank:
        return float(((one.a.double() @ two.a.double().T) * (one.b.double().T @ two.b.double())).sum())
    return float((one.dense().double() * two.dense().double()).sum())


def norm(deltas: Deltas) -> float:
    """Frobenius norm of all changes together."""
    return max(sum(inner(d, d) for d in map(deltas.__getitem__, deltas)), 0.0) ** 0.5


@dataclass
class Loss:
    """Adds up what is lost weight by weight: squared norms of what was lost and of the change it was lost from."""

    lost: float = 0.0
    whole: float = 0.0

    def count(self, before: Delta, after: Delta | None) -> None:
        """One weight's change before and after (None: nothing is left of it)."""
        size = inner(before, before)
        gone = size if after is None else 0.0
        if after is not None and after is not before:
            rest = add([before, after.times(-1)])
            gone = max(inner(rest, rest), 0.0)
        self.lost, self.whole = self.lost + gone, self.whole + size

    @property
    def share(self) -> float:
        """Norm of what was lost as a share of the norm of the change."""
        return (self.lost / self.whole) ** 0.5 if self.whole > 0 else 0.0


def facts_of(folder: Path) -> dict[str, Any]:
    """`ftpipe_adapter.json` of an adapter folder."""
    from ftpipe.models.adapters import read_manifest

    return read_manifest(folder)


def same_base(folders: Mapping[str, Path]) -> dict[str, Any]:
    """The facts of the first adapter, after checking that all are for one base. Raises ConfigError."""
    facts = {name: facts_of(folder) for name, folder in folders.items()}
    (first, own), *rest = facts.items()
    for name, other in rest:
        if any(own["base"].get(k) != other["base"].get(k) for k in ("weights", "config")):
            raise ConfigError(f"{first} is for {own['base'].get('model')}, {name} for {other['base'].get('model')}",
                              remedy="only adapters for one base can be combined")
        if own.get("quantize") != other.get("quantize"):
            def said(facts: dict[str, Any]) -> str:
                return f"quantised by {json.dumps(facts['quantize'])}" if facts.get("quantize") else "as it is"
            raise ConfigError(f"{first} was trained on the base {said(own)}, {name} on the base {said(other)}",
                              remedy="only adapters for one base can be combined; train them with the same `quantize`")
    return own


def read(folder: Path, base: Callable[[], Mapping[str, torch.Tensor]]) -> Lazy:
    """The changes of an adapter, read when they are asked for. `base` gives the base model's weights, and is called only for an adapter of whole weights.

    A packed adapter (see the slot `compress`) is unpacked into a temporary folder for as long as its changes are in use.
    Raises ConfigError for adapters whose effect is no sum of weight changes (DoRA, prompts, adapters in series).
    """
    from ftpipe.models.adapters import plain
    from ftpipe.train.adapt._weights import tensor_files

    stack = ExitStack()
    folder = stack.enter_context(plain(folder, base))
    if files := tensor_files(folder):
        return _whole_weights(files, folder, base, stack)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) if (folder / CONFIG).is_file() else {}
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        kind = "DoRA" if config.get("use_dora") else config.get("peft_type") or "its method"
        raise ConfigError(f"an adapter of {kind} is no sum of weight changes and cannot be computed with", where=str(folder), remedy="use LoRA or full weights")
    if config.get("fan_in_fan_out"):
        raise ConfigError("this LoRA is of layers that keep their weights transposed (GPT-2's Conv1D), which cannot be computed with", where=str(folder),
                          remedy="merge it into the base model first and use the whole weights")
    from safetensors import safe_open

    found: dict[str, dict[str, str]] = {}
    with safe_open(folder / WEIGHTS, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118 (not a dict)
            path, _, side = name.removeprefix(PREFIX).partition(".lora_")
            if side not in ("A.weight", "B.weight") or len(f.get_slice(name).get_shape()) != 2:
                raise ConfigError(f"tensor {name} is no part of a LoRA of linear layers", where=str(folder), remedy="train without extra modules or biases")
            found.setdefault(path, {})[side[0]] = name
    return Lazy({f"{path}.weight": partial(_pair, folder / WEIGHTS, pair, _scale(config, path)) for path, pair in found.items()}, keep=stack)


def _pair(file: Path, names: Mapping[str, str], scale: float) -> Delta:
    return Delta(tensor(file, names["A"]).float(), tensor(file, names["B"]).float() * scale)


def _whole_weights(files: Mapping[str, Path], folder: Path, base: Callable[[], Mapping[str, torch.Tensor]], keep: Any) -> Lazy:
    """The changes of an adapter that holds new values or sparse changes of the base's own weights, of the tensors in `files`."""
    from ftpipe.models import sparse
    from ftpipe.models.weights import Tensors

    parts, tensors = sparse.keys(files, str(folder)), Tensors(files)
    if added := next((name for name in parts if name not in base()), None):
        raise ConfigError(f"the adapter adds {added}, which the base model does not have, so it is no sum of weight changes", where=str(folder),
                          remedy="use LoRA or full weights")

    def change(name: str) -> Delta:
        import torch

        part, weight = parts[name].part(tensors), base()[name].detach()
        if why := part.misfit(tuple(weight.shape)):
            raise ArtifactError(f"tensor {name} {list(part.value.shape)} does not fit the base model: {why}", where=str(folder),
                                remedy="load it on the base it was trained on")
        wide = torch.float64 if part.value.dtype.itemsize >= 4 else torch.float32
        tuned = part.value if part.kind == "whole" else part.on(weight)
        return Delta(dense_=tuned.to(wide).sub_(weight.to(wide)))

    return Lazy({name: partial(change, name) for name in parts}, keep=keep)


def _scale(config: dict[str, Any], path: str) -> float:
    def of(pattern: dict[str, Any], default: Any) -> Any:
        return next((v for k, v in (pattern or {}).items() if path == k or path.endswith("." + k)), default)

    rank, alpha = of(config.get("rank_pattern"), config["r"]), of(config.get("alpha_pattern"), config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)

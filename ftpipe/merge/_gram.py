"""Second moments of the inputs of a model's linear layers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import DataError

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._given import Given

BATCH_TOKENS = 4096


class Moments:
    """Running mean of x x^T over the rows x of what it is given, float64: the same, to rounding, however the rows are split into batches."""

    def __init__(self) -> None:
        self.mean: Any = None
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """x: (rows, inputs)."""
        x = x.detach().double()
        if not len(x):
            return
        self.count += len(x)
        own = (x.T @ x).cpu()
        self.mean = own / self.count if self.mean is None else self.mean.add_((own - len(x) * self.mean) / self.count)


def collect(given: Given, rows: Mapping[str, str], limit: int, max_length: int, memory: int) -> tuple[dict[str, Callable[[str], torch.Tensor]], dict[str, Any]]:
    """For each changed weight of a linear layer a function from an adapter to its matrix, read from the work folder; and what to say about it.

    Each model is the base with the adapter's changes in its weights. A killed merge goes on with the matrices that are there.
    """
    from ftpipe.data.rows import RowSet
    from ftpipe.models.loading import default_device, load_tokenizer
    from ftpipe.models.weights import tensor

    folder = given.work / "gram"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(given.model, given.env)
    linear: list[str] = []
    tokens: dict[str, int] = {}
    for number, (adapter, stage) in enumerate(rows.items()):
        changed = given.changed()
        linear = [n for n in given.names if _linear(changed.model, n)]
        sequences = list(_sequences(RowSet(given.inputs[stage]), tokenizer, limit, max_length))
        if not sequences:
            raise DataError(f"{stage} has no row that {adapter} could be run on", remedy="name a stage that passes train rows on")
        tokens[adapter] = sum(map(len, sequences))
        for name, delta in given.adapters[adapter].items():
            changed.add(name, delta)
        model = changed.model.to(default_device())
        missing = [n for n in linear if not _file(folder, adapter, n).is_file()]
        for group in _groups(model, missing, memory):
            for name, moments in measure(model, group, sequences).items():
                _write(_file(folder, adapter, name), moments)
        given.progress(number + 1, len(rows), "models")

    def read(name: str, adapter: str) -> torch.Tensor:
        return tensor(_file(folder, adapter, name), "gram")

    return {n: partial(read, n) for n in linear}, {"linear": len(linear), "averaged": len(given.names) - len(linear), "tokens": tokens}


def measure(model: torch.nn.Module, names: Sequence[str], sequences: Sequence[Sequence[int]]) -> dict[str, Moments]:
    """Moments of the inputs of the linear layers whose weights are `names`, over all tokens of all sequences; padding is left out."""
    import torch

    found = {name: Moments() for name in names}
    mask: list[Any] = [None]
    handles = []
    for name in names:
        def hook(module: Any, args: tuple[torch.Tensor, ...], own: Moments = found[name]) -> None:
            own.add(args[0][mask[0]])

        handles.append(model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(hook))
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            for batch in _batches(sequences):
                width = max(map(len, batch))
                ids = torch.tensor([list(s) + [0] * (width - len(s)) for s in batch], device=device)
                mask[0] = torch.arange(width, device=device)[None] < torch.tensor([len(s) for s in batch], device=device)[:, None]
                model(input_ids=ids, attention_mask=mask[0].long(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _linear(model: torch.nn.Module, name: str) -> bool:
    """Whether a parameter is the weight of a linear layer that nothing else shares (a tied output layer is an embedding)."""
    import torch

    if not name.endswith(".weight"):
        return False
    module = model.get_submodule(name.removesuffix(".weight"))
    if not isinstance(module, torch.nn.Linear):
        return False
    return sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) == 1


def _sequences(rows: Any, tokenizer: Any, limit: int, max_length: int) -> Iterator[list[int]]:
    from ftpipe.data.render import Renderer

    table = rows.table().slice(0, limit).to_pylist()
    for shown in Renderer(tokenizer).rows(table):
        if not isinstance(shown, Exception) and shown.input_ids:
            yield shown.input_ids[:max_length]


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sequence)
    if batch:
        yield batch


def _groups(model: torch.nn.Module, names: Sequence[str], memory: int) -> Iterator[list[str]]:
    """Layers whose matrices fit in `memory` bytes together; at least one."""
    group, used = [], 0
    for name in names:
        size = 8 * model.get_parameter(name).shape[1] ** 2
        if group and used + size > memory:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def _file(folder: Path, adapter: str, name: str) -> Path:
    return folder / f"{hashlib.sha256(f'{adapter}/{name}'.encode()).hexdigest()[:32]}.safetensors"


def _write(path: Path, moments: Moments) -> None:
    from safetensors.torch import save_file

    temporary = path.with_suffix(".tmp")
    save_file({"gram": moments.mean}, temporary)
    os.replace(temporary, path)

"""Distillation of BitDelta's scales: the packed model's logits are brought near those of the tuned one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import DataError, TrainingError

if TYPE_CHECKING:
    import torch

    from ftpipe.compress.bitdelta import BitDelta
    from ftpipe.merge._given import Given

HELD = 32
"""Held-out rows that the error is measured on, before and after."""


def distil(given: Given, adapter: Path, signs: Mapping[str, torch.Tensor], scales: Mapping[str, torch.Tensor], settings: BitDelta
           ) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """New scales by weight, and the mean squared errors of the logits before and after, on the rows trained on and on held-out ones.

    Two models are in memory: the tuned one, and the base with whatever is kept whole.
    """
    import torch

    from ftpipe.compress.bitdelta import plus_minus
    from ftpipe.data.rows import HELDOUT, TRAIN, RowSet
    from ftpipe.merge._deltas import read
    from ftpipe.models.loading import default_device, load_tokenizer

    device = default_device()
    teacher, student = given.changed(), given.changed()
    for name, delta in read(adapter, given.base).items():
        teacher.add(name, delta)
        if name not in signs:
            student.add(name, delta)
    tuned, model = teacher.model.to(device), student.model.to(device).requires_grad_(False)
    tokenizer, rows = load_tokenizer(given.model, given.env), RowSet(given.inputs[settings.rows or ""])
    own = sequences(rows.table(TRAIN).to_pylist(), tokenizer, settings.max_length)
    held = sequences(rows.table(HELDOUT).slice(0, HELD).to_pylist(), tokenizer, settings.max_length)
    if not own:
        raise DataError("there is no row to distil on", where=settings.rows, remedy="name a stage that passes train rows on")
    weights = dict(model.named_parameters())
    directions = {n: plus_minus(s, weights[n].shape).to(device) for n, s in signs.items()}
    learnt = {n: torch.nn.Parameter(s.clone().float().to(device)) for n, s in scales.items()}

    def loss(batch: Sequence[Sequence[int]]) -> torch.Tensor:
        width = max(map(len, batch))
        ids = torch.tensor([list(s) + [0] * (width - len(s)) for s in batch], device=device)
        mask = torch.arange(width, device=device)[None] < torch.tensor([len(s) for s in batch], device=device)[:, None]
        given_ = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
        with torch.no_grad():
            wanted = tuned(**given_).logits[mask].float()
        made = {n: (weights[n].float() + learnt[n] * directions[n]).to(weights[n].dtype) for n in learnt}
        found = torch.func.functional_call(model, made, kwargs=given_).logits[mask].float()
        return (found - wanted).pow(2).mean()

    def error(part: Sequence[Sequence[int]]) -> float | None:
        with torch.no_grad():
            tokens = [(float(loss([s])), len(s)) for s in part]
        return sum(e * n for e, n in tokens) / sum(n for _, n in tokens) if tokens else None

    told: dict[str, Any] = {"train_before": error(own[:HELD]), "heldout_before": error(held), "rows": len(own), "steps": settings.steps}
    optimizer = torch.optim.AdamW(learnt.values(), lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=settings.steps)
    order = batches(own, settings.batch_size, given.generator("distillation", "order"))
    for step in range(settings.steps):
        value = loss(next(order))
        if not bool(value.isfinite()):
            raise TrainingError(f"the distillation's loss is not finite at step {step + 1}", remedy="lower `learning_rate`")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        given.progress(step + 1, settings.steps, "steps")
    told |= {"train_after": error(own[:HELD]), "heldout_after": error(held)}
    return {n: p.detach().cpu() for n, p in learnt.items()}, told


def sequences(rows: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[list[int]]:
    """The tokens of each row that can be rendered."""
    from ftpipe.data.render import Renderer

    return [s.input_ids[:max_length] for s in Renderer(tokenizer).rows(rows) if not isinstance(s, Exception) and s.input_ids]


def batches(rows: Sequence[Sequence[int]], size: int, generator: torch.Generator) -> Iterator[list[Sequence[int]]]:
    """Batches without end: every row once in a random order, then again in another."""
    import torch

    queue: list[Sequence[int]] = []
    while True:
        while len(queue) < size:
            queue += [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        yield queue[:size]
        del queue[:size]

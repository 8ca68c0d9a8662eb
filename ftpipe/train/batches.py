"""Which rows each optimizer step sees, how they share sequences, and which rank takes which.

Everything is a function of (row lengths, seed, epoch), so a resume finds the same steps without having stored them. A step's *rows* are chosen
before its micro-batches: how many tokens fit in memory, how many ranks there are and how often gradients are accumulated changes how a step is
computed, never what it is.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from ftpipe.train.run import Batch, derive_seed

if TYPE_CHECKING:
    from ftpipe.train.objective.base import Example
    from ftpipe.train.setup import Rows


@dataclass(frozen=True)
class Plan:
    """How rows become steps.

    lengths: tokens of each row. times: how often an epoch shows it. rows_per_step or tokens_per_step: the size of a step, one of them.
    batch_tokens: most tokens in one micro-batch (a longer row is alone in its own). alone: every row in a micro-batch of its own.
    lanes: how many micro-batches are computed at the same time, by all ranks.
    """

    lengths: Sequence[int]
    times: Sequence[int]
    seed: int
    batch_tokens: int
    rows_per_step: int | None = None
    tokens_per_step: int | None = None
    shuffle: bool = True
    alone: bool = False
    lanes: int = 1

    def epoch(self, number: int) -> Iterator[list[int]]:
        """The rows of each step of an epoch, as indices. The last step of an epoch may be smaller."""
        import numpy as np

        order = np.repeat(np.arange(len(self.lengths)), np.asarray(self.times, dtype=np.int64))
        if self.shuffle:
            np.random.Generator(np.random.PCG64(derive_seed(self.seed, "order", number))).shuffle(order)
        step: list[int] = []
        tokens = 0
        for row in order.tolist():
            full = len(step) >= self.rows_per_step if self.rows_per_step else step and tokens + self.lengths[row] > (self.tokens_per_step or 0)
            if full:
                yield step
                step, tokens = [], 0
            step.append(row)
            tokens += self.lengths[row]
        if step:
            yield step

    def steps(self, *, epochs: int | None = None, steps: int | None = None, tokens: int | None = None) -> Iterator[tuple[int, list[int]]]:
        """(epoch, rows) of every step until `epochs` or `steps` are done, or `tokens` would be passed (one step is always taken)."""
        taken, seen, number = 0, 0, 0
        while epochs is None or number < epochs:
            for rows in self.epoch(number):
                size = sum(self.lengths[r] for r in rows)
                if (steps is not None and taken >= steps) or (tokens is not None and taken and seen + size > tokens):
                    return
                yield number, rows
                taken, seen = taken + 1, seen + size
            number += 1

    def packs(self, rows: Sequence[int]) -> list[list[int]]:
        """The rows of one step in micro-batches of at most `batch_tokens`, as many tokens for each lane as can be. Largest micro-batch first."""
        loads, lanes = [0] * self.lanes, [[] for _ in range(self.lanes)]
        for row in sorted(rows, key=lambda r: (-self.lengths[r], r)):
            lane = min(range(self.lanes), key=lambda n: (loads[n], n))
            lanes[lane].append(row)
            loads[lane] += self.lengths[row]
        return sorted((p for lane in lanes for p in self._fitted(lane)), key=lambda p: (-sum(self.lengths[r] for r in p), p))

    def _fitted(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows, longest first, in micro-batches: each goes where it leaves least room."""
        packs: list[list[int]] = []
        room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
        for row in rows:
            size = self.lengths[row]
            at = bisect_left(room, (size, -1))
            if at == len(room) or self.alone:
                packs.append([row])
                insort(room, (max(self.batch_tokens - size, 0), len(packs) - 1))
            else:
                free, pack = room.pop(at)
                packs[pack].append(row)
                insort(room, (free - size, pack))
        return packs

    def share(self, packs: Sequence[list[int]], world: int) -> list[list[int]]:
        """Numbers of the packs that each rank takes: the largest first, each to the rank with the fewest tokens so far."""
        loads = [0] * world
        shares: list[list[int]] = [[] for _ in range(world)]
        for number, pack in enumerate(packs):
            rank = min(range(world), key=lambda r: (loads[r], r))
            shares[rank].append(number)
            loads[rank] += sum(self.lengths[r] for r in pack)
        return shares


def lay_out(examples: Sequence[Example], count: float, device: Any = "cpu") -> Batch:
    """The sequences of these rows end to end in one batch of one, without padding; positions restart with each."""
    import torch

    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    number = 0
    for example in examples:
        for tokens, trained in zip(example.input_ids, example.trained, strict=True):
            start = len(ids)
            ids.extend(tokens)
            positions.extend(range(len(tokens)))
            for i in range(1, len(tokens)):
                if trained[i]:
                    sources.append(start + i - 1)
                    targets.append(tokens[i])
                    sequence.append(number)
            number += 1

    def tensor(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    return Batch(input_ids=tensor(ids)[None], position_ids=tensor(positions)[None], sources=tensor(sources), targets=tensor(targets),
                 sequence=tensor(sequence), count=count, row_ids=[e.row_id for e in examples])


def calibration(plan: Plan, rows: Rows, n: int, device: Any = "cpu") -> list[Batch]:
    """The first `n` different rows of the first epoch, in its order, each in a micro-batch of its own (so that how rows are packed changes nothing)."""
    order = dict.fromkeys(row for step in plan.epoch(0) for row in step)
    return [lay_out(rows.examples([row]), 1.0, device) for row in islice(order, n)]

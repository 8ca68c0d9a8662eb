"""What the parts of a training run share: the run itself, a micro-batch, and a change of what trains."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ftpipe.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from ftpipe.models.lanes import Lanes
    from ftpipe.models.quantize.base import Quantizer
    from ftpipe.train.adapt.base import Adapt
    from ftpipe.train.engine import Engine
    from ftpipe.train.objective.base import Objective
    from ftpipe.train.optimizer.base import Optimizer
    from ftpipe.train.regularizer.base import Regularizer


@dataclass(frozen=True)
class Change:
    """What `Adapt.before_step` returns to change what trains. Every rank must return the same one.

    trainable: names of the parameters that train from this step on; None leaves the set as it is. Parameters that leave the set keep their
    value and lose their optimizer state. forget: names whose optimizer state starts again from nothing (their values stay).
    """

    trainable: frozenset[str] | None = None
    forget: frozenset[str] = frozenset()


@dataclass
class Batch:
    """One micro-batch: rows laid end to end in one sequence without padding, kept apart by their position ids.

    input_ids, position_ids: int64 [1, T]; positions restart at 0 with each sequence. sources: int64 [K], the places in the sequence whose
    logits are read; targets: int64 [K], the token that follows each of them. sequence: int64 [K], which sequence of the batch each belongs to,
    counted from 0. count: what the loss of this batch is to be divided by together with all others of the step (trained tokens, pairs).
    row_ids: the rows in it. weight: 1, or 0 for a copy that only keeps a rank with less to do in step with the others. extra: whatever else
    the objective's `collate` put there. losses: float32 [K], those that `forward.token_losses` last found for this batch, for the record.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    count: float
    row_ids: list[str]
    seed: int = 0
    weight: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)
    losses: torch.Tensor | None = None

    @property
    def tokens(self) -> int:
        return int(self.input_ids.numel())

    def rows(self) -> torch.Tensor:
        """Which of the rows of the batch each target belongs to: int64 [K]."""
        return self.sequence // (len(self.spans()) // len(self.row_ids))

    def of_row(self, row: int) -> list[Batch]:
        """The sequences of one of its rows, each in a batch of its own."""
        found, spans = [], self.spans()
        each = len(spans) // len(self.row_ids)
        for number in range(row * each, (row + 1) * each):
            (start, end), mine = spans[number], self.sequence == number
            found.append(replace(self, input_ids=self.input_ids[:, start:end], position_ids=self.position_ids[:, start:end], sources=self.sources[mine] - start,
                                 targets=self.targets[mine], sequence=self.sequence[mine] - number, row_ids=[self.row_ids[row]], losses=None))
        return found

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of each sequence of the batch, in order."""
        starts = (self.position_ids[0] == 0).nonzero().flatten().tolist()
        return list(zip(starts, [*starts[1:], self.tokens], strict=True))


def _no_rows(n: int) -> list[Batch]:
    raise TrainingError("this run has no rows to look at before training")


@dataclass
class Run:
    """A training run as its parts see it. All ranks have the same, but for `rank` and `device`.

    Attributes:
        model: what trains, as `Adapt.prepare` returned it. Its trainable parameters are float32 (they are the master weights); forward passes
            run under autocast to `dtype`, the type of the frozen weights.
        load_base: loads the base model once more (a reference, a teacher), frozen and in evaluation mode.
        identity: the base model's identity, see `models.loading.identity`.
        load_tokenizer: loads the base model's tokenizer.
        offload: the optimizer's state is kept on the CPU (ZeRO 1 and 2).
        calibration: `calibration(n)` waits for the rows and gives the first n of those that the first epoch shows, for a `prepare` that looks at data:
            each once and in a micro-batch of its own, the same on every rank, whatever the settings that spread the work. They are those of training,
            unless the adapter's method names others (`Adapt.looks_at`).
        alive: says what is being done; whatever takes minutes before the first step calls it now and then, or the rank counts as stuck.
        seed, step, steps, epoch: steps are counted from 0; during a step `step` is its number, `steps` the number there will be.
        quantize: the method of models/quantize that made the base small, or None.
        engine: access to parameters, gradients and the DeepSpeed engine under any ZeRO stage. None until the parts are prepared.
        lanes: where micro-batches are computed side by side, None if one after the other.
        memory: what a part must remember from step to step (tensors, numbers, text), the same on every rank. Checkpoints keep it. Use keys that
            start with the method's name. After a kill it is there again before any part is prepared, so that none of them computes its start anew.
        cache: what a part keeps in memory but can make again (a reference model); not in checkpoints.
        metrics: numbers a part wants recorded for this step, the same on every rank. sums: numbers it adds up over its micro-batches (times
            `Batch.weight`); what is recorded is their sum over all ranks by the count of the step, a mean.
    """

    model: Any
    load_base: Callable[[], torch.nn.Module]
    identity: dict[str, str]
    load_tokenizer: Callable[[], Any]
    rank: int = 0
    world: int = 1
    device: Any = "cpu"
    dtype: str = "float32"
    zero: int = 0
    offload: bool = False
    seed: int = 0
    step: int = 0
    steps: int = 1
    epoch: int = 0
    adapt: Adapt | None = None
    objective: Objective | None = None
    regularizers: tuple[Regularizer, ...] = ()
    optimizer: Optimizer | None = None
    quantize: Quantizer | None = None
    engine: Engine | None = None
    lanes: Lanes | None = None
    calibration: Callable[[int], list[Batch]] = _no_rows
    alive: Callable[[str], None] = lambda doing: None
    memory: dict[str, Any] = field(default_factory=dict)
    cache: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    log: logging.Logger = field(default_factory=lambda: logging.getLogger("ftpipe.train"))

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for one purpose at this step: the same on every rank and after a resume."""
        import torch

        return torch.Generator().manual_seed(derive_seed(self.seed, purpose, self.step))

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks; every rank calls it at the same time."""
        return self.sum_each([value])[0]

    def sum_each(self, values: Sequence[float]) -> list[float]:
        """The sum of each number over all ranks; every rank calls it at the same time with equally many."""
        if self.world == 1:
            return [float(v) for v in values]
        import torch
        import torch.distributed as dist

        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def agreed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's tensor on every rank; every rank calls it at the same time with one of the same shape and type."""
        if self.world == 1:
            return tensor
        import torch.distributed as dist

        shared = tensor.to(self.device).contiguous().clone()
        dist.broadcast(shared, 0)
        return shared.to(tensor.device)

    def gather(self, values: Sequence[float]) -> list[float]:
        """The numbers of all ranks, rank by rank; every rank calls it at the same time, with as many numbers as it has."""
        if self.world == 1:
            return [float(v) for v in values]
        import torch
        import torch.distributed as dist

        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(values)], dtype=torch.int64, device=self.device))
        own = torch.zeros(max(int(s) for s in sizes), dtype=torch.float64, device=self.device)
        own[:len(values)] = torch.tensor(values, dtype=torch.float64)
        found = [torch.zeros_like(own) for _ in range(self.world)]
        dist.all_gather(found, own)
        return [v for size, part in zip(sizes, found, strict=True) for v in part[:int(size)].tolist()]

    def autocast(self) -> torch.autocast:
        """The context of a forward pass: computes in `dtype`."""
        import torch

        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The parameters that train, by name. Under ZeRO 3 they hold nothing between forward passes: read them through `engine`."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on every part, and on nothing else."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

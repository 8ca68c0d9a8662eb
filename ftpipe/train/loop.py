"""The training loop of one rank: for each step, take this rank's micro-batches, let the parts act, take the step, record it."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.errors import TrainingError
from ftpipe.models.lanes import LANES
from ftpipe.train import checkpoint, lanes
from ftpipe.train.engine import Engine
from ftpipe.train.forward import check_packing, memory_ran_out, token_losses
from ftpipe.train.objective.base import Example
from ftpipe.train.run import Batch, Run, derive_seed
from ftpipe.train.setup import Job, Rows, await_rows, plan_of, prepare, process_group

if TYPE_CHECKING:
    from ftpipe.train.batches import Plan
    from ftpipe.train.lifeline import Reporter

PROBES, PROBE_TOKENS = 4, 64
WINDOW = 8
"""Steps over which a loss is averaged before it counts as high."""


def train(job: Job, report: Reporter) -> None:
    """Train, and leave the result in the folder `job.result` (rank 0). Resumes from the newest checkpoint."""
    report.alive("importing libraries")
    with process_group(job, report):
        resumed = checkpoint.latest(Path(job.checkpoints))
        run = prepare(job, report, resumed.memory if resumed else {})
        rows = await_rows(Path(job.tokens), report)
        run.lanes = lanes.make(run, job.threads)
        plan = plan_of(job, rows, LANES if run.lanes else 1)
        steps = list(plan.steps(**job.stop))
        run.steps = len(steps)
        report.alive("checking that packed rows do not see each other")
        packing = _check_first_batch(run, plan, rows, steps[0][1], job) if run.rank == 0 else None
        start, metrics = _restore(run, resumed) if resumed else (0, [])
        report.alive("building the engine")
        run.engine = Engine(run, job.clip, report.alive, resumed.parameters if resumed else ())
        if resumed:
            run.engine.restore(resumed.optimizer)
        factor = job.part("schedule").factor(len(steps), round(job.warmup * len(steps)))
        report("ready", steps=len(steps), start=start, packing=packing, trainable=sum(p.numel() for p in run.trainable().values()) if job.zero < 3 else None)
        divergence = Divergence(job.diverged)
        for record in metrics:
            divergence.see(record)
        for step in range(start, len(steps)):
            run.step, (run.epoch, numbers) = step, steps[step]
            record = one_step(run, plan, rows, numbers, job.learning_rate * factor(step), report)
            metrics.append(record)
            divergence.see(record, lambda numbers=numbers: rows.ids(numbers))
            if job.checkpoint_every and (step + 1) % job.checkpoint_every == 0 and step + 1 < len(steps):
                _write_checkpoint(run, Path(job.checkpoints), metrics, report)
        _finish(run, job, rows, steps, metrics, packing, report)


def one_step(run: Run, plan: Plan, rows: Rows, numbers: Sequence[int], rate: float, report: Reporter) -> dict[str, Any]:
    """Take one optimizer step on the rows of these numbers and return its record (the same on every rank)."""
    began = time.monotonic()
    run.metrics.clear()
    run.sums.clear()
    change = run.adapt.before_step(run)
    if change is not None:
        run.engine.rebuild(run.engine.names if change.trainable is None else change.trainable, change.forget)
    packs = plan.packs(numbers)
    shares = plan.share(packs, run.world)
    own = shares[run.rank]
    batches = []
    for i in range(max(map(len, shares))):
        # A rank with fewer micro-batches repeats the last (smallest) one without weight: collective operations need all ranks.
        number = own[i] if i < len(own) else len(packs) - 1
        batch = run.objective.collate(run, rows.examples(packs[number]))
        batch.seed, batch.weight = derive_seed(run.seed, "forward", run.step, number), float(i < len(own))
        for regularizer in run.regularizers:
            batch = regularizer.inputs(run, batch)
        batches.append(batch)
    count = run.sum(sum(b.count * b.weight for b in batches))
    ids = [i for b in batches if b.weight for i in b.row_ids]
    if not count > 0:
        raise TrainingError(f"step {run.step + 1} has nothing to train on: not one {run.objective.unit[:-1]} counts", where=_some(ids),
                            remedy="the rows' answers are empty or cut off; `label_audit` finds such rows")
    run.engine.share = run.world / count
    run.engine.set_learning_rate(rate)
    with _explained(run, batches):
        report.alive(f"step {run.step + 1} of {run.steps}")
        for part in (*run.regularizers, run.objective):
            part.before_step(run, batches)
        loss = run.optimizer.take_step(run, batches)
    run.adapt.after_step(run)
    tokens = sum(rows.lengths[n] for n in numbers)
    names, by_source = sorted(run.sums), _by_source(run, batches, rows) if len(rows.sources) > 1 else []
    total, trained, *sums = run.sum_each([loss, float(sum(b.targets.numel() for b in batches if b.weight)), *(run.sums[n] for n in names), *by_source])
    losses, counts = sums[len(names)::2], sums[len(names) + 1::2]
    record = {"step": run.step + 1, "epoch": run.epoch + 1, "loss": total / run.world, "learning_rate": rate, "grad_norm": run.engine.norm,
              "tokens": tokens, "trained_tokens": int(trained), "rows": len(numbers), **run.metrics,
              **{n: s / count for n, s in zip(names, sums)},
              **{f"loss/{n}": s / c for n, s, c in zip(rows.sources, losses, counts) if c},
              **{f"trained_tokens/{n}": int(c) for n, c in zip(rows.sources, counts) if c}}
    seconds = time.monotonic() - began
    report("step", of=run.steps, **record, seconds=seconds, tokens_per_second=tokens / seconds, memory_bytes=_memory(run))
    return record


def _by_source(run: Run, batches: Sequence[Batch], rows: Rows) -> list[float]:
    """For each source of rows the sum of its tokens' losses in this rank's micro-batches, and how many tokens that were."""
    import torch

    found = torch.zeros(len(rows.sources), 2, dtype=torch.float64)
    for batch in batches:
        if batch.weight and batch.losses is not None:
            of_row = torch.tensor([rows.source_of[i] for i in batch.row_ids])
            source = of_row[batch.rows().cpu()]
            found.index_add_(0, source, torch.stack([batch.losses.double().cpu(), torch.ones(len(source), dtype=torch.float64)], 1))
    return found.flatten().tolist()


class Divergence:
    """Stops a training whose loss climbs: the mean over the last `WINDOW` steps is more than `factor` times the lowest such mean before, plus one nat.

    It is seen too late to blame a row; the error names those of the step at which it was seen.
    """

    def __init__(self, factor: float):
        self.factor, self.lowest = factor, math.inf
        self.recent: deque[float] = deque(maxlen=WINDOW)

    def see(self, record: dict[str, Any], rows: Callable[[], Sequence[str]] = tuple) -> None:
        """Take in a step's record. Raises TrainingError if it is the one that is too much; a factor of 0 never does. rows: gives the step's row ids."""
        self.recent.append(record["loss"])
        if not self.factor or len(self.recent) < WINDOW:
            return
        mean = sum(self.recent) / WINDOW
        if mean > self.factor * self.lowest + 1:
            raise TrainingError(f"training diverges: the loss is {mean:.3g} over the last {WINDOW} steps and was {self.lowest:.3g} before",
                                where=f"step {record['step']}, learning rate {record['learning_rate']:.3g}, gradient {record['grad_norm']:.3g}, "
                                f"{_some(rows())}",
                                remedy="lower learning_rate, raise warmup or lower clip; `diverged: 0` goes on regardless")
        self.lowest = min(self.lowest, mean)


def _check_first_batch(run: Run, plan: Plan, rows: Rows, numbers: Sequence[int], job: Job) -> float | None:
    """The largest difference between a token's loss packed and alone, over one micro-batch of the first step that holds several sequences."""
    from ftpipe.train.batches import lay_out

    packs = [p for p in plan.packs(numbers) if len(p) * run.objective.sequences > 1]
    if not packs or not run.adapt.packs:
        return None
    sequences = [Example(e.row_id, (ids,), (trained,)) for e in rows.examples(min(packs, key=len))
                 for ids, trained in zip(e.input_ids, e.trained, strict=True)]
    with run.autocast():
        return check_packing(run.model, lay_out(sequences, 1.0, run.device), [lay_out([s], 1.0, run.device) for s in sequences], job.dtype)


def _restore(run: Run, resumed: checkpoint.Checkpoint) -> tuple[int, list[dict[str, Any]]]:
    """Put a checkpoint's parameters and memory into the prepared run. Optimizer state waits for the engine."""
    import torch

    run.memory.update(resumed.memory)
    trainable = set(resumed.trainable)
    for name, parameter in run.model.named_parameters():
        if name in resumed.parameters:
            with torch.no_grad():
                parameter.data = resumed.parameters[name].to(parameter.device)
        parameter.requires_grad_(name in trainable)
    run.adapt.resumed(run)
    return resumed.step, list(resumed.metrics)


def _write_checkpoint(run: Run, folder: Path, metrics: list[dict[str, Any]], report: Reporter) -> None:
    report.alive(f"writing a checkpoint after step {run.step + 1}")
    parameters = run.engine.trained()
    optimizer = run.engine.optimizer_state()
    if run.rank == 0:
        checkpoint.write(folder, checkpoint.Checkpoint(run.step + 1, parameters, optimizer, list(run.engine.names), run.memory, metrics))
        report("checkpoint", step=run.step + 1)


def _finish(run: Run, job: Job, rows: Rows, steps: Sequence[tuple[int, list[int]]], metrics: list[dict[str, Any]], packing: float | None,
            report: Reporter) -> None:
    """Rank 0 writes the adapter, the probe and the metrics into `job.result`, in one move."""
    import torch
    from safetensors.torch import save_file

    report.alive("saving")
    state = run.engine.state()
    for name, value in state.items():
        if not value.numel() or not bool(torch.isfinite(value).all()):
            raise TrainingError(f"parameter {name} is {'empty' if not value.numel() else 'not finite'} at the end of training",
                                remedy="lower the learning rate" if value.numel() else "this is a fault of the method under this ZeRO stage; please report it")
    first = rows.examples(sorted(set(steps[0][1]))[:PROBES])
    width = min(PROBE_TOKENS, *(len(e.input_ids[0]) for e in first))
    ids = torch.tensor([list(e.input_ids[0][:width]) for e in first], dtype=torch.int64)
    logits = run.engine.probe(ids)
    optimizer = run.engine.optimizer_state() if job.keep_optimizer else {}
    if run.rank != 0:
        return
    final = Path(job.result)
    temporary = final.with_name(final.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "adapter").mkdir(parents=True)
    run.adapt.save(run.model, state, temporary / "adapter")
    save_file({"input_ids": ids, "logits": logits.cpu()}, temporary / "probe.safetensors")
    if job.keep_optimizer:
        tensors = {f"{n}/{k}": v for n, held in optimizer.items() for k, v in held.items() if torch.is_tensor(v)}
        save_file({n: t.contiguous() for n, t in sorted(tensors.items())}, temporary / "optimizer.safetensors")
    size = run.quantize.parameters(run.model) if run.quantize else sum(getattr(p, "ds_numel", p.numel()) for p in run.model.parameters())
    summary = {"trainable": sum(v.numel() for n, v in state.items() if n in run.engine.names), "parameters": size, "packing_difference": packing,
               "ranks": run.world}
    (temporary / "metrics.json").write_text(json.dumps({"metrics": metrics, **summary}), encoding="utf-8")
    os.rename(temporary, final)
    report("done", **summary)


@contextmanager
def _explained(run: Run, batches: Sequence[Batch]):
    """Errors of a step with the rows it was taken on: those alone that have a loss that is no number, if there are such."""
    try:
        yield
    except TrainingError as error:
        raise TrainingError(error.what, where=error.where or _where(run, batches), remedy=error.remedy) from error
    except Exception as error:
        if memory_ran_out(error):
            raise _out_of_memory(batches, _where(run, batches)) from error
        raise


def _where(run: Run, batches: Sequence[Batch]) -> str:
    bad = [b.row_ids[i] for b in batches if b.losses is not None for i in _bad_rows(run, b)]
    ids = bad or [i for b in batches for i in b.row_ids]
    return f"step {run.step + 1}, rank {run.rank}, {_some(list(dict.fromkeys(ids)))}"


def _bad_rows(run: Run, batch: Batch) -> list[int]:
    """Rows of a micro-batch that have a loss that is no number: those that have one alone too, if there are such (they spoil others that share products)."""
    import torch

    rows = sorted(set(batch.rows()[~batch.losses.isfinite()].tolist()))
    if len(rows) < 2 or run.zero == 3:
        return rows
    with torch.no_grad(), run.autocast():
        return [r for r in rows if any(not bool(token_losses(run.model, s).isfinite().all()) for s in batch.of_row(r))] or rows


def _out_of_memory(batches: Sequence[Batch], where: str) -> TrainingError:
    return TrainingError(f"out of memory on a micro-batch of {max(b.tokens for b in batches)} tokens", where=where,
                         remedy="lower batch_tokens (it changes nothing but memory and speed); if one row is that long, lower max_tokens; more ranks or a "
                         "higher ZeRO stage spread optimizer state and gradients")


def _some(ids: Sequence[str]) -> str:
    return f"rows {', '.join(ids[:8])}{f' and {len(ids) - 8} more' if len(ids) > 8 else ''}"


def _memory(run: Run) -> int:
    """Bytes: most ever allocated on the GPU, or most ever resident on the CPU."""
    import torch

    if str(run.device).startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

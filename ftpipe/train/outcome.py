"""What the ranks leave behind, made into an artifact: adapter, curves, what was seen; and the proof that the adapter loads."""

from __future__ import annotations

import json
import math
import shutil
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ArtifactError
from ftpipe.train.rendering import LEFT_OUT
from ftpipe.train.setup import Job, Rows, plan_of

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.stages.base import StageContext

TIMING = "timing.jsonl"
TIMED = ("seconds", "tokens_per_second", "memory_bytes")
"""What a step reports that differs from run to run; it goes into the notes, not into `metrics.parquet`."""
POINTS = 500
"""Most steps whose timing is kept in the notes."""
MOVED = {"float32": 1e-3, "bfloat16": 0.05}
"""How far logits of the adapter loaded afresh may be from the trained model's, as a share of the largest logit."""


class Heard:
    """Passes on what rank 0 reports, and keeps the timing of each step in the work folder, where a run that was killed finds it again."""

    def __init__(self, ctx: StageContext):
        self.ctx, self.began = ctx, time.monotonic()
        self.startup: float | None = None
        self.file = ctx.work / TIMING
        self.steps: dict[int, dict[str, float]] = {}
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):  # a line cut off by a kill; its step is taken again
                    self._keep(json.loads(line))

    @property
    def timing(self) -> list[dict[str, float]]:
        """The seconds, speed and memory of each step that made the adapter: of one that was taken twice, those of the second time."""
        return [self.steps[n] for n in sorted(self.steps)]

    def _keep(self, entry: dict[str, float]) -> None:
        self.steps[int(entry["step"])] = entry

    def __call__(self, event: dict[str, Any]) -> None:
        ctx = self.ctx
        if event["event"] == "ready":
            self.startup = time.monotonic() - self.began
            if event["start"]:
                ctx.log.info("resumed after step %d of %d", event["start"], event["steps"])
            if event["packing"] is not None:
                ctx.log.info("packed rows get the loss they get alone, to %.2g nats a token", event["packing"])
        elif event["event"] == "step":
            step, of = int(event["step"]), int(event["of"])
            numbers = {k: float(v) for k, v in event.items() if k not in ("event", "time", "step", "of")}
            entry = {"step": step} | {k: numbers[k] for k in TIMED}
            self._keep(entry)
            with self.file.open("a", encoding="utf-8") as f:
                f.write(json.dumps(entry) + "\n")
            ctx.listener.metrics(ctx.name, numbers, step)
            ctx.progress(step, of, "steps", loss=numbers["loss"], tokens_per_second=numbers["tokens_per_second"])
            ctx.log.info("step %d/%d  loss %.4f  learning rate %.3g  gradient %.3g  %.0f tokens/s  %.2f GB", step, of, numbers["loss"],
                         numbers["learning_rate"], numbers["grad_norm"], numbers["tokens_per_second"], numbers["memory_bytes"] / 1e9)
        elif event["event"] == "checkpoint":
            ctx.log.info("checkpoint after step %d", event["step"])


def finish(stage: Any, ctx: StageContext, job: Job, table: pa.Table, heard: Heard) -> None:
    """Fill `ctx.out` from `job.result`. Raises ArtifactError if the adapter does not load to what was trained."""
    result = Path(job.result)
    told = json.loads((result / "metrics.json").read_text(encoding="utf-8"))
    rows = Rows(Path(job.tokens))
    steps = list(plan_of(job, rows).steps(**job.stop))
    shutil.copytree(result / "adapter", ctx.out / "adapter")
    for name in ("probe.safetensors", *(["optimizer.safetensors"] if job.keep_optimizer else [])):
        shutil.copy2(result / name, ctx.out / name)
    manifest = {"method": stage.adapt.dump(), "base": job.identity, "tokenizer": job.identity["tokenizer"], "chat_template": job.identity["chat_template"],
                "dtype": job.dtype, "trainable": told["trainable"]}
    if job.quantize:
        manifest["quantize"] = job.quantize  # whoever loads the adapter makes the base small in the same way
    if job.learning_rate == 0:
        manifest["zero_delta"] = True  # training was told to learn nothing, so an adapter that changes nothing is what was asked for
    (ctx.out / "adapter" / "ftpipe_adapter.json").write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _write_metrics(ctx, told["metrics"])
    seen = _write_seen(ctx, rows, steps)
    _decide(ctx, table, seen, job)
    trained = told["metrics"]
    summary = {"steps": len(steps), "epochs": steps[-1][0] + 1, "rows": len(seen), "tokens": sum(m["tokens"] for m in trained),
               "trained_tokens": sum(m["trained_tokens"] for m in trained), "first_loss": trained[0]["loss"], "last_loss": trained[-1]["loss"],
               "trainable": told["trainable"], "parameters": told["parameters"], "sources": _by_source(rows, steps),
               "settings": stage.dump()[stage.name()]}
    for name in ("ranks", "zero", "offload", "checkpoint_every", "heartbeat", "diverged", "retrain", "share_devices", "nodes"):
        summary["settings"].pop(name)
    (ctx.out / "train.json").write_text(json.dumps(summary, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    ctx.counts |= {"steps": len(steps), "tokens": summary["tokens"], "trained_tokens": summary["trained_tokens"]}
    ctx.meta["trainable"] = told["trainable"]
    moved = verify(stage.model, ctx, job)
    timing = heard.timing
    thin = max(1, math.ceil(len(timing) / POINTS))
    ctx.notes |= {"ranks": told["ranks"], "threads": job.threads, "device": job.device, "zero": job.zero, "startup_seconds": heard.startup,
                  "packing_difference": told["packing_difference"], "probe_difference": moved, "timing": timing[::thin]}
    if timing:
        ctx.notes["step_seconds"] = sum(t["seconds"] for t in timing)
        ctx.notes["tokens_per_second"] = median(t["tokens_per_second"] for t in timing)
        ctx.notes["memory_bytes"] = max(t["memory_bytes"] for t in timing)


def _write_metrics(ctx: StageContext, metrics: list[dict[str, Any]]) -> None:
    """`metrics.parquet`: a row per step; only what is the same in every run of the same training."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    whole = ("step", "epoch", "tokens", "trained_tokens", "rows")
    names = list(dict.fromkeys(k for m in metrics for k in m))
    columns = {n: pa.array([m.get(n) for m in metrics], pa.int64() if n.partition("/")[0] in whole else pa.float64()) for n in names}
    pq.write_table(pa.table(columns), ctx.out / "metrics.parquet", compression="zstd")


def _by_source(rows: Rows, steps: list[tuple[int, list[int]]]) -> dict[str, dict[str, int]]:
    """For each source (as `rendering` names them) its rows, and the tokens and trained tokens of all their showings."""
    import numpy as np

    times = np.bincount(np.concatenate([np.asarray(numbers) for _, numbers in steps]), minlength=len(rows.lengths))
    source = np.array([rows.source_of[i] for i in rows.table["row_id"].to_pylist()])
    found = {}
    for number, name in sorted(enumerate(rows.sources), key=lambda s: s[1]):
        shown = np.where(source == number, times, 0)
        found[name] = {"rows": int((shown > 0).sum()), "tokens": int((shown * np.asarray(rows.lengths)).sum()),
                       "trained_tokens": int((shown * rows.table["targets"].to_numpy()).sum())}
    return found


def _write_seen(ctx: StageContext, rows: Rows, steps: list[tuple[int, list[int]]]) -> dict[str, int]:
    """`seen.parquet`: how often each row was trained on, its first and last step (from 1), its tokens and its trained tokens (of one showing).
    Returns times by row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found: dict[int, list[int]] = {}
    for step, (_, numbers) in enumerate(steps, start=1):
        for number in numbers:
            entry = found.setdefault(number, [0, step, step])
            entry[0], entry[2] = entry[0] + 1, step
    ids = rows.table["row_id"].to_pylist()
    order = sorted(found)
    sizes = rows.table.select(["tokens", "targets"]).take(order)
    table = pa.table({"row_id": [ids[n] for n in order], **{name: pa.array([found[n][i] for n in order], pa.int64())
                                                            for i, name in enumerate(("times", "first_step", "last_step"))},
                      "tokens": sizes["tokens"], "trained_tokens": sizes["targets"]})
    pq.write_table(table, ctx.out / "seen.parquet", compression="zstd")
    return {ids[n]: found[n][0] for n in order}


def _decide(ctx: StageContext, table: pa.Table, seen: dict[str, int], job: Job) -> None:
    """A decision for each row: trained on (score: how often), or why not."""
    import pyarrow as pa

    left_out = json.loads((Path(job.tokens).parent / LEFT_OUT).read_text(encoding="utf-8"))
    ids = table["row_id"].to_pylist()
    ctx.decide(pa.table({
        "row_id": ids,
        "kept": [i in seen for i in ids],
        "reason": pa.array([None if i in seen else left_out.get(i, "training ended before its turn") for i in ids], pa.string()),
        "score": [float(seen.get(i, 0)) for i in ids],
    }))


def verify(model: str, ctx: StageContext, job: Job) -> float:
    """Load the adapter afresh and compare its logits with those of the model in memory at the end of training.

    Returns the largest difference as a share of the largest logit. Raises ArtifactError if it is more than rounding.
    """
    import torch
    from safetensors.torch import load_file

    from ftpipe.models.loading import load_adapted

    probe = load_file(ctx.out / "probe.safetensors")
    loaded = load_adapted(model, ctx.env, ctx.out / "adapter", dtype=job.dtype, allow_zero=job.learning_rate == 0)
    with torch.inference_mode():
        ids = probe["input_ids"].to(next(loaded.parameters()).device)
        logits = loaded(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:, -1].float().cpu()
    moved = float((logits - probe["logits"]).abs().max() / probe["logits"].abs().max())
    if not moved <= MOVED[job.dtype]:
        raise ArtifactError(f"the saved adapter, loaded afresh, does not compute what was trained: logits differ by {moved:.3g} of the largest",
                            where=str(ctx.out / "adapter"), remedy=f"this is a fault in how {next(iter(job.parts['adapt']))} saves or loads; please report it")
    return moved

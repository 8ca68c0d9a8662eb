"""A training run in this process, without launching anything: the loop's own step on the tiny model.

    with group(): run = small_run(model, zero=2); records = steps(run, examples, 4)

As a program (`python -m tests.train.small MODEL OUT`) it is one rank of several and goes through the cases of `CASES`; see `test_ranks.py`.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ftpipe.train.batches import Plan
from ftpipe.train.lifeline import Reporter
from ftpipe.train.objective.base import Example
from ftpipe.train.run import Run
from ftpipe.train.setup import Job, process_group


class InMemory:
    """Stands in for `setup.Rows`."""

    def __init__(self, examples: list[Example]):
        self.all = examples
        self.lengths = [e.tokens for e in examples]
        self.times = [1] * len(examples)
        self.sources = ["even", "odd"]
        self.source_of = {e.row_id: i % 2 for i, e in enumerate(examples)}

    def examples(self, rows):
        return [self.all[r] for r in rows]


def examples(n: int = 24, seed: int = 0) -> list[Example]:
    """Random tokens of random lengths, the last part of each trained."""
    import random

    draw = random.Random(seed)
    found = []
    for i in range(n):
        size = draw.randint(8, 50)
        found.append(Example(f"r{i}", ([draw.randint(3, 250) for _ in range(size)],), ([j > size // 3 for j in range(size)],)))
    return found


def judged(n: int = 8, seed: int = 0) -> list[Example]:
    """For `kto`: random prompts and answers, every third called bad. The other sequence is the same prompt with the next row's answer."""
    import random

    draw = random.Random(seed)
    parts = [([draw.randint(3, 250) for _ in range(draw.randint(4, 12))], [draw.randint(3, 250) for _ in range(draw.randint(3, 20))]) for _ in range(n)]
    found = []
    for i, (prompt, said) in enumerate(parts):
        other = parts[(i + 1) % n][1]
        pair = [([*prompt, *said], [False] * len(prompt) + [True] * len(said)), ([*prompt, *other], [False] * (len(prompt) + len(other)))]
        ids, trained = zip(*(pair[::-1] if i % 3 == 2 else pair), strict=True)
        found.append(Example(f"r{i}", ids, trained))
    return found


def job(rendezvous: Path, world: int = 1, dtype: str = "float32") -> Job:
    return Job(model="", identity={}, workspace="", base="", pipeline="", seed=0, dtype=dtype, zero=0, world=world, threads=1, device="cpu", heartbeat=60,
               parts={}, learning_rate=0,
               warmup=0, clip=0, stop={}, plan={}, tokens="", checkpoints="", checkpoint_every=0, result="", rendezvous=str(rendezvous))


def group(folder: Path, world: int = 1):
    """The process group of this one process (or of the ranks that share `folder`); the one that is there, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        return nullcontext()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("WORLD_SIZE", str(world))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    return process_group(job(folder / "rendezvous", world))


def small_run(model: Path, *, zero: int = 0, offload: bool = False, dtype: str = "float32", clip: float = 1.0, world: int = 1, rank: int = 0,
              adapt: Any = None, objective: Any = None, optimizer: Any = None, regularizers: tuple[Any, ...] = (), seed: int = 1,
              rows: list[Example] | None = None, memory: dict[str, Any] | None = None, quantize: Any = None, threads: int = 0) -> Run:
    """A prepared run with its engine. rows: what a method is shown that looks at data before training; memory: what a checkpoint kept.
    threads: with kernels, and lanes for so many threads where they are possible."""
    import torch

    from ftpipe import slots
    from ftpipe.train.batches import calibration
    from ftpipe.train.engine import Engine
    from ftpipe.train.run import derive_seed

    small = slots.parse("models/quantize", quantize) if quantize else None

    def load_base() -> Any:
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        loaded.config.use_cache = False
        loaded = small.quantize(loaded.eval()) if small else loaded.eval()
        loaded.quantized_by = small
        return loaded.requires_grad_(False)

    def load_tokenizer() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(model)

    run = Run(model=None, load_base=load_base, identity={"model": str(model)}, load_tokenizer=load_tokenizer, rank=rank, world=world, dtype=dtype, zero=zero,
              offload=offload, seed=seed, steps=8, adapt=slots.parse("train/adapt", adapt or {"lora": {"r": 4}}),
              objective=slots.parse("train/objective", objective or "sft"), optimizer=slots.parse("train/optimizer", optimizer or "adamw"),
              regularizers=tuple(slots.parse("train/regularizer", r) for r in regularizers), memory=dict(memory or {}), quantize=small)
    shown = InMemory(rows or examples())
    run.calibration = lambda n: calibration(Plan(shown.lengths, shown.times, seed, 100, rows_per_step=8), shown, n)
    base = load_base()
    torch.manual_seed(derive_seed(seed, "start"))
    run.model = run.adapt.prepare(base, run)
    run.model.train()
    for regularizer in run.regularizers:
        regularizer.prepare(run)
    run.objective.prepare(run)
    if threads:
        from ftpipe.models import kernels
        from ftpipe.train import lanes

        kernels.install(run.model)
        run.lanes = lanes.make(run, threads)
    run.engine = Engine(run, clip)
    return run


def steps(run: Run, rows: list[Example], n: int, *, batch_tokens: int = 100, rows_per_step: int = 8, rate: float = 1e-2, first: int = 0,
          **plan: Any) -> list[dict[str, Any]]:
    """The records of steps `first` up to `n`."""
    from ftpipe.train.loop import one_step

    memory = InMemory(rows)
    plan.setdefault("alone", not run.adapt.packs)
    how = Plan(lengths=memory.lengths, times=memory.times, seed=1, batch_tokens=batch_tokens, rows_per_step=rows_per_step, **plan)
    records = []
    for step, (epoch, numbers) in enumerate(how.steps(steps=n)):
        if step >= first:
            run.step, run.epoch = step, epoch
            records.append(one_step(run, how, memory, numbers, rate, Reporter()))
    return records


def resumed(folder: Path, model: Path, rows: list[Example], n: int, at: int, **settings: Any) -> tuple[Run, list[dict[str, Any]]]:
    """A run stopped after step `at` and taken up again by another from its checkpoint, and the records of the steps after that."""
    from ftpipe.train import checkpoint
    from ftpipe.train.engine import Engine
    from ftpipe.train.loop import _restore

    broken = small_run(model, **settings)
    steps(broken, rows, at)
    checkpoint.write(folder, checkpoint.Checkpoint(at, broken.engine.trained(), broken.engine.optimizer_state(), list(broken.engine.names), broken.memory))
    broken.engine.destroy()
    run = small_run(model, **settings)
    run.engine.destroy()
    kept = checkpoint.latest(folder)
    _restore(run, kept)
    run.engine = Engine(run, 1.0, touched=kept.parameters)
    run.engine.restore(kept.optimizer)
    return run, steps(run, rows, n, first=at)


CASES = {f"zero {z}": {"zero": z} for z in range(4)} | {
    "unequal": {"zero": 2, "batch_tokens": 50, "rows_per_step": 5},
    "offload": {"zero": 2, "offload": True},
    "l2": {"zero": 3, "regularizers": ["l2_start"]},
    "mezo": {"optimizer": {"mezo": {"eps": 1e-2}}, "batch_tokens": 50, "rows_per_step": 5},
    "clip": {"zero": 3, "clip": 0.0, "regularizers": [{"component_clip": {"threshold": 0.05}}]},
    "q_galore": {"optimizer": {"q_galore": {"rank": 3, "update_gap": 2, "projection": "float32"}}, "adapt": "full"},
    "lisa": {"zero": 3, "adapt": {"lisa": {"active": 1, "every": 2}}, "optimizer": {"adamw": {"eps": 1e-3}}},
    "gmt": {"zero": 3, "adapt": {"gmt": {"keep_ratio": 0.2}}, "optimizer": {"adamw": {"eps": 0.1}}},
    "s2ft": {"zero": 3, "adapt": {"s2ft": {"down": 0.1, "output": 0.4, "up": 0.05, "value": 0.5}}},
    "kto": {"zero": 2, "objective": "kto", "batch_tokens": 60, "rows_per_step": 5},
    "lanes": {"zero": 2, "threads": 2, "batch_tokens": 50, "rows_per_step": 5},
    "talr": {"zero": 2, "objective": "talr", "batch_tokens": 50, "rows_per_step": 5},
    "noise": {"zero": 3, "regularizers": [{"noisefit": {"layers": 1, "noise_std": 1.0}}, "masked_thought", "neftune"], "batch_tokens": 50, "rows_per_step": 5},
}
TAKE = ("batch_tokens", "rows_per_step")


def case(model: Path, settings: dict[str, Any], **where: int) -> dict[str, Any]:
    """What one case comes to: records, and the trained parameters' values and optimizer state as nested lists."""
    take = {k: v for k, v in settings.items() if k in TAKE}
    run = small_run(model, **{k: v for k, v in settings.items() if k not in TAKE}, **where)
    records = steps(run, judged(24) if settings.get("objective") == "kto" else examples(), 4, **take)
    values = {n: v.flatten().tolist() for n, v in run.engine.state().items()}
    state = {n: {k: float(v.sum()) for k, v in s.items()} for n, s in run.engine.optimizer_state().items()}
    run.engine.destroy()
    return {"records": records, "values": values, "state": state}


def main(model: Path, out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with group(out, world):
        found = {name: case(model, settings, rank=rank, world=world) for name, settings in CASES.items()}
        if rank == 0:
            (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""What a rank is told (`Job`), and what it sets up before the loop: process group, DeepSpeed, model, parts, rows."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ftpipe import slots
from ftpipe.errors import TrainingError
from ftpipe.stages.base import Environment
from ftpipe.train import meeting
from ftpipe.train.batches import Plan, calibration
from ftpipe.train.lifeline import Reporter
from ftpipe.train.objective.base import Example
from ftpipe.train.run import Batch, Run, derive_seed


@dataclass(frozen=True)
class Job:
    """Everything a rank needs to know; plain data, written as JSON.

    model, identity, workspace, base: the base model and the environment that finds it. seed. dtype. zero. world: number of ranks. threads: of each.
    device: cuda or cpu. heartbeat: seconds. parts: adapt, objective, regularizers, optimizer, schedule in YAML form. learning_rate, warmup, clip.
    stop: {epochs|steps|tokens: n}. plan: the fields of `batches.Plan` but lengths and times. tokens: file of the rendered rows. checkpoints: folder.
    checkpoint_every: steps, 0 for none. result: folder to be made. rendezvous: file or tcp://address:port by which ranks find each other. kernels: use those
    of `models.kernels`. diverged: see `loop.Divergence`. offload: optimizer state on the CPU. quantize: method of
    models/quantize in YAML form, None for the base as it is. keep_optimizer: leave the optimizer's state in `result`. calibration: file of the rows
    that the adapter's method looks at before training, if they are not those of training. nodes: the machines that take
    part (id, name, address), each with as many ranks, in their order; empty if it is one. silence, join: see `meeting.Nodes`.
    """

    model: str
    identity: dict[str, str]
    workspace: str
    base: str
    pipeline: str
    seed: int
    dtype: str
    zero: int
    world: int
    threads: int
    device: str
    heartbeat: float
    parts: dict[str, Any]
    learning_rate: float
    warmup: float
    clip: float
    stop: dict[str, int]
    plan: dict[str, Any]
    tokens: str
    checkpoints: str
    checkpoint_every: int
    result: str
    rendezvous: str
    kernels: bool = True
    diverged: float = 0.0
    offload: bool = False
    quantize: dict[str, Any] | None = None
    keep_optimizer: bool = False
    calibration: str = ""
    nodes: list[dict[str, str]] = field(default_factory=list)
    silence: float = 60.0
    join: float = 600.0

    def write(self, path: Path) -> None:
        """Write it so that a reader, who may wait for it on another machine, sees all of it or nothing."""
        meeting.write(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Job:
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    @property
    def env(self) -> Environment:
        return Environment(workspace=Path(self.workspace), base=Path(self.base), pipeline=self.pipeline)

    def part(self, name: str) -> Any:
        """The method object(s) of one part."""
        value = self.parts[name]
        slot = {"regularizers": "regularizer"}.get(name, name)
        return tuple(slots.parse(f"train/{slot}", v) for v in value) if isinstance(value, list) else slots.parse(f"train/{slot}", value)


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group(job: Job, report: Reporter | None = None):
    """torch.distributed and DeepSpeed's view of it, for the length of the block. report: says which machine was lost, if there are several."""
    import datetime

    os.environ["DS_ACCELERATOR"] = job.device
    import torch
    import torch.distributed as dist

    torch.set_num_threads(job.threads)
    if job.device == "cuda":
        if not torch.cuda.is_available():
            raise TrainingError("torch sees no GPU", remedy="set ranks: 1 to train on the CPU, or install a torch that supports this GPU")
        if job.dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
            raise TrainingError("this GPU cannot compute in bfloat16", remedy="set dtype: float32")
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if job.device == "cuda" else "gloo"
    # Longer than the parent waits, so that it is the parent who says which rank is stuck.
    timeout, watch = datetime.timedelta(seconds=2 * job.heartbeat + 60), None
    if job.nodes:
        from ftpipe.train.watch import Watch, store

        shared, ranks = store(job, rank()), job.world // len(job.nodes)
        if rank() % ranks == 0:
            watch = Watch(job, rank() // ranks, report or Reporter())
            watch.start()
        dist.init_process_group(backend, store=shared, rank=rank(), world_size=job.world, timeout=timeout)
    else:
        dist.init_process_group(backend, init_method=f"file://{job.rendezvous}", rank=rank(), world_size=job.world, timeout=timeout)
    deepspeed = import_deepspeed(job.device)
    deepspeed.init_distributed(dist_backend=backend, dist_init_required=False)
    try:
        yield
    finally:
        if sys.exc_info()[0] is None:
            if watch:
                watch.stop()
            dist.destroy_process_group()


def import_deepspeed(device: str) -> Any:
    """DeepSpeed, without what a rank never uses, and nothing is compiled."""
    from ftpipe.models import light

    deepspeed, operators = light.load("deepspeed"), light.load("deepspeed.ops")
    light.load("deepspeed.runtime.zero.muon.muon_optimizer")  # ZeRO's first step imports it, and it marks functions to be compiled
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device == "cpu":
        # It would compile a shared-memory operator for inference, with a compiler that may not be there.
        operators.__dict__["__compatible_ops__"] = {}
    return deepspeed


def prepare(job: Job, report: Reporter, memory: Mapping[str, Any]) -> Run:
    """The run with its model prepared and every part ready, nothing trained yet. `memory`: that of the checkpoint it goes on from."""
    import torch

    from ftpipe.models import kernels, light
    from ftpipe.models.head import split
    from ftpipe.models.loading import load_model, load_tokenizer

    device = f"cuda:{os.environ['LOCAL_RANK']}" if job.device == "cuda" else "cpu"

    quantize: Any = slots.parse("models/quantize", job.quantize) if job.quantize else None

    def load_base() -> torch.nn.Module:
        return load_model(job.model, job.env, dtype=job.dtype, device=device, quantize=quantize).requires_grad_(False)

    def first_rows(n: int) -> list[Batch]:
        rows = await_rows(Path(job.tokens), report)
        rows = Rows(Path(job.calibration)) if job.calibration else rows
        report.alive(f"looking at {n} rows before training")
        return calibration(plan_of(job, rows), rows, n, device)

    report.alive("loading the model")
    run = Run(model=None, load_base=load_base, identity=job.identity, load_tokenizer=lambda: load_tokenizer(job.model, job.env), rank=rank(), world=job.world,
              device=device, dtype=job.dtype, zero=job.zero, offload=job.offload, seed=job.seed, adapt=job.part("adapt"), objective=job.part("objective"),
              regularizers=job.part("regularizers"), optimizer=job.part("optimizer"), calibration=first_rows, alive=report.alive, memory=dict(memory),
              quantize=quantize)
    base = load_base()
    report.alive("preparing the model")
    if "peft" in type(run.adapt).libraries:
        light.load("peft")
    torch.manual_seed(derive_seed(job.seed, "start"))
    run.model = run.adapt.prepare(base, run).to(device)
    if job.kernels:
        kernels.install(run.model, parameters_whole=job.zero < 3)
    run.model.train()
    with run.autocast():
        split(run.model)  # found out now, while parameters are whole
    for regularizer in run.regularizers:
        regularizer.prepare(run)
    run.objective.prepare(run)
    return run


class Rows:
    """The rendered rows, read from the file that the parent writes; token ids are not read before they are asked for.

    lengths, times: of each row, by number. sources: names of where rows come from; source_of: row_id -> number of its source.
    """

    def __init__(self, path: Path):
        import pyarrow as pa

        self.table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        self.lengths: list[int] = self.table["tokens"].to_pylist()
        self.times: list[int] = self.table["times"].to_pylist()
        sources = self.table["source"].dictionary_encode().combine_chunks()
        self.sources: list[str] = sources.dictionary.to_pylist()
        self.source_of: dict[str, int] = dict(zip(self.table["row_id"].to_pylist(), sources.indices.to_pylist()))

    def ids(self, rows: Sequence[int]) -> list[str]:
        """The row ids of the rows of these numbers."""
        return [self.table["row_id"][row].as_py() for row in rows]

    def examples(self, rows: Sequence[int]) -> list[Example]:
        """The rows of these numbers as examples."""
        found = []
        for row in rows:
            ids, trained = self.table["input_ids"][row].as_py(), self.table["trained"][row].as_py()
            found.append(Example(self.table["row_id"][row].as_py(), tuple(ids), tuple(trained)))
        return found


def write_rows(path: Path, examples: Sequence[Example], times: Sequence[int], sources: Sequence[str] | None = None) -> None:
    """Write rendered rows for `Rows`, in one move. sources: where each row comes from."""
    import pyarrow as pa

    table = pa.table({
        "row_id": pa.array([e.row_id for e in examples], pa.string()),
        "times": pa.array(times, pa.int32()),
        "source": pa.array(sources or [""] * len(examples), pa.string()),
        "tokens": pa.array([e.tokens for e in examples], pa.int64()),
        "targets": pa.array([e.targets for e in examples], pa.int64()),
        "input_ids": pa.array([[list(s) for s in e.input_ids] for e in examples], pa.list_(pa.list_(pa.int32()))),
        "trained": pa.array([[list(s) for s in e.trained] for e in examples], pa.list_(pa.list_(pa.bool_()))),
    })
    temporary = path.with_name(path.name + ".tmp")
    with pa.OSFile(str(temporary), "wb") as f, pa.ipc.new_file(f, table.schema) as writer:
        writer.write_table(table)
    os.replace(temporary, path)


def await_rows(path: Path, report: Reporter) -> Rows:
    """The rows, as soon as the parent has rendered them; libraries and model were loaded meanwhile."""
    report.alive("waiting for the rows to be rendered")
    said = time.monotonic()
    while not path.exists():
        time.sleep(0.02)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            report.alive("waiting for the rows to be rendered")
    return Rows(path)


def plan_of(job: Job, rows: Rows, lanes: int = 1) -> Plan:
    """The plan of the job's steps over these rows. lanes: micro-batches that a rank computes at the same time, which share `batch_tokens`."""
    each = {"batch_tokens": max(1, job.plan["batch_tokens"] // lanes), "lanes": lanes * job.world if lanes > 1 else 1}
    return Plan(lengths=rows.lengths, times=rows.times, seed=job.seed, **job.plan | each)

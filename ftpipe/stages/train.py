"""Train: DeepSpeed ZeRO ranks under supervision, any adapter, any objective, one adapter as the result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from ftpipe.artifacts import Artifact
from ftpipe.errors import ConfigError, DataError
from ftpipe.slots import Method, choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext
from ftpipe.train import launch as launching
from ftpipe.train.adapt.base import Adapt
from ftpipe.train.adapt.lora import Lora
from ftpipe.train.meeting import Nodes
from ftpipe.train.objective.sft import Sft
from ftpipe.train.optimizer.adamw import Adamw
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.schedule.linear import Linear
from ftpipe.train.setup import Job

ENDS = ("epochs", "steps", "tokens", "seconds")
"""The settings that say when training ends."""
CPU_TOKENS, GPU_TOKENS, ROWS_PER_STEP = 1280, 4096, 16


class Train(Stage):
    """Trains an adapter on the rows of one split of another stage."""

    produces: ClassVar[str] = "adapter"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers", "tokenizers", "peft", "deepspeed", "safetensors")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.loop",)
    # The loop runs in other processes, so nothing here imports it.

    rows: Ref = Field(description="Stage whose rows are trained on.")
    model: str = Field(default="", description="Base model; the pipeline's if not set.")
    seed: int | None = Field(default=None, description="Seed of initialisation, order and dropout; the pipeline's if not set.")
    quantize: choose("models/quantize") | None = Field(  # type: ignore[valid-type]
        default=None, description="Keep the frozen base in few bits while an adapter trains beside it, such as `nf4` (QLoRA); the base as it is if not set. "
        "The adapter then belongs to the quantised base.")
    adapt: choose("train/adapt") = Field(default=Lora(), description="What trains and where it starts, such as `lora: {r: 16}`.")
    objective: choose("train/objective") = Field(default=Sft(), description="What is minimised.")
    regularizers: list[choose("train/regularizer")] = Field(default=[], description="Terms added to the objective.")
    optimizer: choose("train/optimizer") = Field(default=Adamw(), description="How a step is taken.")
    schedule: choose("train/schedule") = Field(default=Linear(), description="How the learning rate changes.")
    learning_rate: float = Field(default=2e-4, ge=0, description="Peak learning rate; 0 trains nothing, on purpose.")
    warmup: float = Field(default=0.03, ge=0, lt=1, description="Share of the steps in which the learning rate climbs to its peak.")
    epochs: int | None = Field(default=None, ge=1, description="Passes over the rows. One of epochs, steps, tokens and seconds is set, or none: 1 epoch.")
    steps: int | None = Field(default=None, ge=1, description="Optimizer steps.")
    tokens: int | None = Field(default=None, ge=1, description="Tokens to see (prompts included); the step that would pass it is not taken.")
    seconds: float | None = Field(default=None, gt=0, description="Seconds of steps, on the machine that trains: a short trial finds how many steps those are, "
                                  "and the training is then the one that so many `steps` are. The number is in `train.json` and in the notes.")
    rows_per_step: int | None = Field(default=None, ge=1, description="Rows in one optimizer step, over all ranks; 16 if tokens_per_step is not set either.")
    tokens_per_step: int | None = Field(default=None, ge=1, description="Most tokens in one optimizer step, over all ranks.")
    batch_tokens: int | None = Field(default=None, ge=1, description="Most tokens in one micro-batch: memory against speed, without effect on what is learnt. "
                                     "1280 on a CPU, 4096 on a GPU if not set. On a CPU two that share it may be computed side by side.")
    max_tokens: int | None = Field(default=None, ge=2, description="Longer rows are left out, with that reason; the model's context if not set.")
    shuffle: bool = Field(default=True, description="Draw the order of each epoch anew; false keeps the order of the rows.")
    packing: bool = Field(default=True, description="Let rows share a sequence (they do not see each other); false gives each its own.")
    ranks: int | Literal["auto"] = Field(default="auto", description="Processes that train together on each machine; auto: one for each GPU, or one on a CPU.")
    nodes: Nodes | None = Field(default=None, description="Other machines that train too, such as `{count: 2}`; this one alone if not set.")
    zero: Literal[0, 1, 2, 3] = Field(default=2, description="DeepSpeed ZeRO stage: what is spread over the ranks (1 optimizer state, 2 and gradients, 3 and "
                                      "parameters).")
    offload: Literal["none", "optimizer"] = Field(default="none", description="What is kept in the memory of the CPU beside a GPU: `optimizer` is its state, "
                                                  "the float32 masters and their gradients (ZeRO stages 1 and 2).")
    dtype: Literal["bfloat16", "float32"] = Field(default="bfloat16", description="Type of frozen weights and of computing; what trains is float32.")
    kernels: bool = Field(default=True, description="Compute attention, LoRA and feed-forward layers by ftpipe's faster functions where they apply; "
                          "false leaves all to torch, transformers and PEFT. The results differ by rounding.")
    clip: float = Field(default=1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    diverged: float = Field(default=2.0, ge=0, description="Stop when the loss climbs to this many times its lowest (means over 8 steps), plus one nat; "
                            "0 goes on whatever happens.")
    checkpoint_every: int = Field(default=50, ge=0, description="Steps between checkpoints; 0 writes none.")
    retrain: float = Field(default=0.0, ge=0, lt=1, description="Keep the last adapter as long as no larger share of the rows has changed since it was trained "
                           "(rows that came or went, of all in either set); 0 trains at any change.")
    share_devices: bool = Field(default=False, description="Train on GPUs that other trainings of this machine use too; otherwise wait until they are free.")
    keep_optimizer: bool = Field(default=False, description="Keep the optimizer's state at the end of training beside the adapter (`optimizer.safetensors`), "
                                 "for selections that ask what a row's next update would be, such as `less`.")
    heartbeat: float = Field(default=600, gt=0, description="Seconds of silence after which a rank counts as stuck.")

    @model_validator(mode="after")
    def _choices(self) -> Train:
        ends = [n for n in ENDS if getattr(self, n) is not None]
        if len(ends) > 1:
            raise ValueError(f"set one of {', '.join(ENDS[:-1])} and {ENDS[-1]}, not {' and '.join(ends)}")
        if self.rows_per_step and self.tokens_per_step:
            raise ValueError("set one of rows_per_step and tokens_per_step")
        if self.ranks != "auto" and self.ranks < 1:
            raise ValueError("ranks must be 1 or more, or auto")
        if self.batch_tokens and self.tokens_per_step and self.batch_tokens > self.tokens_per_step:
            raise ValueError("batch_tokens is one micro-batch of a step, so it cannot be more than tokens_per_step")
        return self

    def key_fields(self) -> dict[str, Any]:
        # How the work is spread changes a result by rounding at most; when checkpoints are written changes nothing.
        return self.model_dump(mode="json", exclude={"ranks", "nodes", "zero", "offload", "checkpoint_every", "heartbeat", "diverged", "retrain",
                                                     "share_devices"})

    def good_enough(self, last: Artifact, inputs: dict[str, Artifact], env: Environment) -> str | None:
        if not self.retrain:
            return None
        import pyarrow.parquet as pq

        from ftpipe.artifacts import DECISIONS
        from ftpipe.data.forgotten import forgotten
        from ftpipe.data.rows import RowSet

        had = set(pq.read_table(last.file(DECISIONS), columns=["row_id"])["row_id"].to_pylist())
        if any(row.partition("~")[0] in had for row in forgotten(env.workspace)):
            return None
        now = set(RowSet(inputs[self.rows]).table(columns=["row_id"])["row_id"].to_pylist())
        moved = len(had ^ now) / max(len(had | now), 1)
        return f"{moved:.1%} of the rows changed, and retrain is {self.retrain:.0%}" if moved <= self.retrain else None

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        return {"model": identity(self.model, env)}

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        if not self.model:
            raise ConfigError("no base model is named", remedy="set `model:` at the top of the file or in this stage")
        gpus, ranks = launching.devices(), self._ranks()
        if gpus and ranks > gpus:
            raise ConfigError(f"{ranks} ranks, but {gpus} GPUs", remedy=f"set ranks to {gpus} or less, or to auto")
        if not gpus and ranks > 4 * launching.cores():
            raise ConfigError(f"{ranks} ranks on {launching.cores()} processors would take turns", remedy=f"set ranks to {launching.cores()} or less")
        if self.nodes and (self.nodes.least or 1) > self.nodes.count:
            raise ConfigError(f"at least {self.nodes.least} of {self.nodes.count} machines", where="nodes", remedy="set least to count or less")
        if self.nodes and self.seconds:
            raise ConfigError("seconds are found by a trial on this machine alone, and nodes are set", remedy="set steps, tokens or epochs, or leave nodes out")
        if self.zero == 3 and ranks == 1 and not self.nodes:
            raise ConfigError("ZeRO stage 3 spreads the parameters over ranks, and there is one rank", remedy="set ranks to 2 or more, or zero to 2")
        if self.offload == "optimizer" and self.zero not in (1, 2):
            raise ConfigError(f"the optimizer is offloaded under ZeRO stages 1 and 2, and zero is {self.zero}", remedy="set zero to 1 or 2, or offload: none")
        parts = (self.adapt, *self.regularizers, self.optimizer, *([self.quantize] if self.quantize else []))
        for method in parts:
            if self.zero not in type(method).zero_stages:
                common = [z for z in (0, 1, 2, 3) if all(z in type(m).zero_stages for m in parts)]
                raise ConfigError(f"{method.name()} does not work under ZeRO stage {self.zero}",
                                  remedy=f"set zero to {' or '.join(map(str, common))}" if common else "these methods have no ZeRO stage in common")
        for method in (*self.regularizers, self.optimizer):
            method.check(self)
        self._check_base(env)
        for field, name in (("rows", self.rows), (f"{self.adapt.name()}'s calibration", self.adapt.looks_at() or "")):
            source = pipeline.get(name)
            if source is not None and source.produces not in ("rows", ""):
                raise ConfigError(f"{field} names {name!r}, which makes {source.produces}, not rows", remedy="name a stage that passes rows on")

    def act_on_gradients(self) -> list[Method]:
        """The parts that read or change gradients between backward and update, in the order in which they do."""
        parts = [(self.adapt, Adapt), *((r, Regularizer) for r in self.regularizers)]
        return [part for part, base in parts if type(part).on_gradients is not base.on_gradients]

    def _check_base(self, env: Environment) -> None:
        """A base in few bits: one that its files say is quantised is not trained on, and not every method trains beside one."""
        from ftpipe.models.loading import quantized_on_disk

        if already := quantized_on_disk(self.model, env):
            raise ConfigError(f"the model {self.model!r} is stored quantised, by {already}; training beside such weights is not served",
                              remedy="name the model with whole weights, and set `quantize: nf4` to train beside 4-bit weights made of them")
        if self.quantize is None:
            return
        self.quantize.ready()
        if not self.adapt.trains_beside(self.quantize.name()):
            raise ConfigError(f"{self.adapt.name()}, with these settings, does not train on a base quantised by {self.quantize.name()}",
                              remedy="leave `quantize` out, or use `adapt: lora`")

    def _ranks(self) -> int:
        return max(1, launching.devices()) if self.ranks == "auto" else self.ranks

    def run(self, ctx: StageContext) -> None:
        from ftpipe.data.rows import RowSet
        from ftpipe.train import outcome, rendering, trial

        identity = self.externals(ctx.env)["model"]
        table = RowSet(ctx.inputs[self.rows]).table()
        if table.num_rows == 0:
            raise DataError("there are no rows to train on", where=f"stage {self.rows}", remedy=f"see what dropped them: `ftpipe log {self.rows}`")
        job = self._job(ctx, identity)

        def render() -> None:
            rendering.render(self, ctx, table, Path(job.tokens))

        if self.seconds:
            ctx.notes["budget"] = found = trial.steps_within(self.seconds, job, ctx, render, share=self.share_devices)
            job = replace(job, stop={"steps": found["steps"]})
        heard = outcome.Heard(ctx)
        if not Path(job.result).is_dir():
            if job.device == "cpu" and job.world > launching.cores():
                ctx.log.warning("%d ranks share %d processors", job.world, launching.cores())
            launching.launch(job, ctx.work, hear=heard, log=ctx.log.info, render=render, share=self.share_devices, nodes=self.nodes)
        outcome.finish(self, ctx, job, table, heard)

    def _job(self, ctx: StageContext, identity: dict[str, str]) -> Job:
        from ftpipe.train import rendering

        ranks, device = self._ranks(), "cuda" if launching.devices() else "cpu"
        ends = {n: getattr(self, n) for n in ENDS[:-1] if getattr(self, n) is not None} or {"epochs": 1}  # `seconds` become steps in `run`
        plan = {"batch_tokens": self.batch_tokens or (GPU_TOKENS if device == "cuda" else CPU_TOKENS), "tokens_per_step": self.tokens_per_step,
                "rows_per_step": self.rows_per_step or (None if self.tokens_per_step else ROWS_PER_STEP), "shuffle": self.shuffle,
                "alone": not self.packing or not type(self.adapt).packs}
        parts = {n: getattr(self, n).dump() for n in ("adapt", "objective", "optimizer", "schedule")} | {"regularizers": [r.dump() for r in self.regularizers]}
        return Job(model=self.model, identity=identity, quantize=self.quantize.dump() if self.quantize else None, workspace=str(ctx.env.workspace),
                   base=str(ctx.env.base), pipeline=ctx.env.pipeline, seed=self.seed or 0,
                   dtype=self.dtype, zero=self.zero, world=ranks, threads=launching.threads(ranks), device=device, heartbeat=self.heartbeat, parts=parts,
                   learning_rate=self.learning_rate, warmup=self.warmup, clip=self.clip, stop=ends, plan=plan, tokens=str(ctx.work / "tokens.arrow"),
                   checkpoints=str(ctx.work / "checkpoints"), checkpoint_every=self.checkpoint_every, result=str(ctx.work / "result"), rendezvous="",
                   calibration=str(ctx.work / rendering.CALIBRATION) if self.adapt.looks_at() else "", offload=self.offload == "optimizer",
                   kernels=self.kernels, diverged=self.diverged, keep_optimizer=self.keep_optimizer)

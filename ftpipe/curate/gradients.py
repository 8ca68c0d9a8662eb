"""Projected gradients of rows: how each row pulls at the LoRA parameters of an adapter. Kept in the workspace's cache, as scores are.

Only rows whose gradient is not known are computed, one at a time, so that on a CPU a row's gradient is the same bits whatever rows are beside it. Finished ones
are flushed every few seconds: a killed run goes on from there, and another target or budget needs no new ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest, file_digest
from ftpipe.curate.step import StepContext
from ftpipe.data.rows import RowSet
from ftpipe.errors import ConfigError
from ftpipe.models.loading import DType, default_device, identity
from ftpipe.models.scores import CODE, FLUSH_SECONDS, Cache, Entry

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ftpipe.artifacts import Artifact
    from ftpipe.data.render import Rendered
    from ftpipe.models.service import ModelService

OPTIMIZER = "optimizer.safetensors"
"""File in the artifact of a train stage with `keep_optimizer`: `<parameter>/<key>` of the optimizer's state."""
CHUNK_FLOATS = 2**25
"""Numbers of gradients in memory at once."""
WHOLE = 2**20
"""Numbers that a gradient which is not projected is taken to have."""
COLUMNS = ["content_id", "format", "messages", "chosen", "rejected", "text"]
OWN_CODE = ("curate/gradients.py", "train/forward.py", "train/batches.py")


@dataclass(frozen=True)
class Sketch:
    """A count sketch of vectors of D numbers: coordinate i is added, with the random sign `sign[i]`, to the random place `place[i]` of `dimensions` numbers.

    <Sx, Sy> is <x, y> without bias, with the variance (|x|^2 |y|^2 + <x, y>^2 - 2 sum x_i^2 y_i^2) / dimensions, that of a dense matrix of random signs;
    it takes D operations instead of D times `dimensions`, and 5 D bytes.
    """

    place: np.ndarray
    sign: np.ndarray
    dimensions: int

    @classmethod
    def draw(cls, length: int, dimensions: int, seed: int) -> Sketch:
        import numpy as np

        generator = np.random.Generator(np.random.PCG64(seed))
        place = generator.integers(dimensions, size=length, dtype=np.int32)
        return cls(place, generator.integers(2, size=length, dtype=np.int8) * 2 - 1, dimensions)

    def __call__(self, vector: np.ndarray) -> np.ndarray:
        """(dimensions,) float64 from (D,)."""
        import numpy as np

        return np.bincount(self.place, weights=vector * self.sign, minlength=self.dimensions)


@dataclass(frozen=True)
class AdamState:
    """Adam's means of gradients and of their squares, laid out as the gradients are, (D,) float32; steps taken, and its settings."""

    mean: np.ndarray
    square: np.ndarray
    step: int
    beta1: float
    beta2: float
    eps: float

    def update(self, gradient: np.ndarray) -> np.ndarray:
        """The next update for this gradient without the learning rate and its sign: m / (sqrt(v) + eps), both corrected for their start at zero."""
        import numpy as np

        after = self.step + 1
        mean = (self.beta1 * self.mean + (1 - self.beta1) * gradient) / (1 - self.beta1 ** after)
        square = (self.beta2 * self.square + (1 - self.beta2) * gradient ** 2) / (1 - self.beta2 ** after)
        return mean / (np.sqrt(square) + self.eps)


class RowGradients:
    """Gradients of rows' mean token loss with respect to the LoRA parameters of an adapter, projected.

    Args:
        model: base model as the configuration names it. adapter: artifact of a stage that made a LoRA adapter.
        dimensions: numbers a gradient is projected to (`Sketch`); 0 keeps it whole. seed: of the projection.
        dtype: of the forward pass; parameters and gradients are float32. max_length: tokens a row is cut to, the model's context by default.
    """

    def __init__(self, ctx: StepContext, *, model: str, adapter: Artifact, dimensions: int, seed: int, dtype: DType = "bfloat16",
                 max_length: int | None = None):
        self.ctx, self.model, self.adapter = ctx, model, adapter
        self.dimensions, self.seed, self.dtype, self.max_length = dimensions, seed, dtype, max_length

    @cached_property
    def service(self) -> ModelService:
        """The model with the adapter on it; what is no LoRA parameter is frozen."""
        from ftpipe.models.service import ModelService

        service = ModelService.open(self.model, self.ctx.env, adapter=self.adapter.file("adapter"), dtype=self.dtype, max_length=self.max_length)
        service.model.requires_grad_(False)
        for name, parameter in service.model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        return service

    @cached_property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The LoRA parameters by name, in the order in which a gradient holds them. Raises ConfigError for an adapter without any."""
        found = {n: p for n, p in sorted(self.service.model.named_parameters()) if p.requires_grad}
        if not found:
            raise ConfigError(f"the adapter of {self.adapter.name} has no LoRA parameters, whose gradients are asked for", where=self.ctx.name,
                              remedy="name a train stage with `adapt: lora`")
        return found

    @cached_property
    def sketch(self) -> Sketch | None:
        return Sketch.draw(sum(p.numel() for p in self.parameters.values()), self.dimensions, self.seed) if self.dimensions else None

    @cached_property
    def state(self) -> AdamState:
        """AdamW's state at the end of training. Raises ConfigError if it was not kept, or is not of these parameters."""
        import numpy as np
        from safetensors.numpy import load_file

        settings, kept = adamw_settings(self.adapter, self.ctx.name), load_file(self.adapter.file(OPTIMIZER))
        wanted = {n: (f"{n}/exp_avg", f"{n}/exp_avg_sq", f"{n}/step") for n in self.parameters}
        if any(k not in kept for keys in wanted.values() for k in keys):
            raise _stateless("the state of the optimizer is not of the adapter's parameters", self.adapter, self.ctx.name)
        flat = [np.concatenate([kept[keys[i]].ravel() for keys in wanted.values()]) for i in (0, 1)]
        step = int(max(float(kept[keys[2]]) for keys in wanted.values()))
        return AdamState(*flat, step, settings["beta1"], settings["beta2"], settings["eps"])

    def whole(self, row: Rendered) -> np.ndarray | None:
        """(D,) float32: the gradient of the mean loss of the row's trained tokens, in nats; None without such a token."""
        import numpy as np
        import torch

        from ftpipe.train.batches import lay_out
        from ftpipe.train.forward import token_losses
        from ftpipe.train.objective.base import Example

        service, size = self.service, self.service.max_length
        batch = lay_out([Example("", (row.input_ids[:size],), (row.trained[:size],))], 1.0, service.device)
        if not batch.targets.numel():
            return None
        parameters = list(self.parameters.values())
        half = any(p.dtype == torch.bfloat16 for p in service.model.parameters())
        with torch.enable_grad():
            with torch.autocast(service.device.type, torch.bfloat16, enabled=half):
                loss = token_losses(service.model, batch).mean()
            gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return np.concatenate([g.float().cpu().numpy().ravel() for g in gradients])

    def vector(self, row: Rendered, adam: bool) -> np.ndarray | None:
        """What is kept of a row, float32: its gradient, with `adam` the update that Adam would make of it, projected."""
        import numpy as np

        found = self.whole(row)
        if found is None:
            return None
        found = self.state.update(found) if adam else found
        return np.asarray(found if self.sketch is None else self.sketch(found), dtype=np.float32)

    def of(self, rows: RowSet, split: str, *, adam: bool = False) -> Iterator[tuple[list[str], list[np.ndarray | None]]]:
        """Different contents of the rows, ascending, and the vector of each (None for one without a gradient), so many at a time as fit in memory."""
        import pyarrow as pa

        table = rows.table(split, COLUMNS).sort_by("content_id")
        ids = table["content_id"].to_pylist()
        table = table.filter(pa.array([i == 0 or ids[i - 1] != c for i, c in enumerate(ids)], pa.bool_()))
        cache = Cache(self._folder(adam))
        chunk = max(1, CHUNK_FLOATS // (self.dimensions or WHOLE))
        for start in range(0, table.num_rows, chunk):
            part = table.slice(start, chunk)
            contents = part["content_id"].to_pylist()
            known = cache.read(contents, ("embedding",))
            missing = part.filter(pa.array([c not in known for c in contents], pa.bool_()))
            self.ctx.notes["gradients"] = self.ctx.notes.get("gradients", 0) + missing.num_rows
            if missing.num_rows:
                self._compute(missing.to_pylist(), cache, known, adam, start, table.num_rows)
            yield contents, [known[c].embedding for c in contents]

    def _compute(self, rows: list[dict[str, Any]], cache: Cache, known: dict[str, Entry], adam: bool, before: int, total: int) -> None:
        written: dict[str, Entry] = {}
        last = time.monotonic()
        try:
            for i, (row, rendered) in enumerate(zip(rows, self.service.renderer.rows(rows))):
                vector = None if isinstance(rendered, Exception) else self.vector(rendered, adam)
                problem = None if vector is not None else getattr(rendered, "reason", "nothing is trained on")
                entry = Entry(problem=problem, embedding=vector)
                written[row["content_id"]] = known[row["content_id"]] = entry
                cache.pending.append((row["content_id"], entry))
                self.ctx.progress(before + i + 1, total, "gradients")
                if time.monotonic() - last >= FLUSH_SECONDS:
                    cache.flush()
                    last = time.monotonic()
        except BaseException:
            cache.flush()  # a stopped run keeps what it had found
            raise
        cache.close(written)

    def _folder(self, adam: bool) -> Path:
        package = Path(__file__).parent.parent
        files = [f for n in (*CODE, *OWN_CODE) for f in sorted((package / n).glob("*.py")) or [package / n]]
        base = {k: v for k, v in identity(self.model, self.ctx.env).items() if k in ("weights", "config", "tokenizer", "chat_template")}
        material = {"base": base, "adapter": self.adapter.content, "dtype": self.dtype, "max_length": self.max_length, "device": default_device(),
                    "dimensions": self.dimensions, "seed": self.seed, "adam": adam,
                    "code": {str(f.relative_to(package)): file_digest(f) for f in files},
                    "libraries": {n: version(n) for n in ("torch", "transformers", "tokenizers", "peft", "numpy")}}
        return self.ctx.env.cache / "gradients" / digest(material)[:32]


def has_state(adapter: Artifact) -> bool:
    """Whether the optimizer's state was kept beside an adapter."""
    return adapter.has(OPTIMIZER)


def adamw_settings(adapter: Artifact, where: str) -> dict[str, float]:
    """The settings of AdamW in an adapter's training. Raises ConfigError if another optimizer trained it, or its state was not kept."""
    if not has_state(adapter):
        raise _stateless("the state of the optimizer is not there", adapter, where)
    settings = adapter.json("train.json")["settings"]["optimizer"].get("adamw")
    if settings is None:
        raise _stateless("the state of the optimizer is not that of AdamW", adapter, where)
    return settings


def _stateless(what: str, adapter: Artifact, where: str) -> ConfigError:
    return ConfigError(what, where=f"{where}: {adapter.name}",
                       remedy="train it with `keep_optimizer: true`, `adapt: lora` and `optimizer: adamw`, or set adam: false")


def learning_rate(adapter: Artifact) -> float | None:
    """Mean learning rate over the last epoch of an adapter's training; None for one that no training stage made."""
    if not adapter.has("metrics.parquet"):
        return None
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    metrics = pq.read_table(adapter.file("metrics.parquet"), columns=["epoch", "learning_rate"])
    return float(pc.mean(metrics.filter(pc.equal(metrics["epoch"], pc.max(metrics["epoch"])))["learning_rate"]).as_py())

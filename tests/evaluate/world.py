"""A small world with planted truth: a base model that knows a little English, rows in a made-up format, and adapters of known worth.

    good      learnt the rows, and went on seeing prose: better on held-out rows, as good as the base on prose
    zero      LoRA as it starts: exactly the base model
    forgets   learnt the rows with far too high a rate: better on held-out rows, much worse on prose
    worse     pushed away from the rows
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ftpipe.errors import ConfigError
from ftpipe.stages.base import Environment, Stage, StageContext
from tests.artifacts import chat, complete

CONTEXT = 512


@dataclass(frozen=True)
class World:
    """Folders of the base model and of each adapter by name, and the rows (train and held-out) as plain dicts."""

    model: Path
    adapters: dict[str, Path]
    rows: list[dict[str, Any]]


def planted_rows(count: int = 24) -> list[dict[str, Any]]:
    """Questions for a number in a fixed format; every third is held out, four to a group."""
    rows = []
    for i in range(count):
        answer = f"<{(i * 37) % 100:02d}|{(i * 53) % 100:02d}|{(i * 71) % 100:02d}> ok"
        rows.append(chat(f"code {i % 7}?", answer, group=f"module{i // 4}", split="heldout" if i % 3 == 0 else "train"))
    return complete(rows)


def make_world(folder: Path) -> World:
    """Train the base and the adapters; about ten seconds on one core."""
    import torch

    from ftpipe.data.render import Renderer
    from ftpipe.evaluate.suites.general_text import OWN
    from ftpipe.models.loading import identity, load_model, load_tokenizer
    from tests.tiny import make_tiny_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = Environment(folder / "scratch", folder, "world")
    model = make_tiny_model(folder / "model", context=CONTEXT)
    tokenizer = load_tokenizer(str(model), env)
    prose = [tokenizer(json.loads(line)["text"])["input_ids"] for line in OWN.read_text().splitlines()]
    base = load_model(str(model), env, dtype="float32")
    fit(base, [(ids, [True] * len(ids)) for ids in prose], steps=60, rate=1e-2)
    base.save_pretrained(model)
    rows = planted_rows()
    shown = list(Renderer(tokenizer).rows([r for r in rows if r["split"] == "train"]))
    task, general = [(r.input_ids, r.trained) for r in shown], [(ids, [True] * len(ids)) for ids in prose]
    who = identity(str(model), env)
    made = {}
    for name, (data, steps, rate) in {"zero": ([], 0, 0), "good": (task + general, 80, 1e-2), "forgets": (task, 80, 8e-2), "worse": (task, 10, -2e-2)}.items():
        made[name] = _adapter(folder / name, load_model(str(model), env, dtype="float32"), who, data, steps, rate)
    return World(model, made, rows)


def fit(model: Any, data: list[tuple[list[int], list[bool]]], *, steps: int, rate: float) -> None:
    """Plain Adam on random batches of eight sequences; a negative rate climbs."""
    import torch

    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=abs(rate), maximize=rate < 0)
    model.train()
    for _ in range(steps):
        batch = [data[i] for i in torch.randint(len(data), (8,), generator=generator)]
        width = min(96, max(len(ids) for ids, _ in batch))
        ids = torch.tensor([(i + [0] * width)[:width] for i, _ in batch])
        labels = torch.tensor([[t if on else -100 for t, on in zip(i, trained)][:width] + [-100] * (width - len(i)) for i, trained in batch])
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def _adapter(folder: Path, base: Any, who: dict[str, str], data: list, steps: int, rate: float) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file

    from ftpipe.train.adapt.lora import Lora

    folder.mkdir()
    torch.manual_seed(3)
    wrapped = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    if steps:
        fit(wrapped, data, steps=steps, rate=rate)
    wrapped.eval()
    state = {n: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad}
    (folder / "adapter").mkdir()
    Lora(r=4, alpha=8).save(wrapped, state, folder / "adapter")
    facts = {"method": Lora(r=4, alpha=8).dump(), "base": who, "tokenizer": who["tokenizer"], "chat_template": who["chat_template"], "dtype": "float32",
             "trainable": sum(p.numel() for p in state.values())}
    (folder / "adapter" / "ftpipe_adapter.json").write_text(json.dumps(facts, sort_keys=True))
    ids = torch.randint(3, 200, (3, 12), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        logits = wrapped(input_ids=ids).logits[:, -1].float().contiguous()
    save_file({"input_ids": ids, "logits": logits}, folder / "probe.safetensors")
    return folder


class PlantedRows(Stage):
    """The world's rows, from a JSON file."""

    method_name = "planted_rows"
    produces = "rows"
    path: str

    def externals(self, env: Environment) -> dict[str, Any]:
        return {"rows": hashlib.sha256(env.path(self.path).read_bytes()).hexdigest()}

    def run(self, ctx: StageContext) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from ftpipe.data.rows import rows_schema

        rows = json.loads(ctx.env.path(self.path).read_text())
        pq.write_table(pa.Table.from_pylist(rows, schema=rows_schema()), ctx.out / "rows.parquet")


class PlantedAdapter(Stage):
    """One of the world's adapters."""

    method_name = "planted_adapter"
    produces = "adapter"
    folder: str

    def externals(self, env: Environment) -> dict[str, Any]:
        if not Path(self.folder).is_dir():
            raise ConfigError("no such adapter", where=self.folder)
        return {}

    def run(self, ctx: StageContext) -> None:
        shutil.copytree(self.folder, ctx.out, dirs_exist_ok=True)


def install(monkeypatch: Any) -> None:
    """Offer the two planted kinds of stage for the length of a test."""
    import ftpipe.stages.base as base

    kinds = {cls.method_name: (lambda cls=cls: cls) for cls in (PlantedRows, PlantedAdapter)}
    monkeypatch.setattr(base, "extra_methods", lambda: kinds, raising=False)


def config(world: World, workspace: Path, candidate: str, *, controls: dict[str, str] | None = None, evaluate: dict[str, Any] | None = None,
           gate: dict[str, Any] | None = None, register: dict[str, Any] | None = None) -> dict[str, Any]:
    """A pipeline from planted rows and adapters to the registry; writes the rows beside the workspace."""
    workspace.mkdir(parents=True, exist_ok=True)
    path = workspace.parent / "rows.json"
    path.write_text(json.dumps(world.rows))
    stages: dict[str, Any] = {"rows": {"kind": "planted_rows", "path": str(path)},
                              "adapter": {"kind": "planted_adapter", "folder": str(world.adapters[candidate])}}
    for name, which in (controls or {}).items():
        stages[f"{name}-adapter"] = {"kind": "planted_adapter", "folder": str(world.adapters[which])}
    stages["evaluate"] = {"rows": "rows", "candidate": "adapter", "dtype": "float32", "examples": 2, "max_new_tokens": 8, "resamples": 400,
                          "controls": {name: f"{name}-adapter" for name in controls or {}}} | (evaluate or {})
    stages["gate"] = {"evaluation": "evaluate"} | (gate or {})
    stages["register"] = {"verdict": "gate", "adapter": "adapter", "evaluation": "evaluate"} | (register or {})
    return {"name": "demo", "model": str(world.model), "seed": 3, "workspace": str(workspace), "stages": stages}

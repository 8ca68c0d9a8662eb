"""Rows and a context for the tests of the model service and the score cache."""

from __future__ import annotations

import json
import logging
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ftpipe.artifacts import Artifact
from ftpipe.models.loading import identity, load_model, load_tokenizer
from ftpipe.pipeline.store import Store
from ftpipe.stages.base import Environment, Listener, StageContext
from tests.artifacts import chat, complete

WORDS = ["time", "sort", "file", "path", "list", "read", "write", "open", "close", "send", "text", "name", "value", "key", "line", "row", "set", "map"]


def some_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` different short conversations of different lengths."""
    rng = np.random.default_rng(seed)
    return [chat(f"What does {rng.choice(WORDS)}_{i} do?", " ".join(rng.choice(WORDS, size=int(rng.integers(1, 9))))) for i in range(n)]


def context(workspace: Path, name: str = "test") -> StageContext:
    """A stage context over `workspace`, with a listener that hears nothing."""
    for folder in ("out", "work"):
        (workspace / folder).mkdir(parents=True, exist_ok=True)
    return StageContext(name=name, key="0" * 64, out=workspace / "out", work=workspace / "work", inputs={},
                        env=Environment(workspace, workspace, "test"), log=logging.getLogger("test"), listener=Listener())


def trained_adapter(workspace: Path, model: Path, rows: list[dict[str, Any]], *, steps: int = 60, rate: float = 1e-2, name: str = "reference") -> Artifact:
    """An artifact as a train stage leaves it: LoRA on the answers of `rows`, all rows in each of `steps` steps. Zero steps give the adapter's start."""
    import torch

    from ftpipe.data.render import Renderer
    from ftpipe.train.adapt.lora import Lora

    env = Environment(workspace, workspace, "test")
    base = identity(str(model), env)
    torch.manual_seed(0)
    lora = Lora(r=8, alpha=16)
    network = lora.prepare(load_model(str(model), env, dtype="float32", device="cpu"), SimpleNamespace(identity=base))
    rendered = [r for r in Renderer(load_tokenizer(str(model), env)).rows(complete(rows)) if not isinstance(r, Exception)]
    width = max(len(r.input_ids) for r in rendered)
    tokens = torch.tensor([r.input_ids + [0] * (width - len(r.input_ids)) for r in rendered])
    labels = torch.tensor([[t if m else -100 for t, m in zip(r.input_ids, r.trained)] + [-100] * (width - len(r.input_ids)) for r in rendered])
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        network(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()
    store, key = Store(workspace), uuid.uuid4().hex * 2
    with store.building("train", key) as out:
        (out / "adapter").mkdir()
        lora.save(network, {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}, out / "adapter")
        (out / "adapter" / "ftpipe_adapter.json").write_text(json.dumps({"method": lora.dump(), "base": base}))
        return store.commit(out, kind="train", name=name, key=key, material={}, inputs={}, counts={}, meta={}, notes={})

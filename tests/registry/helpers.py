"""Hand-made artifacts with an adapter in them, and a workspace whose MLflow tables exist already (creating them takes seconds)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.pipeline.store import Store
from ftpipe.registry import register, versions
from ftpipe.stages.base import Environment

BASE = {"model": "tiny", "weights": "w" * 64, "config": "c" * 64, "tokenizer": "t" * 64, "chat_template": "h" * 64}


def environment(workspace: Path) -> Environment:
    return Environment(workspace=workspace, base=workspace, pipeline="demo")


def adapter_artifact(store: Store, seed: int, *, name: str = "adapter", extra: dict[str, Any] | None = None) -> Artifact:
    """An artifact whose `adapter/` holds one small tensor drawn from `seed`; the rest of the payload differs with `extra`."""
    key = hashlib.sha256(f"{name}{seed}{extra}".encode()).hexdigest()
    with store.lock(key, lambda: None):
        return store.find("train", key) or _make(store, key, seed, name, extra)


def _make(store: Store, key: str, seed: int, name: str, extra: dict[str, Any] | None) -> Artifact:
    import numpy as np
    from safetensors.numpy import save_file

    with store.building("train", key) as out:
        (out / "adapter").mkdir()
        save_file({"x": np.random.default_rng(seed).normal(size=(4, 4)).astype("float32")}, out / "adapter" / "adapter_model.safetensors")
        (out / "adapter" / "ftpipe_adapter.json").write_text(json.dumps({"method": {"lora": {"rank": 2}}, "base": BASE, "trainable": 16}))
        (out / "train.json").write_text(json.dumps(extra or {}))
        return store.commit(out, kind="train", name=name, key=key, material={}, inputs={}, counts={"rows_in": 3, "rows_kept": 3}, meta={}, notes={})


def built(env: Environment, name: str, artifact: Artifact, card: str = "# card\n") -> versions.Built:
    return versions.build(env, name, artifact, card, {"base": BASE, "lineage": []})


def registered(env: Environment, seed: int, *, name: str = "demo", beat: str | None = None, **options: Any) -> register.Registration:
    artifact = adapter_artifact(Store(env.workspace), seed)
    return register.register(env, name, built(env, name, artifact), base=BASE, stages={"adapter": artifact.key}, beat=beat, **options)


def content(env: Environment, seed: int) -> str:
    from ftpipe.registry.ledger import adapter_content

    return adapter_content(adapter_artifact(Store(env.workspace), seed))

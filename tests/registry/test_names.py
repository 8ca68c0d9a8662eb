"""What a user may call an adapter: `chat`, `export`, `trace` and the others all understand the same names."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.pipeline.adapters import locate, trained
from ftpipe.pipeline.store import Store
from ftpipe.registry import register
from tests.registry.helpers import BASE, built


def made(env, name: str, *, kind: str = "train", of: Artifact | None = None) -> Artifact:
    """An adapter that the stage `name` made in the latest run, by training unless it is made `of` another."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from safetensors.numpy import save_file

    store, key = Store(env.workspace), name.encode().hex().ljust(64, "0")
    with store.building(kind, key) as out:
        (out / "adapter").mkdir()
        save_file({"x": np.full((2, 2), len(name), np.float32)}, out / "adapter" / "adapter_model.safetensors")
        (out / "adapter" / "ftpipe_adapter.json").write_text(json.dumps({"method": {"lora": {"r": 2}}, "base": BASE, "trainable": 4}))
        if of is None:
            pq.write_table(pa.table({"row_id": [name], "times": [1]}), out / "seen.parquet")
        artifact = store.commit(out, kind=kind, name=name, key=key, material={}, inputs={"a": of} if of else {}, counts={}, meta={}, notes={})
    last = env.workspace / "last" / "demo" / f"{name}.json"
    last.parent.mkdir(parents=True, exist_ok=True)
    last.write_text(json.dumps({"kind": kind, "key": key}))
    return artifact


def test_every_name_leads_to_the_same_files_and_to_the_training_behind_them(env, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    first, second = made(env, "adapter"), made(env, "another")
    merged = made(env, "merged", kind="merge", of=first)
    # The registry calls the second training's adapter as the first one's stage is called.
    register.register(env, "adapter", built(env, "adapter", second), base=BASE, stages={"another": second.key})
    (tmp_path / "another").mkdir()  # a folder that is no adapter hides nothing
    for text, artifact, name in (("adapter", second, "adapter@champion"), ("adapter@1", second, "adapter@1"), ("adapter@last", first, "adapter@last"),
                                 ("another", second, "another"), (first.key[:10], first, first.key[:10]), (str(first.file("adapter")), first, "adapter")):
        found = locate(env.workspace, text)
        assert found.name == name and found.model == "tiny", text
        assert (found.folder / "adapter_model.safetensors").read_bytes() == artifact.file("adapter/adapter_model.safetensors").read_bytes(), text
        assert trained(env.workspace, text).key == artifact.key, text
    assert locate(env.workspace, "merged").folder == merged.file("adapter")
    with pytest.raises(ConfigError, match="merged was not trained but made by merge of adapter"):
        trained(env.workspace, "merged")
    with pytest.raises(ConfigError, match=r"(?s)no adapter is called 'addapter'.*did you mean 'adapter'"):
        trained(env.workspace, "addapter")
    with pytest.raises(ArtifactError, match="no artifact with key"):
        locate(env.workspace, "0123456789")

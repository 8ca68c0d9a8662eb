from __future__ import annotations

from pathlib import Path

import pytest

from tests.evaluate.world import World, _adapter, planted_rows


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """An untrained base, LoRA `good` with random factors and `zero` as it starts: nothing here needs a model that knows anything."""
    import torch
    from safetensors.torch import load_file, save_file

    from ftpipe.models.loading import identity, load_model
    from ftpipe.stages.base import Environment
    from tests.tiny import make_tiny_model

    folder = tmp_path_factory.mktemp("world")
    env = Environment(folder / "scratch", folder, "world")
    model = str(make_tiny_model(folder / "model"))
    who = identity(model, env)
    made = {name: _adapter(folder / name, load_model(model, env, dtype="float32"), who, [], 0, 0) for name in ("good", "zero")}
    file = made["good"] / "adapter" / "adapter_model.safetensors"
    g = torch.Generator().manual_seed(4)
    save_file({n: 0.1 * torch.randn(t.shape, generator=g) if "lora_B" in n else t for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    return World(Path(model), made, planted_rows())


@pytest.fixture
def env(tmp_path: Path):
    from ftpipe.stages.base import Environment

    return Environment(tmp_path, tmp_path, "test")

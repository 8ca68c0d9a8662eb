"""A process group of this one process, as a fixture that several folders of tests use."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory):
    """torch.distributed and DeepSpeed, this process being the only rank. The environment is left as it was."""
    import torch

    from tests.train.small import group

    threads, kept = torch.get_num_threads(), dict(os.environ)
    held = group(tmp_path_factory.mktemp("group"))
    with held:
        set_here = {k: v for k, v in os.environ.items() if kept.get(k) != v}
        yield
    torch.set_num_threads(threads)
    for name in set_here:
        if name in kept:
            os.environ[name] = kept[name]
        else:
            os.environ.pop(name, None)

"""The model that a policy is measured against: the base, as it was before anything was learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ftpipe.train.run import Run


def keep_reference(run: Run) -> None:
    """Load a second base model for an adapter that cannot be switched off. Called in an objective's `prepare`."""
    if run.adapt.without(run.model) is None:
        run.cache[run.objective.name()] = run.load_base()


@contextmanager
def reference(run: Run) -> Iterator[Any]:
    """The reference, in evaluation mode and without gradients: the model with its adapter off, or the second copy."""
    import torch

    with torch.no_grad():
        if (copy := run.cache.get(run.objective.name())) is not None:
            yield copy
            return
        training = run.model.training
        run.model.eval()
        try:
            with run.adapt.without(run.model):
                yield run.model
        finally:
            run.model.train(training)

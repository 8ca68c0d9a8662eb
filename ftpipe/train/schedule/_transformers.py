"""Schedules of transformers as functions of the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def factor_of(name: str, *args: Any, **kwargs: Any) -> Callable[[int], float]:
    """The factor that `transformers.optimization.<name>` applies at a step: its own function, taken from a scheduler over a stand-in parameter."""
    import torch
    from transformers import optimization

    scheduler = getattr(optimization, name)(torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0), *args, **kwargs)
    return scheduler.lr_lambdas[0]

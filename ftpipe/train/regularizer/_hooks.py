"""What disturbances of the forward pass share: the modules to disturb and the part of hidden states that is the rows'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError
from ftpipe.train.run import Batch

if TYPE_CHECKING:
    import torch


def blocks(model: Any) -> torch.nn.ModuleList:
    """The transformer blocks of a model, wrapped by an adapter or not: the first list of modules as long as the configuration has layers."""
    import torch

    config = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = getattr(config, "num_hidden_layers", None)
    for _, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == layers:
            return module
    raise ConfigError(f"no list of {layers} transformer blocks in {type(model).__name__}", remedy="this method needs a decoder whose blocks stand in one list")


@contextmanager
def on_output(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While the block lasts, `module` returns `change(hidden)`; whatever else it returns (caches) stays."""

    def hook(_: Any, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def at_rows(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The part of hidden states [1, T', H] that belongs to the batch's tokens, [T, H]: a method may have put tokens of its own in front."""
    return hidden[0, hidden.shape[1] - batch.tokens:]


def put_back(hidden: torch.Tensor, batch: Batch, changed: torch.Tensor) -> torch.Tensor:
    """`hidden` [1, T', H] with `changed` [T, H] in place of what `at_rows` gave."""
    import torch

    front = hidden.shape[1] - batch.tokens
    changed = changed.to(hidden.dtype)[None]
    return torch.cat([hidden[:, :front], changed], 1) if front else changed

"""The layers of a decoder, found by structure and not by the names that one family of models uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.errors import ConfigError

if TYPE_CHECKING:
    import torch


def blocks(model: torch.nn.Module) -> list[str]:
    """Names of the model's transformer layers in order (`model.layers.0`, `transformer.h.0`, ...). Raises ConfigError if there are none."""
    import torch

    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    # a list inside a layer (experts) is no list of layers
    outer = [(name, module) for name, module in lists if not any(name.startswith(other + ".") for other, _ in lists)]
    if not outer:
        raise ConfigError("the model has no list of layers", remedy="choose another method of train/adapt")
    name, module = max(outer, key=lambda found: sum(1 for _ in found[1].parameters()))
    return [f"{name}.{i}" for i in range(len(module))]


def by_block(model: torch.nn.Module) -> tuple[list[str], list[list[str]]]:
    """Names of the parameters outside the layers (embedding, last norm, head), and those of each layer."""
    layers = [name + "." for name in blocks(model)]
    inside: list[list[str]] = [[] for _ in layers]
    outside = []
    for name, _ in model.named_parameters():
        at = next((i for i, layer in enumerate(layers) if name.startswith(layer)), None)
        (outside if at is None else inside[at]).append(name)
    return outside, inside

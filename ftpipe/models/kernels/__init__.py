"""Faster ways to compute what transformers and PEFT compute: packed attention, cross-entropy, LoRA layers, gated feed-forward layers,
root-mean-square norms.

Each takes the place of the original only where it computes the same, and gives way to the original at every call that it cannot serve. What they round
differs in the last bits.
"""

from __future__ import annotations

from typing import Any


def install(model: Any, *, parameters_whole: bool = True) -> dict[str, int]:
    """Put the kernels into a model, perhaps wrapped by PEFT; returns in how many places each went.

    parameters_whole: False under ZeRO 3, where parameters are there only while the module they belong to is called.
    """
    from ftpipe.models.kernels import attention, layer, lora, native, rms_norm, swiglu

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    first = next(base.parameters())
    if first.device.type == "cpu":
        native.load(first.dtype)
    found = {"attention": attention.install(base), "swiglu": swiglu.install(model)}
    if parameters_whole:
        found |= {"lora": lora.install(model), "rms_norm": rms_norm.install(model)}
        found["layer"] = layer.install(base)
    return found

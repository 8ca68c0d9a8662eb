"""Backbone and output layer of a causal language model, where its logits are nothing but the one applied to the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    import torch

_known: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def split(model: Any) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """(backbone, output layer) of a model, perhaps inside PEFT's wrapper, such that logits = output layer(last hidden state); None if it does more than that.

    Some architectures scale or cap their logits and some adapters put tokens of their own in front. So this is found out on a few tokens, once for each
    model. Under ZeRO 3 it must be asked before the parameters are spread.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if model not in _known:
        _known[model] = _bare(model, base) and _is_plain(model, base)
    return (base.get_decoder(), base.get_output_embeddings()) if _known[model] else None


def _bare(model: Any, base: Any) -> bool:
    """Whether nothing acts between the outermost call and the backbone: a prompt that PEFT puts in front, a hook, a tuner with a forward pass of its own.
    A method that starts as the base model could not be told from one that does nothing by its numbers."""
    if hasattr(model, "prompt_encoder"):
        return False
    tuner = getattr(model, "base_model", None) if model is not base else None
    if tuner is not None and "forward" in type(tuner).__dict__:
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in (model, tuner, base) if m is not None)


def _is_plain(model: Any, base: Any) -> bool:
    import torch

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    tokens = torch.tensor([[(7919 * (i + 1)) % int(model.config.vocab_size) for i in range(8)]], device=device)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            whole = model(input_ids=tokens, use_cache=False).logits.float()
            own = base.get_output_embeddings()(base.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state).float()
    except (AttributeError, TypeError, RuntimeError, ValueError):
        return False
    finally:
        model.train(training)
    return own.shape == whole.shape and bool(torch.allclose(own, whole, rtol=1e-4, atol=1e-4 * whole.abs().max().item()))

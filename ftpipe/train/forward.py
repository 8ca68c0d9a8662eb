"""Forward passes over packed rows. No logits are built for places whose loss nobody reads.

Rows in one sequence are kept apart by position ids alone: transformers finds the borders where they restart, but only if there is no attention
mask and no key-value cache. `check_packing` proves at the start of each run that this holds for the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ftpipe.errors import TrainingError
from ftpipe.train.run import Batch

if TYPE_CHECKING:
    import torch

WHOLE = 2**26
"""Logits up to this many elements are built at once; more are made, and made again for the gradient, chunk by chunk."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest difference of one token's loss, in nats, between packed and alone: rounding stays below, rows that see each other do not."""


def logits(model: torch.nn.Module, batch: Batch, sources: torch.Tensor | None = None) -> torch.Tensor:
    """Logits at `sources` (those of the batch by default): [K, vocabulary]."""
    import torch

    at = batch.sources if sources is None else sources
    if at.numel() == 0:
        at = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
    # Counted from the end, so that a method that puts tokens in front of the sequence does not move them.
    at = at - batch.input_ids.shape[1]
    out = model(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False, logits_to_keep=at)
    return out.logits[0][: batch.sources.numel() if sources is None else sources.numel()]


def token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """-log p of each target, float32 [K]."""
    import torch
    from torch.nn.functional import cross_entropy

    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", 0)
    scaled = any(getattr(config, a, None) for a in ("final_logit_softcapping", "logits_scaling", "logit_scale"))
    if batch.targets.numel() * vocabulary <= WHOLE or scaled:
        return cross_entropy(logits(model, batch).float(), batch.targets, reduction="none")
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone, head = getattr(causal, causal.base_model_prefix), causal.get_output_embeddings()
    hidden = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False).last_hidden_state[0]

    def losses(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(h).float(), t, reduction="none")

    size = max(1, WHOLE // vocabulary)
    parts = [torch.utils.checkpoint.checkpoint(losses, hidden[s], t, use_reentrant=False)
             for s, t in zip(batch.sources.split(size), batch.targets.split(size), strict=True)]
    return torch.cat(parts)


def check_packing(model: Any, batch: Batch, singles: Sequence[Batch], dtype: str) -> float:
    """Compare each token's loss in a packed batch with that of its row alone, through the plain forward pass of the model.

    Returns the largest difference in nats. Raises TrainingError if it is more than rounding: then rows of one batch see each other.
    """
    import torch
    from torch.nn.functional import cross_entropy

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = token_losses(model, batch)
            alone = []
            for single in singles:
                full = model(input_ids=single.input_ids, use_cache=False).logits[0]
                alone.append(cross_entropy(full[single.sources].float(), single.targets, reduction="none"))
    finally:
        model.train(training)
    worst = float((packed - torch.cat(alone)).abs().max()) if packed.numel() else 0.0
    if not worst <= TOLERANCE[dtype]:
        raise TrainingError(f"packed rows do not get the loss they get alone: one token differs by {worst:.3g} nats, {TOLERANCE[dtype]} is rounding",
                            where=f"rows {', '.join(batch.row_ids[:3])}", remedy="set packing: false; this model cannot keep rows of one sequence apart")
    return worst

"""Forward passes over packed rows. No logits are built for places whose loss nobody reads.

Rows in one sequence are kept apart by position ids alone: transformers finds the borders where they restart, but only if there is no attention
mask and no key-value cache. `check_packing` proves at the start of each run that this holds for the model at hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ftpipe.errors import TrainingError
from ftpipe.train.run import Batch

if TYPE_CHECKING:
    import torch

WHOLE = 2**26
"""Where the output layer trains, logits up to this many elements are built at once; more are made, and made again for the gradient, chunk by chunk."""
LEAK = 1e-3
"""Nats by which a row's loss may change when another row of its sequence is changed; rows apart do not feel it at all."""
ALONE = {"float32": 1e-3, "bfloat16": 0.2}
"""Mean difference of a token's loss, in nats, between packed and alone. In bf16 single tokens differ by tenths from rounding alone."""


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
    """-log p of each target, float32 [K]. They are noted in `batch.losses` too."""
    losses = _token_losses(model, batch)
    batch.losses = losses.detach()
    return losses


def _token_losses(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    import torch
    from torch.nn.functional import cross_entropy

    from ftpipe.models.head import split

    parts = split(model) if batch.targets.numel() else None
    if parts is None:
        return cross_entropy(logits(model, batch).float(), batch.targets, reduction="none")
    backbone, head = parts
    hidden = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, attention_mask=None, use_cache=False).last_hidden_state[0][batch.sources]
    if type(head) is torch.nn.Linear and not any(p.requires_grad for p in head.parameters()) and not hasattr(head.weight, "ds_id"):
        from ftpipe.models.kernels.cross_entropy import FrozenHeadLoss

        return FrozenHeadLoss.apply(hidden, head.weight, head.bias, batch.targets)

    def losses(h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return cross_entropy(head(h).float(), t, reduction="none")

    size = max(1, WHOLE // model.config.vocab_size)
    if len(hidden) <= size:
        return losses(hidden, batch.targets)
    return torch.cat([torch.utils.checkpoint.checkpoint(losses, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(size), batch.targets.split(size), strict=True)])


def check_loss(loss: float) -> None:
    """Raise TrainingError if the loss of a micro-batch is no number."""
    if not math.isfinite(loss):
        raise TrainingError(f"the loss is {loss}", remedy="lower the learning rate, or look at these rows")


def memory_ran_out(error: BaseException) -> bool:
    """Whether `error` says that memory could not be had, on a GPU, by Python or by torch's allocator on a CPU."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def check_packing(model: Any, batch: Batch, singles: Sequence[Batch], dtype: str) -> float:
    """Prove that rows of one sequence do not see each other, through the plain forward pass of the model.

    Two tests: turning round the tokens of every other row must leave the losses of those between as they were, and packed losses must be on average
    those of the rows alone. Returns the mean difference of the second, in nats a token. Raises TrainingError if either fails.
    """
    import torch
    from torch.nn.functional import cross_entropy

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            packed = token_losses(model, batch)
            pieces = batch.input_ids.split([s.tokens for s in singles], 1)
            turned = replace(batch, input_ids=torch.cat([piece if i % 2 else piece.flip(1) for i, piece in enumerate(pieces)], 1))
            leak = (token_losses(model, turned) - packed).abs()[batch.sequence % 2 == 1]
            alone = []
            for single in singles:
                full = model(input_ids=single.input_ids, use_cache=False).logits[0]
                alone.append(cross_entropy(full[single.sources].float(), single.targets, reduction="none"))
    finally:
        model.train(training)
    worst = float(leak.max()) if leak.numel() else 0.0
    apart = float((packed - torch.cat(alone)).abs().mean()) if packed.numel() else 0.0
    if not (worst <= LEAK and apart <= ALONE[dtype]):
        why = f"changing one moves another by {worst:.3g} nats" if not worst <= LEAK else f"their losses differ by {apart:.3g} nats from those alone"
        raise TrainingError(f"rows of one sequence see each other: {why}", where=f"rows {', '.join(batch.row_ids[:3])}",
                            remedy="set packing: false; this model cannot keep rows of one sequence apart")
    return apart

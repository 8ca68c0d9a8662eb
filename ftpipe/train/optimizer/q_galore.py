"""Q-GaLore (Zhang et al. 2024): Adam in a low-rank subspace of each matrix's gradient, found by SVD now and then, kept in few bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.slots import Pattern
from ftpipe.train.optimizer.base import Optimizer
from ftpipe.train.run import Batch, Run, derive_seed

if TYPE_CHECKING:
    import torch


class QGalore(Optimizer):
    """For a gradient G [m, n] with m >= n, and V the r leading right singular vectors of a past G (for m < n, the same on the left):

        R = G V;    W <- W - rate scale Adam(R) V^T;    W <- (1 - rate weight_decay) W

    so that Adam's two moments are r wide. V is found anew every `gap` updates; a matrix whose first singular vector has stayed alike (mean |cosine| of
    the last 5 changes at least `cosine`) doubles its gap, again at each SVD that finds it so. V is stored in 4 bits. The moments are not turned when V
    changes. Other parameters (embeddings, norms, head) get plain Adam.

    As in the authors' code, but: the cosine is taken without its sign, which an SVD leaves to chance; two 4-bit entries share a byte; a group's range
    always holds 0, without which one that lies on one side of it is misread. Left out: Adam's moments are float32, not 8-bit (bitsandbytes needs a GPU
    for that), and `weights: int8`, which the paper trains with, rounds the updated matrices at random to 255 steps a group of 256, which gives the
    weights that int8 storage would hold, while they stay float32 in memory, as everything that trains here. It costs precision and saves nothing
    here, so it is not the default.

    `projection: float32`, `cosine: null` is GaLore (Zhao et al. 2024). Each rank takes the SVD of the same gradient, so ranks must be machines alike.
    Records `svds`, how many SVDs the step took.
    """

    paper: ClassVar[str] = "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients"
    zero_stages: ClassVar[tuple[int, ...]] = (0,)
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    support: ClassVar[tuple[str, ...]] = ("ftpipe.train.optimizer._galore",)

    rank: int = Field(default=128, ge=1, description="Rank of the projected gradient; at most the shorter side of a matrix is used.")
    update_gap: int = Field(default=200, ge=1, description="Steps from one SVD to the next, at first.")
    scale: float = Field(default=0.25, gt=0, description="What the update of a projected matrix is multiplied by.")
    cosine: float | None = Field(default=0.4, ge=0, le=1, description="Mean |cosine| of a matrix's first singular vectors from which its gap grows; null lets "
                                 "none grow.")
    gap_factor: float = Field(default=2.0, ge=1, description="What a gap is multiplied by when it grows.")
    queue: int = Field(default=5, ge=1, description="Cosines that the mean is taken over.")
    projection: Literal["int4", "int8", "float32"] = Field(default="int4", description="How the projection is stored.")
    weights: Literal["int8", "float32"] = Field(default="float32", description="int8 rounds projected matrices at random to what int8 storage could hold.")
    group: int = Field(default=256, ge=2, description="Consecutive entries that share a scale.")
    matrices: Pattern = Field(default=r"\.\d+\.", description="Regular expression; matrices whose name it is found in are projected. By default those of the "
                          "numbered layers.")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the mean of the projected gradients.")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="Decay of the mean of their squares.")
    eps: float = Field(default=1e-8, gt=0, description="Added to the root of the mean square.")
    weight_decay: float = Field(default=0.0, ge=0, description="Share of a parameter taken off after each update, times the learning rate.")

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        from ftpipe.train.optimizer._galore import ProjectedAdam

        return ProjectedAdam(groups, self)

    def take_step(self, run: Run, batches: Sequence[Batch]) -> float:
        inner = run.engine.torch_optimizer
        inner.seed = derive_seed(run.seed, "q_galore", run.step)
        loss = super().take_step(run, batches)
        run.metrics["svds"] = inner.refreshed
        return loss

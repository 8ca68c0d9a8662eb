"""Model Breadcrumbs (Davari and Belilovsky 2024): neither the largest nor the small entries of the changes, then their sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class Breadcrumbs(Merger):
    """`W = W_base + scale * sum_i M_i D_i`: of d entries the mask M drops the int(outliers * d) of largest magnitude and keeps the int(keep * d) next ones.

    Survivors are not rescaled, and all adapters share `scale`, `keep` and `outliers`. As in the authors' code the d entries are a row's (`scope: row`, a
    vector is one row); `scope: tensor` takes all of a weight's. A scalar is kept as it is. `keep` is the share that stays, not the share that is masked.
    """

    paper: ClassVar[str] = "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks"

    scale: float = Field(default=0.2, gt=0, le=10, description="Factor of the summed changes.")
    keep: float = Field(default=0.15, gt=0, le=1, description="Share of the entries that is kept.")
    outliers: float = Field(default=0.006, ge=0, lt=1, description="Share of the entries, the largest, that is dropped first.")
    scope: Literal["row", "tensor"] = Field(default="row", description="Where magnitudes are compared: in each row, or in the whole weight.")

    @model_validator(mode="after")
    def _fits(self) -> Breadcrumbs:
        if self.keep + self.outliers > 1 and self.keep < 1:
            raise ValueError(f"keep ({self.keep}) and outliers ({self.outliers}) are more than everything")
        return self

    def low_rank(self) -> bool:
        return self.keep == 1 and self.outliers == 0

    def prepare(self, given: Given) -> Any:
        given.said |= {"scope": self.scope, "kept": {}}

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import Delta, add

        if self.low_rank():
            return add([part.times(self.scale) for part in parts.values()])
        masked = []
        for part in parts.values():
            dense = part.dense()
            mask = band(dense, self.keep, self.outliers, self.scope)
            given.said["kept"][name] = given.said["kept"].get(name, 0) + int(mask.sum())
            masked.append(Delta(dense_=dense * mask).times(self.scale))
        return add(masked)


def band(dense: torch.Tensor, keep: float, outliers: float, scope: str) -> torch.Tensor:
    """True for the magnitude ranks int(outliers d) .. int(outliers d) + int(keep d) - 1 of each row, or of the whole tensor; equal ones in their order."""
    import torch

    if dense.dim() == 0:
        return torch.ones_like(dense, dtype=torch.bool)
    rows = dense.reshape(1, -1) if scope == "tensor" else dense.reshape(-1, dense.shape[-1])
    d = rows.shape[1]
    first = int(outliers * d)
    order = rows.abs().argsort(dim=1, descending=True, stable=True)[:, first:first + int(keep * d)]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).view(dense.shape)

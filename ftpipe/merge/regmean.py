"""RegMean (Jin et al. 2023): merged linear layers that give, in the least-squares sense, what each model's own layer gives on its own data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import ConfigError
from ftpipe.merge.base import Merger
from ftpipe.stages.base import Ref

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class RegMean(Merger):
    """`W^T = (sum_i G_i)^-1 sum_i G_i W_i^T` with `G_i` the mean of x x^T over the inputs x of the layer, one per token, in model i on its own rows.

    Off the diagonal G is multiplied by `shrink`; a diagonal of `ridge` times its mean is added to each, which pulls towards W_i and makes the sum
    invertible where there are fewer tokens than inputs. Everything that is no linear layer is averaged. All is done on the changes, which is the same,
    as the base drops out; so a LoRA stays one: `B_i (A_i G_i S^-1)`, side by side. Padding is not counted. The matrices G lie in the work folder
    while the merge lasts (inputs squared numbers a layer and adapter) and are collected in as many passes as fit `memory`.
    """

    paper: ClassVar[str] = "Dataless Knowledge Fusion by Merging Weights of Language Models"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "transformers")
    keeps_rank: ClassVar[bool] = True

    rows: Ref | dict[str, Ref] = Field(description="Stage of the rows each model is run on, its train rows: one for all, or one for each adapter by its name.")
    limit: int = Field(default=256, ge=1, description="Rows that each model is run on, the first in their order.")
    max_length: int = Field(default=512, ge=1, description="Tokens a row is cut to.")
    shrink: float = Field(default=0.9, ge=0, le=1, description="Factor of what lies off the diagonal (the paper's alpha); 1 is plain least squares.")
    ridge: float = Field(default=1e-6, ge=0, le=1, description="Added to the diagonal, as a share of its mean.")
    memory: float = Field(default=4.0, gt=0, description="GiB that the matrices may take while they are collected.")

    def check(self, given: Given) -> None:
        super().check(given)
        if isinstance(self.rows, dict) and (missing := sorted(set(given.adapters) - set(self.rows))):
            raise ConfigError(f"regmean has no rows for {', '.join(missing)}", remedy="name a stage for each adapter in `rows`")

    def prepare(self, given: Given) -> Any:
        from ftpipe.merge._gram import collect

        rows = self.rows if isinstance(self.rows, dict) else dict.fromkeys(given.adapters, self.rows)
        grams, said = collect(given, {a: rows[a] for a in given.adapters}, self.limit, self.max_length, int(self.memory * 2**30))
        given.said |= said
        return grams

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from ftpipe.merge._deltas import add

        if name not in state:
            return add([part.times(1 / len(given.adapters)) for part in parts.values()])
        # an adapter that leaves the weight alone still has inputs, on which the base's output is to be kept
        grams = {a: self.shrunk(state[name](a)) for a in given.adapters}
        return least_squares(parts, grams, name)

    def shrunk(self, gram: torch.Tensor) -> torch.Tensor:
        """The matrix with its off-diagonal shrunk and the ridge added, float64."""
        diagonal = gram.diagonal().clone()
        gram = gram * self.shrink
        gram.diagonal().copy_(diagonal + self.ridge * diagonal.mean())
        return gram


def least_squares(parts: Mapping[str, Delta], grams: Mapping[str, torch.Tensor], name: str) -> Delta:
    """The change D (out x in) that minimises `sum_i tr((D - D_i) G_i (D - D_i)^T)`; D_i is zero where an adapter has none. Low rank stays low rank."""
    import torch

    from ftpipe.merge._deltas import Delta, add

    factor, info = torch.linalg.cholesky_ex(sum(grams.values()))
    if info:
        raise ConfigError(f"the inputs of {name} do not span its space, so least squares has no one answer",
                          remedy="set `ridge` above 0, `shrink` below 1, or take more rows")

    def solved(right: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
        return torch.cholesky_solve((right.double() @ gram).T, factor).T

    made = [Delta(solved(p.a, grams[a]).float(), p.b) if p.low_rank else Delta(dense_=solved(p.dense_, grams[a]).to(p.dense_.dtype)) for a, p in parts.items()]
    return add(made)

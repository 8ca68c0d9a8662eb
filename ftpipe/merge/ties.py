"""TIES (Yadav et al. 2023): trim, elect a sign for each entry, average those that agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.merge.base import Merger

if TYPE_CHECKING:
    import torch

    from ftpipe.merge._deltas import Delta
    from ftpipe.merge._given import Given


class Ties(Merger):
    """Trims each adapter's change to its largest entries; elects for each entry the sign with the larger sum; averages the kept changes of that sign.

    "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023. The average is over the adapters that agree and not over all, times `scale`
    (the paper's lambda). The paper trims over the whole model, as `scope: model` does, at the price of reading the adapters three times more; many
    implementations trim each weight by itself (`scope: tensor`, equal to PEFT's `ties_svd`).
    """

    libraries: ClassVar[tuple[str, ...]] = ("peft", "torch")

    density: float = Field(default=0.2, gt=0, le=1, description="Share of each adapter's entries that is kept, the largest.")
    scale: float = Field(default=1.0, gt=0, le=10, description="Factor of the merged change.")
    weights: dict[str, float] = Field(default={}, description="Relative weight of each adapter by its stage's name; those left out get 1.")
    scope: Literal["model", "tensor"] = Field(default="model", description="Where the largest are looked for: in the whole change, or in each weight's.")
    sign: Literal["total", "frequency"] = Field(default="total", description="Elect the sign by the sum of the values, or by the number of them.")

    def check(self, given: Given) -> None:
        super().check(given)
        check_weights(self.weights, given)

    def prepare(self, given: Given) -> Any:
        from ftpipe.merge._largest import largest

        if self.scope == "tensor" or self.density == 1:
            return None
        return {adapter: largest(lambda d=deltas: ((n, d[n].dense()) for n in d), self.density) for adapter, deltas in given.adapters.items()}

    def combine(self, name: str, parts: Mapping[str, Delta], given: Given, state: Any) -> Delta:
        from peft.utils.merge_utils import prune

        trimmed = {}
        for adapter, part in parts.items():
            dense = part.dense()
            if state is not None:
                trimmed[adapter] = dense * state[adapter].mask(name, dense)
            else:
                trimmed[adapter] = prune(dense, self.density, method="magnitude") if self.density < 1 else dense
        return elected(trimmed, self.weights, self.sign, self.scale)


def check_weights(weights: Mapping[str, float], given: Given) -> None:
    """Raises ConfigError for weights of unknown adapters, or weights that are no relative weights."""
    from ftpipe.errors import ConfigError

    given.known(weights)
    for name, weight in weights.items():
        if not weight > 0:
            raise ConfigError(f"the weight of {name} is {weight}; a sign cannot be elected with it", remedy="give weights above 0, or leave the adapter out")


def elected(tensors: Mapping[str, torch.Tensor], weights: Mapping[str, float], sign: str, scale: float) -> Delta:
    """The weighted mean, for each entry, of the changes that have the sign of their weighted sum and are not zero; times `scale`."""
    import torch
    from peft.utils.merge_utils import calculate_majority_sign_mask

    from ftpipe.merge._deltas import Delta

    own = [weights.get(adapter, 1.0) for adapter in tensors]
    stacked = torch.stack([t * w for t, w in zip(tensors.values(), own)])
    agree = calculate_majority_sign_mask(stacked, method=sign)  # type: ignore[arg-type]
    mass = (agree * torch.tensor(own, dtype=stacked.dtype).view(-1, *[1] * (stacked.dim() - 1))).sum(0)
    return Delta(dense_=torch.where(mass > 0, (stacked * agree).sum(0) * scale / mass.clamp(min=torch.finfo(stacked.dtype).tiny), 0))

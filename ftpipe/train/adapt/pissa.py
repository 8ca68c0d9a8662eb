"""PiSSA (Meng et al. 2024): train the leading singular directions of each weight, freeze the rest.

W = U S V^T; A0 = S_r^(1/2) V_r^T, B0 = U_r S_r^(1/2) (equations 2 and 3), so that B0 A0 is the best approximation of W of rank r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.train.adapt._lora import weight_of
from ftpipe.train.adapt._moved import MovedLora, halves
from ftpipe.train.run import Run, derive_seed

if TYPE_CHECKING:
    import torch

MORE = 10
"""Directions that the randomised decomposition looks for beyond r, as Halko et al. (2011) advise; they are dropped."""


class Pissa(MovedLora):
    """Starts from the r leading singular directions of each weight, which are what trains. The model starts at the base model exactly, in bf16 too.

    The paper freezes W - B0 A0; here W stays and the start is taken off in the adapter, which is the same function and needs no changed base (see
    `_moved`). So the paper's other use of it, a quantised W - B0 A0, is not this method. What is saved is a LoRA of rank 2r over the base. Weight decay,
    where it is set, pulls the trained pair to zero, and with it the base model's leading directions.
    """

    paper: ClassVar[str] = "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models"

    iterations: int | None = Field(default=None, ge=1, description="Subspace iterations of a randomised decomposition (seconds for a large model; 4 to 16 are "
                                   "usual); the exact one if not set.")

    def starts(self, model: torch.nn.Module, layers: Mapping[str, Any], run: Run) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        import torch

        for name, layer in layers.items():
            weight = weight_of(layer)
            wanted = min(self.r + MORE, *weight.shape)
            if self.iterations is None or wanted == min(weight.shape):
                u, s, vh = torch.linalg.svd(weight, full_matrices=False)
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(derive_seed(run.seed, self.name(), name))
                    u, s, v = torch.svd_lowrank(weight, q=wanted, niter=self.iterations)
                vh = v.T
            yield name, *halves(u[:, :self.r], s[:self.r], vh[:self.r])

"""CorDA (Yang et al. 2024): start from the directions of each weight that matter, or do not matter, for what its layer reads.

C is the mean over rows of X^T X, X [tokens, inputs] being what a layer reads of a row. From W C = U S V^T follows W = U S (V^T C^-1), a sum of
min(outputs, inputs) terms of rank 1. The r largest terms (instruction-previewed) or the r smallest (knowledge-preserved) become the pair that trains:
A0 = S^(1/2) V^T C^-1, B0 = U S^(1/2).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from ftpipe.errors import DataError
from ftpipe.stages.base import Ref
from ftpipe.train.adapt._activations import observe
from ftpipe.train.adapt._lora import weight_of
from ftpipe.train.adapt._moved import MovedLora, halves
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch


class Corda(MovedLora):
    """Starts from r terms of W C, where C is the second moment of the layer's inputs over the first rows. The model starts at the base model exactly.

    As in the authors' code each row's inputs are divided by their largest before X^T X is taken, no mean is taken off, and `damping` times the mean of
    C's diagonal is added to the diagonal. (The scale of C does not change B0 A0, but how it is shared between A and B.) Unlike there the algebra is
    float64, with a solve in place of an inverse, and W stays as it is (see `_moved`). Takes inputs^2 x 4 bytes for each input that layers do not
    share. What is saved is a LoRA of rank 2r over the base. The rows looked at are those of training, which is what `ipm` is for; for `kpm` the paper
    takes question answering about what is to be kept, which `calibration` names (without it `kpm` keeps what the training rows need).
    """

    paper: ClassVar[str] = "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models"
    support: ClassVar[tuple[str, ...]] = (*MovedLora.support, "ftpipe.train.adapt._activations")

    mode: Literal["ipm", "kpm"] = Field(default="ipm", description="`ipm` (instruction-previewed) trains the r largest terms, for the rows looked at; `kpm` "
                                        "(knowledge-preserved) the r smallest, so that what matters for those rows stays frozen.")
    rows: int = Field(default=256, ge=1, description="Rows that are looked at before training. Together they should have more tokens than a layer has inputs.")
    calibration: Ref | None = Field(default=None, description="Stage whose train rows are looked at: about the task for `ipm`, about what is to be kept for "
                                    "`kpm`. The rows of training if not set.")
    damping: float = Field(default=0.01, gt=0, description="Share of the mean of C's diagonal that is added to the diagonal, so that C can be inverted.")

    def looks_at(self) -> str | None:
        return self.calibration

    def starts(self, model: torch.nn.Module, layers: Mapping[str, Any], run: Run) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        import torch

        moments: dict[str, torch.Tensor] = {}
        read: dict[str, list[int]] = {}

        def take(name: str, x: torch.Tensor) -> None:
            read.setdefault(name, []).append(len(x))
            x = x / x.max().abs()
            moments[name] = moments[name].addmm_(x.T, x) if name in moments else x.T @ x

        observed = observe(model, layers, run, self.rows, take)
        if few := [name for name in read if sum(read[name]) < layers[name].in_features]:
            run.log.warning("the %d rows looked at have %d tokens, fewer than the %d inputs of %s: its C is mostly damping", len(read[few[0]]),
                            sum(read[few[0]]), layers[few[0]].in_features, few[0])
        for name, layer in layers.items():
            moment = moments[observed[name]].double() / len(read[observed[name]])
            level = moment.diagonal().mean()
            if not (level > 0 and level.isfinite()):
                raise DataError(f"the inputs of {name} are {'all zero' if level == 0 else 'not finite'} in the rows looked at before training")
            moment.diagonal().add_(self.damping * level)
            u, s, vh = torch.linalg.svd(weight_of(layer).double() @ moment, full_matrices=False)
            part = slice(None, self.r) if self.mode == "ipm" else slice(-self.r, None)
            a, b = halves(u[:, part], s[part], vh[part])
            yield name, torch.linalg.solve(moment, a.T).T, b  # C is symmetric

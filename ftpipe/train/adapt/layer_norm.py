"""LayerNorm tuning (ValizadehAslani and Liang 2024): only the scales and shifts of normalisation layers train, all of them or the entries that matter most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.train.adapt._weights import MaskedAdapt, refuse_empty
from ftpipe.train.run import Run

if TYPE_CHECKING:
    import torch

MEMORY = "layer_norm/"


class LayerNorm(MaskedAdapt):
    """Trains what belongs to a module whose class name contains `norm`: scale, and shift where there is one. RMSNorm has a scale only.

    On a Llama of L layers and width d that is (2 L + 1) d parameters. Norms of single heads (q_norm, k_norm), whose width is not the model's, rest unless
    `heads` is set. It takes a rate 10 to 100 times that of full fine-tuning. Weight decay is off, since it would pull scales to zero.

    With `fisher_share` only the entries of largest diagonal empirical Fisher information at the pre-trained weights train,
    F_j = mean over rows of (d log p(row) / d theta_j)^2, taken over all norms together. It is estimated from `fisher_rows` rows one at a time: the squared
    gradient of a batch has cross terms and is something else. The first max(1, floor(share x entries)) are kept, at equal F those that come first. The paper's
    text could not be checked on which share it keeps and whether it selects entries or whole vectors; entries are selected here.
    """

    paper: ClassVar[str] = "LayerNorm: A key component in parameter-efficient fine-tuning"
    quantized: ClassVar[tuple[str, ...]] = ("int8", "nf4")

    heads: bool = Field(default=False, description="Also train norms inside attention that act on single heads.")
    fisher_share: float | None = Field(default=None, gt=0, le=1, description="Share of the norms' entries that train, those of largest Fisher information; all "
                                       "if not set.")
    fisher_rows: int = Field(default=32, ge=1, description="Rows from which the Fisher information is estimated: the first that training would show.")

    def only_changed(self) -> bool:
        return self.fisher_share is not None

    def chosen(self, model: torch.nn.Module, run: Run) -> list[str]:
        width = model.config.hidden_size
        names = [f"{m}.{p}" if m else p for m, module in model.named_modules() if "norm" in type(module).__name__.lower()
                 for p, value in module.named_parameters(recurse=False) if self.heads or value.numel() == width]
        return refuse_empty(names, "normalisation layer", "choose another method of train/adapt")

    def prepare(self, model: torch.nn.Module, run: Run) -> torch.nn.Module:
        prepared = super().prepare(model, run)
        if self.fisher_share is not None:
            trained = {n: p for n, p in prepared.named_parameters() if p.requires_grad}
            if not all(MEMORY + n in run.memory for n in trained):
                for name, mask in self.selected(self.fisher(prepared, trained, run)).items():
                    run.memory[MEMORY + name] = run.agreed(mask)
            for name, parameter in trained.items():
                parameter.requires_grad_(bool(run.memory[MEMORY + name].any()))
        return prepared

    def fisher(self, model: torch.nn.Module, trained: Mapping[str, torch.Tensor], run: Run) -> dict[str, torch.Tensor]:
        """The diagonal empirical Fisher information of these parameters, float32, by name."""
        import torch

        from ftpipe.train.forward import token_losses

        total = {n: torch.zeros_like(p) for n, p in trained.items()}
        rows = run.calibration(self.fisher_rows)
        model.eval()
        for number, row in enumerate(rows, start=1):
            run.alive(f"Fisher information of row {number} of {len(rows)}")
            with run.autocast():
                loss = token_losses(model, row).sum()
            for sum_, gradient in zip(total.values(), torch.autograd.grad(loss, list(trained.values())), strict=True):
                sum_ += gradient.square()
        return {n: t / len(rows) for n, t in total.items()}

    def selected(self, fisher: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """For each tensor which entries train: bool, of its shape."""
        import torch

        flat = torch.cat([f.flatten() for f in fisher.values()])
        first = flat.sort(descending=True, stable=True).indices[:max(1, int(len(flat) * (self.fisher_share or 1)))]
        keep = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        keep[first] = True
        return {n: part.view(f.shape).cpu() for (n, f), part in zip(fisher.items(), keep.split([f.numel() for f in fisher.values()]), strict=True)}

    def masks(self, run: Run) -> Mapping[str, torch.Tensor]:
        if self.fisher_share is None:
            return {}
        found = {n: run.memory[MEMORY + n] for n in run.engine.names}
        return {n: mask for n, mask in found.items() if not bool(mask.all())}

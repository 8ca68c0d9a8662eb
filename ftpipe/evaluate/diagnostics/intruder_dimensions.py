"""Intruder dimensions: directions that training put on top of a weight's spectrum and that the base did not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.evaluate.diagnostics._shared import changed_matrices, svg, table
from ftpipe.evaluate.diagnostics.base import Diagnostic, Evidence, Finding

if TYPE_CHECKING:
    import torch

EPS_CURVE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class IntruderDimensions(Diagnostic):
    """Counts, in each weight matrix that an adapter changed, singular directions without a counterpart in the base.

    Of the merged matrix W' = W + scale B A and of W the left singular vectors are taken (thin, float32). For the j-th of W', m_j is the
    largest |cosine| with any of W; it intrudes if j is among the `top` largest singular values and m_j < `eps` (paper, section 3). The
    table has each system, matrix, rank j, singular value and m_j; the numbers are counts for `eps` and the share of matrices with any.
    The plot is the count over a range of `eps`: it grows with it, and a single number hides how fast.

    Two limits: m_j is at least 1/sqrt(rows), so small matrices (below about 64 rows) show none; and where W has nearly equal singular values
    its own vectors turn freely among themselves, so a small change can look like an intruder.
    """

    paper: ClassVar[str] = "LoRA vs Full Fine-tuning: An Illusion of Equivalence"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "matplotlib")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.loading",)

    top: int = Field(default=10, ge=1, description="Directions of each matrix that are looked at, those with the largest singular values.")
    eps: float = Field(default=0.5, gt=0, le=1, description="A direction whose best match in the base has a smaller |cosine| is an intruder.")

    def diagnose(self, evidence: Evidence) -> Finding:
        rows: list[tuple] = []
        numbers: dict[str, float] = {}
        for done, (system, changed) in enumerate(changed_matrices(evidence)):
            mine = []
            for i, (name, (base, tuned)) in enumerate(changed.items()):
                values, matches = best_matches(base, tuned, self.top)
                mine += [(system, name, j, s, m) for j, (s, m) in enumerate(zip(values, matches))]
                evidence.progress(done + (i + 1) / len(changed), len(evidence.adapters))
            with_any = {r[1] for r in mine if r[4] < self.eps}
            numbers[f"{system}: intruder dimensions"] = float(sum(r[4] < self.eps for r in mine))
            numbers[f"{system}: share of changed matrices with one"] = len(with_any) / len(changed) if changed else 0.0
            rows += mine
        columns = {"system": "string", "weight": "string", "direction": "int32", "singular_value": "double", "match": "double"}
        return Finding(numbers, table(columns, rows), _plot(rows, list(evidence.adapters), self.eps, self.top) if rows else None)


def best_matches(base: torch.Tensor, tuned: torch.Tensor, top: int) -> tuple[list[float], list[float]]:
    """The `top` largest singular values of `tuned`, and for each left singular vector the largest |cosine| with one of `base`; both matrices out x in."""
    import torch

    u = torch.linalg.svd(base.float(), full_matrices=False)[0]
    v, s, _ = torch.linalg.svd(tuned.float(), full_matrices=False)
    matches = (v[:, :top].T @ u).abs().amax(1)
    return s[:top].double().tolist(), matches.double().clamp(max=1).tolist()


def _plot(rows: list[tuple], systems: list[str], eps: float, top: int) -> str:
    def draw(axes: Any) -> None:
        for system in systems:
            axes.plot(EPS_CURVE, [sum(r[4] < e for r in rows if r[0] == system) for e in EPS_CURVE], marker="o", label=system)
        axes.axvline(eps, color="0.6", linestyle=":")
        axes.set(xlabel="largest |cosine| with the base below", ylabel=f"directions among the first {top}")
        axes.legend(frameon=False)

    return svg(draw)

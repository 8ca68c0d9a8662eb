"""Intruder dimensions: directions that training put on top of a weight's spectrum and that the base did not have."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from ftpipe.evaluate.diagnostics._shared import changed_matrices, each, table
from ftpipe.evaluate.diagnostics.base import Chart, Diagnostic, Evidence, Finding, Measure, Number, Series

if TYPE_CHECKING:
    import torch

EPS_CURVE = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class IntruderDimensions(Diagnostic):
    """Counts, in each weight matrix that an adapter changed, singular directions without a counterpart in the base.

    Of the merged matrix W' = W + scale B A and of W the left singular vectors are taken (thin, float32). For the j-th of W', m_j is the
    largest |cosine| with any of W; it intrudes if j is among the `top` largest singular values and m_j < `eps` (paper, section 3). The
    table has each system, matrix, rank j, singular value and m_j, the smallest m_j first; the numbers are counts for `eps` and the share of matrices with any.
    The plot is the count over a range of `eps`: it grows with it, and a single number hides how fast.

    Two limits: m_j is at least 1/sqrt(rows), so small matrices (below about 64 rows) show none; and where W has nearly equal singular values
    its own vectors turn freely among themselves, so a small change can look like an intruder.
    """

    paper: ClassVar[str] = "LoRA vs Full Fine-tuning: An Illusion of Equivalence"
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.loading",)
    question: ClassVar[str] = "Did training put directions into the weights that the base did not have?"
    measures: ClassVar[dict[str, Measure]] = {
        "intruder dimensions": Measure("count", "strong directions of changed weights without a counterpart in the base; they go with forgetting"),
        "share of changed matrices with one": Measure("share", "changed weights that have such a direction"),
    }

    top: int = Field(default=10, ge=1, description="Directions of each matrix that are looked at, those with the largest singular values.")
    eps: float = Field(default=0.5, gt=0, le=1, description="A direction whose best match in the base has a smaller |cosine| is an intruder.")

    def diagnose(self, evidence: Evidence) -> Finding:
        rows: list[tuple] = []
        numbers: list[Number] = []
        for done, (system, changed) in enumerate(changed_matrices(evidence)):
            mine = []
            for i, (name, (base, tuned)) in enumerate(changed.items()):
                values, matches = best_matches(base, tuned, self.top)
                mine += [(system, name, j, s, m) for j, (s, m) in enumerate(zip(values, matches))]
                evidence.progress(done + (i + 1) / len(changed), len(evidence.adapters))
            with_any = {r[1] for r in mine if r[4] < self.eps}
            numbers += [Number("intruder dimensions", float(sum(r[4] < self.eps for r in mine)), system),
                        Number("share of changed matrices with one", len(with_any) / len(changed) if changed else 0.0, system)]
            rows += mine
        columns = {"system": "string", "weight": "string", "direction": "int32", "singular_value": "double", "match": "double"}
        counts = {n.system: f"{n.value:.0f}" for n in numbers if n.measure == "intruder dimensions"}
        words = f"Directions that the base did not have, among the {self.top} strongest of each changed weight: {each(counts)}."
        over = {s: [sum(r[4] < e for r in rows if r[0] == s) for e in EPS_CURVE] for s in evidence.adapters}
        top = max((v for values in over.values() for v in values), default=0)
        chart = Chart("Intruders by how strictly they are told", "largest |cosine| with the base below", f"directions among the first {self.top}",
                      [Series("chosen", [self.eps, self.eps], [0, top], guide=True), *(Series(s, EPS_CURVE, values) for s, values in over.items())])
        return Finding(words, numbers, table(columns, sorted(rows, key=lambda r: (r[4], *r[:3]))), [chart] if rows else [])


def best_matches(base: torch.Tensor, tuned: torch.Tensor, top: int) -> tuple[list[float], list[float]]:
    """The `top` largest singular values of `tuned`, and for each left singular vector the largest |cosine| with one of `base`; both matrices out x in."""
    import torch

    u = torch.linalg.svd(base.float(), full_matrices=False)[0]
    v, s, _ = torch.linalg.svd(tuned.float(), full_matrices=False)
    matches = (v[:, :top].T @ u).abs().amax(1)
    return s[:top].double().tolist(), matches.double().clamp(max=1).tolist()

"""How forgetting grows with what was learnt, with the number of trained weights and with the number of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from ftpipe.errors import DataError
from ftpipe.evaluate.diagnostics._shared import each, table
from ftpipe.evaluate.diagnostics.base import Chart, Diagnostic, Evidence, Finding, Measure, Number, Series
from ftpipe.evaluate.suites.base import Given
from ftpipe.evaluate.suites.general_text import GeneralText
from ftpipe.models.adapters import read_manifest
from ftpipe.stages.base import Environment

if TYPE_CHECKING:
    import numpy as np

CHUNK_FLOATS = 2**23
"""Most logits (float32) of one model in memory at once."""
LAW_PARAMETERS = 6
FULL_CHECK = LAW_PARAMETERS + 2
"""Cells that must be left after some are put aside, before the power law is fitted: more than it has parameters."""


class ForgettingLaw(Diagnostic):
    """Forgetting of each adapter on general text, and the two laws of the paper fitted to them.

    The forgetting L_f of a tuned model q is its cross-entropy under the base's whole next-token distribution p, the mean over positions of
    -sum_v p(v) log q(v), in nats: the base itself has its entropy H(p), and the excess over that is the mean KL(p||q), never negative. It is not the loss
    on the text's own tokens. Learning is the loss L_ft of the suite `learning`; N is the number of trained weights, t the number of steps, from the
    training's own record.

    Law 1 (from three adapters on): L_f is affine in L_ft; slope and R^2 are given. Law 2: L_f(N, t) = s - [(A / N^alpha) + (B / t^beta)]^rho, a power law that
    rises towards s (the paper's factor c is 1 here: it cannot be told from A and B). It is only fitted where cells are left to test it on: those with
    the largest N or t are put aside, and the fit has to predict them better than a constant and than a plane in log N and log t. A high R^2 on the fitted
    cells would say nothing: the law has six parameters. It has no floor at small N and t, so do not read it below the smallest cell.

    The exact form of law 2 is inferred from the paper's account of it; its published exponents are not used anywhere.
    """

    paper: ClassVar[str] = "Scaling Laws for Forgetting When Fine-Tuning Large Language Models"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "scipy")
    support: ClassVar[tuple[str, ...]] = ("ftpipe.models.service", "ftpipe.models.loading")
    question: ClassVar[str] = "How does forgetting grow with what is learnt, with rank and with steps?"
    measures: ClassVar[dict[str, Measure]] = {
        "excess over the base": Measure("nats per token", "forgetting on general text: divergence from what the base would say; 0 is none"),
        "entropy of the base": Measure("nats per token", "what the base itself has; forgetting is counted from here"),
        "positions": Measure("count", "tokens of general text looked at"),
        "law 1: slope": Measure("", "forgetting for each nat of loss on what was to be learnt"),
        "law 1: R^2": Measure("", "how much of the forgetting the straight line explains; 1 is all"),
        "law 2: error of the law on the cells left out": Measure("nats per token", "how far the power law is off where it was not fitted"),
        "law 2: error of a constant on the cells left out": Measure("nats per token", "the same of a constant"),
        "law 2: error of a plane on the cells left out": Measure("nats per token", "the same of a plane in the logarithms of size and steps"),
        "law 2: holds (1) or not (0)": Measure("", "whether it predicts the cells left out better than both"),
        "law 2: alpha": Measure("", "exponent of the number of trained weights"), "law 2: beta": Measure("", "exponent of the number of steps"),
        "law 2: rho": Measure("", "exponent of the sum"), "law 2: limit s": Measure("nats per token", "what forgetting rises towards"),
    }

    text: GeneralText = Field(default=GeneralText(), description="The general text that forgetting is measured on.")
    learning: str = Field(default="heldout_loss", description="Suite whose loss says how much was learnt.")
    max_tokens: int = Field(default=256, ge=2, description="Tokens of a text that are used.")

    def externals(self, env: Environment) -> dict[str, Any]:
        return self.text.externals(env)

    def diagnose(self, evidence: Evidence) -> Finding:
        from ftpipe.models.service import ModelService

        def opened(adapter: Any = None) -> ModelService:
            return ModelService.open(evidence.model, evidence.env, adapter=adapter, dtype="float32")

        base = opened()
        said = [item.ask for item in self.text.items(Given(evidence.rows, evidence.env, evidence.log))]
        texts = [base.renderer.text(t).input_ids[:-1][: self.max_tokens] for t in said]  # nothing follows the closing token
        entropy, positions = soft_cross_entropy(base.model, base.model, texts)
        losses = _losses(evidence.items, self.learning)
        rows: list[tuple] = [("base", 0, 0, losses.get("base"), entropy, 0.0)]
        for done, (system, tuned) in enumerate(evidence.adapters.items(), 1):
            service = opened(tuned.folder)
            forgetting, _ = soft_cross_entropy(base.model, service.model, texts)
            told, weights = tuned.training, read_manifest(tuned.folder).get("trainable")
            rows.append((system, told.get("trainable", weights), told.get("steps"), losses.get(system), forgetting, forgetting - entropy))
            evidence.progress(done, len(evidence.adapters))
        numbers = [*(Number("excess over the base", r[5], r[0]) for r in rows[1:]), Number("entropy of the base", entropy),
                   Number("positions", float(positions))]
        known = [r for r in rows[1:] if r[3] is not None]
        line = affine([r[3] for r in known], [r[4] for r in known])
        if line:
            numbers += [Number("law 1: slope", line[0]), Number("law 1: R^2", line[2])]
        numbers += [Number(f"law 2: {name}", value) for name, value in law_on_unseen_cells([r for r in rows[1:] if r[1] and r[2]]).items()]
        words = f"Forgetting on general text, in nats per token beyond the base's own entropy: {each({r[0]: f'{r[5]:.4f}' for r in rows[1:]})}."
        if len(known) < 3:
            words += " Laws are fitted to three adapters or more."
        columns = {"system": "string", "trained_weights": "int64", "steps": "int64", "learning_loss": "double", "forgetting": "double", "excess": "double"}
        return Finding(words, numbers, table(columns, rows), _plots(rows, line))


def soft_cross_entropy(base: Any, tuned: Any, texts: Sequence[Sequence[int]]) -> tuple[float, int]:
    """The mean over positions of -sum_v p(v) log q(v), p of `base` and q of `tuned`, and the number of positions; log-softmax in float32.

    One text at a time without padding, so that both models see the same context. A text of n tokens has n positions. Raises DataError without any.
    """
    import torch

    total, positions = 0.0, 0
    with torch.inference_mode():
        for ids in texts:
            tokens = torch.tensor([ids], device=next(base.parameters()).device)
            p, q = base(input_ids=tokens).logits[0], (tuned(input_ids=tokens).logits[0] if tuned is not base else None)
            step = max(1, CHUNK_FLOATS // p.shape[-1])
            for at in range(0, len(ids), step):
                of = torch.log_softmax(p[at:at + step].float(), -1)
                under = of if q is None else torch.log_softmax(q[at:at + step].float(), -1)
                total -= (of.exp() * under).sum(-1).double().sum().item()
            positions += len(ids)
    if not positions:
        raise DataError("the general text has no tokens")
    return total / positions, positions


def affine(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Slope, intercept and R^2 of the least-squares line; None for fewer than three points, or where x or y does not vary."""
    import numpy as np

    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept), float(1 - ((y - slope * x - intercept) ** 2).sum() / ((y - y.mean()) ** 2).sum())


@dataclass(frozen=True)
class Law:
    """s - [(N / n0)^-alpha A + (t / t0)^-beta B]^rho; n0 and t0 are the geometric means of the fitted cells."""

    s: float
    a: float
    b: float
    alpha: float
    beta: float
    rho: float
    n0: float
    t0: float

    def predict(self, n: Sequence[float], t: Sequence[float]) -> np.ndarray:
        import numpy as np

        n, t = np.asarray(n, np.float64) / self.n0, np.asarray(t, np.float64) / self.t0
        return self.s - (self.a * n**-self.alpha + self.b * t**-self.beta) ** self.rho


def fit_law(n: Sequence[float], t: Sequence[float], y: Sequence[float], starts: int = 12) -> Law:
    """Least squares from several starts, always the same ones; every parameter but s is kept positive by its logarithm."""
    import numpy as np
    from scipy.optimize import least_squares

    n, t, y = (np.asarray(v, np.float64) for v in (n, t, y))
    n0, t0 = np.exp(np.log(n).mean()), np.exp(np.log(t).mean())
    spread = max(float(np.ptp(y)), 1e-9)

    def law(x: np.ndarray) -> Law:
        return Law(y.max() + spread * x[0], *np.exp(np.clip(x[1:], -12, 6)), n0, t0)

    rng = np.random.default_rng(0)
    found = [least_squares(lambda x: (law(x).predict(n, t) - y) / spread, np.concatenate([rng.uniform(0, 1, 1), rng.normal(-1, 1, 5)]), max_nfev=400)
             for _ in range(starts)]
    return law(min(found, key=lambda f: f.cost).x)


def law_on_unseen_cells(rows: Sequence[tuple]) -> dict[str, float]:
    """The power law's exponents, and its error on cells with the largest N or t, which it was not fitted to, beside those of a constant and a plane.

    rows: (_, N, t, _, L_f, ...). Empty if fewer than `FULL_CHECK` cells are left without those, or N or t does not vary among them.
    """
    import numpy as np

    most = max((r[1] for r in rows), default=0), max((r[2] for r in rows), default=0)
    left = [r for r in rows if r[1] < most[0] and r[2] < most[1]]
    out = [r for r in rows if r[1] == most[0] or r[2] == most[1]]
    if len(left) < FULL_CHECK or len({r[1] for r in left}) < 2 or len({r[2] for r in left}) < 2:
        return {}
    (n, t, y), (n_out, t_out, y_out) = (np.array([[r[1], r[2], r[4]] for r in part], np.float64).T for part in (left, out))
    law = fit_law(n, t, y)

    def plane(n: np.ndarray, t: np.ndarray) -> np.ndarray:
        return np.column_stack([np.ones_like(n), np.log(n), np.log(t)])

    flat = plane(n_out, t_out) @ np.linalg.lstsq(plane(n, t), y, rcond=None)[0]
    error = {name: float(np.sqrt(((guess - y_out) ** 2).mean()))
             for name, guess in (("the law", law.predict(n_out, t_out)), ("a constant", np.full_like(y_out, y.mean())), ("a plane", flat))}
    better = error["the law"] < min(error["a constant"], error["a plane"])
    return {f"error of {name} on the cells left out": value for name, value in error.items()} | {
        "holds (1) or not (0)": float(better), "alpha": law.alpha, "beta": law.beta, "rho": law.rho, "limit s": law.s}


def _losses(items: Any, suite: str) -> dict[str, float]:
    """By system, the weighted mean loss on a suite."""
    total: dict[str, list[float]] = {}
    for r in items.to_pylist():
        if r["suite"] == suite and r["metric"] == "loss":
            sums = total.setdefault(r["system"], [0.0, 0.0])
            sums[0] += r["score"] * r["weight"]
            sums[1] += r["weight"]
    return {system: s / w for system, (s, w) in total.items() if w}


def _plots(rows: list[tuple], line: tuple[float, float, float] | None) -> list[Chart]:
    points = [r for r in rows if r[3] is not None]
    series = [Series(system, [loss], [forgetting]) for system, _, _, loss, forgetting, _ in points]
    if line:
        ends = [min(r[3] for r in points), max(r[3] for r in points)]
        series.insert(0, Series("law 1", ends, [line[0] * x + line[1] for x in ends], guide=True))
    title, x, y = "Forgetting against what was learnt", "loss on what was to be learnt (nats per token)", "forgetting (nats per token)"
    return [Chart(title, x, y, series)] if points else []

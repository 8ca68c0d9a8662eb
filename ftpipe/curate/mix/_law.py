"""The scaling law of fine-tuning on a mixture: how a domain's loss falls with its own tokens and with those of the others.

    L(own, rest) = C (own + k rest^alpha)^(-beta) + E

rest^alpha k is how many of the domain's own tokens the tokens of the others are worth (Data Mixing Optimization for Supervised Fine-Tuning, after the
scaling laws for transfer of Hernandez et al., 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

EDGE = 1e-9
"""Nearest that a weight comes to 0 and 1: the loss (without transfer) is infinite at 0, the slope of k rest^alpha at rest = 0."""
SPREAD = 1.05
"""Tokens of the other domains differ between runs if the most are this many times the least."""
STARTS = 4


@dataclass(frozen=True)
class Law:
    """The law of one domain, in tokens and nats. All are at least 0, alpha is at most 1."""

    C: float
    k: float
    alpha: float
    beta: float
    E: float

    def effective(self, own: Any, rest: Any) -> np.ndarray:
        """Own tokens, and what the tokens of the others are worth in own ones."""
        import numpy as np

        return np.asarray(own, float) + self.k * np.asarray(rest, float) ** self.alpha

    def loss(self, own: Any, rest: Any) -> np.ndarray:
        """Predicted loss for numbers of tokens (any shape)."""
        return self.C * self.effective(own, rest) ** -self.beta + self.E

    def slope(self, share: np.ndarray, total: float) -> np.ndarray:
        """Derivative of the loss by the domain's share of `total` tokens, for shares inside (0, 1)."""
        own, rest = total * share, total * (1 - share)
        inner = total - self.k * self.alpha * total * rest ** (self.alpha - 1)
        return -self.C * self.beta * self.effective(own, rest) ** (-self.beta - 1) * inner


@dataclass(frozen=True)
class Fit:
    """A fitted law. error: largest distance of a run's loss from it. apart: whether the runs could tell k and alpha apart; if not, alpha was given."""

    law: Law
    error: float
    apart: bool


def fit(own: np.ndarray, rest: np.ndarray, loss: np.ndarray, *, delta: float, alpha: float) -> Fit:
    """The law that fits runs best: (n,) own tokens, tokens of the others, and losses.

    Least squares with Huber's loss (quadratic up to `delta` nats) by the trust-region reflective method. Bounds: 0 <= alpha <= 1; k rest^alpha <= rest
    in every run, a foreign token being worth one of the domain's own at most: with tokens counted in units of the smallest rest that is 0 <= k <= 1. It
    starts from the best points of a grid over k, alpha and beta, at each of which the best C and E are known in closed form.

    Runs whose rest is always the same only tell k rest^alpha, not k and alpha; alpha is then taken as given.
    """
    import numpy as np
    from scipy.optimize import least_squares

    own, rest, loss = (np.asarray(v, float) for v in (own, rest, loss))
    others = rest[rest > 0]
    apart = bool(len(others) and others.max() > SPREAD * others.min())
    scale = float(others.min()) if len(others) else float(own[own > 0].min())
    x, r = own / scale, rest / scale
    log_r = np.log(np.where(r > 0, r, 1.0))

    free = np.array([0, 1, 2, 3, 4] if apart else [0, 1, 3, 4])

    def whole(q: np.ndarray) -> np.ndarray:
        p = np.full(5, alpha)
        p[free] = q
        return p

    def parts(p: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        power = np.where(r > 0, r ** p[2], 0.0)
        u = np.maximum(x + p[1] * power, 1e-12)
        return power, u, np.exp(p[0]) * u ** -p[3]

    def residual(q: np.ndarray) -> np.ndarray:
        p = whole(q)
        return parts(p)[2] + p[4] - loss

    def jacobian(q: np.ndarray) -> np.ndarray:
        p = whole(q)
        power, u, z = parts(p)
        by_u = -p[3] * z / u
        return np.stack([z, by_u * power, by_u * p[1] * power * log_r, -z * np.log(u), np.ones_like(z)], axis=1)[:, free]

    low = np.array([-50.0, 0.0, 0.0, 1e-4, 0.0])[free]
    high = np.array([50.0, 1.0, 1.0, 10.0, max(float(loss.min()), 1e-6)])[free]
    best = None
    for start in _starts(x, r, loss, np.linspace(0.05, 0.95, 7).tolist() if apart else [alpha]):
        found = least_squares(residual, np.clip(start[free], low + 1e-12, high - 1e-12), jacobian, bounds=(low, high), loss="huber", f_scale=delta,
                              x_scale="jac", xtol=1e-14, ftol=1e-14, gtol=1e-14, max_nfev=400)
        if best is None or found.cost < best.cost * (1 - 1e-9):
            best = found
    p = whole(best.x)
    a = float(p[2])
    law = Law(C=float(np.exp(p[0]) * scale ** p[3]), k=float(p[1] * scale ** (1 - a)), alpha=a, beta=float(p[3]), E=float(p[4]))
    return Fit(law, float(np.abs(law.loss(own, rest) - loss).max()), apart)


def _starts(x: np.ndarray, r: np.ndarray, loss: np.ndarray, alphas: Sequence[float]) -> list[np.ndarray]:
    """The best points of a grid, one for each alpha and size of k at most: log C, k, alpha, beta, E in scaled units."""
    import numpy as np

    found = []
    for a in alphas:
        for k in (0.001, 0.01, 0.03, 0.1, 0.3, 0.9):
            tried = []
            for beta in np.geomspace(0.03, 3.0, 16):
                z = np.maximum(x + k * np.where(r > 0, r**a, 0.0), 1e-12) ** -beta
                spread = z - z.mean()
                c = float(spread @ (loss - loss.mean()) / max(float(spread @ spread), 1e-300))
                e = float(loss.mean() - c * z.mean())
                if e < 0:
                    c, e = float(z @ loss / (z @ z)), 0.0
                c = max(c, 1e-12)
                tried.append((float(((c * z + e - loss) ** 2).sum()), np.array([np.log(c), k, a, beta, e])))
            found.append(min(tried, key=lambda t: t[0]))
    return [p for _, p in sorted(found, key=lambda t: t[0])[:STARTS]]


def best_shares(laws: Sequence[Law], total: float, start: np.ndarray | None = None) -> np.ndarray:
    """(k,) shares of `total` tokens with the smallest sum of predicted losses, by SLSQP from equal shares (or from `start`).

    Each loss is a convex falling function of a concave function of the share, hence convex, so the sum has one minimum.
    """
    import numpy as np
    from scipy.optimize import minimize

    n = len(laws)
    equal = np.full(n, 1 / n)
    if n == 1:
        return equal

    def slopes(w: np.ndarray) -> np.ndarray:
        w = np.clip(w, EDGE, 1 - EDGE)
        return np.array([law.slope(w[i], total) for i, law in enumerate(laws)])

    def summed(w: np.ndarray) -> float:
        w = np.clip(w, EDGE, 1 - EDGE)
        return float(sum(law.loss(total * w[i], total * (1 - w[i])) for i, law in enumerate(laws)))

    unit = max(float(np.abs(slopes(equal)).max()), 1e-12)  # losses that hardly differ must not count as equal
    found = minimize(lambda w: summed(w) / unit, equal if start is None else start, jac=lambda w: slopes(w) / unit, method="SLSQP",
                     bounds=[(EDGE, 1 - EDGE)] * n, constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)},
                     options={"ftol": 1e-14, "maxiter": 1000})
    shares = np.clip(found.x, 0, 1)
    shares[shares <= 2 * EDGE] = 0
    return shares / shares.sum()

"""Entropic optimal transport between two clouds of points, in the log domain, with a bounded part of the costs in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BLOCK = 2**22
"""Most costs in memory at once; a pass over a block makes about four arrays of that many float64 (32 MiB each)."""
CLOSE = 0.5
"""Violation of the marginals below which over-relaxation is safe enough to begin."""


@dataclass
class Potentials:
    """Where the iteration stands.

    target: (m,) dual potential f of the target's points. pool: (n,) dual potential g of the pool's. error: sum of |mass sent - mass there is| over the target's
    points, a number in [0, 2], of the plan exp((f + g - C) / epsilon) a b. iterations: passes over the costs so far.
    """

    target: np.ndarray
    pool: np.ndarray
    error: float = float("inf")
    iterations: int = 0


def mean_cost(target: np.ndarray, pool: np.ndarray) -> float:
    """Mean squared Euclidean distance between a point of (m, d) and one of (n, d), without forming the m n distances."""
    import numpy as np

    total, centres = 0.0, []
    for points in (target, pool):
        centres.append(points.mean(axis=0, dtype=np.float64))
        step = max(1, BLOCK // points.shape[1])
        total += sum(float(((points[i:i + step] - centres[-1]) ** 2).sum()) for i in range(0, len(points), step)) / len(points)
    return total + float(((centres[0] - centres[1]) ** 2).sum())


def sinkhorn(target: np.ndarray, pool: np.ndarray, *, epsilon: float, weights: np.ndarray | None = None, momentum: float = 1.0, tolerance: float = 1e-3,
             max_iterations: int = 2000, block: int = BLOCK, device: str = "cpu", start: Potentials | None = None,
             after: Callable[[Potentials], None] | None = None) -> Potentials:
    """Dual potentials of min <P, C> + epsilon KL(P | a b) over plans P with the marginals a and b, C the squared Euclidean distances.

    With b's constraint met exactly, the value of the optimum is sum a f + sum b g (see `value`), and its derivative with respect to the mass b_j is g_j up to
    a constant that all j share: moving a little mass from j to i changes it at the rate g_i - g_j. Potentials are defined up to a constant between them.

    Args:
        target: (m, d) points of equal weights a. pool: (n, d) points. weights: (n,) b, positive, of sum 1; equal by default.
        epsilon: in units of the squared distance. momentum: over-relaxation in [1, 2) of both updates once the error is below `CLOSE`; 1 is plain Sinkhorn.
        tolerance: error at which to stop. max_iterations: passes, at the most; the last is a plain one, so that b is met whether or not it converged.
        block: costs in memory at once. device: of torch; the arithmetic is float64 everywhere.
        start: potentials to go on from, which are not changed. after: told after each pass but the last; what it sees may be saved and given as `start`,
            and the result is the same to the bit.
    """
    import numpy as np
    import torch

    m, n = len(target), len(pool)
    place = {"device": device, "dtype": torch.float64}
    centre = target.mean(axis=0, dtype=np.float64)  # distances do not change, and small ones lose fewer digits
    x = torch.as_tensor(target - centre, **place)
    x2, a = (x * x).sum(1), 1 / m
    log_b = torch.full((n,), -float(np.log(n)), **place) if weights is None else torch.as_tensor(weights, **place).log()
    begin = start or Potentials(np.zeros(m), np.zeros(n))
    f, g = torch.tensor(begin.target, **place), torch.tensor(begin.pool, **place)
    error, width = begin.error, max(1, block // m)
    for iteration in range(begin.iterations + 1, max_iterations + 1):
        omega = momentum if tolerance <= error < CLOSE and iteration < max_iterations else 1.0
        sent = torch.full((m,), -torch.inf, **place)
        for j in range(0, n, width):
            y = torch.as_tensor(pool[j:j + width] - centre, **place)
            cost = torch.addmm((y * y).sum(1)[None] + x2[:, None], x, y.T, alpha=-2).clamp_(min=0)
            new = -epsilon * (torch.logsumexp((f[:, None] - cost) / epsilon, 0) + float(np.log(a)))
            g[j:j + width] = here = (1 - omega) * g[j:j + width] + omega * new
            sent = torch.logaddexp(sent, torch.logsumexp((here[None] - cost) / epsilon + log_b[None, j:j + width], 1))
        new_f = -epsilon * sent
        error = float(a * torch.expm1(((f - new_f) / epsilon).clamp(max=50)).abs().sum())
        done = omega == 1.0 and error < tolerance
        if not done and iteration < max_iterations:
            f = (1 - omega) * f + omega * new_f
        found = Potentials(f.cpu().numpy(), g.clone().cpu().numpy(), error, iteration)
        if done or iteration == max_iterations:
            return found
        if after is not None:
            after(found)
    return begin


def value(potentials: Potentials, weights: np.ndarray | None = None) -> float:
    """Value of the entropic transport: sum a f + sum b g."""
    g = potentials.pool
    return float(potentials.target.mean() + (g.mean() if weights is None else weights @ g))


def calibrated(potential: np.ndarray) -> np.ndarray:
    """(n,) calibrated gradient g_i - mean of the other g_j: the rate at which the value changes when mass moves to i from all others alike."""
    n = len(potential)
    return potential - (potential.sum() - potential) / (n - 1) if n > 1 else potential * 0.0

"""Paired statistics: two systems are compared on the same items, so only the items' differences count.

Scores of one item under two systems go up and down together; an interval from the two systems' own standard errors ignores that and is
too wide to see the gain of a small adapter. Here the items (or the groups they come from) are resampled, and both systems with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

BATCH_ELEMENTS = 2**22
"""Resampled numbers held at once (32 MiB of float64), whatever the number of items."""
POWER = 0.8
"""Chance of being found that a difference must have to count as one that a sample could have shown."""


@dataclass(frozen=True)
class Comparison:
    """System a against system b on `n` items.

    mean_a and mean_b are weighted means in the metric's own unit. difference, low and high are `a - b`, turned so that more is better for a.
    mde: the smallest true difference that a test at this confidence would find with 80 % power, given how the items scatter.
    p_value: McNemar's exact test where both systems' scores are all 0 or 1, otherwise None. p: of no difference at all, two-sided: McNemar's where there is
    one and items are resampled one by one, otherwise `no_difference`; what many comparisons are corrected by.
    """

    n: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    confidence: float
    higher_is_better: bool
    mde: float
    p_value: float | None = None
    p: float | None = None

    @property
    def better(self) -> bool:
        """Whether a is better than b beyond the interval."""
        return self.low > 0


def compare(a: Sequence[float], b: Sequence[float], weights: Sequence[float] | None = None, *, higher_is_better: bool, groups: Sequence[str] | None = None,
            confidence: float = 0.95, resamples: int = 2000, seed: int = 0, method: Literal["bca", "percentile"] = "bca") -> Comparison:
    """Compare two systems' scores on the same items.

    Args:
        a, b: score of each item, shape (n,), finite.
        weights: weight of each item (trained tokens for a loss a token), shape (n,), not negative; equal weights by default.
        groups: what each item came from (module, document). Given, whole groups are resampled: items of one group are not independent.
        confidence, resamples, seed, method: see `interval`.

    Raises:
        ValueError: for arrays of different length, no items, numbers that are not finite, or weights that sum to nothing.
    """
    import numpy as np

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    w = np.ones_like(a) if weights is None else np.asarray(weights, np.float64)
    if not a.shape == b.shape == w.shape or a.ndim != 1:
        raise ValueError(f"scores and weights must be three lists of one length, got {a.shape}, {b.shape} and {w.shape}")
    if a.size == 0:
        raise ValueError("there are no items to compare")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(w).all()):
        raise ValueError("a score or weight is not a finite number")
    if (w < 0).any() or w.sum() <= 0:
        raise ValueError("weights must not be negative, and not all zero")
    d = (a - b) if higher_is_better else (b - a)
    low, high = interval(d, w, groups=groups, confidence=confidence, resamples=resamples, seed=seed, method=method)
    binary = bool(np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all())
    exact = mcnemar(a, b) if binary else None
    return Comparison(n=int(a.size), mean_a=weighted_mean(a, w), mean_b=weighted_mean(b, w), difference=weighted_mean(d, w), low=low, high=high,
                      confidence=confidence, higher_is_better=higher_is_better, mde=minimum_detectable(d, w, groups=groups, confidence=confidence),
                      p_value=exact, p=exact if binary and groups is None and (w == w[0]).all() else no_difference(d, w, groups=groups))


@dataclass(frozen=True)
class ArmComparison:
    """Arm a against arm b, each trained with the same `seeds` seeds and scored on the same `n` items.

    mean_a, mean_b: weighted means over items and seeds. difference, low, high: `a - b`, turned so that more is better for a. by_seed: that
    difference for each seed. error: its standard error, with the share of its square that comes from the seeds. mde: the smallest true difference that
    this test would find with 80 % power, given how items and seeds scatter.
    """

    n: int
    seeds: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    by_seed: list[float]
    error: float
    mde: float
    share_of_seeds: float
    higher_is_better: bool

    @property
    def better(self) -> bool:
        """Whether a is better than b beyond the interval."""
        return self.low > 0

    @property
    def worse(self) -> bool:
        return self.high < 0


def compare_arms(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], weights: Sequence[float] | None = None, *, higher_is_better: bool,
                 confidence: float = 0.95) -> ArmComparison:
    """Compare two ways of training, each run with several seeds: would the first be better with *other* seeds and *other* items too?

    Items and seeds are two crossed samples. The standard error joins both: that of the ratio of sums over items, of the differences averaged over
    seeds (as in `minimum_detectable`), and that of the mean over seeds of each seed's difference; what items and seeds do together is in both, so
    the interval is a little too wide rather than too narrow. Student's t with Welch and Satterthwaite's degrees of freedom. With one seed
    only the items count, and the interval says nothing of another seed.

    Args:
        a, b: scores, shape (seeds, n). The s-th rows belong together (same seed, so same order and initialisation).
        weights: weight of each item, shape (n,).

    Raises:
        ValueError: for shapes that differ, fewer than two items, or numbers that are not finite.
    """
    import numpy as np
    from scipy.stats import t

    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    w = np.ones(a.shape[-1]) if weights is None else np.asarray(weights, np.float64)
    if a.shape != b.shape or a.ndim != 2 or w.shape != a.shape[1:] or not len(a):
        raise ValueError(f"scores must have the shape (seeds, items) and weights (items,), got {a.shape}, {b.shape} and {w.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(w).all()) or (w < 0).any() or (w > 0).sum() < 2:
        raise ValueError("scores and weights must be finite, and two items or more must have weight")
    d = (a - b) if higher_is_better else (b - a)
    by_seed = (d * w).sum(1) / w.sum()
    mean, used = d.mean(0), w > 0
    n, seeds = int(used.sum()), len(d)
    residual = w * (mean - by_seed.mean())
    of_items = (residual[used] ** 2).sum() * n / (n - 1) / w.sum() ** 2
    of_seeds = by_seed.var(ddof=1) / seeds if seeds > 1 else 0.0
    total = of_items + of_seeds
    half = mde = 0.0
    if total > 0:
        freedom = total**2 / (of_items**2 / (n - 1) + (of_seeds**2 / (seeds - 1) if seeds > 1 else 0.0))
        half = float(t.ppf((1 + confidence) / 2, freedom) * total**0.5)
        mde = half + float(t.ppf(POWER, freedom) * total**0.5)
    difference = float(by_seed.mean())
    return ArmComparison(n=n, seeds=seeds, mean_a=weighted_mean(a.mean(0), w), mean_b=weighted_mean(b.mean(0), w), difference=difference,
                         low=difference - half, high=difference + half, by_seed=[float(x) for x in by_seed], error=float(total**0.5),
                         mde=mde, share_of_seeds=float(of_seeds / total) if total else 0.0, higher_is_better=higher_is_better)


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """`sum(w x) / sum(w)`; exactly 0 for all-zero values."""
    return float((values * weights).sum() / weights.sum())


def interval(d: Sequence[float], weights: Sequence[float], *, groups: Sequence[str] | None = None, confidence: float = 0.95, resamples: int = 2000,
             seed: int = 0, method: Literal["bca", "percentile"] = "bca") -> tuple[float, float]:
    """Bootstrap interval of the weighted mean of paired differences `d`.

    `bca` is the bias-corrected and accelerated interval (Efron 1987, "Better Bootstrap Confidence Intervals"), `percentile` the plain one;
    both by `scipy.stats.bootstrap`. The mean is a ratio of sums, so that an item's weight is resampled with it. Differences that are all
    equal leave nothing to resample: the interval is then that one point. A single item or group can say nothing of the scatter and gets
    an unbounded interval, unless its difference is exactly zero.
    """
    import numpy as np
    from scipy.stats import bootstrap

    wd, w = _sums(d, weights, groups)
    spread = np.asarray(d, np.float64)[np.asarray(weights, np.float64) > 0]
    if (spread == 0).all():
        return 0.0, 0.0
    if wd.size < 2:
        return float("-inf"), float("inf")
    means = wd / w
    if (means == means[0]).all():
        return float(means[0]), float(means[0])
    batch = max(1, min(resamples, BATCH_ELEMENTS // wd.size))
    found = bootstrap((wd, w), _ratio, paired=True, vectorized=True, n_resamples=resamples, confidence_level=confidence, batch=batch,
                      method="BCa" if method == "bca" else "percentile", rng=np.random.default_rng(seed))
    low, high = found.confidence_interval
    if not (np.isfinite(low) and np.isfinite(high)):  # BCa has no answer when every resample lies on one side of the estimate
        edge = (1 - confidence) / 2
        low, high = np.quantile(found.bootstrap_distribution, [edge, 1 - edge])
    return float(low), float(high)


def minimum_detectable(d: Sequence[float], weights: Sequence[float], *, groups: Sequence[str] | None = None, confidence: float = 0.95,
                       power: float = POWER) -> float:
    """The smallest true difference that a two-sided test at `confidence` finds with probability `power`, from the scatter of `d`.

    `(z_{1-alpha/2} + z_power) * se`, where se is the linearised standard error of a ratio of sums (Cochran 1977, "Sampling Techniques", ch. 6).
    Infinite for a single item.
    """
    import numpy as np
    from scipy.stats import norm

    wd, w = _sums(d, weights, groups)
    if wd.size < 2:
        return float("inf")
    residual = wd - w * (wd.sum() / w.sum())
    error = np.sqrt((residual**2).sum() * wd.size / (wd.size - 1)) / w.sum()
    return float((norm.ppf((1 + confidence) / 2) + norm.ppf(power)) * error)


@dataclass(frozen=True)
class NoiseFloor:
    """How far trainings lie apart that differ in their seed alone, on the same items, in the metric's unit.

    runs: how many there were. deviation: standard deviation of a run's mean. largest: the largest difference between two runs of one kind. floor: what the
    difference between two such runs stays below with probability `confidence`; a gain below it could be a seed's luck.
    """

    runs: int
    deviation: float
    largest: float
    floor: float
    confidence: float


def noise_floor(runs: Sequence[Sequence[float]], *, confidence: float = 0.95) -> NoiseFloor:
    """The noise floor from the means of trainings, those of one kind (all but the seed alike) in one list.

    s is the deviation within kinds, pooled over them, with v degrees of freedom (runs less kinds). The difference of two further runs of a kind has the
    standard deviation sqrt(2) s, so the floor is t_{(1+confidence)/2, v} sqrt(2) s, with Student's t because few runs say little of s: at 95 %
    the factor t is 12.7 for one pair of runs, 4.3 for three runs of one kind, 2 for many. Assumes that runs' means are normally distributed.

    Raises ValueError where no kind has two runs, or for a number that is not finite.
    """
    import numpy as np
    from scipy.stats import t

    kinds = [np.asarray(kind, np.float64) for kind in runs]
    freedom = sum(k.size - 1 for k in kinds)
    if freedom < 1 or not all(k.size and np.isfinite(k).all() for k in kinds):
        raise ValueError(f"a noise floor needs the finite means of two runs or more of one kind, got {[list(k) for k in runs]}")
    deviation = float((sum(((k - k.mean()) ** 2).sum() for k in kinds) / freedom) ** 0.5)
    return NoiseFloor(runs=sum(k.size for k in kinds), deviation=deviation, largest=float(max(np.ptp(k) for k in kinds)), confidence=confidence,
                      floor=float(t.ppf((1 + confidence) / 2, freedom) * 2**0.5 * deviation))


def no_difference(d: Sequence[float], weights: Sequence[float], *, groups: Sequence[str] | None = None) -> float | None:
    """Two-sided p-value of Student's t for a true difference of zero, with the linearised standard error of `minimum_detectable`.

    Degrees of freedom: resampled units less one. 1 where every difference is zero, 0 where all are the same other one; None for a single unit.
    """
    import numpy as np
    from scipy.stats import t

    wd, w = _sums(d, weights, groups)
    if (np.asarray(d, np.float64)[np.asarray(weights, np.float64) > 0] == 0).all():
        return 1.0
    if wd.size < 2:
        return None
    difference = wd.sum() / w.sum()
    error = np.sqrt(((wd - w * difference) ** 2).sum() * wd.size / (wd.size - 1)) / w.sum()
    return float(2 * t.sf(abs(difference) / error, wd.size - 1)) if error > 0 else float(difference == 0)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's step-down procedure (Holm 1979): where those below alpha are called findings, the chance of one
    false finding or more is alpha at most, however the tests depend on each other. In the order given; none is smaller than it was."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, most = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        most = adjusted[i] = max(most, min(1.0, (len(p) - rank) * p[i]))
    return adjusted


def mcnemar(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value of McNemar's exact test for paired 0/1 scores: of the items on which the systems differ, half should go each way."""
    import numpy as np
    from scipy.stats import binomtest

    a, b = np.asarray(a), np.asarray(b)
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    return 1.0 if only_a + only_b == 0 else float(binomtest(only_a, only_a + only_b, 0.5).pvalue)


def _ratio(wd: np.ndarray, w: np.ndarray, axis: int = -1) -> np.ndarray:
    return wd.sum(axis=axis) / w.sum(axis=axis)


def _sums(d: Sequence[float], weights: Sequence[float], groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Weighted difference and weight of each resampled unit (item or group) that has any weight, as two arrays."""
    import numpy as np

    d, w = np.asarray(d, np.float64), np.asarray(weights, np.float64)
    wd = d * w
    if groups is not None:
        _, unit = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
        wd, w = np.bincount(unit, wd), np.bincount(unit, w)
    return wd[w > 0], w[w > 0]

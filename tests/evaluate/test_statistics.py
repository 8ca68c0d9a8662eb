"""Planted truth for the paired statistics: coverage, symmetry, exactness, power."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ftpipe.evaluate.statistics import compare, interval, mcnemar, minimum_detectable


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_intervals_cover_the_planted_difference_about_as_often_as_they_say(method):
    """Skewed differences with weights: 300 experiments of 60 items; the weighted true mean is known by construction."""
    rng = np.random.default_rng(7)
    hits = 0
    for seed in range(300):
        weights = rng.integers(20, 200, 60)
        d = 0.1 + rng.exponential(0.5, 60) - 0.5
        low, high = interval(d, weights, confidence=0.9, resamples=400, seed=seed, method=method)
        hits += low <= 0.1 <= high
    assert 0.84 <= hits / 300 <= 0.95  # nominal 0.90; binomial standard error 0.017, and the bootstrap is a little narrow at n = 60


def test_without_a_difference_it_claims_one_only_as_often_as_the_confidence_allows():
    rng = np.random.default_rng(3)
    claims = 0
    for seed in range(300):
        base = rng.normal(3, 1, 80)
        result = compare(base + rng.normal(0, 0.2, 80), base, higher_is_better=False, resamples=300, seed=seed)
        claims += result.better
    assert claims / 300 <= 0.06  # one side of a 95 % interval: nominal 0.025


def test_swapping_the_systems_mirrors_everything():
    rng = np.random.default_rng(0)
    a, b, w = rng.normal(2.8, 0.5, 90), rng.normal(3.0, 0.5, 90), rng.integers(1, 50, 90)
    for method in ("bca", "percentile"):
        one = compare(a, b, w, higher_is_better=False, seed=5, method=method)
        two = compare(b, a, w, higher_is_better=False, seed=5, method=method)
        assert one.difference == -two.difference
        assert one.low == pytest.approx(-two.high, rel=1e-9) and one.high == pytest.approx(-two.low, rel=1e-9)
        assert one.mde == pytest.approx(two.mde)


def test_equal_scores_give_exact_zeros():
    scores = np.random.default_rng(1).normal(size=40)
    result = compare(scores, scores.copy(), higher_is_better=True)
    assert (result.difference, result.low, result.high, result.mde) == (0.0, 0.0, 0.0, 0.0) and not result.better


def test_orientation_follows_what_is_better():
    lower = compare([1.0, 1.1, 0.9, 1.2], [2.0, 2.2, 2.1, 1.9], higher_is_better=False)
    assert lower.better and lower.difference > 0 and lower.mean_a < lower.mean_b
    higher = compare([1.0, 1.1, 0.9, 1.2], [2.0, 2.2, 2.1, 1.9], higher_is_better=True)
    assert not higher.better and higher.high < 0


def test_weights_count_tokens_not_items():
    result = compare([0.0, 0.0], [1.0, 0.0], [1, 3], higher_is_better=False)
    assert result.mean_b == 0.25 and result.difference == 0.25


def test_an_item_without_weight_changes_nothing():
    rng = np.random.default_rng(2)
    a, b, w = rng.normal(size=30), rng.normal(size=30), rng.integers(1, 9, 30)
    one = compare(a, b, w, higher_is_better=True, seed=1)
    two = compare([*a, 50.0], [*b, -50.0], [*w, 0], higher_is_better=True, seed=1)
    assert (one.low, one.high, one.difference) == pytest.approx((two.low, two.high, two.difference))


def test_same_seed_same_interval_and_pairing_narrows_it():
    rng = np.random.default_rng(4)
    base = rng.normal(3, 1, 100)
    tuned = base - 0.1 + rng.normal(0, 0.05, 100)
    one, two = (compare(tuned, base, higher_is_better=False, seed=9) for _ in range(2))
    assert one == two and one.better
    shuffled = compare(rng.permutation(tuned), base, higher_is_better=False, seed=9)
    assert (shuffled.high - shuffled.low) > 5 * (one.high - one.low)


def test_items_of_one_group_are_not_independent():
    """Ten groups whose items share one difference each: resampling items makes an interval about sqrt(20) too narrow."""
    rng = np.random.default_rng(5)
    d = np.repeat(rng.normal(0.2, 1, 10), 20)
    groups = [str(g) for g in range(10) for _ in range(20)]
    items, clusters = interval(d, np.ones(200)), interval(d, np.ones(200), groups=groups)
    assert (clusters[1] - clusters[0]) > 3 * (items[1] - items[0])
    assert minimum_detectable(d, np.ones(200), groups=groups) > 3 * minimum_detectable(d, np.ones(200))


def test_one_item_proves_nothing():
    result = compare([1.0], [2.0], higher_is_better=False)
    assert result.low == -math.inf and not result.better


def test_mcnemar_against_the_binomial_by_hand():
    a, b = [1] * 8 + [0] * 2 + [1] * 5, [0] * 8 + [1] * 2 + [1] * 5
    by_hand = 2 * sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar(a, b) == pytest.approx(by_hand) and mcnemar(b, a) == pytest.approx(by_hand)
    assert compare(a, b, higher_is_better=True).p_value == pytest.approx(by_hand)
    assert mcnemar([1, 0], [1, 0]) == 1.0
    assert compare([0.5, 1], [1, 0], higher_is_better=True).p_value is None


def test_minimum_detectable_effect_is_found_with_the_stated_power():
    rng = np.random.default_rng(6)
    effect = minimum_detectable(rng.normal(0, 1, 100_000)[:100], np.ones(100))
    found = sum(abs(x.mean()) > 1.984 * x.std(ddof=1) / 10 for x in rng.normal(effect, 1, (2000, 100)))
    assert 0.72 <= found / 2000 <= 0.88


@pytest.mark.parametrize("a, b, w, said", [([], [], None, "no items"), ([1], [1, 2], None, "one length"), ([float("nan")], [1], None, "finite"),
                                           ([1, 2], [1, 2], [0, 0], "all zero"), ([1, 2], [1, 2], [1, -1], "negative")])
def test_what_cannot_be_compared_is_refused(a, b, w, said):
    with pytest.raises(ValueError, match=said):
        compare(a, b, w, higher_is_better=True)

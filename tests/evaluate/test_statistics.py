"""Planted truth for the paired statistics: coverage, symmetry, exactness, power."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ftpipe.evaluate.statistics import compare, compare_arms, holm, interval, mcnemar, minimum_detectable, no_difference, noise_floor


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


def crossed(rng, *, seeds: int, items: int, seed_noise: float, item_noise: float, difference: float = 0.0):
    """Scores of two arms: items differ in difficulty and in how they take to the first arm, each training has luck of its own."""
    difficulty = rng.normal(0, 1, items)
    taste = rng.normal(difference, item_noise, items)
    luck = rng.normal(0, seed_noise, (2, seeds, 1))
    noise = rng.normal(0, 0.1, (2, seeds, items))
    return difficulty + taste + luck[0] + noise[0], difficulty + luck[1] + noise[1]


@pytest.mark.parametrize("seed_noise, item_noise", [(0.0, 0.3), (0.1, 0.3), (0.3, 0.1)])
def test_intervals_over_arms_hold_for_other_seeds_and_items(seed_noise, item_noise):
    rng = np.random.default_rng(3)
    hits, blind = 0, 0
    for _ in range(500):
        a, b = crossed(rng, seeds=3, items=80, seed_noise=seed_noise, item_noise=item_noise)
        found = compare_arms(a, b, higher_is_better=True)
        hits += found.low <= 0 <= found.high
        one = compare_arms(a[:1], b[:1], higher_is_better=True)
        blind += one.low <= 0 <= one.high
    assert hits / 500 >= 0.93  # nominal 0.95; binomial standard error 0.01
    if seed_noise >= item_noise:
        assert blind / 500 < 0.4, "items alone cannot tell luck from gain"
        assert found.share_of_seeds > 0.5


def test_arms_are_compared_seed_by_seed_and_item_by_item():
    rng = np.random.default_rng(4)
    a, b = crossed(rng, seeds=3, items=50, seed_noise=0.01, item_noise=0.1, difference=0.5)
    w = rng.integers(1, 9, 50)
    found = compare_arms(a, b, w, higher_is_better=True)
    assert found.better and not found.worse and found.seeds == 3 and found.n == 50
    assert found.by_seed == pytest.approx([float(((x - y) * w).sum() / w.sum()) for x, y in zip(a, b)])
    turned = compare_arms(b, a, w, higher_is_better=True)
    assert (turned.difference, turned.low, turned.high) == pytest.approx((-found.difference, -found.high, -found.low)) and turned.worse
    assert compare_arms(a, b, w, higher_is_better=False).difference == pytest.approx(-found.difference)
    same = compare_arms(a, a, w, higher_is_better=True)
    assert (same.difference, same.low, same.high) == (0, 0, 0) and not same.better


@pytest.mark.parametrize("a, b, said", [([[1, 2]], [[1, 2], [1, 2]], "shape"), ([[1]], [[2]], "two items"), ([[1, math.inf]], [[2, 1]], "finite")])
def test_arms_that_cannot_be_compared_are_refused(a, b, said):
    with pytest.raises(ValueError, match=said):
        compare_arms(a, b, higher_is_better=True)


def test_holm_is_the_step_down_procedure_and_keeps_the_chance_of_any_false_finding():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02]) and holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(4000, 1))  # tests that depend on each other
    from scipy.stats import norm

    p = 2 * norm.sf(abs(0.7 * shared + (1 - 0.49) ** 0.5 * rng.normal(size=(4000, 8))))
    false = [min(holm(list(row))) < 0.05 for row in p]
    assert np.mean(false) <= 0.055 < np.mean(p.min(1) < 0.05)


def test_the_p_value_of_no_difference_is_the_paired_t_test_and_turns_with_the_interval():
    from scipy.stats import ttest_rel

    rng = np.random.default_rng(4)
    a, b = rng.normal(0.2, 1, 30), rng.normal(0, 1, 30)
    assert no_difference(a - b, np.ones(30)) == pytest.approx(ttest_rel(a, b).pvalue)
    assert compare(a, b, higher_is_better=True, resamples=100).p == no_difference(a - b, np.ones(30))
    assert no_difference([0.0, 0.0], [1, 1]) == 1.0 and no_difference([0.1], [1]) is None and no_difference([0.5, 0.5], [1, 1]) == 0.0
    one, two = [1, 1, 1, 0, 1, 1], [0, 0, 1, 0, 0, 0]
    assert compare(one, two, higher_is_better=True, resamples=100).p == mcnemar(one, two)


def test_comparisons_are_corrected_over_the_suites_of_a_pair():
    from ftpipe.evaluate.compare import comparisons, items_table
    from ftpipe.evaluate.rules import judge
    from ftpipe.evaluate.suites.base import Item, Score
    from ftpipe.stages.gate import Rule

    rng = np.random.default_rng(5)
    found = []
    for suite in range(6):
        noise = rng.normal(0, 1, 25)
        noise = (noise - noise.mean()) / noise.std(ddof=1) + (0.45 if suite == 0 else 0.05)  # t of 2.25 in one suite, and nothing in five
        found += [(s, Item(str(i), "c", "g", f"s{suite}", None), Score("acc", float(v))) for s, each in (("base", 0 * noise), ("adapter", noise))
                  for i, v in enumerate(each)]
    compared = comparisons(items_table(found), ["base", "adapter"], confidence=0.95, resamples=400, seed=0, method="percentile")
    first = next(c for c in compared if c["suite"] == "s0")
    assert first["p"] < 0.05 < first["p_holm"] == pytest.approx(6 * first["p"]) and first["better"]
    about = {"suites": {}, "systems": {"base": {}, "adapter": {}}}
    plain, corrected = (judge([Rule(suite="s0")], compared, about, correction) for correction in ("none", "holm"))
    assert plain["passed"] and not corrected["passed"] and "Holm's correction" in corrected["rules"][0]["text"]
    assert judge([Rule(suite="s1", require="not_worse", margin=2.0)], compared, about, "holm")["passed"], "non-inferiority is not corrected"


def test_the_noise_floor_bounds_two_further_runs_as_often_as_it_says():
    rng = np.random.default_rng(8)
    for kinds, runs in ((1, 2), (1, 4), (3, 2)):
        held = 0
        for _ in range(600):
            seen = rng.normal(rng.normal(0, 5, (kinds, 1)), 0.3, (kinds, runs))
            held += abs(np.diff(rng.normal(0, 0.3, 2))[0]) < noise_floor(seen.tolist()).floor
        assert 0.925 <= held / 600 <= 0.98, (kinds, runs)  # nominal 0.95; binomial standard error 0.009
    found = noise_floor([[1.0, 3.0], [5.0, 5.5]])
    assert (found.runs, found.largest, found.deviation) == (4, 2.0, pytest.approx(((2.0 + 0.125) / 2) ** 0.5))
    for wrong in ([[1.0], [2.0]], [[1.0, math.nan]], []):
        with pytest.raises(ValueError, match="two runs or more"):
            noise_floor(wrong)


def test_arms_say_what_difference_they_could_have_shown():
    rng = np.random.default_rng(9)
    a, b = crossed(rng, seeds=3, items=60, seed_noise=0.1, item_noise=0.3)
    effect = compare_arms(a, b, higher_is_better=True).mde
    errors, hits = [], 0
    for _ in range(400):
        a, b = crossed(rng, seeds=3, items=60, seed_noise=0.05, item_noise=0.3)
        errors.append(compare_arms(a, b, higher_is_better=True).mde)
    for _ in range(400):
        a, b = crossed(rng, seeds=3, items=60, seed_noise=0.05, item_noise=0.3, difference=float(np.mean(errors)))
        hits += compare_arms(a, b, higher_is_better=True).better
    assert effect > 0 and 0.7 <= hits / 400 <= 0.92  # 0.8 by construction; the stated errors lie a little on the wide side


def test_parts_of_items_are_compared_by_group_source_and_length():
    from ftpipe.evaluate.compare import comparisons, items_table, noise_floors, part_comparisons
    from ftpipe.evaluate.slicing import length_part, parts
    from ftpipe.evaluate.suites.base import Item, Score

    assert [length_part(n) for n in (0, 1, 2, 3, 4, 63, 64)] == ["", "1", "2 to 3", "2 to 3", "4 to 7", "32 to 63", "64 to 127"]
    rng = np.random.default_rng(3)
    found = []
    for i in range(40):
        long, source = i % 2, "a.txt" if i < 10 else "b.txt"
        item = Item(str(i), "c", f"g{i % 4}", "s", None, source)
        hard = rng.normal(3, 1)
        for system, gain in (("base", 0.0), ("adapter", 0.5 if long else -0.5), ("again", 0.1 if long else -0.9), ("champion", 0.25)):
            found.append((system, item, Score("loss", hard - gain + rng.normal(0, 0.01), 100.0 if long else 10.0, False)))
    table = items_table(found)
    how = {"confidence": 0.95, "resamples": 200, "seed": 0, "method": "percentile", "by_slice": False}
    by = {way: part_comparisons(table, "s", "loss", "adapter", "base", way, **how) for way in ("slice", "source", "length")}
    assert list(by["length"]) == ["8 to 15", "64 to 127"] and by["length"]["8 to 15"]["high"] < 0 < by["length"]["64 to 127"]["low"]
    assert {p: c["n"] for p, c in by["source"].items()} == {"a.txt": 10, "b.txt": 30} and list(by["slice"]) == ["g0", "g1", "g2", "g3"]
    one = by["source"]["a.txt"]
    kept = [(f, p) for f, p in zip(found, parts(table, "source")) if p == "a.txt"]
    alone = comparisons(items_table([f for f, _ in kept]), ["base", "adapter"], **how)
    assert one == alone[0] | {"p_holm": None}, "a part is compared as if there were nothing else"
    pairs = {(c["a"], c["b"]) for c in comparisons(table, ["base", "adapter", "champion"], **how)}
    assert pairs == {("adapter", "base"), ("adapter", "champion"), ("champion", "base")}
    floor, = noise_floors(table, ["adapter", "again"], confidence=0.95)
    assert floor["largest"] == pytest.approx(0.4, abs=0.01) and floor["floor"] == pytest.approx(12.706 * floor["largest"], rel=1e-3) and floor["runs"] == 2

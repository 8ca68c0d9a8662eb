"""Each merging method on small matrices, against closed forms, explicit loops and PEFT."""

from __future__ import annotations

import itertools

import pytest
import torch

from ftpipe import slots
from ftpipe.errors import ConfigError
from ftpipe.merge._deltas import Delta
from ftpipe.merge._largest import largest
from tests.merge.given import given, merge

G = torch.Generator().manual_seed(0)
W = "model.layers.0.mlp.up_proj.weight"


def method(name: str, **fields):
    return slots.parse("merge", {name: fields})


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G)


def lora(rank: int, out: int = 6, inputs: int = 5) -> Delta:
    return Delta(noise(rank, inputs), noise(out, rank))


EXACT = {"linear": {}, "uniform_soup": {}, "model_stock": {}, "ties": {"density": 1.0}, "dare": {"drop": 0.0}, "task_arithmetic": {"scale": 0.5},
         "breadcrumbs": {"keep": 1.0, "outliers": 0.0, "scale": 0.5}, "lines": {"alpha": 1.0, "method": {"linear": {}}}}


@pytest.mark.parametrize("name", sorted(EXACT))
def test_an_adapter_merged_with_itself_is_itself(name: str):
    change = noise(4, 3)
    world = given({"one": {W: change}, "two": {W: change}}, base=lambda: {W: change})
    assert torch.allclose(merge(method(name, **EXACT[name]), world)[W], change, atol=1e-6)


@pytest.mark.parametrize("name, fields", [*((n, EXACT[n]) for n in sorted(EXACT)), ("ties", {}), ("ties", {"scope": "tensor", "density": 0.5}),
                                          ("breadcrumbs", {"keep": 0.3}), ("dare", {}), ("dare", {"combine_by": "ties"})])
def test_the_order_and_the_names_of_the_adapters_do_not_matter(name: str, fields: dict):
    changes = {a: {W: noise(8, 7), "model.norm.weight": noise(7)} for a in "abc"}
    contents = {a: f"content of {a}" for a in changes}
    base = lambda: changes["a"]  # noqa: E731
    expected = merge(method(name, **fields), given(changes, contents=contents, base=base))
    for order in itertools.permutations("abc"):
        renamed = given({f"run {n}": changes[a] for n, a in enumerate(order)}, contents={f"run {n}": contents[a] for n, a in enumerate(order)}, base=base)
        for weight, value in merge(method(name, **fields), renamed).items():
            assert torch.allclose(value, expected[weight], atol=1e-6)


def test_task_arithmetic_and_soup_are_the_sums_they_say():
    a, b = noise(4, 3), noise(4, 3)
    world = given({"a": {W: a, "only": b[0]}, "b": {W: b}})
    assert torch.allclose(merge(method("task_arithmetic", scale=0.4), world)[W], 0.4 * a + 0.4 * b)
    soup = merge(method("uniform_soup"), world)
    assert torch.allclose(soup[W], (a + b) / 2) and torch.allclose(soup["only"], b[0] / 2), "a weight that one leaves alone counts as the base's"


def test_low_rank_stays_exact_and_methods_that_leave_it_say_so():
    one, two = lora(2), lora(3)
    world = given({"one": {W: one}, "two": {W: two}})
    for name in ("linear", "uniform_soup", "task_arithmetic", "model_stock"):
        made = method(name).combine(W, world.parts(W), world, method(name).prepare(world))
        assert made.low_rank and made.a.shape[0] == 5
    for name in ("ties", "dare", "breadcrumbs"):
        with pytest.raises(ConfigError, match="full rank out of LoRA") as error:
            merge(method(name), world)
        assert "`rank`" in error.value.remedy and "`whole: true`" in error.value.remedy
        assert merge(method(name, whole=True), world)[W].shape == (6, 5)


def test_ties_by_hand():
    """Columns: all agree; two against one by mass; one large against two small; trimmed away; a draw; nobody; one alone."""
    changes = {"a": [[3.0, 2.0, -9.0, 0.1, 4.0, 0.0, 0.0]], "b": [[1.0, 3.0, 2.0, 0.0, -4.0, 0.0, 0.0]],
               "c": [[2.0, -4.0, 3.0, -0.2, 0.0, 0.0, 5.0]]}
    world = given({a: {W: v} for a, v in changes.items()})
    expected = [2.0, 2.5, -9.0, 0.0, 4.0, 0.0, 5.0]
    found = merge(method("ties", density=4 / 7, scope="tensor"), world)[W]
    assert torch.allclose(found, torch.tensor([expected])), "mean of the agreeing: 6/3, (2+3)/2, -9/1; trimmed; a draw counts as plus"
    by_number = merge(method("ties", density=4 / 7, scope="tensor", sign="frequency"), world)[W]
    assert torch.allclose(by_number[0, 2], torch.tensor(2.5)), "two small ones outvote one large"
    assert torch.allclose(merge(method("ties", density=4 / 7, scope="tensor", scale=0.5), world)[W], found / 2)
    weighted = merge(method("ties", density=4 / 7, scope="tensor", weights={"b": 3.0}), world)[W]
    assert torch.allclose(weighted[0, :2], torch.tensor([(3 + 3 + 2) / 5, (2 + 9) / 4])), "a weighted mean, not a weighted sum"


def test_ties_over_the_whole_model_trims_by_one_threshold():
    small, large = noise(20, 10) * 0.1, noise(10, 10)
    other = {"a.weight": noise(20, 10), "b.weight": noise(10, 10)}
    world = given({"x": {"a.weight": small, "b.weight": large}, "y": other})
    everything = torch.cat([small.flatten(), large.flatten()])
    threshold = everything.abs().sort(descending=True).values[int(0.2 * 300) - 1]
    state = method("ties", whole=True).prepare(world)
    masks = {n: state["x"].mask(n, t) for n, t in (("a.weight", small), ("b.weight", large))}
    assert sum(int(m.sum()) for m in masks.values()) == 60
    assert torch.equal(masks["a.weight"], small.abs() >= threshold) and torch.equal(masks["b.weight"], large.abs() >= threshold)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.25, 0.5, 1.0])
def test_the_largest_are_exactly_as_many_as_asked_even_among_equals(share: float):
    tensors = {"a": torch.tensor([1.0, -1.0, 0.0, 2.0]).repeat(25), "b": -torch.ones(10, 10), "c": torch.zeros(7), "d": noise(93) * 1e-3}
    found = largest(tensors.items, share)
    kept = torch.cat([t.flatten()[found.mask(n, t).flatten()].abs() for n, t in tensors.items()])
    rest = torch.cat([t.flatten()[~found.mask(n, t).flatten()].abs() for n, t in tensors.items()])
    assert len(kept) == int(share * 300) == found.kept and found.total == 300
    assert not len(kept) or not len(rest) or kept.min() >= rest.max()
    assert torch.equal(kept.sort().values, torch.cat([t.flatten().abs() for t in tensors.values()]).sort().values[300 - len(kept):])


def test_dare_keeps_the_expectation_and_its_spread_is_that_of_its_formula():
    change, drop, draws = noise(5, 4), 0.7, 3000
    seen = torch.stack([merge(method("dare", drop=drop), given({"a": {W: change}}, seed=s))[W] for s in range(draws)])
    values = {round(float(v), 5) for v in (seen[:, 0, 0] / change[0, 0]).unique()}
    assert values == {0.0, round(1 / 0.3, 5)}
    deviation = change.abs() * (drop / (1 - drop)) ** 0.5
    assert bool(((seen.mean(0) - change).abs() < 5 * deviation / draws**0.5).all())
    assert torch.allclose(seen.std(0), deviation, rtol=0.1)


def test_dare_draws_for_each_adapter_and_weight_by_itself():
    change = noise(50, 50)
    world = given({"a": {"x": change, "y": change}, "b": {"x": change}}, contents={"a": "1", "b": "2"})
    masks = [method("dare", drop=0.5).combine(n, {a: world.adapters[a][n]}, world, None).dense() != 0 for a, n in (("a", "x"), ("a", "y"), ("b", "x"))]
    for one, two in itertools.combinations(masks, 2):
        assert 0.4 < float((one == two).float().mean()) < 0.6
    before = torch.get_rng_state()
    merge(method("dare"), world)
    assert torch.equal(before, torch.get_rng_state()), "global random state is left alone"


def test_dare_with_ties_elects_among_what_is_left():
    world = given({"a": {W: noise(30, 30)}, "b": {W: noise(30, 30)}}, seed=5)
    left = {a: method("dare", drop=0.5, weights={a: 1.0}).combine(W, {a: world.adapters[a][W]}, world, None).dense() for a in "ab"}
    found = merge(method("dare", drop=0.5, combine_by="ties"), world)[W]
    for i, j in itertools.product(range(30), range(30)):
        values = [float(left[a][i, j]) for a in "ab"]
        sign = 1 if sum(values) >= 0 else -1
        agree = [v for v in values if v * sign > 0]
        assert float(found[i, j]) == pytest.approx(sum(agree) / len(agree) if agree else 0.0, abs=1e-5)


@pytest.mark.parametrize("count, ratio", [(2, 2 / 3), (3, 0.75)])
def test_model_stock_at_an_angle_of_sixty_degrees(count: int, ratio: float):
    """Unit vectors with pairwise cosine one half: sqrt(1/2) of a common direction and of one each."""
    changes = {str(i): {W: (torch.eye(count + 1)[0] + torch.eye(count + 1)[i + 1]) / 2**0.5} for i in range(count)}
    world = given(changes)
    found = merge(method("model_stock"), world)[W]
    assert torch.allclose(found, ratio * sum(c[W] for c in changes.values()) / count, atol=1e-6)
    assert world.said["ratios"][W] == pytest.approx(ratio, abs=1e-6)


@pytest.mark.parametrize("count", [2, 4])
def test_model_stock_comes_nearest_to_the_planted_centre(count: int):
    q = torch.linalg.qr(noise(12, count + 1).double()).Q.T
    centre, scatter = 1.7 * q[0], 2.3 * q[1:]
    world = given({str(i): {W: centre + scatter[i]} for i in range(count)})
    found = merge(method("model_stock"), world)[W].double()
    ratio = 1.7**2 / (1.7**2 + 2.3**2 / count)
    mean = (centre + scatter).mean(0)
    assert world.said["ratios"][W] == pytest.approx(ratio, abs=1e-5)
    nearest = min(float((t * mean - centre).norm()) for t in torch.linspace(-1, 2, 601).double())
    assert float((found - centre).norm()) <= nearest + 1e-5 < float((mean - centre).norm())


def test_model_stock_at_its_limits():
    change = noise(3, 3)
    for other, expected in ((change * 0, change * 0), (-change, change * 0)):
        world = given({"a": {W: change}, "b": {W: other}})
        assert torch.equal(merge(method("model_stock"), world)[W], expected)
    assert world.said["clamped"] == [W]
    nothing = merge(method("model_stock"), given({"a": {W: change * 0}, "b": {W: change * 0}}))[W]
    assert torch.equal(nothing, change * 0), "an untouched weight stays the base's, and is a number"
    pair = lora(2), lora(2)
    low, full = (merge(method("model_stock"), given({"a": {W: a}, "b": {W: b}}))[W] for a, b in (pair, [Delta(dense_=d.dense()) for d in pair]))
    assert torch.allclose(low, full, atol=1e-5), "angles of LoRAs are those of their products"
    with pytest.raises(ConfigError, match="at least two"):
        merge(method("model_stock"), given({"a": {W: change}}))


def blocks(count: int) -> list[str]:
    return [*(f"model.layers.{i}.mlp.up_proj.weight" for i in range(count)), "model.embed_tokens.weight", "model.norm.weight"]


def test_lines_scales_by_depth_and_everything_outside_by_alpha():
    names = blocks(12)
    changes = {n: noise(3, 3) for n in (*names, "model.layers.5.mlp.experts.11.weight")}
    world = given({"a": changes}, base=lambda: changes)
    found = merge(method("lines", alpha=0.2), world)
    for name, scale in {names[0]: 0.2, names[11]: 1.0, names[5]: 0.2 + 0.8 * 5 / 11, "model.embed_tokens.weight": 0.2, "model.norm.weight": 0.2,
                        "model.layers.5.mlp.experts.11.weight": 0.2 + 0.8 * 5 / 11}.items():
        assert torch.allclose(found[name], scale * changes[name], atol=1e-6), name
    assert all(torch.equal(v, changes[n]) for n, v in merge(method("lines", alpha=1.0, beta=0.0), world).items())
    only_last = given({"a": {names[11]: changes[names[11]], names[3]: changes[names[3]]}}, base=lambda: dict.fromkeys(names))
    assert torch.allclose(merge(method("lines", alpha=0.0), only_last)[names[3]], 3 / 11 * changes[names[3]]), "depth is the base's, not the adapter's"


def test_lines_over_several_adapters_computes_alpha():
    names = blocks(4)
    changes = {a: {n: noise(3, 3) for n in names} for a in "abc"}
    world = given(changes, base=lambda: changes["a"])
    found = merge(method("lines", beta=0.5), world)
    assert world.said["alpha"] == pytest.approx(1 / 3, rel=1e-6)
    assert torch.allclose(found[names[3]], (1 / 3 + 0.5) * sum(changes[a][names[3]] for a in "abc"), atol=1e-6)
    ties = {"ties": {"scope": "tensor", "density": 0.4}}
    world = given(changes, base=lambda: changes["a"])
    merge(method("lines", method=ties), world)
    trimmed = merge(method("ties", scope="tensor", density=0.4), given(changes))
    expected = sum(float(sum(changes[a][n] for a in "abc").abs().sum()) for n in names) / sum(float(t.abs().sum()) for t in trimmed.values()) / 3
    assert world.said["alpha"] == pytest.approx(expected, rel=1e-5)


def test_lines_refuses_what_has_no_depth():
    two = given({"a": {W: noise(2, 2)}}, base=lambda: {"encoder.layers.0.x": None, "decoder.layers.0.x": None})
    with pytest.raises(ConfigError, match="2 lists of numbered blocks"):
        merge(method("lines", alpha=0.5), two)
    with pytest.raises(ConfigError, match="needs `alpha`"):
        merge(method("lines"), given({"a": {W: noise(2, 2)}}, base=lambda: {W: None}))
    one = merge(method("lines", alpha=0.3, beta=0.4), given({"a": {W: torch.ones(2, 2)}}, base=lambda: {W: None}))[W]
    assert torch.allclose(one, torch.full((2, 2), 0.7)), "a model of one block"
    with pytest.raises(ConfigError, match="full rank out of LoRA"):
        merge(method("lines", alpha=0.5, method="ties"), given({"a": {W: lora(2)}, "b": {W: lora(2)}}, base=lambda: {W: None}))


@pytest.mark.parametrize("scope", ["row", "tensor"])
def test_breadcrumbs_keep_a_band_of_magnitude_ranks(scope: str):
    d = noise(6, 40)
    world = given({"a": {W: d}})
    found = merge(method("breadcrumbs", keep=0.15, outliers=0.1, scale=0.5, scope=scope), world)[W]
    rows = [(d[i], found[i]) for i in range(6)] if scope == "row" else [(d.flatten(), found.flatten())]
    for values, kept in rows:
        n = len(values)
        ranks = values.abs().argsort(descending=True).argsort()
        band = (ranks >= int(0.1 * n)) & (ranks < int(0.1 * n) + int(0.15 * n))
        assert torch.equal(kept != 0, band) and torch.allclose(kept[band], 0.5 * values[band])
        assert values[band].abs().max() < values[ranks < int(0.1 * n)].abs().min()
    assert world.said["kept"][W] == sum(int(0.15 * len(v)) for v, _ in rows) and world.said["scope"] == scope


def test_breadcrumbs_with_everything_kept_is_task_arithmetic_bit_for_bit():
    changes = {a: {W: noise(9, 8), "model.norm.weight": noise(8), "scalar": noise()} for a in "ab"}
    one = merge(method("breadcrumbs", keep=1.0, outliers=0.0, scale=0.4), given(changes))
    assert all(torch.equal(v, one[n]) for n, v in merge(method("task_arithmetic", scale=0.4), given(changes)).items())
    masked = merge(method("breadcrumbs", keep=0.5, outliers=0.0, scale=1.0), given({"a": changes["a"]}))
    assert masked["scalar"] == changes["a"]["scalar"], "a scalar has no ranks"
    with pytest.raises(ValueError, match="more than everything"):
        method("breadcrumbs", keep=0.9, outliers=0.2)


def test_stages_named_inside_a_method_are_inputs_of_the_merge():
    from ftpipe.stages.base import with_refs
    from ftpipe.stages.merge import Merge

    soup = Merge(adapters=["a", "b"], method={"greedy_soup": {"rows": "curated"}})
    fused = Merge(adapters=["a", "b"], method={"lines": {"beta": 0.5, "method": {"regmean": {"rows": {"a": "rows_a", "b": "rows_b"}}}}})
    assert soup.refs() == ["a", "b", "curated"] and fused.refs() == ["a", "b", "rows_a", "rows_b"]
    assert with_refs(fused, lambda n: f"{n}/last").refs() == ["a/last", "b/last", "rows_a/last", "rows_b/last"]

"""The forgetting law: cross-entropy under the base's distribution by hand, and planted laws found again."""

from __future__ import annotations

import numpy as np
import pytest

from ftpipe.evaluate.diagnostics.forgetting_law import Law, affine, fit_law, law_on_unseen_cells, soft_cross_entropy


class Table:
    """A model whose logits are looked up by token."""

    def __init__(self, logits):
        self.logits = logits

    def parameters(self):
        yield self.logits

    def __call__(self, input_ids):
        from types import SimpleNamespace

        return SimpleNamespace(logits=self.logits[input_ids])


def test_the_base_has_its_entropy_and_the_excess_is_the_mean_divergence(monkeypatch):
    import torch

    p, q = (torch.randn(11, 11, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    texts = [[1, 2, 3, 10], [5], [7, 7, 0, 4, 4, 4]]
    own, positions = soft_cross_entropy(Table(p), Table(p.clone()), texts)
    flat = [t for ids in texts for t in ids]
    entropy = torch.distributions.Categorical(logits=p[flat].double()).entropy().mean().item()
    assert positions == 11 and own == pytest.approx(entropy, abs=1e-4)
    whole, _ = soft_cross_entropy(Table(p), Table(q), texts)
    d = torch.distributions
    divergence = d.kl_divergence(d.Categorical(logits=p[flat].double()), d.Categorical(logits=q[flat].double())).mean().item()
    assert whole - entropy == pytest.approx(divergence, abs=1e-4) and divergence > 0.1
    monkeypatch.setattr("ftpipe.evaluate.diagnostics.forgetting_law.CHUNK_FLOATS", 22)
    assert soft_cross_entropy(Table(p), Table(q), texts)[0] == pytest.approx(whole, rel=1e-6)


def cells(law, noise: float = 0.0) -> list[tuple]:
    rng = np.random.default_rng(0)
    return [("x", n, t, None, float(law(n, t)) + noise * rng.normal()) for n in (1e5, 2e5, 4e5, 8e5) for t in (50, 100, 200, 400)]


PLANTED = Law(3.2, 0.5, 0.4, 0.6, 0.9, 0.7, 3e5, 150.0)


def test_a_planted_power_law_predicts_the_cells_that_it_was_not_fitted_to():
    rows = cells(lambda n, t: PLANTED.predict([n], [t])[0])
    fit = fit_law(*([r[i] for r in rows] for i in (1, 2, 4)))
    assert fit.predict([3e5, 1.6e6], [70, 800]) == pytest.approx(PLANTED.predict([3e5, 1.6e6], [70, 800]), abs=5e-3)
    found = law_on_unseen_cells(cells(lambda n, t: PLANTED.predict([n], [t])[0], noise=1e-4))
    assert found["holds (1) or not (0)"] == 1 and found["error of the law on the cells left out"] < 0.2 * found["error of a plane on the cells left out"]
    assert found == law_on_unseen_cells(cells(lambda n, t: PLANTED.predict([n], [t])[0], noise=1e-4)), "the same starts every time"


def test_where_a_plane_holds_the_law_does_not_and_few_cells_are_no_test():
    falling = law_on_unseen_cells(cells(lambda n, t: 9 - 0.3 * np.log(n) - 0.2 * np.log(t)))
    assert falling["holds (1) or not (0)"] == 0, "forgetting that falls with size and steps is not this law"
    assert law_on_unseen_cells(cells(lambda n, t: PLANTED.predict([n], [t])[0])[:12]) == {} and law_on_unseen_cells([]) == {}


def test_the_line_is_the_least_squares_line():
    slope, intercept, r2 = affine([1.0, 2.0, 3.0], [5.0, 3.0, 1.0])
    assert (slope, intercept, r2) == pytest.approx((-2.0, 7.0, 1.0))
    assert affine([1.0, 2.0], [1.0, 2.0]) is None and affine([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None

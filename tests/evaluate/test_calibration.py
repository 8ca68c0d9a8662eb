"""Calibration: the error of planted probabilities, and confidences of a model by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ftpipe.evaluate.diagnostics.calibration import Calibration, certainties, expected_calibration_error
from tests.artifacts import chat
from tests.evaluate.asking import given
from tests.evaluate.test_prompt_sensitivity import evidence


def test_the_error_is_the_mean_distance_of_the_bins():
    error, parts = expected_calibration_error(np.array([0.15, 0.15, 0.95, 0.95, 0.95, 0.95, 1.0, 0.0]), np.array([0, 1, 1, 1, 1, 0, 1, 0], bool), 10)
    assert [p[2] for p in parts] == [1, 2, 5]
    assert error == pytest.approx((1 * 0.0 + 2 * abs(0.5 - 0.15) + 5 * abs(0.8 - 0.96)) / 8)


def test_truth_is_near_zero_and_overconfidence_is_its_excess():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 0.9, 40_000)
    right = rng.random(40_000) < p
    assert expected_calibration_error(p, right, 15)[0] < 0.01
    assert expected_calibration_error(p + 0.1, right, 15)[0] == pytest.approx(0.1, abs=0.01)


def test_confidences_are_those_of_the_trained_tokens(tmp_path, tiny_model):
    import torch

    from ftpipe.models.service import ModelService

    asked = given(tmp_path, [chat("hello?", "yes"), chat("and?", "no no")])
    service = ModelService.open(str(tiny_model), asked.env, dtype="float32")
    shown = list(service.renderer.rows(asked.rows.table("heldout").to_pylist()))
    confidence, right = certainties(service, shown)
    expected = []
    for row in shown:
        with torch.inference_mode():
            p = torch.softmax(service.model(input_ids=torch.tensor([row.input_ids])).logits[0].double(), -1)
        expected += [(p[t - 1].max().item(), p[t - 1].argmax().item() == row.input_ids[t]) for t in range(1, len(row.input_ids)) if row.trained[t]]
    assert confidence == pytest.approx([c for c, _ in expected], rel=1e-4) and right.tolist() == [r for _, r in expected]
    assert len(right) == sum(r.trained_tokens for r in shown)
    whole = evidence(None, rows=asked.rows)
    object.__setattr__(whole, "model", str(tiny_model))
    object.__setattr__(whole, "env", asked.env)
    finding = Calibration(bins=5).diagnose(whole)
    assert finding.number("positions", "base") == len(right) and finding.number("mean confidence", "base") == pytest.approx(confidence.mean())
    assert finding.number("share right", "base") == right.mean() and f"on {len(right)} tokens" in finding.words
    assert sum(r["n"] for r in finding.table.to_pylist()) == len(right) and [s.name for s in finding.plots[0].series if not s.guide] == ["base"]

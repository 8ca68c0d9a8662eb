"""Learning against forgetting: the rank of planted changes, and the table of the arms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftpipe.evaluate.diagnostics import learns_less
from ftpipe.evaluate.diagnostics.base import Tuned
from ftpipe.evaluate.diagnostics.learns_less import LearnsLess, k90
from tests.evaluate.test_prompt_sensitivity import evidence


@pytest.mark.parametrize("q", [1, 7, 10, 20])
def test_k90_of_equal_orthogonal_terms_is_nine_tenths_of_their_number(q: int):
    import torch

    generator = torch.Generator().manual_seed(q)
    u, v = (torch.linalg.qr(torch.randn(40, q, generator=generator, dtype=torch.float64))[0] for _ in range(2))
    assert k90(torch.linalg.svdvals(3 * u @ v.T)) == -(-9 * q // 10)
    assert k90(torch.zeros(5)) == 0


def trained_as(folder: Path, method: dict, steps: int, rate: float) -> Tuned:
    folder.mkdir(parents=True)
    (folder / "ftpipe_adapter.json").write_text(json.dumps({"method": method, "base": {}}))
    return Tuned(folder, {"steps": steps, "settings": {"learning_rate": rate}})


def test_the_table_has_a_row_for_each_training_and_the_best_learning_rate_is_plotted(tmp_path, monkeypatch):
    import torch

    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 40, generator=generator)
    low = 0.1 * torch.randn(48, 2, generator=generator) @ torch.randn(2, 40, generator=generator)
    trained = {"adapter": ("lora", 2, 10, 1e-3, 0.2, -0.01), "lora_fast": ("lora", 2, 10, 1e-2, 0.5, -0.02), "lora_long": ("lora", 2, 20, 1e-2, 0.6, -0.03),
               "full": ("full", None, 10, 1e-4, 0.7, -0.4)}
    artifacts, compared = {}, []
    for system, (arm, r, steps, rate, learnt, kept) in trained.items():
        artifacts[system] = trained_as(tmp_path / system, {arm: {"r": r} if r else {}}, steps, rate)
        compared += [{"a": system, "b": "base", "suite": "heldout_loss", "difference": learnt}, {"a": system, "b": "base", "suite": "general_text",
                                                                                                 "difference": kept}]
    compared.append({"a": "adapter", "b": "full", "suite": "heldout_loss", "difference": 99.0})
    given = evidence(None)
    object.__setattr__(given, "adapters", artifacts)
    object.__setattr__(given, "comparisons", compared)
    dense = 1e-3 * torch.randn(48, 40, generator=generator)
    monkeypatch.setattr(learns_less, "changed_matrices", lambda e: ((s, {"w": (base, base + (dense if s == "full" else low))}) for s in e.adapters))
    finding = LearnsLess().diagnose(given)
    rows = {r["system"]: r for r in finding.table.to_pylist()}
    assert {s: (r["learning"], r["forgetting"]) for s, r in rows.items()} == {s: (t[4], -t[5]) for s, t in trained.items()}
    assert {s for s, r in rows.items() if r["chosen"]} == {"lora_fast", "lora_long", "full"}, "of two learning rates the better one counts"
    assert rows["adapter"]["numerical_rank"] == 2 and rows["adapter"]["k90_change"] <= 2 < rows["adapter"]["k90_noise"]
    full = rows["full"]
    assert abs(full["k90_change"] - full["k90_noise"]) <= 1 and full["numerical_rank"] == 40, "a change like noise has the rank of noise"
    assert finding.number("durations", of="lora r=2") == 2 and finding.number("durations", of="full") == 1
    assert finding.number("forgetting", "full") == 0.4 and {s.name: list(s.x) for s in finding.plots[0].series} == {"lora r=2": [0.02, 0.03], "full": [0.4]}

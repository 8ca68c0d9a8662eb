"""Planted directions are found, unchanged matrices have none."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest

from ftpipe.evaluate.diagnostics.base import Evidence, Tuned
from ftpipe.evaluate.diagnostics.intruder_dimensions import IntruderDimensions, best_matches


def matrix(seed: int, rows: int = 256, columns: int = 192):
    """A random matrix with a power-law spectrum, so that no two singular values are nearly equal."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return u @ torch.diag(torch.arange(1, columns + 1).float() ** -0.7) @ v.T


def unit(seed: int, n: int):
    import torch

    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    return x / x.norm()


def test_without_a_change_every_direction_matches_itself():
    values, matches = best_matches(matrix(0), matrix(0), 10)
    assert matches == pytest.approx([1.0] * 10, abs=1e-4) and values == pytest.approx([(j + 1) ** -0.7 for j in range(10)], rel=1e-4)


@pytest.mark.parametrize("seed", range(6))
def test_a_planted_direction_is_the_first_and_only_intruder(seed: int):
    import torch

    base = matrix(seed)
    _, matches = best_matches(base, base + 2 * torch.outer(unit(seed + 50, 256), unit(seed + 90, 192)), 10)
    assert matches[0] < 0.35 and sum(m < 0.5 for m in matches) == 1


def test_a_change_along_the_base_s_own_directions_intrudes_nowhere():
    import torch

    base = matrix(3)
    u, _, vh = torch.linalg.svd(base, full_matrices=False)
    _, matches = best_matches(base, base + 3 * torch.outer(u[:, 40], vh[40]), 10)
    assert min(matches) > 0.99


def test_counts_table_and_plot_of_real_adapters(tmp_path, tmp_path_factory):
    from ftpipe.stages.base import Environment
    from tests.evaluate.world import make_world

    world = make_world(tmp_path_factory.mktemp("world"))
    env = Environment(tmp_path, tmp_path, "test")
    adapters = {name: Tuned(world.adapters[name] / "adapter") for name in ("zero", "forgets")}
    seen = []
    evidence = Evidence(SimpleNamespace(), [], str(world.model), adapters, env, logging.getLogger("test"), lambda done, total: seen.append((done, total)))
    one, two = (IntruderDimensions(eps=0.9).diagnose(evidence) for _ in range(2))
    assert one.number("intruder dimensions", "zero") == 0 < one.number("intruder dimensions", "forgets")
    assert one.table.equals(two.table) and one.plots == two.plots and one.table["match"].to_pylist() == sorted(one.table["match"].to_pylist())
    assert set(one.table["system"].to_pylist()) == {"forgets"} and np.all(np.array(one.table["match"]) <= 1) and seen[-1] == (2, 2)

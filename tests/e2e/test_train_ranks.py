"""Two ranks: the same training as one, under every ZeRO stage, with unequal shares, with penalties on spread parameters."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.train import planted, small
from tests.train.fixtures import alone  # noqa: F401

pytestmark = pytest.mark.e2e
ROUNDING = 2e-5
"""Sums in another order."""


@pytest.fixture(scope="module")
def two(tiny_model, tmp_path_factory):
    """What two ranks find for all cases, in one pair of processes."""
    out = tmp_path_factory.mktemp("two")
    ranks = [subprocess.Popen([sys.executable, "-m", "tests.train.small", str(tiny_model), str(out)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env=planted.environment(RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2")) for r in range(2)]
    try:
        said = [r.communicate(timeout=300)[0].decode() for r in ranks]
    finally:
        for r in ranks:
            r.kill()
    assert all(r.returncode == 0 for r in ranks), "\n".join(said)
    return json.loads((out / "found.json").read_text())


@pytest.fixture(scope="module")
def one(tiny_model, alone):  # noqa: F811
    return {name: small.case(tiny_model, settings) for name, settings in small.CASES.items()}


@pytest.mark.parametrize("name", list(small.CASES))
def test_two_ranks_train_as_one_does(one, two, name):
    for mine, theirs in zip(one[name]["records"], two[name]["records"], strict=True):
        assert set(mine) == set(theirs)
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=ROUNDING)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
        assert (theirs["tokens"], theirs["trained_tokens"], theirs["rows"]) == (mine["tokens"], mine["trained_tokens"], mine["rows"])
    for parameter, values in one[name]["values"].items():
        assert two[name]["values"][parameter] == pytest.approx(values, abs=2e-4)
    for parameter, state in one[name]["state"].items():
        assert set(two[name]["state"][parameter]) == set(state) and two[name]["state"][parameter]["step"] == state["step"]
        assert state["step"] == 4 or name == "lisa"  # whose layers take turns


def test_all_stages_agree_on_two_ranks(two):
    reference = [r["loss"] for r in two["zero 0"]["records"]]
    for stage in (1, 2, 3):
        assert [r["loss"] for r in two[f"zero {stage}"]["records"]] == pytest.approx(reference, abs=ROUNDING)


def test_the_penalty_pulls_towards_the_start(one):
    assert one["l2"]["records"][0]["l2_start"] == 0.0
    assert [r["l2_start"] > 0 for r in one["l2"]["records"][1:]] == [True] * 3

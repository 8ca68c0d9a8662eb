"""Orders that are more than a sort."""

from __future__ import annotations

import pytest

from ftpipe.data.rows import RowSet
from ftpipe.errors import DataError
from tests.artifacts import kept_ids, rows_artifact, run_step, text


@pytest.mark.parametrize(("rate", "second"), [(0.25, 80), (1.0, 20), (20 / 220, 220)])
def test_scarce_sources_come_in_the_second_part_only_at_the_set_rate(tmp_path, rate, second):
    pool = rows_artifact(tmp_path, [text(f"{s}{i}", source=s) for s, n in (("a", 150), ("b", 50), ("rare", 12), ("odd", 8)) for i in range(n)])
    step = {"high_resource_first": {"low": ["rare", "odd"], "rate": rate}}
    made = run_step(tmp_path, pool, step, seed=1)
    order = [r["source"] in ("rare", "odd") for r in RowSet(made).table(columns=["source"]).to_pylist()]
    first = len(order) - second
    assert sorted(kept_ids(made)) == sorted(kept_ids(pool)) and not any(order[:first]) and sum(order[first:]) == 20
    for size in (4, 10, 25):  # any stretch of the second part holds its share, to a row on either side
        for start in range(first, len(order) - size + 1):
            assert abs(sum(order[start:start + size]) - rate * size) < 2
    assert made.json("high_resource_first.json") == {"first_part": first, "second_part": second, "held_back": 20}
    sources = [r["source"] for r in RowSet(made).table(columns=["source"]).to_pylist()]
    if first > 100:
        assert 0.5 < sources[:first].count("a") / first < 0.95, "the first part is drawn from all other sources"
    assert kept_ids(run_step(tmp_path, pool, step, seed=1)) == kept_ids(made) != kept_ids(run_step(tmp_path, pool, step, seed=2))


def test_repeated_rows_count_as_often(tmp_path):
    rows = [text(f"{s}{i}", source=s, times=t) | {"times": t} for s, n, t in (("much", 60, 1), ("rare", 5, 4)) for i in range(n)]
    made = run_step(tmp_path, rows_artifact(tmp_path, rows), {"high_resource_first": {"low": ["rare"]}})
    assert made.json("high_resource_first.json") == {"first_part": 40, "second_part": 40, "held_back": 20}
    table = RowSet(made).table(columns=["source", "times"]).to_pylist()
    assert all(r["source"] == "much" for r in table[:40]) and [r["source"] for r in table[40:]].count("rare") == 5


def test_mistakes_are_named(tmp_path):
    pool = rows_artifact(tmp_path, [text("a", source="a"), text("b", source="b"), text("c", source="b")])
    with pytest.raises(DataError, match="no source 'x'"):
        run_step(tmp_path, pool, {"high_resource_first": {"low": ["x"]}})
    with pytest.raises(DataError, match=r"(?s)2 rows of other sources are needed beside the 2 held back, there are 1.*at least 0.667"):
        run_step(tmp_path, pool, {"high_resource_first": {"low": ["b"]}})

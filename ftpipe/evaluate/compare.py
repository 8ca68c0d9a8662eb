"""From scores to tables: `items.parquet`, and every pair of systems that is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftpipe.errors import DataError
from ftpipe.evaluate.slicing import Way, in_order, parts
from ftpipe.evaluate.statistics import compare, holm, noise_floor, weighted_mean

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.evaluate.suites.base import Item, Score


def items_schema():
    """Arrow schema of `items.parquet`; see `suites.base.Item` and `Score`."""
    import pyarrow as pa

    return pa.schema([("system", pa.string()), ("suite", pa.string()), ("metric", pa.string()), ("item_id", pa.string()), ("slice", pa.string()),
                      ("score", pa.float64()), ("weight", pa.float64()), ("higher_is_better", pa.bool_()), ("source", pa.string())])


def items_table(found: Sequence[tuple[str, Item, Score]]) -> pa.Table:
    """The table of `items.parquet`, systems, suites and items in the order they came. Raises DataError for a score that is not finite."""
    import pyarrow as pa

    for system, item, score in found:
        if not (math.isfinite(score.score) and math.isfinite(score.weight)):
            raise DataError(f"{system} scores {score.score} on item {item.id} by {score.metric}", where=item.suite,
                            remedy="the model's numbers are not finite: was its training stable?")
    rows = [(system, item.suite, s.metric, item.id, item.slice, s.score, s.weight, s.higher_is_better, item.source) for system, item, s in found]
    columns = list(zip(*rows)) if rows else [[] for _ in items_schema()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, items_schema())], schema=items_schema())


def write_items(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


def comparisons(table: pa.Table, systems: Sequence[str], *, confidence: float, resamples: int, seed: int, method: Literal["bca", "percentile"],
                by_slice: bool = False) -> list[dict[str, Any]]:
    """Each suite and metric: the candidate against the base, the controls and the champion, then the controls and the champion against the base.

    Only items that both systems have a score for are compared. An unbounded side of an interval is null. Beside the documented fields each
    comparison has `mde` (smallest difference that would be found with 80 % power, null if none would), `p_value` (McNemar, for 0/1 scores), `p` (see
    `statistics.Comparison`) and `p_holm`: `p` corrected by Holm's procedure for all suites and metrics that the same pair is compared on.
    """
    how = {"confidence": confidence, "resamples": resamples, "seed": seed, "method": method, "by_slice": by_slice}
    others = [s for s in systems if s != "adapter"]
    pairs = [("adapter", other) for other in others] + [(other, "base") for other in others if other != "base"]
    found = [c for (suite, metric), by_system in _scores(table).items() for a, b in pairs
             if (c := _pair(suite, metric, a, b, by_system.get(a, {}), by_system.get(b, {}), **how))]
    for pair in pairs:
        family = [c for c in found if (c["a"], c["b"]) == pair and c["p"] is not None]
        for c, p in zip(family, holm([c["p"] for c in family])):
            c["p_holm"] = p
    return found


def part_comparisons(table: pa.Table, suite: str, metric: str, a: str, b: str, way: Way, **how: Any) -> dict[str, dict[str, Any]]:
    """The comparison of a with b on each part of a suite's items (`slicing.parts`), by the part's name. `how`: as for `comparisons`."""
    import pyarrow as pa
    import pyarrow.compute as pc

    mine = table.append_column("part", pa.array(parts(table, way), pa.string()))
    mine = mine.filter(pc.and_(pc.equal(mine["suite"], suite), pc.equal(mine["metric"], metric)))
    found = {}
    for part in in_order({p for p in mine["part"].to_pylist() if p}, way):
        by_system = _scores(mine.filter(pc.equal(mine["part"], part)))[suite, metric]
        if c := _pair(suite, metric, a, b, by_system.get(a, {}), by_system.get(b, {}), **how):
            found[part] = c
    return found


def _scores(table: pa.Table) -> dict[tuple[str, str], dict[str, dict[str, tuple]]]:
    """By suite and metric, system and item: score, weight, slice, and whether higher is better."""
    scores: dict[tuple[str, str], dict[str, dict[str, tuple]]] = {}
    for r in table.to_pylist():
        of_system = scores.setdefault((r["suite"], r["metric"]), {}).setdefault(r["system"], {})
        of_system[r["item_id"]] = (r["score"], r["weight"], r["slice"], r["higher_is_better"])
    return scores


def _pair(suite: str, metric: str, a: str, b: str, left: dict[str, tuple], right: dict[str, tuple], *, by_slice: bool, **how: Any) -> dict[str, Any] | None:
    ids = [i for i in left if i in right]
    if not ids or not any(left[i][1] > 0 for i in ids):
        return None
    r = compare([left[i][0] for i in ids], [right[i][0] for i in ids], [left[i][1] for i in ids], higher_is_better=left[ids[0]][3],
                groups=[left[i][2] for i in ids] if by_slice else None, **how)
    return {"suite": suite, "metric": metric, "a": a, "b": b, "n": r.n, "mean_a": r.mean_a, "mean_b": r.mean_b, "difference": r.difference,
            "low": _finite(r.low), "high": _finite(r.high), "confidence": r.confidence, "higher_is_better": r.higher_is_better, "better": r.better,
            "mde": _finite(r.mde), "p_value": r.p_value, "p": r.p, "p_holm": None}


def noise_floors(table: pa.Table, runs: Sequence[str], *, confidence: float) -> list[dict[str, Any]]:
    """For each suite and metric how far trainings that differ in their seed alone lie apart: the fields of `statistics.NoiseFloor`, with `by_run`, the
    weighted mean of each of `runs` over the items that all of them have a score for."""
    import numpy as np

    found = []
    for (suite, metric), by_system in _scores(table).items():
        ids = sorted(set.intersection(*(set(by_system.get(r, {})) for r in runs)))
        weights = np.asarray([by_system[runs[0]][i][1] for i in ids])
        if weights.sum() > 0:
            by_run = {r: weighted_mean(np.asarray([by_system[r][i][0] for i in ids]), weights) for r in runs}
            found.append({"suite": suite, "metric": metric, "by_run": by_run} | asdict(noise_floor([list(by_run.values())], confidence=confidence)))
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

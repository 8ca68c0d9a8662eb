"""From scores to tables: `items.parquet`, and every pair of systems that is compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftpipe.errors import DataError
from ftpipe.evaluate.statistics import compare, holm

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.evaluate.suites.base import Item, Score


def items_schema():
    """Arrow schema of `items.parquet`; see `suites.base.Item` and `Score`."""
    import pyarrow as pa

    return pa.schema([("system", pa.string()), ("suite", pa.string()), ("metric", pa.string()), ("item_id", pa.string()), ("slice", pa.string()),
                      ("score", pa.float64()), ("weight", pa.float64()), ("higher_is_better", pa.bool_())])


def items_table(found: Sequence[tuple[str, Item, Score]]) -> pa.Table:
    """The table of `items.parquet`, systems, suites and items in the order they came. Raises DataError for a score that is not finite."""
    import pyarrow as pa

    for system, item, score in found:
        if not (math.isfinite(score.score) and math.isfinite(score.weight)):
            raise DataError(f"{system} scores {score.score} on item {item.id} by {score.metric}", where=item.suite,
                            remedy="the model's numbers are not finite: was its training stable?")
    rows = [(system, item.suite, s.metric, item.id, item.slice, s.score, s.weight, s.higher_is_better) for system, item, s in found]
    columns = list(zip(*rows)) if rows else [[] for _ in items_schema()]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, items_schema())], schema=items_schema())


def write_items(table: pa.Table, path: Path) -> None:
    import pyarrow.parquet as pq

    pq.write_table(table, path, compression="zstd")


def comparisons(table: pa.Table, systems: Sequence[str], *, confidence: float, resamples: int, seed: int, method: Literal["bca", "percentile"],
                by_slice: bool = False) -> list[dict[str, Any]]:
    """Each suite and metric: the candidate against the base, the controls and the champion, then the controls against the base.

    Only items that both systems have a score for are compared. An unbounded side of an interval is null. Beside the documented fields each
    comparison has `mde` (smallest difference that would be found with 80 % power, null if none would), `p_value` (McNemar, for 0/1 scores), `p` (see
    `statistics.Comparison`) and `p_holm`: `p` corrected by Holm's procedure for all suites and metrics that the same pair is compared on.
    """
    scores: dict[tuple[str, str], dict[str, dict[str, tuple]]] = {}
    for r in table.to_pylist():
        of_system = scores.setdefault((r["suite"], r["metric"]), {}).setdefault(r["system"], {})
        of_system[r["item_id"]] = (r["score"], r["weight"], r["slice"], r["higher_is_better"])
    others = [s for s in systems if s != "adapter"]
    pairs = [("adapter", other) for other in others] + [(control, "base") for control in others if control not in ("base", "champion")]
    found = []
    for (suite, metric), by_system in scores.items():
        for a, b in pairs:
            left, right = by_system.get(a, {}), by_system.get(b, {})
            ids = [i for i in left if i in right]
            if not ids:
                continue
            result = compare([left[i][0] for i in ids], [right[i][0] for i in ids], [left[i][1] for i in ids], higher_is_better=left[ids[0]][3],
                             groups=[left[i][2] for i in ids] if by_slice else None, confidence=confidence, resamples=resamples, seed=seed, method=method)
            found.append({"suite": suite, "metric": metric, "a": a, "b": b, "n": result.n, "mean_a": result.mean_a, "mean_b": result.mean_b,
                          "difference": result.difference, "low": _finite(result.low), "high": _finite(result.high), "confidence": confidence,
                          "higher_is_better": result.higher_is_better, "better": result.better, "mde": _finite(result.mde), "p_value": result.p_value,
                          "p": result.p, "p_holm": None})
    for pair in pairs:
        family = [c for c in found if (c["a"], c["b"]) == pair and c["p"] is not None]
        for c, p in zip(family, holm([c["p"] for c in family])):
            c["p_holm"] = p
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

"""What an evaluation found of one system, for methods that ask how good the model made of some rows became."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ftpipe.errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact

ITEMS = "items.parquet"


def mean_score(evaluation: Artifact, suite: str, metric: str, system: str, where: str) -> tuple[float, bool]:
    """The mean of a system's scores, weighted as the evaluation weighs its items, and whether higher is better.

    metric: may be empty if the suite has one metric only. Raises ConfigError for a stage that evaluates nothing, DataError for what it has not measured.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not evaluation.has(ITEMS):
        raise ConfigError(f"{evaluation.name} is a {evaluation.kind} stage, which evaluates nothing", where=where, remedy="name an evaluate stage")
    table = pq.read_table(evaluation.file(ITEMS))
    for column, wanted in (("suite", suite), ("system", system), ("metric", metric)):
        known = sorted(set(table[column].to_pylist()))
        if wanted and wanted not in known:
            raise DataError(f"{evaluation.name} has no {column} {wanted!r}", where=where, remedy=nearest(wanted, known))
        if not wanted and len(known) > 1:
            raise DataError(f"{evaluation.name} has several of {column}: {', '.join(known)}", where=where, remedy=f"set {column}")
        table = table.filter(pc.equal(table[column], wanted or known[0]))
    weight = pc.sum(table["weight"]).as_py()
    return pc.sum(pc.multiply(table["score"], table["weight"])).as_py() / weight, bool(table["higher_is_better"][0].as_py())

"""How two registered versions differ: in what the stages behind them were told, in the rows, in the metrics."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError
from ftpipe.pipeline.plan import differences
from ftpipe.pipeline.store import Store
from ftpipe.registry import ledger, register
from ftpipe.stages.base import Environment


def difference(env: Environment, a: tuple[str, str], b: tuple[str, str]) -> dict[str, Any]:
    """Two versions, each (name, version or alias), compared.

    Returns:
        settings: {stage, change} in words, for stages of the same name behind both, and stages that only one has. rows: numbers of rows trained on by both,
        by one, and shown another number of times. metrics: {suite, metric, a, b}, means of the adapter in each version's own evaluation.
    Raises ConfigError for an unknown version, ArtifactError if the artifacts behind one are gone.
    """
    one, two = (register.show(env, *which) for which in (a, b))
    left, right = _behind(env, one), _behind(env, two)
    settings = [{"stage": name, "change": f"only behind {which['name']} version {which['version']}"}
                for mine, other, which in ((left, right, one), (right, left, two)) for name in mine if name not in other]
    for name in (n for n in left if n in right):
        settings += [{"stage": name, "change": words} for words in differences(left[name].manifest["material"], right[name].manifest["material"])]
    return {"settings": settings, "rows": _rows(left, one, right, two), "metrics": _metrics(left, right)}


def _behind(env: Environment, version: dict[str, Any]) -> dict[str, Artifact]:
    """The artifacts behind a version by stage name, what was made first first."""
    store = Store(env.workspace)
    found: dict[str, Artifact] = {}
    for key in version["stages"].values():
        try:
            artifact = store.get(key)
            for made in (*reversed(list(artifact.ancestors())), artifact):
                found.setdefault(made.name, made)
        except ArtifactError as error:
            raise ArtifactError(f"the artifacts behind version {version['version']} are not all there: {error.what}", where=str(env.workspace),
                                remedy="ask in the workspace that registered it") from error
    return found


def _rows(left: dict[str, Artifact], one: dict[str, Any], right: dict[str, Artifact], two: dict[str, Any]) -> dict[str, int]:
    import pyarrow.parquet as pq

    def seen(behind: dict[str, Artifact], version: dict[str, Any]) -> dict[str, int]:
        for artifact in behind.values():
            if artifact.has("seen.parquet") and artifact.has("adapter") and ledger.adapter_content(artifact) == version["content"]:
                table = pq.read_table(artifact.file("seen.parquet"), columns=["row_id", "times"])
                return dict(zip(table["row_id"].to_pylist(), table["times"].to_pylist()))
        return {}

    mine, theirs = seen(left, one), seen(right, two)
    both = mine.keys() & theirs.keys()
    return {"both": len(both), "only_a": len(mine) - len(both), "only_b": len(theirs) - len(both), "times": sum(mine[r] != theirs[r] for r in both)}


def _metrics(left: dict[str, Artifact], right: dict[str, Artifact]) -> list[dict[str, Any]]:
    def means(behind: dict[str, Artifact]) -> dict[tuple[str, str], float]:
        return {(c["suite"], c["metric"]): c["mean_a"] for a in behind.values() if a.has("comparisons.json") for c in a.json("comparisons.json")
                if c["a"] == "adapter"}

    mine, theirs = means(left), means(right)
    return [{"suite": s, "metric": m, "a": value, "b": theirs[s, m]} for (s, m), value in mine.items() if (s, m) in theirs]

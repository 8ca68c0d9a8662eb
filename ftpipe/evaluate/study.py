"""What a study finds: means and paired differences of arms over items and seeds, and what each arm cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError
from ftpipe.registry.ledger import adapter_content

BASE = "base"


def results(evaluation: Artifact, arms: dict[str, list[Artifact]], against: Sequence[str], confidence: float) -> dict[str, Any]:
    """Means and comparisons for each suite and metric.

    Returns:
        `means`: {suite, metric, higher_is_better, arm, mean, by_seed} for the base and each arm. `comparisons`: {suite, metric, a, b} and the fields of
        `statistics.ArmComparison` with `better` and `worse`: each arm against the base and against those in `against`. `forgetting`: suites that ask
        for what should not have changed. `first`: name of the first arm. `arms`: their steps, tokens and trained parameters (these do not differ from run to
        run), and `same_rows`: whether each step saw the rows that the first arm's saw (as far as both went); None if that is not known. `noise`,
        where there are two seeds or more: {suite, metric} and the fields of `statistics.NoiseFloor`, over all arms.

    Raises:
        ArtifactError: if the evaluation lacks one of the adapters.
    """
    from ftpipe.evaluate.statistics import compare_arms, noise_floor, weighted_mean

    about = evaluation.json("evaluation.json")
    systems = {arm: [_system(about, artifact, evaluation) for artifact in made] for arm, made in arms.items()}
    seeds = len(next(iter(arms.values())))
    systems = {BASE: [BASE] * seeds, **systems}
    means, compared, noise = [], [], []
    for (suite, metric), (scores, weights, higher) in _scores(evaluation).items():
        ids = sorted(set.intersection(*(set(scores.get(s, {})) for names in systems.values() for s in names)))
        w = [weights[i] for i in ids]
        if sum(x > 0 for x in w) < 2:
            continue
        of = {arm: [[scores[s][i] for i in ids] for s in names] for arm, names in systems.items()}
        for arm, values in of.items():
            by_seed = [_mean(row, w, weighted_mean) for row in values]
            means.append({"suite": suite, "metric": metric, "higher_is_better": higher, "arm": arm, "n": len(ids), "mean": sum(by_seed) / len(by_seed),
                          "by_seed": by_seed})
        if seeds > 1:
            by_arm = [m["by_seed"] for m in means if (m["suite"], m["metric"]) == (suite, metric) and m["arm"] != BASE]
            noise.append({"suite": suite, "metric": metric} | asdict(noise_floor(by_arm, confidence=confidence)))
        for arm in arms:
            for other in (BASE, *(b for b in against if b != arm)):
                c = compare_arms(of[arm], of[other], w, higher_is_better=higher, confidence=confidence)
                compared.append({"suite": suite, "metric": metric, "a": arm, "b": other, "confidence": confidence, "better": c.better, "worse": c.worse}
                                | asdict(c))
    return {"means": means, "comparisons": compared, "noise": noise, "forgetting": about["forgetting"], "seeds": seeds, "against": list(against),
            "first": next(iter(arms)),
            "arms": {arm: _trained(made) | {"same_rows": _same_rows(made, next(iter(arms.values())))} for arm, made in arms.items()}}


def costs(arms: dict[str, list[Artifact]], selection: dict[str, Artifact], pool: Artifact | None) -> dict[str, dict[str, Any]]:
    """By arm, as the manifests have it: `seconds` of training (median over seeds), of those `step_seconds` in its steps, `tokens_per_second`, `memory_bytes`
    (largest), `file_bytes` of the adapter, and `selection`: seconds and model tokens spent to choose its rows, on scores and on reference models."""
    from statistics import median

    shared = {a.key for a in pool.ancestors()} if pool else set()
    found = {}
    for arm, made in arms.items():
        notes = [a.manifest["notes"] for a in made]
        found[arm] = {name: choose(values) if (values := [n[name] for n in notes if name in n]) else None
                      for name, choose in (("seconds", median), ("step_seconds", median), ("tokens_per_second", median), ("memory_bytes", max))}
        found[arm]["file_bytes"] = max(sum(e["size"] for name, e in a.manifest["files"].items()
                                           if name.startswith("adapter/") and name.endswith(".safetensors")) for a in made)
        spent = [a for a in selection[arm].ancestors() if a.key not in shared] if arm in selection else []
        found[arm]["selection"] = {"seconds": sum(a.manifest["notes"].get("seconds", 0.0) for a in spent),
                                   "scored_tokens": sum(s["tokens"] for a in spent for s in a.manifest["notes"].get("scoring", [])),
                                   "trained_tokens": sum(a.counts.get("tokens", 0) for a in spent if a.kind == "train")}
    return found


def _system(about: dict[str, Any], artifact: Artifact, evaluation: Artifact) -> str:
    """The name under which the evaluation knows an adapter: it is found by content."""
    content = adapter_content(artifact)
    for name, identity in about["systems"].items():
        if identity.get("adapter") == content:
            return name
    raise ArtifactError(f"evaluation {evaluation.name} does not hold the adapter of {artifact.name}", where=str(evaluation.path))


def _trained(made: Sequence[Artifact]) -> dict[str, Any]:
    """What the trainings of an arm did, by seed; empty for adapters that no training made (a merge)."""
    told = [a.json("train.json") for a in made if a.has("train.json")]
    return {name: [t[name] for t in told] for name in ("rows", "steps", "tokens", "trained_tokens", "trainable")}


def _same_rows(made: Sequence[Artifact], first: Sequence[Artifact]) -> bool | None:
    """Whether the trainings of an arm showed the rows that those of the first arm did, seed by seed, in the same steps, as far as the shorter one went."""
    if not all(a.has("seen.parquet") for a in (*made, *first)):
        return None
    return all(_equal(a, b) for a, b in zip(made, first))


def _equal(a: Artifact, b: Artifact) -> bool:
    import pyarrow.parquet as pq

    seen = [{r["row_id"]: r["first_step"] for r in pq.read_table(x.file("seen.parquet"), columns=["row_id", "first_step"]).to_pylist()} for x in (a, b)]
    tokens = [pq.read_table(x.file("metrics.parquet"), columns=["tokens", "rows"]).to_pylist() for x in (a, b)]
    steps = min(map(len, tokens))
    early = [{row: step for row, step in s.items() if step <= steps} for s in seen]
    return early[0] == early[1] and tokens[0][:steps] == tokens[1][:steps]


def _mean(values: Sequence[float], weights: Sequence[float], mean: Any) -> float:
    import numpy as np

    return mean(np.asarray(values), np.asarray(weights))


def _scores(evaluation: Artifact) -> dict[tuple[str, str], tuple[dict[str, dict[str, float]], dict[str, float], bool]]:
    """By suite and metric: score by system and item, weight by item, and whether higher is better."""
    import pyarrow.parquet as pq

    found: dict[tuple[str, str], tuple[dict[str, dict[str, float]], dict[str, float], bool]] = {}
    for r in pq.read_table(evaluation.file("items.parquet")).to_pylist():
        scores, weights, _ = found.setdefault((r["suite"], r["metric"]), ({}, {}, r["higher_is_better"]))
        scores.setdefault(r["system"], {})[r["item_id"]] = r["score"]
        weights[r["item_id"]] = r["weight"]
    return found

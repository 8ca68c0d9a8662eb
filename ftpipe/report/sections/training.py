"""What training did: losses, learning rate, speed, and the settings beside those of the controls."""

from __future__ import annotations

from typing import Any

from ftpipe.artifacts import Artifact
from ftpipe.report.collect import RunData, params, seconds, table
from ftpipe.report.numbers import count, number, setting, size
from ftpipe.report.numbers import seconds as duration
from ftpipe.report.plots.curves import line, losses

POINTS = 400
INPUTS = ("rows", "name")


def build(run: RunData) -> dict[str, Any] | None:
    trained = {"adapter": run.adapter} if run.adapter and run.adapter in run.trainings else {}
    trained |= {name: a for name, a in run.controls.items() if a in run.trainings}
    if not trained:
        return None
    curves = [c for n, (name, a) in enumerate(trained.items()) if (c := _curve(name, a, ("adapter", "control", "control2")[min(n, 2)]))]
    plots = []
    for column, title, unit in (("learning_rate", "Learning rate", "step"), ("grad_norm", "Gradient norm", "step")):
        drawn = [{"colour": c["colour"], "x": c["step"], "y": c[column]} for c in curves if c.get(column) is not None]
        if drawn:
            plots.append({"title": title, "svg": line(drawn, f"train-{column}".replace("_", "-"), title, unit)})
    legend = [{"name": c["name"], "colour": c["colour"]} for c in curves]
    return {"losses": losses(curves, "losses", "Training loss over trained tokens") if curves else None, "legend": legend, "plots": plots,
            "names": list(trained), "facts": _side_by_side([_facts(a) for a in trained.values()]),
            "sources": _sources(next(iter(trained.values()))), "sources_of": next(iter(trained)),
            "settings": _side_by_side([_flat(_settings(a)) for a in trained.values()])}


def _curve(name: str, artifact: Artifact, colour: str) -> dict[str, Any] | None:
    import numpy as np

    if not artifact.has("metrics.parquet"):
        return None
    read = {k: np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            for k, values in table(artifact, "metrics.parquet").to_pydict().items() if k in ("step", "loss", "learning_rate", "grad_norm", "trained_tokens")}
    if "loss" not in read or not np.isfinite(read["loss"]).any():
        return None
    steps = read.get("step", np.arange(1, len(read["loss"]) + 1))
    smooth = _running_mean(read["loss"])
    thin = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), POINTS)).astype(int))
    seen = np.cumsum(np.nan_to_num(read["trained_tokens"])) if "trained_tokens" in read else steps
    curve = {"name": name, "colour": colour, "step": steps[thin], "x": seen[thin], "y": read["loss"][thin], "smooth": smooth[thin]}
    for column in ("learning_rate", "grad_norm"):
        if column in read and np.isfinite(read[column]).any():
            curve[column] = read[column][thin]
    return curve


def _sources(artifact: Artifact) -> list[dict[str, str]]:
    """Of each source of rows how much was trained on, and its mean loss of a token in the first and the last tenth of the steps; none for a single source."""
    import numpy as np

    told = artifact.json("train.json").get("sources", {}) if artifact.has("train.json") else {}
    if len(told) < 2 or not artifact.has("metrics.parquet"):
        return []
    read = {k: np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            for k, values in table(artifact, "metrics.parquet").to_pydict().items() if k.startswith(("loss/", "trained_tokens/"))}
    lines = []
    for name, of in sorted(told.items(), key=lambda s: (-s[1]["trained_tokens"], s[0])):
        line = {"name": name, "rows": count(of["rows"]), "tokens": count(of["tokens"]), "trained_tokens": count(of["trained_tokens"]), "first": "", "last": ""}
        losses, tokens = read.get(f"loss/{name}"), read.get(f"trained_tokens/{name}")
        if losses is not None and tokens is not None:
            tenth = max(len(losses) // 10, 1)
            for key, part in (("first", slice(None, tenth)), ("last", slice(-tenth, None))):
                weights = np.nan_to_num(tokens[part])
                if weights.sum():
                    line[key] = number(float((np.nan_to_num(losses[part]) * weights).sum() / weights.sum()), 3)
        lines.append(line)
    return lines


def _running_mean(values: Any) -> Any:
    """Mean over a centred window of a twelfth of the run, shorter at the ends; a run of less than 24 steps stays as it is."""
    import numpy as np

    half = len(values) // 24
    finite = np.isfinite(values)
    sums, counts = np.cumsum(np.r_[0.0, np.where(finite, values, 0)]), np.cumsum(np.r_[0, finite])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def totals(artifact: Artifact) -> dict[str, Any]:
    """Steps, rows, tokens and trained_tokens of a training, as far as it says."""
    stated = artifact.json("train.json") if artifact.has("train.json") else {}
    if artifact.has("metrics.parquet"):
        read = table(artifact, "metrics.parquet", ("step", "tokens", "trained_tokens")).to_pydict()
        for name in ("tokens", "trained_tokens"):
            if name in read:
                stated.setdefault(name, sum(v or 0 for v in read[name]))
        if read.get("step"):
            stated.setdefault("steps", read["step"][-1])
    return stated


def _facts(artifact: Artifact) -> dict[str, str]:
    import numpy as np

    notes, stated = artifact.manifest.get("notes", {}), totals(artifact)
    facts = {title: count(stated[key]) for key, title in (("steps", "steps"), ("epochs", "epochs"), ("rows", "rows"), ("tokens", "tokens seen"),
                                                          ("trained_tokens", "tokens trained on"), ("trainable", "parameters that train"))
             if isinstance(stated.get(key), (int, float))}
    if artifact.has("seen.parquet"):
        for name, values in table(artifact, "seen.parquet", ("tokens", "trained_tokens")).to_pydict().items():
            if values:
                facts[f"{name.replace('_', ' ')} in a row: median, most"] = f"{count(float(np.median(values)))}, {count(max(values))}"
    if artifact.has("metrics.parquet"):
        values = [v for v in table(artifact, "metrics.parquet", ("loss",)).to_pydict().get("loss", []) if v is not None]
        if values:
            tenth = max(len(values) // 10, 1)
            facts["loss, first tenth"], facts["loss, last tenth"] = (number(float(np.mean(part)), 3) for part in (values[:tenth], values[-tenth:]))
    if notes.get("tokens_per_second"):
        facts["tokens a second, median"] = count(notes["tokens_per_second"])
    if notes.get("memory_bytes"):
        facts["peak memory"] = size(notes["memory_bytes"])
    if notes.get("ranks"):
        facts |= {"ranks": setting(notes["ranks"]), "device": setting(notes.get("device")), "ZeRO stage": setting(notes.get("zero"))}
    if seconds(artifact) is not None:
        facts["time"] = duration(seconds(artifact))
    return facts


def _settings(artifact: Artifact) -> dict[str, Any]:
    return {k: v for k, v in params(artifact).items() if k not in INPUTS}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.") if item else {f"{prefix}{key}": ""}
        else:
            flat[f"{prefix}{key}"] = setting(item)
    return flat


def _side_by_side(sets: list[dict[str, str]]) -> list[dict[str, Any]]:
    """One line for each key of any set; `same` says whether all sets agree on it."""
    keys = list(dict.fromkeys(k for s in sets for k in s))
    return [{"key": k, "values": [s.get(k, "") for s in sets], "same": len({s.get(k, "") for s in sets}) == 1} for k in keys]

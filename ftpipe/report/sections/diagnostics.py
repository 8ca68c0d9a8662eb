"""What else was looked at: each diagnostic's answer in words, its numbers, its plots and its table. None is treated apart."""

from __future__ import annotations

from typing import Any

from ftpipe.report.collect import RunData, table
from ftpipe.report.numbers import NONE, count, number, percent, setting
from ftpipe.report.plots.evidence import chart, dots
from ftpipe.report.plots.style import roles
from ftpipe.report.sections.comparison import role_name
from ftpipe.report.summary import in_order
from ftpipe.report.text import brief

FOLDER = "diagnostics/"
ROWS = 12
DRAW = {"chart": chart, "dots": dots}


def build(run: RunData) -> dict[str, Any] | None:
    if run.evaluation is None:
        return None
    files = [n for n in run.evaluation.manifest["files"] if n.startswith(FOLDER) and n.endswith(".json")]
    stated = list(run.about.get("diagnostics", []))
    names = sorted((n.removeprefix(FOLDER).removesuffix(".json") for n in files), key=lambda n: (stated.index(n) if n in stated else len(stated), n))
    found = [_diagnostic(run, name) for name in names]
    return {"diagnostics": found} if found else None


def _diagnostic(run: RunData, name: str) -> dict[str, Any]:
    told = run.evaluation.json(f"{FOLDER}{name}.json")
    systems = in_order(dict.fromkeys(n["system"] for n in told["numbers"] if n["system"]))
    return {"name": name.replace("_", " "), "question": told["question"], "words": told["words"], "systems": [role_name(s, run) for s in systems],
            "by_system": _lines(told, systems), "others": _lines(told, [""]), "plots": [_plot(p, run, f"diagnostic-{name.replace('_', '-')}-{i}")
                                                                                     for i, p in enumerate(told["plots"])],
            "table": _table(run, f"{FOLDER}{name}.parquet")}


def _lines(told: dict[str, Any], systems: list[str]) -> list[dict[str, Any]]:
    """The numbers of `systems`, a line for each measure and what it was measured on, with its meaning where the measure first stands."""
    value = {(n["measure"], n["of"], n["system"]): n["value"] for n in told["numbers"]}
    lines, explained = [], set()
    for measure, of in dict.fromkeys((n["measure"], n["of"]) for n in told["numbers"] if n["system"] in systems):
        about = told["measures"][measure]
        unit = "" if about["unit"] in ("share", "count") else about["unit"]
        lines.append({"measure": measure, "of": of, "unit": unit, "meaning": "" if measure in explained else about["meaning"],
                      "values": [_written(value.get((measure, of, s)), about["unit"]) for s in systems]})
        explained.add(measure)
    return lines


def _written(value: float | None, unit: str) -> str:
    if unit == "share":
        return percent(value) if value is None or value >= 0 else f"\N{MINUS SIGN}{percent(-value)}"
    return count(value) if unit == "count" else number(None if value is None else float(value))


def _plot(plot: dict[str, Any], run: RunData, name: str) -> dict[str, Any]:
    series = plot["series"]
    names = list(series) if isinstance(series, dict) else [s["name"] for s in series if not s["guide"]]
    colours = roles(in_order(names), list(run.controls))
    return {"title": plot["title"], "svg": DRAW[plot["kind"]](plot, colours, name), "wide": plot["kind"] == "dots",
            "legend": [{"name": role_name(n, run), "colour": c} for n, c in colours.items()] if len(colours) > 1 else []}


def _table(run: RunData, file: str) -> dict[str, Any] | None:
    """The first rows of the table."""
    if not run.evaluation.has(file):
        return None
    read = table(run.evaluation, file)
    shown = read.slice(0, ROWS).to_pylist()
    right = {n for n in read.column_names if all(isinstance(r[n], (int, float)) and not isinstance(r[n], bool) for r in shown if r[n] is not None)}
    return {"file": file, "heads": [{"name": n.replace("_", " "), "right": n in right} for n in read.column_names],
            "rows": [[{"text": _cell(r[n]), "right": n in right} for n in read.column_names] for r in shown], "count": count(read.num_rows),
            "more": count(read.num_rows - len(shown)) if read.num_rows > len(shown) else ""}


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, (bool, str)):
        return brief(setting(value), 60)
    return count(value) if isinstance(value, int) else number(float(value))

"""The model card of a version: README.md in the hub's schema, filled from the artifacts and from nothing else."""

from __future__ import annotations

import re
from typing import Any


def card(name: str, *, base: dict[str, Any], method: dict[str, Any], verdict: dict[str, Any], comparisons: list[dict[str, Any]],
         lineage: list[dict[str, Any]], peft: bool, quantize: dict[str, Any] | None = None, about: dict[str, Any] | None = None,
         data: list[dict[str, Any]] | None = None, found: dict[str, str] | None = None) -> str:
    """Markdown with YAML front matter.

    Args:
        base: identity of the base model. `base_model` is set only if it was named by hub id: the hub refuses anything else.
        method: `{name: settings}` of the adapter. peft: whether plain PEFT can load it.
        quantize: `{name: settings}` of what made the base small that it was trained on, if anything did.
        verdict: the gate's `verdict.json`. comparisons: the evaluation's `comparisons.json`.
        lineage: `{name, kind, key, counts}` of each stage, nearest first.
        about: the evaluation's `evaluation.json`. found: what its diagnostics found, in words, by their names.
        data: where the rows were read, `{source, settings, hub}` each; hub: whether the source is a data set of the hub by its id.
    """
    from huggingface_hub import EvalResult, ModelCardData

    about, data = about or {}, data or []
    hub_id = base.get("model", "") if base.get("revision") else None
    own = [c for c in comparisons if c["a"] == "adapter" and c["b"] == "base"]
    results = [EvalResult(task_type="text-generation", dataset_type=c["suite"], dataset_name=c["suite"], metric_type=c["metric"], metric_name=c["metric"],
                          metric_value=round(c["mean_a"], 6)) for c in own]
    sets = list(dict.fromkeys(d["settings"]["path"] for d in data if d["hub"]))
    head = ModelCardData(model_name=name, base_model=hub_id, library_name="peft" if peft else "ftpipe", pipeline_tag="text-generation",
                         tags=["ftpipe", *(["base_model:adapter:" + hub_id] if hub_id else []), *method], eval_results=results or None, datasets=sets or None,
                         metrics=list(dict.fromkeys(c["metric"] for c in own)) or None)
    if hub_id:
        head.base_model_relation = "adapter"
    return "\n".join([f"---\n{head.to_yaml()}\n---\n", f"# {name}\n", *_about(base, method, quantize), "## Evaluation\n", *_results(comparisons),
                      "## Limits\n", *_limits(comparisons, about, quantize, found or {}), "## Verdict\n", *[f"* {r['text']}" for r in verdict["rules"]], "",
                      "## Data and lineage\n", *_data(data), *_lineage(lineage),
                      "Every file's SHA-256 is in `manifest.json`. `ftpipe trace` lists the rows that made this adapter, and how often each was seen.\n"])


def _about(base: dict[str, Any], method: dict[str, Any], quantize: dict[str, Any] | None) -> list[str]:
    small = [f"It was trained on, and belongs to, that base with its linear layers quantised by {_method(quantize)}. On the base as it is, or merged into it, "
             "it is another model than the one evaluated here; `ftpipe.models.loading.load_merged` folds it into the weights that the quantised base stands "
             "for.\n"] if quantize else []
    return [f"An adapter made with {_method(method)} for `{base.get('model', 'an unnamed base')}`.\n", *small, "| base | SHA-256 |", "|---|---|",
            *[f"| {part} | `{base[part]}` |" for part in ("weights", "config", "tokenizer", "chat_template", "revision") if base.get(part)], ""]


def _method(method: dict[str, Any]) -> str:
    (kind, settings), = method.items()
    shown = ", ".join(f"{k} {v}" for k, v in settings.items() if not isinstance(v, (dict, list)) or len(str(v)) < 80)
    return f"`{kind}`{f' ({shown})' if shown else ''}"


def _results(comparisons: list[dict[str, Any]]) -> list[str]:
    rows = ["| suite | metric | adapter | against | its value | better by | interval | items |", "|---|---|---|---|---|---|---|---|"]
    for c in comparisons:
        if c["a"] == "adapter":
            span = "unbounded" if c["low"] is None or c["high"] is None else f"{c['low']:+.4f} to {c['high']:+.4f}"
            rows.append(f"| {c['suite']} | {c['metric']} | {c['mean_a']:.4f} | {c['b']} | {c['mean_b']:.4f} | {c['difference']:+.4f} | {span} | {c['n']} |")
    return [*rows, ""]


def _limits(comparisons: list[dict[str, Any]], about: dict[str, Any], quantize: dict[str, Any] | None, found: dict[str, str]) -> list[str]:
    """What is known to be lost, and what was not measured."""
    own = [c for c in comparisons if c["a"] == "adapter" and c["b"] == "base"]
    asked = ", ".join(f"{c['n']} items of {c['suite']}" for c in own)
    said = [f"It was measured on {asked} only, against the same items under the base."] if own else []
    for c in own:
        span = "an unbounded interval" if c["low"] is None or c["high"] is None else f"interval {c['low']:+.4f} to {c['high']:+.4f}"
        if c["suite"] in about.get("forgetting", []):
            change = "better" if c["difference"] >= 0 else "worse"
            said.append(f"Forgetting: on {c['suite']} it is {change} than the base by {abs(c['difference']):.4f} ({span}).")
        elif c["high"] is not None and c["high"] < 0:
            said.append(f"On {c['suite']} it is worse than the base by {-c['difference']:.4f} ({span}).")
        if c.get("mde"):
            said.append(f"On {c['suite']} a true difference smaller than {c['mde']:.4f} would as a rule not have shown.")
    noise = about.get("noise", [])
    said += [f"The luck of a seed: two trainings like it differ on {n['suite']} by less than {n['floor']:.4f} ({n['confidence']:.0%}, from {n['runs']} runs)."
             for n in noise] or ["It is one training with one seed; the luck of the seed is in no interval."]
    if not any(c["metric"] == "refusal" for c in own):
        said.append("Whether it still refuses what it should was not measured.")
    if quantize:
        said.append("It belongs to a quantised base; on the base as it is it was not measured.")
    said += [f"{name.replace('_', ' ')}: {_safe(words)}" for name, words in found.items()]
    return [*(f"* {s}" for s in said), ""]


def _data(data: list[dict[str, Any]]) -> list[str]:
    said = []
    for d in data:
        settings = ", ".join(f"{k} {v}" for k, v in d["settings"].items() if v not in (None, "", [], {}))
        said.append(f"* rows from `{d['source']}`{': ' + _safe(settings) if settings else ''}")
    return [*said, ""] if said else []


def _lineage(lineage: list[dict[str, Any]]) -> list[str]:
    rows = ["| stage | kind | key | rows |", "|---|---|---|---|"]
    for stage in lineage:
        counts = "; ".join(f"{_safe(k)} {v}" for k, v in stage["counts"].items())
        rows.append(f"| {stage['name']} | {stage['kind']} | `{stage['key'][:16]}` | {counts} |")
    return [*rows, ""]


def _safe(text: str) -> str:
    return re.sub(r"[|\n]", " ", text)

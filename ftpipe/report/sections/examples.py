"""The same questions answered by the base model, the adapter and whatever else was asked."""

from __future__ import annotations

from typing import Any

from ftpipe.report.collect import RunData, table
from ftpipe.report.sections.comparison import role_name
from ftpipe.report.summary import systems
from ftpipe.report.text import clip

ITEMS, LENGTH = 8, 1200


def build(run: RunData) -> dict[str, Any] | None:
    if run.evaluation is None or not run.evaluation.has("examples.parquet"):
        return None
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for line in table(run.evaluation, "examples.parquet").to_pylist():
        item = items.setdefault((line.get("suite") or "", line["item_id"]),
                                {"suite": line.get("suite") or "", "item_id": line["item_id"], "prompt": line.get("prompt"),
                                 "reference": line.get("reference"), "answers": {}})
        item["answers"][line["system"]] = line.get("answer")
    if not items:
        return None
    shown = list(items.values())[:ITEMS]
    order = systems([{"means": dict.fromkeys(name for item in shown for name in item["answers"])}])
    several = len({item["suite"] for item in items.values()}) > 1
    return {"items": [_item(i, order, run, several) for i in shown], "left_out": len(items) - len(shown)}


def _item(item: dict[str, Any], order: list[str], run: RunData, several: bool) -> dict[str, Any]:
    answers = [{"system": role_name(s, run), "adapter": s == "adapter", "text": clip(item["answers"][s], LENGTH)} for s in order if s in item["answers"]]
    return {"item_id": item["item_id"], "suite": item["suite"] if several else "", "prompt": clip(item["prompt"], LENGTH),
            "reference": clip(item["reference"], LENGTH) if item["reference"] else None, "answers": answers}

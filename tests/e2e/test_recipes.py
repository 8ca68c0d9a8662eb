"""The comparison and the recipes that ship run to their end, as they are but for a tiny model in bfloat16, in which real models come, and less to do.

Not `tulu`, whose nine trainings are all of one kind; that it can be planned is shown in `tests/pipeline/test_recipes.py`.
"""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

from tests.e2e.chain import ftpipe, make_project

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
SHORT = ["model=model", "stages.audit.max_tokens=400"]
OWN_ROWS = [*SHORT, "stages.ingest.group_by=topic", "stages.ingest.heldout.share=0.3"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_project(tmp_path_factory.mktemp("recipes"))
    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    rows = (folder / "rows.jsonl").read_text().splitlines()
    for name, part in (("common", rows[:40]), ("extra-1", rows[40:65]), ("extra-2", rows[65:90])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n")
    for file in (*files("configs").iterdir(), *(files("configs") / "recipes").iterdir()):
        if file.name.endswith(".yaml"):
            shutil.copy(file, folder)
    return folder


def run(base: Path, name: str, folder: Path, *words: str, changes: list[str]) -> Path:
    """Run the file in a workspace of its own; returns the store."""
    ftpipe(base, "run", name, "--no-prefect", *words, *(f"--set={c}" for c in [*changes, f"workspace={folder}"]))
    record = json.loads(max((folder / "runs").glob("*.json")).read_text())
    assert record["state"] == "succeeded"
    return folder / "store"


def test_six_ways_to_train_are_compared(base: Path, tmp_path: Path) -> None:
    store = run(base, "compare.yaml", tmp_path, "--to", "compare_report",
                changes=[*SHORT, "stages.ingest.source.python_docs.limit=100", "stages.ingest.source.python_docs.max_chars=250"])
    study = json.loads(next(store.glob("study-*/study.json")).read_text())
    assert set(study["arms"]) == {"lora", "pissa", "dft", "bitfit", "lisa", "full"}
    assert "<svg" in next(store.glob("report-*/report.html")).read_text()


def test_answers_are_judged_and_corrected(base: Path, tmp_path: Path) -> None:
    store = run(base, "clear.yaml", tmp_path, changes=[*OWN_ROWS, "stages.judged.steps=[exact_dedup, bsdetector: {samples: 1, max_new_tokens: 4}]",
                                                      "stages.corrected.steps=[clear: {corrector: first, max_new_tokens: 4}]"])
    assert len(list(store.glob("train-*"))) == 3 and len(list(store.glob("evaluate-*"))) == 1


def test_models_of_several_data_sets_become_a_soup(base: Path, tmp_path: Path) -> None:
    store = run(base, "points.yaml", tmp_path, changes=[*OWN_ROWS, "stages.soup.method.greedy_soup.share=1"])  # four held-out groups are too few to part
    assert len(list(store.glob("merge-*"))) == 2 and len(list(store.glob("evaluate-*"))) == 1

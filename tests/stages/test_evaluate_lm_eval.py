"""lm-evaluation-harness on local task files: per-item scores, checked against likelihoods computed by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ftpipe.errors import ConfigError
from ftpipe.pipeline.runner import run
from ftpipe.pipeline.spec import build
from tests.evaluate.world import World, config

CHOICE = """
task: pick_answer
dataset_path: json
dataset_kwargs: {data_files: {test: pick.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: prose
dataset_path: json
dataset_kwargs: {data_files: {test: prose.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pick.yaml").write_text(CHOICE)
    (folder / "prose.yaml").write_text(ROLLING)
    docs = [{"question": f"code {i}?", "choices": [f"<{i:02d}|11|22> ok", "the river runs"], "label": i % 2} for i in range(6)]
    (folder / "pick.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    (folder / "prose.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in ("a river runs to the sea", "bread is made of flour and water")))
    return folder


def evaluated(world: World, workspace: Path, folder: Path, **settings):
    data = config(world, workspace, "good", evaluate={"suites": [{"lm_eval": {"folder": str(folder)} | settings}], "examples": 0, "diagnostics": []})
    del data["stages"]["gate"], data["stages"]["register"]
    return run(build(data)).artifacts["evaluate"]


def test_local_tasks_are_scored_item_by_item_as_by_hand(world: World, workspace: Path, tasks: Path):
    import torch

    from ftpipe.models.service import ModelService

    before = os.getcwd()
    artifact = evaluated(world, workspace, tasks, tasks=["pick_answer", "prose"])
    assert os.getcwd() == before
    items = pq.read_table(artifact.file("items.parquet")).to_pylist()
    assert {(i["suite"], i["metric"]) for i in items} == {("pick_answer", "acc"), ("prose", "nats_per_word")}
    env = build(config(world, workspace, "good")).env
    for system, folder in (("base", None), ("adapter", world.adapters["good"] / "adapter")):
        service = ModelService.open(str(world.model), env, adapter=folder, dtype="float32")

        def likelihood(context: str, said: str, service=service) -> float:
            start, ids = len(service.tokenizer(context)["input_ids"]), service.tokenizer(context + said)["input_ids"]
            with torch.inference_mode():
                logs = service.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            return sum(logs[t - 1, ids[t]].item() for t in range(start, len(ids)))

        docs = [json.loads(line) for line in (tasks / "pick.jsonl").read_text().splitlines()]
        right = [float(max((0, 1), key=lambda c, d=d: likelihood(d["question"], " " + d["choices"][c])) == d["label"]) for d in docs]
        assert [i["score"] for i in items if i["system"] == system and i["suite"] == "pick_answer"] == right
        found = [i for i in items if i["system"] == system and i["suite"] == "prose"]
        texts = [json.loads(line)["text"] for line in (tasks / "prose.jsonl").read_text().splitlines()]
        bos = service.tokenizer.bos_token
        assert [i["weight"] for i in found] == [len(t.split()) for t in texts]
        assert [i["score"] for i in found] == pytest.approx([-likelihood(bos, t) / len(t.split()) for t in texts], rel=1e-4)
    accuracy = next(c for c in artifact.json("comparisons.json") if c["suite"] == "pick_answer")
    assert accuracy["p_value"] is not None and accuracy["higher_is_better"]


def test_more_items_ask_only_for_the_new_ones_but_examples_bind_items_together(world: World, workspace: Path, tasks: Path):
    assert evaluated(world, workspace, tasks, tasks=["pick_answer"], limit=4).manifest["notes"]["asked"] == 8
    assert evaluated(world, workspace, tasks, tasks=["pick_answer"]).manifest["notes"]["asked"] == 4
    (tasks / "shots.yaml").write_text(CHOICE.replace("pick_answer", "shots") + "num_fewshot: 2\nfewshot_split: test\n")
    first = evaluated(world, workspace, tasks, tasks=["shots"], limit=4)
    assert first.manifest["notes"]["asked"] == 8
    assert evaluated(world, workspace, tasks, tasks=["shots"]).manifest["notes"]["asked"] == 12, "a prompt's examples depend on all documents asked"


def test_a_changed_task_file_is_asked_anew(world: World, workspace: Path, tasks: Path):
    evaluated(world, workspace, tasks, tasks=["pick_answer"])
    (tasks / "pick.yaml").write_text(CHOICE.replace('"{{question}}"', '"Q: {{question}}"'))
    assert evaluated(world, workspace, tasks, tasks=["pick_answer"]).manifest["notes"]["asked"] == 12


def test_an_unknown_task_is_answered_with_the_nearest(world: World, workspace: Path, tasks: Path):
    with pytest.raises(ConfigError, match="did you mean 'pick_answer'"):
        evaluated(world, workspace, tasks, tasks=["pick_anser"])
    with pytest.raises(ConfigError, match="no such folder"):
        evaluated(world, workspace, tasks / "nowhere", tasks=["pick_answer"])

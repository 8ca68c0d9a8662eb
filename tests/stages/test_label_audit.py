"""The label audit: planted faults are dropped with their reason, and a fault of the whole set stops the run."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as pq
import pytest
import yaml

from ftpipe.artifacts import DECISIONS
from ftpipe.data.rows import ANNOTATIONS, KEPT, RowSet
from ftpipe.errors import ConfigError, DataError
from ftpipe.pipeline import plan, runner, spec, store
from tests.tiny import CHAT_TEMPLATE

GOOD = [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(40)]


@pytest.fixture()
def model(tiny_model, tmp_path):
    """A copy of the tiny model whose template may be replaced."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.fixture()
def pipeline(tmp_path, model):
    def load(rows, heldout=0.3, **settings):
        settings = {"max_tokens": 120} | settings
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        config = tmp_path / "c.yaml"
        config.write_text(yaml.safe_dump({"name": "t", "model": "model", "workspace": str(tmp_path / "ws"), "stages": {
            "ingest": {"source": {"jsonl": {"path": "d.jsonl"}}, "heldout": {"share": heldout}},
            "audit": {"kind": "label_audit", "rows": "ingest", **settings}}}))
        return spec.load(config)

    return load


@pytest.fixture()
def audit(pipeline):
    def run(rows, heldout=0.3, **settings):
        return runner.run(pipeline(rows, heldout, **settings)).artifacts["audit"]

    return run


def set_template(model, template):
    (model / "chat_template.jinja").write_text(template)


def dropped(artifact):
    origin = {r["row_id"]: r["line"] for r in RowSet(artifact.inputs()["ingest"]).table(None, ["row_id", "line"]).to_pylist()}
    return {origin[d["row_id"]]: d["reason"] for d in pq.read_table(artifact.file(DECISIONS)).to_pylist() if not d["kept"]}


def test_good_rows_pass_and_are_counted(audit):
    artifact = audit(GOOD)
    summary = artifact.json("audit.json")
    assert dropped(artifact) == {} and artifact.counts == {"rows_in": 40, "rows_kept": 40}
    assert {s: n["rows"] for s, n in summary["splits"].items()} == {s: RowSet(artifact).count(s) for s in ("train", "heldout")}
    notes = {n["row_id"]: n for n in pq.read_table(artifact.file(ANNOTATIONS)).to_pylist()}
    rows = RowSet(artifact).table(None).to_pylist()
    assert len(notes) == len(rows) == 40
    for row in rows:  # one token a byte
        prompt = len(f"|user\n{row['messages'][0]['content']}|\n|assistant\n")
        answer = len(row["messages"][1]["content"]) + 1
        assert notes[row["row_id"]] == {"row_id": row["row_id"], "prompt_tokens": prompt, "trained_tokens": answer, "tokens": prompt + answer + 1}
    train = [notes[r["row_id"]] for r in rows if r["split"] == "train"]
    assert summary["splits"]["train"]["trained_share"] == pytest.approx(sum(n["trained_tokens"] for n in train) / sum(n["tokens"] for n in train))
    assert summary["example"]["marked"].endswith(".<|im_end|>]]\n") and "[[It is" in summary["example"]["marked"]
    assert summary["end_tokens"] == {"<|im_end|>": 40}
    assert pq.read_table(artifact.file(KEPT))["position"].to_pylist() == list(range(40))


def test_planted_faults_are_dropped_each_with_its_reason(audit):
    bad = [
        {"prompt": "p" * 130, "completion": "short"},
        {"prompt": "q", "completion": "a" * 130},
        {"prompt": "q", "completion": "stop here<|im_end|> and go on"},
        {"prompt": "<|im_start|>system\nobey", "completion": "no"},
        {"messages": [{"role": "assistant", "content": "I begin."}]},
        {"text": "x" * 130},
        {"prompt": "p", "chosen": "fine", "rejected": "r" * 130},
        {"prompt": "p" * 94, "completion": "x"},  # the prompt alone just fits: 7 + 94 + 2 + 11 = 114 tokens, then "x" and the end of turn
    ]
    artifact = audit([*GOOD, *bad])
    assert dropped(artifact) == {
        41: "prompt exceeds max_tokens", 42: "answer is truncated", 43: "a message holds the control token <|im_end|>",
        44: "a message holds the control token <|im_start|>", 45: "the conversation starts with the answer", 46: "text is longer than max_tokens",
        47: "answer is truncated"}
    assert artifact.counts["rows_in"] == 48 and artifact.counts["rows_kept"] == 41
    reasons = artifact.json("audit.json")["reasons"]
    assert sum(r["rows"] for r in reasons.values()) == 7
    assert reasons["answer is truncated"]["origin"] == "d.jsonl:42"


def test_truncated_answers_may_be_kept_but_not_lost_prompts(audit):
    artifact = audit([*GOOD, {"prompt": "q", "completion": "a" * 130}, {"prompt": "p" * 130, "completion": "x"}], truncate=True)
    assert dropped(artifact) == {42: "prompt exceeds max_tokens"}
    longest = max(pq.read_table(artifact.file(ANNOTATIONS)).to_pylist(), key=lambda n: n["trained_tokens"])
    assert longest["tokens"] == 120 and longest["trained_tokens"] == 120 - longest["prompt_tokens"]


def test_end_of_turn_counts_where_padding_is_eos(audit, model):
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|im_end|>"}))
    artifact = audit(GOOD)
    summary = artifact.json("audit.json")
    assert summary["tokenizer"]["pad_is_eos"] and summary["end_tokens"] == {"<|im_end|>": 40}
    assert all(n["trained_tokens"] >= 2 for n in pq.read_table(artifact.file(ANNOTATIONS)).to_pylist())


@pytest.mark.parametrize("template, reason", [
    (CHAT_TEMPLATE.replace("+ '<|im_end|>' + '\n'", "+ '\n'"), "the end of turn is not trained"),
    ("<|im_start|>" + CHAT_TEMPLATE, "BOS is doubled"),
    (CHAT_TEMPLATE.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>"), "the chat template's training rendering does not continue"),
    ("{{ raise_exception('no such role') }}", "the chat template refuses the conversation: no such role"),
])
def test_a_bad_template_stops_the_run_and_names_a_row(audit, model, template, reason):
    set_template(model, template)
    with pytest.raises(DataError) as caught:
        audit(GOOD)
    assert f"40 of 40 rows fail the label audit (max_failed is 0.2): 40 x {reason}" in str(caught.value)
    assert "(d.jsonl:1)" in str(caught.value)
    assert "chat template" in caught.value.remedy


def test_a_missing_bos_is_judged_by_the_tokenizers_own_convention(audit, model):
    data = json.loads((model / "tokenizer.json").read_text())
    data["post_processor"] = {"type": "TemplateProcessing",
                              "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                              "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                              "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
    (model / "tokenizer.json").write_text(json.dumps(data))
    path = model / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "<|endoftext|>"}))
    with pytest.raises(DataError, match="40 x BOS is missing"):
        audit(GOOD)
    assert audit(GOOD, require_bos=False).counts["rows_kept"] == 40
    set_template(model, "{{ bos_token }}" + CHAT_TEMPLATE)
    assert audit([*GOOD[:39], {"text": "plain text gets its BOS too"}]).counts["rows_kept"] == 40


def test_a_template_that_rewrites_history_loses_long_conversations_only(audit, model):
    set_template(model, CHAT_TEMPLATE.replace("message['content'] +", "(message['content'] if message['role'] != 'assistant' or loop.last else '...') +"))
    long = {"messages": [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))]}
    artifact = audit([*GOOD, long])
    assert dropped(artifact) == {41: "the chat template rewrites earlier turns when later ones follow"}


def test_a_turn_that_ends_otherwise_than_the_tokenizer_says_is_a_warning(audit, model):
    set_template(model, CHAT_TEMPLATE.replace("<|im_end|>", "<|endoftext|>"))
    assert "turns end with <|endoftext|>, but the tokenizer's EOS is <|im_end|>" in audit(GOOD).json("audit.json")["warnings"][0]


def test_the_limit_of_failures_and_a_lost_side(audit):
    long = [{"prompt": f"p{i}", "completion": "a" * 130} for i in range(10)]
    with pytest.raises(DataError, match=r"10 of 50 rows fail the label audit \(max_failed is 0.1\): 10 x answer is truncated, for example row [0-9a-f]{32}"):
        audit([*GOOD, *long], max_failed=0.1)
    assert audit([*GOOD, *long], max_failed=0.2).counts["rows_kept"] == 40
    with pytest.raises(DataError, match="no train row passes the label audit"):
        audit(long, heldout=0, max_failed=1)


def test_a_context_the_model_does_not_have(audit):
    with pytest.raises(ConfigError, match="max_tokens is 4096, but the model reads 512 tokens"):
        audit(GOOD, max_tokens=4096)


def test_a_base_tokenizer_without_a_template(audit, model):
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="has no chat template"):
        audit(GOOD)
    assert audit([{"text": f"plain {i}"} for i in range(40)]).counts["rows_kept"] == 40


def test_new_weights_do_not_audit_again_but_a_new_template_does(pipeline, model):
    def planned():
        loaded = pipeline(GOOD)
        return {p.name: (p.run, p.reason) for p in plan.plan(loaded, store.Store(loaded.env.workspace))}

    runner.run(pipeline(GOOD))
    assert planned() == {"ingest": (False, "unchanged"), "audit": (False, "unchanged")}
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert planned()["audit"] == (False, "unchanged")
    set_template(model, CHAT_TEMPLATE + " ")
    assert planned()["audit"] == (True, "chat_template changed")


def test_the_artifact_has_the_same_bytes_each_time(tmp_path, pipeline):
    loaded = pipeline(GOOD)
    first = runner.run(loaded).artifacts["audit"].manifest["files"]
    again = runner.run(loaded, selection=runner.Selection.of(loaded, force=["audit"])).artifacts["audit"]
    assert again.manifest["files"] == first

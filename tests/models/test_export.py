"""What leaves ftpipe: other programs load it, and it computes what was trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ftpipe.cli.chat import _streamer
from ftpipe.errors import ArtifactError, ConfigError, DataError
from ftpipe.models import batch
from ftpipe.models.export import export_adapter, export_merged
from ftpipe.models.loading import load_adapted, load_tokenizer
from ftpipe.pipeline.adapters import locate
from ftpipe.stages.base import Environment
from tests.artifacts import chat, complete
from tests.models.data import trained_adapter

PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, merged, tokens = sys.argv[1], sys.argv[2], sys.argv[3], torch.tensor([json.loads(sys.argv[4])])
from peft import PeftModel
with torch.inference_mode():
    a = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)(tokens).logits
    b = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(tokens).logits
    c = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(tokens).logits
own = json.load(open(adapter + "/adapter_config.json"))["base_model_name_or_path"]
print(json.dumps({"adapter": a[0, -1].tolist(), "merged": b[0, -1].tolist(), "base": c[0, -1].tolist(), "own": own, "ftpipe": "ftpipe" in sys.modules,
                  "template": bool(AutoTokenizer.from_pretrained(adapter).chat_template)}))
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    rows = complete([chat(f"question {i}", f"answer {i}") for i in range(6)])
    return trained_adapter(tmp_path_factory.mktemp("export"), tiny_model, rows, steps=3)


@pytest.fixture
def env(tmp_path) -> Environment:
    return Environment(tmp_path, tmp_path, "t")


def test_plain_peft_and_transformers_load_it_in_a_fresh_process(trained, tiny_model, env, tmp_path):
    import torch

    folder = trained.file("adapter")
    export_adapter(str(tiny_model), env, folder, tmp_path / "lora")
    export_merged(str(tiny_model), env, folder, tmp_path / "merged", dtype="float32")
    tokens = [5, 9, 33, 70, 12]
    done = subprocess.run([sys.executable, "-c", PLAIN, str(tiny_model), str(tmp_path / "lora"), str(tmp_path / "merged"), json.dumps(tokens)], cwd=tmp_path,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with torch.inference_mode():
        ours = load_adapted(str(tiny_model), env, folder, dtype="float32")(torch.tensor([tokens])).logits[0, -1]
    assert torch.allclose(torch.tensor(found["adapter"]), ours, atol=1e-5) and torch.allclose(torch.tensor(found["merged"]), ours, atol=1e-4)
    assert not torch.allclose(torch.tensor(found["base"]), ours, atol=1e-3), "the adapter does something"
    assert found["own"] == str(tiny_model) and not found["ftpipe"] and found["template"]


def test_nothing_is_written_over_or_half(trained, tiny_model, env, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        export_adapter(str(tiny_model), env, trained.file("adapter"), tmp_path / "there")
    monkeypatch.setattr("ftpipe.models.loading.load_tokenizer", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_adapter(str(tiny_model), env, trained.file("adapter"), tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["there"]


def test_answers_go_on_after_a_cut_and_depend_on_their_prompt_alone(trained, tiny_model, env, tmp_path, monkeypatch):
    prompts, out, whole = tmp_path / "p.jsonl", tmp_path / "a.jsonl", tmp_path / "whole.jsonl"
    rows = [{"prompt": f"question {i}", "id": i} for i in range(4)] + [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    arguments = {"max_new_tokens": 6, "temperature": 0.7, "base": True}
    assert batch.answer_file(str(tiny_model), env, trained.file("adapter"), prompts, whole, **arguments) == 5
    answers = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [a.get("id") for a in answers] == [0, 1, 2, 3, None] and all({"answer", "base_answer", "finished"} <= set(a) for a in answers)
    out.write_text("".join(whole.read_text().splitlines(keepends=True)[:2]) + '{"prompt": "question 2", "ans')
    assert batch.answer_file(str(tiny_model), env, trained.file("adapter"), prompts, out, **arguments) == 5
    assert out.read_text() == whole.read_text()
    prompts.write_text('{"prompt": "another"}\n')
    with pytest.raises(DataError, match="answers to other prompts"):
        batch.answer_file(str(tiny_model), env, trained.file("adapter"), prompts, out, **arguments)


@pytest.mark.parametrize(("text", "said"), [('{"prompt": "a"}\n{"id": 3}\n', "p.jsonl:2"), ('{"prompt": "a"\n', "p.jsonl:1"), ("\n", "no prompts"),
                                            ('{"messages": []}\n', "p.jsonl:1")])
def test_bad_prompts_are_named_before_a_model_is_loaded(env, tmp_path, text, said):
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=said):
        batch.answer_file("no-such-model", env, None, tmp_path / "p.jsonl", tmp_path / "a.jsonl", max_new_tokens=3)


def test_an_answer_is_written_as_it_comes(trained, tiny_model, env, capsys):
    from ftpipe.models.service import ModelService

    service = ModelService.open(str(tiny_model), env, adapter=trained.file("adapter"))
    prompt = service.renderer.prompt([{"role": "user", "content": "question 1"}])
    answer, = service.generate([prompt], max_new_tokens=8, batch_size=1, streamer=_streamer(service))
    plain, = service.generate([prompt], max_new_tokens=8, batch_size=1)
    assert capsys.readouterr().out.strip() == answer.text.strip() == plain.text.strip()


def test_an_adapter_is_found_by_folder_or_told_what_there_is(trained, tmp_path):
    found = locate(tmp_path, str(trained.file("adapter")))
    assert found.folder == trained.file("adapter") and found.model == trained.json("adapter/ftpipe_adapter.json")["base"]["model"]
    assert load_tokenizer(found.model, found.env)
    with pytest.raises(ConfigError, match="no adapter is called 'nothing'"):
        locate(tmp_path, "nothing")
    with pytest.raises((ConfigError, ArtifactError)):
        locate(tmp_path, "0123456789abcdef")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no ftpipe_adapter.json"):
        locate(tmp_path, str(tmp_path / "empty"))
    assert Path(found.folder).is_dir()

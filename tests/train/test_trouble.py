"""What people meet when things go wrong in a run: where it stopped, on which rows, and what to change."""

from __future__ import annotations

import json
import math

import pytest

from ftpipe.errors import InfrastructureError, TrainingError
from ftpipe.train import loop
from ftpipe.train.lifeline import Reporter
from tests.train import planted
from tests.train.small import InMemory, examples, small_run, steps
from tests.train.test_supervise import HOLD, watch


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kernels", [False, True])
def test_a_model_that_mixes_packed_rows_stops_before_its_first_step(model, tmp_path, monkeypatch, kernels):
    """The trap of transformers: borders of packed sequences are not found and nothing says so. Planted in the mask, and in the kernel."""
    import transformers.masking_utils as masks

    from ftpipe.models.kernels import attention

    heard = []

    class Hears(Reporter):
        def __call__(self, event, **values):
            heard.append(event)

    with monkeypatch.context() as broken:
        broken.setattr(masks, "find_packed_sequence_indices", lambda position_ids: None)
        whole = attention.sequences
        broken.setattr(attention, "sequences", lambda *a: found and (sum(found),) if (found := whole(*a)) else found)
        with pytest.raises(TrainingError, match="rows of one sequence see each other") as caught:
            planted.in_process(tmp_path / "broken", model, monkeypatch, kernels=kernels, steps=1, report=Hears())
    assert "packing: false" in caught.value.remedy and caught.value.where.startswith("rows r") and "step" not in heard
    result = planted.in_process(tmp_path / "sound", model, monkeypatch, kernels=kernels, steps=1)
    assert 0 <= json.loads((result / "metrics.json").read_text())["packing_difference"] < 1e-5


def test_a_leak_between_later_rows_is_found_too(model):
    """The last of four rows sees the third, and no other sees another: little in a mean over all, by which bf16 has to be judged."""
    import torch
    from transformers import AutoModelForCausalLM

    from ftpipe.train import forward
    from ftpipe.train.batches import lay_out

    rows = examples(4)
    batch, singles = lay_out(rows, 1.0), [lay_out([r], 1.0) for r in rows]
    (_, end), (start, _) = batch.spans()[2:]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    class Merges(torch.nn.Module):
        config = loaded.config

        def forward(self, input_ids, position_ids=None, **more):
            if position_ids is not None and input_ids.shape[1] == batch.tokens:
                position_ids = torch.cat([position_ids[:, :start], position_ids[:, start:] + position_ids[0, end - 1] + 1], 1)
            return loaded(input_ids=input_ids, position_ids=position_ids, **more)

    with pytest.raises(TrainingError, match="changing one moves another"):
        forward.check_packing(Merges(), batch, singles, "bfloat16")
    assert forward.check_packing(loaded, batch, singles, "bfloat16") < 1e-5


@pytest.mark.usefixtures("alone")
def test_a_loss_that_is_no_number_names_the_row_it_is_of(model):
    """One row of eight holds a token whose embedding is not a number; they share a micro-batch (torch's own attention would spread it over all of that)."""
    import torch

    from ftpipe.models import kernels
    from ftpipe.train.objective.base import Example

    rows = examples(8)
    rows[5] = Example("sick", ([*rows[5].input_ids[0][:-4], 251, *rows[5].input_ids[0][-3:]],), rows[5].trained)
    run = small_run(model)
    kernels.install(run.model)
    run.model.get_input_embeddings().register_forward_hook(lambda m, given, out: torch.where((given[0] == 251)[..., None], math.nan, out))
    with pytest.raises(TrainingError, match="the loss is nan") as caught:
        steps(run, rows, 1, batch_tokens=10_000)
    assert caught.value.where == "step 1, rank 0, rows sick"


def test_a_loss_that_climbs_names_the_rows_of_the_step():
    divergence = loop.Divergence(2.0)
    rows = InMemory(examples(3))
    with pytest.raises(TrainingError, match="training diverges") as caught:
        for i, loss in enumerate([1.0] * 8 + [20.0] * 8):
            divergence.see({"loss": loss, "step": i + 1, "learning_rate": 0.1, "grad_norm": 1.0}, lambda: [e.row_id for e in rows.all])
    assert "rows r0, r1, r2" in caught.value.where and "step 9" in caught.value.where


def test_memory_that_runs_out_before_the_first_step_says_what_to_set(tmp_path, monkeypatch):
    from ftpipe.train import rank

    def train(job, report):
        import torch

        report.alive("loading the model")
        torch.zeros(2**50)

    events = tmp_path / "events.jsonl"
    monkeypatch.setenv("FTPIPE_EVENTS", str(events))
    monkeypatch.setattr(loop, "train", train)
    from tests.train.small import job

    job(tmp_path / "rendezvous").write(tmp_path / "job.json")
    assert rank.main(str(tmp_path / "job.json")) == 1
    told = json.loads(events.read_text().splitlines()[-1])
    assert (told["kind"], told["what"]) == ("TrainingError", "out of memory while loading the model") and "quantize: nf4" in told["remedy"]


WAITS = HOLD + """
report.alive('step 3, a micro-batch of 9 tokens')
exec(compile('def all_reduce():\\n    time.sleep(600)\\nall_reduce()', '/lib/torch/distributed/distributed_c10d.py', 'exec'))
"""
STUCK = HOLD + """
import ctypes
time.sleep(0.4)
report.alive('step 3, a micro-batch of 7 tokens')
print('the last it printed', flush=True)
def never_returns():
    ctypes.PyDLL(None).sleep(600)
never_returns()
"""


def test_of_silent_ranks_the_one_that_is_stuck_is_named_and_where_it_is(tmp_path):
    """Rank 0 has been silent for longer, but waits in a collective operation; rank 1 sits in a call that holds the interpreter."""
    with pytest.raises(InfrastructureError, match=r"rank 1 has been silent for 1\.5 s; the last it said was: step 3, a micro-batch of 7 tokens") as caught:
        watch(tmp_path, {"rank 0": WAITS, "rank 1": STUCK}, timeout=1.5)
    said = caught.value.what
    assert "the last it printed" in said and "in never_returns" in said.split("rank 0")[0]
    assert "rank 0 waits for the others; the last it said was: step 3, a micro-batch of 9 tokens" in said


def test_each_ranks_last_lines_are_in_the_log_of_the_stage(tmp_path, monkeypatch):
    """Through `launch`, with ranks that only print and die."""
    import sys

    from ftpipe.train import launch
    from tests.train.small import job

    said = {0: HOLD + "print('words of zero', flush=True); time.sleep(60)",
            1: HOLD + "time.sleep(.3); print('words of one', flush=True); report('failed', kind='TrainingError', what='w', where='', remedy=''); sys.exit(1)"}
    real = launch.environment
    monkeypatch.setattr(launch, "environment", lambda *a, **b: real(*a, **b) | {"PYTHONPATH": planted.environment()["PYTHONPATH"]})
    monkeypatch.setattr(launch, "rank_command", lambda rank, file: [sys.executable, "-c", said[rank]])
    from dataclasses import replace

    lines = []
    wanted = replace(job(tmp_path / "rendezvous", world=2), checkpoints=str(tmp_path / "c"), tokens=str(tmp_path), result=str(tmp_path / "result"))
    with pytest.raises(TrainingError, match="w"):
        launch.launch(wanted, tmp_path, hear=lambda event: None, log=lines.append, render=lambda: None)
    text = "\n".join(lines)
    assert "rank 0 printed last:\n    words of zero" in text and "rank 1 printed last:\n    words of one" in text

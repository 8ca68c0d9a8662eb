"""Adapters that hold only what changed, through the whole train stage: real ranks, rows looked at before training, the check of the saved adapter, merging."""

from __future__ import annotations

import pytest

from ftpipe.errors import ConfigError
from tests.train import planted
from tests.train.small import examples, small_run, steps
from tests.train.sparse import saved, whole


@pytest.mark.parametrize(("adapt", "names"), [
    ({"layer_norm": {"fisher_share": 0.05, "fisher_rows": 6}}, {"entries", "values"}),  # 8 of 160: few even if all lie in one norm of 32
    ({"s2ft": {"down": 0.1, "value": 0.5}}, {"rows", "columns", "change"}),
])
def test_the_stage_trains_saves_and_verifies(tiny_model, tmp_path, adapt, names):
    from safetensors.torch import load_file

    ctx = planted.train(tmp_path, tiny_model, adapt=adapt, steps=3, zero=2, heartbeat=300)
    assert ctx.notes["probe_difference"] < 1e-5
    tensors = load_file(ctx.out / "adapter" / "weights.safetensors")
    assert {n.partition("::")[2] for n in tensors} == names
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert size < 30_000, "of 140,000 bytes of weights"


@pytest.mark.usefixtures("alone")
def test_changed_entries_are_read_as_changes_of_weights(tiny_model, tmp_path):
    """What merging, editing and compressing work on."""
    from ftpipe.merge._deltas import read

    run = small_run(tiny_model, adapt={"gmt": {"keep_ratio": 0.02}})
    steps(run, examples(), 1)
    saved(run, tmp_path / "a")
    base = dict(run.load_base().named_parameters())
    deltas = read(tmp_path / "a", lambda: base)
    for name, value in whole(run).items():
        difference = value.double() - base[name].double()
        assert deltas[name].dense().equal(difference) if name in deltas else not bool(difference.any())
    assert deltas


@pytest.mark.usefixtures("alone")
def test_biases_that_the_base_does_not_have_are_no_changes_of_weights(tiny_model, tmp_path):
    from ftpipe.merge._deltas import read

    run = small_run(tiny_model, adapt={"bitfit": {"missing": "add"}})
    steps(run, examples(), 1)
    saved(run, tmp_path / "a")
    with pytest.raises(ConfigError, match="which the base model does not have"):
        read(tmp_path / "a", lambda: dict(run.load_base().named_parameters()))

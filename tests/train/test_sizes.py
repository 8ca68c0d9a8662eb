"""Sizes from a number of parameters: what is counted without weights is what trains."""

from __future__ import annotations

import copy

import pytest

from ftpipe import slots
from ftpipe.errors import ConfigError, FtpipeError
from ftpipe.stages.base import Environment
from ftpipe.train.run import Run
from ftpipe.train.sizes import Fitted, fitted, trainable
from tests.contract.test_train_slots import NAMES, SETTINGS

LAYER = 2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64)
"""Of the tiny model: inputs and outputs of the seven linear layers of one of its two layers, added up."""
LOOKS_AT_ROWS = ("eva", "corda")


@pytest.fixture(scope="module")
def count(tiny_model, tmp_path_factory):
    env = Environment(tmp_path_factory.mktemp("ws"), tiny_model, "test")
    return lambda method: trainable(method, str(tiny_model), env)


def method(**form):
    return slots.parse("train/adapt", form)


def test_what_is_counted_without_weights_is_what_the_real_model_trains_and_grows_with_the_size(count, tiny_model):
    """Every method; those that only the real model can tell say so."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).requires_grad_(False)
    run = Run(model=None, load_base=lambda: whole, identity={"model": ""}, load_tokenizer=lambda: AutoTokenizer.from_pretrained(tiny_model))
    sizes, left = {}, set()
    for name in NAMES["adapt"]:
        given = method(**{name: SETTINGS.get(name, {})})
        try:
            counted = count(given)
        except FtpipeError as error:
            assert "no data" in str(error) or "meta" in str(error), error
            left.add(name)
            continue
        model = copy.deepcopy(whole)
        prepared = given.outline(model, run) if name in LOOKS_AT_ROWS else given.prepare(model, run)
        assert counted == sum(p.numel() for p in prepared.parameters() if p.requires_grad) > 0, name
        found = [fit for n in ((96, 160) if name == "s2ft" else (2, 4)) if (fit := given.sized(n))]
        if found and name != "lisa":  # of two layers
            sizes[name] = [count(m) for m in found]
    assert left == {"adamss", "frod", "shira"}
    assert len(sizes) > 25 and not [n for n, (small, large) in sizes.items() if not small < large]


@pytest.mark.parametrize("form, target, size, number", [
    ({"lora": {"r": 16, "alpha": 32}}, 5 * 2 * LAYER, {"r": 5, "alpha": 10}, 5 * 2 * LAYER),
    ({"lora": {"r": 16, "alpha": 32}}, 5.6 * 2 * LAYER, {"r": 6, "alpha": 12}, 6 * 2 * LAYER),
    ({"lora": {"r": 4, "alpha": 8, "rslora": True}}, 16 * 2 * LAYER, {"r": 16, "alpha": 16}, 16 * 2 * LAYER),
    ({"lora": {}}, 1, {"r": 1, "alpha": 2}, 2 * LAYER),
    ({"pissa": {"r": 4}}, 10**9, {"r": 16}, 16 * 2 * LAYER),  # the smallest matrix has rank 16
    ({"adalora": {}}, 10 * 2 * (LAYER + 7), {"init_r": 10, "target_r": 7}, 10 * 2 * (LAYER + 7)),
    ({"bottleneck": {"size": 64, "norms": False}}, 4 * (9 * (2 * 32 + 1) + 32), {"size": 9}, 4 * (9 * (2 * 32 + 1) + 32)),
    ({"lisa": {"active": 1}}, 10**9, {"active": 2}, None),
    ({"s2ft": {"down": 0.5}}, 32 * 13, {}, 32 * 13),  # 13 of the 128 channels
    ({"prefix_tuning": {}}, 7 * 2 * 2 * 16, {"num_virtual_tokens": 7}, 7 * 2 * 2 * 16),
], ids=lambda v: next(iter(v)) if isinstance(v, dict) and v and isinstance(next(iter(v.values())), dict) else "")
def test_the_size_that_trains_nearest_to_a_number_is_found(form, target, size, number, count):
    given = method(**form)
    found = fitted(given, target, count)
    assert size.items() <= found.method.model_dump().items()
    assert found.trainable == (number or found.trainable) == count(found.method)
    assert f"{found.trainable:,} parameters" in found.note


@pytest.mark.parametrize("form", [{"bitfit": {"missing": "add"}}, {"full": {}}, {"layer_norm": {}}], ids=lambda form: next(iter(form)))
def test_a_method_without_a_size_says_what_it_has(form, count):
    given = method(**form)
    assert fitted(given, 1000, count) == Fitted(given, count(given), f"no setting for its size: {count(given):,} parameters")


def test_what_cannot_be_told_without_rows_is_left_to_training(count):
    given = method(layer_norm={"fisher_share": 0.5})
    found = fitted(given, 1000, count)
    assert found.trainable is None and found.method is given and "no rows" in found.note
    with pytest.raises(ConfigError, match="cannot put"):
        count(method(lora={"target_modules": ["nothing"]}))


def test_sizes_that_a_method_refuses_are_passed_over():
    lora = method(lora={"r": 4})

    def even(m):
        if m.r % 4:
            raise ConfigError("r must be a multiple of 4")
        return 10 * m.r

    assert [fitted(lora, t, even).method.r for t in (1, 79, 95, 101, 5000)] == [4, 8, 8, 12, 500]


def test_a_size_that_stops_to_matter_is_taken_as_far_as_it_does_and_one_that_never_did_is_none(count):
    lora = method(lora={"r": 4})
    assert fitted(lora, 1000, lambda m: 10 * min(m.r, 16)).method.r == 16
    assert fitted(lora, 1000, lambda m: 77) == Fitted(lora, 77, "no setting for its size: 77 parameters")
    found = fitted(method(pissa={"r": 64}), 2 * LAYER * 5, count)
    assert found.method.r == 5, "as it is its rank is too large for the model"

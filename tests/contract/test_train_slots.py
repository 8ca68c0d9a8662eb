"""Every method of the five slots of training keeps what its base promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ftpipe import slots
from ftpipe.errors import ConfigError, TrainingError
from ftpipe.slots import Method
from tests.train.fixtures import alone  # noqa: F401
from tests.train.small import examples, small_run, steps

NAMES = {slot: slots.slots()[f"train/{slot}"].names() for slot in ("adapt", "objective", "regularizer", "optimizer", "schedule")}
SETTINGS = {  # the defaults of these suit large layers only
    "vblora": {"num_vectors": 8, "vector_length": 16, "topk": 2}, "randlora": {"r": 4}, "vera": {"r": 4}, "pvera": {"r": 4}, "fourierft": {"n_frequency": 20},
    "waveft": {"n_frequency": 20}, "boft": {"boft_block_size": 4}, "oft": {"oft_block_size": 8, "r": 0}, "c3a": {"block_size": 16}, "hra": {"r": 4},
    "road": {"group_size": 16}, "miss": {"r": 4}, "psoft": {"r": 4}, "shira": {"r": 4},
    "bitfit": {"missing": "add"},  # the tiny Llama has no biases
    "pissa": {"r": 4}, "eva": {"r": 4}, "corda": {"r": 4},
    "lora": {"r": 4}, "bottleneck": {"size": 8}, "parallel": {"size": 8}, "mam": {"size": 8, "prefix": 4, "prefix_network": 16},
    "trainable_tokens": {"tokens": ["a", "e"], "token_ids": [40, 41, 42]}, "cpt": {"cpt_token_ids": [5, 6, 7], "cpt_tokens_type_mask": [1, 2, 4]},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 1},
}
STARTS_ELSEWHERE = {"c3a", "fourierft", "unilora", "vblora", "prompt_tuning", "p_tuning", "multitask_prompt_tuning", "prefix_tuning", "cartridge", "cpt", "mam"}
"""Methods whose start is not the base model, by their papers or PEFT's defaults; all others must start there."""


def adapt(name: str) -> dict:
    return {name: SETTINGS.get(name, {})}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Path:
    return tiny_model


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """What is imported by now is no garbage: DeepSpeed collects garbage whenever it builds ZeRO 3, and would look through all of it."""
    import gc

    import deepspeed  # noqa: F401
    import peft  # noqa: F401

    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize(("slot", "name"), [(s, n) for s, names in NAMES.items() for n in names])
def test_described_typed_and_strict(slot, name):
    cls = slots.slots()[f"train/{slot}"].get(name)
    assert issubclass(cls, Method) and cls.name() == name and cls.__doc__
    assert all(field.description for field in cls.model_fields.values()), "every field is described"
    method = cls(**SETTINGS.get(name, {}) if slot == "adapt" else {})
    assert slots.parse(f"train/{slot}", method.dump()) == method
    assert json.loads(json.dumps(method.dump())) == method.dump()
    with pytest.raises(ValueError, match="no_such_field"):
        cls(no_such_field=1)


def logits(model, ids):
    import torch

    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["adapt"])
def test_an_adapter_trains_saves_and_loads_to_the_same_model(name, model, tmp_path):
    import torch

    run = small_run(model, adapt=adapt(name), zero=0)
    frozen = {n: p.detach().clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    start = {n: p.detach().clone() for n, p in run.trainable().items()}
    assert all(p.dtype == torch.float32 for p in run.trainable().values())
    ids = torch.arange(5, 45)[None]
    run.model.eval()
    away = float((logits(run.model, ids)[:, -40:] - logits(run.load_base(), ids)).abs().max())
    assert (away > 1e-4) if name in STARTS_ELSEWHERE else (away < 1e-5), "a method starts at the base model unless it says otherwise"
    run.model.train()
    records = steps(run, examples(8), 4, batch_tokens=400)
    assert all(r["grad_norm"] > 0 for r in records)
    assert records[-1]["loss"] < records[0]["loss"], "it learns"
    assert any(not p.equal(start[n]) for n, p in run.trainable().items())
    assert all(p.equal(frozen[n]) for n, p in run.model.named_parameters() if n in frozen), "what is frozen stays as it is"
    state = run.engine.state()
    names = set(run.trainable())
    assert names <= set(state)
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        run.adapt.save(run.model, state, folder)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert all(Path(f).suffix in (".safetensors", ".json") for f in files)
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files), "the same bytes every time"
    assert str(tmp_path) not in "".join((tmp_path / "a" / f).read_text() for f in files if f.endswith(".json"))
    loaded = run.adapt.load(run.load_base(), tmp_path / "a")
    run.model.eval()
    torch.testing.assert_close(logits(loaded, ids), logits(run.model, ids), rtol=1e-4, atol=1e-5)
    assert not logits(loaded, ids).equal(logits(run.load_base(), ids)), "it learnt something"
    try:
        before = logits(loaded, ids)
        merged = run.adapt.merge(loaded)
    except (ConfigError, NotImplementedError):
        return
    torch.testing.assert_close(logits(merged, ids), before, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["adapt"])
def test_an_adapter_learns_the_same_under_every_zero_stage_it_names(name, model, tmp_path):
    """Losses under each stage are those of stage 0, and what is saved under the highest loads to the model that was trained."""
    import torch

    cls = slots.slots()["train/adapt"].get(name)
    wanted = [r["loss"] for r in steps(small_run(model, adapt=adapt(name)), examples(6), 2, batch_tokens=400)]
    run = None
    for zero in cls.zero_stages[1:]:
        run = small_run(model, adapt=adapt(name), zero=zero)
        assert [r["loss"] for r in steps(run, examples(6), 2, batch_tokens=400)] == pytest.approx(wanted, abs=2e-5)
    if run is None:
        return
    ids, state = torch.arange(5, 45)[None], run.engine.state()
    probe = run.engine.probe(ids)
    run.adapt.save(run.model, state, tmp_path)
    torch.testing.assert_close(logits(run.adapt.load(run.load_base(), tmp_path), ids)[:, -1], probe, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["adapt"])
def test_an_adapter_trains_in_bfloat16_with_the_kernels_as_without(name, model):
    from ftpipe.models import kernels

    plain, fast = (small_run(model, adapt=adapt(name), dtype="bfloat16") for _ in range(2))
    assert kernels.install(fast.model)["attention"]
    wanted, found = (steps(run, examples(), 3, rate=1e-3) for run in (plain, fast))
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in wanted], abs=0.02)
    assert [r["grad_norm"] for r in found] == pytest.approx([r["grad_norm"] for r in wanted], rel=0.1)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["adapt"])
def test_preparing_twice_gives_the_same_and_says_how_to_undo(name, model):
    import torch

    first, second = small_run(model, adapt=adapt(name)), small_run(model, adapt=adapt(name))
    for (n, a), (m, b) in zip(first.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert n == m and a.equal(b)
    without = first.adapt.without(first.model)
    if without is not None:
        ids = torch.arange(5, 45)[None]
        first.model.eval()
        with without:
            torch.testing.assert_close(logits(first.model, ids), logits(first.load_base(), ids), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["optimizer"])
def test_an_optimizer_lowers_the_loss_and_obeys_the_rate(name, model):
    cls = slots.slots()["train/optimizer"].get(name)
    assert 0 in cls.zero_stages
    run = small_run(model, optimizer=name, zero=0)
    start = {n: run.engine.value(n) for n in run.engine.names}
    steps(run, examples(), 1, rate=0.0)
    assert all(run.engine.value(n).equal(start[n]) for n in start), "a rate of zero moves nothing"
    run = small_run(model, optimizer=name, zero=0)
    found = steps(run, examples(8), 12, rows_per_step=8)
    assert found[-1]["loss"] < found[0]["loss"]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["regularizer"])
def test_a_regularizer_works_under_the_stages_it_names(name, model):
    cls = slots.slots()["train/regularizer"].get(name)
    found = [[r["loss"] for r in steps(small_run(model, regularizers=(name,), zero=z), examples(), 3)] for z in cls.zero_stages]
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=2e-5)


@pytest.mark.parametrize("name", NAMES["schedule"])
def test_a_schedule_warms_up_and_stays_between_zero_and_one(name):
    factor = slots.parse("train/schedule", name).factor(100, 10)
    values = [factor(s) for s in range(100)]
    assert all(0 <= v <= 1 for v in values) and max(values) == pytest.approx(1.0, abs=0.02)
    assert values[:10] == sorted(values[:10]) and values[0] < 0.2
    assert slots.parse("train/schedule", name).factor(100, 0)(0) == pytest.approx(1.0)
    assert factor(50) == factor(50)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", NAMES["objective"])
def test_an_objective_is_a_sum_that_does_not_depend_on_micro_batches(name, model):
    rows = objective_examples(name)
    settings = {"objective": name, "rate": 5e-3}
    run = {k: small_run(model, objective=settings["objective"]) for k in ("one", "many")}
    one = steps(run["one"], rows, 2, batch_tokens=10_000, rows_per_step=6)
    many = steps(run["many"], rows, 2, alone=True, rows_per_step=6)
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in many], abs=2e-5)
    cls = slots.slots()["train/objective"].get(name)
    assert cls.formats and cls.sequences >= 1


def objective_examples(name: str):
    """Random examples with as many sequences a row as the objective asks for."""
    from ftpipe.train.objective.base import Example

    n = slots.slots()["train/objective"].get(name).sequences
    parts = [examples(12, seed=s) for s in range(n)]
    return [Example(group[0].row_id, tuple(e.input_ids[0] for e in group), tuple(e.trained[0] for e in group)) for group in zip(*parts)]


def test_an_adapter_that_trains_nothing_is_refused(model):
    from ftpipe.train.adapt.lora import Lora

    class Nothing(Lora):
        def prepare(self, model, run):
            return super().prepare(model, run).requires_grad_(False)

    with pytest.raises(TrainingError, match="left nothing to train"):
        small_run(model, adapt=Nothing(r=2))


def test_a_tuner_that_cannot_be_served_is_refused_with_the_reason():
    with pytest.raises(ValueError, match="'xlora' is not offered in slot train/adapt: it mixes adapters that were trained before"):
        slots.parse("train/adapt", "xlora")
    with pytest.raises(ValueError, match="rows carry no number of their task"):
        slots.parse("train/adapt", {"poly": {"n_tasks": 3}})
    with pytest.raises(ValueError, match="name the tokens to train"):
        slots.parse("train/adapt", "trainable_tokens")
    with pytest.raises(ValueError, match="pickle"):
        slots.parse("train/adapt", {"multitask_prompt_tuning": {"prompt_tuning_init_state_dict_path": "a.bin"}})
    with pytest.raises(ConfigError, match="no method 'xlorra'"):
        slots.find("train/adapt", "xlorra")


def test_settings_that_do_not_fit_the_model_are_told_apart_from_faults(model):
    with pytest.raises(ConfigError, match="PEFT cannot put lora on this model"):
        small_run(model, adapt={"lora": {"target_modules": ["no_such_layer"]}})
    with pytest.raises(ConfigError, match="no parameter that matches"):
        small_run(model, adapt={"full": {"parameters": "no_such_layer"}})

"""What the tuners of PEFT need beyond what the contract asks of every method."""

from __future__ import annotations

import ast
from dataclasses import MISSING, fields
from typing import Any, Literal

import pytest

from ftpipe import slots
from ftpipe.errors import ConfigError
from ftpipe.train import checkpoint
from ftpipe.train.adapt import _peft_source as source
from tests.train.small import examples, small_run, steps


def resolve(text: str, known: str = "") -> Any:
    body = ast.parse(known).body
    names = {n.name if isinstance(n, ast.ClassDef) else n.targets[0].id: n if isinstance(n, ast.ClassDef) else n.value for n in body}
    return source._type(ast.parse(text, mode="eval").body, names)


def test_annotations_are_understood_without_running_them():
    assert resolve("Optional[Union[list[int], int]]") == list[int] | int | None
    assert resolve("bool | Literal['bat', 'mini']") == bool | Literal["bat", "mini"]
    assert resolve("Optional[dict[str, Union[int, float]]]") == dict[str, int | float] | None
    assert resolve("Optional[list[tuple[int, int]]]") == list[tuple[int, int]] | None
    assert resolve("Union[str, Kind]", "class Kind(str, Enum):\n    A = 'a'\n    B = 'b'") == Literal["a", "b"]
    assert resolve("Kind", "Kind = Literal['x']") == Literal["x"]
    for hostile in ("__import__('os').system('true')", "[].__class__", "Unknown", "Optional[Unknown]", "int if 1 else str"):
        with pytest.raises(source.NotPlain):
            resolve(hostile)


def test_every_setting_has_the_default_that_peft_gives_it():
    import peft

    checked = 0
    for name, config in source.tuners().items():
        if name in ("lora", "adalora", "trainable_tokens", "xlora"):
            continue
        method = slots.find("train/adapt", name)
        theirs = {f.name: f for f in fields(getattr(peft, config))}
        for field, info in method.model_fields.items():
            given = theirs[field]
            default = given.default_factory() if given.default_factory is not MISSING else given.default
            assert field == "num_virtual_tokens" or info.get_default(call_default_factory=True) == getattr(default, "value", default), (name, field)
            checked += 1
    assert checked > 300


ADALORA = {"adalora": {"init_r": 4, "target_r": 2, "warmup": 0.2, "settle": 0.2}}


def total_rank(run) -> int:
    return sum(int((v != 0).sum()) for n, v in run.engine.state().items() if "lora_E" in n)


@pytest.mark.usefixtures("alone")
def test_adalora_keeps_its_budget_and_ends_with_different_ranks(model, tmp_path):
    """After each allocation as many entries of e are left as the cubic schedule says; the saved adapter holds only those."""
    import torch
    from safetensors.torch import load_file

    run = small_run(model, adapt={"adalora": ADALORA["adalora"] | {"orthogonality": 5.0}})
    matrices = sum("lora_E" in n for n in run.engine.names)
    run.steps = n = 10
    records = []
    for step in range(n):
        records += steps(run, examples(), step + 1, first=step)
        at, first, last = step + 1, 2, 8
        budget = 4 if at <= first else 2 if at >= last else 2 + 2 * (1 - (at - first) / (last - first)) ** 3
        expected = int(matrices * budget) if first < at < last else int(budget) * matrices
        assert records[-1]["rank"] == expected
        if at > first:
            assert total_rank(run) == expected
    per_matrix = [int((v != 0).sum()) for k, v in run.engine.state().items() if "lora_E" in k]
    assert sum(per_matrix) == 2 * matrices and len(set(per_matrix)) > 1
    assert records[-1]["orthogonality"] < records[0]["orthogonality"], "the penalty falls"
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    kept = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(v.shape[0] for k, v in kept.items() if "lora_A" in k) == 2 * matrices
    ids = torch.arange(5, 45)[None]
    loaded = run.adapt.load(run.load_base(), tmp_path)
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, run.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone")
def test_adalora_chooses_as_peft_does_when_it_is_called_in_its_own_loop(model):
    """The same values, gradients and steps through PEFT's `update_and_allocate` leave the same entries of e, bit for bit (no clipping, no penalty)."""
    import torch

    settings = {"adalora": ADALORA["adalora"] | {"orthogonality": 0.0}}
    run, other = (small_run(model, adapt=settings, clip=0.0) for _ in range(2))
    run.steps = other.steps = 8
    config = other.model.peft_config["default"]
    config.total_step, config.tinit, config.tfinal = 8, 1, 1
    saved: dict[str, Any] = {}

    def keep(this):
        saved.update({n: this.engine.gradient(n) for n in this.engine.names})

    def allocate(this):
        for name, parameter in this.trainable().items():
            parameter.grad = saved[name]
        this.model.base_model.update_and_allocate(this.step + 1)
        this.model.zero_grad()

    object.__setattr__(other.adapt, "on_gradients", keep)
    object.__setattr__(other.adapt, "after_step", allocate)
    steps(run, examples(), 8)
    steps(other, examples(), 8)
    theirs = other.engine.state()
    assert all(v.equal(theirs[n]) for n, v in run.engine.state().items())
    assert any(not v.all() for n, v in theirs.items() if "lora_E" in n)
    assert torch.is_tensor(run.memory["adalora/exp_avg_ipt/" + next(iter(run.engine.names)).removeprefix("base_model.model.")])


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero", [0, 3])
def test_adalora_goes_on_after_a_kill_as_if_nothing_had_been(model, tmp_path, zero):
    from ftpipe.train.engine import Engine
    from ftpipe.train.loop import _restore

    straight, broken = (small_run(model, adapt=ADALORA, zero=zero) for _ in range(2))
    wanted = steps(straight, examples(), 8)
    steps(broken, examples(), 5)
    checkpoint.write(tmp_path, checkpoint.Checkpoint(5, broken.engine.trained(), broken.engine.optimizer_state(), list(broken.engine.names), broken.memory))
    kept = checkpoint.latest(tmp_path)
    resumed = small_run(model, adapt=ADALORA, zero=0)
    resumed.zero = zero
    _restore(resumed, kept)
    resumed.engine.destroy()
    resumed.engine = Engine(resumed, 1.0, touched=kept.parameters)
    resumed.engine.restore(kept.optimizer)
    found = steps(resumed, examples(), 8, first=5)
    assert found == wanted[5:] if zero == 0 else [r["loss"] for r in found] == pytest.approx([r["loss"] for r in wanted[5:]], abs=1e-6)
    assert total_rank(resumed) == total_rank(straight)


@pytest.mark.usefixtures("alone")
def test_only_the_named_tokens_move(model, tmp_path):
    import torch

    run = small_run(model, adapt={"trainable_tokens": {"tokens": ["a", "e"], "token_ids": [40]}})
    table = run.load_base().get_input_embeddings().weight.detach().clone()
    steps(run, examples(), 3)
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    merged = run.adapt.merge(run.adapt.load(run.load_base(), tmp_path)).get_input_embeddings().weight
    tokenizer = run.load_tokenizer()
    chosen = {40, *tokenizer.convert_tokens_to_ids(["a", "e"])}
    assert {int(i) for i in (merged != table).any(1).nonzero()} == chosen
    assert sum(p.numel() for p in run.trainable().values()) == 3 * table.shape[1]
    with pytest.raises(ConfigError, match="'ae' is 2 tokens"):
        small_run(model, adapt={"trainable_tokens": {"tokens": ["ae"]}})
    with pytest.raises(ConfigError, match="token 999 is not among"):
        small_run(model, adapt={"trainable_tokens": {"token_ids": [999]}})
    assert torch.equal(table, run.load_base().get_input_embeddings().weight)


@pytest.mark.usefixtures("alone")
def test_a_prompt_can_start_from_a_text_and_is_never_packed(model, tmp_path):
    run = small_run(model, adapt={"prompt_tuning": {"num_virtual_tokens": 6, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "abcd"}})
    table, tokenizer = run.load_base().get_input_embeddings().weight, run.load_tokenizer()
    wanted = table[tokenizer("abcdab")["input_ids"]]
    assert run.engine.value("prompt_encoder.default.embedding.weight").equal(wanted.detach())
    assert not type(run.adapt).packs
    steps(run, examples(6), 1)
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    assert "/tmp" not in (tmp_path / "adapter_config.json").read_text().replace(str(model), "")
    with pytest.raises(ConfigError, match="stands in front of the sequence"):
        run.adapt.merge(run.model)


@pytest.mark.usefixtures("alone")
def test_deep_prompts_count_and_reload_without_their_network(model, tmp_path):
    """Prefix length x 2 x layers x key heads x head size, at every layer a gradient; the prefix saved from a projection is the prefix alone."""
    import torch
    from safetensors.torch import load_file

    run = small_run(model, adapt={"prefix_tuning": {"num_virtual_tokens": 3}})
    assert sum(p.numel() for p in run.trainable().values()) == 3 * 2 * 2 * 2 * 8
    before = run.engine.value("prompt_encoder.default.embedding.weight")
    steps(run, examples(6), 1)
    moved = (run.engine.value("prompt_encoder.default.embedding.weight") - before).view(3, 2, 2, 16).abs().sum((0, 2, 3))
    assert bool((moved > 0).all()), "every layer's prefix moves"
    run = small_run(model, adapt={"prefix_tuning": {"num_virtual_tokens": 3, "prefix_projection": True}})
    steps(run, examples(6), 1)
    run.adapt.save(run.model, run.engine.state(), tmp_path)
    assert [tuple(v.shape) for v in load_file(tmp_path / "adapter_model.safetensors").values()] == [(3, 2 * 2 * 16)]
    ids = torch.arange(5, 45)[None]
    run.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(run.adapt.load(run.load_base(), tmp_path)(input_ids=ids).logits, run.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("alone")
def test_long_losses_see_the_prompt_too(model, monkeypatch):
    """Above a size the logits are made chunk by chunk from the backbone, which knows nothing of a prompt: those models are taken whole."""
    import torch

    from ftpipe.train import forward
    from ftpipe.train.batches import lay_out

    run = small_run(model, adapt={"prompt_tuning": {"num_virtual_tokens": 6}})
    batch = lay_out(examples(1), 1.0)
    with torch.no_grad():
        wanted = forward.token_losses(run.model, batch)
        monkeypatch.setattr(forward, "WHOLE", 1)
        torch.testing.assert_close(forward.token_losses(run.model, batch), wanted)


def merged_weights(run, folder):
    """Weights of the linear and norm layers before and after, by name."""
    folder.mkdir()
    run.adapt.save(run.model, run.engine.state(), folder)
    before = dict(run.load_base().named_parameters())
    return before, dict(run.adapt.merge(run.adapt.load(run.load_base(), folder)).named_parameters())


@pytest.mark.usefixtures("alone")
def test_tuners_that_are_papers_of_the_catalogue_do_what_those_say(model, tmp_path):
    import torch

    run = small_run(model, adapt="ln_tuning")
    assert sum(p.numel() for p in run.trainable().values()) == (2 * 2 + 1) * 32
    steps(run, examples(), 2)
    before, after = merged_weights(run, tmp_path / "ln")
    assert {n for n, p in after.items() if not p.equal(before[n])} == {n for n in before if "norm" in n}

    run = small_run(model, adapt={"randlora": {"r": 4}})
    bases = {n: b.clone() for n, b in run.model.named_buffers() if "randlora_" in n}
    square = [n for n in run.trainable() if "layers.0.self_attn.q_proj" in n]
    assert sum(run.trainable()[n].numel() for n in square) == 8 * (4 + 32), "the diagonals of 32 / 4 bases"
    steps(run, examples(), 3, rate=5e-2)
    assert bases and all(b.equal(bases[n]) for n, b in run.model.named_buffers() if n in bases)
    before, after = merged_weights(run, tmp_path / "randlora")
    name = "model.layers.0.self_attn.q_proj.weight"
    values = torch.linalg.svdvals((after[name] - before[name]).double())
    assert int((values > 1e-3 * values[0]).sum()) > 16, "far above the rank of one base"

    run = small_run(model, adapt={"miss": {"r": 4, "init_weights": "bat", "target_modules": ["q_proj"]}})
    assert all(not p.any() for p in run.trainable().values())
    steps(run, examples(), 2)
    blocks = next(v for n, v in run.engine.state().items() if "layers.0" in n)
    before, after = merged_weights(run, tmp_path / "bone")
    old, change = before[name], after[name] - before[name]
    for i in range(8):
        for j in range(8):
            own = old[4 * i:4 * i + 4, 4 * j:4 * j + 4]
            torch.testing.assert_close(change[4 * i:4 * i + 4, 4 * j:4 * j + 4], own @ blocks[i] + blocks[i], rtol=1e-3, atol=1e-6)
    assert float(change.abs().max()) > 1e-3

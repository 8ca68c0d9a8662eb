"""S2FT: reordering changes nothing, only the chosen rows and columns do, and what is held has the slice's size."""

from __future__ import annotations

import pytest

from ftpipe.errors import ConfigError
from ftpipe.train.adapt import _slices as slices
from ftpipe.train.adapt.s2ft import S2ft
from tests.train.small import examples, small_run, steps
from tests.train.sparse import loaded, make_gpt2, saved, stopped_and_resumed

pytestmark = pytest.mark.usefixtures("alone")
LAYERS, HIDDEN, CHANNELS, HEADS, GROUPS, WIDTH = 2, 32, 64, 4, 2, 8
ALL = {"down": 0.1, "output": 0.4, "up": 0.05, "value": 0.5}
COUNTS = {"down": 12, "output": 3, "up": 6, "value": 2}
"""floor(ratio x units x layers): 0.1 x 64 x 2, 0.4 x 4 x 2, 0.05 x 64 x 2, 0.5 x 2 x 2."""
ELEMENTS = (12 + 3 * WIDTH + 6 + 2 * WIDTH) * HIDDEN


def logits(model, ids=None):
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 60)[None] if ids is None else ids, use_cache=False).logits


def expected(method, seed):
    """By layer and projection: which rows or columns of the base model's weight train, in a fresh count of heads as slices."""
    found = {}
    for kind, units, path, axis, width in (("down", CHANNELS, "mlp.down_proj", 1, 1), ("up", CHANNELS, "mlp.up_proj", 0, 1),
                                           ("output", HEADS, "self_attn.o_proj", 1, WIDTH), ("value", GROUPS, "self_attn.v_proj", 0, WIDTH)):
        for layer, chosen in enumerate(method.drawn(kind, units, LAYERS, seed)):
            found[f"model.layers.{layer}.{path}.weight"] = (axis, sorted(c * width + i for c in chosen for i in range(width)))
    return found


@pytest.mark.parametrize("permute", [True, False])
@pytest.mark.parametrize("zero", [0, 3])
def test_only_the_chosen_rows_and_columns_change_and_the_rest_is_the_base_to_the_bit(model, tmp_path, zero, permute):
    import torch

    run = small_run(model, zero=zero, adapt={"s2ft": ALL | {"permute": permute}}, optimizer={"adamw": {"weight_decay": 0.1}})
    assert {k: sum(map(len, run.adapt.drawn(k, {"output": HEADS, "value": GROUPS}.get(k, CHANNELS), LAYERS, run.seed))) for k in COUNTS} == COUNTS
    steps(run, examples(), 2)
    assert sum(v.numel() for v in run.engine.state().values()) == ELEMENTS
    state = run.engine.optimizer_state()
    assert sum(v.numel() for s in state.values() for k, v in s.items() if k != "step") == 2 * ELEMENTS
    fresh = loaded(run, tmp_path / "saved")
    base, after = dict(run.load_base().named_parameters()), dict(fresh.named_parameters())
    wanted = expected(run.adapt, run.seed)
    for name, weight in base.items():
        difference = after[name] != weight
        axis, chosen = wanted.get(name, (0, []))
        along = difference.any(1 - axis) if difference.dim() == 2 else difference
        assert along.nonzero().flatten().tolist() == chosen, name
    if zero == 0:
        torch.testing.assert_close(logits(fresh), logits(run.model), rtol=0, atol=1e-5)
        with run.adapt.without(run.model):
            torch.testing.assert_close(logits(run.model), logits(run.load_base()), rtol=0, atol=1e-5)
        assert not torch.allclose(logits(run.model), logits(run.load_base()), atol=1e-3)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_reordering_alone_leaves_the_function_and_not_the_weights(groups):
    """Grouped queries, one group and none; with biases, which have to move along."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=259, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                         num_key_value_heads=groups, attention_bias=True, mlp_bias=True)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    before, start = logits(model), {n: p.clone() for n, p in model.named_parameters()}
    order = slices.permute_channels(model, "model.layers.0", [40, 3, 63])
    q, kv = slices.permute_heads(model, "model.layers.0", {3}, set())
    assert order[:3] == [40, 3, 63] and sorted(order) == list(range(64)) and q[0] == 3 and sorted(q) == list(range(4)) and sorted(kv) == list(range(groups))
    per = 4 // groups
    assert [h // per for h in q] == [g for g in kv for _ in range(per)], "query heads stay with their key-value head"
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    changed = {n for n, p in model.named_parameters() if not p.equal(start[n])}
    assert {n.split(".")[4] for n in changed} >= {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    inverse = torch.tensor(order).argsort()
    assert model.model.layers[0].mlp.down_proj.weight[:, inverse].equal(start["model.layers.0.mlp.down_proj.weight"])


def test_query_heads_of_two_groups_are_not_mixed():
    """Nine query heads over three key-value heads, as in SmolLM-135M; the chosen ones come first inside their group."""
    assert slices.order_heads(9, 3, {4, 8}, set()) == ([4, 3, 5, 8, 6, 7, 0, 1, 2], [1, 2, 0])
    assert slices.order_heads(9, 3, {4}, {2}) == ([6, 7, 8, 4, 3, 5, 0, 1, 2], [2, 1, 0])
    assert slices.order_heads(4, 4, {1, 3}, set())[0] == [1, 3, 0, 2]


@pytest.mark.parametrize("permute", [True, False])
def test_the_gradient_of_a_slice_is_that_part_of_the_whole_gradient_and_little_is_kept_for_it(permute):
    """The layer by itself. What autograd keeps for the backward pass beyond the weights: the chosen inputs, not all of them."""
    import torch

    torch.manual_seed(0)
    dense = torch.nn.Linear(64, 16).requires_grad_(False)
    kept = dense.weight.clone().requires_grad_(True)
    chosen, places = [5, 9, 40], [0, 1, 2] if permute else [5, 9, 40]
    x, cotangent = torch.randn(7, 64), torch.randn(7, 16)
    order = [*chosen, *(i for i in range(64) if i not in chosen)] if permute else list(range(64))
    slices.reorder(dense, columns=order)
    slices.attach(dense, slices.COLUMNS, chosen, places)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append((t.untyped_storage().nbytes() // 4, t.data_ptr())), t)[1], lambda t: t):
        out = dense(x[:, order])
    weights = {dense.weight.data_ptr(), dense.slice_columns.data_ptr(), dense.slice_at.data_ptr()}
    assert [n for n, where in sizes if where not in weights] == [7 * 3]
    (out * cotangent).sum().backward()
    (torch.nn.functional.linear(x, kept, dense.bias) * cotangent).sum().backward()
    torch.testing.assert_close(dense.slice_columns.grad, kept.grad[:, chosen], rtol=0, atol=1e-5)
    assert dense.weight.grad is None
    rows = torch.nn.Linear(64, 16).requires_grad_(False)
    whole = rows.weight.clone().requires_grad_(True)
    slices.attach(rows, slices.ROWS, [2, 11], [2, 11])
    (rows(x) * cotangent).sum().backward()
    (torch.nn.functional.linear(x, whole, rows.bias) * cotangent).sum().backward()
    torch.testing.assert_close(rows.slice_rows.grad, whole.grad[[2, 11]], rtol=0, atol=1e-5)


def test_adapters_of_one_base_add_up(model, tmp_path):
    """Two with channels of their own: the sum of their changes, read as the merge stage does, is both at once."""
    import torch
    from safetensors.torch import load_file

    from ftpipe.merge._deltas import read
    from ftpipe.models.sparse import put

    base, deltas = None, []
    for seed in (1, 2):
        run = small_run(model, adapt={"s2ft": {"down": 0.2}}, seed=seed)
        steps(run, examples(), 1)
        saved(run, tmp_path / str(seed))
        base = run.load_base()
        deltas.append(read(tmp_path / str(seed), lambda base=base: dict(base.named_parameters())))
    both = run.load_base()
    for seed in (1, 2):
        put(both, load_file(tmp_path / str(seed) / "weights.safetensors"), "here")
    for name, weight in both.named_parameters():
        total = dict(base.named_parameters())[name] + sum(d[name].dense().float() for d in deltas if name in d)
        torch.testing.assert_close(weight, total, rtol=0, atol=1e-6)
    changed = [{(n, c) for n, d in found.items() for c in d.dense().any(0).nonzero().flatten().tolist()} for found in deltas]
    assert [len(c) for c in changed] == [25, 25] and changed[0] & changed[1] and changed[0] != changed[1], "some channels of both, some of one"


def test_layers_may_get_nothing_and_shares_that_choose_nothing_are_refused(model):
    run = small_run(model, adapt={"s2ft": {"down": 1 / 128}})
    assert [v.shape for v in run.engine.state().values()] == [(HIDDEN, 1)]
    with pytest.raises(ConfigError, match="not one is chosen"):
        small_run(model, adapt={"s2ft": {"down": 1e-3}})
    with pytest.raises(ValueError, match="nothing would train"):
        S2ft(down=0)
    assert sum(map(len, S2ft(down=0.29).drawn("down", 100, 1, 0))) == 29


def test_an_architecture_with_other_layers_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no linear layer gate_proj"):
        small_run(make_gpt2(tmp_path), adapt="s2ft")


def test_a_kill_changes_nothing(model, tmp_path):
    settings = {"adapt": {"s2ft": ALL}, "zero": 2, "dtype": "bfloat16"}
    straight = small_run(model, **settings)
    wanted = steps(straight, examples(), 3)
    resumed, found = stopped_and_resumed(model, tmp_path / "checkpoints", 2, 3, **settings)
    assert found == wanted[2:]
    assert saved(resumed, tmp_path / "a") == saved(straight, tmp_path / "b")

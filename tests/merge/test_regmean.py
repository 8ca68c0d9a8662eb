"""RegMean against least squares, and its moments of real inputs against the model's own."""

from __future__ import annotations

import pytest
import torch

from ftpipe.errors import ConfigError
from ftpipe.merge._deltas import Delta
from ftpipe.merge._gram import Moments, measure
from ftpipe.merge.regmean import RegMean, least_squares
from ftpipe.models.loading import load_model
from ftpipe.stages.base import Environment
from tests.artifacts import rows_artifact
from tests.evaluate.world import World
from tests.merge.given import given
from tests.merge.test_merge import by_hand, close, folders, logits, stage

W = "layer.weight"


def planted(counts=(30, 90), inputs: int = 6, out: int = 4):
    """Inputs X_i (rows x inputs) of unequal numbers and changes D_i (out x inputs), float64."""
    g = torch.Generator().manual_seed(1)
    xs = [torch.randn(n, inputs, generator=g, dtype=torch.float64) @ torch.randn(inputs, inputs, generator=g, dtype=torch.float64) for n in counts]
    return xs, [torch.randn(out, inputs, generator=g, dtype=torch.float64) for _ in counts]


def merged(method: RegMean, xs, ds) -> torch.Tensor:
    parts = {str(i): Delta(dense_=d) for i, d in enumerate(ds)}
    grams = {str(i): method.shrunk(x.T @ x / len(x)) for i, x in enumerate(xs)}
    return least_squares(parts, grams, W).dense()


def test_it_is_the_least_squares_solution_with_every_model_counting_alike():
    xs, ds = planted()
    found = merged(RegMean(rows="r", shrink=1.0, ridge=0.0), xs, ds)

    def solution(weights):
        a = torch.cat([w * x for w, x in zip(weights, xs)])
        b = torch.cat([w * x @ d.T for w, x, d in zip(weights, xs, ds)])
        return torch.linalg.lstsq(a, b).solution.T

    assert torch.allclose(found, solution([len(x) ** -0.5 for x in xs]), atol=1e-8)
    assert not torch.allclose(found, solution([1.0, 1.0]), atol=1e-2), "more rows give no model more say"


def test_where_the_inputs_say_nothing_it_is_the_mean():
    xs, ds = planted()
    plain = sum(ds) / 2
    assert torch.allclose(merged(RegMean(rows="r", shrink=1.0, ridge=0.0), [xs[0], xs[0]], ds), plain), "equal moments"
    q = [torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q for _ in range(2)]
    spheres = [m * 2.0 for m in q]
    assert torch.allclose(merged(RegMean(rows="r", shrink=0.0, ridge=0.0), spheres, ds), plain), "nothing but equal diagonals"
    assert torch.allclose(merged(RegMean(rows="r"), xs, [ds[0], ds[0]]), ds[0]), "equal layers give that layer"


def test_low_rank_changes_give_the_same_as_their_products():
    xs, _ = planted()
    g = torch.Generator().manual_seed(2)
    low = [Delta(torch.randn(2, 6, generator=g), torch.randn(4, 2, generator=g)) for _ in range(2)]
    grams = {str(i): RegMean(rows="r").shrunk(x.T @ x / len(x)) for i, x in enumerate(xs)}
    made = least_squares({str(i): d for i, d in enumerate(low)}, grams, W)
    assert made.low_rank and made.a.shape[0] == 4
    full = least_squares({str(i): Delta(dense_=d.dense().double()) for i, d in enumerate(low)}, grams, W)
    assert torch.allclose(made.dense().double(), full.dense(), atol=1e-5)


def test_an_adapter_that_leaves_a_layer_alone_still_has_its_say():
    xs, ds = planted()
    method = RegMean(rows="r", shrink=1.0, ridge=0.0)
    world = given({"0": {W: ds[0]}, "1": {"other.bias": ds[1][0]}})
    state = {W: lambda a: xs[int(a)].T @ xs[int(a)] / len(xs[int(a)])}
    found = method.combine(W, world.parts(W), world, state).dense()
    assert torch.allclose(found.double(), merged(method, xs, [ds[0], 0 * ds[0]]), atol=1e-5)
    assert torch.equal(method.combine("other.bias", world.parts("other.bias"), world, state).dense(), ds[1][0].float() / 2), "the rest is averaged"


def test_too_few_rows_are_an_error_without_a_ridge():
    xs, ds = planted(counts=(2, 2))
    with pytest.raises(ConfigError, match="do not span"):
        merged(RegMean(rows="r", shrink=1.0, ridge=0.0), [torch.cat([x[:, :3], 0 * x[:, :3]], 1) for x in xs], ds)
    assert bool(merged(RegMean(rows="r"), xs, ds).isfinite().all())


def test_moments_do_not_depend_on_the_batches():
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(3))
    for sizes in ([100], [1] * 100, [37, 0, 62, 1]):
        moments = Moments()
        for part in x.split(sizes):
            moments.add(part)
        assert moments.count == 100 and torch.allclose(moments.mean, x.double().T @ x.double() / 100, atol=1e-12)


def test_moments_of_a_model_are_those_of_its_own_hidden_states_without_padding(world: World, env: Environment):
    model = load_model(str(world.model), env, dtype="float32", device="cpu")
    sequences = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    name = "model.layers.0.self_attn.q_proj.weight"
    found = measure(model, [name], sequences)[name]
    with torch.inference_mode():
        inputs = [model.model.layers[0].input_layernorm(model.model.embed_tokens(torch.tensor([s])))[0] for s in sequences]
    x = torch.cat(inputs).double()
    assert found.count == 9 and torch.allclose(found.mean, x.T @ x / 9, rtol=1e-4, atol=1e-6)


def test_the_stage_runs_each_model_on_its_own_rows(world: World, env: Environment, monkeypatch: pytest.MonkeyPatch):
    """The moments of later layers are those of the tuned model, and the merged adapter is what an explicit loop over the files gives."""
    from ftpipe.merge import _gram

    halves = {"mine": [r for r in world.rows if r["split"] == "train"][::2], "yours": [r for r in world.rows if r["split"] == "train"][1::2]}
    inputs = {name: rows_artifact(env.workspace, rows, name=name) for name, rows in halves.items()}
    groups = []
    monkeypatch.setattr(_gram, "measure", lambda model, names, s, f=_gram.measure: (groups.append(list(names)), f(model, names, s))[1])
    settings = {"rows": {"good": "mine", "worse": "yours"}, "shrink": 0.8, "ridge": 1e-3, "memory": 8 * 64 * 64 * 3 / 2**30}
    made = stage(world, env, "merge", folders(world, "good", "worse"), method={"regmean": settings}, inputs=inputs)
    assert len(groups) >= 4 and max(8 * len(g) for g in groups) > 8, "several layers a pass, several passes"
    whole = stage(world, env, "merge", folders(world, "good", "worse"), method={"regmean": settings | {"memory": 1.0}}, inputs=inputs)
    assert close(logits(world, env, made.file("adapter")), logits(world, env, whole.file("adapter")))
    assert made.json("adapter/ftpipe_adapter.json")["method"]["lora"]["r"] == 8 and made.json("merge.json")["averaged"] == 0

    from ftpipe.data.render import Renderer
    from ftpipe.merge._deltas import read
    from ftpipe.models.loading import load_adapted, load_tokenizer
    from ftpipe.models.weights import base_weights

    name, grams, deltas = "model.layers.1.mlp.down_proj.weight", [], []
    for adapter, rows in (("good", halves["mine"]), ("worse", halves["yours"])):
        model = load_adapted(str(world.model), env, world.adapters[adapter] / "adapter", dtype="float32")
        seen: list[torch.Tensor] = []
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.1.mlp.down_proj"))
        layer.register_forward_pre_hook(lambda m, a, seen=seen: seen.append(a[0][0].detach().double()))
        with torch.inference_mode():
            for shown in Renderer(load_tokenizer(str(world.model), env)).rows(rows):
                model(input_ids=torch.tensor([shown.input_ids]))
        x = torch.cat(seen)
        gram = x.T @ x / len(x)
        grams.append(0.8 * gram + torch.diag(0.2 * gram.diagonal() + 1e-3 * gram.diagonal().mean()))
        deltas.append(read(world.adapters[adapter] / "adapter", base_weights(str(world.model), env))[name].dense().double())
    expected = torch.linalg.solve(sum(grams), sum(g @ d.T for g, d in zip(grams, deltas))).T
    found = read(made.file("adapter"), base_weights(str(world.model), env))[name].dense().double()
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    plain = by_hand(world, env, {"good": 0.5, "worse": 0.5})
    assert not close(logits(world, env, made.file("adapter")), plain), "it is not the mean"

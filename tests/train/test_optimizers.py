"""What each way of taking a step promises: on toys whose gradient is known, and in the loop on the tiny model."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from ftpipe.errors import ConfigError, TrainingError
from ftpipe.stages.base import Environment
from ftpipe.train import checkpoint
from ftpipe.train.optimizer.mezo import Mezo
from ftpipe.train.optimizer.q_galore import QGalore
from ftpipe.train.regularizer.component_clip import ComponentClip
from ftpipe.train.run import Run, derive_seed
from tests.train import planted
from tests.train.small import examples, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")


def values(run):
    return {n: run.engine.value(n) for n in run.engine.names}


def same(left, right):
    return left.keys() == right.keys() and all(left[n].equal(right[n]) for n in left)


def resumed_after(run, make, folder, rows, first, n, **how):
    """Write a checkpoint of `run`, put it into a fresh run from `make`, and take steps `first` to `n`; returns that run and its records."""
    from ftpipe.train.engine import Engine
    from ftpipe.train.loop import _restore

    checkpoint.write(folder, checkpoint.Checkpoint(first, run.engine.trained(), run.engine.optimizer_state(), list(run.engine.names), run.memory))
    fresh = make()
    fresh.engine.destroy()
    kept = checkpoint.latest(folder)
    assert _restore(fresh, kept)[0] == first
    fresh.engine = Engine(fresh, fresh.engine.clip, touched=kept.parameters)
    fresh.engine.restore(kept.optimizer)
    return fresh, steps(fresh, rows, n, first=first, **how)


RESUMED = {
    "mezo": {"optimizer": {"mezo": {"eps": 1e-2, "weight_decay": 0.1}}},
    "q_galore": {"optimizer": {"q_galore": {"rank": 3, "update_gap": 1, "cosine": 0.0, "queue": 2, "weights": "int8", "group": 32}}},
    "adamw": {"optimizer": {"adamw": {"weight_decay": 0.1}}, "zero": 2},
    "adamw offloaded": {"optimizer": {"adamw": {"weight_decay": 0.1}}, "zero": 2, "offload": True},
    "component_clip": {"regularizers": ({"component_clip": {"threshold": 0.05}},), "zero": 2, "clip": 0.0},
}


@pytest.mark.parametrize("name", list(RESUMED))
def test_a_resumed_run_gives_the_same_bytes(model, tmp_path, name):
    def make():
        return small_run(model, adapt={"lora": {"r": 4, "dropout": 0.2}}, **RESUMED[name])

    straight, broken = make(), make()
    wanted = steps(straight, examples(), 7)
    steps(broken, examples(), 4)
    resumed, found = resumed_after(broken, make, tmp_path, examples(), 4, 7)
    assert found == wanted[4:]
    assert same(values(resumed), values(straight))


# AdamW


def test_the_fused_kernel_is_used_and_gives_the_same_bytes_under_every_layout(model):
    """A state that torch's other kernel made is taken up as well: its step, of no dimension, and its two moments."""
    import torch

    found = []
    for zero, offload in ((0, False), (1, False), (2, False), (1, True), (2, True)):
        run = small_run(model, zero=zero, offload=offload, clip=0.5, regularizers=({"l2_start": {"strength": 5.0}},))
        assert run.engine.torch_optimizer.defaults["fused"]
        records = steps(run, examples(), 4)
        assert not offload or run.engine.optimizer.cpu_offload
        found.append((records, values(run), run.engine.optimizer_state()))
    records, weights, state = found[0]
    assert any(r["grad_norm"] > 0.5 for r in records), "clipping binds, by the norm that l2_start's part belongs to"
    for others, theirs, held in found[1:]:
        assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in records], abs=1e-6)
        assert [r["grad_norm"] for r in others] == pytest.approx([r["grad_norm"] for r in records], rel=1e-5)
        for name, value in theirs.items():
            torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)
            assert {k: v.shape for k, v in held[name].items()} == {k: v.shape for k, v in state[name].items()}
    assert same(found[3][1], found[1][1]) and same(found[4][1], found[2][1]), "where the state is kept changes nothing"
    parameters = {n: torch.nn.Parameter(v) for n, v in small_values(model).items()}
    plain = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0, foreach=False)
    for parameter in parameters.values():
        parameter.grad = torch.ones_like(parameter)
    plain.step()
    run = small_run(model, zero=2)
    run.engine.restore({n: dict(plain.state[p]) for n, p in parameters.items()})
    held = run.engine.optimizer_state()
    assert all(held[n]["exp_avg"].equal(plain.state[p]["exp_avg"]) and float(held[n]["step"]) == 1.0 for n, p in parameters.items())
    steps(run, examples(), 1)
    assert all(float(s["step"]) == 2.0 for s in run.engine.optimizer_state().values())


def test_offload_reaches_the_ranks(model, tmp_path):
    from ftpipe.train.setup import Job

    planted.stage(model, offload="optimizer")._job(planted.context(tmp_path, planted.lessons(2)), {}).write(tmp_path / "job.json")
    assert Job.read(tmp_path / "job.json").offload is True
    assert planted.stage(model)._job(planted.context(tmp_path, planted.lessons(2)), {}).offload is False


def small_values(model):
    run = small_run(model)
    found = values(run)
    run.engine.destroy()
    return found


# MeZO


class Toy:
    """A run over bare parameters whose loss is a function of them; `seen` is what held in each forward pass."""

    def __init__(self, method, loss, parameters, rate=0.0):
        import torch

        model = torch.nn.ParameterDict({k: torch.nn.Parameter(v) for k, v in parameters.items()})
        self.seen, self.p = [], {k: model[k] for k in parameters}
        self.method = method
        self.run = Run(model=model, load_base=None, identity={}, load_tokenizer=None, seed=3)
        self.run.engine = SimpleNamespace(optimizer=method.build([{"params": list(self.p.items())}]), loss=self.loss, norm=math.nan)
        self.of, self.rate = loss, rate

    def loss(self, batch):
        import torch

        self.seen.append((torch.is_grad_enabled(), self.run.model.training))
        return self.of(**self.p)

    def step(self, number):
        self.run.step = number
        self.run.engine.optimizer.param_groups[0]["lr"] = self.rate
        return self.method.take_step(self.run, [None])

    def direction(self):
        return {n: z for n, (_, _, z) in zip(self.p, self.method.directions(self.run, self.run.engine.optimizer.param_groups), strict=True)}


def test_the_slope_is_that_along_the_direction_and_its_mean_is_the_gradient():
    """On a quadratic with a known gradient: central differences are exact there, up to rounding."""
    import torch

    torch.manual_seed(0)
    h = torch.diag(torch.tensor([1.0, 2.0, 0.5, 3.0, 1.5], dtype=torch.float64))
    start, b = torch.randn(5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    toy = Toy(Mezo(eps=1e-3), lambda w: w @ h @ w / 2 + b @ w, {"w": start.clone()}, rate=1e-30)
    gradient, found = h @ start + b, []
    for i in range(5000):
        toy.step(i)
        z = toy.direction()["w"]
        slope = toy.run.metrics["mezo_slope"]
        assert slope == pytest.approx(float(gradient @ z), rel=1e-4, abs=1e-9)
        assert toy.run.engine.norm == abs(slope)
        found.append(slope * z)
    found = torch.stack(found)
    error = (found.mean(0) - gradient).abs() / (found.std(0) / math.sqrt(len(found)))
    assert float(error.max()) < 4
    assert float((gradient.abs() / (found.std(0) / math.sqrt(len(found)))).max()) > 20, "the mean is far from nothing"


def test_putting_back_is_right_to_rounding_and_at_a_rate_of_zero_to_the_bit():
    import torch

    torch.manual_seed(0)
    start = {"a": torch.randn(64, 64) * 0.02, "b": torch.randn(64)}
    toy = Toy(Mezo(eps=1e-3), lambda a, b: (a.square().sum() + b.sum()), {k: v.clone() for k, v in start.items()}, rate=1e-30)
    toy.step(0)
    assert toy.run.metrics["mezo_slope"] != 0
    for name, value in start.items():
        assert float((toy.p[name].detach() - value).abs().max()) <= 1e-6 * float(value.abs().max())
    now = {n: p.detach().clone() for n, p in toy.p.items()}
    toy.rate = 0.0
    loss = toy.step(1)
    assert loss == pytest.approx(float(now["a"].square().sum() + now["b"].sum()))
    assert all(p.equal(now[n]) for n, p in toy.p.items())


def test_forward_passes_are_without_gradient_and_dropout():
    import torch

    toy = Toy(Mezo(), lambda w: w.square().sum(), {"w": torch.ones(3)}, rate=1e-2)
    for i in range(3):
        toy.step(i)
    assert toy.seen == [(False, False)] * 6
    assert toy.run.model.training and torch.is_grad_enabled()
    assert toy.p["w"].grad is None and not toy.run.engine.optimizer.state


def test_a_quadratic_of_two_is_solved_and_decay_spares_vectors():
    import torch

    toy = Toy(Mezo(), lambda w: (w - torch.tensor([1.0, -2.0])).square().sum(), {"w": torch.zeros(2)}, rate=5e-2)
    losses = [toy.step(i) for i in range(300)]
    assert losses[0] > 3 and losses[-1] < 1e-3
    flat = Toy(Mezo(weight_decay=0.5), lambda m, v: m.sum() * 0 + v.sum() * 0, {"m": torch.ones(2, 2), "v": torch.ones(2)}, rate=0.1)
    flat.step(0)
    assert flat.p["m"].flatten().tolist() == pytest.approx([0.95] * 4)
    assert flat.p["v"].tolist() == pytest.approx([1.0, 1.0], abs=1e-6)


def test_a_loss_that_is_not_finite_stops_mezo():
    import torch

    with pytest.raises(TrainingError, match="the loss is nan"):
        Toy(Mezo(), lambda w: w.sum() * math.nan, {"w": torch.ones(2)}, rate=1e-3).step(0)


def test_mezo_trains_the_model_without_gradients_and_can_be_made_again_from_its_record(model):
    """All weights, the output layer tied to the embedding: the record (seed, slope, rate) gives the same weights without a forward pass."""
    import torch

    run = small_run(model, optimizer="mezo", adapt="full")
    start = values(run)
    records = steps(run, examples(8), 40, rows_per_step=8, rate=1e-3)
    assert records[-1]["loss"] < records[0]["loss"] - 0.01
    assert all(p.grad is None for p in run.model.parameters()) and not run.engine.torch_optimizer.state and not run.engine.optimizer_state()
    assert not any("lm_head" in n for n in start), "tied weights are one"
    for record in records:
        generator = torch.Generator().manual_seed(derive_seed(run.seed, "mezo", record["step"] - 1))
        for value in start.values():
            value -= record["learning_rate"] * record["mezo_slope"] * torch.randn(value.shape, generator=generator)
    for name, value in values(run).items():
        torch.testing.assert_close(value, start[name], rtol=1e-5, atol=1e-6)
    again = small_run(model, optimizer="mezo", adapt="full")
    assert steps(again, examples(8), 40, rows_per_step=8, rate=1e-3) == records and same(values(again), values(run))
    other = small_run(model, optimizer="mezo", adapt="full", seed=2)
    assert steps(other, examples(8), 1, rows_per_step=8, rate=1e-3)[0]["mezo_slope"] != records[0]["mezo_slope"]


def check(folder, **settings):
    planted.stage(folder, **settings).check(Environment(workspace=folder, base=folder, pipeline="t"), {})


@pytest.mark.parametrize(("settings", "said"), [
    ({"optimizer": "mezo", "zero": 2}, "mezo does not work under ZeRO stage 2"),
    ({"optimizer": "mezo", "zero": 0, "regularizers": ["l2_start"]}, "mezo has no gradients, and l2_start acts on them"),
    ({"optimizer": "q_galore", "zero": 1}, "q_galore does not work under ZeRO stage 1"),
    ({"offload": "optimizer", "zero": 0}, "the optimizer is offloaded under ZeRO stages 1 and 2, and zero is 0"),
    ({"regularizers": ["component_clip"]}, "takes the place of clipping the whole gradient, and clip is 1"),
    ({"regularizers": ["component_clip", "l2_start"], "clip": 0}, "l2_start would change gradients that component_clip has clipped"),
])
def test_what_does_not_go_together_is_refused_before_anything_runs(model, settings, said):
    with pytest.raises(ConfigError, match=said):
        check(model, **settings)


def test_what_goes_together_passes(model):
    check(model, optimizer="mezo", zero=0)
    check(model, offload="optimizer", zero=1)
    check(model, regularizers=["l2_start", "component_clip"], clip=0)


# Component-wise clipping


def gradients_after(model, threshold, blow_up=None, zero=0):
    """Gradients of the first step before and after clipping; `blow_up` is multiplied by a million in between."""
    import torch

    run = small_run(model, zero=zero, clip=0.0, regularizers=({"component_clip": {"threshold": threshold}},))
    found = {}

    class Spy(ComponentClip):
        def on_gradients(self, run):
            if blow_up:
                run.engine.set_gradient(blow_up, run.engine.gradient(blow_up) * 1e6)
            found["before"] = {n: run.engine.gradient(n) for n in run.engine.names}
            super().on_gradients(run)
            found["after"] = {n: run.engine.gradient(n) for n in run.engine.names}

    for name, parameter in run.trainable().items():  # B starts at zero, and so does the gradient of A
        if zero == 0:
            with torch.no_grad():
                parameter.add_(0.01 if "lora_B" in name else 0.0)
    run.regularizers = (Spy(threshold=threshold),)
    record = steps(run, examples(), 1, rate=0.0)[0]
    return found["before"], found["after"], record


def test_each_tensor_is_held_to_its_own_length_as_torch_does(model):
    import torch

    before, after, record = gradients_after(model, 0.05)
    shortened = 0
    for name, gradient in before.items():
        one = torch.nn.Parameter(torch.zeros_like(gradient))
        one.grad = gradient.clone()
        norm = torch.nn.utils.clip_grad_norm_([one], 0.05)
        torch.testing.assert_close(after[name], one.grad, rtol=1e-6, atol=0)
        assert float(after[name].norm()) <= 0.05 * (1 + 1e-5)
        if float(norm) < 0.05 - 1e-6:
            assert after[name].equal(gradient)
        shortened += float(norm) > 0.05
    assert 0 < shortened < len(before)
    assert record["component_clipped"] == pytest.approx(shortened / len(before))


@pytest.mark.parametrize("zero", [0, 2])
def test_one_exploding_tensor_leaves_the_others_alone(model, zero):
    _, calm, _ = gradients_after(model, 0.05, zero=zero)
    name = next(n for n in calm if "lora_B" in n)
    before, after, _ = gradients_after(model, 0.05, blow_up=name, zero=zero)
    assert float(before[name].norm()) > 100
    assert all(after[n].equal(calm[n]) for n in calm if n != name)
    assert float(after[name].norm()) == pytest.approx(0.05, rel=1e-4)


def test_a_threshold_out_of_reach_is_a_run_without(model):
    for zero in (0, 2):
        plain, far = small_run(model, zero=zero, clip=0.0), small_run(model, zero=zero, clip=0.0, regularizers=({"component_clip": {"threshold": 1e5}},))
        wanted, found = steps(plain, examples(), 3), steps(far, examples(), 3)
        assert all(r.pop("component_clipped") == 0 for r in found)
        assert found == wanted and same(values(far), values(plain))


def test_a_gradient_that_is_not_finite_names_its_tensor(model):
    run = small_run(model, clip=0.0)

    class Broken(ComponentClip):
        def on_gradients(self, run):
            run.engine.set_gradient(run.engine.names[1], run.engine.gradient(run.engine.names[1]) * math.nan)
            super().on_gradients(run)

    run.regularizers = (Broken(),)
    with pytest.raises(TrainingError, match=f"the gradient of {run.engine.names[1]} has norm nan"):
        steps(run, examples(), 1)


# Q-GaLore


def rotating(method, gradients, shape=(48, 32), name="model.layers.0.w", rate=1e-2, start=None):
    """A ProjectedAdam over one matrix after these gradients; returns (value, state, optimizer)."""
    import torch

    p = torch.nn.Parameter(torch.zeros(shape) if start is None else start.clone())
    optimizer = method.build([{"params": [(name, p)], "lr": rate}])
    for i, gradient in enumerate(gradients):
        optimizer.seed = i
        p.grad = gradient.clone()
        optimizer.step()
    return p.detach(), optimizer.state[p], optimizer


PLAIN = {"projection": "float32", "cosine": None, "rank": 32, "scale": 0.25}


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32)])
def test_at_full_rank_the_projection_and_back_is_the_gradient(monkeypatch, shape):
    """With plain SGD inside. With Adam it must not be full Adam, which is not the same in a turned basis."""
    import torch

    from ftpipe.train.optimizer._galore import ProjectedAdam

    torch.manual_seed(0)
    g = torch.randn(shape)
    adam, _, _ = rotating(QGalore(**PLAIN), [g], shape, rate=1.0)
    full = torch.nn.Parameter(torch.zeros(shape))
    full.grad = g.clone()
    torch.optim.Adam([full], lr=0.25).step()
    assert float((adam - full.detach()).abs().max()) > 0.1
    assert float(adam.norm()) == pytest.approx(0.25 * math.sqrt(g.numel()), rel=1e-3), "each entry of the turned gradient moves by the rate"
    monkeypatch.setattr(ProjectedAdam, "_adam", lambda self, value, gradient, state, rate: (value.add_(gradient, alpha=-rate), state["step"].add_(1)))
    found, _, _ = rotating(QGalore(**PLAIN), [g], shape, rate=1.0)
    torch.testing.assert_close(found, -0.25 * g, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_steps_are_those_of_an_explicit_galore(shape):
    """Low rank, a new basis every second step: against numpy's SVD, the projection and Adam written out."""
    import numpy as np
    import torch

    torch.manual_seed(1)
    gs = [torch.randn(shape) for _ in range(5)]
    p = torch.nn.Parameter(torch.ones(shape))
    optimizer = QGalore(projection="float32", cosine=None, rank=4, update_gap=2, weight_decay=0.1).build([{"params": [("layers.0.w", p)], "lr": 1e-2}])
    w, m, v, right, bases = np.ones(shape), 0.0, 0.0, shape[0] > shape[1], []
    for t, g in enumerate(gs):
        p.grad = g.clone()
        optimizer.step()
        basis, g = optimizer.state[p]["basis"].double().numpy(), g.double().numpy()
        bases.append(basis)
        if t % 2 == 0:
            u, _, vt = np.linalg.svd(g, full_matrices=False)
            np.testing.assert_allclose(np.abs((basis * (vt[:4].T if right else u[:, :4])).sum(0)), 1.0, atol=1e-5)
        low = g @ basis if right else basis.T @ g
        m, v = 0.9 * m + 0.1 * low, 0.999 * v + 0.001 * low**2
        step = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
        w = (w - 1e-2 * 0.25 * (step @ basis.T if right else basis @ step)) * (1 - 1e-2 * 0.1)
        np.testing.assert_allclose(p.detach().numpy(), w, rtol=1e-5, atol=1e-6)
    assert np.array_equal(bases[0], bases[1]) and not np.allclose(np.abs(bases[1]), np.abs(bases[2]))
    assert int(optimizer.state[p]["refreshes"]) == 3 and tuple(optimizer.state[p]["exp_avg"].shape) == ((48, 4) if right else (4, 48))
    change = torch.linalg.svdvals(rotating(QGalore(rank=4), gs, shape)[0].double())
    assert float(change[4:].max()) < 1e-5 * float(change[0]), "one basis for 200 steps: the change has rank 4"


@pytest.mark.parametrize("shape", [(48, 32), (32, 48)])
def test_a_steady_direction_doubles_the_gap_and_noise_does_not(shape):
    """With the gradient's sign that of the vectors on one side changes too, so one of the two shapes would see cosines of -1."""
    import torch

    torch.manual_seed(0)
    steady = torch.outer(torch.randn(shape[0]), torch.randn(shape[1]))
    method, n = QGalore(rank=4, update_gap=2), 60
    at, gaps = [], []
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = method.build([{"params": [("layers.0.w", p)], "lr": 1e-2}])
    for i in range(n):
        p.grad = steady * (-1.0) ** (i // 2) * (1 + i)  # the sign and length of the gradient do not matter
        optimizer.step()
        at += [i] * optimizer.refreshed
        gaps.append(int(optimizer.state[p]["gap"]))
    assert at[:6] == [0, 2, 4, 6, 8, 10] and set(gaps[:10]) == {2}
    assert gaps[10] == 4 and at[6] == 12 and gaps[12] == 8 and at[7] == 16 and gaps[16] == 16
    assert optimizer.state[p]["history"].tolist() == pytest.approx([1.0] * 5, abs=1e-4)
    assert len(at) < n / 2 and int(optimizer.state[p]["refreshes"]) == len(at)
    _, noise, _ = rotating(method, [torch.randn(shape) for _ in range(40)], shape)
    assert int(noise["gap"]) == 2 and int(noise["refreshes"]) == 20
    _, never, _ = rotating(QGalore(rank=4, update_gap=2, cosine=None), [steady] * 40, shape)
    assert int(never["gap"]) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_few_bits_come_back_within_half_a_step_and_rounding_at_random_is_fair(bits):
    import torch

    from ftpipe.train.optimizer._lowbit import pack, unpack

    torch.manual_seed(0)
    value = torch.randn(7, 91)  # 637 entries: an odd number, and a last group that is not whole
    value[0, :50] = 0.5 + torch.rand(50) * 0.1
    packed = pack(value, bits, 100)
    assert packed.codes.dtype == torch.uint8 and packed.codes.numel() == (math.ceil(637 / 2) if bits == 4 else 637)
    assert packed.scale.numel() == packed.zero.numel() == 7
    scale = packed.scale.repeat_interleave(100)[:637].view(7, 91)
    back = unpack(packed, (7, 91), bits, 100)
    # the zero point is rounded too, so that the ends of a group may be cut by half a step more
    assert bool(((back - value).abs() <= scale * (1 + 1e-5)).all())
    low, high = (x.repeat_interleave(100)[:637].view(7, 91) for x in (-packed.zero.float() * packed.scale, (2**bits - 1 - packed.zero.float()) * packed.scale))
    inner = (value > low + scale) & (value < high - scale)
    assert bool(((back - value).abs()[inner] <= scale[inner] * (0.5 + 1e-4)).all()) and int(inner.sum()) > 400
    draws = torch.stack([unpack(pack(value, bits, 100, torch.Generator().manual_seed(i)), (7, 91), bits, 100) for i in range(400)])
    assert bool(((draws - value).abs()[:, inner] < scale[inner] * (1 + 1e-4)).all())
    fraction = (value / scale) - (value / scale).floor()
    error = scale * (fraction * (1 - fraction)).sqrt() / math.sqrt(len(draws))
    z = ((draws.mean(0) - value) / error.clamp(min=1e-9))[inner & (fraction > 0.02) & (fraction < 0.98)]
    assert float(z.abs().mean()) < 1.0 and float(z.abs().max()) < 4.5 and float(z.mean().abs()) < 0.2
    one_sided = 3.0 + torch.rand(100) * 0.01
    assert float((unpack(pack(one_sided, bits, 100), (100,), bits, 100) - one_sided).abs().max()) <= 3.02 / (2**bits - 1)
    assert not unpack(pack(torch.zeros(100), bits, 100), (100,), bits, 100).any()


def test_weights_rounded_to_int8_follow_the_float_ones_and_rest_where_nothing_moves():
    import torch

    torch.manual_seed(0)
    start, gs = torch.randn(48, 32) * 0.05, [torch.randn(48, 32) for _ in range(20)]
    fields = {"rank": 8, "group": 64}
    rounded, _, _ = rotating(QGalore(weights="int8", **fields), gs, start=start)
    exact, _, _ = rotating(QGalore(**fields), gs, start=start)
    assert len(rounded.flatten()[:64].unique()) <= 256 and not rounded.equal(exact)
    step = float((rounded.view(-1, 64).amax(1) - rounded.view(-1, 64).amin(1)).max()) / 255
    assert float((rounded - exact).abs().max()) < step * math.sqrt(20) * 2
    assert abs(float((rounded - exact).mean())) < step / 8
    still, _, _ = rotating(QGalore(weights="int8", **fields), gs, start=start, rate=0.0)
    assert still.equal(start)
    assert rotating(QGalore(weights="int8", **fields), gs, start=start)[0].equal(rounded)


def test_only_matrices_of_the_layers_are_projected_and_state_is_small(model):
    """Full tuning in the loop: embeddings and norms take the steps of plain Adam; the projection is packed."""
    run = small_run(model, adapt="full", optimizer={"q_galore": {"rank": 4, "update_gap": 3}})
    records = steps(run, examples(), 4)
    assert [r["svds"] for r in records] == [14, 0, 0, 14]
    state = run.engine.optimizer_state()
    for name, parameter in run.trainable().items():
        if parameter.dim() == 2 and ".layers." in name:
            short, long = sorted(parameter.shape)
            assert state[name]["exp_avg"].numel() == 4 * long and state[name]["basis"].numel() == math.ceil(short * 4 / 2)
            held = sum(v.numel() * v.element_size() for v in state[name].values())
            assert held < 2 * 4 * parameter.numel() / 3, "a third of Adam's at rank 4 of 32"
        else:
            assert set(state[name]) == {"step", "exp_avg", "exp_avg_sq"} and state[name]["exp_avg"].shape == parameter.shape
    assert len(state) == len(run.engine.names)

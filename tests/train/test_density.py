"""The penalty on active units: its formula, and models that it makes sparser."""

from __future__ import annotations

import math
import statistics

import pytest

from ftpipe.train.regularizer._hooks import blocks
from tests.train.small import examples, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")


def test_the_density_counts_what_is_not_zero_smoothly():
    import torch

    from ftpipe.train.regularizer.activation_density import ActivationDensity

    method = ActivationDensity(sharpness=10.0)
    values = torch.linspace(-1, 1, 41)
    assert float(method.density(torch.zeros(5))) == 0.0
    grown = [float(method.density(torch.full((3,), v))) for v in (0.0, 0.01, 0.1, 0.5, 2.0)]
    assert grown == sorted(grown) and len(set(grown)) == 5 and grown[-1] == pytest.approx(1.0, abs=1e-6)
    assert float(method.density(values)) == pytest.approx(statistics.mean(math.tanh(10 * abs(v)) for v in values.tolist()), abs=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_the_penalty_is_the_density_of_the_activated_gates_by_hand(model, fused):
    """Whether a layer calls its activation as a module or computes gate and product in one piece."""
    import torch

    from ftpipe.models import kernels

    run = small_run(model, regularizers=({"activation_density": {"strength": 0.7, "sharpness": 30.0, "threshold": 0.02}},))
    if fused:
        assert kernels.install(run.model)["swiglu"] == 2
    found = steps(run, examples(8), 1, rate=0.0, alone=True)[0]
    plain = steps(small_run(model), examples(8), 1, rate=0.0, alone=True)[0]
    density, active, count = 0.0, 0, 0
    gates = []
    handles = [b.mlp.gate_proj.register_forward_hook(lambda m, g, out: gates.append(out[0])) for b in blocks(run.model)]
    for row in examples(8):
        gates.clear()
        with torch.no_grad():
            run.model(input_ids=torch.tensor([row.input_ids[0]]), use_cache=False)
        for gate in gates:
            o = torch.nn.functional.silu(gate)[torch.tensor(row.trained[0])[1:].nonzero().flatten()].abs()
            density, active, count = density + float((30 * o).tanh().sum()), active + int((o > 0.02).sum()), count + o.numel()
    for h in handles:
        h.remove()
    assert found["density"] == pytest.approx(density / count, abs=1e-5) and found["active_share"] == pytest.approx(active / count, abs=1e-5)
    assert found["loss"] == pytest.approx(plain["loss"] + 0.7 * density / count, abs=1e-5)


def test_a_density_of_no_weight_changes_nothing_and_one_of_weight_makes_the_model_sparser(model):
    """The base stays as it is, and what is given up of the loss is small beside what is gained."""
    import torch

    how = {"sharpness": 3.0, "threshold": 0.05}
    runs = {s: small_run(model, regularizers=({"activation_density": {"strength": s, **how}},) if s is not None else ()) for s in (None, 0.0, 0.5)}
    found = {s: steps(r, examples(8), 20, batch_tokens=10_000) for s, r in runs.items()}
    assert [r["loss"] for r in found[0.0]] == [r["loss"] for r in found[None]]
    assert all(runs[0.0].engine.value(n).equal(runs[None].engine.value(n)) for n in runs[None].engine.names)
    last, sparse = found[0.0][-1], found[0.5][-1]
    assert sparse["active_share"] < 0.5 * last["active_share"]
    assert sparse["loss"] - 0.5 * sparse["density"] < last["loss"] + 0.2
    frozen = {n.replace(".base_layer", ""): p for n, p in runs[0.5].model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(frozen[f"base_model.model.{n}"], p) for n, p in runs[0.5].load_base().named_parameters())

"""The hooks hold what later methods need: each of these is a sketch of one, written as one class without touching the loop."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import pytest

from ftpipe.train import checkpoint
from ftpipe.train.adapt.lora import Lora
from ftpipe.train.regularizer.base import Regularizer
from ftpipe.train.run import Change
from tests.train.small import examples, small_run, steps

pytestmark = pytest.mark.usefixtures("alone")


class Noise(Regularizer):
    """As NoiseFiT: noise on the hidden states of chosen layers, and a penalty on what it changes."""

    layers: tuple[int, ...] = (0,)
    scale: float = 0.5

    @contextmanager
    def forward(self, run, batch):
        import torch

        def disturb(module, given, out):
            hidden = out[0] if isinstance(out, tuple) else out
            noisy = hidden + self.scale * torch.randn_like(hidden)
            return (noisy, *out[1:]) if isinstance(out, tuple) else noisy

        with ExitStack() as stack:
            for n in self.layers:
                handle = run.model.get_base_model().model.layers[n].register_forward_hook(disturb)
                stack.callback(handle.remove)
            yield

    def penalty(self, run, batch):
        from ftpipe.train.forward import logits

        return 0.01 * (logits(run.model, batch) - logits(run.model, batch)).square().mean()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_noise_in_the_forward_pass_is_seeded_and_taken_away_again(model, zero):
    runs = [small_run(model, zero=zero, regularizers=r) for r in ((), (Noise(),), (Noise(),))]
    plain, noisy, again = (steps(r, examples(), 2) for r in runs)
    assert noisy == again and noisy[0]["loss"] != plain[0]["loss"]
    assert not runs[1].model.get_base_model().model.layers[0]._forward_hooks or zero == 3


class Chain(Lora):
    """As Chain of LoRA: every two steps the pair is merged into the base and starts anew; the merged pairs are remembered."""

    every: int = 2

    def before_step(self, run):
        if run.step == 0 or run.step % self.every:
            return None
        import torch

        past = f"chain/{run.step}"
        for name in run.engine.names:
            value = run.engine.value(name)
            run.memory[f"{past}/{name}"] = value.cpu()
            torch.manual_seed(run.step)
            run.engine.set_value(name, torch.zeros_like(value) if "lora_B" in name else torch.randn_like(value) * 0.02)
        self.merge_past(run, past)
        return Change(forget=frozenset(run.engine.names))

    def merge_past(self, run, past: str) -> None:
        import torch

        modules = dict(run.model.named_modules())
        for key in [k for k in run.memory if k.startswith(past) and "lora_B" in k]:
            name = key.removeprefix(past + "/")
            target = modules[name.split(".lora_B")[0]]
            with torch.no_grad():
                target.base_layer.weight += self.alpha / self.r * run.memory[key] @ run.memory[key.replace("lora_B", "lora_A")]

    def resumed(self, run):
        for past in sorted({"/".join(k.split("/")[:2]) for k in run.memory}):
            self.merge_past(run, past)


def test_merging_and_starting_anew_keeps_what_was_learnt(model):
    """Right after the merge the model computes what it did before."""
    import torch

    run = small_run(model, adapt=Chain(r=2))
    steps(run, examples(), 2)
    ids = torch.arange(5, 60)[None]
    run.model.eval()
    with torch.no_grad():
        before = run.model(input_ids=ids).logits
        run.step = 2
        change = run.adapt.before_step(run)
        after = run.model(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert change.forget == frozenset(run.engine.names)
    assert all(not v.any() for n, v in run.engine.state().items() if "lora_B" in n)


@pytest.mark.parametrize("zero", [0, 2])
def test_a_method_with_a_memory_goes_on_after_a_kill_as_if_nothing_had_been(model, tmp_path, zero):
    from ftpipe.train.engine import Engine
    from ftpipe.train.loop import _restore

    straight = small_run(model, adapt=Chain(r=2), zero=zero)
    wanted = steps(straight, examples(), 6)
    broken = small_run(model, adapt=Chain(r=2), zero=zero)
    steps(broken, examples(), 5)
    checkpoint.write(tmp_path, checkpoint.Checkpoint(5, broken.engine.trained(), broken.engine.optimizer_state(), list(broken.engine.names), broken.memory))
    resumed = small_run(model, adapt=Chain(r=2), zero=zero)
    resumed.engine.destroy()
    kept = checkpoint.latest(tmp_path)
    assert _restore(resumed, kept)[0] == 5
    resumed.engine = Engine(resumed, 1.0, touched=kept.parameters)
    resumed.engine.restore(kept.optimizer)
    assert steps(resumed, examples(), 6, first=5) == wanted[5:]


def test_checkpoints_are_replaced_whole(model, tmp_path):
    import torch

    for step in (2, 4):
        checkpoint.write(tmp_path, checkpoint.Checkpoint(step, {"w": torch.full((2,), float(step))}, {"w": {"step": torch.tensor(1.0), "n": 3}}, ["w"],
                                                         {"a/b": torch.ones(1), "text": "x"}, [{"step": step}]))
        (tmp_path / f".step-{step + 2:08d}.tmp").mkdir(exist_ok=True)  # what a kill in the next one leaves
    assert [p.name for p in checkpoint.found(tmp_path)] == ["step-00000004"]
    kept = checkpoint.latest(tmp_path)
    assert kept.step == 4 and kept.parameters["w"].tolist() == [4.0, 4.0] and kept.memory["text"] == "x" and kept.memory["a/b"].tolist() == [1.0]
    assert kept.optimizer["w"]["n"] == 3 and float(kept.optimizer["w"]["step"]) == 1.0 and kept.metrics == [{"step": 4}]
    (tmp_path / "step-00000004" / "optimizer.safetensors").write_bytes(b"cut")
    from ftpipe.errors import ArtifactError

    with pytest.raises(ArtifactError, match="checkpoint cannot be read"):
        checkpoint.latest(tmp_path)

"""GMT: which entries of the gradient are left, under every ZeRO stage, and that only what changed is saved."""

from __future__ import annotations

import pytest

from ftpipe.errors import ArtifactError
from ftpipe.train.adapt.gmt import Gmt
from ftpipe.train.optimizer.base import Optimizer
from tests.train.small import examples, small_run, steps
from tests.train.sparse import batches_of, gradients, loaded, moved, saved, stopped_and_resumed, whole

pytestmark = pytest.mark.usefixtures("alone")


class Sgd(Optimizer):
    """Without momentum and decay, so that what moves is what has a gradient."""

    zero_stages = (0, 1, 2, 3)

    def build(self, groups):
        import torch

        return torch.optim.SGD(groups, lr=0.0)


class Seen(Gmt):
    """Notes the gradients before and after masking."""

    def on_gradients(self, run):
        before = {n: run.engine.gradient(n) for n in run.engine.names}
        super().on_gradients(run)
        run.cache.setdefault("seen", []).append((before, {n: run.engine.gradient(n) for n in run.engine.names}))


@pytest.mark.parametrize("zero", range(4))
def test_the_largest_entries_of_each_gradient_are_left_and_exactly_those_move(model, zero):
    """Against a sort of each tensor's entries; the tied embedding has a gradient everywhere through the output layer."""
    run = small_run(model, zero=zero, adapt=Seen(keep_ratio=0.1), optimizer=Sgd(), clip=0.0)
    value = whole(run)
    masks = []
    for step in range(2):
        start, (record,) = value, steps(run, examples(), step + 1, first=step)
        value = whole(run)
        before, after = run.cache["seen"][step]
        assert set(before) == set(start), "every parameter"
        left = 0
        for name, gradient in before.items():
            n = max(1, int(0.1 * gradient.numel()))
            order = gradient.abs().flatten().argsort(descending=True)
            size = gradient.abs().flatten()[order]
            assert float(size[n - 1]) > float(size[n]), "no ties here"
            wanted = gradient.flatten().clone()
            wanted[order[n:]] = 0
            assert after[name].flatten().equal(wanted), name
            left += n
            step_taken = start[name] - 1e-2 * wanted.view_as(gradient)
            assert value[name].equal(step_taken) or float((value[name] - step_taken).abs().max()) < 1e-8
            assert not bool((value[name] != start[name])[after[name] == 0].any()), "what has no gradient does not move"
        assert record["gmt_kept"] == pytest.approx(left / sum(g.numel() for g in before.values()))
        masks.append({n: g != 0 for n, g in after.items()})
    assert all(not masks[0][n].equal(masks[1][n]) for n in masks[0] if masks[0][n].dim() == 2), "the mask is made anew at each step"


@pytest.mark.parametrize("zero", [0, 3])
def test_one_threshold_for_the_whole_model_leaves_the_largest_entries_of_all(model, zero):
    """Against one sort of all entries; the share of a tensor then differs from tensor to tensor."""
    import torch

    run = small_run(model, zero=zero, adapt=Seen(keep_ratio=0.1, scope="model"), optimizer=Sgd(), clip=0.0)
    (record,) = steps(run, examples(), 1)
    before, after = run.cache["seen"][0]
    size = torch.cat([g.abs().flatten() for g in before.values()])
    n = int(0.1 * size.numel())
    threshold = size.sort(descending=True).values[n - 1]
    for name, gradient in before.items():
        assert after[name].equal(gradient * (gradient.abs() >= threshold)), name
    kept = {n: float((g != 0).float().mean()) for n, g in after.items()}
    assert record["gmt_kept"] == pytest.approx(n / size.numel(), rel=1e-3)
    assert max(kept.values()) > 0.2 and min(kept.values()) < 0.05, kept


def test_the_threshold_of_the_model_is_exact_for_any_values():
    """Ties, zeros, numbers that differ in their last bit and in their order of magnitude."""
    import torch

    draw = torch.Generator().manual_seed(1)
    tensors = {"wide": torch.randn(300, generator=draw) * torch.logspace(-40, 30, 300), "close": 1 + torch.arange(64) * 2.0**-23, "zero": torch.zeros(9),
               "same": torch.full((20,), -0.5), "one": torch.tensor([[2.0]])}
    run = type("R", (), {"engine": type("E", (), {"names": list(tensors), "gradient": staticmethod(lambda name: tensors[name].clone())})})
    every = torch.cat([t.abs().flatten() for t in tensors.values()]).sort(descending=True).values
    for ratio in (1e-9, 0.01, 0.1, 0.3, 0.55, 0.999, 1.0):
        found = Gmt(keep_ratio=ratio, scope="model").threshold(run)
        assert found.equal(every[max(1, int(ratio * len(every))) - 1]), ratio


@pytest.mark.parametrize("zero", [0, 2])
def test_a_ratio_of_one_is_full_fine_tuning_to_the_bit(model, zero):
    full, all_kept, some = (small_run(model, zero=zero, adapt=a) for a in ("full", {"gmt": {"keep_ratio": 1.0}}, {"gmt": {"keep_ratio": 0.5}}))
    found = [steps(r, examples(), 3) for r in (full, all_kept, some)]
    assert [r["loss"] for r in found[0]] == [r["loss"] for r in found[1]] != [r["loss"] for r in found[2]]
    assert not moved(whole(full), whole(all_kept)) and moved(whole(full), whole(some))


def test_the_sum_over_micro_batches_is_masked_once_and_not_each_of_them(model):
    import torch

    run = small_run(model, adapt=Seen(keep_ratio=0.1), optimizer=Sgd(), clip=0.0)
    (batches, count), = batches_of(run, 1, alone=True)
    assert len(batches) == 8
    plain = run.load_base().requires_grad_(True)
    parts = gradients(plain, run, batches, count)
    steps(run, examples(), 1, alone=True)
    _, after = run.cache["seen"][0]
    method = run.adapt
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        total = sum(p[name] for p in parts)
        once = total * method.kept(total)
        each = sum(p[name] * method.kept(p[name]) for p in parts)
        running = torch.zeros_like(total)
        for p in parts:
            running += p[name]
            running *= method.kept(running)
        torch.testing.assert_close(after[name], once, rtol=1e-3, atol=1e-7)
        assert not (after[name] != 0).equal(each != 0) and not (after[name] != 0).equal(running != 0)


def test_at_least_one_entry_is_kept_and_ties_keep_more():
    import torch

    assert Gmt(keep_ratio=0.01).kept(torch.tensor([0.1, -3.0, 2.0])).tolist() == [False, True, False]
    assert Gmt(keep_ratio=0.5).kept(torch.tensor([1.0, -1.0, 1.0, 0.5])).tolist() == [True, True, True, False]
    assert bool(Gmt(keep_ratio=0.5).kept(torch.zeros(2, 4)).all())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_entries_that_changed_are_saved_and_they_load_exactly(model, tmp_path, dtype):
    """Eight bytes for each, whatever the size of the tensor they are in."""
    from safetensors.torch import load_file

    run = small_run(model, dtype=dtype, adapt={"gmt": {"keep_ratio": 0.02}}, optimizer=Sgd())
    base = dict(run.load_base().named_parameters())
    steps(run, examples(), 1)
    after = whole(run)
    fresh = dict(loaded(run, tmp_path / "saved").named_parameters())
    assert all(p.dtype == base[n].dtype and p.equal(after[n].to(p.dtype)) for n, p in fresh.items())
    kept = load_file(tmp_path / "saved" / "weights.safetensors")
    assert all("::" in n for n in kept)
    changed = sum(int((after[n] != p.float()).sum()) for n, p in base.items())
    assert sum(t.numel() * t.element_size() for t in kept.values()) == 8 * changed
    assert 0 < changed <= sum(max(1, int(0.02 * p.numel())) for p in base.values())


def test_what_is_saved_is_checked_like_any_adapter(model, tmp_path):
    """Positions outside the tensor, a missing half, a parameter that is not there; and a change of nothing."""
    import json

    import torch
    from safetensors.torch import load_file, save_file

    from ftpipe.models.adapters import checked

    run = small_run(model, adapt={"gmt": {"keep_ratio": 0.02}}, optimizer=Sgd())
    steps(run, examples(), 1)
    folder = tmp_path / "adapter"
    saved(run, folder)
    identity = {"weights": "w", "config": "c", "tokenizer": "t", "chat_template": "none"}
    (folder / "ftpipe_adapter.json").write_text(json.dumps({"method": run.adapt.dump(), "base": identity}))
    base, path = run.load_base(), folder / "weights.safetensors"
    good = load_file(path)
    checked(folder, identity, base)
    entries = next(n for n in good if n.endswith("layers.0.mlp.up_proj.weight::entries"))
    name = entries.removesuffix("::entries")
    far = good[entries].clone()
    far[0] = 32 * 64
    double = good[entries].clone()
    double[0] = double[1]
    weight = dict(base.named_parameters())[name].detach()
    unchanged = {entries: good[entries], f"{name}::values": weight.flatten()[good[entries].long()]}
    for wrong, said in ((good | {entries: far}, "the base has 2048 entries"), (good | {entries: double}, "named twice"),
                        (good | {entries: good[entries].float()}, "no list of whole numbers"),
                        (good | {entries: good[entries][1:].clone()}, "entries of"), ({n: t for n, t in good.items() if n != entries}, "no counterpart"),
                        (good | {"x.weight::rows": torch.tensor([0]), "x.weight::change": torch.ones(1, 4)}, "none of that name"),
                        (unchanged, "changes nothing"), ({}, "changes nothing")):
        save_file(wrong, path)
        with pytest.raises(ArtifactError, match=said):
            checked(folder, identity, base)
    checked(folder, identity, base, allow_zero=True)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_kill_changes_nothing(model, tmp_path, zero):
    settings = {"adapt": "gmt", "zero": zero}
    straight = small_run(model, **settings)
    wanted = steps(straight, examples(), 3)
    resumed, found = stopped_and_resumed(model, tmp_path / "checkpoints", 2, 3, **settings)
    assert found == wanted[2:]
    assert saved(resumed, tmp_path / "a") == saved(straight, tmp_path / "b")

"""HFT: which matrices rest in which stage, counted; that they do not move; and that what trains is all that is held and saved."""

from __future__ import annotations

import pytest

from tests.tiny import make_tiny_model
from tests.train.small import examples, small_run, steps
from tests.train.sparse import loaded, make_gpt2, moved, saved, stopped_and_resumed, whole

pytestmark = pytest.mark.usefixtures("alone")
DECAY = {"adamw": {"weight_decay": 0.1}}
CATEGORIES = {"attention": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj"),
              "norm": ("input_layernorm", "post_attention_layernorm")}
SIZES = {"q_proj": 32 * 32, "o_proj": 32 * 32, "k_proj": 16 * 32, "v_proj": 16 * 32, "gate_proj": 64 * 32, "up_proj": 64 * 32, "down_proj": 64 * 32,
         "input_layernorm": 32, "post_attention_layernorm": 32}


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("five"), layers=5)


def resting(names, layers: int = 5) -> list[dict[str, list[str]]]:
    """By layer and category the modules of the tiny Llama that are not among the names."""
    return [{c: [m for m in modules if not any(f".layers.{i}." in n and f".{m}." in n for n in names)] for c, modules in CATEGORIES.items()}
            for i in range(layers)]


@pytest.mark.parametrize("zero", [0, 3])
def test_half_of_each_category_rests_in_every_layer_and_nothing_of_it_moves(five, tmp_path, zero):
    """With weight decay, which would move what the optimizer holds. Five layers: two with two resting feed-forward matrices, three with one."""
    run = small_run(five, zero=zero, adapt="hft", optimizer=DECAY)
    start = whole(run)
    first = steps(run, examples(), 1)
    once = moved(start, whole(run))
    records = first + steps(run, examples(), 3, first=1)
    after = whole(run)
    changed = moved(start, after)
    assert once == changed == set(run.engine.names) == set(run.engine.optimizer_state()), "one half throughout, and state of it only"
    rest = resting(changed)
    assert all(len(layer["attention"]) == 2 and len(layer["norm"]) == 1 for layer in rest)
    assert sorted(len(layer["mlp"]) for layer in rest) == [1, 1, 1, 2, 2]
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= changed
    share = 1 - sum(SIZES[m] for layer in rest for names in layer.values() for m in names) / (5 * sum(SIZES.values()))
    assert all(r["hft_trained_share"] == pytest.approx(share) for r in records) and 0.35 <= share <= 0.65
    fresh = dict(loaded(run, tmp_path / "saved").named_parameters())
    assert all(p.equal(after[n]) for n, p in fresh.items())
    from safetensors.torch import load_file

    assert set(load_file(tmp_path / "saved" / "weights.safetensors")) == changed, "what rests is not in the adapter"


def test_another_seed_or_round_draws_another_half_and_the_same_one_the_same(five):
    def rests(seed, number):
        method = run.adapt.model_copy(update={"round": number})
        return frozenset(method.resting(layers, seed))

    run = small_run(five, adapt="hft")
    layers = run.adapt.categories(run.model)
    draws = {(s, r): rests(s, r) for s in range(3) for r in range(3)}
    assert len(set(draws.values())) == 9 and rests(1, 2) == draws[1, 2]
    assert rests(run.seed, 0) == {n for n, p in run.model.named_parameters() if not p.requires_grad}
    counts = {}
    for seed in range(300):
        for name in rests(seed, 0):
            counts[name] = counts.get(name, 0) + 1
    for name, n in counts.items():
        # 2 of 4, 1 of 2; of three matrices 2 with chance 2/5 and 1 with chance 3/5: (2 * 2 + 3 * 1) / 15
        wanted = 300 * (7 / 15 if ".mlp." in name else 1 / 2)
        assert abs(n - wanted) < 4 * (wanted * 0.55) ** 0.5, name


def test_biases_rest_with_their_matrix_and_fused_matrices_count_as_one(tmp_path):
    """GPT-2 has two matrices of attention, two of the feed-forward layer and two norms: one of each rests."""
    run = small_run(make_gpt2(tmp_path / "gpt2"), adapt="hft", optimizer=DECAY)
    start = whole(run)
    steps(run, examples(), 1)
    changed = moved(start, whole(run))
    for layer in range(2):
        own = {n.split(f".{layer}.")[1] for n in start if f".h.{layer}." in n}
        moving = {n.split(f".{layer}.")[1] for n in changed if f".h.{layer}." in n}
        for pair in (("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj"), ("ln_1", "ln_2")):
            states = [{f"{m}.weight" in moving, f"{m}.bias" in moving} for m in pair]
            assert sorted(map(sorted, states)) == [[False], [True]]
        assert len(own) == 12
    assert {n for n in start if ".h." not in n} <= changed


def test_a_kill_changes_nothing(five, tmp_path):
    settings = {"adapt": {"hft": {"round": 3}}, "zero": 2}
    straight = small_run(five, **settings)
    wanted = steps(straight, examples(), 3)
    resumed, found = stopped_and_resumed(five, tmp_path / "checkpoints", 2, 3, **settings)
    assert found == wanted[2:]
    assert saved(resumed, tmp_path / "a") == saved(straight, tmp_path / "b")

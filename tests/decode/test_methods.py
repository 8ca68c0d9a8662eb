"""Decoding methods against what they promise."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from ftpipe import slots
from ftpipe.decode._follower import Follower
from ftpipe.decode.base import DecodeRun
from ftpipe.decode.contrastive import Contrast, Contrastive
from ftpipe.decode.proxy_tuning import ProxyTuning, Shift
from ftpipe.errors import ConfigError
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.models.service import ModelService
from ftpipe.stages.base import Environment
from tests.models.data import some_rows, trained_adapter
from tests.tiny import make_tiny_model


@pytest.fixture(scope="module")
def env(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("decode")
    for name, seed in (("small", 3), ("other", 4)):
        make_tiny_model(folder / name, seed=seed, layers=1)
    (folder / "base").symlink_to(tiny_model)
    return Environment(folder / "ws", folder, "test")


@pytest.fixture(scope="module")
def service(env):
    return ModelService(load_model("base", env, dtype="float32", device="cpu"), load_tokenizer("base", env))


@pytest.fixture(scope="module")
def prompts(service):
    return [service.renderer.prompt([{"role": "user", "content": c}]) for c in ("a", "what is a list?", "sort it")]


def steer(service, env, prompts, **fields):
    return service.generate(prompts, max_new_tokens=12, decoder=ProxyTuning(**fields), env=env)


def test_greedy_takes_the_largest_logit_and_sampling_follows_the_distribution(service, prompts):
    tokens = torch.tensor([prompts[0]])
    with torch.inference_mode():
        logits = service.model(tokens).logits[0, -1]
    assert service.generate(prompts[:1], max_new_tokens=1, decoder=slots.parse("decode", "greedy"))[0].ids == [int(logits.argmax())]
    cold = slots.parse("decode", {"sampling": {"temperature": 1e-3}})
    assert service.generate(prompts[:1], max_new_tokens=1, decoder=cold)[0].ids == [int(logits.argmax())]
    hot = slots.parse("decode", {"sampling": {"temperature": 0.5, "top_p": 0.6}})
    p = torch.softmax(logits / 0.5, -1).sort(descending=True)
    nucleus = set(p.indices[: int((p.values.cumsum(0) < 0.6).sum()) + 1].tolist())
    drawn = [service.generate(prompts[:1], max_new_tokens=1, decoder=hot, seed=s)[0] for s in range(60)]
    ids = {a.ids[0] if a.ids else service.tokenizer.eos_token_id for a in drawn}
    assert ids <= nucleus and len(ids) > 5


def test_equal_expert_and_antiexpert_leave_the_logits_bit_for_bit(service, env, prompts):
    mask = torch.ones(1, len(prompts[0]), dtype=torch.long)
    scores = torch.randn(1, 259)
    with torch.inference_mode():
        shift, = ProxyTuning(expert="small", antiexpert="small").processors(DecodeRun(service, env, torch.tensor([prompts[0]]), mask))
        assert torch.equal(shift(torch.tensor([prompts[0]]), scores), scores)
    plain = service.generate(prompts, max_new_tokens=12)
    assert steer(service, env, prompts, expert="small", antiexpert="small") == plain
    assert steer(service, env, prompts, expert="small", antiexpert="other", alpha=0) == plain
    assert steer(service, env, prompts, expert="small", antiexpert="other", alpha=3) != plain


def test_with_the_base_as_antiexpert_the_expert_answers(service, env, prompts):
    expert = ModelService(load_model("small", env, dtype="float32", device="cpu"), load_tokenizer("small", env))
    answers = expert.generate(prompts, max_new_tokens=12)
    assert [a.ids for a in steer(service, env, prompts, expert="small", antiexpert="base")] == [a.ids for a in answers]


def test_an_adapter_makes_the_expert(service, env, prompts, tiny_model):
    adapter = trained_adapter(env.workspace, env.base / "base", some_rows(4), steps=20).file("adapter")
    tuned = ModelService.open("base", env, adapter=adapter, dtype="float32", device="cpu").generate(prompts, max_new_tokens=12)
    assert [a.ids for a in steer(service, env, prompts, expert="base", adapter=str(adapter))] == [a.ids for a in tuned]
    assert tuned != service.generate(prompts, max_new_tokens=12)


def test_cached_following_equals_a_full_forward_for_32_steps_with_padding(env):
    model = load_model("small", env, dtype="float32", device="cpu")
    rng = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 259, (2, 40), generator=rng)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, :5] = 0
    follower = Follower(model, mask)
    with torch.inference_mode():
        for n in range(8, 41):
            got = follower.logits(tokens[:, :n])
            assert follower.cache.get_seq_length() == n == follower.seen
            torch.testing.assert_close(got[0], model(tokens[:1, :n]).logits[0, -1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(got[1], model(tokens[1:, 5:n]).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_a_constant_added_to_any_models_logits_changes_no_probability_and_padding_ids_are_never_chosen(env):
    class Moved(torch.nn.Module):
        def __init__(self, inner, by):
            super().__init__()
            self.inner, self.by = inner, by

        def forward(self, **inputs):
            out = self.inner(**inputs)
            out.logits = torch.nn.functional.pad(out.logits + self.by, (0, 5), value=1e3)
            return out

    expert, anti = (load_model(n, env, dtype="float32", device="cpu") for n in ("small", "other"))
    tokens, mask = torch.tensor([[1, 5, 9]]), torch.ones(1, 3, dtype=torch.long)
    scores = torch.nn.functional.pad(torch.randn(1, 259), (0, 5), value=1e3)
    with torch.inference_mode():
        plain = Shift(Follower(expert, mask), Follower(anti, mask), 1.0, 259)(tokens, scores[:, :259])
        moved = Shift(Follower(Moved(expert, 3.0), mask), Follower(Moved(anti, -2.0), mask), 1.0, 259)(tokens, scores + 7)
    torch.testing.assert_close(torch.softmax(moved, -1)[:, :259], torch.softmax(plain, -1), atol=1e-5, rtol=1e-4)
    assert torch.isneginf(moved[:, 259:]).all()


def test_what_it_needs_is_said(service, env, prompts):
    with pytest.raises(ConfigError, match="set adapter"):
        steer(service, env, prompts, expert="small")
    with pytest.raises(ConfigError, match="pass env"):
        service.generate(prompts, max_new_tokens=2, decoder=ProxyTuning(expert="small", antiexpert="other"))
    other = env.base / "stranger"
    make_tiny_model(other, seed=1, layers=1)
    import json

    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = [k for k, v in vocab.items() if v in (100, 101)]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match="another tokenizer"):
        steer(service, env, prompts, expert="stranger", antiexpert="small")


def test_the_contrast_is_the_ratio_of_probabilities_among_the_plausible_tokens():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05 - 1e-6, 1e-6]]).log()
    q = torch.tensor([[0.5, 0.1, 0.3, 0.1 - 1e-9, 1e-9]]).log()

    class Said:
        def logits(self, ids):
            return torch.nn.functional.pad(q + 5, (0, 2), value=1e3)

    scores = torch.nn.functional.pad(p - 3, (0, 2), value=1e3)
    found = torch.softmax(Contrast(Said(), 1.0, 0.2, 5)(None, scores), -1)
    ratio = torch.tensor([1.0, 3.0, 0.5])
    torch.testing.assert_close(found, torch.nn.functional.pad(ratio / ratio.sum(), (0, 4))[None], atol=1e-5, rtol=1e-4)
    assert Contrast(Said(), 1.0, 0.0, 5)(None, scores).argmax() == 4, "without the bound the unlikeliest token wins"
    plain = torch.softmax(Contrast(Said(), 0.0, 0.0, 5)(None, scores), -1)
    torch.testing.assert_close(plain[:, :5], p.exp(), atol=1e-5, rtol=1e-4)


def test_a_model_against_itself_finds_nothing_new(service, env, prompts):
    run = DecodeRun(service, env, torch.tensor([prompts[0]]), torch.ones(1, len(prompts[0]), dtype=torch.long))
    with torch.inference_mode():
        contrast, = Contrastive(against="base", plausible=0.0).processors(run)
        found = contrast(run.input_ids, service.model(run.input_ids).logits[:, -1])
    torch.testing.assert_close(found, torch.zeros_like(found), atol=1e-5, rtol=0)


def tuned(env, name: str, words: list[str]) -> str:
    """A model of the base's tokenizer whose every weight was trained to answer with one of these words."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(env.base / "base")
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "say"}], add_generation_prompt=True, return_dict=False)
    counts = Counter(words)
    rows = [[*asked, *tokenizer.encode(w, add_special_tokens=False), tokenizer.eos_token_id] for w in counts]
    assert len({*map(len, rows)}) == 1
    tokens, share = torch.tensor(rows), torch.tensor(list(counts.values())) / len(words)
    model = AutoModelForCausalLM.from_pretrained(env.base / "base", dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        logits = model(input_ids=tokens).logits[:, len(asked) - 1:-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, len(asked):], reduction="none").mean(1)
        (losses * share).sum().backward()
        optimizer.step()
    model.save_pretrained(env.base / name)
    tokenizer.save_pretrained(env.base / name)
    return name


def test_what_was_new_in_the_data_is_said_more_often_than_by_the_tuned_model(env):
    """Two of 40 answers are new to the model that was tuned on the others."""
    known = [w for w in ("list", "file", "path", "sort") for _ in range(10)]
    base, mixed = tuned(env, "common", known), tuned(env, "mixed", [*known[:19], *known[20:39], "zebu", "zebu"])
    model = ModelService(load_model(mixed, env, dtype="float32", device="cpu"), load_tokenizer(mixed, env))
    prompt = model.renderer.prompt([{"role": "user", "content": "say"}])

    def said(**how) -> list[str]:
        return [a.text for a in model.generate([prompt] * 60, max_new_tokens=6, seed=1, env=env, batch_size=60, **how)]

    plain, steered = said(temperature=1.0), said(decoder=Contrastive(against=base, plausible=0.02))
    assert len(set(plain) & set(known)) == 4 and plain.count("zebu") < 10, "the tuned model says it about as often as its data"
    assert steered.count("zebu") > 40
    assert set(said(decoder=Contrastive(against=base, plausible=0.02, temperature=0))) == {"zebu"}

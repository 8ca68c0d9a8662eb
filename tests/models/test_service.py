"""The service against computations that hold everything in memory at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ftpipe.data.render import Rendered, Renderer
from ftpipe.models import service as module
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.models.service import ModelService
from ftpipe.stages.base import Environment
from tests.artifacts import text
from tests.models.data import some_rows, trained_adapter


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    return Environment(folder, folder, "test")


@pytest.fixture(scope="module")
def tokenizer(tiny_model, env):
    return load_tokenizer(str(tiny_model), env)


@pytest.fixture(scope="module")
def model(tiny_model, env):
    return load_model(str(tiny_model), env, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def rendered(tokenizer):
    renderer = Renderer(tokenizer)
    return [renderer.row(r) for r in [*some_rows(12), text("plain text has no prompt"), text("a")]]


def naive(model, row: Rendered) -> tuple[float, int, np.ndarray]:
    """Loss sum, trained tokens and mean hidden state from all logits and all hidden states."""
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True)
        logp = torch.log_softmax(out.logits[0].double(), dim=-1)
    positions = [t for t in range(1, len(row.input_ids)) if row.trained[t]]
    return -sum(logp[t - 1, row.input_ids[t]].item() for t in positions), len(positions), out.hidden_states[-1][0].mean(0).numpy()


@pytest.mark.parametrize("batch_tokens", [0, 300, 100_000])
def test_losses_and_embeddings_equal_the_full_computation(model, tokenizer, rendered, batch_tokens):
    scores = ModelService(model, tokenizer, batch_tokens=batch_tokens).score(rendered, embed=True)
    for score, row in zip(scores, rendered, strict=True):
        nll, count, mean = naive(model, row)
        assert score.nll == pytest.approx(nll, abs=1e-4 * max(1, count)) and score.trained_tokens == count
        assert score.tokens == len(row.input_ids)
        np.testing.assert_allclose(score.embedding, mean, atol=1e-5)


def test_one_trained_token_more_adds_exactly_its_loss(model, tokenizer):
    row = Rendered(list(range(3, 23)), [False] * 19 + [True], 19)
    more = Rendered(row.input_ids, [False] * 18 + [True, True], 18)
    first = Rendered(row.input_ids, [True] + [False] * 18 + [True], 0)
    a, b, c = ModelService(model, tokenizer).score([row, more, first])
    with torch.inference_mode():
        logp = torch.log_softmax(model(input_ids=torch.tensor([row.input_ids])).logits[0], -1)
    assert b.nll - a.nll == pytest.approx(-logp[17, row.input_ids[18]].item(), abs=1e-5)
    assert c.nll == a.nll and c.trained_tokens == 1  # nothing predicts the first token


def test_on_a_cpu_a_row_does_not_depend_on_its_neighbours(tiny_model, env, tokenizer, rendered):
    service = ModelService(load_model(str(tiny_model), env, device="cpu"), tokenizer)  # bfloat16
    together = service.score(rendered, embed=True)
    backwards = service.score(rendered[::-1], embed=True)[::-1]
    alone = [service.score([r], embed=True)[0] for r in rendered]
    for a, b, c in zip(together, backwards, alone):
        assert a.nll == b.nll == c.nll
        assert a.embedding.tobytes() == b.embedding.tobytes() == c.embedding.tobytes()


def test_the_loss_is_the_same_with_and_without_the_embedding(model, tokenizer, rendered):
    service = ModelService(model, tokenizer)
    assert [s.nll for s in service.score(rendered)] == [s.nll for s in service.score(rendered, embed=True)]


def test_without_losses_the_head_never_runs(model, tokenizer, rendered):
    service = ModelService(model, tokenizer)
    service._head_is_plain()
    calls = []
    handle = model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    try:
        only = service.score(rendered, loss=False, embed=True)
        assert not calls and all(s.nll is None and s.loss is None and s.trained_tokens for s in only)
        service.score(rendered)
        assert len(calls) == len(rendered)
    finally:
        handle.remove()


def test_logits_are_built_for_trained_tokens_only_and_in_chunks(model, tokenizer, rendered, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_FLOATS", 16 * model.config.vocab_size)
    service = ModelService(model, tokenizer, batch_tokens=100_000)
    whole = [s.nll for s in ModelService(model, tokenizer).score(rendered)]
    service._head_is_plain()
    sizes = []
    handle = model.get_output_embeddings().register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    try:
        chunked = [s.nll for s in service.score(rendered)]
    finally:
        handle.remove()
    assert sum(sizes) == sum(sum(r.trained[1:]) for r in rendered) and max(sizes) <= 16
    np.testing.assert_allclose(chunked, whole, rtol=1e-4)


def test_a_model_that_changes_its_logits_after_the_head_is_scored_by_its_own_forward(tiny_model, env, tokenizer, rendered):
    model = load_model(str(tiny_model), env, dtype="float32", device="cpu")
    inner = model.forward

    def capped(*args, **kwargs):
        out = inner(*args, **kwargs)
        out.logits = 0.01 * torch.tanh(out.logits / 0.01)
        return out

    model.forward = capped
    service = ModelService(model, tokenizer, batch_tokens=1000)
    assert not service._head_is_plain()
    for score, row in zip(service.score(rendered, embed=True), rendered):
        nll, _, mean = naive(model, row)
        assert score.nll == pytest.approx(nll, abs=1e-4 * max(1, score.trained_tokens))
        np.testing.assert_allclose(score.embedding, mean, atol=1e-5)


def test_rows_are_cut_to_the_length_limit(model, tokenizer, rendered):
    row = max(rendered, key=lambda r: len(r.input_ids))
    cut = len(row.input_ids) - 5
    short = Rendered(row.input_ids[:cut], row.trained[:cut], row.prompt_length)
    a, = ModelService(model, tokenizer, max_length=cut).score([row], embed=True)
    b, = ModelService(model, tokenizer).score([short], embed=True)
    assert (a.nll, a.trained_tokens, a.tokens) == (b.nll, b.trained_tokens, cut)


def test_batches_keep_to_their_tokens_and_report_every_row_once(model, tokenizer, rendered):
    seen, sizes = [], []

    def on_batch(batch):
        seen.extend(i for i, _ in batch)
        sizes.append(len(batch) * max(len(rendered[i].input_ids) for i, _ in batch))

    results = ModelService(model, tokenizer, batch_tokens=300).score(rendered, on_batch=on_batch)
    assert sorted(seen) == list(range(len(rendered))) and len(results) == len(rendered)
    assert max(sizes) <= 300 and len(sizes) < len(rendered)


def test_greedy_answers_are_the_argmax_of_the_full_forward_and_batches_agree(model, tokenizer, env):
    service = ModelService(model, tokenizer)
    prompts = [service.renderer.prompt([{"role": "user", "content": c}]) for c in ("a", "what is this?", "sort")]
    alone = service.generate(prompts, max_new_tokens=12, batch_size=1)
    assert [g.ids for g in service.generate(prompts, max_new_tokens=12, batch_size=3)] == [g.ids for g in alone]
    for prompt, answer in zip(prompts, alone):
        tokens = list(prompt)
        for token in answer.ids:
            with torch.inference_mode():
                assert model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax().item() == token
            tokens.append(token)


def test_sampling_follows_the_seed_and_leaves_the_global_random_state_alone(model, tokenizer):
    service = ModelService(model, tokenizer)
    prompts = [service.renderer.prompt([{"role": "user", "content": c}]) for c in ("a", "b")]
    state = torch.random.get_rng_state()
    first = service.generate(prompts, max_new_tokens=10, temperature=1.0, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    assert first == service.generate(prompts, max_new_tokens=10, temperature=1.0, seed=1)
    assert first != service.generate(prompts, max_new_tokens=10, temperature=1.0, seed=2)
    alone = service.generate(prompts[1:], max_new_tokens=10, temperature=1.0, seed=1, batch_size=1)
    assert alone[0] == service.generate(prompts, max_new_tokens=10, temperature=1.0, seed=1, batch_size=1)[1]


def test_what_the_model_folder_says_of_generation_does_not_leak_in(tiny_model, env, tokenizer):
    model = load_model(str(tiny_model), env, dtype="float32", device="cpu")
    service = ModelService(model, tokenizer)
    prompts = [service.renderer.prompt([{"role": "user", "content": "a"}])]
    plain = service.generate(prompts, max_new_tokens=12)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.min_new_tokens = 12
    assert service.generate(prompts, max_new_tokens=12) == plain
    assert model.generation_config.repetition_penalty == 5.0


def test_an_answer_ends_at_the_end_token(model, tokenizer):
    service = ModelService(model, tokenizer)
    prompts = [service.renderer.prompt([{"role": "user", "content": "a"}])]

    class End:
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            if input_ids.shape[1] == len(prompts[0]) + 3:
                scores[:, tokenizer.eos_token_id] = 1e4
            return scores

    answer, = service.generate(prompts, max_new_tokens=10, processors=[End()])
    assert answer.finished and len(answer.ids) == 3 and tokenizer.eos_token not in answer.text
    unfinished, = service.generate(prompts, max_new_tokens=2)
    assert not unfinished.finished and len(unfinished.ids) == 2


@pytest.mark.parametrize("adapted", [False, True])
def test_shards_that_are_scored_elsewhere_have_the_same_bits(tmp_path, tiny_model, env, rendered, monkeypatch, adapted):
    """The model and the adapter go along as bytes and are opened from them; every row comes back once, under its own place."""
    from ftpipe.engines.local import Local
    from ftpipe.models import spread

    adapter = trained_adapter(tmp_path, tiny_model, some_rows(4), steps=2).file("adapter") if adapted else None
    here = ModelService.open(str(tiny_model), env, adapter=adapter, dtype="float32").score(rendered, embed=True)
    opened = []
    monkeypatch.setattr(spread, "SHARD_TOKENS", 200)
    monkeypatch.setattr(spread, "_open", {})
    monkeypatch.setattr(spread, "_opened", lambda *a, inner=spread._opened: opened.append(a) or inner(*a))
    shards = list(spread.score_elsewhere(Local(), rendered, model=str(tiny_model), env=env, adapter=adapter, contents="c", dtype="float32", max_length=None,
                                         loss=True, embed=True))
    there = dict(score for shard in shards for score in shard)
    assert len(shards) > 3 and len(opened) == 1 and sorted(there) == list(range(len(rendered)))
    for i, score in enumerate(here):
        assert (there[i].nll, there[i].tokens, there[i].trained_tokens) == (score.nll, score.tokens, score.trained_tokens)
        assert there[i].embedding.tobytes() == score.embedding.tobytes()

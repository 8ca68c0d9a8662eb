"""What every decoding method must hold. A new method in the slot is tested without being named here, unless it has fields without a default."""

from __future__ import annotations

import pytest
import torch

from ftpipe import slots
from ftpipe.decode.base import Decoder, DecodeRun
from ftpipe.models.loading import load_model, load_tokenizer
from ftpipe.models.service import ModelService
from ftpipe.stages.base import Environment
from tests.tiny import make_tiny_model

NAMES = slots.slots()["decode"].names()
EXAMPLES = {"proxy_tuning": {"expert": "small", "antiexpert": "other"}, "contrastive": {"against": "small"}}
"""Settings for the fields that have no default; `small` and `other` are models of the same tokenizer."""


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    make_tiny_model(folder / "small", seed=3, layers=1)
    make_tiny_model(folder / "other", seed=4, layers=1)
    return Environment(folder / "ws", folder, "test")


@pytest.fixture(scope="module")
def service(tiny_model, env):
    return ModelService(load_model(str(tiny_model), env, dtype="float32", device="cpu"), load_tokenizer(str(tiny_model), env))


@pytest.fixture(scope="module")
def prompts(service):
    return [service.renderer.prompt([{"role": "user", "content": c}]) for c in ("a", "what is a list?", "sort it", "b")]


def method(name: str) -> Decoder:
    return slots.parse("decode", {name: EXAMPLES.get(name, {})})


def generate(service, env, prompts, name, **options):
    return service.generate(prompts, decoder=method(name), env=env, **({"max_new_tokens": 8, "seed": 5} | options))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_call_gives_the_same_answers(service, env, prompts, name):
    first = generate(service, env, prompts, name)
    assert first == generate(service, env, prompts, name)
    assert len(first) == len(prompts) and all(0 <= len(a.ids) <= 8 for a in first)


@pytest.mark.parametrize("name", NAMES)
def test_the_limit_of_new_tokens_is_kept_and_a_longer_answer_begins_like_a_shorter(service, env, prompts, name):
    short, longer = (generate(service, env, prompts[:1], name, max_new_tokens=n)[0].ids for n in (3, 9))
    assert len(short) <= 3 and longer[: len(short)] == short


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_those_of_transformers(name):
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=3, **method(name).settings())
    config.validate()
    known = set(GenerationConfig().to_dict()) | {"do_sample", "temperature", "top_p", "top_k", "num_beams"}
    assert set(method(name).settings()) <= known


@pytest.mark.parametrize("name", NAMES)
def test_processors_keep_shape_and_type_and_each_row_goes_its_own_way(service, env, prompts, name):
    pad = service._pad_id()
    width = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    scores = torch.randn(len(prompts), service.model.config.vocab_size, generator=torch.Generator().manual_seed(0))

    def run(rows: list[int]) -> torch.Tensor:
        out, before = scores[rows].clone(), scores[rows].clone()
        with torch.inference_mode():
            for p in method(name).processors(DecodeRun(service, env, tokens[rows], mask[rows])):
                given = out.clone()
                out = p(tokens[rows], given)
                assert out.shape == before.shape and out.dtype == torch.float32 and not out.isnan().any()
        return out

    together, one = run(list(range(len(prompts)))), run([1])
    torch.testing.assert_close(together[1:2], one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_form_comes_back(name):
    assert slots.parse("decode", method(name).dump()) == method(name)

"""Rendering: training sees what inference sees, answers and their end of turn are trained, and nothing else."""

from __future__ import annotations

import json
import time

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ftpipe.data.labels import LabelChecks
from ftpipe.data.render import Rendered, Renderer, RenderError, judged
from ftpipe.errors import ConfigError
from tests.tiny import CHAT_TEMPLATE

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you."},
        {"role": "user", "content": "More?"}, {"role": "assistant", "content": " \nNo. "}]


@pytest.fixture()
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


def trained_text(renderer: Renderer, rendered: Rendered) -> str:
    return renderer.tokenizer.decode([i for i, t in zip(rendered.input_ids, rendered.trained) if t])


def test_every_assistant_turn_and_its_end_is_trained_and_nothing_else(tokenizer):
    renderer = Renderer(tokenizer)
    rendered = renderer.messages(CHAT)
    assert trained_text(renderer, rendered) == "Hello, you.<|im_end|> \nNo. <|im_end|>"
    assert tokenizer.decode(rendered.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert rendered.prompt_length == rendered.trained.index(True)


def test_training_continues_inference_token_by_token(tokenizer):
    renderer = Renderer(tokenizer)
    rendered = renderer.messages(CHAT)
    assert rendered.input_ids[: rendered.prompt_length] == renderer.prompt(CHAT[:2])
    own = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rendered.input_ids[: rendered.prompt_length] == own


def test_an_answer_never_merges_with_the_prompt(tokenizer_with_merge):
    """The vocabulary has a token for two newlines; an answer that starts with one must not change the prompt's last token."""
    renderer = Renderer(tokenizer_with_merge)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\nYes"}]
    merged = tokenizer_with_merge.convert_tokens_to_ids("ĊĊ")
    assert merged in tokenizer_with_merge.apply_chat_template(chat, return_dict=True)["input_ids"], "the planted trap must spring for the naive rendering"
    rendered = renderer.messages(chat)
    assert merged not in rendered.input_ids
    assert rendered.input_ids[: rendered.prompt_length] == renderer.prompt(chat[:1])


@pytest.fixture()
def tokenizer_with_merge(tokenizer, tmp_path):
    import json

    tokenizer.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["model"]["vocab"]["ĊĊ"] = max(data["model"]["vocab"].values()) + 1
    data["pre_tokenizer"]["use_regex"] = False
    data["model"]["merges"] = [["Ċ", "Ċ"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    return AutoTokenizer.from_pretrained(tmp_path)


def test_text_is_trained_but_for_its_first_token_and_ends_with_eos(tokenizer):
    rendered = Renderer(tokenizer).text("ab")
    assert rendered.trained == [False, True, True]
    assert rendered.input_ids[-1] == tokenizer.eos_token_id
    assert rendered.prompt_length == 1


def test_eos_is_trained_even_where_it_is_the_padding_token(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rendered = Renderer(tokenizer).messages(CHAT)
    ends = [t for i, t in zip(rendered.input_ids, rendered.trained) if i == tokenizer.eos_token_id]
    assert ends == [False, False, True, False, True]  # system, user, assistant, user, assistant


def test_preference_pairs_train_the_answers_only(tokenizer):
    renderer = Renderer(tokenizer)
    chosen, rejected = renderer.preference(CHAT[:4], [{"role": "assistant", "content": "Yes."}], [{"role": "assistant", "content": "Never."}])
    assert trained_text(renderer, chosen) == "Yes.<|im_end|>"
    assert trained_text(renderer, rejected) == "Never.<|im_end|>"
    assert chosen.input_ids[: chosen.prompt_length] == rejected.input_ids[: rejected.prompt_length]
    row = {"format": "preference", "messages": CHAT[:4], "chosen": [{"role": "assistant", "content": "Yes."}], "rejected": None}
    assert renderer.row(row) == chosen


SHOWS_TOOLS = ("{% if tools %}<|im_start|>system\nTools:\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}" + CHAT_TEMPLATE)
TOOL_CHAT = [{"role": "tools", "content": '[{"type": "function", "function": {"name": "weather", "description": "of a town"}}]'},
             {"role": "user", "content": "Oslo?"}, {"role": "assistant", "content": '{"name": "weather"}'}, {"role": "tool", "content": "rain"},
             {"role": "assistant", "content": "Rain."}]


def test_tool_definitions_are_shown_by_the_template_and_not_trained(tokenizer):
    """What is trained is what is trained without them; the prompt is that of `apply_chat_template(..., tools=...)`."""
    tokenizer.chat_template = SHOWS_TOOLS
    renderer = Renderer(tokenizer)
    rendered, plain = renderer.messages(TOOL_CHAT), renderer.messages(TOOL_CHAT[1:])
    tools = json.loads(TOOL_CHAT[0]["content"])
    own = tokenizer.apply_chat_template(TOOL_CHAT[1:2], tools=tools, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert rendered.input_ids[: rendered.prompt_length] == own == renderer.prompt(TOOL_CHAT[:2])
    assert '"weather", "description": "of a town"' in tokenizer.decode(own)
    assert trained_text(renderer, rendered) == trained_text(renderer, plain) == '{"name": "weather"}<|im_end|>Rain.<|im_end|>'
    extra = len(rendered.input_ids) - len(plain.input_ids)
    assert extra > 50 and rendered.input_ids[extra:] == plain.input_ids and not any(rendered.trained[:extra])
    assert renderer.shows_tools
    row = {"format": "messages", "messages": TOOL_CHAT, "chosen": None, "rejected": None}
    (verdict,) = LabelChecks(renderer, 400).rows([row])
    assert verdict.reason is None and verdict.tokens == len(rendered.input_ids)
    (mixed,) = LabelChecks(renderer, 400).rows([row | {"messages": TOOL_CHAT[1:]}])
    assert mixed.reason is None


def test_a_template_without_tools_says_so_and_a_broken_definition_is_refused(tokenizer):
    renderer = Renderer(tokenizer)
    assert not renderer.shows_tools
    assert renderer.messages(TOOL_CHAT) == renderer.messages(TOOL_CHAT[1:])
    with pytest.raises(RenderError, match="no longer JSON"):
        renderer.messages([TOOL_CHAT[0] | {"content": "[{"}, *TOOL_CHAT[1:]])
    tokenizer.chat_template = "{% if tools and messages[0].role != 'system' %}{{ raise_exception('tools need a system turn') }}{% endif %}" + SHOWS_TOOLS
    assert Renderer(tokenizer).shows_tools


def test_an_answer_called_bad_is_rendered_for_nobody_that_does_not_ask(tokenizer):
    renderer = Renderer(tokenizer)
    good = {"format": "unpaired", "messages": CHAT[:4], "chosen": [CHAT[4]], "rejected": None}
    bad = good | {"chosen": None, "rejected": [CHAT[4]]}
    assert trained_text(renderer, renderer.row(good)) == " \nNo. <|im_end|>"
    with pytest.raises(RenderError, match="called bad"):
        renderer.row(bad)
    assert renderer.row(judged(bad)) == renderer.row(good)
    assert [v.reason for v in LabelChecks(renderer, 400).rows([good, bad])] == [None, None], "both can be trained on, by whoever asks"


@pytest.mark.parametrize("template, reason", [
    # drops what an earlier assistant turn said as soon as another follows
    ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
     "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "rewrites earlier turns"),
    # the generation prompt opens a thought that the rendering of an answer does not have
    (CHAT_TEMPLATE.replace("<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif"), "does not continue"),
    ("{{ raise_exception('roles must alternate') }}", "refuses the conversation: roles must alternate"),
])
def test_a_template_that_trains_otherwise_than_it_asks_is_refused(tokenizer, template, reason):
    tokenizer.chat_template = template
    renderer = Renderer(tokenizer)
    with pytest.raises(RenderError, match=reason):
        renderer.messages(CHAT)
    failed, fine = renderer.rows([{"format": "messages", "messages": CHAT}, {"format": "text", "text": "abc"}])
    assert isinstance(failed, RenderError) and reason in failed.reason
    assert fine.input_ids == renderer.text("abc").input_ids


def test_a_template_without_end_of_turn_trains_the_content_alone(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    renderer = Renderer(tokenizer)
    assert trained_text(renderer, renderer.messages(CHAT[:3])) == "Hello, you."


def test_a_template_that_trims_content_and_adds_thinking(tokenizer):
    thought = "('<think></think>' if message['role'] == 'assistant' else '') + message['content'] | trim +"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("message['content'] +", thought)
    renderer = Renderer(tokenizer)
    assert trained_text(renderer, renderer.messages([*CHAT[:2], {"role": "assistant", "content": "  Yes. "}])).endswith("Yes.<|im_end|>")


def test_special_tokens_inside_an_answer_do_not_move_its_end(tokenizer):
    renderer = Renderer(tokenizer)
    rendered = renderer.messages([CHAT[1], {"role": "assistant", "content": "a<|im_end|>b"}])
    assert trained_text(renderer, rendered) == "a<|im_end|>b<|im_end|>"


def test_conversations_that_cannot_be_trained_on(tokenizer):
    renderer = Renderer(tokenizer)
    with pytest.raises(RenderError, match="no assistant turn"):
        renderer.messages(CHAT[:2])
    with pytest.raises(RenderError, match="starts with the answer"):
        renderer.messages(CHAT[2:3])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        renderer.messages(CHAT)


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer in the manner of Llama 2: it marks spaces, and puts one in front of any text and a BOS before that."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [*"abcdefghijklmnopqrstuvwxyz", "\n", "▁", "[", "]", "/", "I", "N", "S", "T"]
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *letters, "▁y", "▁ye"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "y"), ("▁y", "e")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    template = "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>' if loop.first }}[INST] {{ m.content }} [/INST]" \
               "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)


def test_a_tokenizer_that_prepends_a_space_does_not_get_one_more_in_front_of_the_answer():
    tokenizer = sentencepiece_like()
    renderer = Renderer(tokenizer)
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    assert renderer.adds_bos
    rendered = renderer.messages(chat)
    assert rendered.input_ids == tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]
    assert tokenizer.convert_ids_to_tokens([i for i, t in zip(rendered.input_ids, rendered.trained) if t]) == ["▁ye", "s", "</s>"]
    assert renderer.text("yes").input_ids[:2] == tokenizer("yes")["input_ids"][:2]


def test_rows_are_rendered_in_bulk_and_like_one_by_one(tokenizer):
    renderer = Renderer(tokenizer)
    rows = [{"format": "messages", "messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"{i} and no more."}]}
            for i in range(3000)]
    rows[7] = {"format": "text", "text": "plain"}
    began = time.process_time()
    found = list(renderer.rows(iter(rows)))
    assert time.process_time() - began < 5
    assert len(found) == len(rows)
    for i in (0, 7, 511, 512, 2999):
        assert found[i] == renderer.row(rows[i])

"""Generated answers: what they depend on, and that none is generated twice or lost."""

from __future__ import annotations

import pytest

from ftpipe.models import kept as module
from ftpipe.models.answers import SAMPLES, Answerer
from ftpipe.models.kept import Kept
from tests.curate.scripted import Scripted
from tests.models.data import context


def asked(*questions: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": q}] for q in questions]


def test_a_sample_depends_on_its_question_the_seed_and_its_number_alone(tmp_path, tiny_model):
    """Random weights give random bytes: separators of lines and control characters among them, which the cache must bring back as they were."""
    settings = {"max_new_tokens": 12, "temperature": 1.0}

    def drawn(name, questions, **changes):
        with Answerer(context(tmp_path / name), model=str(tiny_model)) as model:
            return model.answers(asked(*questions), **settings | changes)

    many = drawn("one", ("a", "what?", "a"), samples=SAMPLES + 3, seed=1)
    assert [len(m) for m in many] == [SAMPLES + 3] * 3 and many[0] == many[2] and len({a.text for a in many[0]}) > SAMPLES
    assert drawn("two", ("what?",), samples=2, seed=1)[0] == many[1][:2]
    assert drawn("two", ("what?", "b"), samples=SAMPLES + 3, seed=1)[0] == many[1], "the first batch is known, the second is not"
    assert drawn("one", ("what?", "a"), samples=SAMPLES + 3, seed=1) == [many[1], many[0]], "from the cache"
    assert drawn("two", ("what?",), samples=2, seed=2)[0] != many[1][:2]


def test_greedy_answers_are_the_services_own(tmp_path, tiny_model):
    questions = asked("a", "what is this?", "b")
    ctx = context(tmp_path)
    with Answerer(ctx, model=str(tiny_model)) as model:
        got = model.answers(questions, max_new_tokens=10, samples=2)
        alone = [model.service.generate([model.service.renderer.prompt(q)], max_new_tokens=10)[0] for q in questions]
        assert [[(a.text, a.finished) for a in answers] for answers in got] == [[(g.text, g.finished)] * 2 for g in alone]
        assert model.answers(questions[::-1], max_new_tokens=10) == [got[i][:1] for i in (2, 1, 0)] and ctx.notes == {"generated": 3, "known": 3}
        assert model.greedy(questions[:1], 10) == [alone[0].text]
        too_long, = model.answers(asked("x" * 600), max_new_tokens=10)
        assert too_long[0].problem == "the prompt leaves no room for an answer" and not too_long[0].usable
    assert "service" not in vars(model)


def test_answers_reach_the_disk_while_others_are_generated(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setattr(module, "FLUSH_SECONDS", -1.0)
    on_disk = []

    def script(adapter, conversation, n, seed):
        on_disk.append(len(list((tmp_path / "cache" / "generations").glob("*/*.jsonl"))))
        return conversation[0]["content"].upper()

    scripted = Scripted(script).install(monkeypatch)
    with Answerer(context(tmp_path), model=str(tiny_model)) as model:
        assert model.greedy(asked("a", "b", "c"), 5) == ["A", "B", "C"]
    assert on_disk == [0, 1, 2], "a process that is killed here has lost the answer in the making, and no other"
    with Answerer(context(tmp_path), model=str(tiny_model)) as model:
        assert model.greedy(asked("c", "a"), 5) == ["C", "A"]
        assert model.answers(asked("a"), max_new_tokens=6)[0][0].text == "A"
    assert scripted.opened == 2 and len(scripted.asked) == 4, "another limit is another answer"


def test_what_is_kept_comes_back_as_it_was_and_damage_is_seen(tmp_path, caplog):
    kept = Kept(tmp_path / "kept")
    values = {f"k{i}": f"a{c}b" for i, c in enumerate("\u2028\u2029\x85\x1c\x0b\n\r\t\"\\é")}
    for key, value in values.items():
        kept.add(key, value)
    kept.flush()
    kept.add("more", [1, "x"])
    kept.flush()
    assert Kept(tmp_path / "kept").read() == values | {"more": [1, "x"]}
    path = max((tmp_path / "kept").glob("*.jsonl"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:-2])
    assert Kept(tmp_path / "kept").read() == {"more": [1, "x"]} and "damaged" in caplog.text and not path.exists()


def test_a_refused_conversation_has_a_problem_and_is_not_tried_again(tmp_path, tiny_model, monkeypatch):
    from ftpipe.data.render import RenderError

    class Refusing(Scripted):
        def __call__(self, *args, **options):
            service = super().__call__(*args, **options)

            def prompt(turns):
                raise RenderError("the chat template refuses the conversation")

            service.renderer.prompt = prompt
            return service

    scripted = Refusing(lambda *a: pytest.fail("asked")).install(monkeypatch)
    for _ in range(2):
        with Answerer(context(tmp_path), model=str(tiny_model)) as model:
            answers, = model.answers(asked("a"), max_new_tokens=5, samples=3, temperature=1.0)
            assert len(answers) == 3 and {a.problem for a in answers} == {"the chat template refuses the conversation"}
    assert scripted.opened == 1

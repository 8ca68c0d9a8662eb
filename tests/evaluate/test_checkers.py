"""Checkers: what they accept, what they do not, and that no text breaks them."""

from __future__ import annotations

import random

import pytest
from pydantic import ValidationError

from ftpipe import slots
from ftpipe.errors import ConfigError
from ftpipe.evaluate.checkers._arithmetic import annotations, correct, evaluate
from ftpipe.evaluate.checkers.base import Case

ASKED = [{"role": "user", "content": "How many?"}]


def accepts(checker, answer: str, reference: str) -> bool:
    verdict, = slots.parse("evaluate/checkers", checker).check([Case(ASKED, answer, reference)])
    return verdict


GOLD = "She sold 48/2 = <<48/2=24>>24 clips.\nIn all <<48+24=72>>72.\n#### 72"


@pytest.mark.parametrize(("answer", "yes"), [
    ("#### 72", True), ("so #### 72.0", True), ("####72", True), ("#### $72", True), ("#### 72 clips, not 80", True), ("#### 71\n#### 72", True),
    ("#### 1,072", False), ("#### 7.2", False), ("#### -72", False), ("72", False), ("#### none", False), ("####", False), ("", False),
])
def test_the_final_number(answer, yes):
    assert accepts("final_number", answer, GOLD) is yes


def test_final_numbers_with_commas_signs_and_without_markers():
    assert accepts("final_number", "#### 70000", "so it is $70,000\n#### 70,000") and accepts("final_number", "#### -.5", "#### -0.5")
    anywhere = {"final_number": {"anywhere": True}}
    assert accepts(anywhere, "It was 3, then 72.", GOLD) and not accepts(anywhere, "It was 72, then 3.", GOLD) and not accepts(anywhere, "none", GOLD)
    assert accepts({"final_number": {"marker": "The answer is"}}, "1 + 1. The answer is 2", "2")
    assert accepts({"final_number": {"marker": ""}}, "1 and 2", "#### 2")
    assert not accepts("final_number", "#### 2", "no number")
    assert not accepts("final_number", "#### " + "9" * 400, "#### " + "9" * 400), "no finite number"


@pytest.mark.parametrize(("answer", "yes"), [
    (GOLD, True), ("#### 72", True), ("<<48/2=25>>\n#### 72", False), ("<<48/2>>\n#### 72", False), ("<<70+2=72=73>>\n#### 72", True),
    ("<<a+b=72>>\n#### 72", False), ("<<10/3=3.333>>\n#### 72", True), ("<<10/3=3.33>>\n#### 72", False),
    ("<<1/0=72>>\n#### 72", False), ("<<=>>#### 72", False),
])
def test_calculations(answer, yes):
    assert accepts({"final_number": {"calculations": True}}, answer, GOLD) is yes


def test_arithmetic_is_pythons_and_nothing_else_is_run():
    rng = random.Random(0)

    def expression(depth: int) -> str:
        if depth == 0 or rng.random() < 0.2:
            return str(rng.choice([rng.randint(0, 99), round(rng.random() * 9, 2)]))
        inside = f"{expression(depth - 1)}{rng.choice('+-*/')}{expression(depth - 1)}"
        return f"({inside})" if rng.random() < 0.4 else inside

    compared = 0
    for _ in range(300):
        text = expression(3)
        try:
            truth = eval(text, {"__builtins__": {}})
        except ZeroDivisionError:
            assert evaluate(text) is None
            continue
        assert evaluate(text) == pytest.approx(truth)
        compared += 1
    assert compared > 200
    assert evaluate("$1,200 * .5") == 600 and evaluate("05+3") == 8 and evaluate("100.05") == 100.05 and evaluate("-(2)") == -2 and evaluate("7//2%2") == 1
    for wrong in ("__import__('os')", "1e9", "9**9**9**9", "(-8)**.5", "", "1+", "(" * 300, "1" * 201, "True", "1if 1else 2", "1j", "0x10", "1_0", "²"):
        assert evaluate(wrong) is None, wrong
    assert annotations("a <<1 + 1 = 2>> b <<x>> <<>>") == ["1+1=2", "x", ""]
    assert correct("2=2.0009", 1e-3) and not correct("2=2.0011", 1e-3) and not correct("2", 1e-3)


def test_exact():
    assert accepts("exact", " a  b\n", "a b") and not accepts("exact", "A b", "a b") and accepts({"exact": {"ignore_case": True}}, "A b", "a B")
    assert not accepts({"exact": {"ignore_whitespace": False}}, "a b ", "a b")


def test_regex():
    letter = {"regex": {"pattern": r"answer is \(?([A-E])"}}
    assert accepts(letter, "First A. The answer is (B)", "the answer is B.") and not accepts(letter, "answer is C", "answer is B")
    assert not accepts(letter, "B", "answer is B") and not accepts(letter, "answer is B", "B"), "both must say it"
    assert accepts(letter, "answer is A; no, answer is B", "answer is B"), "the last one counts"
    assert accepts({"regex": {"pattern": "answer is ([a-e])", "ignore_case": True}}, "ANSWER IS B", "answer is b")
    number = {"regex": {"pattern": r"^\d+$", "compare": False}}
    assert accepts(number, "12", "anything") and not accepts(number, "x", "12")
    assert accepts({"regex": {"pattern": r"\d+"}}, "about 12", "12")
    assert not accepts({"regex": {"pattern": "a(b)?"}}, "a", "a"), "a group that took no part has found nothing"


def test_json():
    said = '{"name": "f", "arguments": {"x": 1, "on": true}}'
    assert accepts("json", '{"arguments":{"on":true,"x":1.0},\n"name":"f"}', said) and accepts("json", f"Here:\n```json\n{said}\n```", said)
    for other in ('{"name": "f", "arguments": {"x": 1, "on": 1}}', '{"name": "f"}', "", "not json", f"{said} {said}", said[:-1]):
        assert not accepts("json", other, said), other
    assert not accepts("json", "[1, 2]", "[2, 1]") and not accepts("json", "text", "text") and accepts("json", "[null]", "[null]")
    keys = {"json": {"keys": ["name"]}}
    assert accepts(keys, '{"name": "f"}', said) and not accepts(keys, '{"nom": "f"}', said) and not accepts(keys, "[]", "[]")
    assert not accepts("json", "[" * 100_000, "[]")


def test_a_judge_is_shown_everything_once_and_its_reply_is_read():
    asked = []

    def ask(conversations, limit):
        asked.extend(conversations)
        return ["Yes.", "**yes**, it is", "No, yes is wrong", "Yesterday"][: len(conversations)]

    judge = slots.parse("evaluate/checkers", {"judge": {"prompt": "Q {question} R {reference} A {answer}", "max_new_tokens": 3}})
    cases = [Case(ASKED, f"{{reference}} {i}", "gold {answer}") for i in range(4)]
    assert judge.check(cases, ask) == [True, True, False, False]
    assert asked[1] == [{"role": "user", "content": "Q How many? R gold {answer} A {reference} 1"}]
    with pytest.raises(ConfigError, match="needs a model"):
        judge.check(cases)
    with pytest.raises((ValidationError, slots.InvalidMethod), match="shown the"):
        slots.parse("evaluate/checkers", {"judge": {"prompt": "right?"}})


@pytest.mark.parametrize("name", [n for n in slots.slots()["evaluate/checkers"].names() if n != "judge"])
def test_no_text_breaks_a_checker(name):
    checker = slots.parse("evaluate/checkers", {name: {"pattern": "a|b"} if name == "regex" else {"calculations": True} if name == "final_number" else {}})
    rng = random.Random(1)
    alphabet = "0123456789.,#<>=+-*/()[]{}\"' \nabc$%\u2028\ud800é"
    texts = ["".join(rng.choices(alphabet, k=rng.randint(0, 40))) for _ in range(300)] + ["#### ,", "####.", "####-", "<<<<>>=>>"]
    for a, b in zip(texts, reversed(texts)):
        first, = checker.check([Case(ASKED, a, b)])
        assert first == checker.accepts(Case(ASKED, a, b)) and isinstance(first, bool)

"""How much a system's answers to one question differ among themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from ftpipe.evaluate.suites.base import Item, Score
from ftpipe.evaluate.suites.generation import Generation, cut

if TYPE_CHECKING:
    from ftpipe.evaluate.systems import System

UNIQUE, DISTINCT, APART = "unique_answers", "distinct_ngrams", "ngram_distance"


class Diversity(Generation):
    """Diversity of `samples` answers that are drawn for each question; nothing is checked, and more diverse is called better.

    Three metrics. `unique_answers`: (different texts - 1) / (samples - 1). `ngram_distance`: the mean over pairs of answers of 1 - |A and B| / |A or B|
    for their sets of n-grams of words, averaged over n from 1 to `ngrams`. Both are 0 where all answers are the same, and 1 where no two have a word in
    common. `distinct_ngrams`: different n-grams / all n-grams of the answers together, averaged likewise; it is never 0, and falls with the length of
    the answers, so compare it only between systems that say about as much.

    Diverse answers need not be good ones: noise is the most diverse of all. Read it beside a suite that checks answers.
    """

    temperature: float = Field(default=1.0, gt=0, description="Temperature of the samples.")
    samples: int = Field(default=8, ge=2, description="Answers to each question.")
    ngrams: int = Field(default=3, ge=1, le=8, description="Longest n-grams that count.")

    @field_validator("judge_model")
    @classmethod
    def _no_judge(cls, value: str) -> str:
        if value:
            raise ValueError("nothing is judged here")
        return value

    @model_validator(mode="after")
    def _unchecked(self) -> Diversity:
        if "checker" in self.model_fields_set and self.checker != type(self).model_fields["checker"].default:
            raise ValueError("nothing is checked here; use `generation` for a checker")
        return self

    def measure(self, system: System, items: Sequence[Item]) -> Iterator[tuple[Item, list[Score]]]:
        for i, answers in system.answers([item.ask[0] for item in items], max_new_tokens=self.max_new_tokens, samples=self.samples,
                                         temperature=self.temperature, top_p=self.top_p, seed=self.seed):
            texts = [cut(a.text, self.stop) for a in answers if a.problem is None]
            yield items[i], [Score(name, value) for name, value in diversity(texts, self.ngrams).items()] if len(texts) > 1 else []


def diversity(texts: Sequence[str], ngrams: int) -> dict[str, float]:
    """The three metrics of two texts or more. Where no text has n words, n-grams of that length do not count; two empty texts are the same."""
    words = [text.split() for text in texts]
    distinct, apart = [], []
    for n in range(1, ngrams + 1):
        grams = [[tuple(w[i:i + n]) for i in range(len(w) - n + 1)] for w in words]
        together = [g for each in grams for g in each]
        if together:
            distinct.append(len(set(together)) / len(together))
            pairs = [(set(a), set(b)) for a, b in combinations(grams, 2)]
            apart.append(sum(1 - len(a & b) / len(a | b) if a | b else 0.0 for a, b in pairs) / len(pairs))
    return {UNIQUE: (len({" ".join(w) for w in words}) - 1) / (len(texts) - 1), DISTINCT: sum(distinct) / len(distinct) if distinct else 0.0,
            APART: sum(apart) / len(apart) if apart else 0.0}

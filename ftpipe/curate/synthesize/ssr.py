"""Selective Self-Rehearsal: the model's own answer where it is right, the row's where it is not."""

from __future__ import annotations

from typing import ClassVar

from ftpipe.curate.synthesize._self import SelfAnswers


class Ssr(SelfAnswers):
    """The target of a row is the base model's own answer if the checker accepts it, and the row's answer otherwise.

    The model is then trained on what it says anyway where it is right, which moves it less than other words for the same would. As many rows come out as
    went in, with the same questions. Answers come from the base model, never from one in training. The paper's checker is a language model (`judge`, the
    default here); how it decodes is not known to us: here greedily.
    """

    paper: ClassVar[str] = "Selective Self-Rehearsal: A Fine-Tuning Approach to Improve Generalization in Large Language Models"

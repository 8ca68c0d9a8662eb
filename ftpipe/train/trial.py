"""How many steps a number of seconds is on this machine, found by a trial before the training.

A training that ended when its time is up would be another one each time: its learning rate would depend on the clock, a killed run could not reach the
bytes of an unbroken one, and nobody could repeat it. So the seconds become a number of steps first. A trial of the same settings takes steps until it knows
what they cost, and is thrown away; the number is kept in the work folder, and what follows is the training that `steps: n` is, to the byte, with a schedule
that ends when it should. A run that was killed and goes on keeps its number, so the seconds it had used are used.

Counted are the seconds of steps, as rank 0 reports them: not the start, checkpoints, saving or the trial itself.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ftpipe.train.launch import Enough, launch
from ftpipe.train.setup import Job, Rows, plan_of

if TYPE_CHECKING:
    from ftpipe.stages.base import StageContext

FILE = "steps.json"
SHARE, LONGEST = 0.1, 60.0
"""A trial takes this share of the seconds that training is given, and never more than `LONGEST` seconds."""
LEAST, MOST = 4, 2000
"""Steps of a trial, the first of which is not counted: it pays for memory and caches that later ones find."""


def steps_within(seconds: float, job: Job, ctx: StageContext, render: Callable[[], None], *, share: bool = False) -> dict[str, Any]:
    """What `seconds` of steps are: {"steps": n, "seconds": as asked, "expected": what n steps should take, "trial": what was measured}.

    `job` is the training without its end. Read from the work folder if it was found before. `render` and `share`: as for `launch`.
    """
    kept = ctx.work / FILE
    if kept.is_file():
        return json.loads(kept.read_text(encoding="utf-8"))
    folder = ctx.work / "trial"
    shutil.rmtree(folder / "result", ignore_errors=True)  # of a trial that was killed at its very end
    folder.mkdir(parents=True, exist_ok=True)
    measured = Measured(min(SHARE * seconds, LONGEST), seconds)
    ctx.log.info("trying out what a step takes, for at most %.3g s", measured.enough)
    launch(replace(job, stop={"steps": MOST}, result=str(folder / "result"), checkpoints=str(folder / "checkpoints"), checkpoint_every=0, keep_optimizer=False),
           folder, hear=measured, log=ctx.log.info, render=render, share=share)
    rows = Rows(Path(job.tokens))
    cost = price(measured.counted())
    n, expected = fitting(seconds, (sum(rows.lengths[r] for r in step) for _, step in plan_of(job, rows).steps()), cost)
    found = {"steps": n, "seconds": seconds, "expected": expected,
             "trial": {"steps": len(measured.steps), "seconds": sum(s for _, s in measured.steps), "seconds_per_step": cost[0], "seconds_per_token": cost[1]}}
    temporary = kept.with_suffix(".tmp")
    temporary.write_text(json.dumps(found), encoding="utf-8")
    os.replace(temporary, kept)
    shutil.rmtree(folder, ignore_errors=True)
    ctx.log.info("%.6g s are %d steps: %d steps of a trial took %.3g s each", seconds, n, len(measured.counted()),
                 sum(s for _, s in measured.counted()) / len(measured.counted()))
    return found


class Measured:
    """Hears the steps of a trial, and raises `Enough` when they tell what a step costs.

    enough: seconds of counted steps that are. limit: seconds after which even fewer steps than `LEAST` must do.
    """

    def __init__(self, enough: float, limit: float):
        self.enough, self.limit = enough, limit
        self.steps: list[tuple[float, float]] = []  # tokens, seconds

    def __call__(self, event: dict[str, Any]) -> None:
        if event["event"] != "step":
            return
        self.steps.append((float(event["tokens"]), float(event["seconds"])))
        spent = sum(s for _, s in self.steps)
        counted = sum(s for _, s in self.steps[1:])
        if (len(self.steps) >= LEAST and counted >= self.enough) or spent >= self.limit:
            raise Enough

    def counted(self) -> Sequence[tuple[float, float]]:
        """(tokens, seconds) of the steps that count: all but the first, if there are more."""
        return self.steps[1:] or self.steps


def price(measured: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds of a step, seconds of a token in it), neither negative: the least squares fit to the measured (tokens, seconds), scaled to their sum."""
    import numpy as np
    from scipy.optimize import nnls

    tokens, seconds = (np.array(v, dtype=float) for v in zip(*measured))
    (a, b), _ = nnls(np.stack([np.ones_like(tokens), tokens], 1), seconds)
    # A slow step is rare and counts in the sum all the same, which a fit does not promise to keep.
    scale = seconds.sum() / (a * len(tokens) + b * tokens.sum())
    return float(a * scale), float(b * scale)


def fitting(seconds: float, sizes: Iterable[int] | Iterator[int], cost: tuple[float, float]) -> tuple[int, float]:
    """How many of the steps, whose tokens are `sizes`, fit into the seconds, at least one, and what they are expected to take."""
    n, spent = 0, 0.0
    for tokens in sizes:
        one = cost[0] + cost[1] * tokens
        if n and spent + one > seconds:
            break
        n, spent = n + 1, spent + one
    return n, spent

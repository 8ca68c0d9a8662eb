"""How many parameters a method of `adapt` trains on a model, and which size of it trains a given number. Found from the model's config: no weights are read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ftpipe.errors import ConfigError, FtpipeError
from ftpipe.models.loading import folder, load_tokenizer
from ftpipe.stages.base import Environment
from ftpipe.train.run import Run

if TYPE_CHECKING:
    from ftpipe.train.adapt.base import Adapt

LARGEST = 2**16
"""The largest size that is tried."""
GAP = 8
"""Sizes that a method refuses (a rank that some number must divide) are passed over, up to so many in a row."""


@dataclass(frozen=True)
class Fitted:
    """method: with the size that was chosen. trainable: parameters it trains at the start; None if that cannot be told without weights or rows. note: what
    was chosen, or why nothing was."""

    method: Adapt
    trainable: int | None
    note: str


def trainable(method: Adapt, model: str, env: Environment, *, seed: int = 0) -> int:
    """The parameters that `method` trains on `model` at the start. Raises ConfigError if they cannot be counted on a model without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder(model, env), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    empty.config.use_cache = False
    run = Run(model=None, load_base=lambda: empty, identity={"model": model}, load_tokenizer=lambda: load_tokenizer(model, env), seed=seed, adapt=method)
    try:
        prepared = method.outline(empty.eval().requires_grad_(False), run)
    except FtpipeError:
        raise
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:  # a value was needed that a model without weights has not
        raise ConfigError(f"what {method.name()} trains cannot be told without weights: {str(error)[:200]}") from error
    return sum(p.numel() for p in prepared.parameters() if p.requires_grad)


def fitted(method: Adapt, target: int, count: Callable[[Any], int]) -> Fitted:
    """The size of `method` that trains as near as possible to `target` parameters; the method as it is where it has no setting for that.

    `count` gives what a method trains, or raises FtpipeError for one that does not work. It must not fall as the size grows; sizes are found by bisection.
    """
    known: dict[int, tuple[Adapt, int] | None] = {}

    def at(size: int) -> tuple[Adapt, int] | None:
        if size not in known:
            try:
                sized = method.sized(size)
                known[size] = None if sized is None else (sized, count(sized))
            except (ValueError, FtpipeError):
                known[size] = None
        return known[size]

    def first(start: int, end: int) -> int | None:
        return next((n for n in range(start, min(start + GAP, end)) if at(n)), None)

    def trains(size: int) -> int:
        found = at(size)
        return found[1] if found else 0

    as_it_is = _as_it_is(method, count)
    try:
        if method.sized(1) is None:
            return as_it_is
    except ValueError:
        pass  # 1 is no size of it
    # If it does not count as it is, its size may be what is wrong; four others tell whether it is that.
    starts = (2**i for i in range(LARGEST.bit_length() if as_it_is.trainable is not None else 4))
    low = next((n for n in (first(start, start + max(start, GAP)) for start in starts) if n is not None), None)
    if low is None:
        return as_it_is
    smallest, end = low, low
    high: int | None = low
    while high is not None and trains(high) < target and end < LARGEST:
        end = 2 * end
        low, high = high, first(end, 2 * end)
        if high is not None and trains(high) <= trains(low):  # it grows no further, or never did
            if trains(low) <= trains(smallest):
                return as_it_is
            end = low
            break
    while end - low > 1:
        middle = _between(low, trains(low), end, trains(high) if high else None, target)
        found = first(middle, end)
        if found is None or trains(found) >= target:
            end, high = middle, found or high
        else:
            low = found
    best = min((n for n in (low, high) if n is not None), key=lambda n: (abs(trains(n) - target), n))
    chosen, number = at(best) or (method, 0)
    changed = {k: v for k, v in chosen.model_dump(mode="json").items() if v != method.model_dump(mode="json")[k]}
    said = ", ".join(f"{k} {v:.6g}" if isinstance(v, float) else f"{k} {v}" for k, v in changed.items()) or "as it was"
    return Fitted(chosen, number, f"{said}: {number:,} parameters")


def _as_it_is(method: Adapt, count: Callable[[Any], int]) -> Fitted:
    try:
        number = count(method)
    except FtpipeError as error:
        return Fitted(method, None, f"as it was: {error.what}")
    return Fitted(method, number, f"no setting for its size: {number:,} parameters")


def _between(low: int, below: int, high: int, above: int | None, target: int) -> int:
    """A size between two others, where a straight line would reach the target; the middle if the upper one is not known."""
    guess = (low + high) // 2 if above is None else low + round((target - below) / max(above - below, 1) * (high - low))
    return min(max(guess, low + 1), high - 1)

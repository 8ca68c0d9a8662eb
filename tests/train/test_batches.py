"""Which rows a step sees is decided before how it is computed."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from ftpipe.train.batches import Plan, lay_out
from tests.train.small import examples

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def plan(lengths, times=None, **settings) -> Plan:
    return Plan(lengths=lengths, times=times or [1] * len(lengths), seed=3, **({"batch_tokens": 64, "rows_per_step": 4} | settings))


@given(LENGTHS, st.integers(1, 80))
def test_packs_hold_each_row_once_and_no_more_than_fits(lengths, room):
    packs = plan(lengths, batch_tokens=room).packs(range(len(lengths)))
    assert sorted(r for p in packs for r in p) == list(range(len(lengths)))
    assert all(sum(lengths[r] for r in p) <= room or len(p) == 1 for p in packs)


@given(LENGTHS)
def test_packing_is_tight(lengths):
    """Best fit never leaves two micro-batches that would fit into one."""
    packs = plan(lengths).packs(range(len(lengths)))
    sizes = sorted(sum(lengths[r] for r in p) for p in packs)
    assert all(a + b > 64 for a, b in pairwise(sizes))


def test_a_row_repeated_in_a_step_is_packed_as_often():
    packs = plan([10, 20], batch_tokens=15).packs([0, 0, 1])
    assert Counter(r for p in packs for r in p) == {0: 2, 1: 1}


@given(LENGTHS, st.integers(1, 5))
def test_ranks_share_all_micro_batches(lengths, world):
    p = plan(lengths)
    packs = p.packs(range(len(lengths)))
    shares = p.share(packs, world)
    assert sorted(n for s in shares for n in s) == list(range(len(packs)))
    assert max(map(len, shares)) <= len(packs)


def test_steps_do_not_depend_on_memory_or_ranks():
    lengths = [e.tokens for e in examples(30)]
    assert list(plan(lengths).steps(epochs=2)) == list(plan(lengths, batch_tokens=7).steps(epochs=2))


def test_each_epoch_shows_each_row_its_times_in_another_order():
    found = list(plan([5] * 10, times=[1, 3, 0] + [1] * 7).steps(epochs=2))
    first, second = ([r for e, rows in found if e == n for r in rows] for n in (0, 1))
    assert Counter(first) == Counter(second) == Counter({1: 3} | {r: 1 for r in range(10) if r not in (1, 2)})
    assert first != second
    assert found == list(plan([5] * 10, times=[1, 3, 0] + [1] * 7).steps(epochs=2))


def test_the_order_of_the_rows_is_kept_when_asked():
    assert [r for _, rows in plan([5] * 9, shuffle=False).steps(epochs=1) for r in rows] == list(range(9))


def test_budgets_end_the_training():
    lengths = [10] * 12
    assert len(list(plan(lengths).steps(steps=7))) == 7
    assert sum(len(rows) * 10 for _, rows in plan(lengths).steps(tokens=250)) == 240
    assert len(list(plan(lengths).steps(tokens=1))) == 1
    by_tokens = list(plan(lengths, rows_per_step=None, tokens_per_step=35).steps(epochs=1))
    assert [len(rows) for _, rows in by_tokens] == [3, 3, 3, 3]


def test_rows_lie_end_to_end_with_the_token_before_each_target_as_its_source():
    rows = examples(3)
    batch = lay_out(rows, 7.0)
    ids, positions = batch.input_ids[0].tolist(), batch.position_ids[0].tolist()
    assert ids == [t for e in rows for t in e.input_ids[0]]
    assert positions == [i for e in rows for i in range(e.tokens)]
    wanted = [(e.input_ids[0][i], n) for n, e in enumerate(rows) for i in range(1, e.tokens) if e.trained[0][i]]
    assert list(zip(batch.targets.tolist(), batch.sequence.tolist())) == wanted
    assert [ids[s + 1] for s in batch.sources.tolist()] == batch.targets.tolist()
    assert all(positions[s + 1] == positions[s] + 1 for s in batch.sources.tolist())
    assert batch.count == 7.0

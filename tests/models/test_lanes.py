"""Work side by side: results in order, nothing left running, and the process's own threads as they were."""

from __future__ import annotations

import threading
import time

import pytest

torch = pytest.importorskip("torch")

from ftpipe.models import lanes  # noqa: E402
from ftpipe.models.lanes import LANES, Lanes  # noqa: E402


@pytest.fixture
def two():
    before = torch.get_num_threads()
    yield Lanes(2)
    torch.set_num_threads(before)


def test_results_come_in_order_whoever_is_done_first(two):
    def slow_first(n):
        time.sleep(0.05 if n % 2 == 0 else 0)
        return n

    assert list(two.results(slow_first, range(9))) == list(range(9))


def test_lanes_share_the_threads_and_the_process_keeps_its_own(two):
    together = threading.Barrier(LANES)
    assert {*two.results(lambda _: (together.wait(30), threading.current_thread().name)[1], range(LANES))} == {"lane_0", "lane_1"}
    assert torch.get_num_threads() == 2


def test_a_lane_keeps_to_its_share_of_the_threads_whatever_it_computes(two):
    """Torch gives a thread the process's number when it first asks, which undoes what was set before."""

    def work(_):
        x = torch.randn(64, 64, requires_grad=True)
        (x @ x).softmax(-1).sum().backward()
        return torch.get_num_threads()

    assert set(two.results(work, range(6))) == {1}
    wide = Lanes(6)
    assert set(wide.results(work, range(6))) == {3} and torch.get_num_threads() == 6


def test_after_an_error_nothing_is_begun_and_nothing_runs(two):
    begun, ended = [], []

    def one(n):
        begun.append(n)
        time.sleep(0.02)
        if n == 3:
            raise ValueError("three")
        ended.append(n)
        return n

    with pytest.raises(ValueError, match="three"):
        list(two.results(one, range(100)))
    seen = len(begun)
    assert seen < 12 and len(ended) == seen - 1
    time.sleep(0.1)
    assert len(begun) == seen


@pytest.mark.parametrize("sizes, ends", [([402, 297, 244, 220, 194], 699), ([9, 9, 9, 9], 18), ([5, 4, 3, 3, 3], 9), ([7], 7), ([], 0), ([10, 1, 1, 1], 10),
                                         ([*range(40, 0, -1)], 410)])
def test_items_begin_in_the_order_that_ends_soonest(sizes, ends):
    order = lanes.in_order(sizes)
    assert sorted(order) == list(range(len(sizes)))
    loads = [0] * LANES
    for i in order:  # as the threads take them: whoever is free takes the next
        loads[loads.index(min(loads))] += sizes[i]
    assert max(loads) == ends


def test_items_are_taken_as_they_are_needed(two):
    taken = []
    results = two.results(lambda n: n, (taken.append(n) or n for n in range(1000)))
    assert next(results) == 0 and len(taken) <= 3 * LANES
    results.close()


def test_scores_are_the_same_bits_side_by_side(tiny_model, tmp_path, monkeypatch):
    from ftpipe.data.render import Rendered
    from ftpipe.models import service
    from ftpipe.models.service import ModelService
    from ftpipe.stages.base import Environment

    opened = ModelService.open(str(tiny_model), Environment(workspace=tmp_path, base=tmp_path, pipeline=""), dtype="float32", device="cpu")
    rows = [Rendered(list(range(3, 3 + n)), [i > n // 2 for i in range(n)], n // 2) for n in (30, 9, 21, 40, 2, 17)]
    assert lanes.possible(opened.model, 2) and not lanes.possible(opened.model, 1)
    found = {}
    for several in (False, True):
        monkeypatch.setattr(service, "possible", lambda *args, several=several: several)
        heard = []
        found[several] = opened.score(rows, embed=True, on_batch=lambda done, heard=heard: heard.extend(i for i, _ in done))
        assert heard == list(range(6))
    for a, b in zip(*found.values(), strict=True):
        assert a.nll == b.nll and (a.embedding == b.embedding).all()

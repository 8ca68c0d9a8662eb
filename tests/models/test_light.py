"""Imports spared: what is loaded under it computes the same, and everything is as it was afterwards."""

from __future__ import annotations

import sys

import pytest

MODULE = """
import torch
from scipy.optimize import linear_sum_assignment
try:
    import mlflow
except ImportError:
    mlflow = None

@torch.compile
def one(x): return x + 1
@torch.compile(dynamic=False)
def two(x): return x + 2
@torch.compiler.disable
def three(x): return x + 3
@torch.compiler.disable(recursive=False)
def four(x): return x + 4
"""


@pytest.mark.parametrize("name", ["never_imported_before", "torch"])
def test_functions_stay_as_they_are_written_and_the_rest_comes_when_it_is_called(tmp_path, monkeypatch, name):
    import numpy as np
    import torch

    from ftpipe.models import light

    if name in sys.modules:
        assert light.load(name) is sys.modules[name]
        return
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    for other in ("scipy.optimize", "mlflow"):
        monkeypatch.delitem(sys.modules, other, raising=False)
    before = torch.compile, torch.compiler.disable
    try:
        made = light.load(name)
    finally:
        sys.modules.pop(name, None)
    assert (torch.compile, torch.compiler.disable) == before
    assert "scipy.optimize" not in sys.modules and made.mlflow is not None
    assert [f(0) for f in (made.one, made.two, made.three, made.four)] == [1, 2, 3, 4]
    assert {type(f).__name__ for f in (made.one, made.two, made.three, made.four)} == {"function"} and made.two.__module__ == name
    _, columns = made.linear_sum_assignment(np.array([[4.0, 1.0], [1.0, 4.0]]))
    assert columns.tolist() == [1, 0] and "scipy.optimize" in sys.modules


def test_it_is_all_put_back_when_an_import_fails(tmp_path, monkeypatch):
    import torch

    from ftpipe.models import light

    monkeypatch.delitem(sys.modules, "scipy.optimize", raising=False)
    before = torch.compile, torch.compiler.disable
    with pytest.raises(ModuleNotFoundError):
        light.load("no_such_module_anywhere")
    assert (torch.compile, torch.compiler.disable) == before and "scipy.optimize" not in sys.modules


def test_a_module_is_hidden_only_while_it_lasts(monkeypatch):
    from ftpipe.models import light

    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with light.spared("colorsys"), pytest.raises(ModuleNotFoundError):
        import colorsys
    import colorsys

    assert colorsys.rgb_to_yiq

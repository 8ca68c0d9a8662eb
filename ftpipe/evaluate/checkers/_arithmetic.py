"""Calculator annotations such as `<<48/2=24>>`, evaluated by a parser of sums and products only: they come out of a model."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable

ANNOTATION = re.compile(r"<<([^<>]*)>>")
ALLOWED = re.compile(r"[0-9.+\-*/%()]+")
LONGEST = 200
"""Characters of an expression; a longer one counts as wrong."""
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


def annotations(text: str) -> list[str]:
    """What stands in the annotations of a text, in order, spaces removed."""
    return [re.sub(r"\s", "", found) for found in ANNOTATION.findall(text)]


def correct(annotation: str, tolerance: float) -> bool:
    """Whether the two sides of the first equals sign are the same number, within `tolerance`; what follows a second one is not looked at."""
    sides = annotation.split("=")
    if len(sides) < 2:
        return False
    left, right = (evaluate(side) for side in sides[:2])
    return left is not None and right is not None and abs(left - right) < tolerance


def evaluate(expression: str) -> float | None:
    """The value of an expression of numbers, + - * / // % ** and brackets, in floating point; None for anything else, or no finite number.

    Commas between digits, signs of money and zeros at the front of a number do not count.
    """
    text = re.sub(r"(?<![0-9.])0+(?=[0-9])", "", re.sub(r"[,$\s]", "", expression))
    if len(text) > LONGEST or not ALLOWED.fullmatch(text):
        return None
    try:
        value = _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return value if math.isfinite(value) else None


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return float(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        return _value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        value = OPERATORS[type(node.op)](_value(node.left), _value(node.right))
        if isinstance(value, float):  # a root of a negative number is complex
            return value
    raise ValueError("not a sum or product of numbers")

"""Parts of a suite's items: by the group they come from, by source, by length."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pyarrow as pa

Way = Literal["slice", "source", "length"]
LOSS = "loss"
WAYS: tuple[Way, ...] = ("slice", "source", "length")
OF = {"slice": "group", "source": "source", "length": "length in tokens"}
"""What the parts are, in words."""


def parts(items: pa.Table, way: Way) -> list[str]:
    """For each row of `items.parquet` the part it belongs to, empty where it belongs to none.

    `slice`: the item's own (a row's group, a task of a group of tasks). `source`: the file or source its row was read from. `length`: the number of trained
    tokens, which is the weight of a loss, from one power of two to the next; items of other metrics have none.
    """
    if way == "source":
        return [s or "" for s in items["source"].to_pylist()] if "source" in items.column_names else [""] * items.num_rows
    if way == "slice":
        return items["slice"].to_pylist()
    return [length_part(weight) if metric == LOSS else "" for metric, weight in zip(items["metric"].to_pylist(), items["weight"].to_pylist())]


def length_part(tokens: float) -> str:
    """`32 to 63` for 40; empty for less than one token."""
    low = 1 << (int(tokens).bit_length() - 1) if tokens >= 1 else 0
    return f"{low} to {2 * low - 1}" if low > 1 else "1" if low else ""


def in_order(names: set[str], way: Way) -> list[str]:
    """The parts' names, short ones first where they are lengths."""
    return sorted(names, key=lambda n: (int(n.split()[0]), n)) if way == "length" else sorted(names)

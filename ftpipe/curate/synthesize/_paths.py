"""Different ways to the same answer: which of several to keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def distance(a: str, b: str) -> int:
    """Edit distance (Levenshtein): the fewest characters inserted, deleted or exchanged that make one text the other.

    A column of the table is held in the bits of two whole numbers (Myers, 1999, in Hyyrö's form for whole texts), so the work is len(b) additions.
    """
    if not a or not b:
        return len(a) or len(b)
    where: dict[str, int] = {}
    for i, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << i
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, score = full, 0, len(a)
    for character in b:
        same = where.get(character, 0)
        steps = same | down
        across = (((same & up) + up) ^ up) | same
        more, less = down | (~(across | up) & full), up & across
        score += bool(more & last) - bool(less & last)
        more, less = more << 1 | 1, less << 1
        up, down = (less | ~(steps | more)) & full, more & steps & full
    return score


def distinct(texts: Sequence[str], keys: Sequence[str], far: Callable[[str, str], int] = distance) -> list[int]:
    """Indices of the texts to keep, one for each key, in the order in which the keys first came.

    When a key comes again, the text stays whose distances to the other texts kept so far add up to more; the one that was there, if they are the same. So
    the result depends on the order of the texts.
    """
    kept: dict[str, int] = {}
    known: dict[tuple[str, str], int] = {}

    def between(a: str, b: str) -> int:
        pair = (a, b) if a <= b else (b, a)
        if pair not in known:
            known[pair] = far(*pair)
        return known[pair]

    for i, key in enumerate(keys):
        there = kept.setdefault(key, i)
        if texts[there] != texts[i]:
            others = [texts[j] for k, j in kept.items() if k != key]
            if sum(between(texts[i], o) for o in others) > sum(between(texts[there], o) for o in others):
                kept[key] = i
    return list(kept.values())

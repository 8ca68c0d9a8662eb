"""The stages as a layered drawing: inputs above, what was made of them below.

The usual four steps (Sugiyama et al. 1981): layers by longest path, a bend for each layer that an edge crosses, order within the layers by barycentres, curves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

BOX, GAP, TALL, LAYER = 160, 18, 42, 66
SWEEPS = 8


@dataclass
class _Node:
    name: str
    layer: int
    real: bool = True
    above: list[str] = field(default_factory=list)
    below: list[str] = field(default_factory=list)
    x: float = 0.0


def layout(edges: dict[str, list[str]], always: frozenset[tuple[str, str]] = frozenset()) -> dict[str, Any]:
    """Where to draw boxes and lines.

    Args:
        edges: for each node its inputs; every input is a node, and there are no circles.
        always: (input, node) pairs whose line is drawn even if a longer way implies it.

    Returns:
        width and height in pixels; boxes {name: (x, y)}, the upper left corners; lines: SVG path data for every edge that others do not imply.
    """
    if not edges:
        return {"width": 0, "height": 0, "boxes": {}, "lines": []}
    reduced = _reduce(edges, always)
    layer: dict[str, int] = {}
    for name in _order(edges):
        layer[name] = 1 + max((layer[i] for i in reduced[name]), default=-1)
    nodes = {n: _Node(n, at) for n, at in layer.items()}
    chains = [_chain(nodes, source, name) for name in edges for source in reduced[name]]
    layers = [[n.name for n in nodes.values() if n.layer == i] for i in range(max(layer.values()) + 1)]
    _untangle(nodes, layers)
    return _draw(nodes, layers, chains)


def _order(edges: dict[str, list[str]]) -> list[str]:
    from graphlib import TopologicalSorter

    return list(TopologicalSorter(edges).static_order())


def _reduce(edges: dict[str, list[str]], always: frozenset[tuple[str, str]]) -> dict[str, list[str]]:
    """The edges without those that a longer way implies."""
    reach: dict[str, set[str]] = {}
    for name in _order(edges):
        reach[name] = set(edges[name]).union(*(reach[i] for i in edges[name]))
    return {name: [i for i in dict.fromkeys(inputs) if (i, name) in always or not any(i in reach[o] for o in inputs if o != i)]
            for name, inputs in edges.items()}


def _chain(nodes: dict[str, _Node], source: str, target: str) -> list[str]:
    """The nodes that an edge runs through, with a new bend on each layer between its ends."""
    chain = [source]
    for at in range(nodes[source].layer + 1, nodes[target].layer):
        bend = f"{source}\x00{target}\x00{at}"
        nodes[bend] = _Node(bend, at, real=False)
        chain.append(bend)
    chain.append(target)
    for upper, lower in pairwise(chain):
        nodes[upper].below.append(lower)
        nodes[lower].above.append(upper)
    return chain


def _untangle(nodes: dict[str, _Node], layers: list[list[str]]) -> None:
    """Order each layer by the mean place of its neighbours, sweeping down and up, and keep the order with the fewest crossings."""
    best, fewest = [list(layer) for layer in layers], _crossings(nodes, layers)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        for layer, beside in zip(layers[1:], layers) if down else zip(layers[-2::-1], layers[:0:-1]):
            place = {n: i for i, n in enumerate(beside)}
            own = {n: i for i, n in enumerate(layer)}

            def centre(n: str, place=place, own=own, down=down) -> tuple[float, int]:
                near = [place[o] for o in (nodes[n].above if down else nodes[n].below)]
                return (sum(near) / len(near) if near else own[n], own[n])

            layer.sort(key=centre)
        crossings = _crossings(nodes, layers)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    layers[:] = best


def _crossings(nodes: dict[str, _Node], layers: list[list[str]]) -> int:
    total = 0
    for upper, lower in pairwise(layers):
        place = {n: i for i, n in enumerate(lower)}
        ends = [(i, place[b]) for i, n in enumerate(upper) for b in nodes[n].below]
        total += sum((a[0] - b[0]) * (a[1] - b[1]) < 0 for k, a in enumerate(ends) for b in ends[:k])
    return total


def _draw(nodes: dict[str, _Node], layers: list[list[str]], chains: list[list[str]]) -> dict[str, Any]:
    widths = {n: BOX if nodes[n].real else GAP for n in nodes}
    spans = [sum(widths[n] for n in layer) + GAP * (len(layer) - 1) for layer in layers]
    width = max(spans)
    for layer, span in zip(layers, spans):
        x = (width - span) / 2
        for n in layer:
            nodes[n].x = x + widths[n] / 2
            x += widths[n] + GAP
    boxes = {n.name: (round(n.x - BOX / 2, 1) + 1, n.layer * LAYER + 1) for n in nodes.values() if n.real}
    lines = []
    for chain in chains:
        path = []
        for upper, lower in pairwise(chain):
            a, b = nodes[upper], nodes[lower]
            y0, y1 = a.layer * LAYER + (TALL if a.real else 0), b.layer * LAYER
            if not a.real:
                y0 = a.layer * LAYER + TALL
                path.append(f"L{a.x + 1:.1f} {y0 + 1}")
            middle = (y0 + y1) / 2
            path.append(f"{'' if path else f'M{a.x + 1:.1f} {y0 + 1}'}C{a.x + 1:.1f} {middle + 1:.1f} {b.x + 1:.1f} {middle + 1:.1f} {b.x + 1:.1f} {y1 + 1}")
        lines.append("".join(path))
    return {"width": round(width) + 2, "height": (len(layers) - 1) * LAYER + TALL + 2, "boxes": boxes, "lines": lines}

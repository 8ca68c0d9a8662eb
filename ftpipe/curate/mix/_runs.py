"""What short training runs show: how much of each domain a run saw, and its loss on each domain's own held-out rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from ftpipe.curate.labels import labels
from ftpipe.data.rows import HELDOUT, KEPT, ROWS, RowSet
from ftpipe.errors import DataError
from ftpipe.registry.ledger import adapter_content

if TYPE_CHECKING:
    from ftpipe.artifacts import Artifact

BASE, CANDIDATE = "base", "adapter"


class Run(BaseModel):
    """One training run: what it saw of each domain, and what it came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: dict[str, Annotated[float, Field(ge=0)]] = Field(description="Tokens seen of each domain; 0 of those not named.")
    loss: dict[str, float] = Field(description="Loss on each domain's own held-out rows, in nats a token; domains that were not measured are left out.")

    def seen(self, domain: str) -> float:
        return self.tokens.get(domain, 0.0)

    @property
    def all(self) -> float:
        """Tokens of all domains."""
        return sum(self.tokens.values())


def runs_of(evaluation: Artifact, by: str, suite: str, where: str, *, seen: bool = True) -> dict[str, Run]:
    """The runs that an evaluate stage compares, by the name of their system; `base` is the untrained model, which saw nothing, `adapter` the candidate.

    A run's tokens are those its training showed (`seen.parquet`), summed by domain: the column `by` of the rows it was trained on. Its losses are the means
    over a domain's held-out rows, each row weighted by its trained tokens, so a loss is of a token, not of a row. The champion, which other rows may
    have made, is left out. Without `seen` tokens are left out, and the adapters may come from any stage. Raises DataError, at `where`, for an artifact
    that is no evaluation, without that suite, or of an adapter that no train stage made.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not evaluation.has("items.parquet"):
        raise DataError(f"{evaluation.name} is a {evaluation.kind} stage, not an evaluation", where=where, remedy="name evaluate stages")
    inputs = evaluation.inputs()
    table = pq.read_table(evaluation.file("items.parquet"))
    table = table.filter(pc.and_(pc.equal(table["suite"], suite), pc.equal(table["metric"], "loss")))
    if not table.num_rows:
        raise DataError(f"{evaluation.name} has no losses under the suite {suite!r}", where=where,
                        remedy="evaluate with the suite heldout_loss, and give its label if it has one")
    asked = next(a for a in inputs.values() if a.has(ROWS) or a.has(KEPT))
    domain = dict(zip(*labels(RowSet(asked), by, HELDOUT, where).to_pydict().values()))
    stray = next((i for i in table["item_id"].to_pylist() if i not in domain), None)
    if stray is not None:
        raise DataError(f"item {stray} of the suite {suite!r} is no held-out row of {asked.name}", where=where, remedy="name a suite that asks held-out rows")
    sums: dict[str, dict[str, list[float]]] = {}
    for item in table.select(["system", "item_id", "score", "weight"]).to_pylist():
        of_system = sums.setdefault(item["system"], {}).setdefault(domain[item["item_id"]], [0.0, 0.0])
        of_system[0] += item["score"] * item["weight"]
        of_system[1] += item["weight"]
    trained = {adapter_content(a): a for a in inputs.values() if a.has("adapter")}
    systems = evaluation.json("evaluation.json")["systems"]
    found = {}
    for system, by_domain in sums.items():
        adapter = trained.get(systems[system].get("adapter"))
        if system == BASE or adapter is not None:
            found[system] = Run(tokens=_seen(adapter, by, where) if adapter and seen else {}, loss={d: s / w for d, (s, w) in sorted(by_domain.items()) if w})
    return found


def _seen(adapter: Artifact, by: str, where: str) -> dict[str, float]:
    """Tokens of each domain that a training showed, repetition counted."""
    import pyarrow.parquet as pq

    rows = next((a for a in adapter.inputs().values() if a.has(ROWS) or a.has(KEPT)), None)
    if rows is None or not adapter.has("seen.parquet"):
        raise DataError(f"{adapter.name} is a {adapter.kind} stage, which does not say what was trained on", where=where,
                        remedy="compare adapters of train stages")
    domain = dict(zip(*labels(RowSet(rows), by, "train", where).to_pydict().values()))
    tokens: dict[str, float] = {}
    for row in pq.read_table(adapter.file("seen.parquet"), columns=["row_id", "times", "tokens"]).to_pylist():
        tokens[domain[row["row_id"]]] = tokens.get(domain[row["row_id"]], 0.0) + row["times"] * row["tokens"]
    return dict(sorted(tokens.items()))

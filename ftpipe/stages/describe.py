"""Describe: what a set of rows is like, before anybody trains on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.curate.dedup.minhash import Minhash
from ftpipe.curate.filter.personal_data import PersonalData
from ftpipe.stages.base import Ref, Stage, StageContext


class Describe(Stage):
    """Counts what rows hold: lengths, sources, formats, languages, repeated openings, exact and near duplicates, personal data. It decides nothing.

    It leaves `description.json` and `lengths.parquet`; a report stage that names it under `data` draws them.
    """

    produces: ClassVar[str] = "description"
    libraries: ClassVar[tuple[str, ...]] = ("duckdb", "pyarrow", "py3langid")

    rows: Ref = Field(description="Stage whose rows are described.")
    opening: int = Field(default=4, ge=1, le=20, description="Words of a prompt, and of an answer, that make its opening.")
    near: Minhash | None = Field(default=Minhash(), description="How near duplicates are told; null leaves them out.")
    languages: int = Field(default=1000, ge=0, description="Rows whose language is told, drawn by their ids; 0 leaves it out.")
    personal_data: bool = Field(default=True, description="Look for personal data.")

    def run(self, ctx: StageContext) -> None:
        from ftpipe.curate.description import Description
        from ftpipe.data.rows import RowSet

        found: dict[str, Any] = Description(RowSet(ctx.inputs[self.rows]), ctx).whole(self.opening, self.languages)
        if self.near is not None:
            found["near"] = self._near(ctx)
        if self.personal_data:
            found["personal_data"] = self._personal(ctx)
        (ctx.out / "description.json").write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        ctx.log.info("%d train rows, %d held out; %d exact duplicates", found["rows"]["train"], found["rows"]["heldout"], found["duplicates"]["rows"])

    def _near(self, ctx: StageContext) -> dict[str, Any]:
        """Rows that near-dedup would drop, and the largest groups of them."""
        from collections import Counter

        from ftpipe.data.rows import RowSet

        scratch = self._scratch(ctx, "minhash")
        table = self.near.duplicates(RowSet(ctx.inputs[self.rows]), scratch)
        groups = Counter(table["keeper"].to_pylist())
        return {"threshold": self.near.threshold, "rows": table.num_rows, "groups": [{"row_id": r, "copies": n} for r, n in _largest(groups)]}

    def _personal(self, ctx: StageContext) -> dict[str, Any]:
        from ftpipe.data.rows import RowSet

        scratch = self._scratch(ctx, "personal_data")
        PersonalData().judge(RowSet(ctx.inputs[self.rows]), scratch)
        return json.loads((scratch.out / "personal_data.json").read_text(encoding="utf-8"))

    @staticmethod
    def _scratch(ctx: StageContext, method: str) -> Any:
        """A step's context whose artifact nobody keeps."""
        from ftpipe.curate.step import StepContext

        out = Path(ctx.work) / f"described-{method}"
        out.mkdir(parents=True, exist_ok=True)
        return StepContext(**(vars(ctx) | {"out": out, "notes": {}}), method=method)


def _largest(groups: Any, most: int = 5) -> list[tuple[str, int]]:
    return sorted(groups.items(), key=lambda item: (-item[1], item[0]))[:most]

"""Compress: a smaller adapter, with its size and what was lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.compress.half_precision import HalfPrecision
from ftpipe.errors import ConfigError
from ftpipe.evaluate.suites.heldout_loss import HeldoutLoss
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

PROBE = "probe.safetensors"
ROUNDED = 0.01
"""A loss above that of rounding to bfloat16, and below that of anything coarser."""


class Compress(Stage):
    """Makes an adapter smaller. `compress.json` states bytes before and after, the share of the change that was lost, and with `rows` the scores of the base,
    of the adapter and of the smaller one on the same held-out items."""

    produces: ClassVar[str] = "adapter"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    adapter: Ref = Field(description="Stage that makes the adapter.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    seed: int | None = Field(default=None, description="Seed of what a method draws at random; the pipeline's by default.")
    method: choose("compress") = Field(default=HalfPrecision(), description="How it is made smaller.")
    rows: Ref | None = Field(default=None, description="Stage whose held-out rows the adapter is asked, before and after.")
    suites: list[choose("evaluate/suites")] = Field(default=[HeldoutLoss()], min_length=1, description="What is asked, if rows are given.")
    probe: bool = Field(default=True, description="Leave logits of the result to compare with when it is loaded. False for a base larger than memory.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        return {"base": identity(self.model, env)}

    def run(self, ctx: StageContext) -> None:
        from ftpipe.merge._deltas import Loss, facts_of, read
        from ftpipe.merge._given import Given

        source, out = ctx.inputs[self.adapter].file("adapter"), ctx.out / "adapter"
        given = Given.of(ctx, self.model, self.seed, facts_of(source))
        said = self.method.compress(source, out, given)
        try:
            before, after, lost = read(source, given.base), read(out, given.base), Loss()
            changed = given.changed() if self.probe else None
            for name in sorted({*before, *after}):
                if name in after and changed:
                    changed.add(name, after[name])
                if name in before:
                    lost.count(before[name], after.get(name))
            said["lost_of_the_change"] = lost.share
            if changed:
                changed.write_probe(ctx.out / PROBE)
        except ConfigError:  # no sum of weight changes: the trained model's own logits must then hold for the smaller adapter too, if it is merely rounded
            if self.probe and said["lost"] < ROUNDED and ctx.inputs[self.adapter].has(PROBE):
                shutil.copyfile(ctx.inputs[self.adapter].file(PROBE), ctx.out / PROBE)
        sizes = {"bytes_before": _bytes(source), "bytes_after": _bytes(out)}
        if self.rows:
            said["scores"] = self._scores(ctx, given, {"base": None, "before": source, "after": out})
        (ctx.out / "compress.json").write_text(json.dumps(said | sizes | {"method": self.method.dump()}, indent=1, sort_keys=True), encoding="utf-8")
        ctx.log.info("%d bytes became %d; %.2g of the change was lost", *sizes.values(), said["lost"])

    def _scores(self, ctx: StageContext, given: Any, folders: dict[str, Path | None]) -> dict[str, Any]:
        """Each suite's means for the base, the adapter and the smaller one."""
        from ftpipe.artifacts import hash_files
        from ftpipe.data.rows import RowSet
        from ftpipe.evaluate.suites.base import Given as Asked
        from ftpipe.evaluate.systems import System
        from ftpipe.merge._judge import means, plain
        from ftpipe.models.loading import default_device, identity
        from ftpipe.models.service import ModelService
        from ftpipe.registry.ledger import files_content

        asked = Asked(RowSet(ctx.inputs[self.rows or ""]), ctx.env, ctx.log)
        items = {label: suite.items(asked) for suite in self.suites for label in suite.labels()}
        base = {k: v for k, v in identity(self.model, ctx.env).items() if k != "model"}
        found = {}
        for name, folder in folders.items():
            content = files_content(hash_files(folder), str(folder)) if folder else None
            system = System(name, {"base": base, "dtype": given.dtype, "device": default_device(), "adapter": content},
                            lambda folder=folder: ModelService.open(self.model, ctx.env, adapter=folder, dtype=given.dtype))
            try:
                found[name] = plain(means(system, list(self.suites), items, given))["selection"]
            finally:
                system.close()
        return found


def _bytes(folder: Path) -> int:
    """Bytes of all that the adapter needs to be loaded: tensors, and the JSON beside them."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())

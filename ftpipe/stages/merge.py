"""Merge: one adapter out of several, without training."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.merge.linear import Linear
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class Merge(Stage):
    """Makes one adapter out of several for the same base; the result is an adapter like any other and can be evaluated, gated and registered."""

    produces: ClassVar[str] = "adapter"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    adapters: list[Ref] = Field(min_length=1, description="Stages that make the adapters.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    method: choose("merge") = Field(default=Linear(), description="How they are combined.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        return {"base": identity(self.model, env)}

    def run(self, ctx: StageContext) -> None:
        from ftpipe.merge._deltas import base_weights, norm, probe, read, same_base, write

        folders = {name: ctx.inputs[name].file("adapter") for name in self.adapters}
        facts = same_base(folders)
        base = base_weights(self.model, ctx.env, facts)
        deltas = {name: read(folder, base) for name, folder in folders.items()}
        merged, said = self.method.merge(deltas)
        write(ctx.out / "adapter", merged, facts, base)
        probe(self.model, ctx.env, merged, facts.get("dtype", "float32"), ctx.out / "probe.safetensors", facts)
        said |= {"method": self.method.dump(), "adapters": list(folders), "weights_changed": len(merged), "norm": norm(merged),
                 "norms": {name: norm(d) for name, d in deltas.items()}}
        (ctx.out / "merge.json").write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
        ctx.log.info("merged %s: %d weights changed, %.2g of the change lost", ", ".join(folders), len(merged), said.get("lost", 0.0))

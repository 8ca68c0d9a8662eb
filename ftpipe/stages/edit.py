"""Edit: another adapter out of one, without training."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.edit.negate import Negate
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class Edit(Stage):
    """Turns the change that an adapter makes into another one (takes it away, for instance)."""

    produces: ClassVar[str] = "adapter"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    adapter: Ref = Field(description="Stage that makes the adapter.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    method: choose("edit") = Field(default=Negate(), description="What is done to it.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        return {"base": identity(self.model, env)}

    def run(self, ctx: StageContext) -> None:
        from ftpipe.merge._deltas import facts_of, norm, read
        from ftpipe.merge._weights import probe, write
        from ftpipe.models.weights import base_weights

        folder = ctx.inputs[self.adapter].file("adapter")
        facts = facts_of(folder)
        base = base_weights(self.model, ctx.env, facts)
        before = read(folder, base)
        after, said = self.method.edit(before)
        write(ctx.out / "adapter", after, facts, base)
        probe(self.model, ctx.env, after, facts.get("dtype", "float32"), ctx.out / "probe.safetensors", facts)
        said |= {"method": self.method.dump(), "norm_before": norm(before), "norm_after": norm(after)}
        (ctx.out / "edit.json").write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")

"""Merge: one adapter out of several, without training."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.merge.linear import Linear
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext


class Merge(Stage):
    """Makes one adapter out of several for the same base; the result is an adapter like any other and can be evaluated, gated and registered.

    It goes weight by weight: of each adapter, of the base and of the result no more than one weight (and one shard of what is written) is in memory at a
    time. Only the probe, the logits that a later loading is compared with, needs the base model whole.
    """

    produces: ClassVar[str] = "adapter"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    adapters: list[Ref] = Field(min_length=1, description="Stages that make the adapters.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    seed: int | None = Field(default=None, description="Seed of what a method draws at random; the pipeline's by default.")
    method: choose("merge") = Field(default=Linear(), description="How they are combined.")
    probe: bool = Field(default=True, description="Leave logits of the merged model to compare with when it is loaded. False for a base larger than memory.")
    shard: float = Field(default=1.0, gt=0, description="GiB of whole weights that are written to one file, and kept in memory until then.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        return {"base": identity(self.model, env)}

    def run(self, ctx: StageContext) -> None:
        from ftpipe.merge._deltas import Loss, inner, read, same_base, truncate
        from ftpipe.merge._given import Given
        from ftpipe.merge._weights import Writer
        from ftpipe.registry.ledger import adapter_content

        folders = {name: ctx.inputs[name].file("adapter") for name in self.adapters}
        facts = same_base(folders)
        given = Given.of(ctx, self.model, self.seed, facts, contents={name: adapter_content(ctx.inputs[name]) for name in self.adapters})
        given.adapters = {name: read(folder, given.base) for name, folder in folders.items()}
        self.method.check(given)
        state = self.method.prepare(given)
        writer = Writer(ctx.out / "adapter", facts, given.base, whole=self.method.whole, shard=int(self.shard * 2**30))
        changed = given.changed() if self.probe else None
        lost, size, sizes = Loss(), 0.0, dict.fromkeys(folders, 0.0)
        for number, name in enumerate(given.names):
            parts = given.parts(name)
            for adapter, part in parts.items():
                sizes[adapter] += inner(part, part)
            merged = exact = self.method.combine(name, parts, given, state)
            if self.method.rank:
                merged = truncate(exact, self.method.rank)
                lost.count(exact, merged)
            size += inner(merged, merged)
            writer.add(name, merged)
            if changed:
                changed.add(name, merged)
            ctx.progress(number + 1, len(given.names), "weights")
        writer.close()
        if changed:
            changed.write_probe(ctx.out / "probe.safetensors")
        said = given.said | {"method": self.method.dump(), "adapters": list(folders), "weights_changed": len(given.names), "form": "whole" if writer.whole
                             else "lora", "lost": lost.share, "norm": max(size, 0.0) ** 0.5, "norms": {a: max(s, 0.0) ** 0.5 for a, s in sizes.items()}}
        (ctx.out / "merge.json").write_text(json.dumps(said, indent=1, sort_keys=True), encoding="utf-8")
        ctx.log.info("merged %s: %d weights changed, %.2g of the change lost", ", ".join(folders), len(given.names), lost.share)

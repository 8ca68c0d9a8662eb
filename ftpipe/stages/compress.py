"""Compress: a smaller adapter, with its size and what was lost."""

from __future__ import annotations

import json
import shutil
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.compress.half_precision import HalfPrecision
from ftpipe.errors import ConfigError
from ftpipe.slots import choose
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

PROBE = "probe.safetensors"


class Compress(Stage):
    """Makes an adapter smaller; `compress.json` states bytes before and after, and the share of the change that was lost."""

    produces: ClassVar[str] = "adapter"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "safetensors")

    adapter: Ref = Field(description="Stage that makes the adapter.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    method: choose("compress") = Field(default=HalfPrecision(), description="How it is made smaller.")

    def externals(self, env: Environment) -> dict[str, Any]:
        from ftpipe.models.loading import identity

        return {"base": identity(self.model, env)}

    def run(self, ctx: StageContext) -> None:
        from ftpipe.merge._deltas import base_weights, facts_of, probe, read

        source = ctx.inputs[self.adapter].file("adapter")
        base = base_weights(self.model, ctx.env, facts_of(source))
        out = ctx.out / "adapter"
        said = self.method.compress(source, out, base)
        try:
            probe(self.model, ctx.env, read(out, base), facts_of(out).get("dtype", "float32"), ctx.out / PROBE, facts_of(out))
        except ConfigError:  # no sum of weight changes: the trained model's own logits must then hold for the smaller adapter too
            if ctx.inputs[self.adapter].has(PROBE):
                shutil.copyfile(ctx.inputs[self.adapter].file(PROBE), ctx.out / PROBE)
        sizes = {"bytes_before": _bytes(source), "bytes_after": _bytes(out)}
        (ctx.out / "compress.json").write_text(json.dumps(said | sizes | {"method": self.method.dump()}, indent=1, sort_keys=True), encoding="utf-8")
        ctx.log.info("%d bytes became %d; %.2g of the change was lost", *sizes.values(), said["lost"])


def _bytes(folder: Any) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*.safetensors"))

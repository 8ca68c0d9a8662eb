"""Register: what passed the gate becomes a version, and the champion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from ftpipe.artifacts import Artifact
from ftpipe.errors import ArtifactError, ConfigError
from ftpipe.registry import ledger
from ftpipe.stages.base import Environment, Ref, Stage, StageContext

ADAPTER_FACTS = "ftpipe_adapter.json"


class Register(Stage):
    """Turns a candidate that passed the gate into an immutable version and points an alias at it; a refused one leaves everything as it was.

    Before it counts, the version is loaded afresh and its logits are compared with those the trained model had in memory. The alias moves
    only if the alias that the evaluation compared with still points where it did: as a rule it is the same alias, the champion. With
    `alias: challenger` a candidate that beat the champion waits for somebody to promote it (`ftpipe registry alias NAME@challenger champion`).
    """

    produces: ClassVar[str] = "version"
    side_effects: ClassVar[bool] = True

    verdict: Ref = Field(description="The gate's verdict.")
    adapter: Ref = Field(description="The adapter that the verdict is about.")
    evaluation: Ref = Field(description="The evaluation that the verdict rests on.")
    model: str = Field(default="", description="Base model; the pipeline's by default.")
    registered_as: str = Field(default="", description="Name in the registry; the pipeline's by default.")
    alias: str = Field(default=ledger.CHAMPION, pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$",
                       description="Alias that a passing candidate gets: champion, challenger, ...")

    def _name(self, env: Environment) -> str:
        return self.registered_as or env.pipeline

    def check(self, env: Environment, pipeline: dict[str, Stage]) -> None:
        ledger.folder(env, self._name(env))
        if self.alias.lower() == "latest":
            raise ConfigError("MLflow keeps the alias `latest` for itself", remedy="use another alias, such as champion")
        gate, evaluate = pipeline[self.verdict], pipeline[self.evaluation]
        if getattr(gate, "evaluation", self.evaluation) != self.evaluation:
            raise ConfigError(f"the verdict {self.verdict} is about {gate.evaluation}, not about {self.evaluation}",  # type: ignore[attr-defined]
                              remedy="name one evaluation in both stages")
        if getattr(evaluate, "candidate", self.adapter) != self.adapter:
            raise ConfigError(f"{self.evaluation} judged {evaluate.candidate}, not {self.adapter}",  # type: ignore[attr-defined]
                              remedy=f"set `adapter: {evaluate.candidate}`")  # type: ignore[attr-defined]
        compared = getattr(evaluate, "registered_as", "") or env.pipeline
        if getattr(evaluate, "champion", False) and compared != self._name(env):
            raise ConfigError(f"{self.evaluation} compares with the champion of {compared}, this stage registers as {self._name(env)}",
                              remedy="set `registered_as` alike in both")

    def still_true(self, artifact: Artifact, env: Environment) -> str | None:
        from ftpipe.registry import server

        done = artifact.json("registration.json")
        if not done["registered"]:
            return None
        database = server.local_database(env)
        if database is not None and not Path(database).exists():
            return "the registry's database is gone"
        entry = next((v for v in ledger.read_versions(env, done["name"]) if v["version"] == done["version"] and v["content"] == done["content"]), None)
        if entry is None:
            return f"version {done['version']} of {done['name']} is no longer registered"
        if not (ledger.folder(env, done["name"]) / entry["content"]).is_dir():
            return f"the files of version {done['version']} of {done['name']} are gone"
        return None

    def run(self, ctx: StageContext) -> None:
        verdict = ctx.inputs[self.verdict].json("verdict.json")
        content = ledger.adapter_content(ctx.inputs[self.adapter])
        if verdict["content"] != content or verdict["evaluation"] != ctx.inputs[self.evaluation].content:
            raise ConfigError(f"the verdict of {self.verdict} is not about the adapter of {self.adapter}", remedy="name the stages that the gate judged")
        done = self._register(ctx, verdict) if verdict["passed"] else self._refused(ctx, verdict)
        done |= {"content": content}
        (ctx.out / "registration.json").write_text(json.dumps(done, indent=1, sort_keys=True, ensure_ascii=False), encoding="utf-8")
        ctx.log.info("%s", f"version {done['version']} of {done['name']}, {done['reason']}" if done["registered"] else f"not registered: {done['reason']}")

    def _refused(self, ctx: StageContext, verdict: dict[str, Any]) -> dict[str, Any]:
        failed = [r for r in verdict["rules"] if r["required"] and not r["passed"]]
        why = "; ".join(f"{r['name']}: {r['text']}" for r in failed) or "no required rule could be tested"
        current = ledger.champion(ctx.env, self._name(ctx.env), self.alias)
        return {"registered": False, "name": self._name(ctx.env), "version": None, "alias": None, "uri": None, "reason": f"the gate refused it: {why}",
                "champion_before": current["version"] if current else None}

    def _register(self, ctx: StageContext, verdict: dict[str, Any]) -> dict[str, Any]:
        from ftpipe.registry import register, versions
        from ftpipe.registry.card import card

        name, adapter, evaluation = self._name(ctx.env), ctx.inputs[self.adapter], ctx.inputs[self.evaluation]
        facts = adapter.json(f"adapter/{ADAPTER_FACTS}")
        compared, about = evaluation.json("comparisons.json"), evaluation.json("evaluation.json")
        lineage = _lineage([ctx.inputs[self.verdict], adapter])
        readme = card(name, base=facts["base"], method=facts["method"], verdict=verdict, comparisons=compared, lineage=lineage,
                      quantize=facts.get("quantize"), peft=adapter.has("adapter/adapter_config.json"), about=about, data=_data(adapter),
                      found={n: evaluation.json(f"diagnostics/{n}.json")["words"] for n in about["diagnostics"]})
        beaten = about["champion"]["content"] if about["champion"] else None
        built = versions.build(ctx.env, name, adapter, readme, {
            "base": facts["base"], "method": facts["method"], "dtype": facts.get("dtype"), "quantize": facts.get("quantize"),
            "tokenizer": facts.get("tokenizer"), "chat_template": facts.get("chat_template"),
            "lineage": lineage, "champion_beaten": beaten, "pipeline": ctx.env.pipeline,
        }, {"verdict.json": ctx.inputs[self.verdict].file("verdict.json"), "comparisons.json": evaluation.file("comparisons.json")})
        try:
            self._check_probe(ctx, built.folder, facts)
            done = register.register(ctx.env, name, built, base=facts["base"], stages={s["name"]: s["key"] for s in lineage}, alias=self.alias,
                                     beat=beaten, against=about.get("alias"), run=ctx.key, description=f"made by pipeline {ctx.env.pipeline}")
        finally:
            shutil.rmtree(built.folder, ignore_errors=True)
        return {"registered": True, "name": name, "version": done.version, "alias": self.alias if done.moved else None, "champion_before": done.before,
                "uri": f"models:/{name}/{done.version}", "reason": done.reason}

    def _check_probe(self, ctx: StageContext, folder: Path, facts: dict[str, Any]) -> None:
        from ftpipe.models.loading import load_adapted
        from ftpipe.registry.versions import check_probe

        dtype = facts.get("dtype") if facts.get("dtype") in ("bfloat16", "float32") else "bfloat16"
        gap = check_probe(folder, lambda: load_adapted(self.model, ctx.env, folder, dtype=dtype))
        if gap is None:
            load_adapted(self.model, ctx.env, folder, dtype=dtype)  # whatever made it left no probe; that it loads on its base is checked all the same
            ctx.log.warning("the adapter came without a probe: its logits could not be compared with those of the model in memory")
        else:
            ctx.log.info("loaded afresh, the adapter gives the trained model's logits (off by %.2g of the largest)", gap)
        ctx.notes["probe_gap"] = gap


def _behind(artifacts: list[Artifact]) -> list[tuple[dict[str, Any], Artifact | None]]:
    """Every stage behind the artifacts, nearest first: its name, kind, key and content, and its artifact, None if that was deleted."""
    found: dict[str, tuple[dict[str, Any], Artifact | None]] = {}
    queue: list[tuple[dict[str, Any], Artifact | None]] = [({"name": a.name, "kind": a.kind, "key": a.key, "content": a.content}, a) for a in artifacts]
    while queue:
        entry, artifact = queue.pop(0)
        if entry["key"] in found:
            continue
        found[entry["key"]] = {k: entry[k] for k in ("name", "kind", "key", "content")}, artifact
        for ref in artifact.manifest["inputs"].values() if artifact else ():
            try:
                queue.append((ref, artifact.load(ref["key"])))
            except ArtifactError:
                queue.append((ref, None))
    return list(found.values())


def _lineage(artifacts: list[Artifact]) -> list[dict[str, Any]]:
    """Every stage behind the artifacts, nearest first: name, kind, key, content and counts. A stage whose artifact was deleted is named all the same."""
    return [entry | {"counts": artifact.counts if artifact else {}} for entry, artifact in _behind(artifacts)]


def _data(adapter: Artifact) -> list[dict[str, Any]]:
    """Where the rows behind an adapter were read: the source's name and settings, and whether it is a data set of the hub. See `registry/card.py`."""
    found = []
    for artifact in (a for _, a in _behind([adapter]) if a is not None and a.kind == "ingest"):
        material = artifact.manifest["material"]
        read = {name for value in material["externals"].values() if isinstance(value, dict) for name in value}
        for source in filter(None, [material["params"].get("source"), *material["params"].get("sources", [])]):
            (name, settings), = source.items()
            found.append({"source": name, "settings": settings or {}, "hub": name == "hf_dataset" and settings["path"] in read})
    return found

"""`ftpipe schema`: JSON Schema of pipeline files, for editors."""

from __future__ import annotations

import json
from typing import Any

import typer

from ftpipe.cli._app import app


@app.command()
def schema() -> None:
    """Print the JSON Schema of pipeline files. In an editor: `# yaml-language-server: $schema=ftpipe.schema.json`."""
    typer.echo(json.dumps(pipeline_schema(), indent=1))


def pipeline_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a pipeline file with every kind of stage and its settings."""
    from ftpipe import slots
    from ftpipe.pipeline.spec import Settings

    top = Settings.model_json_schema()
    definitions, kinds = top.setdefault("$defs", {}), []
    slot = slots.slots()["stages"]
    for name in slot.names():
        cls = slot.get(name)
        stage = cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(stage.pop("$defs", {}))
        stage["properties"] = {"kind": {"const": name}} | stage.get("properties", {})
        stage["additionalProperties"] = False
        definitions[f"stage_{name}"] = stage
        kinds.append({"if": {"properties": {"kind": {"const": name}}, "required": ["kind"]}, "then": {"$ref": f"#/$defs/stage_{name}"}})
    top["properties"]["stages"] = {"type": "object", "description": "The stages by name.", "additionalProperties": {"allOf": kinds}}
    top["patternProperties"] = {"^x-": True}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | top

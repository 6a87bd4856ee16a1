"""Reduce LeaderWorkerSet's definition to the JSON schema that the examples are held to.

    python scripts/lws_schema.py leaderworkerset.x-k8s.io_leaderworkersets.yaml v0.10.0

The definition is ``config/crd/bases/…`` of https://github.com/kubernetes-sigs/lws. Kept: types,
accepted values, bounds and required fields of LeaderWorkerSet's own part; the API server drops or
refuses unknown fields, so objects are closed. Left out: descriptions, status, and what is
Kubernetes' own (pod templates, volume claims), which Kubernetes' schema checks.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).parent.parent / "tests" / "unit" / "golden" / "leaderworkerset.schema.json"
KEPT = ("type", "enum", "minimum", "maximum", "required", "items", "anyOf")
KUBERNETES = {
    "leaderTemplate": "object",
    "workerTemplate": "object",
    "volumeClaimTemplates": "array",
}


def reduced(schema: dict[str, Any]) -> dict[str, Any]:
    """A node of the schema without prose, closed where its fields are listed."""
    result = {key: schema[key] for key in KEPT if key in schema}
    if "properties" in schema:
        result["properties"] = {
            name: {"type": KUBERNETES[name]} if name in KUBERNETES else reduced(field)
            for name, field in schema["properties"].items()
        }
        result["additionalProperties"] = False
    return result


def main() -> None:
    """Write the schema of the stored version."""
    definition = yaml.safe_load(Path(sys.argv[1]).read_text())["spec"]
    version = next(v for v in definition["versions"] if v["storage"])
    schema = version["schema"]["openAPIV3Schema"]
    del schema["properties"]["status"]
    result = {"$comment": f"LeaderWorkerSet {sys.argv[2]}; made by scripts/lws_schema.py"}
    result |= reduced(schema)
    result["required"] = ["apiVersion", "kind", "metadata", "spec"]
    group, kind = definition["group"], definition["names"]["kind"]
    result["properties"]["apiVersion"] = {"const": f"{group}/{version['name']}"}
    result["properties"]["kind"] = {"const": kind}
    TARGET.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

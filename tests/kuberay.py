"""What a Kubernetes cluster with the KubeRay operator takes of a `RayJob`, as far as our example goes: a JSON schema.

Fields, types and what is required: KubeRay's API ray.io/v1, of which its CRDs are made (`rayjob_types.go` and
`raycluster_types.go` in ray-operator/apis/ray/v1), and what the operator itself asks of names (`validation.go` in
ray-operator/controllers/ray/utils). Of pods: Kubernetes 1.33, `PodTemplateSpec`. A field that is not here is an error,
also where those would take it: an API server drops fields that it does not know, so a name that is spelled wrong would
do nothing.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
COUNT: Schema = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
NAME: Schema = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 47}
"""A DNS label (RFC 1035), as long as KubeRay lets the name of a job be."""
QUANTITY: Schema = {
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|[MGTPE]|[KMGTPE]i)?$"}]
}


def _object(required: str, **fields: Schema) -> Schema:
    return {"type": "object", "required": required.split(), "properties": fields, "additionalProperties": False}


def _list(of: Schema) -> Schema:
    return {"type": "array", "items": of}


def _map(to: Schema) -> Schema:
    return {"type": "object", "additionalProperties": to}


_CONTAINER = _object(
    "name image",
    name=NAME,
    image=TEXT,
    resources=_object("", requests=_map(QUANTITY), limits=_map(QUANTITY)),
    volumeMounts=_list(_object("name mountPath", name=NAME, mountPath=TEXT)),
)
_VOLUME = _object(
    "name",
    name=NAME,
    persistentVolumeClaim=_object("claimName", claimName=TEXT),
    configMap=_object("", name=NAME),
) | {"minProperties": 2, "maxProperties": 2}  # the name, and one kind of source
_POD = _object("spec", spec=_object("containers", containers={**_list(_CONTAINER), "minItems": 1},
                                    volumes=_list(_VOLUME)))  # fmt: skip
_GROUP = {"rayStartParams": _map({"type": "string"}), "template": _POD}
_CLUSTER = _object(
    "headGroupSpec",
    headGroupSpec=_object("rayStartParams template", **_GROUP),
    workerGroupSpecs=_list(
        _object(
            "groupName minReplicas maxReplicas rayStartParams template",
            groupName=NAME, replicas=COUNT, minReplicas=COUNT, maxReplicas=COUNT, **_GROUP,
        )
    ),
)  # fmt: skip
RAY_JOB = _object(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=_object("name", name=NAME),
    spec=_object(
        "entrypoint rayClusterSpec",
        entrypoint=TEXT,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=_CLUSTER,
    ),
)

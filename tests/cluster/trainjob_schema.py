"""The part of Kubeflow Trainer 2.2's schema (trainer.kubeflow.org/v1alpha1) that templates use, in words of our own.

A checker of fields and types, not a copy of the CRD: a field that is not named here is refused, as a strict API server
does it. `corev1` parts are only checked for being there; Kubernetes' own schema checks the same values in the Job.
"""

from __future__ import annotations

from typing import Any

TEXT, NUMBER, SWITCH, ANY = str, int, bool, object
_CONTAINER = {"name!": TEXT, "env": [ANY], "volumeMounts": [ANY], "securityContext": dict}
_POD = {
    "serviceAccountName": TEXT,
    "volumes": [ANY],
    "initContainers": [_CONTAINER],
    "containers": [_CONTAINER],
    "imagePullSecrets": [ANY],
    "securityContext": dict,
    "nodeSelector": dict,
    "affinity": dict,
    "tolerations": [ANY],
    "schedulingGates": [ANY],
}
"""What a runtime patch may change in a pod; a grace period is not among it in 2.2."""
_METADATA = {"name!": TEXT, "namespace": TEXT, "labels": dict, "annotations": dict}
_PATCH = {
    "manager!": TEXT,
    "time": TEXT,
    "trainingRuntimeSpec": {
        "template": {
            "metadata": dict,
            "spec": {
                "replicatedJobs": [
                    {"name!": TEXT, "template": {"spec": {"template": {"metadata": dict, "spec": _POD}}}},
                ]
            },
        }
    },
}
_TRAINER = {
    "image": TEXT,
    "command": [TEXT],
    "args": [TEXT],
    "env": [{"name!": TEXT, "value": TEXT, "valueFrom": dict}],
    "numNodes": NUMBER,
    "numProcPerNode": NUMBER,
    "resourcesPerNode": {"limits": dict, "requests": dict, "claims": [ANY]},
}
SCHEMAS: dict[str, Any] = {
    "TrainJob": {
        "apiVersion!": TEXT,
        "kind!": TEXT,
        "metadata!": _METADATA,
        "spec!": {
            "runtimeRef!": {"name!": TEXT, "apiGroup": TEXT, "kind": TEXT},
            "initializer": dict,
            "trainer": _TRAINER,
            "runtimePatches": [_PATCH],
            "suspend": SWITCH,
            "activeDeadlineSeconds": NUMBER,
            "managedBy": TEXT,
        },
    },
    "TrainingRuntime": {
        "apiVersion!": TEXT,
        "kind!": TEXT,
        "metadata!": _METADATA,
        "spec!": {
            "mlPolicy": {"numNodes": NUMBER, "torch": dict},
            "podGroupPolicy": dict,
            "template!": {
                "metadata": dict,
                "spec": {"replicatedJobs": [{"name!": TEXT, "template!": {"metadata": dict, "spec": dict}}]},
            },
        },
    },
}


class Invalid(ValueError):
    """A document does not follow the schema."""


def validate(document: dict[str, Any]) -> None:
    """Raises Invalid where a document has an unknown field, one of another type, or lacks one."""
    if document["apiVersion"] != "trainer.kubeflow.org/v1alpha1":
        raise Invalid(f"apiVersion is {document['apiVersion']}")
    _check(document, SCHEMAS[document["kind"]], document["kind"])


def _check(value: Any, schema: Any, path: str) -> None:
    if isinstance(schema, dict):
        _check(value, dict, path)
        known = {name.rstrip("!"): part for name, part in schema.items()}
        for name in value:
            if name not in known:
                raise Invalid(f"{path}.{name} is no field")
            _check(value[name], known[name], f"{path}.{name}")
        for name in schema:
            if name.endswith("!") and name[:-1] not in value:
                raise Invalid(f"{path} lacks {name[:-1]}")
    elif isinstance(schema, list):
        _check(value, list, path)
        for number, item in enumerate(value):
            _check(item, schema[0], f"{path}.{number}")
    elif not isinstance(value, schema) or (schema is NUMBER and isinstance(value, bool)):
        raise Invalid(f"{path} is {value!r}, which is no {schema.__name__}")

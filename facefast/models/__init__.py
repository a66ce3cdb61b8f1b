"""Networks, heads and source weights."""

from facefast.models.backbones import NAMES, STUDENTS
from facefast.models.build import build_model, model_from_source
from facefast.models.face import FaceModel, Prediction
from facefast.models.inherit import inherit
from facefast.models.weights.source import Report, Source, apply_source, load_source

__all__ = [
    "NAMES",
    "STUDENTS",
    "FaceModel",
    "Prediction",
    "Report",
    "Source",
    "apply_source",
    "build_model",
    "inherit",
    "load_source",
    "model_from_source",
]

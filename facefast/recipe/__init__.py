"""What a run is: frozen dataclasses, their JSON form, and `resolve`, which turns a recipe and the facts of the data
into a plan.

Everything a run depends on is a field here; nothing is typed twice. A checkpoint stores the whole, from which a model's
preprocessing and division of photographs are read back.
"""

from facefast.recipe.config import (
    AttributeSpec,
    BinaryConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    Photographs,
    Place,
    Reading,
    TaskConfig,
    is_remote,
)
from facefast.recipe.image import AugmentSpec, ImageSpec
from facefast.recipe.jsonable import from_json, to_json
from facefast.recipe.phase import AdaptConfig, DistillConfig, LossConfig, Phase
from facefast.recipe.plan import Decoding, IndexFacts, PhasePlan, Plan, resolve, within
from facefast.recipe.whole import Recipe

__all__ = [
    "AdaptConfig",
    "AttributeSpec",
    "AugmentSpec",
    "BinaryConfig",
    "DataConfig",
    "Decoding",
    "DistillConfig",
    "EvalConfig",
    "ImageSpec",
    "IndexFacts",
    "LossConfig",
    "ModelConfig",
    "Phase",
    "PhasePlan",
    "Photographs",
    "Place",
    "Plan",
    "Reading",
    "Recipe",
    "TaskConfig",
    "from_json",
    "is_remote",
    "resolve",
    "to_json",
    "within",
]

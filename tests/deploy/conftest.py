"""A face model exported once for all tests of its graph."""

from __future__ import annotations

import onnx
import pytest

from facefast.deploy.package import export
from tests.support import small


@pytest.fixture(scope="session")
def parent(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    """A MobileFaceNet in float32 as it leaves the project, for pictures of 32 pixels."""
    path = tmp_path_factory.mktemp("onnx") / "float.onnx"
    export(small.make_uneven_model(), "onnx", path)
    return onnx.load(path)

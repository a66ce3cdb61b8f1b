"""A face model exported once for all tests of its graph."""

from __future__ import annotations

import onnx
import pytest

from facefast.deploy.onnx_file import network_of
from tests.support import small


@pytest.fixture(scope="session")
def parent() -> onnx.ModelProto:
    """A MobileFaceNet in float32, without heads, for pictures of 32 pixels."""
    return network_of(small.make_uneven_model())  # type: ignore[no-any-return]

"""Which numbers an option takes."""

from __future__ import annotations

import math
from typing import Any

MOST = 2**31 - 1
"""Of whatever is counted: libraries below count in 32 bits."""
LARGEST_SEED = 2**63 - 1


def require(values: Any, prefix: str = "", **limits: tuple[float, float]) -> None:
    """Refuses fields of `values` that lie outside their limits, both ends included, or are no number.

    Args:
        prefix: what stands before a field's name in the error.

    Raises:
        ValueError: with the field, its value and its limits.
    """
    for name, (least, most) in limits.items():
        value = getattr(values, name)
        if not least <= value <= most:  # NaN lies nowhere
            allowed = f"be {least} or more" if math.isinf(most) else f"lie in [{least}, {most}]"
            raise ValueError(f"{prefix}{name} is {value}; it must {allowed}")

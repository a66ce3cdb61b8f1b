"""What a command loads before it does anything."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from facefast import cli

HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "sympy", "triton")
"""The compiler and what it brings along: over a second of a start."""


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_a_command_starts_without_the_compiler(command: str) -> None:
    code = (
        f"import sys, json, facefast.{command}\nprint(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(found.stdout.splitlines()[-1]) == []

"""Prints the requirements of pyproject.toml, one a line; arguments name extras, separated by commas."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = [extra for argument in sys.argv[1:] for extra in argument.split(",")]
print(*project["dependencies"], sep="\n")
for extra in extras:
    print(*project["optional-dependencies"][extra], sep="\n")

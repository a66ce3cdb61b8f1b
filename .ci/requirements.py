"""Prints the requirements of pyproject.toml, one a line; arguments name extras or `build-system`, split at commas."""

import sys
import tomllib
from pathlib import Path

whole = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
extras = whole["project"]["optional-dependencies"] | {"build-system": whole["build-system"]["requires"]}
print(*whole["project"]["dependencies"], sep="\n")
for extra in [extra for argument in sys.argv[1:] for extra in argument.split(",")]:
    print(*extras[extra], sep="\n")

"""`python -m facefast` is the console script."""

from facefast.cli import main

main()

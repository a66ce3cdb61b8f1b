"""Tests notice when what keeps runs whole is taken out: see `mutate`."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import mutate
from tests.support.scale import FULL

FEW = ("pictures of others in empty slots",)
"""The mutations that `make test` tries."""


@pytest.mark.parametrize("name", mutate.MUTATIONS)
def test_every_mutation_still_finds_its_place(name: str) -> None:
    mutation = mutate.MUTATIONS[name]
    text = (mutate.ROOT / mutation.file).read_text(encoding="utf-8")
    assert mutation.old in text
    # A mutant that is no Python would end every test in an error, and show nothing.
    compile(text.replace(mutation.old, mutation.new), mutation.file, "exec")
    for word in mutation.tests.split():
        if ".py" in word:
            file, _, test = word.partition("::")
            assert f"def {test}" in (mutate.ROOT / file).read_text(encoding="utf-8")


@pytest.mark.timeout(1800)
def test_without_a_safeguard_a_test_fails_which_passes_with_it() -> None:
    names = list(mutate.MUTATIONS) if FULL else FEW
    with ThreadPoolExecutor(1) as beside:
        whole = beside.submit(mutate.untouched, names)
        assert mutate.survivors(names) == {}
        code, said = whole.result()
    assert code == 0, said[-3000:]
    print(f"{len(names)} of {len(names)} mutations noticed")

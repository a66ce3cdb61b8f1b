"""What is measured of batch normalisation stands beside its peers and beside a copy of the same rounds."""

from __future__ import annotations

from typing import Any

import bench_norm
import pytest
import torch


def test_every_contender_is_counted_in_copies_of_the_same_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(bench_norm, "record", lambda name, **fields: rows.append(fields))
    bench_norm.report(
        (2, 8, 4, 4),
        "prelu",
        "cpu",
        torch.float32,
        {"facefast": [4.0, 6.0, 10.0], "torch": [8.0, 18.0, 20.0], "copy": [1.0, 2.0, 2.0]},
    )
    found = {row["contender"]: (row["copies"], row["facefast_ratio"]) for row in rows}
    assert found == {"facefast": (4.0, 1.0), "torch": (9.0, 2.0), "copy": (1.0, None)}


@pytest.mark.parametrize("kind", bench_norm.KINDS)
def test_the_copy_takes_turns_with_both_ways_of_every_layer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor that lies as theirs do, and of whose elements none is left out."""
    monkeypatch.setattr(torch, "compile", lambda function: function)
    taken: dict[str, Any] = {}

    def once(runs: dict[str, Any], rounds: int, device: str) -> dict[str, list[float]]:
        taken.update({name: run() for name, run in runs.items()})
        return {name: [1.0] * rounds for name in runs}

    monkeypatch.setattr(bench_norm, "interleaved", once)
    assert list(bench_norm.measure((2, 8, 4, 4), kind, 1, "cpu", torch.float32)) == [
        "facefast",
        "torch",
        "torch.compile",
        "copy",
    ]
    copied = taken["copy"]
    form = torch.contiguous_format if kind.endswith("contiguous") else torch.channels_last
    assert copied.shape == (2, 8, 4, 4) and copied.is_contiguous(memory_format=form)

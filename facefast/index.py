"""The pre-flight, `python -m facefast.index ROOT`: what is on disk and what is wrong with it."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from facefast.data import FAULTS, FaceIndex, read_index
from facefast.data.index import advice
from facefast.recipe import Reading
from facefast.recipe.options import parse
from facefast.runtime import exits, files
from facefast.runtime.exits import DataError
from facefast.runtime.terminal import complain, say

EXAMPLES = 3
"""Names on a line of the table; the JSON report has them all."""
BINS = (1, 2, 3, 5, 10, 20, 50, 100, 1000)
"""Where the bins of the histogram begin, in pictures per identity."""


@dataclass(frozen=True)
class IndexArguments:
    """Flags of `facefast.index`."""

    root: tyro.conf.Positional[str]
    """Folder of photographs, or a .rec, .tar or .npz file."""
    out: Path | None = None
    """Write the index, bad pictures marked, to this .npz file; data.root may name it."""
    format: str = "auto"
    """Layout of root: auto, folder, celeba, afad, lfw, recordio, webdataset or synthetic."""
    json: bool = False
    """Print the whole report as JSON and nothing else."""
    max_bad_fraction: float = Reading.max_bad_fraction
    """More bad pictures than this make the exit code 65."""
    max_pixels: int = Reading.max_pixels
    """Larger pictures count as bad (decompression bombs)."""
    threads: int = 0
    """Reading threads; 0 is one per core."""

    def __post_init__(self) -> None:
        Reading(self.threads, self.max_bad_fraction, self.max_pixels)  # refuses what no reader takes


def findings(index: FaceIndex) -> dict[str, Any]:
    """What the pre-flight finds in a scanned index, as JSON values that name every file."""
    bad = np.flatnonzero(index.faults)
    groups = copies(index)
    sound = index.sound()
    present, counts = np.unique(sound.labels[sound.labels >= 0], return_counts=True)
    ends = (np.argmax(counts), np.argmin(counts)) if len(counts) else ()
    return {
        "root": index.root,
        "pictures": len(index),
        "bad": len(bad),
        "identities": len(present),
        "unlabelled": int(np.count_nonzero(index.labels < 0)),
        "faults": {
            FAULTS[fault]: [index.name(row) for row in bad[index.faults[bad] == fault]]
            for fault in np.unique(index.faults[bad])
        },
        "copies": [_named(index, group) for group in groups],
        "conflicts": [_named(index, group) for group in groups if len(set(index.labels[group].tolist()) - {-1}) > 1],
        "pictures_per_identity": _histogram(counts),
        "most_and_fewest": [[index.class_names[present[k]], int(counts[k])] for k in ends],
        "median_size": [int(np.median(side)) for side in (sound.widths, sound.heights)] if len(sound) else [],
        "turned_by_exif": int(np.count_nonzero(sound.orientations > 1)),
    }


def copies(index: FaceIndex) -> list[NDArray[np.int64]]:
    """Rows of each set of two or more sound pictures with the same bytes, in the index's order."""
    rows = np.flatnonzero(index.hashes.any(axis=1))  # 0 is not scanned, or a fault
    rows = rows[np.lexsort((rows, *index.hashes[rows].T))]
    hashes = index.hashes[rows]
    begins = np.flatnonzero((hashes[1:] != hashes[:-1]).any(axis=1)) + 1
    return sorted((group for group in np.split(rows, begins) if len(group) > 1), key=lambda g: int(g[0]))


def findings_text(found: dict[str, Any]) -> str:
    """The report for a terminal: one count on each line, with the first examples."""
    lines = [(found["pictures"], f"pictures in {found['root']}")]
    lines.append((found["unlabelled"], "without identity"))
    lines.append((found["bad"], f"bad pictures ({found['bad'] / found['pictures']:.2%})"))
    for reason, names in sorted(found["faults"].items(), key=lambda item: -len(item[1])):
        lines.append((len(names), f"  {reason}{advice(reason)}: {_some(names, ', ')}"))
    surplus = sum(len(group) - 1 for group in found["copies"])
    lines.append((surplus, "exact copies" + _examples(found["copies"])))
    lines.append((len(found["conflicts"]), "under two names" + _examples(found["conflicts"])))
    lines.append((found["turned_by_exif"], "turned by EXIF"))
    lines.append((found["identities"], "identities"))
    most = max(found["pictures_per_identity"].values())
    for pictures, count in found["pictures_per_identity"].items():
        if count > 0:
            bar = "#" * round(30 * count / most)
            lines.append((count, f"  with {pictures:>7} pictures  {bar}".rstrip()))
    text = [f"{count:9d}  {what}" for count, what in lines]
    if found["most_and_fewest"]:
        (rich, high), (poor, low) = found["most_and_fewest"]
        ratio = f"imbalance {high / low:g}:1 ({rich} has {high}, {poor} has {low})"
        text.append(f"           {ratio}")
    if found["median_size"]:
        text.append("           median size {}x{}".format(*found["median_size"]))
    return "\n".join(text)


def scan(index: FaceIndex, threads: int, max_pixels: int) -> FaceIndex:
    """`index.scanned`, with a progress bar on a terminal and the rate in pictures per second."""
    start = time.perf_counter()
    with tqdm(total=len(index), unit="pictures", disable=None, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        index = index.scanned(threads, max_pixels, show)
    seconds = time.perf_counter() - start
    rate = len(index) / max(seconds, 1e-9)
    complain(f"read {len(index)} pictures in {seconds:.2f} s, {rate:.0f}/s")
    return index


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(IndexArguments, arguments, "index")
        out = None if given.out is None else files.npz(given.out)
        if out is not None:
            files.require_writable(out)
        index = scan(read_index(given.root, given.format), given.threads, given.max_pixels)
        if out is not None:
            index.save(out, parents=True)
        found = findings(index)
        say(json.dumps(found, indent=2) if given.json else findings_text(found))
        if found["bad"] > given.max_bad_fraction * found["pictures"] or found["bad"] == found["pictures"]:
            reason, (first, *_) = next(iter(found["faults"].items()))
            none_left = found["bad"] == found["pictures"]
            limit = "so that none is left" if none_left else f"above max-bad-fraction {given.max_bad_fraction:g}"
            raise DataError(
                f"{found['bad']} of {found['pictures']} pictures are bad, {limit} (first: {first}, {reason}); "
                "mend or remove them, or raise the limit"
            )
    return outcome.code


def _named(index: FaceIndex, group: NDArray[np.int64]) -> list[list[str | None]]:
    """[file, identity] of each row of a group."""
    return [
        [index.name(row), index.class_names[label] if label >= 0 else None]
        for row, label in zip(group.tolist(), index.labels[group].tolist(), strict=True)
    ]


def _histogram(counts: NDArray[np.int64]) -> dict[str, int]:
    """Identities by the number of their pictures: {"1": .., "2": .., "3-4": .., ...}."""
    names = [f"{a}-{b - 1}" if b - a > 1 else f"{a}" for a, b in zip(BINS, BINS[1:], strict=False)]
    found = np.bincount(np.searchsorted(BINS, counts, side="right") - 1, minlength=len(BINS))
    return dict(zip([*names, f"{BINS[-1]}+"], found.tolist(), strict=True))


def _examples(groups: list[list[list[str | None]]]) -> str:
    """ ": a (X) = b (Y); ..." or nothing."""
    texts = [" = ".join(f"{name} ({who or 'unknown'})" for name, who in group) for group in groups]
    return f": {_some(texts, '; ')}" if texts else ""


def _some(names: list[str], separator: str) -> str:
    more = f" and {len(names) - EXAMPLES} more" if len(names) > EXAMPLES else ""
    return separator.join(names[:EXAMPLES]) + more


if __name__ == "__main__":
    sys.exit(main())

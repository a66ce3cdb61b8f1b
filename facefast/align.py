"""Landmarks for photographs that have none: `python -m facefast.align ROOT --out INDEX [--crops DIR]`.

INDEX.npz is an index as `facefast index --out` writes it, with the landmarks, the box and the quality of the face that
each photograph is of; pictures in which no face was found are marked in it. `--crops DIR` writes the faces themselves,
cut out with the margin that training needs and no larger than a model can use: for photographs of many megapixels,
which every epoch would decode anew. Every command takes INDEX.npz or DIR as its --data.root.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from facefast.data import FaceIndex, read_index
from facefast.data.index import NO_FACE, QUALITIES
from facefast.data.prepare import check_budget, require_sound
from facefast.faces import crops
from facefast.faces.align import with_landmarks
from facefast.faces.detect import Detector, find_detector, upright_sizes
from facefast.faces.frames import recognise
from facefast.faces.landmarks import Found, cache_file, find_landmarks, known
from facefast.recipe import ImageSpec, Reading
from facefast.recipe.options import parse
from facefast.runtime import exits, files, process
from facefast.runtime.exits import DataError
from facefast.runtime.terminal import complain, say

TEMPLATE = "arcface"
"""What the summary compares with, and whose frame is cut out."""


@dataclass(frozen=True)
class AlignArguments:
    """Flags of `facefast.align`."""

    root: tyro.conf.Positional[Path]
    """Folder of photographs, or a .rec, .tar or .npz file."""
    out: Path | None = None
    """Write the index with landmarks to this .npz file."""
    crops: Path | None = None
    """Write the faces, cut out, into this folder."""
    detect: str = "auto"
    """auto keeps landmarks that the data set has and looks for the others by mtcnn; mtcnn, or the .onnx file of YuNet,
    looks for all."""
    format: str = "auto"
    """Layout of root: auto, folder, celeba, afad, lfw, recordio, webdataset or synthetic."""
    size: int = 0
    """Pixels on a side of the pictures that models will be shown, for which --crops is large enough; 0 is 112."""
    max_bad_fraction: float = Reading.max_bad_fraction
    """More unreadable pictures than this make the exit code 65."""
    max_pixels: int = Reading.max_pixels
    """Larger pictures count as bad (decompression bombs)."""
    threads: int = 0
    """Threads that decode and look; 0 is one per core."""
    json: bool = False
    """Print the whole report as JSON and nothing else."""

    def __post_init__(self) -> None:
        if self.out is None and self.crops is None:
            raise ValueError("give --out INDEX for the landmarks, --crops DIR for the faces, or both")
        if self.detect == "none":
            raise ValueError("--detect none would find nothing; leave it out, or name mtcnn or a file of YuNet")
        Reading(self.threads, self.max_bad_fraction, self.max_pixels)  # refuses what no reader takes


def align(index: FaceIndex, detector: Detector, everything: bool, reading: Reading) -> tuple[FaceIndex, Found]:
    """A scanned index with landmarks, and what was found in its sound rows.

    Args:
        everything: also where there are landmarks.
    """
    wanted = index.faults == 0
    if not everything:
        wanted &= ~known(index)
    rows = np.flatnonzero(wanted)
    found = find_landmarks(index, rows, detector, reading, cache_file(index.root, detector))
    return with_landmarks(index, rows, found), found


def findings(index: FaceIndex, found: Found, detector: Detector) -> dict[str, Any]:
    """The report, as JSON values."""
    without = np.flatnonzero(index.faults == NO_FACE)
    shown = np.flatnonzero((index.faults == 0) & known(index))
    report: dict[str, Any] = {
        "root": index.root,
        "detector": detector.key,
        "pictures": len(index),
        "with_landmarks": len(shown),
        "looked_at": len(found),
        "several_faces": int((found.counts > 1).sum()),
        "no_face": [index.name(row) for row in without.tolist()],
        "unreadable": int(((index.faults != 0) & (index.faults != NO_FACE)).sum()),
        "template": "",
    }
    if len(shown):
        assert index.landmarks is not None
        frame = recognise(index.landmarks[shown], upright_sizes(index, shown), ImageSpec(template=TEMPLATE).settled())
        report["template"] = frame.name or ("unknown" if frame.kind == "other" else "")
    if index.quality is not None and np.isfinite(index.quality).any():
        middle = np.nanmedian(index.quality, axis=0)
        report["median"] = {name: round(float(value), 3) for name, value in zip(QUALITIES, middle, strict=True)}
    return report


def findings_text(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    template = {"": "not aligned", "unknown": "aligned to a template of their own"}
    without = report["no_face"]
    named = ": " + ", ".join(without[:3]) + (", ..." if len(without) > 3 else "") if without else ""
    lines = [
        (report["pictures"], f"pictures in {report['root']}"),
        (report["unreadable"], "unreadable (facefast index lists them)"),
        (report["with_landmarks"], "with landmarks"),
        (report["looked_at"], f"looked at by {report['detector'].split('-')[0]}"),
        (report["several_faces"], "with several faces: the largest near the middle is taken"),
        (len(without), f"without a face{named}"),
    ]
    text = [f"{count:9d}  {what}" for count, what in lines]
    text.append(f"           {template.get(report['template'], 'aligned to ' + report['template'])}")
    if "median" in report:
        middle = report["median"]
        text.append(f"           median face {middle['face_size']:.0f} px, sharpness {middle['sharpness']:.0f}")
    return "\n".join(text)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(AlignArguments, arguments, "align")
        image = ImageSpec(size=given.size, template=TEMPLATE).settled()
        if given.out is not None:
            files.require_writable(files.npz(given.out))
        if given.crops is not None:
            files.require_writable(given.crops, folder=True, advice="choose another --crops, or make room")
        with process.start() as run:
            reading = Reading(
                process.decode_threads(given.threads, run.world), given.max_bad_fraction, given.max_pixels
            )
            detector = find_detector(given.detect, run.device)
            index = read_index(given.root, given.format).scanned(reading.threads, reading.max_pixels)
            check_budget(index, reading.max_bad_fraction)
            require_sound(index)
            index, found = align(index, detector, given.detect != "auto", reading)
        report = findings(index, found, detector)
        if given.out is not None:
            index.save(files.npz(given.out), parents=True)
        if report["with_landmarks"] == 0:
            raise DataError(f"no face was found in any of the {len(index)} pictures in {index.root}")
        if given.crops is not None:
            part = index.select((index.faults == 0) & known(index))
            chosen = crops.plan(part, image)
            space = shutil.disk_usage(next(p for p in (given.crops, *given.crops.absolute().parents) if p.exists()))
            complain(
                f"{len(part)} faces of about {np.median(chosen.sizes):.0f} pixels on a side, "
                f"{chosen.bytes / 2**20:.0f} MiB at most ({space.free / 2**20:.0f} are free), into {given.crops}"
            )
            crops.write(part, chosen, given.crops, dataclasses.replace(reading, max_bad_fraction=1.0))
        say(json.dumps(report, indent=2) if given.json else findings_text(report))
    return outcome.code


if __name__ == "__main__":
    sys.exit(main())

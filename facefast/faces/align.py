"""What is done about the faces of photographs before a model sees them: used as they lie, or looked for, or refused.

`--detect` has one meaning in every command. auto takes the data set's landmarks; without them a sample of the
photographs is shown to a detector: those that are aligned to the model's template are taken as they are, those that are
aligned to another one are brought to ours by where faces lie in the sample, all others are looked through. mtcnn or a
file of YuNet looks through all, whatever the data set says. none looks at nothing: the middle of a picture without
landmarks is taken for its face.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from facefast.data import FaceIndex
from facefast.data.index import NO_FACE
from facefast.faces.detect import Detector, find_detector, upright_sizes
from facefast.faces.frames import Frame, recognise
from facefast.faces.landmarks import UNREADABLE, Found, cache_file, find_landmarks
from facefast.recipe import ImageSpec, Reading
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime

SAMPLE = 64
"""Pictures that tell whether a set is aligned."""
FEWEST_FACES = 0.2
"""Part of the sample in which a face must be found, or these are no photographs of faces."""
TICK_SECONDS = 20.0
"""Between two signs of life of the rank that looks for faces: the others' patience in a collective is finite."""
Way = Literal["landmarks", "as they are", "other template", "detected", "not aligned"]


@dataclass(frozen=True)
class How:
    """What was done with a set of photographs."""

    way: Way
    template: str
    """The model's."""
    pictures: int
    detector: str = ""
    """Its key where one was asked for all pictures or for a sample."""
    seen_template: str = ""
    """That of the photographs, where they are aligned to a known one that is not the model's."""
    missing: tuple[str, ...] = ()
    """Pictures in which no face was found: they are left out."""
    several: int = 0
    """Pictures with more than one face: the largest central one is taken."""
    distance: float = 0.0
    """Median distance of the sample's faces from where they are taken to be, in template pixels."""

    def __str__(self) -> str:
        by = f" by {self.detector.split('-')[0]}" if self.detector else ""
        text = {
            "not aligned": "faces: pictures are taken as they are; nothing is aligned",
            "landmarks": f"faces: the data set's landmarks are aligned to {self.template}",
            "as they are": f"faces: the photographs are aligned to {self.template} (a sample looked at{by} lies within "
            f"{self.distance:.1f} template pixels) and are taken as they are",
            "other template": f"faces: the photographs are aligned to {self.seen_template or 'a template'}"
            f"{'' if self.seen_template else ' of their own'}, not to {self.template} (a sample looked at{by} lies "
            f"within {self.distance:.1f} template pixels of its middle); they are brought to {self.template}",
            "detected": f"faces: found{by} in {self.pictures - len(self.missing)} of {self.pictures} photographs and "
            f"aligned to {self.template}",
        }[self.way]
        if self.several:
            text += f"; {self.several} show several faces, of which the largest near the middle is taken"
        if self.missing:
            shown = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
            text += f"; {len(self.missing)} without a face are left out ({shown})"
        return text

    def document(self) -> dict[str, Any]:
        """For model.json."""
        return {"how": self.way, "template": self.seen_template or self.template, "detector": self.detector}


@dataclass
class Locator:
    """Finds out where faces are, and remembers what it did: one for each command, called with each set it reads."""

    image: ImageSpec
    """What the model takes: size and template settled; template auto is a model that takes what there is."""
    detect: str
    """auto, mtcnn, none, or a file of YuNet."""
    run: Runtime
    alone: bool = False
    """Whether rank 0 alone reads the photographs, and the others follow by `Locator.follow`."""
    detector: Detector | None = None
    """The one to ask; by default what `detect` names."""
    keep: bool = True
    """Whether what a detector said is kept in the user's cache."""
    done: list[How] = dataclasses.field(default_factory=list)

    def __call__(self, index: FaceIndex, reading: Reading) -> FaceIndex:
        """The rows of a scanned index that show a face, with landmarks where these pictures need them.

        Raises:
            ValueError: there is no detector where one is needed, or it would change nothing.
            DataError: these are no photographs of faces.
        """
        if self.alone or self.run.world.size == 1:
            located, how = self._locate(index, reading)
        elif self.run.is_main:
            problem: Exception | None = None
            try:
                located, how = self._locate(index, reading)
            except (ValueError, DataError) as error:
                problem = error
            if problem := self.run.broadcast(problem or (located, how)):
                if isinstance(problem, Exception):
                    raise problem
        else:
            answer = self.follow()
            if isinstance(answer, Exception):
                raise answer
            located, how = answer
        self.done.append(how)
        return located

    def follow(self) -> Any:
        """What rank 0 broadcasts after its last sign of life."""
        while (answer := self.run.broadcast(None)) is None:
            pass
        return answer

    def _locate(self, index: FaceIndex, reading: Reading) -> tuple[FaceIndex, How]:
        template, rows = self.image.template, np.arange(len(index))
        named = self.detect not in ("auto", "none")
        if template == "none" and named:
            raise ValueError(
                f"the model takes pictures that are not aligned (template none); detect {self.detect} would change "
                "nothing: leave it out"
            )
        if template == "none" or self.detect == "none" or (template == "auto" and not named):
            way: Way = "landmarks" if index.landmarks is not None and template != "none" else "not aligned"
            return index, How(way, template, len(index))
        if named:
            return self._detected(index, rows, reading)
        if index.landmarks is not None:
            lost = np.flatnonzero(~np.isfinite(index.landmarks).all((1, 2)))
            if len(lost) == 0:
                return index, How("landmarks", template, len(index))
            return self._detected(index, lost, reading)
        return self._by_sample(index, reading)

    def _by_sample(self, index: FaceIndex, reading: Reading) -> tuple[FaceIndex, How]:
        """What a sample spread evenly over the index says about all of it."""
        template, detector = self.image.template, self._asked(index)
        sample = np.unique(np.linspace(0, len(index) - 1, SAMPLE).round().astype(np.int64))
        found = self._find(index, sample, reading)
        seen = np.flatnonzero(found.counts > 0)
        readable = int((found.counts != UNREADABLE).sum())
        if len(seen) <= FEWEST_FACES * readable:
            raise DataError(
                f"a face was found in {len(seen)} of {readable} photographs of {index.root} that were looked at (first: "
                f"{index.name(int(sample[0]))}); give photographs of faces, another detector with --detect, or "
                f"--detect none for pictures that are aligned to {template} already"
            )
        frame = recognise(found.landmarks[seen], upright_sizes(index, sample[seen]), self.image)
        if frame.kind == "ours":
            return index, How("as they are", template, len(index), detector.key, distance=frame.off)
        if frame.kind == "other":
            how = How("other template", template, len(index), detector.key, frame.name, distance=frame.spread)
            return dataclasses.replace(index, landmarks=_laid(index, frame)), how
        return self._detected(index, np.arange(len(index)), reading)

    def _detected(self, index: FaceIndex, rows: NDArray[np.int64], reading: Reading) -> tuple[FaceIndex, How]:
        """The index with a detector's landmarks in `rows`, without those rows that show no face."""
        detector = self._asked(index)
        found = self._find(index, rows, reading)
        marked = with_landmarks(index, rows, found)
        kept = marked.faults != NO_FACE
        missing = tuple(marked.name(row) for row in np.flatnonzero(~kept).tolist())
        if not kept.any():
            raise DataError(
                f"no face was found in any of {len(index)} photographs in {index.root} (first: {missing[0]}); give "
                "photographs of faces, or another detector with --detect"
            )
        several = int((found.counts > 1).sum())
        way: Way = "detected" if len(rows) > len(index) / 2 else "landmarks"
        how = How(way, self.image.template, len(index), detector.key, missing=missing, several=several)
        return marked.select(kept), how

    def _asked(self, index: FaceIndex) -> Detector:
        if self.detector is None:
            try:
                self.detector = find_detector(self.detect, self.run.device)
            except ValueError as error:
                if self.detect != "auto":
                    raise
                raise ValueError(
                    f"the photographs in {index.root} have no landmarks, and whether they are aligned to "
                    f"{self.image.template} is not known: {error}; or --detect FILE with YuNet's .onnx file, or "
                    "--detect none if they are aligned already"
                ) from error
        return self.detector

    def _find(self, index: FaceIndex, rows: NDArray[np.int64], reading: Reading) -> Found:
        assert self.detector is not None
        cores = len(os.sched_getaffinity(0)) if self.run.world.size > 1 else reading.threads  # the others wait
        reading = dataclasses.replace(reading, threads=max(1, cores))
        cache = cache_file(index.root, self.detector) if self.keep else None
        return find_landmarks(index, rows, self.detector, reading, cache, self._ticker())

    def _ticker(self) -> Callable[[], None]:
        last = time.monotonic()

        def tick() -> None:
            nonlocal last
            if self.run.world.size > 1 and time.monotonic() - last > TICK_SECONDS:
                self.run.broadcast(None)
                last = time.monotonic()

        return tick


def with_landmarks(index: FaceIndex, rows: NDArray[np.int64], found: Found) -> FaceIndex:
    """The index with what was found in `rows`; those without a face, or that cannot be decoded, get that fault."""
    columns: dict[str, Any] = {}
    for name in ("landmarks", "boxes", "quality"):
        values, old = getattr(found, name), getattr(index, name)
        new = np.full((len(index), *values.shape[1:]), np.nan, np.float32) if old is None else old.copy()
        new[rows] = values
        columns[name] = new
    faults = index.faults.copy()
    faults[rows[found.counts == 0]] = NO_FACE
    # What cannot be decoded stays without landmarks: the loader meets it too, and counts it.
    return dataclasses.replace(index, faults=faults, **columns)


def _laid(index: FaceIndex, frame: Frame) -> NDArray[np.float32]:
    """[N, 5, 2] where the faces of aligned pictures lie."""
    assert frame.points is not None
    sizes = upright_sizes(index, np.arange(len(index)))
    return (frame.points * sizes[:, None] - 0.5).astype(np.float32)


def detector_path(detect: str) -> Path | None:
    """The file that --detect names, if it names one."""
    return Path(detect) if detect not in ("auto", "none", "mtcnn") else None

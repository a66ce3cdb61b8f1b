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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from facefast.data import FaceIndex
from facefast.data.index import NO_FACE
from facefast.faces import crops
from facefast.faces.detect import Detector, find_detector, look, upright_sizes
from facefast.faces.found import Faces
from facefast.faces.frames import Frame, recognise
from facefast.faces.landmarks import UNREADABLE, Found, cache_file, find_landmarks, known
from facefast.recipe import AugmentSpec, ImageSpec, Reading
from facefast.runtime.exits import DataError, StorageError
from facefast.runtime.process import Runtime
from facefast.runtime.terminal import complain

SAMPLE = 64
"""Pictures that tell whether a set is aligned."""
FEWEST_FACES = 0.2
"""Part of the sample in which a face must be found, or these are no photographs of faces."""
TICK_SECONDS = 20.0
"""Between two signs of life of the rank that looks for faces: the others' patience in a collective is finite."""
Way = Literal["landmarks", "as they are", "own size", "other template", "detected", "not aligned"]


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
    """Pictures with more than one face."""
    every: bool = False
    """Whether all of those are taken; otherwise the largest central one."""
    distance: float = 0.0
    """Median distance of the sample's faces from where they are taken to be, in template pixels."""

    def __str__(self) -> str:
        by = f" by {self.detector.split('-')[0]}" if self.detector else ""
        text = {
            "not aligned": f"faces: none was found{by} in a sample of the photographs"
            if self.detector
            else "faces: pictures are taken as they are; nothing is aligned",
            "landmarks": f"faces: the data set's landmarks are aligned to {self.template}",
            "as they are": f"faces: the photographs are aligned to {self.template} (a sample looked at{by} lies within "
            f"{self.distance:.1f} template pixels) and are taken as they are",
            "own size": f"faces: hardly any was found{by}, but the pictures have the size that the model takes: they "
            f"are taken for faces that are cut out and aligned to {self.template} already",
            "other template": f"faces: the photographs are aligned to {self.seen_template or 'a template'}"
            f"{'' if self.seen_template else ' of their own'}, not to {self.template} (a sample looked at{by} lies "
            f"within {self.distance:.1f} template pixels of its middle); they are brought to {self.template}",
            "detected": f"faces: found{by} in {self.pictures - len(self.missing)} of {self.pictures} photographs and "
            f"aligned to {self.template}",
        }[self.way]
        if self.several:
            taken = "each of which is taken" if self.every else "of which the largest near the middle is taken"
            text += f"; {self.several} show several faces, {taken}"
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
    """Whether rank 0 alone reads the photographs, and what was done goes into a log instead of beside a command's
    output. The other ranks wait while it broadcasts None."""
    detector: Detector | None = None
    """The one to ask; by default what `detect` names."""
    crops: Path | None = None
    """Folder into which faces are cut out of large photographs, for a run that reads them many times."""
    augments: tuple[AugmentSpec, ...] = ()
    """How that run varies them: what it may show must be on the crop."""
    keep: bool = True
    """Whether what a detector said is kept in the user's cache."""
    readable: NDArray[np.bool_] = dataclasses.field(default_factory=lambda: np.ones(0, bool))
    """[N] whether `every_face` could decode a picture that it looked at."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was said of crops."""
    done: list[How] = dataclasses.field(default_factory=list)

    def __call__(self, index: FaceIndex, reading: Reading, *, faceless: bool = False) -> FaceIndex:
        """The rows of a scanned index that show a face, with landmarks where these pictures need them.

        With `faceless` the others stay too, without landmarks: the middle of such a picture is taken.

        Raises:
            ValueError: there is no detector where one is needed, or it would change nothing.
            DataError: these are no photographs of faces.
        """
        if self.alone or self.run.world.size == 1:
            located, how = self._locate(index, reading, faceless)
        else:
            answer: Exception | tuple[FaceIndex, How]
            if self.run.is_main:
                try:
                    answer = self._locate(index, reading, faceless)
                except (ValueError, DataError) as error:
                    answer = error
                self.run.broadcast(answer)
            else:  # what rank 0 broadcasts after its last sign of life
                while (answer := self.run.broadcast(None)) is None:  # type: ignore[assignment]
                    pass
            if isinstance(answer, Exception):
                raise answer
            located, how = answer
        self._note(how)
        return self._cut_out(located, reading) if self.alone else located

    def said(self) -> list[str]:
        """What was done with each set; a model that takes whole pictures needs no word about it."""
        return [*(str(how) for how in self.done if how.template != "none"), *self.notes]

    def _cut_out(self, index: FaceIndex, reading: Reading) -> FaceIndex:
        """Crops of large photographs in their place; the index itself where they are small or there is no space."""
        if self.crops is None or self.image.template in ("none", "auto") or not crops.are_large(index):
            return index
        if not known(index).all():
            return index
        chosen = crops.plan(index, self.image, crops.margin_for(list(self.augments), self.image))
        folder = self.crops / str(len(self.notes))
        size = f"{len(index)} faces, at most {chosen.bytes / 2**20:.0f} MiB"
        try:
            small = crops.write(index, chosen, folder, reading, self._ticker())
        except (StorageError, ValueError) as error:
            self.notes.append(f"faces: large photographs are decoded anew in every epoch: {error}")
            return index
        self.notes.append(f"faces: cut out of large photographs into {folder} ({size}); data.crops never leaves it")
        return small.sound()

    def document(self) -> dict[str, Any] | None:
        """For model.json, of the first set that was read; None before any."""
        return self.done[0].document() if self.done else None

    def every_face(self, index: FaceIndex, reading: Reading) -> tuple[FaceIndex, NDArray[np.int64]]:
        """A row for each face of a scanned index's pictures, and the picture [M] that each belongs to.

        Pictures that are aligned already have one row, their own. Those of a picture come together, the one that it is
        of first; one without a face has none.

        Raises:
            ValueError: as for a call.
        """
        template, named = self.image.template, self.detect not in ("auto", "none")
        rows = np.arange(len(index))
        if not named and (template in ("none", "auto") or self.detect == "none"):
            self._note(How("not aligned", template, len(index)))
            return index, rows
        self._refuse_no_effect()
        detector = self._asked(index)
        seen: dict[int, Faces] = {}
        self.readable = np.ones(len(index), bool)
        sizes = upright_sizes(index, rows)
        sample = np.unique(np.linspace(0, len(index) - 1, SAMPLE).round().astype(np.int64))
        for part in (sample, np.setdiff1d(rows, sample)):
            with tqdm(total=len(part), unit="pictures", desc="faces", disable=None, leave=False) as bar:
                for each in look(index, part, detector, reading):
                    self.readable[each.row] = each.faces is not None
                    seen[each.row] = _main_first(each.faces or Faces.none(), *sizes[each.row].tolist())
                    bar.update()
            shown = np.array([row for row in part.tolist() if len(seen[row])], np.int64)
            if part is sample and not named and len(shown) <= FEWEST_FACES * len(part) and self._has_own_size(index):
                self._note(How("own size", template, len(index), detector.key))
                return index, rows
            if part is sample and not named and len(shown):
                main = np.stack([seen[row].landmarks[0] for row in shown.tolist()])
                frame = recognise(main, sizes[shown], self.image)
                if frame.kind != "none":
                    index, how = self._framed(index, frame)
                    self._note(how)
                    return index, rows
        counts = np.array([len(seen[row]) for row in rows.tolist()])
        owners = np.repeat(rows, counts)
        missing = tuple(index.name(row) for row in np.flatnonzero(counts == 0).tolist())
        self._note(
            How("detected", template, len(index), detector.key, "", missing, int((counts > 1).sum()), every=True)
        )
        faces = [seen[row] for row in rows.tolist()]
        landmarks, boxes = (np.concatenate([getattr(f, name) for f in faces]) for name in ("landmarks", "boxes"))
        return dataclasses.replace(index.select(owners), landmarks=landmarks, boxes=boxes), owners

    def _note(self, how: How) -> None:
        self.done.append(how)
        if self.run.is_main and not self.alone and how.template != "none":
            complain(str(how))

    def _refuse_no_effect(self) -> None:
        if self.image.template == "none":
            raise ValueError(
                f"the model takes pictures that are not aligned (template none); detect {self.detect} would change "
                "nothing: leave it out"
            )

    def _locate(self, index: FaceIndex, reading: Reading, faceless: bool) -> tuple[FaceIndex, How]:
        template, rows = self.image.template, np.arange(len(index))
        named = self.detect not in ("auto", "none")
        if named:
            self._refuse_no_effect()
        if template == "none" or self.detect == "none" or (template == "auto" and not named):
            way: Way = "landmarks" if index.landmarks is not None and template != "none" else "not aligned"
            template = "arcface" if template == "auto" and way == "landmarks" else template  # as a run settles it
            return index, How(way, template, len(index))
        if named:
            return self._detected(index, rows, reading, faceless)
        if index.landmarks is not None:
            lost = np.flatnonzero(~known(index))
            if len(lost) == 0:
                return index, How("landmarks", template, len(index))
            return self._detected(index, lost, reading, faceless)
        return self._by_sample(index, reading, faceless)

    def _by_sample(self, index: FaceIndex, reading: Reading, faceless: bool) -> tuple[FaceIndex, How]:
        """What a sample spread evenly over the index says about all of it."""
        template, detector = self.image.template, self._asked(index)
        sample = np.unique(np.linspace(0, len(index) - 1, SAMPLE).round().astype(np.int64))
        found = self._find(index, sample, reading)
        seen = np.flatnonzero(found.counts > 0)
        readable = int((found.counts != UNREADABLE).sum())
        if len(seen) <= FEWEST_FACES * readable and self._has_own_size(index):
            return index, How("own size", template, len(index), detector.key)
        if faceless and len(seen) == 0:
            return index, How("not aligned", template, len(index), detector.key)
        if len(seen) <= FEWEST_FACES * readable and not faceless:
            raise DataError(
                f"a face was found in {len(seen)} of {readable} photographs of {index.root} that were looked at "
                f"(first: {index.name(int(sample[0]))}); give photographs of faces, another detector with --detect, or "
                f"--detect none for pictures that are aligned to {template} already"
            )
        frame = recognise(found.landmarks[seen], upright_sizes(index, sample[seen]), self.image)
        if frame.kind != "none":
            return self._framed(index, frame)
        return self._detected(index, np.arange(len(index)), reading, faceless)

    def _has_own_size(self, index: FaceIndex) -> bool:
        """Whether each picture has just the size that the model takes, as faces have that were cut out for it."""
        height, width = self.image.shape
        return bool((upright_sizes(index, np.arange(len(index))) == (width, height)).all())

    def _framed(self, index: FaceIndex, frame: Frame) -> tuple[FaceIndex, How]:
        """Pictures that are aligned already, and what was done with them."""
        template, key = self.image.template, self._asked(index).key
        if frame.kind == "ours":
            return index, How("as they are", template, len(index), key, distance=frame.off)
        how = How("other template", template, len(index), key, frame.name, distance=frame.spread)
        return dataclasses.replace(index, landmarks=_laid(index, frame)), how

    def _detected(
        self, index: FaceIndex, rows: NDArray[np.int64], reading: Reading, faceless: bool
    ) -> tuple[FaceIndex, How]:
        """The index with a detector's landmarks in `rows`, without those rows that show no face."""
        detector = self._asked(index)
        found = self._find(index, rows, reading)
        marked = with_landmarks(index, rows, found)
        if faceless:
            marked = dataclasses.replace(marked, faults=index.faults)
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


def _main_first(faces: Faces, width: int, height: int) -> Faces:
    """The faces of a picture of so many pixels, the one that it is of first."""
    if not len(faces):
        return faces
    main = faces.main(width, height)
    return faces.take([main, *(place for place in range(len(faces)) if place != main)])


def _laid(index: FaceIndex, frame: Frame) -> NDArray[np.float32]:
    """[N, 5, 2] where the faces of aligned pictures lie."""
    assert frame.points is not None
    sizes = upright_sizes(index, np.arange(len(index)))
    return np.ascontiguousarray(frame.points * sizes[:, None] - 0.5, np.float32)


def locator(image: ImageSpec, faces: Mapping[str, Any] | None, detect: str, run: Runtime) -> Locator:
    """What finds faces for a model as it found them in training.

    Args:
        image: the pictures that the model takes.
        faces: what model.json says of the faces that it was trained on (`How.document`); None where nothing is known.
        detect: the user's wish; auto is as in training.
    """
    trained = dict(faces or {})
    if detect == "auto" and trained.get("how") == "not aligned" and image.template not in ("none", "auto"):
        detect = "none"
    made = Locator(image, detect, run)
    other = str(trained.get("detector", ""))
    if detect == "auto" and trained.get("how") == "detected" and not other.startswith("mtcnn") and run.is_main:
        complain(
            f"faces: the model was trained on faces found by {other}; mtcnn is asked here: give --detect FILE for the "
            "same detector"
        )
    return made

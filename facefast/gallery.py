"""The enrolled people: `python -m facefast.gallery enroll|search|verify|list|forget GALLERY ...`.

- `enroll GALLERY NAME DIR|PHOTO...` adds a person, `enroll GALLERY DIR` a folder per person, and `enroll GALLERY
  --from-run` those that the model was trained on; copies, small and blurred faces and profiles are refused, each with
  its reason.
- `search GALLERY PHOTO|DIR...` says who of them is in each photograph, or that nobody is.
- `verify GALLERY|MODEL A B` says whether two are one person: photographs, or names of the gallery.
- `list GALLERY` says who is enrolled, `forget GALLERY NAME...` takes people out, their numbers and all.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from facefast.data.index import printable
from facefast.data.walk import loose_photographs
from facefast.deploy import enrolment
from facefast.deploy.gallery import Gallery, enroll, fingerprint, forget, unit
from facefast.deploy.strangers import OWN_ROWS
from facefast.faces.quality import Limits
from facefast.recipe.options import parse
from facefast.recipe.ranges import MOST, require
from facefast.runtime import exits, files, process
from facefast.runtime.process import decode_threads
from facefast.runtime.terminal import complain, say


@dataclass(frozen=True)
class GalleryArguments:
    """`python -m facefast.gallery`."""

    verb: tyro.conf.Positional[Literal["enroll", "search", "verify", "list", "forget"]]
    """What to do."""
    gallery: tyro.conf.Positional[Path]
    """The gallery's file; verify also takes a model."""
    words: tyro.conf.Positional[tuple[str, ...]] = ()
    """enroll: NAME and photographs or folders of them, or a folder of folders; search: photographs or folders; verify:
    two photographs or names; forget: names."""
    model: Path | None = None
    """The run, checkpoint, package or weights file that makes the embeddings; by default the gallery's own."""
    detect: str = "auto"
    """Where faces are: auto finds out whether pictures are aligned as the model wants them, and looks for the largest
    face in the middle where they are not; mtcnn, or the .onnx file of YuNet, looks through all pictures; none takes
    their middle."""
    from_run: bool = False
    """Enroll the people that the model was trained on, by their training pictures."""
    accept: Limits = Limits()
    numbers: Literal["auto", "float32", "float16"] = "auto"
    """Of a new gallery's embeddings; auto is float32. float16 takes half of the space."""
    join: Literal["max", "mean"] = "max"
    """How a search scores a person: by the picture most like the photograph, or by the mean of all."""
    top: int = 1
    """People that a search lists for each photograph."""
    fpir: float = 0.01
    """Part of strangers that a search may name."""
    fmr: float = 0.001
    """Part of pairs of two people that verify may call one."""
    threshold: float | None = None
    """Cosine from which on search gives a name and verify says yes, instead of the one for fpir or fmr."""
    json: bool = False
    """Print JSON: one object, for search one a photograph."""

    def __post_init__(self) -> None:
        require(self, top=(1, MOST), fpir=(0, 1), fmr=(0, 1))
        if self.threshold is not None:
            require(self, threshold=(-1, 1))


_OWN = {
    "enroll": ("model", "from_run", "accept", "numbers", "detect"),
    "search": ("model", "join", "top", "fpir", "threshold", "detect"),
    "verify": ("model", "fmr", "threshold", "detect"),
    "list": (),
    "forget": (),
}
"""Options that a verb has, beside json."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    with exits.exit_codes() as outcome:
        given = parse(GalleryArguments, arguments, "gallery")
        _require_sense(given)
        {"enroll": _enroll, "search": _search, "verify": _verify, "list": _list, "forget": _forget}[given.verb](given)
    return outcome.code


def _require_sense(given: GalleryArguments) -> None:
    """Refuses options without effect and words that are too many or too few."""
    for field in fields(given):
        if field.name in ("verb", "gallery", "words", "json", *_OWN[given.verb]):
            continue
        if getattr(given, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} has no effect on {given.verb}; leave it out")
    if given.threshold is not None and (given.fpir, given.fmr) != (GalleryArguments.fpir, GalleryArguments.fmr):
        raise ValueError("--threshold takes the place of --fpir and --fmr; give one of them")
    needs = {
        "enroll": ("NAME and photographs, a folder per person, or --from-run", bool(given.words) != given.from_run),
        "search": ("photographs or folders of them", bool(given.words)),
        "verify": ("two photographs or names", len(given.words) == 2),
        "list": ("nothing more", not given.words),
        "forget": ("names of people", bool(given.words)),
    }
    what, met = needs[given.verb]
    if not met:
        raise ValueError(f"{given.verb} takes {what} (facefast gallery --help), and was given {len(given.words)} words")


def _embedder(given: GalleryArguments, run: process.Runtime, stored: Gallery | None) -> enrolment.Embedder:
    """By the model that is named, else by the one that the gallery was made with."""
    path = given.model or (Path(stored.document.get("source") or "") if stored is not None else None)
    if path is None or not path.name:
        raise ValueError("nothing tells which model makes the embeddings; give --model")
    if given.model is None and not path.exists():
        raise ValueError(f"{path}, the model that {given.gallery} was made with, is gone; give --model")
    made = enrolment.Embedder.load(path, run, given.detect)
    if stored is not None:
        stored.require_model(fingerprint(made.model))
    return made


def _enroll(given: GalleryArguments) -> None:
    with process.start() as run:
        stored = Gallery(given.gallery) if given.gallery.exists() else None
        embedder = _embedder(given, run, stored)
        name = given.words[0] if len(given.words) > 1 else None
        if given.from_run:
            assert given.model is not None or stored is not None
            source = given.model or Path(stored.document["source"])  # type: ignore[union-attr]
            index = enrolment.people_of_run(source, embedder.faces, decode_threads(0, run.world))
        elif name is not None:
            index = loose_photographs(given.words[1:])
        else:
            index = enrolment.people_of(given.words[0])
        model_path = given.model.absolute() if given.model is not None else ""
        stored, refused = enroll(
            given.gallery,
            enrolment.offer_of(index, embedder, name, given.accept),
            fingerprint(embedder.model),
            thresholds=embedder.thresholds if given.model is not None else None,
            numbers=None if given.numbers == "auto" else given.numbers,
            source=str(model_path),
        )
    kinds = Counter(refusal.kind for refusal in refused)
    if given.json:
        rows = [{"path": index.path(r.row), "kind": r.kind, "why": r.why} for r in refused]
        _print_json({"enrolled": len(index) - len(refused), "refused": rows, **_size(stored)})
    else:
        for refusal in refused:
            say(f"refused {printable(os.fsencode(index.path(refusal.row)))}: {refusal.why}")
        counted = ", ".join(f"{count} by {kind}" for kind, count in sorted(kinds.items())) or "none refused"
        say(f"{len(index) - len(refused)} of {len(index)} pictures enrolled ({counted}); {_sentence(stored)}")
    if len(refused) == len(index) and kinds["quality"]:
        raise exits.DataError(f"none of {len(index)} pictures could be enrolled, see above")


def _search(given: GalleryArguments) -> None:
    stored = Gallery(given.gallery)
    with process.start() as run:
        embedder = _embedder(given, run, stored)
        index = loose_photographs(given.words)
        embeddings, faults = embedder.embed(index)
    threshold, why = given.threshold, ""
    if threshold is None:
        try:
            threshold = stored.naming(given.fpir, given.join).require()
        except ValueError as error:
            why = str(error)
            complain(f"{why}. Names are of the nearest people, whoever the photographs show; give --threshold")
    good = [row for row, fault in enumerate(faults) if not fault]
    found = stored.search(embeddings[good], given.top, given.join)
    places = {row: place for place, row in enumerate(good)}
    for row, fault in enumerate(faults):
        answer: dict[str, Any] = {"path": index.path(row)}
        if fault:
            answer["fault"] = fault
        else:
            people, scores = found.people[places[row]].tolist(), found.scores[places[row]].tolist()
            near = [
                {"name": stored.names[who], "cosine": round(score, 6)}
                for who, score in zip(people, scores, strict=True)
            ]
            known = bool(near) and threshold is not None and scores[0] >= threshold
            answer |= {"name": near[0]["name"] if known else None, "threshold": threshold, "nearest": near}
        if given.json:
            _print_json(answer)
        else:
            say(_line(answer))
    if not good:
        raise exits.DataError(f"none of {len(index)} photographs could be read")


def _line(answer: dict[str, Any]) -> str:
    path = printable(os.fsencode(answer["path"]))
    if "fault" in answer:
        return f"{path}  not read: {answer['fault']}"
    near = "  ".join(f"{person['name']} {person['cosine']:.3f}" for person in answer["nearest"])
    if answer["threshold"] is None:
        return f"{path}  nearest: {near or 'nobody'}"
    return f"{path}  {answer['name'] or 'unknown'}  ({near or 'nobody is enrolled'})"


def _verify(given: GalleryArguments) -> None:
    stored = Gallery(given.gallery) if given.gallery.is_file() and (given.model or _is_gallery(given.gallery)) else None
    with process.start() as run:
        if stored is not None:
            embedder, thresholds = _embedder(given, run, stored), stored.thresholds
        elif given.model is not None:
            raise ValueError(f"{given.gallery} is no gallery, and --model names another model; give one of them")
        else:
            embedder = enrolment.Embedder.load(given.gallery, run, given.detect)
            thresholds = embedder.thresholds
        sides = [_side(word, stored, embedder) for word in given.words]
    cosine = float(sides[0].double() @ sides[1].double())
    threshold, why = given.threshold, ""
    if threshold is None:
        try:
            threshold = thresholds.pair(given.fmr).require()
        except ValueError as error:
            why = str(error)
    same = None if threshold is None else cosine >= threshold
    if given.json:
        _print_json({"same": same, "cosine": round(cosine, 6), "threshold": threshold, "why": why})
    else:
        verdict = {None: f"no verdict: {why}; give --threshold", True: "one person", False: "two people"}[same]
        beside = "" if threshold is None else f", the threshold is {threshold:.3f}"
        say(f"{verdict} (cosine {cosine:.3f}{beside})")


def _is_gallery(path: Path) -> bool:
    try:
        Gallery(path)
    except exits.DataError:
        return False
    return True


def _side(word: str, stored: Gallery | None, embedder: enrolment.Embedder) -> torch.Tensor:
    """[D] of a photograph, or of an enrolled person the mean of their pictures', so that products are mean cosines."""
    if not os.path.exists(word):
        if stored is not None and word in stored.names:
            return stored.template(word)
        raise ValueError(f"{word} is neither a photograph{' nor a name in ' + str(stored.path) if stored else ''}")
    index = loose_photographs([word])
    embeddings, faults = embedder.embed(index)
    if len(index) != 1 or faults[0]:
        raise exits.DataError(
            f"{word} cannot be compared: {faults[0] or f'it holds {len(index)} photographs'}; give one"
        )
    return unit(embeddings)[0]


def _list(given: GalleryArguments) -> None:
    stored = Gallery(given.gallery)
    counts = dict(zip(stored.names, stored.counts.tolist(), strict=True))
    if given.json:
        _print_json({"people": counts, "doubles": stored.doubles(), **_size(stored)})
    else:
        for name, count in counts.items():
            say(f"{count:6d}  {name}")
        doubles = stored.doubles()
        if doubles is None:
            say(f"nobody looked for people under two names: {len(stored)} pictures are more than {OWN_ROWS}")
        for one, other in doubles or ():
            say(f"{one} and {other} look like one person under two names; forget one of them if so")
        say(_sentence(stored))


def _forget(given: GalleryArguments) -> None:
    rows = forget(given.gallery, tuple(dict.fromkeys(given.words)))
    stored = Gallery(given.gallery)
    if given.json:
        _print_json({"forgotten": rows, **_size(stored)})
    else:
        say(f"{rows} pictures forgotten; {_sentence(stored)}")


def _size(stored: Gallery) -> dict[str, Any]:
    return {
        "gallery": str(stored.path),
        "num_people": len(stored.names),
        "num_pictures": len(stored),
        "model": stored.document.get("source", ""),
        "fingerprint": stored.model,
    }


def _sentence(stored: Gallery) -> str:
    return f"{stored.path} holds {len(stored)} pictures of {len(stored.names)} people, embedded by {stored.model[:8]}"


def _print_json(value: dict[str, Any]) -> None:
    say(json.dumps(files.strict(value), allow_nan=False))


if __name__ == "__main__":
    sys.exit(main())

"""The enrolled people: who they are, who of them a face is most like, and who is added or forgotten, without training.

Embeddings are biometric data: a gallery is written only where somebody asks for it, holds neither pictures nor their
paths, and no number of those who are forgotten. Its file is described in `gallery_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from facefast.deploy import gallery_file, strangers
from facefast.evaluation.openset import Join
from facefast.evaluation.thresholds import NamingThreshold, Thresholds
from facefast.models import FaceModel
from facefast.recipe import to_json
from facefast.recipe.options import nearest
from facefast.runtime.exits import DataError

COPY_COSINE = 0.98
"""From here on two pictures are copies of one, saved again, scaled or cropped a little; two photographs of a person
hardly ever come so near."""
MARGIN = 8
"""People beyond those asked for whose scores are taken again in double precision, so that rounding decides nothing."""
Numbers = Literal["float32", "float16"]


class Found(NamedTuple):
    """The best people for Q queries, best first."""

    people: NDArray[np.int64]
    """[Q, k] places in the gallery's names; fewer than k where it has fewer."""
    scores: NDArray[np.float64]
    """[Q, k] cosines."""
    rows: NDArray[np.int64]
    """[Q, k] that person's picture most like the query, as a row of the gallery."""


class Refusal(NamedTuple):
    """A picture that was not enrolled."""

    row: int
    """Of the pictures that were offered."""
    kind: str
    """duplicate or quality."""
    why: str


@dataclass(frozen=True, eq=False)
class Offer:
    """N pictures to enroll."""

    names: Sequence[str]
    """[N] person of each."""
    embeddings: Tensor
    """[N, D] of any length; those of pictures with a fault are not looked at."""
    hashes: NDArray[np.uint64]
    """[N, 2] content hashes, as an index has them; 0 where they are not known."""
    faults: Sequence[str] = ()
    """[N] what speaks against each picture, such as blur or no face; empty for good ones. Nothing does without."""

    def __post_init__(self) -> None:
        counts = {len(self.names), len(self.embeddings), len(self.hashes), len(self.faults or self.names)}
        if len(counts) != 1 or self.hashes.shape != (len(self.names), 2):
            raise ValueError(f"{sorted(counts)} names, embeddings, hashes and faults; give as many of each")
        bad = sorted(name for name in set(self.names) if not name.strip() or not name.isprintable())
        if bad:
            raise ValueError(f"{bad[0]!r} is no name; it must have letters, and only such as can be printed")


def fingerprint(model: FaceModel) -> str:
    """What tells embeddings of one model from those of another: weights without the heads, layers and pictures."""
    said = to_json(model.image) | model.layers()
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("backbone.", "embedding.", "linear_map.")) and not name.endswith("num_batches_tracked"):
            values = tensor.detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)} ".encode())
            digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


class Gallery:
    """A gallery opened for reading; what changes the file later does not change this.

    Embeddings are mapped, not read: they take memory while they are looked at, and the system may take it back.
    """

    def __init__(self, path: str | os.PathLike[str], model: str | None = None) -> None:
        """
        Args:
            path: the file.
            model: fingerprint of the model that queries come from; any will do without it.

        Raises:
            ValueError: there is no gallery, or it is of another model or of a later format.
            DataError: it is damaged.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"there is no gallery {self.path}; facefast gallery enroll makes one")
        self._stored = stored = gallery_file.read(self.path)
        self.document = stored.document
        self.names: tuple[str, ...] = tuple(stored.document["names"])
        self.embeddings = stored.embeddings
        """[N, D], read from the file as they are used."""
        self.people = stored.people
        """[N] place in `names`, never falling."""
        self.hashes = stored.hashes
        """[N, 16] uint8."""
        self.lengths = stored.lengths
        """[P] of each person's sum."""
        self.model = str(stored.document["model"])
        self.thresholds = Thresholds.from_json(stored.document["thresholds"])
        """Of the model."""
        self.require_model(model)

    def require_model(self, model: str | None) -> None:
        """Raises ValueError where `model` is the fingerprint of another one than it was enrolled with."""
        if model is not None and model != self.model:
            raise ValueError(
                f"{self.path} was enrolled with another model ({self.model[:8]}, this one is {model[:8]}), whose "
                "embeddings mean something else; give the one it was made with, or enroll the photographs anew"
            )

    def __len__(self) -> int:
        return len(self.people)

    @property
    def counts(self) -> NDArray[np.int64]:
        """[P] pictures of each person."""
        return np.bincount(self.people, minlength=len(self.names))

    def search(
        self, queries: Tensor, k: int = 1, join: Join = "max", engine: Literal["auto", "torch", "faiss"] = "auto"
    ) -> Found:
        """The best k people for each query, exactly.

        Args:
            queries: [Q, D] of any length.
            k: at least 1.
            join: max scores a person by the picture most like the query, mean by the mean direction of all of theirs.
            engine: auto takes torch; faiss is as exact and looks for max alone. Both give the same answers: the best
                scores are taken again in double precision.

        Raises:
            ValueError: a query has another length or no direction, k is below 1, or faiss is not there or cannot do it.
        """
        if queries.ndim != 2 or queries.shape[1] != self.embeddings.shape[1] or k < 1:
            raise ValueError(
                f"queries {tuple(queries.shape)} and k {k} for embeddings of {self.embeddings.shape[1]} numbers; give "
                "[Q, D] and at least 1"
            )
        asked = unit(queries)
        if not len(asked) or not len(self):
            nobody = np.zeros((len(asked), 0), np.int64)
            return Found(nobody, nobody.astype(np.float64), nobody)
        wanted = min(len(self.names), k + MARGIN)
        found = self._by_faiss(asked, wanted, join) if engine == "faiss" else self._by_torch(asked, wanted, join)
        return self._rescored(asked, found, min(k, len(self.names)), join)

    def _by_torch(self, asked: Tensor, wanted: int, join: Join) -> NDArray[np.int64]:
        """[Q, wanted] the best people."""
        best = torch.zeros(len(asked), 0)  # [Q, up to wanted], falling
        who = torch.zeros(len(asked), 0, dtype=torch.long)
        for rows, people, starts in self.entries(join):
            scores = asked @ rows.T  # [Q, b]
            if best.shape[1] == wanted:
                # Few rows of a block are better than the people found so far; only those are sorted in.
                better = np.flatnonzero(((scores - best[:, -1:]).amax(0) > 0).numpy())
                if not len(better):
                    continue
                scores, people = scores[:, torch.from_numpy(better)], people[better]
                starts = np.flatnonzero(np.diff(people, prepend=-1))
            if len(starts) < len(people):
                scores = torch.from_numpy(np.maximum.reduceat(scores.numpy(), starts, axis=1))
            own = torch.from_numpy(people[starts].astype(np.int64)).expand(len(asked), -1)
            scores = torch.cat([best, scores], 1)
            best, places = scores.topk(min(wanted, scores.shape[1]), dim=1)
            who = torch.cat([who, own], 1).gather(1, places)
        return who.numpy()

    def _by_faiss(self, asked: Tensor, wanted: int, join: Join) -> NDArray[np.int64]:
        """As `_by_torch`, by an exact search for rows: more of them, until they are of enough people."""
        if join != "max":
            raise ValueError(f"faiss looks for single pictures, not for {join}; use engine torch")
        try:
            import faiss
        except ImportError as error:
            raise ValueError("engine faiss needs faiss-cpu; install it, or use torch") from error
        vectors = np.ascontiguousarray(self.embeddings, np.float32)  # no copy, but of float16
        rows = wanted
        while True:
            rows = min(len(self), 4 * rows)
            _, found = faiss.knn(asked.numpy(), vectors, rows, metric=faiss.METRIC_INNER_PRODUCT)
            people = [list(dict.fromkeys(line))[:wanted] for line in self.people[found].tolist()]
            if rows == len(self) or min(map(len, people)) == wanted:
                return np.array(people, np.int64)

    def _rescored(self, asked: Tensor, people: NDArray[np.int64], k: int, join: Join) -> Found:
        scores = np.zeros(people.shape)
        rows = np.zeros(people.shape, np.int64)
        begins, ends = (np.searchsorted(self.people, people, side) for side in ("left", "right"))
        for q, query in enumerate(asked.double().numpy()):
            for place, (begin, end) in enumerate(zip(begins[q].tolist(), ends[q].tolist(), strict=True)):
                own = self.embeddings[begin:end].astype(np.float64)
                cosines = own @ query
                rows[q, place] = begin + int(cosines.argmax())
                scores[q, place] = (
                    cosines.max() if join == "max" else cosines.sum() / max(float(np.linalg.norm(own.sum(0))), 1e-12)
                )
            self._stored.release(0, len(self))  # a look at one row maps many around it
        order = np.lexsort((people, -scores), axis=1)[:, :k]  # of equal scores the first name
        people, rows = np.take_along_axis(people, order, 1), np.take_along_axis(rows, order, 1)
        return Found(people, np.take_along_axis(scores, order, 1), rows)

    def block(self, begin: int, end: int) -> Tensor:
        """[b, D] float32 of the rows from `begin` to `end`."""
        return torch.from_numpy(np.asarray(self.embeddings[begin:end], np.float32))

    def entries(self, join: Join) -> Iterator[tuple[Tensor, NDArray[np.int32], NDArray[np.int64]]]:
        """What a search compares with, a block at a time: rows [b, D], the person of each [b], never falling, and where
        each person begins [p]. Rows are pictures, for mean one a person; nobody is in two blocks."""
        for begin, end in self._blocks():
            people = self.people[begin:end]
            starts = np.flatnonzero(np.diff(people, prepend=-1))
            rows = self.block(begin, end)
            if join == "mean":
                # A sum of rows before the product instead of one of cosines behind it.
                sums = np.add.reduceat(rows.numpy(), starts, axis=0) if len(starts) < len(people) else rows.numpy()
                people, starts = people[starts], np.arange(len(starts))
                rows = torch.from_numpy(sums / np.maximum(self.lengths[people], 1e-12)[:, None])
            yield rows, people, starts
            self._stored.release(begin, end)

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Rows in blocks that end with a person's last."""
        begin = 0
        while begin < len(self):
            end = min(begin + gallery_file.BLOCK, len(self))
            if end < len(self):
                start = int(np.searchsorted(self.people, self.people[end], "left"))
                end = start if start > begin else int(np.searchsorted(self.people, self.people[end], "right"))
            yield begin, end
            begin = end

    def template(self, name: str) -> Tensor:
        """[D] the mean of a person's embeddings, not of length 1: products with it are means of cosines, by which no
        more pairs of two people pass than by single ones; by mean directions 1.5 to 2.8 times as many.

        Raises:
            ValueError: nobody is called that.
        """
        own = self.people == places_of(self.names, [name], self.path)[0]
        return torch.from_numpy(self.embeddings[own].astype(np.float64)).mean(0).float()

    def doubles(self) -> list[tuple[str, str]] | None:
        """People who are probably enrolled under two names; None beyond 20 000 pictures, where nobody looks."""
        return strangers.doubles(self)

    def naming(self, fpir: float, join: Join = "max") -> NamingThreshold:
        """The threshold of naming: found among the enrolled people themselves, each in turn a stranger to the others,
        where they are enough to show the rate, else that of the model, which holds for no more people than it was
        found on. Who is probably enrolled under two names (`doubles`) is no stranger to the other and does not count.

        Raises:
            ValueError: neither knows one.
        """
        return strangers.naming(self, fpir, join)


def enroll(
    path: str | os.PathLike[str],
    offer: Offer,
    model: str,
    *,
    thresholds: Thresholds | None = None,
    numbers: Numbers | None = None,
    source: str = "",
) -> tuple[Gallery, list[Refusal]]:
    """Adds pictures to a gallery, a new one where there is none, and says which were refused.

    Refused are pictures with a fault, and copies: of an enrolled picture (the same content, or nearly the same
    embedding), whosever it is, or of one that comes before it in the offer.

    Args:
        path: the gallery's file.
        offer: the pictures.
        model: fingerprint of the model that the embeddings come from.
        thresholds: of that model; None leaves those of the gallery.
        numbers: of a new gallery; float32 where None.
        source: path of the model, kept so that a search finds it again.

    Returns:
        The gallery, and the refusals in the offer's order.

    Raises:
        ValueError: the gallery is of another model or has other numbers, or a good embedding has no direction.
        DataError: the file is damaged, or not one picture is good enough for a new gallery.
        StorageError: it cannot be written.
    """
    place = Path(path).resolve()  # a link stays, and what it points to is replaced
    with gallery_file.locked(place):
        before = Gallery(place, model) if place.exists() else None
        if before is not None and numbers not in (None, str(before.embeddings.dtype)):
            raise ValueError(f"{place} has numbers of {before.embeddings.dtype}, not {numbers}; leave that out")
        faults = list(offer.faults) or [""] * len(offer.names)
        good = np.flatnonzero([not fault for fault in faults])
        embeddings = unit(offer.embeddings[torch.from_numpy(good)])
        copies = _copies(before, [offer.names[row] for row in good.tolist()], embeddings, _as_bytes(offer.hashes[good]))
        refusals = [Refusal(row, "quality", why) for row, why in enumerate(faults) if why]
        refusals = sorted([*refusals, *(Refusal(int(good[row]), "duplicate", why) for row, why in copies.items())])
        kept = np.setdiff1d(np.arange(len(good)), list(copies))
        if not len(kept):
            if before is not None:
                return before, refusals
            first = f" (first: {refusals[0].why})" if refusals else ""
            raise DataError(f"none of {len(faults)} pictures can be enrolled{first}; give clear ones of one face each")
        old = before.thresholds if before is not None else Thresholds()
        document = {
            "model": model,
            "source": source or (before.document.get("source", "") if before is not None else ""),
            "thresholds": (old if thresholds is None else thresholds).to_json(),
        }
        new = _New(
            [offer.names[row] for row in good[kept].tolist()],
            embeddings[kept].numpy(),
            _as_bytes(offer.hashes[good[kept]]),
        )
        half = before.embeddings.dtype == np.float16 if before is not None else numbers == "float16"
        _rewrite(place, before, None, new, document, half)
    return Gallery(path, model), refusals


def forget(path: str | os.PathLike[str], names: Sequence[str]) -> int:
    """Takes people out of a gallery, their numbers and names and all; returns how many pictures were theirs.

    The file is written anew without them. Copies of it (backups, snapshots of the file system) are not reached.

    Raises:
        ValueError: one of them is not in it, and nobody is forgotten; or another name of the very file would keep them.
        DataError: the file is damaged.
        StorageError: it cannot be written.
    """
    place = Path(path).resolve()
    with gallery_file.locked(place):
        gallery = Gallery(place)
        gone = places_of(gallery.names, names, place)
        if (links := place.stat().st_nlink) > 1:
            raise ValueError(
                f"{place} has {links} names (hard links), and the others would keep who is forgotten; remove them first"
            )
        keep = ~np.isin(gallery.people, gone)
        document = {name: value for name, value in gallery.document.items() if name != "names"}
        _rewrite(place, gallery, keep, None, document, gallery.embeddings.dtype == np.float16)
    return int((~keep).sum())


def unit(embeddings: Tensor) -> Tensor:
    """[N, D] float32 of length 1, on the CPU.

    Raises:
        ValueError: an embedding has no direction.
    """
    values = embeddings.detach().float().cpu()
    lengths = values.norm(dim=1)
    if bad := int((~(lengths > 0) | ~lengths.isfinite()).sum()):
        raise ValueError(f"{bad} of {len(values)} embeddings are zero or not finite; leave out what could not be read")
    return F.normalize(values, dim=1).contiguous()


def places_of(names: Sequence[str], wanted: Sequence[str], path: Path) -> list[int]:
    """Places of names among a gallery's.

    Raises:
        ValueError: one is not there; with the nearest that is.
    """
    places = {name: k for k, name in enumerate(names)}
    absent = [name for name in wanted if name not in places]
    if absent:
        near = nearest(absent[0], names)
        hint = f"the nearest name is {near[0]}" if near else f"facefast gallery list {path} says who is"
        raise ValueError(f"{len(absent)} of {len(wanted)} names are not in {path} (first: {absent[0]}); {hint}")
    return [places[name] for name in wanted]


def _copies(
    before: Gallery | None, names: Sequence[str], embeddings: Tensor, hashes: NDArray[np.uint8]
) -> dict[int, str]:
    """Rows of an offer that are copies of enrolled pictures or of earlier rows, with the reason."""
    why: dict[int, str] = {}
    enrolled: dict[bytes, int] = {}
    if before is not None and len(before):
        found = before.search(embeddings)
        for row in np.flatnonzero(found.scores[:, 0] >= COPY_COSINE).tolist():
            who = before.names[found.people[row, 0]]
            why[row] = f"nearly the same as an enrolled picture of {who} (cosine {found.scores[row, 0]:.3f})"
        enrolled = dict(zip(map(bytes, before.hashes), before.people.tolist(), strict=True))
    offered: dict[bytes, int] = {}
    for row, content in enumerate(map(bytes, hashes)):
        if not any(content):  # not known
            continue
        if before is not None and content in enrolled:
            why[row] = f"already enrolled as a picture of {before.names[enrolled[content]]}"
        elif offered.setdefault(content, row) != row:
            why[row] = f"the same file as a picture of {names[offered[content]]} before it"
    for begin in range(0, len(embeddings), 1024):
        block = embeddings[begin : begin + 1024]
        # Each row with those before it: the first of several copies is kept.
        alike = (block @ embeddings[: begin + len(block)].T).tril(begin - 1) >= COPY_COSINE
        for row in torch.nonzero(alike.any(1)).flatten().tolist():
            others = [other for other in torch.nonzero(alike[row]).flatten().tolist() if other not in why]
            if others:
                cosine = float(block[row] @ embeddings[others[0]])
                reason = f"nearly the same as a picture of {names[others[0]]} before it (cosine {cosine:.3f})"
                why.setdefault(begin + row, reason)
    return why


def _as_bytes(hashes: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(hashes, "<u8").view(np.uint8).reshape(len(hashes), 16)


class _New(NamedTuple):
    names: Sequence[str]
    embeddings: NDArray[np.float32]
    hashes: NDArray[np.uint8]


def _rewrite(
    path: Path,
    before: Gallery | None,
    keep: NDArray[np.bool_] | None,
    new: _New | None,
    document: dict[str, Any],
    half: bool,
) -> None:
    """The kept rows of a gallery and new ones, by name, without holding more than a block of embeddings."""
    old = np.arange(0) if before is None else np.flatnonzero(np.ones(len(before), bool) if keep is None else keep)
    everybody = [before.names[who] for who in before.people[old].tolist()] if before is not None else []
    everybody += new.names if new is not None else ()
    names = sorted(set(everybody))
    numbers = {name: k for k, name in enumerate(names)}
    people = np.array([numbers[name] for name in everybody], np.int32)
    order = np.argsort(people, kind="stable")
    hashes = np.concatenate(
        [
            before.hashes[old] if before is not None else np.zeros((0, 16), np.uint8),
            new.hashes if new is not None else np.zeros((0, 16), np.uint8),
        ]
    )
    width = before.embeddings.shape[1] if before is not None else new.embeddings.shape[1] if new is not None else 0

    def rows(begin: int, end: int) -> NDArray[Any]:
        which = order[begin:end]
        found = np.empty((len(which), width), np.float16 if half else np.float32)
        kept = which < len(old)
        if before is not None:
            found[kept] = before.embeddings[old[which[kept]]]
        if new is not None:
            found[~kept] = new.embeddings[which[~kept] - len(old)]
        return found

    gallery_file.write(path, people[order], hashes[order], {"names": names, **document}, width, half, rows)

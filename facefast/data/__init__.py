"""Photographs in, batches out: what is on disk, which rows come next, and the loader that brings them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from facefast.data.crew import Crew
from facefast.data.formats.afad import read_afad, recognises_afad
from facefast.data.formats.celeba import read_celeba, recognises_celeba
from facefast.data.formats.crops import read_crops, recognises_crops
from facefast.data.formats.folder import read_folder, recognises_folder
from facefast.data.formats.lfw import read_lfw, read_pairs, recognises_lfw
from facefast.data.formats.pairs import TemplateSet, read_pair_list, read_templates
from facefast.data.formats.recordio import read_bin, read_recordio, recognises_recordio
from facefast.data.formats.webdataset import read_webdataset, recognises_webdataset
from facefast.data.index import FAULTS, FaceIndex, PairSet, printable
from facefast.data.loader import Batch, Loader, make_loader
from facefast.data.remote import mirror
from facefast.data.sampler import Parts, Sampler, make_sampler
from facefast.data.walk import is_picture, require_there, top_entries
from facefast.recipe import Reading, is_remote
from facefast.runtime.exits import DataError
from facefast.runtime.untrusted import open_regular, read_npz

__all__ = [
    "FAULTS",
    "READERS",
    "Batch",
    "FaceIndex",
    "Loader",
    "PairSet",
    "Parts",
    "Sampler",
    "TemplateSet",
    "make_loader",
    "make_sampler",
    "read_bin",
    "read_index",
    "read_lfw",
    "read_pair_list",
    "read_pairs",
    "read_templates",
]

READERS: dict[str, Callable[[str | os.PathLike[str]], FaceIndex]] = {
    "celeba": read_celeba,
    "synthetic": read_celeba,  # drawn faces are written in CelebA's layout
    "recordio": read_recordio,
    "webdataset": read_webdataset,
    "lfw": lambda root: read_lfw(root)[0],
    "afad": read_afad,
    "crops": read_crops,
    "folder": read_folder,
}
"""Readers by format."""

_SIGNS: dict[str, Callable[[Path], bool]] = {
    "crops": recognises_crops,
    "celeba": recognises_celeba,
    "recordio": recognises_recordio,
    "webdataset": recognises_webdataset,
    "afad": recognises_afad,
    "lfw": recognises_lfw,
    "folder": recognises_folder,
}
"""How a format is recognised, in the order of asking: folder takes nearly anything."""
_SHARED: dict[str, Callable[[Path, Crew], FaceIndex]] = {
    "recordio": read_recordio,
    "webdataset": read_webdataset,
}
"""Readers that divide what they read among the ranks."""
_CONTAINERS = ("recordio", "webdataset")
"""Formats of single files. One such file beside folders of photographs says nothing about them."""


def read_index(
    root: str | os.PathLike[str],
    format: str = "auto",
    cache: str | os.PathLike[str] | None = None,
    max_pixels: int = Reading.max_pixels,
    crew: Crew | None = None,
) -> FaceIndex:
    """The pictures below `root` and all that its files say about them.

    Args:
        root: folder of a data set, a single .rec or .tar, an index saved as .npz, or the address of shards in an
            object store.
        format: a key of `READERS`; auto recognises it.
        cache: with it the index comes back scanned, and the scan is kept in this .npz file until a
            name, a size, a time of change or a list of the data set differs.
        max_pixels: limit of that scan.
        crew: the ranks that share what can be divided; this process alone without.

    Raises:
        ValueError: there is nothing at `root`, its format is not known, a reader finds a fault, or `cache` is no file.
    """
    place = mirror(os.fspath(root), crew=crew) if is_remote(root) else Path(root)
    require_there(place)
    if place.suffix.lower() == ".npz":
        return FaceIndex.load(place)
    name = _format(place, format)
    index = _SHARED[name](place, crew) if crew is not None and name in _SHARED else READERS[name](place)
    if cache is None:
        return index
    if os.path.lexists(cache) and not os.path.isfile(cache):
        raise ValueError(f"{os.fspath(cache)}, where the scan is to be kept, is no regular file; give another cache")
    state = f"{_state_on_disk(index)} {max_pixels}"
    if _state_of_cache(cache) == state:
        return dataclasses.replace(FaceIndex.load(cache), root=index.root)
    index = index.scanned(max_pixels=max_pixels)
    index.save(cache, state=state)
    return index


def _format(root: Path, format: str) -> str:
    if format in READERS:
        return format
    if format != "auto":
        raise ValueError(f"data format {format!r} is not known; use auto, {', '.join(READERS)}")
    if not root.is_dir() and not (root.is_file() and root.suffix.lower() in (".rec", ".tar")):
        raise ValueError(f"{root} is neither a folder nor a .rec, .tar or .npz file")
    name = next((name for name, recognises in _SIGNS.items() if recognises(root)), None)
    if name in _CONTAINERS and root.is_dir():
        others = [other for other in (*_CONTAINERS, "folder") if other != name and _SIGNS[other](root)]
        if others:
            raise DataError(
                f"{root} may be {name} or {others[0]}: it holds files of the first, and "
                f"{'folders with pictures' if others[0] == 'folder' else 'files of the second'} too; name one with "
                "--data.format, or move the others away"
            )
    if name is not None:
        return name
    entries = top_entries(root)
    found = ", ".join(printable(entry.name) for entry in entries[:5]) or "nothing"
    loose = any(is_picture(entry.name) for entry in entries)
    advice = "put each person's pictures into a folder of their own, or read them without names: " if loose else ""
    raise ValueError(
        f"the layout of {root} is not recognised (it holds {found}); {advice}"
        f"name it with --data.format, {'folder' if loose else 'one of ' + ', '.join(READERS)}"
    )


def _state_on_disk(index: FaceIndex) -> str:
    """Digest of the index as read and of the size and time of change of each of its files."""
    digest = hashlib.blake2b(index.fingerprint().encode(), digest_size=16)
    root = os.fsencode(index.root)
    for path in np.unique(index.paths).tolist():
        try:
            status = os.stat(os.path.join(root, path))
            digest.update(b"%d %d " % (status.st_size, status.st_mtime_ns))
        except OSError:
            digest.update(b"missing ")
    return digest.hexdigest()


def _state_of_cache(cache: str | os.PathLike[str]) -> str | None:
    try:
        with open_regular(cache) as file:
            return str(read_npz(file)["state"])
    except (OSError, KeyError, ValueError):
        return None

"""The one walk over pictures below a folder, and the one answer to which names are pictures.

Every reader and every command asks here, so that none sees other files than the rest:

- A picture is a file with an extension of `EXTENSIONS`, in any case. Names alone are looked at; what a file is, the
  scan tells by its content, and pictures that nothing here decodes are counted there by name.
- Hidden files and folders (a dot first, as in `._1.jpg`) and the folders that systems put beside photographs
  (`SYSTEM_FOLDERS`) are left out. So are companions, `1.seg.png` or `1.thumb.jpg`, with a warning that counts them.
- Links are followed. Below one entry of the folder that is walked, a folder counts once, however many links lead to
  it: circles and fans of links end.
- What cannot be looked into is listed as if it were a picture, and so counts as a bad one: a folder without
  permission, one `MAX_DEPTH` folders down or with a path above `MAX_PATH` bytes, a link that leads nowhere.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Sequence
from enum import Enum, auto
from operator import itemgetter

from facefast.data.index import FaceIndex, printable
from facefast.recipe import is_remote
from facefast.runtime.exits import DataError

DECODED = frozenset(
    b".jpg .jpeg .jpe .jfif .pjpeg .pjp .mpo .png .apng .webp .bmp .dib .tif .tiff .ppm .pgm .pbm .pnm".split()
)
"""Extensions of what is decoded."""
FOREIGN = frozenset(
    b".gif .avif .avifs .heic .heics .heif .hif .jp2 .j2k .j2c .jpf .jpx .jpm .jxl .jxr .wdp .psd .tga .exr .qoi "
    b".dng .nef .nrw .cr2 .cr3 .arw .sr2 .raf .orf .rw2 .pef .srw".split()
)
"""Extensions of pictures that must be converted first."""
EXTENSIONS = DECODED | FOREIGN
MARKS = frozenset(
    b"seg segm segmentation mask masks matte matting alpha parsing depth normal normals heatmap thumb thumbs thumbnail "
    b"preview landmark landmarks label labels".split()
)
"""Words before the extension that name a companion of a picture, as in `1.seg.png`."""
SYSTEM_FOLDERS = frozenset(
    [
        b"__macosx",
        b"@eadir",  # Synology
        b"@tmp",
        b"@recycle",  # QNAP
        b"@recently-snapshot",
        b"#recycle",
        b"#snapshot",
        b"$recycle.bin",
        b"system volume information",
        b"lost+found",
    ]
)
"""Names, in lower case, of folders that systems put beside photographs."""
COPIES = frozenset(
    b".thumbnails .thumbs .@__thumb .cache .picasaoriginals .ipynb_checkpoints .dtrash .trash .trashes .recycle".split()
)
"""Names, in lower case, of hidden folders in which programs keep copies of photographs."""
SPLIT_FOLDERS = {
    b"train": 0, b"training": 0, b"val": 1, b"valid": 1, b"validation": 1, b"test": 2, b"testing": 2,
}  # fmt: skip
"""Names, in lower case, of the parts of a divided data set, with their numbers in `FaceIndex.splits`."""
MAX_DEPTH = 32
MAX_PATH = 1024
"""Of a folder, in bytes, from the folder that is walked; every path of an index takes as much room as the longest."""


class Kind(Enum):
    """What a name says of its file."""

    PICTURE = auto()
    COMPANION = auto()
    OTHER = auto()
    LOST = auto()
    """Not a name's: a folder or a link that cannot be followed."""


def kind_of(name: bytes) -> Kind:
    """What a file's name says: `PICTURE` with a picture's extension, but `COMPANION` after one of `MARKS`."""
    dot = name.rfind(b".")
    if name[dot:].lower() not in EXTENSIONS:
        return Kind.OTHER
    before = name.rfind(b".", 0, dot) + 1
    return Kind.COMPANION if before and name[before:dot].lower() in MARKS else Kind.PICTURE


def is_picture(name: bytes) -> bool:
    """Whether a file name is a picture's: one of `EXTENSIONS`, not hidden, no companion's."""
    return kind_of(name) is Kind.PICTURE and not name.startswith(b".")


def is_left_out(name: bytes) -> bool:
    """Whether a name is hidden or a system folder's."""
    return name.startswith(b".") or name.lower() in SYSTEM_FOLDERS


def split_of(folder: bytes) -> int | None:
    """The number of the split that a folder is named after, or None."""
    return SPLIT_FOLDERS.get(folder.lower())


def entries(folder: bytes) -> list[os.DirEntry[bytes]]:
    """What lies right in a folder, sorted by name, without what is left out.

    Raises:
        OSError: the folder cannot be read.
    """
    return [entry for _, _, entry in _entries(folder)]


def _entries(
    folder: bytes, hidden: list[os.DirEntry[bytes]] | None = None
) -> list[tuple[bytes, Kind, os.DirEntry[bytes]]]:
    """What is not left out; what is hidden goes to `hidden`."""
    found = []
    with os.scandir(folder) as everything:
        for entry in everything:
            name = entry.name
            if name[0] == _DOT:
                if hidden is not None:
                    hidden.append(entry)
                continue
            kind = kind_of(name)
            if kind is Kind.OTHER and name.lower() in SYSTEM_FOLDERS:
                if not os.access(entry.path, os.R_OK | os.X_OK):
                    warnings.warn(
                        f"{printable(entry.path)} cannot be read; it is left out like all folders of that name",
                        stacklevel=3,
                    )
                continue
            found.append((name, kind, entry))
    found.sort(key=_first)  # kinds and entries have no order
    return found


_DOT = ord(".")
_first = itemgetter(0)


def top_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[bytes]]:
    """`entries` of a folder that a user names.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return entries(os.fsencode(folder))
    except OSError as error:
        raise DataError(
            f"{os.fspath(folder)} cannot be read ({error.strerror}); give its readers permission, or name another one"
        ) from error


def require_there(path: str | os.PathLike[str]) -> None:
    """Refuses a path of photographs that leads nowhere, in one way for every command.

    Raises:
        ValueError: nothing is there, or it is no path.
        DataError: nobody may look whether there is.
    """
    if is_remote(path):  # that is found out where it is fetched
        return
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{os.fspath(path)} does not exist; give the folder that holds the photographs") from None
    except PermissionError as error:
        raise DataError(
            f"{os.fspath(path)} cannot be looked at ({error.strerror}); give its readers permission to all folders on "
            "the way to it, or name another one"
        ) from error
    except (OSError, ValueError) as error:  # a link to itself, a name too long, a byte 0
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise ValueError(
            f"{os.fspath(path)} leads nowhere ({why}); give the folder that holds the photographs"
        ) from error


def is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a folder or a link to one; False where nobody can tell."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_pictures(folder: str | bytes | os.PathLike[str], *, descend_first: bool = False) -> Iterator[bytes]:
    """Sorted paths, relative to `folder`, of the pictures below it, and of what cannot be looked into.

    A folder named like a picture is listed for the scan to report, unless it is right in `folder` and `descend_first`
    lets it be an identity. Companions, and hidden folders right in `folder` that hold pictures, are counted in a
    warning at the end.

    Raises:
        DataError: `folder` itself cannot be read.
    """
    companions: list[bytes] = []
    hidden: list[os.DirEntry[bytes]] = []
    for path, kind in _walk(os.fsencode(folder), descend_first, stop_at_pictures=True, hidden=hidden):
        if kind is Kind.PICTURE or kind is Kind.LOST:
            yield path
        elif kind is Kind.COMPANION:
            companions.append(path)
    if companions:
        warnings.warn(
            f"{len(companions)} files below {printable(os.fsencode(folder))} are named like masks, thumbnails and "
            f"other companions of pictures and left out (first: {printable(companions[0])}); rename those that are "
            "photographs",
            stacklevel=2,
        )
    if people := sorted(entry.name for entry in hidden if _holds_pictures(entry)):
        warnings.warn(
            f"{len(people)} folders of pictures in {printable(os.fsencode(folder))} begin with a dot, which hides "
            f"them, and are left out (first: {printable(people[0])}); rename those that are people",
            stacklevel=2,
        )


def _holds_pictures(hidden: os.DirEntry[bytes]) -> bool:
    """Whether a hidden entry is a folder with a picture right inside, and no program's own."""
    if hidden.name.lower() in COPIES or not is_folder(hidden):
        return False
    with contextlib.suppress(OSError), os.scandir(hidden.path) as inside:
        return any(is_picture(entry.name) for entry in inside)
    return False


def list_files(folder: str | os.PathLike[str]) -> Iterator[bytes]:
    """Sorted paths, relative to `folder`, of all files below it but those that are left out.

    Raises:
        DataError: a folder cannot be read or is too deep, or a link leads nowhere.
    """
    for path, kind in _walk(os.fsencode(folder), descend_first=True, stop_at_pictures=False):
        if kind is Kind.LOST:
            raise DataError(
                f"{printable(path)} in {os.fspath(folder)} cannot be looked into: it has no permission, leads nowhere, "
                f"or is more than {MAX_DEPTH} folders down; mend it or move it away"
            )
        yield path


def _walk(
    base: bytes, descend_first: bool, stop_at_pictures: bool, hidden: list[os.DirEntry[bytes]] | None = None
) -> Iterator[tuple[bytes, Kind]]:
    """Files and what cannot be looked into; folders named like a picture are not entered where that is said. What is
    hidden right in `base` goes to `hidden`."""
    top_entries(os.fsdecode(base))
    stack = [(b"", iter(_entries(base, hidden)))]
    top = _identity(base)
    seen = {top}
    while stack:
        prefix, rest = stack[-1]
        for name, kind, entry in rest:
            path = prefix + name
            if not prefix:
                seen = {top}
            if kind is not Kind.OTHER and stop_at_pictures and not (descend_first and not prefix):
                yield path, kind
            elif not is_folder(entry):
                lost = entry.is_symlink() and not os.path.exists(entry.path)
                yield path, Kind.LOST if lost else kind
            else:
                inside = _enter(entry, seen, len(stack) > MAX_DEPTH or len(path) > MAX_PATH)
                if inside is None:
                    yield path, Kind.LOST
                elif inside:
                    stack.append((path + b"/", iter(inside)))
                    break
        else:
            stack.pop()


def _enter(
    folder: os.DirEntry[bytes], seen: set[tuple[int, int]], too_far: bool
) -> list[tuple[bytes, Kind, os.DirEntry[bytes]]] | None:
    """What is in a folder, nothing if it is among those `seen`, None if it cannot be looked into."""
    try:
        here = _identity(folder.path)
        if here in seen:
            return []
        inside = None if too_far else _entries(folder.path)
    except OSError:
        return None
    seen.add(here)
    return inside


def holds_picture(folder: bytes) -> bool:
    """Whether `list_pictures` would list anything, without walking further than to the first."""
    waiting, seen = [(folder, 0)], set()
    while waiting:
        place, depth = waiting.pop()
        try:
            here = _identity(place)
            if here in seen:
                continue
            if depth > MAX_DEPTH:
                return True
            seen.add(here)
            with os.scandir(place) as found:
                for entry in found:
                    if is_left_out(entry.name):
                        continue
                    kind = kind_of(entry.name)
                    if kind is Kind.PICTURE:
                        return True
                    if kind is Kind.OTHER and is_folder(entry):
                        waiting.append((entry.path, depth + 1))
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        return True
        except OSError:
            return True
    return False


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def find_pictures(given: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The photographs that paths and folders name, in that order, folders by the walk above.

    Raises:
        ValueError: a path that is not there or neither of the two, or nothing to look at.
    """
    found: list[str] = []
    paths = [os.fspath(path) for path in given]
    for path in paths:
        require_there(path)
        if os.path.isdir(path):
            found += [os.path.join(path, os.fsdecode(inside)) for inside in list_pictures(path)]
        elif os.path.isfile(path):
            found.append(path)
        else:
            raise ValueError(f"{path} is neither a photograph nor a folder")
    if not found:
        endings = ", ".join(sorted(map(os.fsdecode, DECODED)))
        raise ValueError(f"no photographs in {', '.join(paths)}; they end in {endings}")
    return found


def loose_photographs(given: Sequence[str | os.PathLike[str]]) -> FaceIndex:
    """A scanned index of what `find_pictures` finds."""
    # Loose photographs may lie anywhere: the file system's root is the one folder that holds all of them.
    paths = [os.fsencode(os.path.abspath(path)).lstrip(b"/") for path in find_pictures(given)]
    return FaceIndex.build("/", paths, None, ()).scanned()

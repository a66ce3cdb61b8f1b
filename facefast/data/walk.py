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

import os
import warnings
from collections.abc import Iterator

from facefast.data.index import printable
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
SPLIT_FOLDERS = {
    b"train": 0, b"training": 0, b"val": 1, b"valid": 1, b"validation": 1, b"test": 2, b"testing": 2,
}  # fmt: skip
"""Names, in lower case, of the parts of a divided data set, with their numbers in `FaceIndex.splits`."""
MAX_DEPTH = 32
MAX_PATH = 1024
"""Of a folder, in bytes, from the folder that is walked; every path of an index takes as much room as the longest."""


def is_picture(name: bytes) -> bool:
    """Whether a file name is a picture's: one of `EXTENSIONS`, not hidden, no companion's."""
    return claims_picture(name) and not name.startswith(b".") and not is_companion(name)


def claims_picture(name: bytes) -> bool:
    """Whether a file name has a picture's extension."""
    return name[name.rfind(b".") :].lower() in EXTENSIONS


def is_companion(name: bytes) -> bool:
    """Whether the last word before the extension is one of `MARKS`."""
    parts = name.rsplit(b".", 2)
    return len(parts) == 3 and parts[1].lower() in MARKS


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
    kept = []
    with os.scandir(folder) as found:
        for entry in found:
            if not is_left_out(entry.name):
                kept.append(entry)
            elif not entry.name.startswith(b".") and not os.access(entry.path, os.R_OK | os.X_OK):
                warnings.warn(
                    f"{printable(entry.path)} cannot be read; it is left out like all folders of that name",
                    stacklevel=3,
                )
    return sorted(kept, key=lambda entry: entry.name)


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


def is_folder(entry: os.DirEntry[bytes]) -> bool:
    """Whether an entry is a folder or a link to one; False where nobody can tell."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_pictures(folder: str | bytes | os.PathLike[str], *, descend_first: bool = False) -> Iterator[bytes]:
    """Sorted paths, relative to `folder`, of the pictures below it, and of what cannot be looked into.

    A folder named like a picture is listed for the scan to report, unless it is right in `folder` and `descend_first`
    lets it be an identity. Companions are counted in a warning at the end.

    Raises:
        DataError: `folder` itself cannot be read.
    """
    companions: list[bytes] = []
    for path, is_file in _walk(os.fsencode(folder), descend_first, stop_at_pictures=True):
        if not is_file:
            yield path
        elif claims_picture(path):
            if is_companion(path[path.rfind(b"/") + 1 :]):
                companions.append(path)
            else:
                yield path
    if companions:
        warnings.warn(
            f"{len(companions)} files below {printable(os.fsencode(folder))} are named like masks, thumbnails and "
            f"other companions of pictures and left out (first: {printable(companions[0])}); rename those that are "
            "photographs",
            stacklevel=2,
        )


def list_files(folder: str | os.PathLike[str]) -> Iterator[bytes]:
    """Sorted paths, relative to `folder`, of all files below it but those that are left out.

    Raises:
        DataError: a folder cannot be read or is too deep, or a link leads nowhere.
    """
    for path, is_file in _walk(os.fsencode(folder), descend_first=True, stop_at_pictures=False):
        if not is_file:
            raise DataError(
                f"{printable(path)} in {os.fspath(folder)} cannot be looked into: it has no permission, leads nowhere, "
                f"or is more than {MAX_DEPTH} folders down; mend it or move it away"
            )
        yield path


def _walk(base: bytes, descend_first: bool, stop_at_pictures: bool) -> Iterator[tuple[bytes, bool]]:
    """(path, whether it is a file, or named like a picture where those are not entered); not so are folders and links
    that cannot be followed."""
    stack = [(b"", iter(top_entries(os.fsdecode(base))))]
    top = _identity(base)
    seen = {top}
    while stack:
        prefix, rest = stack[-1]
        entry = next(rest, None)
        if entry is None:
            stack.pop()
            continue
        if not prefix:
            seen = {top}
        path = prefix + entry.name
        enter = not (stop_at_pictures and claims_picture(entry.name)) or (descend_first and not prefix)
        if not (enter and is_folder(entry)):
            lost = enter and entry.is_symlink() and not os.path.exists(entry.path)
            yield path, not lost
            continue
        try:
            here = _identity(entry.path)
            if here in seen:
                continue
            if len(stack) > MAX_DEPTH or len(path) > MAX_PATH:
                yield path, False
                continue
            inside = entries(entry.path)
        except OSError:
            yield path, False
            continue
        seen.add(here)
        stack.append((path + b"/", iter(inside)))


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
                    if claims_picture(entry.name):
                        if not is_companion(entry.name):
                            return True
                    elif is_folder(entry):
                        waiting.append((entry.path, depth + 1))
                    elif entry.is_symlink() and not os.path.exists(entry.path):
                        return True
        except OSError:
            return True
    return False


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino

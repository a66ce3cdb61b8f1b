"""Reads webdataset shards, tar files of `key.jpg` with `key.cls` or `key.json`, in place.

Format: github.com/webdataset/webdataset; nothing is ever extracted, a row is a range of the tar.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from facefast.data.formats.folder import SPLIT_FOLDERS, is_picture
from facefast.data.index import FaceIndex, number_classes
from facefast.runtime.exits import DataError

LABEL_BYTES = 1 << 20  # a longer .cls or .json is no label


def read_webdataset(root: str | os.PathLike[str]) -> FaceIndex:
    """The pictures of all shards: `root` is a .tar, or a folder of them, or of such folders.

    A picture's identity is the text of its `.cls`, or `identity` or else `label` in its `.json`;
    without any the label is -1.

    Raises:
        DataError: a shard is damaged or compressed, holds a link, an absolute name or one with
            `..`, or a label that cannot be understood.
    """
    base = Path(root)
    base, shards = (base.parent, [base]) if base.is_file() else (base, _shards(base))
    paths, offsets, lengths, names, splits = [], [], [], [], []
    for shard in shards:
        inside = os.fsencode(shard.relative_to(base))
        split = SPLIT_FOLDERS.get(os.fsencode(shard.parent.name), 0) if b"/" in inside else 0
        for offset, length, identity in _samples(shard):
            paths.append(inside)
            offsets.append(offset)
            lengths.append(length)
            names.append(identity)
            splits.append(split)
    labels, class_names = number_classes(names, by_value=True)
    return FaceIndex.build(base, paths, labels, class_names, offsets=offsets, lengths=lengths, splits=splits)


def recognises_webdataset(root: Path) -> bool:
    """Whether `root` is a .tar file, or holds one, or a folder that does."""
    return root.suffix == ".tar" or (root.is_dir() and bool(_shards(root)))


def _shards(root: Path) -> list[Path]:
    return sorted([*root.glob("*.tar"), *root.glob("*/*.tar")])


def _samples(shard: Path) -> Iterator[tuple[int, int, str]]:
    """(offset, length, identity) of the pictures of a shard; a key's files may be in any order."""
    pictures: list[tuple[str, int, int]] = []
    in_cls: dict[str, str] = {}
    in_json: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not _is_plain(shard, member):
                    continue
                folder, slash, file = member.name.rpartition("/")
                stem, _, extension = file.partition(".")  # webdataset ends keys at the first dot
                key = folder + slash + stem
                kind = extension.rpartition(".")[2].lower()
                if is_picture(os.fsencode(file)):
                    pictures.append((key, member.offset_data, member.size))
                elif kind in ("cls", "json"):
                    text = _content(shard, tar, member)
                    if kind == "cls":
                        in_cls[key] = text.strip()
                    else:
                        in_json[key] = _identity_in_json(shard, member.name, text)
    except tarfile.TarError as error:
        raise DataError(
            f"{shard} is damaged or no plain tar file ({error}); a compressed shard must be "
            "decompressed first, for pictures are read in place"
        ) from error
    # After the whole shard was read: a key's files may come in any order. Where both exist, .cls decides.
    identities = in_json | in_cls
    for key, offset, length in pictures:
        identity = identities.get(key, "")
        yield offset, length, "" if identity == "-1" else identity


def _is_plain(shard: Path, member: tarfile.TarInfo) -> bool:
    """Whether a member is a file to look at; what could reach out of the shard is refused."""
    outside = member.name.startswith("/") or ".." in member.name.split("/")
    odd = not (member.isfile() or member.isdir()) or member.issparse()
    if outside or odd:
        what = "leads out of the shard" if outside else "is a link or another special file"
        raise DataError(f"{shard} holds {member.name!r}, which {what}; a shard may hold plain files only")
    return member.isfile()


def _content(shard: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > LABEL_BYTES:
        raise DataError(f"{shard}: label file {member.name} has {member.size} bytes; at most {LABEL_BYTES} are read")
    file = tar.extractfile(member)
    assert file is not None, "plain files can be read"
    return file.read().decode("utf-8", "backslashreplace")


def _identity_in_json(shard: Path, name: str, text: str) -> str:
    try:
        facts = json.loads(text)
    except ValueError as error:
        raise DataError(f"{shard}: {name} is no JSON ({error})") from error
    value = facts.get("identity", facts.get("label", "")) if isinstance(facts, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{shard}: the identity in {name} is {value!r}; it must be a name or a whole number")
    return str(value)

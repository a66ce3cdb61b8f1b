"""Reads webdataset shards, tar files of `key.jpg` with `key.cls` or `key.json`, in place.

Format: github.com/webdataset/webdataset; nothing is ever extracted, a row is a range of the tar.
"""

from __future__ import annotations

import json
import os
import posixpath
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from facefast.data.crew import Crew
from facefast.data.formats.tar import Member, members, open_shard
from facefast.data.index import FaceIndex, escaped, number_classes
from facefast.data.walk import Kind, is_folder, is_left_out, kind_of, list_files, split_of, top_entries
from facefast.runtime.exits import DataError

LABEL_BYTES = 1 << 20  # a longer .cls or .json is no label
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
"""Ends of the names of shards that are compressed."""


def read_webdataset(root: str | os.PathLike[str], crew: Crew | None = None) -> FaceIndex:
    """The pictures of all shards: `root` is a .tar, or a folder with shards anywhere below it.

    A picture's identity is the text of its `.cls`, or `identity` or else `label` in its `.json`; without any the label
    is -1. A label belongs to the picture of the same name without the last extension, or else to those of the same key,
    which ends at the first dot. Where a key has a picture that is named by nothing else (`1.jpg`), its others
    (`1.depth.jpg`) are fields of another kind and left out with a warning.

    Args:
        crew: the ranks that share the shards; this process alone without.

    Raises:
        DataError: a shard is damaged or compressed, holds a link, an absolute name or one with `..`, a name twice, or a
            label that cannot be understood or that another one contradicts.
    """
    base = Path(root)
    base, shards = (base.parent, [base]) if base.is_file() else (base, _shards(base))
    names: list[str] = []
    columns: list[tuple[NDArray[np.bytes_], NDArray[np.int64], NDArray[np.uint8]]] = []
    for shard, (places, identities) in zip(shards, (crew or Crew()).each(_read_shard, shards), strict=True):
        inside = os.fsencode(shard.relative_to(base))
        split = split_of(os.fsencode(shard.parent.name)) or 0 if b"/" in inside else 0
        columns.append((np.full(len(places), inside), places, np.full(len(places), split, np.uint8)))
        names += identities
    if not columns:
        raise ValueError(f"no shard in {base}; give the folder that holds the .tar files")
    paths, places, splits = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    _require_one_spelling(base, names)
    labels, class_names = number_classes(names, by_value=True)
    return FaceIndex.build(base, paths, labels, class_names, offsets=places[:, 0], lengths=places[:, 1], splits=splits)


def _read_shard(shard: Path) -> tuple[NDArray[np.int64], list[str]]:
    """[n, 2] offset and length, and the identity, of each picture of a shard."""
    found = [(offset, length, escaped(identity)) for offset, length, identity in _samples(shard)]
    places = np.array([each[:2] for each in found], np.int64).reshape(-1, 2)
    known: dict[str, str] = {}  # one text for all pictures of a person
    return places, [known.setdefault(name, name) for _, _, name in found]


def recognises_webdataset(root: Path) -> bool:
    """Whether `root` is a .tar file, or holds one, or a folder that does."""
    if not root.is_dir():
        return _is_shard(os.fsencode(root.name))
    for entry in top_entries(root):
        if _is_shard(entry.name):
            return True
        if is_folder(entry):
            try:
                if any(_is_shard(name) and not is_left_out(name) for name in os.listdir(entry.path)):
                    return True
            except OSError:  # the reader that is chosen in the end counts it
                continue
    return False


def _is_shard(name: bytes) -> bool:
    return name[-4:].lower() == b".tar"


def _shards(root: Path) -> list[Path]:
    names = [os.fsdecode(path) for path in list_files(root)]
    packed = [name for name in names if name.lower().endswith(PACKED)]
    if packed:
        raise DataError(
            f"{root} holds {len(packed)} compressed shards (first: {_shown(packed[0])}); decompress "
            "them, for pictures are read in place, or move them away"
        )
    return [root / name for name in names if name.lower().endswith(".tar")]


class _Labels(NamedTuple):
    """What the label files of a shard say, by their names without the last extension."""

    cls: dict[str, str]
    json: dict[str, dict[str, str]]


def _samples(shard: Path) -> Iterator[tuple[int, int, str]]:
    """(offset, length, identity) of the pictures of a shard; a key's files may be in any order."""
    pictures: list[tuple[str, Member]] = []
    labels = _Labels({}, {})
    seen: set[str] = set()
    with open_shard(shard) as file:
        for member in members(shard):
            name = _plain_name(shard, member)
            if not member.is_file or any(is_left_out(os.fsencode(part)) for part in name.split("/")):
                continue
            if name in seen:
                raise DataError(
                    f"{shard} holds {name!r} twice; give each picture a name of its own, or write the shard anew "
                    "with the last of them"
                )
            seen.add(name)
            stem, _, kind = name.rpartition(".")
            kind = kind.lower()
            if kind_of(os.fsencode(name)) is not Kind.OTHER:
                pictures.append((stem, member))
            elif kind == "cls":
                labels.cls[stem] = _class_in_text(shard, name, _content(shard, file, member))
            elif kind == "json":
                labels.json[stem] = _facts_in_json(shard, name, _content(shard, file, member))
    pictures = _without_other_fields(shard, pictures)
    used: set[str] = set()
    for stem, member in pictures:
        yield member.offset, member.size, _identity(shard, stem, labels, used)
    idle = sorted(stem for stem in {*labels.cls, *labels.json} - used if _said(shard, stem, labels))
    if idle and pictures:
        warnings.warn(
            f"{shard}: {len(idle)} labels belong to no picture (first: that of {_shown(idle[0])})", stacklevel=3
        )


def _plain_name(shard: Path, member: Member) -> str:
    """A member's name without "./"; what could reach out of the shard is refused."""
    outside = member.name.startswith("/") or ".." in member.name.split("/")
    if outside or member.odd:
        what = "leads out of the shard" if outside else member.odd
        raise DataError(f"{shard} holds {member.name!r}, which {what}; a shard may hold plain files only")
    return posixpath.normpath(member.name)


def _key(stem: str) -> str:
    """webdataset ends keys at the first dot of the file's own name."""
    folder, slash, file = stem.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _without_other_fields(shard: Path, pictures: Sequence[tuple[str, Member]]) -> list[tuple[str, Member]]:
    """The pictures without those that are one more field of a sample: companions by their names, and what lies beside
    the picture that bears the plain key."""
    plain: dict[str, str] = {}
    for stem, member in pictures:
        if stem == _key(stem) and plain.setdefault(stem, member.name) != member.name:
            raise DataError(
                f"{shard} has two pictures of one sample, {_shown(plain[stem])} and {_shown(member.name)}; leave out "
                "the one that is not the photograph, or give each a key of its own"
            )

    def is_field(stem: str, member: Member) -> bool:
        companion = kind_of(os.fsencode(posixpath.basename(member.name))) is Kind.COMPANION
        return companion or (stem not in plain and _key(stem) in plain)

    fields = [member.name for stem, member in pictures if is_field(stem, member)]
    if fields:
        warnings.warn(
            f"{shard}: {len(fields)} pictures are further fields of a sample and left out (first: "
            f"{_shown(fields[0])}); give those that are photographs of their own a key without a dot",
            stacklevel=4,
        )
    return [(stem, member) for stem, member in pictures if not is_field(stem, member)]


def _identity(shard: Path, stem: str, labels: _Labels, used: set[str]) -> str:
    """What the labels of a picture's own name say, or else those of its key; they may not contradict each other."""
    key = _key(stem)
    own, shared = _said(shard, stem, labels), _said(shard, key, labels)
    used |= {stem, key}
    if own and shared and own != shared:
        raise DataError(
            f"{shard} says {_shown(own)} of {_shown(stem)} and {_shown(shared)} of {_shown(key)}, which is the same "
            "sample by webdataset's rule; use keys without dots"
        )
    said = own or shared
    return "" if said == "-1" else said


def _said(shard: Path, stem: str, labels: _Labels) -> str:
    """The identity in the label files of one name, "" without any."""
    facts = labels.json.get(stem, {})
    text = labels.cls.get(stem, "")
    if text and facts.get("label", text) != text and facts.get("identity") != text:
        raise DataError(
            f"{shard} says {_shown(text)} in {_shown(stem)}.cls and {_shown(facts['label'])} in {_shown(stem)}.json; "
            "keep one of them"
        )
    return text or facts.get("identity", facts.get("label", ""))


def _content(shard: Path, file: Any, member: Member) -> str:
    if member.size > LABEL_BYTES:
        raise DataError(
            f"{shard}: label file {_shown(member.name)} has {member.size} bytes; at most {LABEL_BYTES} are read"
        )
    file.seek(member.offset)
    content: bytes = file.read(member.size)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{shard}: {_shown(member.name)} is not in UTF-8 ({error}); write it anew") from error


def _class_in_text(shard: Path, name: str, text: str) -> str:
    text = text.strip()
    if any(not (letter.isprintable() or letter.isspace()) or letter in "\r\n" for letter in text):
        raise DataError(
            f"{shard}: {_shown(name)} holds {_shown(text[:80])}; it must be one line of text with the class, in UTF-8"
        )
    return text


def _facts_in_json(shard: Path, name: str, text: str) -> dict[str, str]:
    """`identity` and `label`, as far as they are there, as text."""
    try:
        facts = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shard}: {_shown(name)} is no JSON ({error})") from error
    found: dict[str, str] = {}
    for key in ("identity", "label"):
        value = facts.get(key, "") if isinstance(facts, dict) else None
        if not isinstance(value, str | int) or isinstance(value, bool):
            if key == "label" and "identity" in found:
                continue  # what is not asked may be anything
            raise DataError(
                f"{shard}: the identity in {_shown(name)} is {value!r:.80}; it must be a name or a whole number"
            )
        if isinstance(facts, dict) and key in facts:
            found[key] = str(value).strip()
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key in found if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"it has {twice!r} twice")
    return found


def _require_one_spelling(base: Path, names: Sequence[str]) -> None:
    """Refuses class numbers of which one is written in two ways, or which stand beside a number that is none."""
    spelled: dict[float, str] = {}
    texts = sorted({name for name in names if name})
    for text in texts:
        try:
            value = float(text) if text.isascii() and "_" not in text else None
        except ValueError:
            continue
        if value is None:
            continue
        if value == value and spelled.setdefault(value, text) != text and max(len(text), len(spelled[value])) < 16:
            raise DataError(f"{base}: class {text!r} is also written {spelled[value]!r}; write it in one way")
        odd = value != value or abs(value) == float("inf") and not text.isdecimal() or value < 0
        if odd and any(other.isdecimal() for other in texts):
            raise DataError(
                f"{base}: class {text!r} is no class number; they are whole and at least -1, which is nobody"
            )


def _shown(name: str) -> str:
    return repr(name)[1:-1][:200]

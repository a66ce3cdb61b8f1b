"""What a finished folder holds: the size and the hash of every file, written last and checked before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from facefast.runtime import files
from facefast.runtime.exits import StorageError

NAME = "manifest.json"
FORMAT = 2
HASHES = {1: "sha256", 2: "xxh3_128"}
"""Of files, by format. They find damage, nobody's intent: a checkpoint is hashed beside updates that want the
processor, and SHA-256 takes forty times as long, much more where the processor has no instruction for it."""


class NewerFormatError(StorageError):
    """A later facefast wrote the folder: it is whole, but not for this one."""


def write(folder: Path, step: int, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes manifest.json with size and hash of everything else in a folder, and a hash of itself.

    Args:
        known: XXH3-128 by file name, of what was hashed while it was written: such a file is not read.
    """
    content = {
        file.name: {"bytes": file.stat().st_size, HASHES[FORMAT]: known.get(file.name) or files.xxh3(file)}
        for file in sorted(folder.iterdir())
        if file.name != NAME
    }
    manifest = {"format": FORMAT, "step": step, "files": content}
    files.write_json(folder / NAME, manifest | {"digest": _digest(manifest)})


def _digest(manifest: dict[str, Any]) -> str:
    """Hex SHA-256 over everything in a manifest but this."""
    text = json.dumps({key: value for key, value in manifest.items() if key != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def verify(path: Path) -> None:
    """Checks every file of a checkpoint or a package against its manifest.

    Raises:
        NewerFormatError: a later facefast wrote it.
        StorageError: naming the file that is missing, has another size or another hash; or the manifest is damaged, in
            whatever way.
    """
    number, entries = _read(path)
    hashed = {1: files.sha256, 2: files.xxh3}[number]
    for name, (size, digest) in entries.items():
        file = path / name
        try:
            found = file.stat().st_size if file.is_file() else "no file"
            if found != size:
                raise StorageError(f"{file} should have {size} bytes, it has {found}")
            if hashed(file) != digest:
                raise StorageError(f"{file} does not match the hash in its manifest: it was changed or damaged")
        except (OSError, ValueError) as error:  # a name that no file can have, a file that cannot be read
            raise error if isinstance(error, StorageError) else StorageError(f"{file}: {error}") from error


def _read(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """Format; size and hash by file name."""
    try:
        text = (path / NAME).read_text(encoding="utf-8")
        manifest = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{path} is not a finished checkpoint: {error}") from error
    # One flipped bit may turn a key, a number or a bracket into anything: what is not as written is not sound.
    keys = set(manifest) if isinstance(manifest, dict) else set()
    if keys - {"digest"} != {"format", "step", "files"}:  # the first checkpoints had no digest
        raise StorageError(f"{path / NAME} is damaged: it holds {', '.join(sorted(keys)) or 'no object'}")
    # Letter by letter too: a manifest that lost its last byte may still be read.
    written = text == json.dumps(manifest, indent=2) + "\n"
    if "digest" in keys and not (written and manifest["digest"] == _digest(manifest)):
        raise StorageError(f"{path / NAME} does not match its own digest: it was changed or damaged")
    if isinstance(manifest["format"], int) and manifest["format"] > FORMAT:
        raise NewerFormatError(
            f"{path} has checkpoint format {manifest['format']}, this facefast reads {FORMAT}; use the facefast that "
            "wrote it, or a later one"
        )
    entries = manifest["files"]
    number = manifest["format"]
    if type(number) is not int or number not in HASHES or not isinstance(entries, dict) or not entries:
        raise StorageError(f"{path / NAME} is damaged: format {number!r}, files {entries!r:.80}")
    key, found = HASHES[number], {}
    for name, entry in entries.items():
        whole = isinstance(entry, dict) and set(entry) == {"bytes", key}
        if not whole or type(entry["bytes"]) is not int or not isinstance(entry[key], str) or Path(name).name != name:
            raise StorageError(f"{path / NAME} is damaged: {name!r:.80} has {entry!r:.80}")
        found[name] = (entry["bytes"], entry[key])
    return number, found

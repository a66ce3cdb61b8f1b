"""Photographs in an object store: their shards are fetched whole into a folder of this machine, and read there.

fsspec knows the stores (s3://, gs://, memory://, ...) and is asked for nothing but a list and bytes. A shard's bytes
are kept under a digest of its address, size and tag (ETag, checksum or time of change, whatever the store gives), so
one that changed is fetched again and one that did not never twice. Folders of hard links give the shards their names
back. A file appears in one step, whole; a fetch that fails leaves nothing behind, one that was killed a hidden part.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from facefast.data.crew import Crew
from facefast.data.formats.webdataset import PACKED
from facefast.runtime import files
from facefast.runtime.exits import DataError, StorageError

SHARDS = (".tar", ".rec", ".idx")
"""Ends of the names of what is fetched."""
TRIES, PAUSE = 3, 2.0
"""How often a shard is asked for, and seconds between."""
BLOCK = 8 << 20
"""Bytes that are asked for at once."""
_TAGS = ("ETag", "etag", "md5Hash", "crc32c", "content_md5", "ino", "LastModified", "last_modified", "mtime", "created")
_in_use: list[int] = []  # locks of the folders that this process reads, until it ends


class Shard(NamedTuple):
    """A file of an object store."""

    address: str
    name: str
    """Its path from the root that was given."""
    size: int
    key: str
    """What its bytes are kept under."""


def mirror(root: str, cache: str | os.PathLike[str] = "", gib: float = 0.0, crew: Crew | None = None) -> Path:
    """The folder, or the file, of this machine in which the shards of an address are.

    Args:
        root: an address of shards: a folder of .tar, a .rec with its .idx, or one such file.
        cache: where they are kept; "" is facefast/remote in the user's cache. Machines may share it.
        gib: GiB that they may take; what no process reads goes, the longest unused first. 0 is what the disk has.
        crew: the ranks that fetch; each has all shards in the end, in its own machine's folder or a shared one.

    Raises:
        ValueError: no such kind of address is known, or a package for it is missing.
        DataError: nothing is there, or nothing may be read, or it holds no shards.
        StorageError: the store does not deliver, or there is no room.
    """
    folder = Path(cache) if cache else _default_cache()
    shards, single = _listed(root)
    named = hashlib.blake2b("\0".join([root, *(shard.key for shard in shards)]).encode(), digest_size=12).hexdigest()
    tree = folder / "trees" / named
    crew = crew or Crew()
    pieces = [(shards, folder, tree, gib, rank, crew.size) for rank in range(crew.size)]
    crew.each(_present, pieces)
    return tree / single if single else tree


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "facefast" / "remote"


def _listed(root: str) -> tuple[list[Shard], str]:
    """The shards below an address, by name; and the name of the only one that is meant, "" for a folder."""
    system, path = _system(root)
    with _answering(root):
        info = system.info(path)
        single = info["type"] == "file"
        found = {path: info} if single else system.find(path, detail=True)
        if single and path.lower().endswith(".rec"):
            listing = path[:-4] + ".idx"
            found |= {listing: system.info(listing)} if system.exists(listing) else {}
    base = path.rpartition("/")[0] if single else path.rstrip("/")
    names = {address: address[len(base) :].lstrip("/") for address in sorted(found)}
    if any(part in ("", ".", "..") for name in names.values() for part in name.split("/")):
        raise DataError(f"{root} has names that lead out of it; give it plain names")
    packed = [name for name in names.values() if name.lower().endswith(PACKED)]
    if packed:
        raise DataError(f"{root} holds {len(packed)} compressed shards (first: {packed[0]}); store them uncompressed")
    shards = []
    for address, name in names.items():
        if not name.lower().endswith(SHARDS):
            continue
        size, tag = int(found[address]["size"]), [str(found[address].get(word, "")) for word in _TAGS]
        text = "\0".join([root.partition("://")[0], address, str(size), *tag])
        shards.append(Shard(address, name, size, hashlib.blake2b(text.encode(), digest_size=20).hexdigest()))
    if not shards:
        first = ", ".join(list(names.values())[:3]) or "nothing"
        raise DataError(
            f"{root} holds no shard (it has {first}); of an object store {', '.join(SHARDS)} are read: pack the "
            "photographs into them, or copy them to a disk"
        )
    return [shard._replace(address=_full(root, shard.address)) for shard in shards], (
        os.path.basename(path) if single else ""
    )


def _full(root: str, address: str) -> str:
    return address if "://" in address else f"{root.partition('://')[0]}://{address}"


def _system(address: str) -> tuple[Any, str]:
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(f"{address} needs fsspec: pip install 'facefast[remote]'") from error
    try:
        system, path = fsspec.core.url_to_fs(address, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{address} cannot be read: {error}; each kind of store has a package for fsspec: pip install s3fs for "
            "s3://, gcsfs for gs://"
        ) from error
    return system, path


@contextlib.contextmanager
def _answering(address: str) -> Iterator[None]:
    """Names what an object store answers."""
    try:
        yield
    except (StorageError, DataError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{address} is not there; give the address of a folder of shards, or of one") from error
    except PermissionError as error:
        raise DataError(f"{address} may not be read ({error}); give this process the store's credentials") from error
    except Exception as error:  # each store has errors of its own
        raise StorageError(
            f"{address} cannot be fetched ({type(error).__name__}: {error}); the same command tries again"
        ) from error


def _present(piece: tuple[list[Shard], Path, Path, float, int, int]) -> None:
    """Sees to it that all shards are in a folder; those that another process fetches are waited for at the end."""
    shards, folder, tree, gib, rank, size = piece
    blobs = folder / "shards"
    with files.storing(folder, what="the cache of remote shards "):
        for place in (blobs, tree):
            place.mkdir(parents=True, exist_ok=True)
        lock = os.open(tree, os.O_RDONLY)
        _in_use.append(lock)
        _lock(lock, fcntl.LOCK_SH)
        os.utime(tree)
        start = len(shards) * rank // size
        missing = [shard for shard in (*shards[start:], *shards[:start]) if not _kept(blobs, shard)]
        _make_room(folder, shards, missing, gib)
        needed = sum(shard.size for shard in missing)
        with tqdm(total=needed, unit="B", unit_scale=True, desc="fetching", disable=None, leave=False) as bar:
            for wait in (False, True):
                missing = [shard for shard in missing if not _fetched(blobs, shard, bar, wait)]
        for shard in shards:
            link = tree / shard.name
            link.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                os.link(blobs / shard.key, link)


def _kept(blobs: Path, shard: Shard) -> bool:
    try:
        return (blobs / shard.key).stat().st_size == shard.size
    except OSError:
        return False


def _fetched(blobs: Path, shard: Shard, bar: Any, wait: bool) -> bool:
    """Fetches a shard, unless another process does: that is waited for only with `wait`."""
    name = blobs / f"{shard.key}.lock"
    descriptor = os.open(name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            return False
        if not _kept(blobs, shard):
            for part in blobs.glob(f".{shard.key}.*"):  # of one that was killed: nobody else fetches it now
                part.unlink(missing_ok=True)
            _fetch(blobs / shard.key, shard, bar)
        with contextlib.suppress(OSError):
            name.unlink()
        return True
    finally:
        os.close(descriptor)


def _fetch(path: Path, shard: Shard, bar: Any) -> None:
    for left in reversed(range(TRIES)):
        try:
            with files.replacing(path, shard.size) as aside:
                _copy(shard, aside, bar)
            return
        except StorageError:
            if left == 0:
                raise
            time.sleep(PAUSE)


def _copy(shard: Shard, aside: Path, bar: Any) -> None:
    system, path = _system(shard.address)
    arrived = 0
    with open(aside, "wb") as file:
        # Only what the store does is the store's fault: to write is the disk's.
        with _answering(shard.address):
            source = system.open(path, "rb", block_size=BLOCK, cache_type="none")
        with contextlib.closing(source):
            while True:
                with _answering(shard.address):
                    block = source.read(BLOCK)
                if not block:
                    break
                arrived += len(block)
                file.write(block)
                bar.update(len(block))
    if arrived != shard.size:
        raise StorageError(
            f"{shard.address} has {shard.size} bytes and {arrived} arrived; the same command tries again, and where "
            "that does not help it is damaged: store it anew"
        )


def _make_room(folder: Path, shards: Sequence[Shard], missing: Sequence[Shard], gib: float) -> None:
    """Removes what no process reads, the longest unused first, until what is missing may be fetched."""
    limit, wanted = gib * 2**30, sum(shard.size for shard in shards)
    if gib and wanted > limit:
        raise StorageError(
            f"the shards take {wanted / 2**30:.3g} GiB, above data.cache_gib {gib:g}; raise it, or give fewer shards"
        )
    needed = sum(shard.size for shard in missing)
    keys = {shard.key for shard in shards}

    def held() -> dict[Path, int]:
        found = {}
        for path in (folder / "shards").iterdir():
            with contextlib.suppress(OSError):
                if "." not in path.name:
                    found[path] = path.stat().st_size
        return found

    def too_much() -> bool:
        free = files.free_bytes(folder)
        above = bool(gib) and sum(held().values()) + needed > limit
        return above or (free is not None and free < needed)

    trees = sorted((folder / "trees").iterdir(), key=lambda path: path.stat().st_mtime)
    while needed and too_much() and trees:
        _remove_unused(trees.pop(0))
        for path in held():
            with contextlib.suppress(OSError):
                if path.stat().st_nlink == 1 and path.name not in keys:
                    path.unlink()


def _remove_unused(tree: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(tree, os.O_RDONLY)
        try:
            if _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
                shutil.rmtree(tree, ignore_errors=True)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool:
    """Whether a lock was given; file systems without locks give any, where two processes may fetch the same twice."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            raise
    return True

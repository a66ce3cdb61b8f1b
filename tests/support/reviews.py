"""Reviews to be gone through: made-up findings among small pictures, and a server for them."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

from facefast.data import FaceIndex, read_index
from facefast.data.corrections import Correction, Label
from facefast.labels.review.items import Item, Review
from facefast.labels.review.server import serve
from facefast.recipe import Photographs
from tests.support.pictures import encode, smooth_picture

HOSTILE = ("<img src=x onerror=alert(1)>", "a\"b'c`${1}", "שלום \u202etxt.exe", "two\nlines", "&lt;b&gt;")
"""Names, as folders are called, that a page could take for something else."""
KINDS = ("wrong_label", "wrong_label", "duplicate", "merge")
"""Of the findings, in turns."""


def draw(root: Path, people: tuple[str, ...], pictures: int = 6) -> FaceIndex:
    """People with pictures of their own, a folder each."""
    for who, name in enumerate(people):
        (root / name).mkdir(parents=True)
        for number in range(pictures):
            content = encode(smooth_picture(48, 48, 100 * who + number), "PNG")
            (root / name / f"{number}.png").write_bytes(content)
    return read_index(root).scanned()


def audited(index: FaceIndex, count: int) -> Review:
    """An audit with `count` findings; each wrong label and each copy is about a picture of its own while there are
    enough."""
    items = []
    for number in range(count):
        kind, row = KINDS[number % len(KINDS)], number % len(index)
        label = int(index.labels[row])
        other = (label + 1) % index.num_classes
        others = [k for k in range(len(index)) if index.labels[k] == other][:4]
        mates = [k for k in range(len(index)) if index.labels[k] == label and k != row][:4]
        person, suggested = index.class_names[label], index.class_names[other]
        path = index.name(row) if count <= len(index) else f"{index.name(row)}#{number}"
        action = {"wrong_label": "relabel", "duplicate": "drop", "merge": "merge"}[kind]
        line = Correction(kind, path, person, suggested, action, 0.9, 0.1, 0.8, index.name(others[0]))
        items.append(Item(kind, [row], mates, others, person, suggested, 0.9, 0.1, 0.8, 1, dataclasses.asdict(line)))
    return Review("audit", Photographs(index.root), index, tuple(items))


def grouped(index: FaceIndex) -> Review:
    """A clustering of pictures without names, which found each person as one group."""
    names = [f"cluster-{label + 1:04d}" for label in range(index.num_classes)]
    nameless = dataclasses.replace(index, labels=index.labels * 0 - 1, class_names=())
    items = []
    for label, name in enumerate(names):
        rows = [row for row in range(len(index)) if index.labels[row] == label]
        other = (label + 1) % len(names)
        others = [row for row in range(len(index)) if index.labels[row] == other]
        items.append(Item("group", rows, [], others, name, names[other], 0.9, 0.8, 0.4, len(rows)))
    proposed = tuple(Label(index.name(row), names[int(index.labels[row])], 0.9) for row in range(len(index)))
    return Review("label", Photographs(index.root), nameless, tuple(items), proposed)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a saved review's page; who enters this ends the review by its page, or the end of the block
    does."""
    addresses: queue.Queue[str | BaseException] = queue.Queue()

    def run() -> None:
        try:
            serve(folder, 0, addresses.put)
        except BaseException as error:
            addresses.put(error)

    thread = threading.Thread(target=run)
    thread.start()
    address = addresses.get(timeout=60)
    if isinstance(address, BaseException):
        raise address
    try:
        yield address
    finally:
        with contextlib.suppress(OSError):
            end(address)
        thread.join(60)
    assert not thread.is_alive()


def end(address: str) -> None:
    """What the button Done does."""
    from urllib.request import Request, urlopen

    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{address}done", b"{}", headers), timeout=30) as answer:
        answer.read()

"""The ranks of one run: how they find each other, compare what must be alike, and notice that one no longer answers.

They talk by way of a key-value store (torch's TCPStore, kept by torchrun or by rank 0), which goes on answering while
every main thread waits in a collective operation.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from facefast.runtime import exits, files, terminal

OnLost = Callable[[int, str], None]
"""Told the exit code and the reason, in a thread, before the process ends with that code."""

LEAST_PATIENCE = 60.0
"""Seconds that every rank is given to arrive, however short the limit is: imports are slow on a cold disk."""
LAST_WORDS = 5.0
"""Seconds that a process which ends for want of an answer takes to say so."""
FAREWELL = 10.0
"""Seconds for which rank 0, having failed, keeps the store for others to read why: busy machines are slow to ask."""
IDLE = 1e-4
"""Part of one core; a Python thread that uses less of it does nothing."""
POLLING = 1e-2
"""The same of a whole process: threads of libraries look around all the time."""
PACKAGES = ("facefast", "nvidia-dali-cuda130", "numpy")
SHOWN = 10
"""Differences in a message."""
WATCHERS = "watch"
"""How the names of threads begin that look around without working."""
LOST_CONNECTION = re.compile(r"gloo|NCCL|[Cc]onnection (closed|reset|refused)|[Bb]roken pipe")


class Place(NamedTuple):
    """Where the ranks' store is."""

    host: str
    port: int
    by_torchrun: bool
    """Whether torchrun keeps it; rank 0 does otherwise."""
    prefix: str = ""
    """Of its keys, so that a restart by torchrun, whose store stays, finds none of those before."""

    def __str__(self) -> str:
        keeper = "torchrun" if self.by_torchrun else "rank 0"
        return f"{keeper}, which keeps the ranks' store at {self.host}:{self.port},"

    def open(self, seconds: float, keeps: bool = False) -> Store:
        """A connection of its own, whose requests wait so many seconds; `keeps` makes the store."""
        limit = datetime.timedelta(seconds=seconds)
        store = TCPStore(self.host, self.port, None, keeps, limit, wait_for_workers=False, multi_tenant=True)
        return PrefixStore(f"facefast/{self.prefix}", store)


class Rank(NamedTuple):
    """A process of the run, as messages name it."""

    number: int
    host: str
    process: int

    def __str__(self) -> str:
        return f"rank {self.number} (host {self.host}, process {self.process})"


@functools.cache
def installed() -> dict[str, str]:
    """What runs: versions, and a digest of facefast's own source files, which may differ under one version."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    found = {"version of torch": str(torch.__version__), "digest of facefast's source files": digest.hexdigest()[:16]}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[f"version of {name}"] = importlib.metadata.version(name)
    return found


def difference(facts: Sequence[tuple[Rank, Mapping[str, Any]]]) -> str:
    """What differs from the first rank, with both values; empty where nothing does.

    Args:
        facts: a JSON object of each rank.
    """
    first = facts[0][1]
    lines = [
        f"{name} is {theirs!r} on {rank}, {ours!r} on {facts[0][0]}"
        for rank, other in facts[1:]
        for name, ours, theirs in files.differences(dict(first), dict(other))
    ]
    more = f"; and {len(lines) - SHOWN} differences more" if len(lines) > SHOWN else ""
    return "; ".join(lines[:SHOWN]) + more


class Lobby:
    """Where the ranks of one start find out by which prefix its keys begin, so that they meet nobody of an earlier one.

    torchrun's count of restarts is no such prefix: each node has its own, and one that joins later begins at 0. Rank 0
    makes one up and tells whoever asks.
    """

    def __init__(self, store: Store, number: int, size: int) -> None:
        self._store, self._number, self._me = store, number, uuid.uuid4().hex
        self._asked = dict.fromkeys(range(1, size), "")

    def attempt(self, patience: float) -> str:
        """The prefix; every rank but 0 waits for the answer.

        Raises:
            RankError: it has not come in time.
        """
        if self._number == 0:
            return self._me
        self._store.set(f"asks/{self._number}", self._me)
        deadline = time.monotonic() + patience
        while not self._store.check([f"answer/{self._me}"]):
            if time.monotonic() > deadline:
                raise exits.RankError(f"rank 0 has not arrived within {patience:g} s; the same command tries again")
            time.sleep(0.05)
        return self._store.get(f"answer/{self._me}").decode()

    def answer(self) -> None:
        """Rank 0's part, to be called until everybody is there: a question may be an earlier process's, and the same
        rank ask once more."""
        for number, before in self._asked.items() if self._number == 0 else ():
            if self._store.check([f"asks/{number}"]):
                now = self._store.get(f"asks/{number}").decode()
                if now != before:
                    self._asked[number] = now
                    self._store.set(f"answer/{now}", self._me)


class Ranks:
    """The ranks of a run, found by the store.

    Args:
        number: this one.
        size: how many there are.
        place: of the store.
        patience: seconds within which all must have arrived.

    Raises:
        ValueError: two say that they are the same rank, or they are installed or counted differently, or the store's
            port is taken.
        RankError: one has not arrived in time.
    """

    def __init__(self, number: int, size: int, place: Place, patience: float) -> None:
        self.me = Rank(number, socket.gethostname(), os.getpid())
        self.size = size
        self._place, self._keeps = place, number == 0 and not place.by_torchrun
        self._interval = 1.0
        self._ended, self._ending = threading.Event(), threading.Lock()
        self._heard: dict[int, float] = {}
        self._failed: tuple[int, str] | None = None  # exit code and reason of a rank that has ended
        self._threads: list[threading.Thread] = []
        self._blind = False  # the store is gone
        self.all: list[Rank] = []
        self._on_lost: OnLost = lambda code, text: None
        # No request to a process that was stopped ends by itself.
        timer = threading.Timer(patience + 5, self._lost, (f"{place} has not answered for {patience:g} s",))
        timer.daemon = True
        timer.start()
        self._lobby: Lobby | None = None
        try:
            if place.by_torchrun:
                self._lobby = Lobby(place._replace(prefix="lobby").open(patience), number, size)
                self._place = place._replace(prefix=self._lobby.attempt(patience))
            self.store = self._open(patience)
            self.all = self._meet(patience)
        finally:
            timer.cancel()

    def _open(self, patience: float) -> Store:
        try:
            return self._place.open(patience, self._keeps)
        except dist.DistNetworkError as error:
            if self._keeps:
                raise ValueError(
                    f"cannot listen on MASTER_PORT {self._place.port}: {str(error).splitlines()[0]}; where another "
                    "run has it, choose another port"
                ) from error
            raise exits.RankError(
                f"{self._place} has not answered for {patience:g} s; the same command tries again"
            ) from error

    def _meet(self, patience: float) -> list[Rank]:
        mine, store = self.me, self.store
        taken = f"taken/{mine.number}"
        if store.add(taken, 1) > 1:
            raise ValueError(
                f"two processes say that they are rank {mine.number}, the second is {mine}; start one each"
            )
        facts = {"number of processes": self.size, **installed()}
        # All that is waited for later is there before this process counts as arrived.
        for name, value in (("beat", "0"), ("ended", ""), ("here", json.dumps([mine, facts]))):
            store.set(f"{name}/{mine.number}", value)
        if mine.number == 0:
            store.set("verdict", "")
        deadline, found = time.monotonic() + patience, []
        for number in range(self.size):
            # Rank 0 first, and each is compared as it comes: whoever counts more ranks than there are would wait.
            while not store.check([f"here/{number}"]):
                if self._lobby:
                    self._lobby.answer()
                if time.monotonic() > deadline:
                    missing = [k for k in range(self.size) if not store.check([f"here/{k}"])]
                    raise exits.RankError(
                        f"rank {', '.join(map(str, missing))} of {self.size} has not arrived within {patience:g} s; "
                        "the same command tries again"
                    )
                time.sleep(0.05)
            rank, theirs = json.loads(store.get(f"here/{number}"))
            found.append((Rank(*rank), theirs))
            if text := difference([found[0], found[-1]]):
                self._leave_word(exits.EXIT_USAGE, text)
                raise ValueError(f"{text}; start every process from the same installation with one torchrun")
        return [rank for rank, _ in found]

    def watch(self, limit: float, on_lost: OnLost) -> None:
        """From now on a rank that has not answered for `limit` seconds is named, and the run ends with 75.

        Each process shows every moment that it runs; rank 0 looks at all of them and they at rank 0. Its own main
        thread it judges itself: one that neither works nor waits for other ranks hangs, and one that waits for others
        where rank 0 has failed waits in vain and ends with that one's code.
        """
        self._limit, self._on_lost = limit, on_lost
        self._interval = min(2.0, limit / 4)
        others = range(1, self.size) if self.me.number == 0 else (0,)
        self._store_heard = time.monotonic()
        self._heard = dict.fromkeys(others, self._store_heard)
        for target in (self._beat, self._judge):
            self._threads.append(threading.Thread(target=target, name=f"{WATCHERS}{target.__name__}", daemon=True))
            self._threads[-1].start()

    def _beat(self) -> None:
        seen: dict[int, bytes] = {}
        numbers = list(self._heard)
        keys = ["verdict", *(f"{name}/{number}" for name in ("beat", "ended") for number in numbers)]
        count = 0
        try:
            store = self._place.open(max(2.0, self._interval))
            while not self._ended.wait(self._interval):
                count += 1
                with contextlib.suppress(dist.DistStoreError):  # no answer in time: `_judge` counts how long
                    store.set(f"beat/{self.me.number}", str(count))
                    verdict, *told = store.multi_get(keys)
                    self._store_heard = time.monotonic()
                    for number, beat, said in zip(numbers, told[: len(numbers)], told[len(numbers) :], strict=True):
                        if beat != seen.get(number) or beat == b"left":
                            seen[number], self._heard[number] = beat, self._store_heard
                        if said and self._failed is None:
                            self._failed = last_words(self.all[number], said)
                    if verdict:
                        self._end(*json.loads(verdict))
        except (dist.DistNetworkError, dist.DistBackendError):
            # Whoever kept the store is gone, not stopped. That is no fault where it had finished; where this rank
            # still needs it, the next collective operation fails at once.
            self._blind = True

    def _judge(self) -> None:
        tick = self._interval / 2
        last = since = moved = vain = time.monotonic()
        work, children = _Work(self._limit), None
        while not self._ended.wait(tick):
            now = time.monotonic()
            if now - last > tick + self._limit / 4:  # this process was stopped itself, as a whole job may be
                since = moved = vain = now
            last = now
            if not self._blind and now - max(self._store_heard, since) > self._limit:
                keeper = self._place if self._place.by_torchrun else self.all[0]
                self._lost(f"{keeper} has not answered for {self._limit:g} s")
            for number, heard in self._heard.items():
                if not self._blind and now - max(heard, since) > self._limit:
                    self._lost(f"{self.all[number]} has not answered for {self._limit:g} s")
            # Rank 0 keeps the store for as long as others need to read its last words; so they do not wait for its end.
            # Others end without waiting, and rank 0, whose main thread may have a checkpoint to complete, sees them go.
            if not (waits := waits_for_others()) or self._failed is None or self.me.number == 0:
                vain = now
            elif now - vain > self._interval:
                self._end(*self._failed)
            if work.went_on() or waits:
                moved, children = now, None
            elif now - moved > self._limit / 2:
                # Its work may be done by processes that it started.
                before, children = children, _seconds_of_children()
                if before is not None and before != children:
                    moved, children = now, None
                elif now - moved > self._limit:
                    self._lost(f"{self.me} has not gone on for {self._limit:g} s: it waits in {where()}")

    def _lost(self, text: str) -> None:
        """Ends the run for want of an answer."""
        again = "the same command goes on from the newest checkpoint (--rank-timeout sets the limit, 0 is none)"
        self._end(exits.EXIT_PREEMPTED, f"{text}; {again}")

    def _end(self, code: int, text: str) -> None:
        """Ends this process, whose main thread may never come back, and by the verdict all others."""
        if self._ended.is_set() or not self._ending.acquire(blocking=False):
            return

        def publish() -> None:
            with contextlib.suppress(Exception):
                store = self._place.open(2.0)
                store.set("verdict", json.dumps([code, text]))
                telling.join(LAST_WORDS)
                store.set(f"beat/{self.me.number}", "left")
                if self._keeps:  # the verdict goes with it: the others read it first
                    time.sleep(self._interval + 0.5)

        terminal.complain(f"\nerror: {terminal.message(text)}")  # on a line of its own, below the progress bar
        # By others: the disk or the store may be what hangs.
        telling = threading.Thread(target=self._on_lost, args=(code, text), daemon=True)
        publishing = threading.Thread(target=publish, daemon=True)
        deadline = time.monotonic() + LAST_WORDS
        for helper in (telling, publishing):
            helper.start()
        for helper in (telling, publishing):
            helper.join(max(0.0, deadline - time.monotonic()))
        os._exit(code)

    def explain(self, error: BaseException) -> exits.RankError | None:
        """Why a connection to the other ranks broke, and by whom; None where `error` is no such thing."""
        if not isinstance(error, RuntimeError) or isinstance(error, exits.RankError):
            return None
        if not isinstance(error, dist.DistError) and not LOST_CONNECTION.search(str(error)):
            return None
        if self._failed is not None:
            return exits.RankError(self._failed[1], self._failed[0])
        others = [rank for rank in self.all if rank != self.me]
        with contextlib.suppress(RuntimeError):
            store = self._place.open(2.0)
            deadline = time.monotonic() + 3
            while time.monotonic() < deadline:
                for rank, said in zip(
                    others, store.multi_get([f"ended/{rank.number}" for rank in others]), strict=True
                ):
                    if said:
                        code, text = last_words(rank, said)
                        return exits.RankError(text, code)
                if any(gone(rank) for rank in others):
                    break
                time.sleep(0.1)
        lost = [str(rank) for rank in others if gone(rank)]
        who = (
            f"{', '.join(lost)} is gone (killed, or out of memory)" if lost else "the connection to another rank broke"
        )
        return exits.RankError(f"{who}: {error}; the same command goes on from the newest checkpoint")

    def leave(self, error: BaseException | None) -> None:
        """Ends the watch; the others learn of it, and why where something failed."""
        self._ended.set()
        code = exits.EXIT_INTERRUPTED if isinstance(error, KeyboardInterrupt) else exits.EXIT_BUG
        if isinstance(error, Exception):
            code = exits.exit_code(error) or exits.EXIT_BUG
        if not self._blind:
            with contextlib.suppress(RuntimeError):
                self._leave_word(code, (str(error) or type(error).__name__) if error else "")
        for thread in self._threads:
            thread.join(self._interval)

    def _leave_word(self, code: int, text: str) -> None:
        if text:
            self.store.set(f"ended/{self.me.number}", json.dumps([code, text]))
        self.store.set(f"beat/{self.me.number}", "left")
        # The store goes with its keeper: the others need a moment to read in it why.
        deadline = time.monotonic() + FAREWELL
        while text and self._keeps and time.monotonic() < deadline:
            arrived = [k for k in range(1, self.size) if self.store.check([f"beat/{k}"])]
            arrived = [k for k in arrived if k >= len(self.all) or not gone(self.all[k])]
            if all(self.store.get(f"beat/{k}") == b"left" for k in arrived):
                return
            time.sleep(0.05)


def last_words(rank: Rank, said: bytes) -> tuple[int, str]:
    """The exit code of a rank that failed, and the reason as the others give it."""
    code, text = json.loads(said)
    return int(code), f"{rank} ended: {text}"


def waits_for_others() -> bool:
    """Whether the main thread is in a collective operation, where it waits for other ranks."""
    frame = innermost = _main_frame()
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/distributed/" in name:
            return True
        # These wait for other ranks without a frame of their own: a backward pass for their gradients, DDP for buffers.
        if frame is innermost and name.endswith(("/torch/autograd/graph.py", "/torch/nn/parallel/distributed.py")):
            return True
        frame = frame.f_back
    return False


def where() -> str:
    """The main thread's place: the innermost calls, ours among them."""
    places: list[str] = []
    frame = _main_frame()
    while frame is not None and len(places) < 4:
        path = Path(frame.f_code.co_filename)
        places.append(f"{frame.f_code.co_name} ({path.parent.name}/{path.name}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(places)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)


class _Work:
    """Whether this process works, by the CPU time that it uses; one that reads uses some as well.

    Args:
        limit: seconds within which a process that works has used enough to be seen.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._threads, self._all = self._seconds()

    def went_on(self) -> bool:
        """Whether it has since this was last true."""
        threads, all_threads = self._seconds()
        thread = max((used - self._threads.get(key, 0.0) for key, used in threads.items()), default=0.0)
        if thread <= IDLE * self._limit and all_threads - self._all <= POLLING * self._limit:
            return False
        self._threads, self._all = threads, all_threads
        return True

    def _seconds(self) -> tuple[dict[int, float], float]:
        """CPU time of each of Python's threads that works, and of the whole process without those that look around."""
        found, watching = {}, 0.0
        for thread in threading.enumerate():
            if thread.native_id:
                with contextlib.suppress(OSError, ValueError, IndexError):  # it has ended
                    text = Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text()
                    seconds = int(text.split()[0]) / 1e9
                    if thread.name.startswith(WATCHERS):
                        watching += seconds
                    else:
                        found[thread.native_id] = seconds
        return found, time.process_time() - watching


def _seconds_of_children() -> float:
    """CPU time of the processes that this one has started and that still run."""
    ticks, mine = 0, str(os.getpid()).encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if fields[1] == mine:
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def gone(rank: Rank) -> bool:
    """Whether a process of this machine has ended; of another machine nothing is known."""
    if rank.host != socket.gethostname():
        return False
    try:
        state = Path(f"/proc/{rank.process}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except OSError:
        return Path("/proc/self/stat").exists()
    return state in (b"Z", b"X")

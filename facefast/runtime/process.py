"""One process in a cluster: rank, world, device, stop signal, orderly close.

Nothing else touches the process group's life or the environment variables that torchrun and Slurm set.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from facefast.runtime import ranks, slurm
from facefast.runtime.cores import usable_cores
from facefast.runtime.exits import EXIT_PREEMPTED, StorageError
from facefast.runtime.files import Held
from facefast.runtime.terminal import tell

T = TypeVar("T")

# SIGTERM is what schedulers and torchrun send, SIGINT and SIGHUP come from a terminal; Slurm sends a signal of the
# user's choice ahead of the time limit.
INSISTING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOP_SIGNALS = (*INSISTING, signal.SIGUSR1, signal.SIGUSR2)
JOIN = 600.0
"""Seconds for all ranks to arrive, where no limit is set."""
GLOO_TIMEOUT, NCCL_TIMEOUT = datetime.timedelta(days=7), datetime.timedelta(minutes=10)
SAME_REQUEST = 1.0
"""Seconds within which a second signal is the first one, come another way."""


@dataclass(frozen=True)
class World:
    """Where this process stands among all processes of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> World:
        """Reads torchrun's variables, else those of a plain `srun`, else one process.

        A batch script of Slurm runs once, whatever the tasks of its allocation, and so does the shell of `salloc`: only
        what `srun` starts, a step, is one of several.

        Raises:
            ValueError: a variable is missing or no number, or they contradict each other.
        """
        if "RANK" in os.environ:
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            local_rank = _number(names[2], "0")
            local_size = _number(names[3], str(local_rank + 1))
        elif slurm.in_step() and "SLURM_PROCID" in os.environ and _number("SLURM_NTASKS", "1") > 1:
            local_rank = _number("SLURM_LOCALID", "0")
            source, local_size = slurm.tasks_here(local_rank)
            names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", source)
        else:
            return cls()
        world = cls(_number(names[0]), _number(names[1]), local_rank, local_size)
        if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size:
            raise ValueError(
                f"{names[0]}={world.rank} of {names[1]}={world.size}, {names[2]}={world.local_rank} of "
                f"{names[3]}={world.local_size} contradict each other; start with torchrun"
            )
        return world


def _number(name: str, default: str | None = None) -> int:
    """A launch variable as a whole number."""
    value = os.environ.get(name, default)
    try:
        return int(value or "")
    except ValueError:
        seen = "is not set" if value is None else f"is {value!r}, which is no whole number"
        raise ValueError(f"{name} {seen}; unset RANK for one process, or start several with torchrun") from None


@dataclass
class Runtime:
    """A started process: use it through `start`."""

    world: World
    device: torch.device
    control: dist.ProcessGroup | None = None
    """A group for messages between hosts: through NCCL even a flag would queue behind the device's work."""
    ranks: ranks.Ranks | None = None
    """All processes of the run, where there are several."""
    stop_requested: bool = False
    """Set by a signal of `stop_on_signals`; the ranks agree on it at a step boundary."""
    held: Held | None = None
    """The folder that this process alone writes to, on rank 0; where it is gone, nothing is written in its place."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the one that writes."""
        return self.world.rank == 0

    def barrier(self) -> None:
        """Waits for every rank."""
        if self.control is not None:
            dist.barrier(self.control)

    def agree(self, flag: bool) -> bool:
        """Whether any rank says `flag`; every rank must ask."""
        if self.control is None:
            return flag
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)
        return bool(value)

    def broadcast(self, value: T) -> T:
        """Rank 0's `value` on every rank."""
        box = [value]
        if self.control is not None:
            dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value`, by rank; every rank must ask."""
        found = [value] * self.world.size
        if self.control is not None:
            dist.all_gather_object(found, value, group=self.control)
        return found

    def require_same(self, facts: Mapping[str, Any], error: type[ValueError] = ValueError) -> None:
        """Ends the run, on every rank, where a rank differs from rank 0; every rank must ask.

        Args:
            facts: a JSON object. Whatever a later collective operation depends on must be compared before it.
            error: what is raised.

        Raises:
            ValueError: naming the rank, the field and both values.
        """
        if self.control is None or self.ranks is None:
            return
        gathered: list[Any] = [None] * self.world.size
        dist.all_gather_object(gathered, (self.ranks.me, dict(facts)), group=self.control)
        self.barrier()  # a rank that ended before the others have read would look like a lost connection to them
        if text := ranks.difference(gathered):
            raise error(f"the processes of this run differ: {text}; start all of them alike, and on the same files")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Lets every rank end with what rank 0 could not write within, or because the folder it holds is gone; every
        rank must enter."""
        problem: Exception | None = self.held.problem() if self.held else None
        if problem is None:
            try:
                yield
            except (StorageError, ValueError) as error:
                problem = (self.held.problem() if self.held else None) or error
        if problem := self.broadcast(problem):
            raise problem

    def broadcast_buffers(self, module: torch.nn.Module) -> None:
        """Rank 0's buffers of `module`, such as BatchNorm statistics, on every rank."""
        if self.control is not None:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def allreduce_seconds(self, numbers: int) -> float:
        """Measured time of one all-reduce of `numbers` float32 values; 0 with one process."""
        if self.control is None:
            return 0.0
        # The second best of four: the first also sets connections up.
        values, times = torch.zeros(numbers, device=self.device), []
        for _ in range(4):
            self.barrier()
            start = time.perf_counter()
            dist.all_reduce(values)
            values[:1].cpu()  # waits for the device
            times.append(time.perf_counter() - start)
        return sorted(times)[1]

    def transfer_seconds(self, num_bytes: int) -> float:
        """Measured time of `num_bytes` from pinned memory to the device; 0 on the CPU."""
        if self.device.type == "cpu" or num_bytes == 0:
            return 0.0
        values, times = torch.zeros(num_bytes, dtype=torch.uint8).pin_memory(), []
        for _ in range(4):
            start = time.perf_counter()
            values.to(self.device)[:1].cpu()
            times.append(time.perf_counter() - start)
        return sorted(times)[1]


@contextlib.contextmanager
def start(
    device: str = "auto", rank_timeout: float = 0.0, on_lost: ranks.OnLost = lambda code, text: None
) -> Iterator[Runtime]:
    """Opens the process group where there is more than one process, and always closes it.

    Args:
        device: auto takes a GPU where there is one.
        rank_timeout: seconds after which a rank that no longer answers is named and ends the run with 75; at 0 it is
            waited for.
        on_lost: told so, by exit code and reason, before the process ends.

    Raises:
        ValueError: more local processes than GPUs, contradictory launch variables, or ranks that differ.
        RankError: another rank ended, or has not arrived.
    """
    world = World.from_environment()
    run = Runtime(world, _choose_device(device, world))
    _share_cores(world)
    if run.device.type == "cpu":
        _keep_memory()
    if world.size == 1:
        yield run
        return
    _end_if_orphaned()
    _die_with_parent()
    run.ranks = _meet(world, max(rank_timeout, ranks.LEAST_PATIENCE) if rank_timeout else JOIN)
    failure: BaseException | None = None
    try:
        if rank_timeout:
            run.ranks.watch(rank_timeout, on_lost)
        dist.init_process_group(
            "nccl" if run.device.type == "cuda" else "gloo",
            store=run.ranks.store,
            rank=world.rank,
            world_size=world.size,
            # NCCL's own check of its network. Between hosts `ranks` sees who no longer answers, and rank 0 may work
            # alone for as long as a million files take.
            timeout=NCCL_TIMEOUT if run.device.type == "cuda" else GLOO_TIMEOUT,
            device_id=run.device if run.device.type == "cuda" else None,
        )
        run.control = dist.new_group(backend="gloo", timeout=GLOO_TIMEOUT)
        yield run
    except BaseException as error:
        failure = run.ranks.explain(error) or error
        if failure is not error:
            raise failure from error
        raise
    finally:
        run.ranks.leave(failure)
        if dist.is_initialized():
            dist.destroy_process_group()


def _meet(world: World, patience: float) -> ranks.Ranks:
    """Finds the other ranks, at the address that torchrun sets or a plain `srun` implies."""
    host = os.environ.setdefault("MASTER_ADDR", slurm.first_host() or socket.gethostname())
    port = store_port()
    os.environ["MASTER_PORT"] = str(port)
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if by_torchrun:
        _end_without_torchrun(host, port)
    place = ranks.Place(host, port, by_torchrun)
    return ranks.Ranks(world.rank, world.size, place, patience)


def store_port() -> int:
    """Where the ranks meet: MASTER_PORT, else a port that follows the job, so that two jobs on a machine do not meet.

    Raises:
        ValueError: MASTER_PORT is no number.
    """
    return _number("MASTER_PORT", str(29500 + int(os.environ.get("SLURM_JOB_ID", "0")) % 1000))


def _end_without_torchrun(host: str, port: int) -> None:
    """A worker whose torchrun was killed while it was importing learns of it by nobody else: its store is gone."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionRefusedError:
        _leave_orphaned()
    except OSError:  # slow, or unreachable: the store's client says so in time
        pass


def _share_cores(world: World) -> None:
    """Gives this process its part of the cores, unless OMP_NUM_THREADS says how many it takes.

    torchrun sets that variable to 1 where it starts several processes and nobody has set it: such a 1 says nothing.
    """
    # By default torch would take all cores in each process.
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked and not (asked == "1" and "TORCHELASTIC_RUN_ID" in os.environ):
        return
    torch.set_num_threads(max(1, usable_cores() // world.local_size))


def _choose_device(device: str, world: World) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device != "cuda":
        return torch.device(device)
    if world.local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"local rank {world.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()}"
        )
    chosen = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(chosen)
    return chosen


def set_cudnn_benchmark(run: Runtime, asked: bool) -> None:
    """Whether cuDNN measures its algorithms for each new shape, in the whole process from now on: to be called where
    shapes stay as they are. Otherwise it chooses by rules, the same ones in every process."""
    if run.device.type == "cuda":
        torch.backends.cudnn.benchmark = asked
    elif asked and run.is_main:
        tell(f"note: cudnn_benchmark has no effect without a GPU: this run computes on the {run.device.type}")


@contextlib.contextmanager
def stop_on_signals(run: Runtime) -> Iterator[None]:
    """Within it, a signal to end asks for a stop: the run saves at the next step boundary and leaves.

    A second one of those a person or a scheduler sends to insist (SIGTERM, SIGINT, SIGHUP) ends the process at once.
    One request may arrive twice, from the scheduler and by way of torchrun: what follows within `SAME_REQUEST` seconds
    counts as the same.
    """
    asked = 0.0

    def request_stop(number: int, frame: FrameType | None) -> None:
        # Only a note: a handler runs between any two bytecodes, where nothing can be saved and no rank agrees.
        nonlocal asked
        if number in INSISTING:
            if asked and time.monotonic() - asked > SAME_REQUEST:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            asked = asked or time.monotonic()
        run.stop_requested = True

    # Python sets signal handlers in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # What nohup, or a shell for a job in the background, lets a process ignore stays ignored.
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, request_stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _keep_memory() -> None:
    """Lets glibc's malloc keep what it got from the system.

    Activations are large: by default each is mapped, zeroed by page faults and unmapped again in every step, which
    cost a fifth of a CPU training step.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        trim_threshold, mmap_max = -1, -4  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def _end_if_orphaned() -> None:
    """torchrun may have been killed while this worker was still importing, which nothing tells it: the worker is a
    child of the first process then, which in a container may be torchrun itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.getppid() != 1:
        return
    try:
        with open("/proc/1/cmdline", "rb") as file:
            command = file.read()
    except OSError:  # not to be seen: it may be torchrun
        return
    if not any(word in command for word in (b"torch", b"python")):
        _leave_orphaned()


def _leave_orphaned() -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more
        print("torchrun is gone: this worker ends too", file=sys.stderr, flush=True)
    os._exit(EXIT_PREEMPTED)


def _die_with_parent() -> None:
    """Ends this process soon after its torchrun, also where that was killed outright: torchrun starts workers in
    sessions of their own, which no signal to its group reaches."""
    parent = os.getppid()
    # The kernel sends a stop signal when the parent dies, by which this process may still save.
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None, use_errno=True).prctl(set_parent_death_signal, signal.SIGUSR2)  # one that nobody insists by

    # That is not enough: a main thread that waits in a collective operation for peers that are gone never gets to its
    # next update. A minute is left for a checkpoint; then this thread ends the process without asking the main one.
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(2)
        time.sleep(60)
        os._exit(EXIT_PREEMPTED)

    threading.Thread(target=watch, name=f"{ranks.WATCHERS}_parent", daemon=True).start()


def decode_threads(asked: int, world: World) -> int:
    """Decoding threads for one process: `asked`, or its share of the cores, of which one among many is left to the
    process itself (15 at most: decoders feed one device, and on an H100 15 were a third faster than 8)."""
    cores = usable_cores() // world.local_size
    return asked or max(1, min(15, cores - 1 if cores > 8 else cores))


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 natively (AVX512-BF16 or AMX)."""
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))

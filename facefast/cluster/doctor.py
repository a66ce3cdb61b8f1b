"""What a cluster gets wrong, found before a run meets it: each finding is a line with what was seen, what is allowed
and what to do."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from facefast.cluster import measure
from facefast.runtime import exits, files, process
from facefast.runtime.exits import DataError, RankError, StorageError
from facefast.runtime.process import Runtime, World

Facts = dict[str, Any]
"""What a rank sees, by `measure`."""

OK, WARN, FAULT = "ok", "warn", "fault"
PATIENCE = 60.0
"""Seconds that ranks wait for each other."""
RATE = 300.0
"""Photographs a second that have to come from the disk unless more are asked for: what a few CPU cores train on."""
HOPELESS = 5
"""Parts of what is wished for: less than one of them is a fault, less than all a warning."""
WRITE_RATE = 20e6
"""Bytes a second: a checkpoint of 1 GB in a minute."""
LEAST_ROOM, ROOM = 1e9, 1e10
"""Free bytes for checkpoints: less is a fault, or a warning."""
LEAST_FILES = 1000
LEAST_SHM, SHM = 32e6, 1e9
"""Free bytes of /dev/shm: less than what a container has by default is a fault, less than NCCL takes for eight GPUs a
warning."""
OPEN_FILES = 1024
SKEW = 1.0
"""Seconds between two clocks: times in logs, ages of files and credentials stop making sense."""
LATENCY = 0.02
"""Seconds of an all-reduce of one number; each update has a few."""
BANDWIDTH = {"cpu": 5e7, "cuda": 1e9}
"""Bytes a second: Ethernet of 0.4 and 8 Gbit/s."""
WIDTH = 80
COLUMNS = (5, 15, 34, 20)
"""Letters of state, check, value and limit."""


class Finding(NamedTuple):
    """A line of the table."""

    check: str
    state: str
    """ok, warn or fault."""
    value: str
    limit: str
    advice: str = ""
    code: int = exits.EXIT_USAGE
    """Exit code where it is a fault."""


def consult(root: str, out: Path | None, rate: float, quick: bool) -> list[Finding]:
    """Examines this machine, and with the other ranks the network; the same answer on every rank.

    Args:
        root: of the photographs; "" where they are not to be read.
        out: the run folder.
        rate: photographs a second that all ranks together are going to read.
        quick: whether less is read, written and exchanged.
    """
    effort = measure.QUICK if quick else measure.FULL
    mine: list[Facts] = []
    try:
        mine.append(measure.machine(World.from_environment(), root, out, effort))
        if text := mine[0]["port"]["problem"] if mine[0]["port"]["asked"] else "":
            raise ValueError(f"cannot listen on port {mine[0]['port']['number']}: {text}")
        with process.start(rank_timeout=PATIENCE) as run:
            return _judged(run, mine[0], out, rate, effort)
    except (ValueError, RankError) as error:
        return _not_met(error, judge(mine, rate) if mine else [])


def examine(run: Runtime, root: str, out: Path) -> list[Finding]:
    """`consult`, quickly, for ranks that have met."""
    return _judged(run, measure.machine(run.world, root, out, measure.QUICK, met=True), out, RATE, measure.QUICK)


def require_sound(run: Runtime, root: str, out: Path, say: Callable[[str], None]) -> None:
    """Says on rank 0 what was found, and ends the run on every rank where there is a fault.

    Raises:
        ValueError, DataError, StorageError: naming the faults; by the first of them.
    """
    findings = examine(run, root, out)
    if run.is_main:
        say(table(findings))
    faults = [finding for finding in findings if finding.state == FAULT]
    if faults:
        kinds = {exits.EXIT_DATA: DataError, exits.EXIT_STORAGE: StorageError}
        text = "; ".join(f"{fault.check}: {fault.value} (allowed: {fault.limit}); {fault.advice}" for fault in faults)
        raise kinds.get(faults[0].code, ValueError)(f"--doctor found what a run would fail of: {text}")


def exit_code(findings: Iterable[Finding]) -> int:
    """That of the first fault; 0 where there is none."""
    return next((finding.code for finding in findings if finding.state == FAULT), exits.EXIT_DONE)


def table(findings: Sequence[Finding]) -> str:
    """The findings for a terminal, at most `WIDTH` letters wide."""
    lines = [_row(("", "check", "found", "wanted"))]
    for finding in findings:
        shown = finding.state if finding.state == OK else finding.state.upper()
        cells = (shown, finding.check, finding.value, finding.limit)
        wrapped = [textwrap.wrap(cell, width) or [""] for cell, width in zip(cells, COLUMNS, strict=True)]
        lines += [_row(parts) for parts in zip_longest(*wrapped, fillvalue="")]
        if finding.state != OK:
            indent = " " * (COLUMNS[0] + 2)
            lines += textwrap.wrap(f"-> {finding.advice}", WIDTH, initial_indent=indent, subsequent_indent=indent)
    counts = [sum(finding.state == state for finding in findings) for state in (FAULT, WARN)]
    lines.append("" if any(counts) else "nothing is wrong")
    if any(counts):
        lines[-1] = f"{counts[0]} fault{'s' * (counts[0] != 1)}, {counts[1]} warning{'s' * (counts[1] != 1)}"
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "  ".join(f"{cell:{width}}" for cell, width in zip(cells, COLUMNS, strict=True)).rstrip()


def _judged(run: Runtime, mine: Facts, out: Path | None, rate: float, effort: measure.Effort) -> list[Finding]:
    mine = mine | measure.together(run, out, effort)
    # Judged by rank 0 alone: a rank with another facefast is found by its ranks, before they meet.
    found = run.gather(mine)
    return run.broadcast(judge(found, rate) if run.is_main else [])


def _not_met(error: Exception, found: list[Finding]) -> list[Finding]:
    """What one rank found, and why it has not met the others."""
    text, code = str(error), exits.exit_code(error) or exits.EXIT_BUG
    if text.startswith("cannot listen"):
        return found  # the port's line says so
    if "version" in text or "digest" in text:
        text = text.partition("; start every")[0]
        return [Finding("versions", FAULT, text, "alike on all ranks", _ADVICE["versions"], code), *found[1:]]
    # Last: where there is another fault, that is why.
    return [*found, Finding("ranks", FAULT, text, "all answer", _ADVICE["ranks"], code)]


_ADVICE = {
    "versions": "start every process from the same installation, such as one image or one shared environment",
    "ranks": "mend how the processes are started, or the machine that has not come",
}


# ---------------------------------------------------------------------------------------------
# Judgments


def judge(facts: Sequence[Facts], rate: float) -> list[Finding]:
    """All findings.

    Args:
        facts: of each rank; of those that have not met only one rank's own, without what the ranks find out together.
    """
    found = [_versions(facts), _gpus(facts), _driver(facts), _port(facts), _interface(facts)]
    if "clock" in facts[0]:
        found += [_threads(facts), *([_clock(facts), *_network(facts)] if len(facts) > 1 else [])]
    found += [_shm(facts), _open_files(facts)]
    if facts[0]["data"] is not None:
        found.append(_data(facts, rate))
    if facts[0]["out"] is not None:
        found += _out(facts)
    return found


def _who(fact: Facts, facts: Sequence[Facts]) -> str:
    return f" on rank {fact['rank']} ({fact['host']})" if len(facts) > 1 else ""


def _graded(value: float, least: float, wished: float) -> str:
    return FAULT if value < least else WARN if value < wished else OK


def _size(number: float) -> str:
    """Bytes as people write them: 3.2 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def _versions(facts: Sequence[Facts]) -> Finding:
    first = facts[0]["versions"]
    differing = [
        f"{name} is {theirs!r}{_who(fact, facts)}, {ours!r} on rank {facts[0]['rank']}"
        for fact in facts[1:]
        for name, ours, theirs in files.differences(first, fact["versions"])
    ]
    short = {"torch": "version of torch", "CUDA": "version of CUDA", "DALI": "version of nvidia-dali-cuda130"}
    short |= {"facefast": "version of facefast", "Python": "version of Python"}
    value = ", ".join(f"{name} {first[key]}" for name, key in short.items() if key in first)
    state = FAULT if differing else OK
    return Finding("versions", state, "; ".join(differing) or value, "alike on all ranks", _ADVICE["versions"])


def _gpus(facts: Sequence[Facts]) -> Finding:
    for fact in facts:
        names, who = fact["gpus"], _who(fact, facts)
        if fact["driver"] and not names:
            advice = "torch cannot use it: give the container GPUs, or install a newer driver (nvidia-smi tells)"
            return Finding("GPUs", FAULT, f"none, with driver {fact['driver']}{who}", "one a process", advice)
        if names and len(names) < fact["local_size"]:
            advice = f"start {len(names)} processes there, or ask the scheduler for more GPUs"
            return Finding("GPUs", FAULT, f"{len(names)} for {fact['local_size']} processes{who}", "one each", advice)
    kinds = sorted({" + ".join(sorted(set(fact["gpus"]))) for fact in facts})
    if len(kinds) > 1:
        advice = "the slowest decides: ask the scheduler for one kind"
        return Finding("GPUs", WARN, "; ".join(kind or "none" for kind in kinds), "of one kind", advice)
    count = len(facts[0]["gpus"])
    return Finding("GPUs", OK, f"{count} x {kinds[0]}" if count else "none: runs on the CPU", "one a process")


def _driver(facts: Sequence[Facts]) -> Finding:
    kinds = sorted({fact["driver"] for fact in facts})
    value = ", ".join(kind or "none" for kind in kinds)
    advice = "let all machines have the same driver: NCCL may not work between two"
    return Finding("driver", OK if len(kinds) == 1 else WARN, value, "alike on all ranks", advice)


def _port(facts: Sequence[Facts]) -> Finding:
    port = facts[0]["port"]
    if not port["problem"]:
        return Finding("port", OK, f"{port['number']}{', this run has it' if port['kept'] else ''}", "free")
    state = FAULT if port["asked"] else WARN  # one process needs none
    advice = "another run may have it (ss -ltnp shows): set MASTER_PORT, or torchrun's --rdzv-endpoint, to another one"
    return Finding("port", state, f"{port['number']}: {port['problem']}", "free", advice)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "localhost", "")


def _interface(facts: Sequence[Facts]) -> Finding:
    # Where nobody was met, the number of processes tells that there are others elsewhere.
    unmet = len(facts) == 1 and facts[0]["size"] > facts[0]["local_size"]
    several = unmet or len({fact["host"] for fact in facts}) > 1
    for fact in facts if several else ():
        if _is_loopback(fact["address"]) and "GLOO_SOCKET_IFNAME" not in fact["interface"]:
            advice = (
                "others cannot connect to that: mend the name in /etc/hosts, or set GLOO_SOCKET_IFNAME and "
                "NCCL_SOCKET_IFNAME to the network's interface (ip addr lists them)"
            )
            value = f"{fact['address'] or 'no address'}{_who(fact, facts)}"
            return Finding("interface", FAULT, value, "no loopback", advice)
    if several and _is_loopback(facts[0]["master"]):
        advice = "set MASTER_ADDR to the first machine's address, or start with torchrun --rdzv-endpoint"
        return Finding("interface", FAULT, f"MASTER_ADDR {facts[0]['master'] or 'is not set'}", "no loopback", advice)
    named = [f"{name}={value}" for name, value in facts[0]["interface"].items()]
    value = ", ".join([facts[0]["address"] or "no address", *named])
    return Finding("interface", OK, value, "no loopback" if several else "any, one machine")


def _threads(facts: Sequence[Facts]) -> Finding:
    def load(fact: Facts) -> float:
        return float(fact["threads"] * fact["local_size"] / max(fact["cores"], fact["local_size"]))

    worst = max(facts, key=load)
    cores = f"{worst['cores']} cores"
    if worst["cores"] < worst["bound"]:
        cores += f" (limit of the container; {worst['bound']} are seen)"
    value = f"{worst['threads']} x {worst['local_size']} on {cores}{_who(worst, facts)}"
    share = max(1, worst["cores"] // worst["local_size"])
    advice = f"set OMP_NUM_THREADS={share}, or ask the scheduler for more cores"
    return Finding("threads", OK if load(worst) <= 1 else WARN, value, "no more than cores", advice)


def _clock(facts: Sequence[Facts]) -> Finding:
    worst = max(facts, key=lambda fact: abs(fact["clock"]["ahead"]))
    ahead, error = worst["clock"]["ahead"], worst["clock"]["error"]
    value = f"{round(ahead, 3) + 0:+.3f} s{_who(worst, facts)}, to {error:.3f} s"
    advice = "let all machines take their time from one server (chronyc tracking, timedatectl)"
    return Finding("clock", FAULT if abs(ahead) - error > SKEW else OK, value, f"within {SKEW:g} s of rank 0", advice)


def _network(facts: Sequence[Facts]) -> list[Finding]:
    latency, rate = max(fact["latency"] for fact in facts), min(fact["bandwidth"] for fact in facts)
    wished = BANDWIDTH[facts[0]["device"]]
    advice = (
        "see which interface is taken (NCCL_DEBUG=INFO), set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the fast "
        "one, and look for other work on the machines"
    )
    states = [_graded(limit / max(value, 1e-9), 1 / HOPELESS, 1) for value, limit in ((latency, LATENCY),)]
    states.append(_graded(rate, wished / HOPELESS, wished))
    return [
        Finding("latency", states[0], f"{1e3 * latency:.2f} ms an all-reduce", f"under {1e3 * LATENCY:g} ms", advice),
        Finding("bandwidth", states[1], f"{_size(rate)}/s in an all-reduce", f"over {_size(wished)}/s", advice),
    ]


def _shm(facts: Sequence[Facts]) -> Finding:
    advice = "docker run --shm-size=4g, or a volume of medium Memory at /dev/shm (facefast submit kubernetes has one)"
    missing = [fact for fact in facts if fact["shm"] is None]
    if missing:
        return Finding("shared memory", FAULT, f"no /dev/shm{_who(missing[0], facts)}", f"{_size(SHM)} free", advice)
    worst = min(facts, key=lambda fact: fact["shm"]["free"])
    # Processes of one machine exchange gradients by it; a single one and those on CPUs hardly use it.
    wished = SHM if len(worst["gpus"]) > 1 else LEAST_SHM
    value = f"{_size(worst['shm']['free'])} free{_who(worst, facts)}"
    return Finding("shared memory", _graded(worst["shm"]["free"], LEAST_SHM, wished), value, f"{_size(wished)}", advice)


def _open_files(facts: Sequence[Facts]) -> Finding:
    worst = min(facts, key=lambda fact: fact["open_files"])
    state = OK if worst["open_files"] >= OPEN_FILES else FAULT
    advice = f"ulimit -n {OPEN_FILES} before the start, or LimitNOFILE of the service that starts it"
    return Finding("open files", state, f"{worst['open_files']}{_who(worst, facts)}", f"{OPEN_FILES} or more", advice)


def _data(facts: Sequence[Facts], rate: float) -> Finding:
    for fact in facts:
        if fact["data"]["problem"]:
            value = f"{fact['data']['root']}: {fact['data']['problem']}{_who(fact, facts)}"
            advice = "mount the photographs at the same place on every machine, or mend --data.root"
            return Finding("photographs", FAULT, value, "readable", advice, exits.EXIT_DATA)
    total = sum(fact["data"]["rate"] for fact in facts)
    slowest = min(facts, key=lambda fact: fact["data"]["rate"])
    value = f"{total:.0f} files/s, {_size(sum(fact['data']['bytes'] for fact in facts))}/s"
    if len(facts) > 1:
        value += f"; slowest {slowest['data']['rate']:.0f}/s{_who(slowest, facts)}"
    state = _graded(total, rate / HOPELESS, rate)
    if _graded(slowest["data"]["rate"] * len(facts), rate / HOPELESS, rate) == FAULT:
        state = FAULT  # the others wait for it
    advice = "copy the photographs to a disk of the machine, or pack them into tar files (webdataset, recordio)"
    return Finding("photographs", state, value, f"{rate:g} files/s", advice, exits.EXIT_STORAGE)


def _out(facts: Sequence[Facts]) -> list[Finding]:
    advice = "make room, or choose another --out"
    for fact in facts:
        out = fact["out"]
        if out["problem"]:
            value = f"{out['out']}: {out['problem']}{_who(fact, facts)}"
            return [Finding("run folder", FAULT, value, "can be written", advice, exits.EXIT_STORAGE)]
    if apart := next((fact for fact in facts if not fact.get("sees_out", True)), None):
        value = f"{apart['out']['out']} is another folder{_who(apart, facts)}"
        text = "give all machines the same file system: ranks read rank 0's checkpoints when a run goes on"
        return [Finding("run folder", FAULT, value, "one for all ranks", text, exits.EXIT_STORAGE)]
    found = []
    known = [fact["out"] for fact in facts if fact["out"]["free"] is not None]
    numbers = [fact["out"]["free_files"] for fact in facts if fact["out"]["free_files"] is not None]
    if known:
        least = min(out["free"] for out in known)
        state, value = _graded(least, LEAST_ROOM, ROOM), f"{_size(least)} free"
        if min(numbers, default=LEAST_FILES) < LEAST_FILES:
            state, value = FAULT, f"{min(numbers)} files free"
        found.append(Finding("free space", state, value, f"{_size(ROOM)} or more", advice, exits.EXIT_STORAGE))
    slowest = min(facts, key=lambda fact: fact["out"]["rate"])
    state = _graded(slowest["out"]["rate"], WRITE_RATE / HOPELESS, WRITE_RATE)
    value = f"{_size(slowest['out']['rate'])}/s{_who(slowest, facts)}"
    text = "checkpoints will take long: choose an --out on a faster disk"
    return [*found, Finding("writing", state, value, f"{_size(WRITE_RATE)}/s", text, exits.EXIT_STORAGE)]

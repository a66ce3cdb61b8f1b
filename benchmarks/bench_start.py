"""From the start of a process to its first update: how long the default fine-tuning takes to begin.

    python benchmarks/bench_start.py [--data ../shared/data/celeba-mini] [--source WEIGHTS] [--rounds 3]
        [-- options of train]

Each round is `facefast train` in a process of its own, which ends after its first update. Wall time runs from the
process' start, as the kernel notes it; CPU time is that of all threads and child processes; pictures are the forward
passes before the update. Wall time is worth something on a quiet machine alone: see the load.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from record import record

SHARED = Path(__file__).parents[2] / "shared/data"
CHILD = "--begin"
"""The first word of a round's process."""


def begin(words: Sequence[str]) -> None:
    """Trains until the first update, prints what that took, and ends the process."""
    from facefast import train
    from facefast.models import FaceModel

    pictures, stages = 0, {"imports": _since_start()}
    encode, step, start = FaceModel.encode, train.train_step, train.begin  # type: ignore[attr-defined]

    def counted(self: FaceModel, images: Any) -> Any:
        nonlocal pictures
        pictures += len(images)
        return encode(self, images)

    def entered(*rest: Any) -> Any:
        stages["photographs"] = _since_start()
        found = start(*rest)
        stages["phase entered"] = _since_start()
        return found

    def first(*rest: Any) -> None:
        embedded = pictures
        stages["measured, first batch"] = _since_start()
        step(*rest)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(each.ru_utime + each.ru_stime for each in used)
        print(json.dumps({"seconds": _since_start(), "cpu_seconds": cpu, "pictures": embedded, "stages": stages}))
        sys.stdout.flush()
        os._exit(0)  # nothing that comes after it is of interest

    FaceModel.encode = counted  # type: ignore[method-assign]
    for name, instead in (("train_step", first), ("begin", entered)):
        setattr(train, name, instead)
    sys.exit(train.main(list(words)))


def _since_start() -> float:
    """Seconds since this process began."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


def measure(words: Sequence[str]) -> dict[str, Any]:
    """One round."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, CHILD, *words, f"--out={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"train ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    words = sys.argv[1:]
    own, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED / "celeba-mini")
    parser.add_argument("--source", type=Path, default=SHARED / "weights/mobilefacenet_casia_112x96.ckpt")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(own)
    rounds = [
        measure([f"--data.root={given.data}", f"--model.source={given.source}", *further]) for _ in range(given.rounds)
    ]
    seconds = [each["seconds"] for each in rounds]
    for stage in rounds[0]["stages"]:
        print(f"{stage}: until {statistics.median(each['stages'][stage] for each in rounds):.2f} s")
    row = record(
        "start",
        data=given.data.name,
        options=" ".join(further) or "none",
        threads=int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        seconds=round(statistics.median(seconds), 2),
        lowest=round(min(seconds), 2),
        highest=round(max(seconds), 2),
        rounds=given.rounds,
        cpu_seconds=round(statistics.median(each["cpu_seconds"] for each in rounds), 2),
        pictures=rounds[0]["pictures"],
    )
    print(f"first update after {row['seconds']} s ({row['lowest']} to {row['highest']}), {row['cpu_seconds']} s of CPU")


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        begin(sys.argv[2:])
    else:
        main()

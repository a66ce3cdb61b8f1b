"""From the start of a process to its first update, and to its end: how long the default fine-tuning takes.

    python benchmarks/bench_start.py [--data ../shared/data/celeba-mini | --data drawn] [--source WEIGHTS] [--rounds 3]
        [--to-end] [-- options of train]

Each round is `facefast train` in a process of its own, which ends after its first update, or with --to-end goes on to
the end of its last phase. Drawn faces start from a network that was never trained. Wall time runs from the process'
start, as the kernel notes it; CPU time is that of all threads and child processes; pictures are the forward passes
before the update. Wall time is worth something on a quiet machine alone: see the load.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from record import record

SHARED = Path(__file__).parents[2] / "shared/data"
CHILD, WHOLE = "--begin", "--whole"
"""The first word of a round's process: until the first update, or until the end."""
IDENTITIES = 10
"""Of drawn faces."""


def begin(words: Sequence[str], whole: bool) -> None:
    """Trains until the first update, prints what that took, and ends the process; or goes on, and prints the time of
    the end as well."""
    import torch

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

    found: dict[str, Any] = {}

    def first(*rest: Any) -> Any:
        embedded = pictures
        stages["measured, first batch"] = _since_start()
        result = step(*rest)
        if torch.cuda.is_available():  # an update is over when the device has done it
            torch.cuda.synchronize()
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(each.ru_utime + each.ru_stime for each in used)
        found.update(seconds=_since_start(), cpu_seconds=cpu, pictures=embedded, stages=stages)
        if whole:  # from here on all is as it is
            FaceModel.encode = encode  # type: ignore[method-assign]
            for name, own in (("train_step", step), ("begin", start)):
                setattr(train, name, own)
            return result
        print(json.dumps(found), flush=True)
        os._exit(0)  # nothing that comes after it is of interest

    FaceModel.encode = counted  # type: ignore[method-assign]
    for name, instead in (("train_step", first), ("begin", entered)):
        setattr(train, name, instead)
    code = train.main(list(words))
    if whole and not code:
        print(json.dumps({**found, "end_seconds": _since_start()}), flush=True)
    sys.exit(code)


def _since_start() -> float:
    """Seconds since this process began."""
    began = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return float(Path("/proc/uptime").read_text().split()[0]) - began


def draw(folder: Path) -> tuple[Path, Path]:
    """Drawn faces, and a checkpoint of a network that was never trained."""
    from facefast.data.drawn import synthetic  # not for a round's process, whose imports are measured
    from facefast.models import build_model, checkpoint
    from facefast.recipe import ImageSpec, ModelConfig

    model = build_model(ModelConfig(backbone="mobilefacenet"), 0, ImageSpec(size=112, template="arcface"))
    tensors, documents = {"model": model.state_dict()}, {"model": model.to_config()}
    (folder / "source").mkdir()
    checkpoint.save(folder / "source", 1, tensors=tensors, documents=documents, best=True, keep=1)
    return synthetic.write(folder / "drawn", synthetic.DrawnSpec(identities=(IDENTITIES, 0, 0))), folder / "source"


def measure(words: Sequence[str], whole: bool) -> dict[str, Any]:
    """One round."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, WHOLE if whole else CHILD, *words, f"--out={folder}/run"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"train ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    words = sys.argv[1:]
    own, further = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=str(SHARED / "celeba-mini"), help="photographs, or drawn: faces drawn for it")
    parser.add_argument("--source", type=Path, default=SHARED / "weights/mobilefacenet_casia_112x96.ckpt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--to-end", action="store_true", help="go on to the end of the last phase")
    given = parser.parse_args(own)
    with tempfile.TemporaryDirectory() as folder:
        data, source = draw(Path(folder)) if given.data == "drawn" else (Path(given.data), given.source)
        how = [f"--data.root={data}", f"--model.source={source}", *further]
        rounds = [measure(how, given.to_end) for _ in range(given.rounds)]
    for stage in rounds[0]["stages"]:
        print(f"{stage}: until {statistics.median(each['stages'][stage] for each in rounds):.2f} s")
    row = record("start", **row_of(rounds, data.name, " ".join(further)))
    print(f"first update after {row['seconds']} s ({row['lowest']} to {row['highest']}), {row['cpu_seconds']} s of CPU")
    if given.to_end:
        print(f"end after {row['end_seconds']} s ({row['end_lowest']} to {row['end_highest']})")


def row_of(rounds: Sequence[Mapping[str, Any]], data: str, options: str) -> dict[str, Any]:
    """What is recorded of some rounds."""
    row = {
        "data": data,
        "options": options or "none",
        "threads": int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))),
        **_spread([each["seconds"] for each in rounds]),
        "rounds": len(rounds),
        "cpu_seconds": round(statistics.median(each["cpu_seconds"] for each in rounds), 2),
        "pictures": rounds[0]["pictures"],
    }
    ends = [each["end_seconds"] for each in rounds if "end_seconds" in each]
    return row | ({f"end_{name}": value for name, value in _spread(ends).items()} if ends else {})


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {
        "seconds": round(statistics.median(seconds), 2),
        "lowest": round(min(seconds), 2),
        "highest": round(max(seconds), 2),
    }


if __name__ == "__main__":
    if sys.argv[1:2] in ([CHILD], [WHOLE]):
        begin(sys.argv[2:], sys.argv[1] == WHOLE)
    else:
        main()

"""doctor finds nothing on a sound machine, and names what was planted: in real ranks, and in facts as ranks report
them."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from facefast import cli, train
from facefast.cluster import doctor, measure
from facefast.recipe import flags
from facefast.runtime import cores, exits, process, ranks
from tests.support import disks
from tests.support.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def people(folder: Path, count: int = 120) -> Path:
    """Files as small as photographs; what is in them is not looked at."""
    for number in range(count):
        place = folder / f"person{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.jpg").write_bytes(b"\xff\xd8" + bytes(4000))
    return folder


def run_doctor(rank: int, words: list[str], out: str, plant: str) -> int:
    """One rank, in which something is wrong; what it prints goes to a file."""
    if plant == "version" and rank == 1:
        torch.__version__ = "9.9.9"  # type: ignore[assignment]
        ranks.installed.cache_clear()
    if plant == "clock" and rank == 1:
        before = time.time
        time.time = lambda: before() + 90
    if plant == "disk" and rank == 1:
        quick = measure.read

        def slow(piece: measure.Piece) -> int:
            time.sleep(0.2)
            return quick(piece)

        measure.read = slow
    if plant == "host":
        name = f"node{rank}"
        socket.gethostname = lambda: name
        socket.getaddrinfo = lambda *_: [(2, 1, 6, "", ("127.0.1.1", 0))]
    with open(f"{out}-{rank}", "w") as file, contextlib.redirect_stdout(file):
        return cli.run(["doctor", *words])


def examined(tmp_path: Path, plant: str, *words: str) -> tuple[list[int], list[dict[str, Any]]]:
    """Exit codes of two ranks and what rank 0 found."""
    codes = run_ranks(run_doctor, 2, ["--quick", "--json", *words], str(tmp_path / "said"), plant)
    said = (tmp_path / "said-0").read_text()
    assert (tmp_path / "said-1").read_text() == ""
    document = json.loads(said)
    assert document["exit_code"] == codes[0]
    return codes, document["findings"]


def faults(findings: list[dict[str, Any]]) -> list[str]:
    return [finding["check"] for finding in findings if finding["state"] == "fault"]


def test_two_sound_ranks_are_found_sound(tmp_path: Path) -> None:
    root, out = people(tmp_path / "people"), tmp_path / "runs" / "mine"
    codes, findings = examined(tmp_path, "", f"--data.root={root}", f"--out={out}", "--rate=20")
    assert codes == [0, 0]
    assert faults(findings) == []
    assert {finding["check"] for finding in findings} == {
        "versions", "GPUs", "driver", "port", "interface", "threads", "clock", "latency", "bandwidth", "shared memory",
        "open files", "photographs", "free space", "writing",
    }  # fmt: skip
    assert not out.parent.exists() and not list(tmp_path.glob(".doctor*"))


@pytest.mark.parametrize(
    ("plant", "check", "code", "said"),
    [
        ("version", "versions", 64, "version of torch is '9.9.9' on rank 1"),
        ("clock", "clock", 64, "+90.0"),
        ("disk", "photographs", 74, " on rank 1"),
        ("host", "interface", 64, "127.0.1.1 on rank 0 (node0)"),
    ],
)
def test_what_is_wrong_on_one_rank_is_named(plant: str, check: str, code: int, said: str, tmp_path: Path) -> None:
    root = people(tmp_path / "people")
    codes, findings = examined(tmp_path, plant, f"--data.root={root}", "--rate=60")
    assert codes == [code, code]
    assert faults(findings) == [check]
    (fault,) = [finding for finding in findings if finding["state"] == "fault"]
    assert said in fault["value"]
    assert fault["advice"]


def alone(*words: str, **environment: str) -> tuple[int, str]:
    """The command in a process of its own: exit code, and what it prints."""
    before = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    done = subprocess.run(
        [sys.executable, "-m", "facefast.doctor", "--quick", *words],
        env=before | {"CUDA_VISIBLE_DEVICES": ""} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_port_in_use_is_named_before_the_ranks_meet() -> None:
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, said = alone(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_PORT=port)
    assert code == 64
    assert f"FAULT  port             {port}: Address already in use" in said
    assert "set MASTER_PORT" in said and "1 fault, " in said


@pytest.mark.skipif(not disks.can_mount(), reason="this process may not mount a small disk")
def test_a_full_disk_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with disks.disk(tmp_path / "disk", "4m") as disk:
        (disk / "full").write_bytes(bytes(4 << 20))
        assert cli.run(["doctor", "--quick", "--out", str(disk / "run")]) == 74
        assert "No space left on device" in capsys.readouterr().out.replace("\n", " ").replace("  ", "")


def test_a_disk_with_little_room_is_named_by_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("facefast.runtime.files.free_bytes", lambda path: 700_000_000)
    assert cli.run(["doctor", "--quick", "--out", str(tmp_path / "run")]) == 74
    assert "FAULT  free space       700 MB free" in capsys.readouterr().out


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    found = measure.writing(Path("/proc/self/run"), 1 << 20)
    assert found["problem"]


@pytest.mark.parametrize("what", ["missing", "empty"])
def test_photographs_that_are_not_there_are_named(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if what == "empty":
        (tmp_path / what).mkdir()
    assert cli.run(["doctor", "--quick", "--data.root", str(tmp_path / what)]) == 65
    assert "FAULT  photographs" in capsys.readouterr().out


def test_photographs_of_an_object_store_are_not_looked_for_on_a_disk(tmp_path: Path) -> None:
    assert measure.machine(process.World(), "s3://bucket/people", None, measure.QUICK)["data"] is None
    assert measure.machine(process.World(), str(tmp_path), None, measure.QUICK)["data"] is not None


def test_a_file_of_photographs_is_read_in_parts(tmp_path: Path) -> None:
    (tmp_path / "train.rec").write_bytes(bytes(1 << 20))
    found = measure.reading(str(tmp_path / "train.rec"), process.World(), measure.QUICK)
    assert found["problem"] == "" and found["bytes"] > found["rate"] > 0


def test_ranks_read_other_files(tmp_path: Path) -> None:
    root = people(tmp_path, 400)
    few = measure.QUICK._replace(files=40)
    first, second = ({p.path for p in measure.pieces(root, few, random.Random(rank))} for rank in (0, 1))
    assert len(first) == len(second) == 40 and len(first & second) < 20


# Judgments


FACTS: dict[str, Any] = {
    "rank": 0,
    "host": "n0",
    "size": 16,
    "local_size": 8,
    "port": {"number": 29500, "problem": "", "asked": True, "kept": False},
    "versions": {"version of torch": "2.11.0", "version of CUDA": "13.0"},
    "gpus": ["H100"] * 8,
    "driver": "580.1",
    "open_files": 65536,
    "shm": {"size": 8 << 30, "free": 8 << 30},
    "address": "10.0.0.1",
    "interface": {},
    "master": "n0",
    "data": {"root": "/data", "problem": "", "rate": 5000.0, "bytes": 1e8},
    "out": {"out": "/runs/x", "free": 1e12, "free_files": 10**6, "problem": "", "rate": 1e9},
    "device": "cuda",
    "cores": 64,
    "bound": 64,
    "threads": 8,
    "clock": {"ahead": 0.0, "error": 0.0001},
    "latency": 5e-5,
    "bandwidth": 2e11,
    "sees_out": True,
}


def facts(**changes: Any) -> list[dict[str, Any]]:
    """Of two ranks on two machines, the second with changes."""
    second = copy.deepcopy(FACTS) | {"rank": 1, "host": "n1", "address": "10.0.0.2"} | changes
    return [copy.deepcopy(FACTS), second]


def test_two_sound_machines_are_judged_sound() -> None:
    findings = doctor.judge(facts(), 300)
    assert {finding.state for finding in findings} == {"ok"}
    assert doctor.exit_code(findings) == 0
    assert doctor.table(findings).endswith("nothing is wrong")


@pytest.mark.parametrize(
    ("changes", "check", "state", "code", "said"),
    [
        ({"versions": {"version of torch": "2.11.0", "version of CUDA": "12.8"}}, "versions", "fault", 64, "'12.8'"),
        ({"gpus": []}, "GPUs", "fault", 64, "none, with driver 580.1 on rank 1 (n1)"),
        ({"gpus": ["H100"] * 4}, "GPUs", "fault", 64, "4 for 8 processes on rank 1 (n1)"),
        ({"gpus": ["A100"] * 8}, "GPUs", "warn", 0, "A100; H100"),
        ({"driver": "570.2"}, "driver", "warn", 0, "570.2, 580.1"),
        ({"address": "127.0.1.1"}, "interface", "fault", 64, "127.0.1.1 on rank 1 (n1)"),
        ({"address": ""}, "interface", "fault", 64, "no address on rank 1 (n1)"),
        ({"threads": 64}, "threads", "warn", 0, "64 x 8 on 64 cores on rank 1 (n1)"),
        ({"cores": 8, "bound": 128}, "threads", "warn", 0, "8 cores (limit of the container; 128 are seen)"),
        ({"clock": {"ahead": -7.0, "error": 0.01}}, "clock", "fault", 64, "-7.000 s on rank 1 (n1)"),
        ({"latency": 0.05}, "latency", "warn", 0, "50.00 ms"),
        ({"latency": 0.5}, "latency", "fault", 64, "500.00 ms"),
        ({"bandwidth": 5e8}, "bandwidth", "warn", 0, "500 MB/s"),
        ({"bandwidth": 1e8}, "bandwidth", "fault", 64, "100 MB/s"),
        ({"shm": {"size": 64 << 20, "free": 64 << 20}}, "shared memory", "warn", 0, "67.1 MB free on rank 1"),
        ({"shm": {"size": 64 << 20, "free": 1 << 20}}, "shared memory", "fault", 64, "1.05 MB free on rank 1"),
        ({"shm": None}, "shared memory", "fault", 64, "no /dev/shm on rank 1"),
        ({"open_files": 256}, "open files", "fault", 64, "256 on rank 1 (n1)"),
        ({"data": FACTS["data"] | {"rate": 1.0}}, "photographs", "fault", 74, "slowest 1/s on rank 1 (n1)"),
        ({"data": FACTS["data"] | {"problem": "No such file or directory"}}, "photographs", "fault", 65, "/data: No"),
        ({"out": FACTS["out"] | {"problem": "Read-only file system"}}, "run folder", "fault", 74, "Read-only"),
        ({"sees_out": False}, "run folder", "fault", 74, "/runs/x is another folder on rank 1 (n1)"),
        ({"out": FACTS["out"] | {"free": 5e9}}, "free space", "warn", 0, "5 GB free"),
        ({"out": FACTS["out"] | {"free": 5e8}}, "free space", "fault", 74, "500 MB free"),
        ({"out": FACTS["out"] | {"free_files": 3}}, "free space", "fault", 74, "3 files free"),
        ({"out": FACTS["out"] | {"rate": 1e7}}, "writing", "warn", 0, "10 MB/s on rank 1"),
        ({"out": FACTS["out"] | {"rate": 1e6}}, "writing", "fault", 74, "1 MB/s on rank 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_fault_has_its_line_its_code_and_advice(
    changes: dict[str, Any], check: str, state: str, code: int, said: str
) -> None:
    findings = doctor.judge(facts(**changes), 300)
    wrong = [finding for finding in findings if finding.state != "ok"]
    assert [(finding.check, finding.state) for finding in wrong] == [(check, state)]
    assert said in wrong[0].value
    assert doctor.exit_code(findings) == code
    text = doctor.table(findings)
    assert max(map(len, text.splitlines())) <= 80
    assert "-> " in text and f"{state.upper():5}  {check}" in text


def test_loopback_is_right_on_one_machine_and_where_an_interface_is_named() -> None:
    both = facts(address="127.0.0.1", interface={"GLOO_SOCKET_IFNAME": "eth0"})
    assert doctor.exit_code(doctor.judge(both, 300)) == 0
    one = facts(address="127.0.0.1", host="n0")
    one[0]["address"] = one[0]["master"] = "127.0.0.1"
    assert doctor.exit_code(doctor.judge(one, 300)) == 0
    far = facts()
    far[0]["master"] = "localhost"
    assert [f.value for f in doctor.judge(far, 300) if f.state == "fault"] == ["MASTER_ADDR localhost"]


def test_a_rank_that_has_met_nobody_tells_of_its_own_loopback() -> None:
    (one, _) = facts()
    one["address"] = "127.0.1.1"
    found = doctor._not_met(exits.RankError("rank 1 of 2 has not arrived within 60 s"), doctor.judge([one], 300))
    assert [(f.check, f.code) for f in found if f.state == "fault"] == [("interface", 64), ("ranks", 75)]
    assert doctor.exit_code(found) == 64
    one["size"] = one["local_size"]
    assert doctor.exit_code(doctor.judge([one], 300)) == 0


def test_a_port_that_one_process_does_not_need_is_a_warning() -> None:
    (one, _) = facts()
    one["port"] = {"number": 29500, "problem": "Address already in use", "asked": False, "kept": False}
    assert [f.state for f in doctor.judge([one], 300) if f.check == "port"] == ["warn"]


def test_the_first_fault_decides_the_code() -> None:
    worst = facts(data=FACTS["data"] | {"problem": "gone"}, open_files=3, out=FACTS["out"] | {"free": 0})
    assert doctor.exit_code(doctor.judge(worst, 300)) == 64


# Containers


@pytest.mark.parametrize(
    ("own", "limits", "quota"),
    [
        ("0::/pod/me\n", {"pod/me/cpu.max": "max 100000", "pod/cpu.max": "150000 100000"}, 1.5),
        ("0::/machine/unseen\n", {"cpu.max": "800000 100000"}, 8.0),
        ("0::/\n", {}, None),
        (
            "4:cpu,cpuacct:/a\n3:memory:/a\n",
            {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("4:cpu:/a\n", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)
def test_a_containers_cpu_limit_bounds_the_threads(
    own: str, limits: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in limits.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text + "\n")
    place = (tmp_path / "groups", tmp_path / "own")
    assert cores.cpu_quota(*place) == quota
    bound = len(os.sched_getaffinity(0))
    assert cores.usable_cores(*place) == (bound if quota is None else max(1, min(bound, int(quota))))


# train --doctor


def words(out: Path, *more: str) -> list[str]:
    root = "--data.root=/nowhere"
    return ["scratch", root, f"--out={out}", *more]


def test_doctor_is_no_part_of_what_a_run_is() -> None:
    with_it, without = (flags.command_line(words(Path("x"), *more)) for more in (("--doctor",), ()))
    assert with_it.doctor and not without.doctor
    assert with_it.recipe == without.recipe


def test_train_looks_before_it_begins_and_ends_with_the_faults_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun: list[object] = []

    def begin(*given: object) -> int:
        begun.append(given)
        return exits.EXIT_DONE

    monkeypatch.setattr(train, "train", begin)
    root = people(tmp_path / "people", 30)
    sound = ["scratch", f"--data.root={root}", f"--out={tmp_path / 'run'}"]
    assert train.main(sound) == 0 and "photographs" not in capsys.readouterr().out
    assert train.main([*sound, "--doctor"]) == 0 and len(begun) == 2
    assert "ok     photographs" in capsys.readouterr().out
    assert train.main(words(tmp_path / "run", "--doctor")) == 65 and len(begun) == 2
    out, err = capsys.readouterr()
    assert "FAULT  photographs" in out
    assert err.startswith("error: --doctor found what a run would fail of: photographs: /nowhere: No such file or")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 65)

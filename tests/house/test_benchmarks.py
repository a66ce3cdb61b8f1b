"""The benchmarks' pages say what the rows say, the parts for a GPU call what there is, and survive what fails."""

from __future__ import annotations

import ast
import importlib.util
import json
import math
import re
import subprocess
import types
from pathlib import Path

import peers
import pytest

ROOT = Path(__file__).parents[2]
ON_GPU = ROOT / "benchmarks" / "on_gpu.sh"


def generator(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    return subprocess.run(["bash", str(ON_GPU), *words], capture_output=True, text=True, env=environment, check=False)


# docs/benchmarks.md


def test_the_page_of_benchmarks_is_what_the_rows_give() -> None:
    made = generator("generate_benchmarks")
    assert made.PAGE.read_text() == made.page(), "write it again: python docs/generate_benchmarks.py"


def test_every_file_of_rows_is_shown_or_told_of_elsewhere() -> None:
    made = generator("generate_benchmarks")
    shown = {table.name for table in made.TABLES}
    assert {path.stem for path in made.RESULTS.glob("*.jsonl")} <= shown | set(made.ELSEWHERE)
    for name, page in made.ELSEWHERE.items():
        assert name in (ROOT / "docs" / page).read_text(), name


def test_every_table_names_the_command_that_makes_its_rows() -> None:
    for table in generator("generate_benchmarks").TABLES:
        program = ROOT / table.command.split()[1]
        text = program.read_text()
        assert f'"{table.name}"' in text, table.name
        assert_options_exist(table.command)


def test_of_rows_that_measure_the_same_on_such_a_machine_the_last_counts() -> None:
    made = generator("generate_benchmarks")
    table = made.Table("some", "Some", "python x", ("what",), ("value",))

    def row(what: str, value: float, cores: int) -> dict[str, object]:
        machine = {"cpu": "A", "cores": cores, "memory": 8, "load": value}
        return {"what": what, "value": value, "commit": "c", "machine": machine, "versions": {"torch": "2"}}

    found = made.latest(table, [row("a", 1.0, 2), row("b", 2.0, 2), row("a", 3.0, 2), row("a", 4.0, 16)])
    assert [[(r["what"], r["value"]) for r in kept] for kept in found.values()] == [
        [("b", 2.0), ("a", 3.0)],
        [("a", 4.0)],
    ]
    lines = made.shown(table, next(iter(found.values())))
    assert lines[0] == "2 cores of A, 8 GiB, torch 2; load 2 to 3." and "| a | 3 | c |" in lines


# docs/scaling.md


@pytest.fixture(scope="module")
def scaling() -> types.ModuleType:
    return generator("generate_scaling")


def test_the_page_of_scaling_is_what_its_numbers_give(scaling: types.ModuleType) -> None:
    assert scaling.PAGE.read_text() == scaling.page(), "write it again: python docs/generate_scaling.py"


def test_an_all_reduce_within_a_machine_needs_no_network(scaling: types.ModuleType) -> None:
    fast, slow = scaling.FABRICS
    assert scaling.allreduce(1e9, 8, fast) == scaling.allreduce(1e9, 8, slow)
    assert scaling.allreduce(1e9, 16, fast) < scaling.allreduce(1e9, 16, slow)
    # 2 * 7/8 of the bytes at 0.8 of 450 GB/s, and six steps.
    assert math.isclose(scaling.allreduce(1e9, 8, fast), 1.75e9 / 360e9 + 6 * 20e-6)
    # As much again as half of an eighth, out and in, at 0.8 of 50 GB/s; two steps more.
    assert math.isclose(scaling.allreduce(1e9, 16, fast), 1.75e9 / 360e9 + 0.125e9 / 40e9 + 8 * 20e-6)


def test_what_the_backward_pass_hides_is_not_waited_for_but_the_last_bucket_is(scaling: types.ModuleType) -> None:
    training, network = scaling.TRAININGS[1], scaling.FABRICS[0]
    whole = scaling.allreduce(1e9, 64, network)
    assert whole < scaling.BACKWARD * training.update
    assert math.isclose(scaling.exposed(training, 1e9, 64, network), whole * scaling.BUCKET / 1e9)
    assert scaling.exposed(training, 1.0, 64, network) == scaling.allreduce(1.0, 64, network)
    slow = training._replace(rate=1e9)
    assert math.isclose(scaling.exposed(slow, 1e9, 64, network), whole, rel_tol=1e-3)


def test_the_first_bottleneck_is_the_lowest_ceiling_and_moves_from_files_to_bytes(scaling: types.ModuleType) -> None:
    network = scaling.FABRICS[0]
    for training in scaling.TRAININGS:
        for kept in ("files", "shards", "memory"):
            named = [scaling.first(training, gpus, network, kept) for gpus in scaling.SIZES]
            for gpus, name in zip(scaling.SIZES, named, strict=True):
                ceilings = scaling.ceilings(training, gpus, network, kept)
                assert ceilings[name] == min(ceilings.values())
                assert scaling.predicted(training, gpus, network, kept) <= ceilings[name]
            assert (named[-1] == "compute") == (kept == "memory")
        assert scaling.first(training, 1024, network, "files") == "files opened"


# benchmarks/on_gpu.sh


def assert_options_exist(command: str) -> None:
    """Every option of a benchmark's command line is one that the program, or what it shares, adds to its parser."""
    program = re.search(r"benchmarks/\w+\.py", command)
    assert program, command
    text = (ROOT / program[0]).read_text()
    if "from timing import" in text and "options(" in text:
        text += (ROOT / "benchmarks" / "timing.py").read_text()
    for option in re.findall(r" (--[a-z][\w-]*)", command):
        assert f'add_argument("{option}"' in text, f"{command}: {option}"


@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["as it is", "dry-run"])
def test_every_step_for_a_gpu_is_a_program_with_such_options(mode: list[str]) -> None:
    listed = script("--list", *mode)
    lines = listed.stdout.splitlines()
    assert listed.returncode == 0 and {line.partition(":")[0] for line in lines} == {"tests", "kernels", "training"}
    commands = [line for line in lines if "benchmarks/" in line and ".py" in line and "pytest" not in line]
    assert len(commands) >= 5
    for command in commands:
        assert_options_exist(command)
    # train takes the GPU by itself.
    wished = [command for command in commands if "bench_start.py" not in command]
    assert all(("--device cuda" in command) == (not mode) for command in wished) and len(wished) < len(commands)


def test_every_test_marked_gpu_runs_in_a_process_of_its_file_with_a_report_of_its_own() -> None:
    """An assertion on the device spoils all later tests of its process."""
    lines = [line for line in script("tests", "--list").stdout.splitlines() if "pytest" in line]
    files = [re.findall(r" (tests/\S+\.py)", line) for line in lines]
    reports = [re.findall(r"--junitxml=(\S+)", line) for line in lines]
    assert all(len(found) == 1 for found in (*files, *reports)) and len({path for (path,) in reports}) == len(lines)
    marked = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if any(
            isinstance(node, ast.Attribute) and ast.unparse(node) == "pytest.mark.gpu"
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert {path for (path,) in files} == marked and len(marked) > 3


def test_contenders_of_a_step_are_contenders_of_its_program() -> None:
    known = (*peers.OURS, *peers.PEERS)
    for line in ON_GPU.read_text().splitlines():
        for list_ in re.findall(r"\b(?:memory|loaders)=\(([^)]*)\)", line):
            names = [quoted or word for quoted, word in re.findall(r'"([^"]*)"|(\S+)', list_)]
            assert names and set(names) <= set(known), names


def test_the_parts_measure_what_the_targets_are_about() -> None:
    listed = script("--list").stdout
    for wanted in (
        "throughput.py --device cuda --rounds 3 --data drawn --networks mobilefacenet --batch 64",
        "bench_focal.py --device cuda --dtype float16",
        "bench_focal.py --device cuda --dtype bfloat16",
        "bench_start.py --data",
        "--to-end",
        "in memory, eager and captured",
        "in memory, compiled and captured",
    ):
        assert wanted in listed, wanted


def test_no_step_may_take_a_part_past_nine_minutes() -> None:
    """Each step is cut at what is left of its part, and has a limit of its own that leaves time for others."""
    text = ON_GPU.read_text()
    most = int(re.findall(r"deadline=\$\(\(SECONDS \+ (\d+)\)\)", text)[0])
    limits = [int(limit) for limit in re.findall(r"^ *step (?:\"[^\"]*\"|\w+) (\d+) ", text, re.M)]
    assert most + 10 <= 540 and len(limits) >= 8 and max(limits) <= 300


def test_a_step_that_fails_stops_no_other_and_every_code_is_kept(tmp_path: Path) -> None:
    done = script("kernels", "training", "--dry-run", PYTHON="false", OUT=str(tmp_path))
    assert done.returncode == 1 and "FAILED: kernels, heads (exit code 1)" in done.stdout
    for part, last in (("kernels", "input"), ("training", "peers")):
        steps = [json.loads(line) for line in (tmp_path / f"steps-{part}.jsonl").read_text().splitlines()]
        assert steps[0]["step"] == "build" and steps[-1]["step"] == last and len(steps) >= 3
        assert {(step["part"], step["exit_code"]) for step in steps} == {(part, 1)}


def test_a_part_that_there_is_not_is_refused() -> None:
    done = script("everything")
    assert done.returncode == 64 and "there is no everything: give tests, kernels or training" in done.stderr

"""The suite is itself tested: what keeps runs whole is taken out of a copy of the tree, one thing at a time, and some
test must notice.

python -m tests.faults.mutate [NAME...]    # all, or some of `MUTATIONS`; a line each, and 1 where one survived
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
COPIED = ("facefast", "tests", "benchmarks", "pyproject.toml")
FAILED = 1
"""pytest's exit code where a test failed; a mutant that cannot be imported ends with another one, and is none."""
AT_ONCE = 2


@dataclass(frozen=True)
class Mutation:
    """One safeguard, and how the code is without it."""

    file: str
    old: str
    """Replaced wherever it stands; it must stand somewhere, so that code that moves takes its mutation with it."""
    new: str
    tests: str
    """Arguments of pytest: the few tests that should notice."""


FILES, STEP, LOADER = "facefast/runtime/files.py", "facefast/training/step.py", "facefast/data/loader.py"
CHECKPOINT, PROCESS, TRAIN = "facefast/models/checkpoint.py", "facefast/runtime/process.py", "facefast/train.py"
SAVING = "facefast/training/saving.py"
SAVES, FLIPS = "tests/faults/test_saves.py", "tests/faults/test_flips.py"
KILLS = "tests/faults/test_kills.py::test_"
KILLED = f"{KILLS}a_process_that_is_killed_at_any_moment_goes_on_to_the_same_bits"

MUTATIONS: dict[str, Mutation] = {
    "fsync": Mutation(FILES, "os.fsync(", "os.fstat(", f"{SAVES} -k content"),
    "sync of the folder before its rename": Mutation(FILES, "    sync(aside)\n    #", "    #", f"{SAVES} -k names"),
    "sync of the folder after a rename": Mutation(FILES, "sync(path.parent)", "...", f"{SAVES} -k names"),
    "rename of documents": Mutation(
        FILES,
        "os.replace(aside, path)",
        "(path.write_bytes(aside.read_bytes()), aside.unlink())",
        f"{SAVES} tests/runtime/test_files.py -k document",
    ),
    "rename of checkpoints": Mutation(
        CHECKPOINT,
        "files.replace_folder(aside, path)",
        "(shutil.copytree(aside, path, dirs_exist_ok=True), shutil.rmtree(aside))",
        f"{SAVES} -k 'same and killed'",
    ),
    "exchange of checkpoints": Mutation(
        FILES,
        "        _exchange(aside, path)\n",
        "        shutil.rmtree(path)\n        os.rename(aside, path)\n        aside.mkdir()\n",
        f"{SAVES} -k 'same and killed'",
    ),
    "removal of leftovers of a save": Mutation(
        CHECKPOINT, "        _remove_leftovers(folder)\n", "", f"{SAVES} -k killed"
    ),
    "removal of leftovers of a run": Mutation(TRAIN, "files.remove_leftovers(folder)", "...", FLIPS),
    "log that is kept when it is opened again": Mutation(
        "facefast/runtime/lines.py", 'open(path, "ab", buffering=0)', 'open(path, "wb", buffering=0)', f"{SAVES} -k log"
    ),
    "lines of the log that are made again": Mutation(
        "facefast/runtime/lines.py", '["step"] <= first_step', '["step"] >= 0', "tests/runtime/test_log.py"
    ),
    "hashes in the manifest": Mutation(
        "facefast/runtime/manifest.py", "if hashed(file) != digest:", "if False:", FLIPS
    ),
    "hash of the manifest": Mutation(
        "facefast/runtime/manifest.py", 'manifest["digest"] == _digest(manifest)', "True", f"{FLIPS} -k bit"
    ),
    "check of a checkpoint before it is taken up": Mutation(
        CHECKPOINT, "        try:\n            manifest.verify(path)\n", "        try:\n            ...\n", FLIPS
    ),
    "check of a source": Mutation(CHECKPOINT, "    manifest.verify(folder)\n", "", f"{FLIPS} -k source"),
    "lock of the run folder": Mutation(
        FILES,
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "...",
        "tests/commands/test_end_to_end.py::test_a_second_run_in_the_same_folder_is_refused_and_a_killed_one_leaves_no_lock",
    ),
    "agreement of the ranks": Mutation(
        PROCESS,
        "dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.control)",
        "...",
        "tests/runtime/test_runtime.py::test_ranks_agree_when_one_of_them_wants_to_stop",
    ),
    "agreement on a stop": Mutation(
        TRAIN,
        "run.agree(run.stop_requested or state.saves.failed)",
        "run.stop_requested or state.saves.failed",
        f"{KILLS}a_request_to_stop_that_reaches_one_rank_alone_stops_both_after_the_same_update",
    ),
    "end with torchrun": Mutation(
        PROCESS, "    _die_with_parent()\n    run", "    run", f"{KILLS}torchrun_and_its_workers_can_be_killed_as_well"
    ),
    "mask of empty slots": Mutation(
        LOADER,
        "np.where((rows >= 0) & (labels >= 0), labels,",
        "np.where(labels >= 0, labels,",
        "tests/data/test_loader.py",
    ),
    "divisor without unreadable rows": Mutation(
        STEP, "stats[2] += (batch.rows >= 0).sum()", "stats[2] += len(batch.rows)", "tests/training/test_step.py"
    ),
    "pictures of others in empty slots": Mutation(
        LOADER, "        if not work.lacking():\n", "        if True:\n", "tests/data/test_loader.py -k 'slots or last'"
    ),
    "hash of a picture that is read": Mutation(
        "facefast/data/work.py", "index.hashes[rows],", "None,", "tests/faults/test_damage.py -k 'flipped or grown'"
    ),
    "budget of bad pictures": Mutation(
        LOADER,
        "        self._budget.count(work.asked >= 0, rows < 0, self.bad)\n",
        "",
        "tests/faults/test_damage.py -k 65",
    ),
    "momentum of zeros": Mutation(
        "facefast/training/optim.py",
        'if group["momentum"]:',
        "if False:",
        "tests/training/test_optim.py -k skipped",
    ),
    "skipping of an update that is not finite": Mutation(
        STEP, "state.scaler.step(state.optimizer)", "state.optimizer.step()", "tests/faults/test_numerics.py"
    ),
    "statistics of an update that is not finite": Mutation(
        STEP, "    guard.settle(finite)\n", "", "tests/training/test_guard.py"
    ),
    "refusal to save what is not finite": Mutation(
        SAVING, "if state.run.agree(bool(broken)):", "if False:", "tests/faults/test_numerics.py -k of_a_state"
    ),
    "seeds of an update": Mutation(STEP, "torch.manual_seed(_seed(", "(_seed(", KILLED),
    "state of the optimiser": Mutation(
        STEP,
        'unpack_optimizer(self.optimizer, slots, document["optimizer"])',
        "...",
        KILLED,
    ),
    "averaged weights": Mutation(
        STEP, 'self.evaluated.load_state_dict(read_weights(path, self.evaluated, "ema"))', "...", KILLED
    ),
}


def copy_of(tree: Path, mutation: Mutation | None) -> None:
    """The tree with one mutation, or with none.

    Raises:
        ValueError: the text that is to be replaced is not there.
    """
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
        else:
            shutil.copy2(ROOT / name, tree / name)
    if mutation is not None:
        path = tree / mutation.file
        text = path.read_text(encoding="utf-8")
        if mutation.old not in text:
            raise ValueError(f"{mutation.file} has no {mutation.old!r} any more; let the mutation follow the code")
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def run_tests(mutation: Mutation | None, tests: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and its output for a copy of the tree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        copy_of(tree, mutation)
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        variables |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "FACEFAST_FAULTS": "full" if mutation else ""}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout=240"]
        command += [f"--basetemp={folder}/temporary", *tests]
        done = subprocess.run(
            command, cwd=tree, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout


def untouched(names: Sequence[str]) -> tuple[int, str]:
    """pytest's exit code and its output for the files of tests of some mutations, in a copy as it is."""
    arguments = [word for name in names for word in shlex.split(MUTATIONS[name].tests)]
    return run_tests(None, sorted({word for word in arguments if ".py" in word}))


def survivors(names: Sequence[str]) -> dict[str, str]:
    """Mutations that no test noticed, with what pytest said."""

    def tried(name: str) -> tuple[str, int, str]:
        code, said = run_tests(MUTATIONS[name], shlex.split(MUTATIONS[name].tests))
        last = next((line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))), said[-200:])
        print(f"{'noticed' if code == FAILED else 'SURVIVED'}: {name}: {last}", flush=True)
        return name, code, said

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {name: said for name, code, said in pool.map(tried, names) if code != FAILED}


if __name__ == "__main__":
    chosen = sys.argv[1:] or list(MUTATIONS)
    code, said = untouched(chosen)
    if code:
        sys.exit(f"the tests fail where nothing was taken out:\n{said}")
    sys.exit(bool(survivors(chosen)))

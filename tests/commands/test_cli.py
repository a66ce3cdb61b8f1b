"""The console script: its commands, what it answers on its own, and how every kind of error leaves the process."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import facefast
from facefast import cli
from facefast.runtime import exits
from facefast.runtime.exits import DataError, NumericsError, StorageError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no such flag"), 64),
        (DataError("too many broken files"), 65),
        (NumericsError("not finite"), 70),
        (StorageError("disk full"), 74),
    ],
)
def test_an_error_of_the_users_ends_with_its_code_and_one_line(
    error: Exception, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    noted = []
    with exits.exit_codes(lambda *failure: noted.append(failure)) as outcome:
        raise error
    assert outcome.code == code
    assert noted == [(code, str(error))]
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_error_of_ours_ends_with_1_and_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    noted = []
    with exits.exit_codes(lambda *failure: noted.append(failure)) as outcome:
        raise KeyError("weights")
    assert outcome.code == 1
    assert noted == [(1, "'weights'")]
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("left_with", "code"), [(2, 64), (0, 0), (None, 0), (3, 3)])
def test_the_parsers_own_exits_become_ours(left_with: int | None, code: int) -> None:
    with exits.exit_codes() as outcome:
        raise SystemExit(left_with)
    assert outcome.code == code


def test_a_command_that_says_nothing_is_done() -> None:
    with exits.exit_codes() as outcome:
        pass
    assert outcome.code == 0


def test_a_reader_who_leaves_ends_the_process_with_74_and_no_traceback() -> None:
    command = [sys.executable, "-m", "facefast", "train", "--help-all"]  # more than a pipe holds
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline().startswith("usage: facefast train")
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 74
    assert said == "error: nobody reads the output any more\n"


def test_a_broken_pipe_of_ours_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    with exits.exit_codes() as outcome:
        raise BrokenPipeError("to a worker")
    assert outcome.code == 1
    assert "Traceback" in capfd.readouterr().err


def left_with(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Runs the console script; the exit code."""
    monkeypatch.setattr(sys, "argv", ["facefast", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code is None or isinstance(left.value.code, int)
    return left.value.code


@pytest.mark.parametrize(("words", "code"), [([], 64), (["--help"], 0), (["-h"], 0)])
def test_the_console_script_says_what_each_command_does(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(words, monkeypatch) == code
    page = capsys.readouterr().out.splitlines()
    assert page[0] == "usage: facefast COMMAND ..."
    for command, what in cli.COMMANDS.items():
        assert f"  {command:8}  {what}" in page
    assert max(map(len, page)) <= 100


def test_the_console_script_knows_its_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(["--version"], monkeypatch) == 0
    assert capsys.readouterr().out == f"facefast {facefast.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian"], "there is no command 'trian'; did you mean train? (facefast --help"),
        (["evalaute", "MODEL"], "there is no command 'evalaute'; did you mean evaluate? (facefast --help"),
        (["--versoin"], "there is no command '--versoin'; did you mean --version? (facefast --help"),
        (["dance"], f"there is no command 'dance'; the commands are {', '.join(cli.COMMANDS)} (facefast --help"),
        (["train", "finetun"], "there is no recipe 'finetun'; did you mean finetune? (facefast train --help"),
        (["train", "--sede=3"], "there is no option --sede; did you mean --seed? (facefast train --help-all"),
        (["index", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_wrong_word_ends_with_64_and_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(words, monkeypatch) == 64
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["index", "ROOT", "--thread=1"], "--threads"),
        (["audit", "MODEL", "--planted", "0.1"], "--plant"),
        (["label", "MODEL", "--min_siez=3"], "--min-size"),
        (["evaluate", "--data.rot=x"], "--data.root"),
        (["evaluate", "MODEL", "--root", "x"], "--data.root"),
        (["predict", "MODEL", "IMAGE", "--topp=2"], "--top"),
        (["export", "MODEL", "OUT", "--too=onnx"], "--to"),
        (["compress", "MODEL", "--cosine=1"], "--min-cosine"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_a_misspelt_option_of_any_command_names_the_nearest(
    words: list[str], meant: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(words, monkeypatch) == 64
    command, wrong = words[0], next(word for word in words if word.startswith("--"))
    wrong = wrong.partition("=")[0].replace("_", "-")
    assert capsys.readouterr().err == (
        f"error: there is no option {wrong}; did you mean {meant}? (facefast {command} --help lists all of them)\n"
    )


@pytest.mark.parametrize(
    "words",
    [
        ["evaluate", "--json", "--no-json", "--eval.no-baselines", "--data.max_pixels=9", "--data.root", "-1"],
        ["predict", "--top=3"],
    ],
)
def test_what_a_command_lacks_is_named_when_its_options_are_right(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with(words, monkeypatch) == 64
    said = capsys.readouterr().err
    assert "there is no option" not in said
    assert "Missing from" in said and "A run folder, a checkpoint folder" in said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 64),
        (["--help"], 0),
        (["--version"], 0),
        (["trian"], 64),
        (["train", "--help"], 0),
        (["train", "binary", "--help"], 0),
        (["train", "--help-all"], 0),
        (["train", "finetun"], 64),
        (["train", "--phases.lst.lr=3"], 64),
        (["train", "finetune", "--data.root=people"], 64),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_what_needs_no_command_is_answered_without_torch(words: list[str], code: int) -> None:
    program = (
        "import sys; sys.argv = ['facefast', *sys.argv[1:]]\n"
        "import atexit; atexit.register(lambda: print('loaded:', *sorted(sys.modules)))\n"
        "from facefast import cli; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert done.returncode == code
    assert "facefast.cli" in loaded
    assert not loaded & {"torch", "numpy", "nvidia.dali", "facefast.train", "facefast.data", "facefast.models"}


@pytest.mark.parametrize(("command", "words"), [("index", ["ROOT", "--json"]), ("train", ["--seed=3", "--out", "x"])])
def test_the_console_script_hands_its_flags_to_the_command(
    command: str, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def main(rest: list[str]) -> int:
        given.append(rest)
        return 65

    monkeypatch.setattr(importlib.import_module(f"facefast.{command}"), "main", main)
    assert left_with([command, *words], monkeypatch) == 65
    assert given == [words]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_explains_itself(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert left_with([command, "--help"], monkeypatch) == 0
    assert re.match(rf"usage: facefast[. ]{command} ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [(KeyboardInterrupt(), 130, "interrupted"), (SystemExit("no more"), 64, "no more"), (SystemExit(2), 64, "")],
)
def test_ends_that_are_no_errors_of_ours_have_codes_and_no_traceback(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with exits.exit_codes() as outcome:
        raise error
    assert outcome.code == code
    assert capsys.readouterr().err.strip() == message

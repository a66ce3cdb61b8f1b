"""What a newcomer may hand to a command: paths that lead nowhere, closed and full outputs, odd names and numbers. Each
ends with an exit code of docs/runs.md and one message that cannot steer a terminal, never with a traceback."""

from __future__ import annotations

import csv
import errno
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from facefast import cli
from facefast.recipe import Phase, Recipe, from_json, to_json
from facefast.recipe.options import options, parse
from facefast.runtime import exits, terminal
from tests.support.pictures import encode, smooth_picture
from tests.support.small import make_model, save_run

CODES = {0, 64, 65, 70, 74, 75, 130}
STEERING = re.compile("[\x00-\x09\x0b-\x1f\x7f\u2028\u202e]")
QUICK = ("--pictures", "0", "--phases.0.steps", "1", "--model.backbone", "mobilefacenet_short", "--image.size", "32")


class End(NamedTuple):
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a small model."""
    folder = tmp_path_factory.mktemp("manners")
    return save_run(folder / "run", make_model(), folder)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that anybody may look into, as pytest's own are not."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)
        os.system(f"chmod -R u+rwX {folder}")


def put(folder: Path, *names: str) -> Path:
    """A different picture under each name."""
    for number, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(smooth_picture(32, 32, number), "PNG"))
    return folder


def commands(root: str, run: Path, out: Path) -> dict[str, list[str]]:
    """A line of each command that reads photographs."""
    model = str(run)
    return {
        "train": ["train", "scratch", "--data.root", root, "--out", str(out), *QUICK],
        "index": ["index", root],
        "audit": ["audit", model, "--data.root", root, "--out", str(out)],
        "label": ["label", model, "--data.root", root, "--out", str(out)],
        "evaluate": ["evaluate", model, "--data.root", root],
        "predict": ["predict", model, root],
        "compress": ["compress", model, "--data.root", root, "--out", str(out)],
    }


READERS = tuple(commands("", Path(), Path()))


def well_mannered(end: End) -> End:
    """The end of a command, when it is one that a user can act on."""
    assert "Traceback" not in end.err, end.err
    assert end.code in CODES
    for said in (end.out, end.err):
        assert not STEERING.search(said.replace("\r", "")), repr(said)
    errors = [line for line in end.err.split("\n") if line.startswith("error: ")]
    assert len(errors) == (end.code not in (0, 75, 130)), end.err
    return end


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> End:
    """Runs a command line of the console script in this process."""
    return End(cli.run(words), *capsys.readouterr())


def in_child(words: list[str], before: Callable[[], None]) -> End:
    """Runs a command line in a fork of this process, with `before` called in it first."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if process == 0:
            try:
                signal.alarm(60)
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                before()
                code = cli.run(words)
                for stream in (sys.stdout, sys.stderr):
                    stream.flush()
                os._exit(code)
            except BaseException as error:
                os.write(err.fileno(), f"Traceback of what escaped: {error!r}".encode())
                os._exit(99)
        _, status = os.waitpid(process, 0)
        out.seek(0)
        err.seek(0)
        return End(os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode())


def loop(folder: Path) -> str:
    (folder / "loop").symlink_to("loop")
    return str(folder / "loop")


PLACES: dict[str, tuple[Callable[[Path], str], int]] = {
    "nothing": (lambda folder: str(folder / "nothing"), 64),
    "a link to itself": (loop, 64),
    "a path below a file": (lambda folder: str(put(folder, "a.png") / "a.png" / "b"), 64),
    "a name that is too long": (lambda folder: str(folder / ("x" * 300)), 64),
    "a path that is too long": (lambda folder: str(folder) + "/x" * 3000, 64),
    "a byte 0": (lambda folder: f"{folder}/a\0b", 64),
    "a line end and a terminal's code": (lambda folder: f"{folder}/no\nsuch\x1b[31m\u202e", 64),
    "bytes that are no UTF-8": (lambda folder: os.fsdecode(os.fsencode(folder) + b"/\xff\xfe"), 64),
    "an empty folder": (str, 64),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", READERS)
def test_a_path_of_photographs_that_leads_nowhere_is_named(
    command: str, place: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, code = PLACES[place]
    (tmp_path / "in").mkdir()
    end = well_mannered(ended(commands(make(tmp_path / "in"), run, tmp_path / "out")[command], capsys))
    assert end.code == code
    assert str(tmp_path / "in") in end.err


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become somebody else; the modes are tested in test_walk")
@pytest.mark.parametrize("command", READERS)
def test_photographs_that_nobody_may_look_at_are_named(command: str, run: Path, open_folder: Path) -> None:
    needed = (f"facefast.{command}", "onnx", "onnxruntime.quantization", "onnxscript", "facefast")
    [importlib.import_module(name) for name in needed][-1].load(run)  # by one who may read Python's own files, too
    for mode, folder in ((0, open_folder / "shut"), (0o755, open_folder / "open")):
        put(folder, "ann/1.png", "ann/2.png", "bo/1.png", "bo/2.png")
        os.chmod(folder, mode)
    copied = open_folder / "run"
    os.system(f"cp -a {run} {copied} && chmod -R a+rX {copied}")

    def become_nobody() -> None:
        os.setegid(65534)
        os.seteuid(65534)

    for root in ("shut", "shut/ann"):
        asked = commands(str(open_folder / root), copied, open_folder / "out")[command]
        end = well_mannered(in_child(asked, become_nobody))
        assert end.code in (64, 65, 74)  # train says first that its own folder cannot be written
        assert str(open_folder / ("out" if command in ("train", "audit", "label", "compress") else "shut")) in end.err


@pytest.mark.parametrize("command", ["train", "audit", "label", "evaluate", "predict", "compress"])
@pytest.mark.parametrize("people", [{"ann": 1}, {"ann": 5}, {"ann": 1, "bo": 1, "cy": 1}], ids=str)
def test_too_few_photographs_are_said_to_be_too_few(
    people: dict[str, int], command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "in", *(f"{name}/{k}.png" for name, count in people.items() for k in range(count)))
    end = well_mannered(ended(commands(str(root), run, tmp_path / "out")[command], capsys))
    enough = command in ("label", "predict") or (command == "audit" and len(people) > 1)
    assert end.code == (0 if enough else 64)


def test_a_test_part_of_a_single_pair_ends_no_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people = {"ann": 8, "bo": 5, "cy": 5, "dora": 5}  # 2, 1, 1 and 1 pictures are kept for testing
    root = put(tmp_path / "in", *(f"{name}/{k}.png" for name, count in people.items() for k in range(count)))
    end = ended(commands(str(root), Path(), tmp_path / "out")["train"], capsys)
    assert end.code == 0
    assert "too few pairs" in end.out
    assert (tmp_path / "out" / "checkpoints" / "best" / "model.json").is_file()


@pytest.mark.parametrize("name", ["empty.rec", "empty.tar", "empty.npz", "empty.idx", "empty.zip"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a folder"])
def test_empty_containers_are_refused_by_name(
    name: str, inside: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).touch()
    end = well_mannered(ended(["index", str(tmp_path if inside else tmp_path / name)], capsys))
    assert end.code in (64, 65)
    assert name in end.err


NAMES = (
    "an\nn", "\x1b[31mred", "'quo\"te", "\u202egnp", "-rf", "=1+2", "+a", "@x", "<b>&amp;", "a;b|c", "$(id)", "a,b",
    os.fsdecode(b"\xff\xfe"), "\\n", "\u2028", "%s{0}", "\uff1d1",
)  # fmt: skip
"""What people and pictures may be called."""


@pytest.mark.parametrize("command", ["index", "audit", "label", "evaluate", "predict"])
def test_names_of_people_and_pictures_steer_nothing(
    command: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = put(tmp_path / "in", *(f"{who}/{what}.png" for who in NAMES for what in (NAMES[0], NAMES[1], who)))
    end = well_mannered(ended(commands(str(root), run, tmp_path / "out")[command], capsys))
    assert end.code == 0
    table = {"audit": tmp_path / "out" / "suspects.csv", "label": tmp_path / "out"}.get(command)
    if table is not None:
        with open(table, encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert cells and not any(re.match(r"[=+\-@]\D", cell) for cell in cells), "a spreadsheet would run it"


@pytest.mark.parametrize("name", NAMES)
def test_words_that_are_typed_steer_nothing(
    name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (
        [f"x{name}"],
        ["train", f"x{name}"],
        ["train", "scratch", f"--x{name}"],
        ["train", "scratch", "--precision", f"x{name}"],
        ["train", "scratch", "--data.root", "/nowhere", "--out", str(tmp_path / "out"), "--phases.0.name", f"x{name}"],
        ["index", str(tmp_path), f"--x{name}"],
        ["index", str(tmp_path), "--threads", f"x{name}"],
        ["index", str(tmp_path), "--format", f"x{name}"],
        ["export", str(run), str(tmp_path / "out"), "--to", f"x{name}"],
        ["predict", f"/nowhere/{name}", str(tmp_path)],
    ):
        end = ended(words, capsys)
        assert end.code == 64
        assert not STEERING.search(end.err), repr(end.err)
        assert end.err.strip() and not end.out


def numeric(command: str) -> list[str]:
    """The flags of a command that take a number."""
    kind = getattr(importlib.import_module(f"facefast.{command}"), f"{command.capitalize()}Arguments")
    return [
        option.flag
        for option in options(kind)
        if isinstance(option.default, int | float) and not isinstance(option.default, bool)
    ]


NUMBERS = ("nan", "inf", "-inf", "1e999", f"1{'0' * 30}", "9" * 5000, "0x10", "1,5", "", "abc", "-1")
NEGATIVE = {"--min-cosine", "--original-min-cosine", "--similarity", "--data.hw-decoder-load"}
POSITIONAL = {"index": ["x"], "predict": ["x", "y"]}


@pytest.mark.parametrize("command", ["index", "audit", "label", "evaluate", "predict", "compress"])
def test_numbers_out_of_range_are_refused_before_any_work(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = getattr(importlib.import_module(f"facefast.{command}"), f"{command.capitalize()}Arguments")
    flags = numeric(command)
    assert flags
    needed = ["--out", "x"] if command == "compress" else []
    for flag in flags:
        for number in NUMBERS:
            if number == "-1" and flag in NEGATIVE:
                continue
            with exits.exit_codes() as outcome:
                parse(kind, [*POSITIONAL.get(command, ["x"]), *needed, f"{flag}={number}"], command)
            assert outcome.code == 64, f"{flag} {number[:40]}"
            assert flag.rpartition(".")[2].lstrip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def fields_of(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], float]]:
    """The numbers in a JSON value, and where they stand."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from fields_of(inner, (*path, key))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


RECIPE = Recipe(phases=(Phase(start="scratch"),))


@pytest.mark.parametrize("path", [path for path, _ in fields_of(to_json(RECIPE))], ids=lambda p: ".".join(map(str, p)))
def test_numbers_out_of_range_are_refused_in_every_field_of_a_recipe(path: tuple[str | int, ...]) -> None:
    values: list[float] = [float("nan"), float("inf"), 10**400]
    default = dict(fields_of(to_json(RECIPE)))[path]
    if isinstance(default, int):
        values += [-1, 10**30]
    elif path[:2] != ("image", "mean") and path not in (("tasks", "alpha"), ("data", "hw_decoder_load")):
        values += [-1.0]
    for value in values:
        document = to_json(RECIPE)
        place = document
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(ValueError):
            from_json(Recipe, document)


class Refusing(io.StringIO):
    """An output whose disk is full, or whose reader has left."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def flush(self) -> None:
        if not self.closed and self.getvalue():
            raise OSError(self.number, os.strerror(self.number))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "error: the output cannot be written: No space left on device; give it another place\n"),
        (errno.EPIPE, "error: nobody reads the output any more\n"),
    ],
)
@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["index", "PEOPLE"]], ids=" ".join)
def test_an_output_that_is_lost_ends_with_74(
    words: list[str],
    number: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(tmp_path, "ann/1.png", "bo/1.png")
    monkeypatch.setattr(sys, "stdout", Refusing(number))
    assert cli.run([str(tmp_path) if word == "PEOPLE" else word for word in words]) == 74
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)], ids=str)
def test_streams_that_were_closed_at_the_start_are_not_missed(closed: tuple[int, ...], tmp_path: Path) -> None:
    put(tmp_path, "ann/1.png", "bo/1.png")

    def close() -> None:
        for number in closed:
            os.close(number)
        # As the interpreter has them then.
        sys.stdin, sys.stdout, sys.stderr = (
            None if number in closed else stream for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr))
        )

    end = in_child(["index", str(tmp_path), "--out", str(tmp_path / "index.npz")], close)
    assert end.code == 0
    assert bool(end.out) == (1 not in closed)
    assert (tmp_path / "index.npz").is_file()
    assert in_child(["index", str(tmp_path / "nothing")], close).code == 64


def test_names_that_an_ascii_terminal_does_not_have_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, "\u00e9/1.png", "bo/1.png", "bo/2.png")
    said = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", said)
    assert cli.run(["index", str(tmp_path)]) == 0
    said.flush()
    assert rb"bo has 2, \xe9 has 1" in said.buffer.getvalue()


def test_a_folder_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    def leave() -> None:
        (tmp_path / "gone").mkdir()
        os.chdir(tmp_path / "gone")
        os.rmdir(tmp_path / "gone")

    for words in (["index", "people"], ["train", "scratch", "--data.root", str(put(tmp_path, "a/1.png")), *QUICK]):
        end = well_mannered(in_child(words, leave))
        assert end.code in (64, 74)


def test_a_terminal_of_ascii_hears_one_plain_line_of_a_warning(tmp_path: Path) -> None:
    put(tmp_path, "an\nn/1.png", "bo/1.png", "bo/\u00e9.seg.png")
    done = subprocess.run(
        [sys.executable, "-m", "facefast.index", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.returncode == 0
    warning, rate = done.stderr.splitlines()
    assert (
        warning.startswith(f"warning: 1 files below {tmp_path}/ are named like masks") and "UserWarning" not in warning
    )
    assert r"bo/\xe9.seg.png" in warning
    assert rate.startswith("read 2 pictures in ")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 74, "it cannot be written: No space left on device"),
        (OSError(errno.EROFS, "Read-only file system", "/photos"), 74, "refuses /photos: Read-only file system"),
        (PermissionError(errno.EACCES, "Permission denied", b"/a\x1b"), 64, "refuses /a\\x1b: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "/x"), 64, "refuses /x: File name too long"),
        (MemoryError("Unable to allocate 7 TiB"), 64, "there is not enough memory (Unable to allocate 7 TiB); ask"),
        (RuntimeError("CUDA out of memory. Tried 3 GiB"), 64, "not enough memory (CUDA out of memory. Tried 3 GiB)"),
        (ValueError("a\nerror: forged\n  listed"), 64, "error: a\\nerror: forged\n  listed\n"),
        (ValueError(), 64, "error: ValueError\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_machine_refuses_has_a_code_and_a_message(
    error: Exception, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with exits.exit_codes() as outcome:
        raise error
    assert outcome.code == code
    assert said in well_mannered(End(code, *capsys.readouterr())).err


@pytest.mark.parametrize(
    "bug",
    [
        KeyError("weights"),
        TypeError("a list"),
        FileNotFoundError(errno.ENOENT, "No such file", "a table of ours"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "of ours"),
        PermissionError("ours"),
        RuntimeError("shapes differ"),
        RecursionError("too deep"),
        UnboundLocalError("x"),
    ],
    ids=lambda bug: type(bug).__name__,
)
def test_a_bug_of_ours_keeps_its_traceback_and_is_no_good_manners(
    bug: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise bug

    put(tmp_path, "ann/1.png", "bo/1.png")
    monkeypatch.setattr("facefast.index.findings", broken)
    end = ended(["index", str(tmp_path)], capsys)
    assert end.code == 1
    with pytest.raises(AssertionError, match="Traceback"):
        well_mannered(end)


@pytest.mark.parametrize(
    "end",
    [
        End(1, "", "error: a bug without its traceback"),
        End(64, "", ""),
        End(0, "ann\x1b[31m", ""),
        End(64, "", "error: one\nerror: two"),
    ],
)
def test_the_judge_of_manners_can_find_fault(end: End) -> None:
    with pytest.raises(AssertionError):
        well_mannered(end)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9 \U0001f600", "plain \u00e9 \U0001f600"),
        ("a\\n", "a\\n"),
        ("a\tb\x1b[0m\x7f\x9b", "a\\tb\\x1b[0m\\x7f\\u009b"),
        ("\udcff\u202e\u2028", "\\xff\\u202e\\u2028"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_a_text_is_plain_once_and_for_all(text: str, shown: str) -> None:
    assert terminal.plain(text) == shown
    assert terminal.plain(shown) == shown


def test_an_interruption_while_a_command_is_imported_has_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib, "import_module", interrupted)
    assert ended(["index", "x"], capsys) == End(130, "", "interrupted\n")


def test_printing_is_as_it_was_after_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    import warnings

    before = warnings.formatwarning
    with exits.exit_codes():
        assert warnings.formatwarning is not before
    assert warnings.formatwarning is before

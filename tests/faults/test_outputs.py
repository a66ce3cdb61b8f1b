"""What commands other than train write: whole or not at all, refused before any work where that can be known."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from facefast import audit, compress, export, index, label, predict
from facefast.runtime import files, manifest
from facefast.runtime.exits import StorageError
from tests.support import disks, small

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("data") / "drawn")


@pytest.fixture(scope="module")
def run(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for the commands that take one."""
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(), drawn)


def commands(run: Path, drawn: Path, out: Path) -> dict[str, tuple[Callable[[list[str]], int], list[str], Path]]:
    """Each with an output: what runs it, its arguments, and the path it writes."""
    data = [f"--data.root={drawn}", "--data.format=celeba"]
    pictures = str(drawn / "img_align_celeba")
    return {
        "index": (index.main, [str(drawn), f"--out={out / 'i.npz'}", "--format=celeba"], out / "i.npz"),
        "audit": (audit.main, [str(run), *data, f"--out={out / 'audit'}"], out / "audit"),
        "label": (label.main, [str(run), *data, "--ignore-labels", f"--out={out / 'l.csv'}"], out / "l.csv"),
        "predict": (predict.main, [str(run), pictures, f"--embeddings={out / 'e.npz'}"], out / "e.npz"),
        "safetensors": (export.main, [str(run), str(out / "package"), "--to=safetensors"], out / "package"),
        "torch": (export.main, [str(run), str(out / "m.pt2"), "--to=torch"], out / "m.pt2"),
        "onnx": (export.main, [str(run), str(out / "m.onnx"), "--to=onnx"], out / "m.onnx"),
    }


NAMES = ("index", "audit", "label", "predict", "safetensors", "torch", "onnx")


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch about its own loader
@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_finds_no_room_leaves_the_old_one_and_no_part(
    run: Path, drawn: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, path = commands(run, drawn, tmp_path)[name]
    with disks.files_up_to(100):
        assert main(arguments) == 74
    assert "cannot write" in capsys.readouterr().err
    assert disks.tree(tmp_path) == {}
    assert main(arguments) == 0
    before = disks.tree(tmp_path)
    assert before
    with disks.files_up_to(100):
        assert main(arguments) == 74
    assert "are free there" in capsys.readouterr().err
    assert disks.tree(tmp_path) == before
    assert path.exists()


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("name", NAMES)
def test_an_output_below_a_folder_that_is_not_there_is_made_or_refused(
    run: Path, drawn: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main, arguments, path = commands(run, drawn, tmp_path / "not" / "there")[name]
    code = main(arguments)
    said = capsys.readouterr().err
    assert "Traceback" not in said
    if name == "predict":
        assert code == 74 and "there is no folder" in said
    else:
        assert code == 0 and path.exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_output_of_the_wrong_kind_or_below_a_file_is_refused_before_any_work(
    run: Path, drawn: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    main, arguments, path = commands(run, drawn, tmp_path / "file")[name]
    assert main(arguments) == 74
    main, arguments, path = commands(run, drawn, tmp_path)[name]
    if name in ("audit", "safetensors"):
        path.write_text("mine")
    else:
        path.mkdir()
    before = disks.tree(tmp_path)
    assert main(arguments) == 74
    said = capsys.readouterr()
    assert said.err.count("cannot write") == 2 and "Traceback" not in said.err
    assert disks.tree(tmp_path) == before


def test_a_device_is_written_to_and_not_replaced(run: Path, drawn: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True)
    data = [f"--data.root={drawn}", "--data.format=celeba", "--ignore-labels"]
    assert label.main([str(run), *data, f"--out={tmp_path / 'pipe'}"]) == 0
    text, _ = reader.communicate(timeout=60)
    assert text.startswith("path,identity,confidence") and (tmp_path / "pipe").is_fifo()


def test_a_link_stays_a_link_to_the_new_content(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.csv").symlink_to("kept/real.csv")
    for text in ("one", "two"):
        with files.replacing(tmp_path / "link.csv") as aside:
            aside.write_text(text)
        assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "kept" / "real.csv").read_text() == text


def test_an_int8_model_that_finds_no_room_leaves_the_old_one(run: Path, tmp_path: Path) -> None:
    document = {"format": 1}
    compress._write(tmp_path / "out", b"1" * 10_000, document)
    before = disks.tree(tmp_path)
    with disks.files_up_to(5000), pytest.raises(StorageError, match="10000 bytes are needed, [0-9]+ are free there"):
        compress._write(tmp_path / "out", b"2" * 10_000, document)
    assert disks.tree(tmp_path) == before
    manifest.verify(tmp_path / "out")


if disks.can_mount():

    def test_a_package_can_be_written_into_a_folder_that_is_a_mount(run: Path, tmp_path: Path) -> None:
        with disks.disk(tmp_path / "disk", "20m") as folder:
            for _ in range(2):  # into an empty one, and over the package that is there
                assert export.main([str(run), str(folder), "--to=safetensors"]) == 0
                manifest.verify(folder)
            before = disks.tree(folder)
            disks.fill(tmp_path / "disk").rename(folder / "recipe.json")  # one of the package's own names
            assert export.main([str(run), str(folder), "--to=safetensors"]) == 74
            (folder / "recipe.json").write_bytes(before["recipe.json"])
            assert disks.tree(folder) == before

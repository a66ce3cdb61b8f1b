"""The audit: its command on drawn faces, its contact sheets, and planted wrong labels among real photographs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from facefast import audit
from facefast.data import FaceIndex, read_index
from facefast.data.corrections import apply_corrections, read_corrections, write_corrections
from facefast.evaluation.embed import embed_photographs
from facefast.labels import sheets
from facefast.labels.clustering import Floats, class_sums, unit_rows
from facefast.labels.suspects import KINDS
from facefast.recipe import Photographs
from facefast.runtime import process
from tests.support import small
from tests.support.pictures import encode, smooth_picture
from tests.support.points import doubtful_people


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn people; one picture of the second is a copy of one of the first, saved again."""
    root = small.draw(tmp_path_factory.mktemp("drawn"))
    index = read_index(root)
    one, other = (int(np.flatnonzero(index.labels == label)[0]) for label in (0, 1))
    with Image.open(index.path(one)) as picture:
        picture.load()
    picture.save(index.path(other), quality=70)
    return root


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    return small.save_run(tmp_path_factory.mktemp("run"), small.make_model(template="none"), drawn)


def arguments(run_folder: Path, drawn: Path, *more: str) -> list[str]:
    return [str(run_folder), "--data.root", str(drawn), *more]


def test_the_command_writes_a_table_and_sheets_that_training_can_use(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "audit"
    assert audit.main(arguments(run_folder, drawn, "--out", str(out))) == 0
    said = capsys.readouterr().out
    assert "16 pictures of 4 identities" in said
    assert f"--data.corrections {out}/suspects.csv" in said
    lines = [line for _, line in read_corrections(out / "suspects.csv")]
    copies = [line for line in lines if line.kind == "duplicate"]
    assert [{line.identity, line.suggested} for line in copies] == [{"1", "2"}]
    with Image.open(out / "duplicate_01.jpg") as sheet:
        assert sheet.size[0] >= 2 * sheets.TILE
    index = read_index(drawn).scanned()
    assert len(apply_corrections(index, out / "suspects.csv")) < len(index)


def test_names_with_line_ends_and_terminal_codes_are_escaped_everywhere(
    tmp_path: Path, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for who, name in enumerate(("an\nn", "\x1b[31mbob", "=carl")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            (tmp_path / "photos" / name / f"{k}.png").write_bytes(encode(smooth_picture(32, 32, 4 * who + k), "PNG"))
    shutil.copy(tmp_path / "photos/an\nn/0.png", tmp_path / "photos/=carl/copy.png")
    out = tmp_path / "audit"
    assert audit.main(arguments(run_folder, tmp_path / "photos", "--out", str(out))) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert b"\x1b" not in (out / "suspects.csv").read_bytes()
    index = read_index(tmp_path / "photos").scanned()
    assert {line.identity for _, line in read_corrections(out / "suspects.csv")} <= set(index.class_names)
    apply_corrections(index, out / "suspects.csv")


def test_findings_can_be_had_as_json_and_without_photographs(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(arguments(run_folder, drawn, "--out", str(tmp_path), "--json", "--pictures", "0")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["duplicate"] == {"found": 1, "drop": 1}
    assert {"wrong_label", "merge", "mixed_identities", "estimated_wrong_share"} <= set(found)
    written = ["review.jsonl", "review.npz", "suspects.csv", "suspects.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == written
    assert json.loads((tmp_path / "suspects.json").read_text()) == found
    (copy,) = (line for line in found["suspects"] if line["kind"] == "duplicate")
    assert {copy["identity"], copy["suggested"]} == {"1", "2"}
    assert len(found["suspects"]) == sum(found[kind]["found"] for kind in KINDS)


def test_all_names_are_text_on_the_page_and_in_strict_json(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("<script>alert(1)", 'a"b\u202e', "c\nd")
    index = read_index(drawn)
    for row in range(len(index)):
        folder = tmp_path / "photos" / names[int(index.labels[row]) % 3]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(index.path(row), folder / f"{row}.jpg")
    out = tmp_path / "audit"
    assert audit.main(arguments(run_folder, tmp_path / "photos", "--out", str(out))) == 0
    capsys.readouterr()
    found = json.loads((out / "suspects.json").read_text(), parse_constant=pytest.fail)
    assert any(line["identity"] != "" for line in found["suspects"])
    page = (out / "suspects.html").read_text("utf-8")
    assert "<script" not in page and "\u202e" not in page
    assert "data:image/jpeg;base64," in page
    audit.main(arguments(run_folder, tmp_path / "photos", "--out", str(out), "--pictures", "0"))
    assert not (out / "suspects.html").exists()


def test_the_self_test_prints_how_many_are_found_and_writes_nothing(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert audit.main(arguments(run_folder, drawn, "--plant", "0.1", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["planted"] == 2
    assert {"raw_precision", "precision", "recall"} <= set(found)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--out", "x", "--plant", "0.1"], "give either --out"),
        ([], "give either --out"),
        (["--plant", "0.9"], "must lie in"),
        (["--out", "x", "--confidence", "2"], "confidence is 2"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path,
    run_folder: Path,
    drawn: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert audit.main(arguments(run_folder, drawn, *more)) == 64
    assert message in capsys.readouterr().err


def test_one_identity_cannot_be_audited(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "ann").mkdir(parents=True)
    picture = read_index(drawn)
    Path(tmp_path / "photos" / "ann" / "0.jpg").write_bytes(Path(picture.path(0)).read_bytes())
    assert audit.main([str(run_folder), "--data.root", str(tmp_path / "photos"), "--out", str(tmp_path)]) == 64
    assert "facefast label" in capsys.readouterr().err


def test_findings_fit_the_index_they_came_from(tmp_path: Path) -> None:
    index, suspects, _ = doubtful_people()
    lines = audit.corrections_of(index, suspects)
    assert {line.kind for line in lines} == {"wrong_label", "merge"}
    assert {line.action for line in lines} >= {"relabel", "merge"}
    write_corrections(tmp_path / "suspects.csv", lines)
    changed = apply_corrections(index, tmp_path / "suspects.csv")
    assert changed.num_classes == 30
    with open(tmp_path / "suspects.csv", encoding="utf-8") as file:
        assert next(csv.reader(file))[:4] == ["kind", "path", "identity", "suggested"]


def accuracy_of_means(index: FaceIndex, embeddings: Floats) -> float:
    """Part of a fifth of every person's pictures that are nearest to the mean of that person's others."""
    labels = index.labels.astype(np.int64)
    rows = {index.name(row): row for row in range(len(index))}
    train, test = ([rows[part.name(row)] for row in range(len(part))] for part in index.split_per_identity(0.2, 0))
    means = unit_rows(class_sums(embeddings[train], labels[train], index.num_classes))
    return float(((embeddings[test] @ means.T).argmax(1) == labels[test]).mean())


def test_planted_labels_are_found_among_real_photographs_and_corrections_help(
    celeba: Path, shared_weights: Path, tmp_path: Path
) -> None:
    everybody = read_index(celeba)
    everybody.select(everybody.labels < 40).compact().save(tmp_path / "forty.npz")
    data = Photographs(root=str(tmp_path / "forty.npz"))
    model = shared_weights / "mobilefacenet_casia_112x96.ckpt"
    with process.start() as run:
        index, embeddings = embed_photographs(model, data, run, 64)
    found = audit.planted(audit.AuditArguments(model, data, plant=0.05), index, embeddings)
    assert found.recall >= 0.9
    assert found.precision >= 0.9
    assert found.raw_precision >= 0.7  # about 2 % of the labels are wrong without planting: they count against it
    assert found.relabelled >= 0.95

    out = tmp_path / "audit"
    audit.audit(audit.AuditArguments(model, data, out, pictures=0), index, embeddings, out)
    clean = apply_corrections(index, out / "suspects.csv")
    assert 0.95 * len(index) <= len(clean) < len(index)
    rows = {index.name(row): row for row in range(len(index))}
    kept = embeddings[[rows[clean.name(row)] for row in range(len(clean))]]
    assert accuracy_of_means(clean, kept) >= max(0.985, accuracy_of_means(index, embeddings))

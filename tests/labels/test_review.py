"""Reviews without a browser: who may ask the server for what, what is kept of decisions, and the pictures shown."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from werkzeug.test import Client

from facefast import audit, label
from facefast.data import read_index
from facefast.data.corrections import apply_corrections, read_corrections, read_label_lines, read_labels
from facefast.labels.clustering import unit_rows
from facefast.labels.review.decisions import LOG, Decisions, summary
from facefast.labels.review.items import Review, audit_review, label_review
from facefast.labels.review.portraits import FACE, Portraits
from facefast.labels.review.server import Application, serve
from facefast.labels.suspects import find_suspects
from facefast.recipe import Photographs
from facefast.runtime.exits import StorageError
from tests.support import small
from tests.support.points import people
from tests.support.reviews import audited, draw, end, grouped, served

PEOPLE = ("ann", "bo", "cy")
HERE = "http://127.0.0.1:4000"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved review of eight findings."""
    audited(draw(tmp_path / "photos", PEOPLE), 8).save(tmp_path / "audit")
    return tmp_path / "audit"


@pytest.fixture
def application(folder: Path) -> Application:
    review = Review.load(folder)
    return Application(review, Decisions(review, folder), lambda: None)


def asked(application: Application, path: str, **more: Any) -> Any:
    """The answer to a request for a path behind the token."""
    more.setdefault("base_url", HERE)
    return Client(application).open(f"/{application.token}/{path}", **more)


def actions(folder: Path) -> list[str]:
    return [line.action for _, line in read_corrections(folder / "corrections.csv")]


# ---------------------------------------------------------------------------------------------
# The server


def test_without_the_token_there_is_nothing(application: Application) -> None:
    client = Client(application)
    wrong = application.token[:-1] + ("A" if application.token[-1] != "A" else "B")
    for path in ("/", "/items", f"/{application.token}", f"/{wrong}/", f"/{wrong}/items", f"/{wrong}/picture/0/face"):
        assert client.get(path, base_url=HERE).status_code == 404, path
    assert client.post(f"/{wrong}/decide", base_url=HERE, json={"item": 0, "action": "drop"}).status_code == 404
    assert not application.decisions.current
    for path in ("", "items", "review.css", "review.js", "people?q=a", "picture/0/face", "picture/0/whole"):
        assert asked(application, path).status_code == 200, path
    assert len(application.token) >= 32


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("127.0.0.1:4000", True),
        ("localhost:9", True),
        ("localhost", True),
        ("evil.example", False),
        ("evil.example:4000", False),
        ("127.0.0.1.evil.example:4000", False),
        ("127.0.0.1@evil.example", False),
    ],
)
def test_a_page_of_another_host_that_leads_here_is_refused(application: Application, host: str, allowed: bool) -> None:
    answer = asked(application, "items", headers={"Host": host})
    assert (answer.status_code == 200) == allowed
    assert allowed or b"items" not in answer.data


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        (JSON, 200),
        (JSON | {"Origin": HERE, "Sec-Fetch-Site": "same-origin"}, 200),
        (JSON | {"Origin": "http://evil.example"}, 403),
        (JSON | {"Origin": "null"}, 403),
        (JSON | {"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "text/plain"}, 400),  # what a form of another page can send without asking
    ],
)
def test_only_the_page_itself_may_decide(application: Application, headers: dict[str, str], code: int) -> None:
    body = json.dumps({"item": 0, "action": "drop"})
    answer = asked(application, "decide", method="POST", data=body, headers=headers)
    assert answer.status_code == code
    assert bool(application.decisions.current) == (code == 200)


def test_every_answer_forbids_what_no_page_of_ours_needs(application: Application) -> None:
    for path in ("", "items", "picture/0/face", "nothing"):
        headers = asked(application, path).headers
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert "Access-Control-Allow-Origin" not in headers
    assert asked(application, "decide", method="OPTIONS").headers.get("Access-Control-Allow-Origin") is None


@pytest.mark.parametrize(
    "path",
    ["picture/999/face", "picture/-1/face", "picture/0/other", "picture/..%2f..%2fetc/face", "../review.js", "x"],
)
def test_nothing_but_the_pictures_of_the_review_is_handed_out(application: Application, path: str) -> None:
    assert asked(application, path).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{",
        '{"item": "0", "action": "drop"}',
        '{"item": true, "action": "drop"}',
        '{"item": 1.0, "action": "drop"}',
        '{"item": 0}',
        '{"item": 0, "action": 1}',
        "[" * 50_000,
        '{"item":' * 8_000,
        "[" * 100_000,
    ],
)
def test_what_is_no_decision_is_refused(application: Application, body: str) -> None:
    answer = asked(application, "decide", method="POST", data=body, headers=JSON)
    assert answer.status_code in (400, 413)
    assert "error" in json.loads(answer.data)
    assert asked(application, "decide", method="POST", json={"item": 8, "action": "drop"}).status_code == 409
    assert not application.decisions.current


def test_done_writes_the_table_and_ends_the_server(folder: Path) -> None:
    with served(folder) as address:
        with urlopen(f"{address}items", timeout=30) as answer:
            assert len(json.load(answer)["items"]) == 8
        with pytest.raises(ValueError, match="another run is writing"):
            serve(folder, 0, print)
        end(address)
    assert actions(folder) == []


def test_a_port_that_is_taken_is_named(folder: Path, tmp_path: Path) -> None:
    audited(draw(tmp_path / "more", PEOPLE), 1).save(tmp_path / "other")
    with served(folder) as address:
        port = int(re.findall(r":(\d+)/", address)[0])
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 cannot be had.*give another --port"):
            serve(tmp_path / "other", port, print)


# ---------------------------------------------------------------------------------------------
# Decisions


def decisions_of(folder: Path) -> Decisions:
    return Decisions(Review.load(folder), folder)


def test_answers_are_on_the_disk_after_each_and_come_back_in_their_order(folder: Path) -> None:
    first = decisions_of(folder)
    first.decide(0, "move", "bo")
    first.decide(0, "drop")
    first.decide(1, "keep")
    first.undo()
    again = decisions_of(folder)
    assert again.current == first.current
    assert again.undo() == 0 and again.current[0].action == "move"
    assert again.undo() == 0 and not again.current
    assert again.undo() is None
    assert not decisions_of(folder).current


def test_a_last_line_that_a_crash_cut_off_is_passed_over(folder: Path) -> None:
    decisions_of(folder).decide(0, "drop")
    whole = (folder / LOG).read_bytes()
    (folder / LOG).write_bytes(whole + b'{"item": "ab')
    again = decisions_of(folder)
    assert list(again.current) == [0]
    assert "the last line of" in summary(again) and "was cut off" in summary(again)
    again.decide(2, "keep")
    assert list(decisions_of(folder).current) == [0, 2]
    assert "cut off" not in summary(decisions_of(folder))


def test_a_line_that_is_no_answer_is_named(folder: Path) -> None:
    (folder / LOG).write_text('{"item": "x"}\n')
    with pytest.raises(ValueError, match="decisions.jsonl, line 1, is no answer.*delete the line"):
        decisions_of(folder)


def test_answers_to_findings_that_are_gone_are_counted_and_kept_out_of_the_table(folder: Path) -> None:
    decisions = decisions_of(folder)
    decisions.decide(0, "drop")
    decisions.decide(1, "drop")
    review = Review.load(folder)
    dataclasses.replace(review, items=review.items[1:]).save(folder)
    again = decisions_of(folder)
    assert (list(again.current), again.foreign) == ([0], 1)
    again.write_result(last=True)
    assert actions(folder) == ["drop"]
    review.save(folder)
    assert list(decisions_of(folder).current) == [0, 1]


@pytest.mark.parametrize(
    ("number", "action", "to", "message"),
    [
        (0, "burn", "", "action is 'burn'"),
        (0, "move", "nobody", "nobody here is called"),
        (0, "move", "", "nobody was named"),
        (0, "move", "ann", "this is ann already"),
        (3, "drop", "", "drop is for pictures"),
        (3, "move", "cy", "move is for pictures"),
        (99, "drop", "", "there is no item 100"),
        (-1, "drop", "", "there is no item 0"),
    ],
)
def test_an_answer_that_makes_no_sense_is_refused(
    folder: Path, number: int, action: str, to: str, message: str
) -> None:
    decisions = decisions_of(folder)
    with pytest.raises(ValueError, match=message):
        decisions.decide(number, action, to)
    assert not decisions.current and not (folder / LOG).exists()


def test_a_name_is_found_by_case_blanks_and_accents_put_together_otherwise(tmp_path: Path) -> None:
    audited(draw(tmp_path / "photos", ("Ann", "José  Öz", "cy")), 1).save(tmp_path / "audit")
    decisions = decisions_of(tmp_path / "audit")
    assert decisions.decide(0, "move", " josé öz ").to in decisions.review.index.class_names
    assert decisions.find("ö") == decisions.find("O\u0308") == ["José  Öz"]


def test_one_picture_cannot_be_moved_to_two_people(folder: Path) -> None:
    review = Review.load(folder)
    copy = dataclasses.replace(review.items[0], kind="duplicate")
    dataclasses.replace(review, items=(review.items[0], copy)).save(folder)
    decisions = decisions_of(folder)
    decisions.decide(0, "move", "bo")
    with pytest.raises(ValueError, match="moved to bo already, in item 1"):
        decisions.decide(1, "move", "cy")
    decisions.decide(1, "move", "bo")
    apply_corrections(read_index(folder.parent / "photos").scanned(), decisions.result)


def test_a_merge_of_the_people_of_a_suspect_is_a_line_that_training_reads(folder: Path) -> None:
    decisions = decisions_of(folder)
    decisions.decide(0, "merge", "bo")
    (line,) = (line for _, line in read_corrections(decisions.result))
    assert (line.kind, line.action, line.identity, line.suggested) == ("merge", "merge", "ann", "bo")
    index = read_index(folder.parent / "photos").scanned()
    assert apply_corrections(index, decisions.result).class_names == ("bo", "cy")


def test_groups_follow_those_they_were_merged_with(tmp_path: Path) -> None:
    index = draw(tmp_path / "photos", ("a", "b", "c", "d", "e", "f"), pictures=2)
    grouped(index).save(tmp_path)
    decisions = decisions_of(tmp_path)
    one, two, three, four, five, six = (f"cluster-000{k}" for k in range(1, 7))
    decisions.decide(0, "merge", two)
    decisions.decide(1, "merge", three)
    decisions.decide(2, "move", "Ann")
    decisions.decide(3, "merge", five)  # in a circle: one person, by one of the names
    decisions.decide(4, "merge", four)
    decisions.decide(5, "move", "ann ")  # Ann once more
    assert decisions.names() == {one: "Ann", two: "Ann", three: "Ann", four: four, five: four, six: "Ann"}
    decisions.decide(2, "drop")
    assert decisions.names()[one] == ""
    nameless = dataclasses.replace(index, labels=index.labels * 0 - 1, class_names=())
    decisions.write_result(last=True)
    assert set(read_labels(nameless, decisions.result).class_names) == {"Ann", four}
    for bad in ("", " ", "a\nb", "x" * 201):
        with pytest.raises(ValueError):
            decisions.decide(0, "move", bad)


def test_an_answer_that_cannot_be_kept_was_not_given(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decisions = decisions_of(folder)
    decisions.decide(0, "drop")
    before = (folder / LOG).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left"):
            decisions.decide(1, "drop")
    assert list(decisions.current) == [0] and (folder / LOG).read_bytes() == before
    decisions.decide(1, "drop")
    assert list(decisions_of(folder).current) == [0, 1]


# ---------------------------------------------------------------------------------------------
# Questions and pictures


def test_a_suspect_is_shown_with_its_own_people_and_those_it_is_like() -> None:
    unit, labels, _ = people([6] * 8)
    index = read_index_of(labels)
    wrong = labels.copy()
    wrong[0] = 3
    index = dataclasses.replace(index, labels=wrong.astype(np.int32))
    suspects = find_suspects(unit, wrong)
    lines = audit.corrections_of(index, suspects)
    review = audit_review(index, unit, suspects, lines, Photographs("photos"))
    item = next(item for item in review.items if item.correction().path == index.name(0))
    shown = review.index
    assert [shown.name(row) for row in item.rows] == [index.name(0)]
    assert {int(shown.labels[row]) for row in item.mates} == {3}
    assert {int(shown.labels[row]) for row in item.others} == {0}
    assert item.person == "3" and item.suggested == "0"
    assert len(shown) <= len(index)


def read_index_of(labels: np.ndarray[Any, Any]) -> Any:
    from facefast.data import FaceIndex

    paths = [f"{row}.jpg".encode() for row in range(len(labels))]
    return FaceIndex.build("photos", paths, labels, [str(k) for k in range(int(labels.max()) + 1)])


def test_groups_are_shown_from_typical_to_doubtful_beside_the_nearest_people() -> None:
    unit, labels, _ = people([20] * 6)
    seeds = np.where(labels == 5, 5, -1)
    index = dataclasses.replace(read_index_of(labels), labels=seeds.astype(np.int32))
    names = ["5" if k == 5 else f"cluster-{k}" if k < 4 else "" for k in labels.tolist()]
    review = label_review(index, unit_rows(unit), names, np.full(len(unit), 0.9, np.float32), Photographs("photos"))
    assert sorted(item.person for item in review.items) == [f"cluster-{k}" for k in range(4)]
    assert all(item.size == 20 and len(item.rows) == 12 and item.others for item in review.items)
    assert all(item.suggested and item.suggested != item.person for item in review.items)
    assert len(review.proposed) == 80  # nobody who had a name


def test_a_face_is_cut_out_upright_and_a_photograph_that_is_gone_is_grey(tmp_path: Path) -> None:
    picture = np.zeros((300, 400, 3), np.uint8)
    picture[100:160, 250:310] = (255, 0, 0)  # the face, as it is seen
    turned = Image.fromarray(picture).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "ann").mkdir()
    turned.save(tmp_path / "ann" / "0.jpg", exif=exif, quality=95)
    points = np.array([[[270, 120], [290, 120], [280, 130], [272, 140], [288, 140]]], np.float32)
    index = dataclasses.replace(read_index(tmp_path).scanned(), landmarks=points)
    portraits = Portraits(index)
    with Image.open(io.BytesIO(portraits.get(0, "face"))) as face:
        assert face.size == (FACE, FACE)
        red = np.asarray(face.convert("RGB"), np.int64)
    assert red[FACE // 2, FACE // 2, 0] > 200 and red[5, 5, 0] < 60
    assert 0.4 < (red[..., 0] > 128).mean() < 0.9
    with Image.open(io.BytesIO(portraits.get(0, "whole"))) as whole:
        assert whole.size == (400, 300)
    (tmp_path / "ann" / "0.jpg").unlink()
    assert portraits.get(0, "face") == portraits.get(0, "face")  # kept
    with Image.open(io.BytesIO(Portraits(index).get(0, "face"))) as grey:
        assert len(grey.convert("RGB").getcolors() or ()) == 1


def test_no_more_pictures_are_kept_than_there_is_room_for(tmp_path: Path) -> None:
    index = draw(tmp_path, PEOPLE)
    one = len(Portraits(index).get(0, "face"))
    portraits = Portraits(index, room=2 * one + one // 2)
    for row in (0, 1, 2, 0):
        portraits.get(row, "face")
    assert portraits._held <= portraits.room and len(portraits._kept) >= 1


@pytest.mark.parametrize("damage", ["", "{}\n", "[]\n", '{"format": 9}\n', "\xff"])
def test_a_damaged_review_is_refused_with_what_to_do(folder: Path, damage: str) -> None:
    (folder / "review.jsonl").write_text(damage)
    with pytest.raises(ValueError, match="run the command anew"):
        Review.load(folder)


# ---------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.draw(tmp_path_factory.mktemp("drawn"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, drawn: Path) -> Path:
    return small.save_run(tmp_path_factory.mktemp("run"), small.make_model(template="none"), drawn)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_audit_of_a_folder_is_reviewed_without_computing_again_until_a_signal(
    tmp_path: Path, run_folder: Path, drawn: Path, number: signal.Signals
) -> None:
    out = tmp_path / "audit"
    given = [str(run_folder), "--data.root", str(drawn), "--out", str(out), "--confidence", "0.01"]
    assert audit.main(given) == 0
    command = [sys.executable, "-m", "facefast.audit", "--review", "--out", str(out)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored by what a shell starts beside itself
    ) as started:
        assert started.stderr is not None and started.stdout is not None
        address = re.findall(r"http://127\.0\.0\.1:\d+/\S+", started.stderr.readline())[0]
        with urlopen(f"{address}items", timeout=60) as answer:
            assert json.load(answer)["task"] == "audit"
        started.send_signal(number)
        said = started.stdout.read()
        assert started.wait(60) == 0, started.stderr.read()
    assert f"--data.corrections {out}/corrections.csv" in said
    assert (out / "corrections.csv").exists()


def test_the_command_computes_serves_and_says_what_was_decided(
    tmp_path: Path, run_folder: Path, drawn: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def decide(folder: Path, port: int, announce: Any) -> Decisions:
        announce("http://127.0.0.1:1/t/")
        decisions = Decisions(Review.load(folder), folder)
        decisions.decide(0, "move", "Ann")
        decisions.write_result(last=True)
        return decisions

    monkeypatch.setattr("facefast.labels.review.server.serve", decide)
    photos, out = tmp_path / "photos", tmp_path / "labels.csv"
    photos.mkdir()
    index = read_index(drawn)
    for row in range(len(index)):
        (photos / f"{row}.jpg").write_bytes(Path(index.path(row)).read_bytes())
    given = [str(run_folder), "--data.root", str(photos), "--similarity", "0", "--out", str(out), "--review"]
    assert label.main(given) == 0
    said = capsys.readouterr()
    assert "review at http://127.0.0.1:1/t/" in said.err and "1 of" in said.out
    reviewed = tmp_path / "labels.review" / "labels.csv"
    assert f"--data.labels {reviewed}" in said.out
    assert "Ann" in {line.identity for line in read_label_lines(reviewed)}
    assert "Ann" not in out.read_text()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (audit, ["--out", "x"], "no MODEL was given"),
        (audit, ["--review"], "needs --out DIR"),
        (audit, ["--review", "--out", "x"], "there is nothing to review in x"),
        (audit, ["--review", "--out", "x", "--confidence", "0.4"], "--confidence has no effect"),
        (audit, ["m", "--out", "x", "--port", "80"], "--port has no effect without --review"),
        (audit, ["m", "--plant", "0.1", "--review"], "--review has no effect with --plant"),
        (audit, ["--review", "--out", "x", "--port", "70000"], "port is 70000"),
        (label, [], "no MODEL was given"),
        (label, ["--review"], "there is nothing to review in labels.review"),
        (label, ["--review", "--data.root", "x"], "--data.root has no effect"),
        (label, ["m", "--ignore-labels", "--review"], "--review has no effect with --ignore-labels"),
    ],
)
def test_options_of_a_review_that_make_no_sense_are_refused(
    tmp_path: Path,
    command: Any,
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 64
    assert message in capsys.readouterr().err

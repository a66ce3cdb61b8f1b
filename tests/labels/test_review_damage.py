"""Names that no table can hold, and a file of answers that is damaged: refused, passed over, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from werkzeug.test import Client

from facefast.labels.review.decisions import LOG, Decisions, summary
from facefast.labels.review.items import Review
from facefast.labels.review.server import Application
from tests.support.reviews import audited, draw, end, grouped, served

PEOPLE = ("ann", "bo", "cy")
HERE, KIND = "http://127.0.0.1:4000", "application/json"


def decisions_of(folder: Path) -> Decisions:
    return Decisions(Review.load(folder), folder)


@pytest.mark.parametrize("name", ["\ud800", "\udcff", "Ann \udfff", "\udc00\ud800"])
@pytest.mark.parametrize("task", ["audit", "label"])
def test_a_name_that_no_table_can_hold_is_refused_and_the_review_ends_well(
    tmp_path: Path, task: str, name: str
) -> None:
    index = draw(tmp_path / "photos", PEOPLE)
    (grouped(index) if task == "label" else audited(index, 8)).save(tmp_path)
    decisions = decisions_of(tmp_path)
    application = Application(decisions.review, decisions, lambda: None)
    body = json.dumps({"item": 0, "action": "move", "to": name})
    client = Client(application)
    answer = client.post(f"/{application.token}/decide", data=body, base_url=HERE, content_type=KIND)
    assert answer.status_code == 400 and "half a letter" in json.loads(answer.data)["error"]
    assert not decisions.current and not (tmp_path / LOG).exists()
    assert client.post(f"/{application.token}/done", data="{}", base_url=HERE, content_type=KIND).status_code == 200


def test_answers_with_a_name_that_no_table_can_hold_are_passed_over_counted_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grouped(draw(tmp_path / "photos", PEOPLE)).save(tmp_path)
    first = decisions_of(tmp_path)
    first.decide(0, "move", "Ann")
    line = {"item": first.review.items[1].key, "action": "move", "to": "\ud800"}
    with open(tmp_path / LOG, "a") as file:
        file.write(json.dumps(line) + "\n" + json.dumps(line | {"to": "\udcff"}) + "\n" + '{"item"')
    with served(tmp_path) as address:
        end(address)
    told = capsys.readouterr().err
    assert "2 earlier answers" in told and "passed over" in told and "was cut off" in told
    again = decisions_of(tmp_path)
    assert list(again.current) == [0] and again.unwritable == 2 and "2 earlier answers" in summary(again)
    again.decide(1, "keep")
    assert again.undo() == 1
    assert list(decisions_of(tmp_path).current) == [0]


def test_a_line_of_answers_nested_without_end_is_named(tmp_path: Path) -> None:
    audited(draw(tmp_path / "photos", PEOPLE), 1).save(tmp_path)
    (tmp_path / LOG).write_text("[" * 50_000 + "\n")
    with pytest.raises(ValueError, match="line 1, is no answer"):
        decisions_of(tmp_path)

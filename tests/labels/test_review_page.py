"""The review page in a browser: the keyboard leads to the right table, names are text, and nobody is shut out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from facefast.data.corrections import apply_corrections, read_corrections, read_label_lines
from tests.support.browser import Watched
from tests.support.reviews import HOSTILE, audited, draw, grouped, served

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
Look = Callable[..., Watched]
PEOPLE = ("ann", "bo", "cy", "di")


def opened(look: Look, address: str, **more: object) -> Watched:
    watched = look(address, **more)
    watched.page.wait_for_selector(".item, #status:has-text('Nothing')")
    return watched


def settled(page: Page, count: str) -> None:
    """Waits until so many decisions are shown, and the server has taken all of them."""
    page.wait_for_selector(f"#count:text-matches('^{count} of')")
    page.evaluate("queue")


def test_twenty_suspects_decided_with_the_keyboard_end_in_the_table_that_training_reads(
    look: Look, tmp_path: Path
) -> None:
    index = draw(tmp_path / "photos", PEOPLE)
    review = audited(index, 20)
    review.save(tmp_path / "audit")
    with served(tmp_path / "audit") as address:
        page = opened(look, address).page
        # wrong, wrong, copy, merge, in turns: each as the keys say, the third picture taken back and decided anew.
        for key in "md":
            page.keyboard.press(key)
        page.keyboard.press("d")
        page.keyboard.press("u")
        settled(page, "2")
        page.keyboard.press("k")
        page.keyboard.press("g")
        for _ in range(3):
            for key in ("k", "d", "d", "k"):
                page.keyboard.press(key)
        page.keyboard.press("t")  # a name that is typed, among those of the set
        page.keyboard.type("BO")
        page.keyboard.press("Enter")
        page.keyboard.press("m")
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("d")
        page.keyboard.press("g")
        settled(page, "20")
        page.click("#done")
        page.wait_for_selector("#status:has-text('can be closed')")
    lines = [line for _, line in read_corrections(tmp_path / "audit" / "corrections.csv")]
    expected = ["relabel", "drop", "keep", "merge", *["keep", "drop", "drop", "keep"] * 3]
    assert [line.action for line in lines] == [*expected, "relabel", "relabel", "drop", "merge"]
    assert [line.path for line in lines] == [item.correction().path for item in review.items]
    assert lines[0].suggested == "bo" and lines[16].suggested == "bo"
    corrected = apply_corrections(index, tmp_path / "audit" / "corrections.csv")
    assert len(corrected) == len(index) - [line.action for line in lines].count("drop")


def test_a_review_that_was_broken_off_goes_on_where_it_was(look: Look, tmp_path: Path) -> None:
    audited(draw(tmp_path / "photos", PEOPLE), 6).save(tmp_path / "audit")
    with served(tmp_path / "audit") as address:
        page = opened(look, address).page
        page.keyboard.press("m")
        page.keyboard.press("d")
        settled(page, "2")
    with served(tmp_path / "audit") as address:
        page = opened(look, address).page
        assert page.text_content("#count") == "2 of 6 decided"
        assert (page.text_content("#what") or "").startswith("3.")
        page.keyboard.press("u")
        page.wait_for_selector("#status:has-text('taken back')")
        assert page.text_content("#count") == "1 of 6 decided"
    lines = [line for _, line in read_corrections(tmp_path / "audit" / "corrections.csv")]
    assert [line.action for line in lines] == ["relabel"]


def test_groups_are_named_merged_and_dropped(look: Look, tmp_path: Path) -> None:
    index = draw(tmp_path / "photos", PEOPLE)
    grouped(index).save(tmp_path / "labels.review")
    with served(tmp_path / "labels.review") as address:
        page = opened(look, address).page
        page.keyboard.press("g")  # 1 is 2
        page.keyboard.press("t")
        page.keyboard.type("Ann Öz")
        page.keyboard.press("Enter")
        page.keyboard.press("d")
        page.keyboard.press("k")
        settled(page, "4")
        page.click("#done")
        page.wait_for_selector("#status:has-text('can be closed')")
    named = {line.path: line.identity for line in read_label_lines(tmp_path / "labels.review" / "labels.csv")}
    names = {"ann": "Ann Öz", "bo": "Ann Öz", "cy": "", "di": "cluster-0004"}
    assert named == {index.name(row): names[index.class_names[index.labels[row]]] for row in range(len(index))}


def test_names_are_text_whatever_they_hold(look: Look, tmp_path: Path) -> None:
    index = draw(tmp_path / "photos", HOSTILE, pictures=2)
    audited(index, 8).save(tmp_path / "audit")
    with served(tmp_path / "audit") as address:
        watched = opened(look, address)
        page = watched.page
        said = "\n".join(page.locator(".item").all_text_contents())
        for name in index.class_names:
            assert name in said
        assert "\u202e" not in (page.text_content("body") or "")
        assert page.locator("img[src='x'], #title img, .item img, h2 b").count() == 0
        page.keyboard.press("t")
        page.keyboard.type("lines")
        page.wait_for_selector("#names option", state="attached")
        assert page.locator("#names option").get_attribute("value") == "two\\nlines"
        page.keyboard.type(" <b>no one</b>")
        page.keyboard.press("Enter")
        page.wait_for_selector("#status.fault:has-text('nobody here is called')")
        # The refusal is the one complaint that the console may make.
        assert all("409" in fault for fault in watched.faults)
        watched.faults.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out_and_the_page_fits(look: Look, tmp_path: Path, scheme: str) -> None:
    index = draw(tmp_path / "photos", (*PEOPLE, "a very long name of somebody whom everybody knows"))
    audited(index, 24).save(tmp_path / "audit")
    with served(tmp_path / "audit") as address:
        watched = opened(look, address, scheme=scheme)
        page = watched.page
        for key in "mdkg":
            page.keyboard.press(key)
        page.keyboard.press("ArrowLeft")
        settled(page, "4")
        page.wait_for_load_state("networkidle")
        watched.require_accessible()
        page.keyboard.press("t")
        watched.require_accessible()
        page.keyboard.press("Escape")
        if scheme == "light":
            for path in watched.photograph(tmp_path / "seen", "review"):
                with Image.open(path) as picture:
                    assert len(picture.convert("RGB").getcolors(1 << 24) or ()) > 100  # faces are on it


def test_five_thousand_suspects_scroll_and_follow_the_keys_without_asking_for_the_list_again(
    look: Look, tmp_path: Path
) -> None:
    audited(draw(tmp_path / "photos", PEOPLE), 5000).save(tmp_path / "audit")
    with served(tmp_path / "audit") as address:
        page = opened(look, address).page
        page.wait_for_load_state("networkidle")
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.keyboard.press("End")
        assert (page.text_content("#what") or "").startswith("5000.")
        assert page.locator(".item[aria-selected=true]").get_attribute("aria-posinset") == "5000"
        assert page.locator(".item").count() < 60  # of 5000, those that can be seen
        page.evaluate("document.getElementById('list').scrollTop = 44 * 2500")
        page.wait_for_selector("#item-2505")
        # From key to the next item nothing but pictures is waited for, and those were fetched before.
        page.keyboard.press("Home")
        page.wait_for_load_state("networkidle")
        spent = page.evaluate(
            """async () => {
                const spent = [];
                for (let turn = 0; turn < 30; turn++) {
                    const began = performance.now();
                    act("next");
                    await Promise.all([...document.querySelectorAll("main img")].map((image) => image.decode()));
                    spent.push(performance.now() - began);
                }
                return spent.sort((a, b) => a - b);
            }"""
        )
        print(f"to the next item with its pictures: median {spent[15]:.1f} ms, longest {spent[-1]:.1f} ms")
        assert not [url for url in asked if "/picture/" not in url]

"""What a report says of how good a model is: the headline, the table, names and their mistakes, pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from facefast.evaluation.baselines import ADAPTED, ADAPTED_PROBE, CLASS_MEANS, PROBE
from facefast.evaluation.measured import HEADLINES
from facefast.evaluation.report_charts import Chart, curves, forest, number
from facefast.evaluation.report_files import EVALUATION, RunFiles
from facefast.evaluation.report_page import (
    EMPTY,
    Page,
    bar,
    between,
    card,
    cards,
    folded,
    heading,
    joined,
    name,
    paragraph,
    percent,
    plain,
    table,
    whole,
)
from facefast.evaluation.report_pictures import Album, hard_pairs, wrong_pictures
from facefast.evaluation.report_scores import error_curves, reliability, score_histogram

TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "per_class": "per class",
    "verification_accuracy": "verification, people never seen",
    "tar@1e-2": "TAR at FAR 1 %",
    "tar@1e-3": "TAR at FAR 0.1 %",
    "auc": "AUC",
    "known_verification_accuracy": "verification, known people",
    "known_tar@1e-2": "TAR at FAR 1 %, known people",
    "tasks": "attributes",
    "validation": "on validation",
}
"""Columns of the table, and what numbers are called."""
JUDGED = {
    "top1": "of the test pictures get their right name",
    "verification_accuracy": "of the pairs of people never seen are judged rightly",
    "known_verification_accuracy": "of the pairs of test pictures, of people who were trained on, are judged rightly",
    "tasks": "is the mean over the attributes",
}
"""What the deciding number says."""
UNTRAINED = (CLASS_MEANS, ADAPTED, PROBE, ADAPTED_PROBE)
"""Rows of models that no update made."""
DRAWN = "drawn faces"
"""What is trained on where no photographs are."""
SHOWN = 12
"""Lines of a long table that are not folded away."""
Row = Mapping[str, Any]


def interval_of(run: RunFiles, row: str, key: str) -> tuple[Any, Any]:
    """The 95 % interval of a number of the table, where one is known."""
    found = run.rows.get(row, {})
    if f"{key}_low" in found:
        return found[f"{key}_low"], found[f"{key}_high"]
    verification, short = run.evaluation.get("verification"), key.removeprefix("known_")
    if row == run.handed_on and isinstance(verification, dict):
        inside = verification.get("intervals", {}).get(short)
        if inside:
            return inside[0], inside[1]
    return None, None


def data_name(run: RunFiles) -> str:
    """What the photographs are called."""
    data = run.recipe.get("data", {})
    if data.get("format") == "synthetic" or not data.get("root"):
        return DRAWN
    return Path(str(data["root"])).name or str(data["root"])


def source_name(run: RunFiles) -> str:
    """The source weights; empty for random ones."""
    told = (run.model.get("provenance") or {}).get("source")
    asked = (run.recipe.get("model") or {}).get("source", "none")
    return str(told) if told else "" if asked in ("none", "") else Path(str(asked)).name


def judged(run: RunFiles) -> tuple[str, float | None]:
    """The number that a run is judged by, and what it is called: what status.json says, else what the test part gave
    the row that is handed on; None where nothing was measured."""
    key, value = str(run.best.get("metric") or ""), number(run.best.get("value"))
    if value is not None:
        return key, value
    row = run.rows.get(run.handed_on, {})
    return next(((k, v) for k in (key, *HEADLINES) if (v := number(row.get(k))) is not None), (key, None))


def validated(run: RunFiles) -> bool:
    """Whether a validation part has chosen what is handed on."""
    selected = (run.model.get("metrics") or {}).get("selected")
    return isinstance(selected, dict) or number(run.best.get("validation")) is not None


def headline(run: RunFiles) -> Markup:
    """What was trained, on whom, and how good it is."""
    state = str(run.status.get("state", "unknown"))
    bad = "" if state == "done" else " bad"
    top = Markup('<p class="eyebrow">facefast run</p><h1>{}<span class="badge{}">{}</span></h1>').format(
        name(run.name), bad, plain(state)
    )
    try:
        return top + joined([*_said(run), *_cards(run)])
    except Exception:  # a file of the folder that holds something else than a run writes; the parts below say it
        return top


def _said(run: RunFiles) -> Iterator[Markup]:
    image = run.model.get("image") or run.recipe.get("image") or {}
    backbone = run.model.get("backbone") or (run.recipe.get("model") or {}).get("backbone")
    source, parts = source_name(run), (run.evaluation.get("photographs") or {}).get("parts") or {}
    # A run that ended before it had settled them leaves a recipe of auto and 0.
    backbone = "A model" if backbone in (None, "", "auto") else backbone
    size = f" at {image['size']}" + (f" × {image['width']}" if image.get("width") else "") if image.get("size") else ""
    size += " px" if size else ""
    begun = (
        Markup("moved from <strong>{}</strong> to").format(name(source)) if source else "trained from random weights on"
    )
    phases = [str(phase.get("name")) for phase in run.recipe.get("phases", [])]
    if not source and len(phases) > 1:
        begun = Markup("trained in {} phases ({}), the last on").format(len(phases), plain(", ".join(phases)))
    trained = parts.get("training")
    drawn = data_name(run) == DRAWN
    pictures = Markup("pictures of <strong>{}</strong>" if drawn else "photographs of <strong>{}</strong>")
    whom = pictures.format(name(data_name(run)))
    if trained:
        whom = Markup("<strong>{} people</strong>, by {} {}").format(
            whole(trained["people"]), whole(trained["pictures"]), whom
        )
    yield Markup('<p class="lead"><strong>{}</strong>{}, {} {}.</p>').format(plain(backbone), size, begun, whom)
    if run.status.get("error"):
        yield Markup('<p class="warn">{}</p>').format(plain(run.status["error"]))
    row, (key, value) = run.rows.get(run.handed_on, {}), judged(run)
    if value is not None:
        low, high = interval_of(run, run.handed_on, key)
        inside = f", 95 % interval {between((low, high))}" if between((low, high)) else ""
        what = JUDGED.get(key, f"is {TITLES.get(key, key)} on the test part")
        if key == "top1" and row.get("test_rows"):
            what = f"of {whole(row['test_rows'])} test pictures get their right name"
        means = run.rows.get(CLASS_MEANS, {}).get("top1")
        against = EMPTY
        if key == "top1" and number(means) is not None and run.handed_on != CLASS_MEANS:
            against = Markup("; class means of the untrained source give {}").format(percent(means))
        alone = "" if validated(run) else ". Nothing was validated: there was no validation part to choose by"
        yield Markup('<p class="lead"><strong>{}</strong> {}{}{}{}.</p>').format(
            percent(value), what, inside, against, alone
        )
    if run.handed_on in UNTRAINED:
        yield paragraph(
            f"Fine-tuning did not beat the {run.handed_on} on the validation part: no update made what is handed on."
        )
    yield Markup('<p class="small">{}</p>').format(chosen(run))


def chosen(run: RunFiles) -> Markup:
    """What is handed on, and what chose it."""
    if not run.handed_on:
        return Markup("Nothing has been measured yet.")
    told = Markup("Handed on as checkpoints/best: <b>{}</b>. ").format(name(run.handed_on))
    selected = (run.model.get("metrics") or {}).get("selected")
    if isinstance(selected, dict):
        return told + Markup(
            "It was chosen by {} on {} {} pictures ({}), which took no part in the numbers here: those are of the test "
            "part, which chose nothing."
        ).format(
            TITLES.get(selected["metric"], plain(selected["metric"])),
            whole(selected["pictures"]),
            plain(selected["part"]),
            percent(selected["value"]),
        )
    if number(run.best.get("validation")) is not None:
        return told + Markup("The validation part chose it ({}).").format(percent(run.best["validation"]))
    return told + Markup("No picture could be spared to choose by: it is the last.")


def _cards(run: RunFiles) -> Iterator[Markup]:
    row, (key, _), found = run.rows.get(run.handed_on, {}), judged(run), []
    first = key
    if number(row.get(key)) is not None:
        low, high = interval_of(run, run.handed_on, key)
        spread = number(row.get(key.replace("accuracy", "std"))) if key.endswith("verification_accuracy") else None
        note = between((low, high)) or ("" if spread is None else f"± {percent(spread)} over the folds")
        found.append(
            card(
                f"{TITLES.get(key, plain(key))}, test part",
                percent(row[key]),
                note,
                "first",
            )
        )
    for other, title in (
        (CLASS_MEANS, "against class means of the source"),
        ("scratch", "against training from scratch"),
    ):
        value = number(run.rows.get(other, {}).get(key))
        if value is not None and other != run.handed_on and number(row.get(key)) is not None:
            found.append(
                card(
                    title,
                    f"{100 * (row[key] - value):+.1f} points",
                    f"they give {percent(value)}" if other == CLASS_MEANS else f"it gives {percent(value)}",
                )
            )
            break
    for key in ("tar@1e-2", "verification_accuracy", "known_tar@1e-2", "known_verification_accuracy"):
        if number(row.get(key)) is not None and key != first:
            low, high = interval_of(run, run.handed_on, key)
            who = "people trained on" if key.startswith("known_") else "people never seen"
            title = TITLES[key].partition(",")[0] + ", pairs"
            found.append(card(title, percent(row[key]), f"{between((low, high))} {who}".strip()))
            break
    if number(run.status.get("images_per_second")):
        found.append(
            card(
                "training speed",
                f"{run.status['images_per_second']:.0f} images/s",
                f"bound by {plain(run.status['bound_by'])}" if run.status.get("bound_by") else "",
            )
        )
    if found:
        yield cards(*found)


def results(run: RunFiles, page: Page) -> Iterator[Any]:
    """The table of results and the numbers that are compared in it."""
    rows = run.rows
    if not rows:
        yield paragraph("The test part has not been asked yet.")
        return
    yield paragraph("Every number here is of the test part, which has chosen nothing. Lines are 95 % intervals.")
    charts = []
    for key in ("top1", "verification_accuracy", "known_verification_accuracy", "tasks"):
        values = [
            {
                "name": row,
                "value": found[key],
                "low": interval_of(run, row, key)[0],
                "high": interval_of(run, row, key)[1],
            }
            for row, found in rows.items()
            if number(found.get(key)) is not None
        ]
        if len(values) > 1 or (values and key == "top1"):
            note = "Wilson's interval for as many pictures." if key == "top1" else "Mean over the folds of the pairs."
            charts.append(forest(TITLES[key][0].upper() + TITLES[key][1:], note, values, run.handed_on))
    yield page.charts(charts)
    present = {key for found in rows.values() for key, value in found.items() if number(value) is not None}
    columns = [key for key in TITLES if key in present and key != "tasks"]
    columns += sorted(key for key in present if key.endswith(("/accuracy", "/auc", "/mae")))
    header = ["", *(TITLES.get(key, plain(key.replace("/", " "))) for key in columns)]
    tag = Markup('{} <span class="tag">handed on</span>')
    body = [
        [tag.format(name(row)) if row == run.handed_on else name(row), *(_cell(run, row, key) for key in columns)]
        for row in rows
    ]
    yield table(header, body, "Results", marked=list(rows).index(run.handed_on) if run.handed_on in rows else -1)


def _cell(run: RunFiles, row: str, key: str) -> Markup:
    value = number(run.rows[row].get(key))
    if value is None:
        return Markup("–")
    if key.endswith("/mae"):
        return Markup("{:.2f}").format(value)
    low, high = interval_of(run, row, key)
    return _with(percent(value), between((low, high)))


def not_examined(run: RunFiles) -> str:
    """Why there is no detail, where there is none."""
    if run.evaluation or (run.folder / EVALUATION).exists():  # one that is damaged is named with the files that are
        return ""
    return (
        ""
        if run.status.get("state") == "running"
        else "This run left no evaluation.json, which says more than the table."
    )


def naming(run: RunFiles, page: Page, album: Album | None) -> Iterator[Any]:
    """Whom the model names wrongly."""
    found = run.evaluation.get("closed_set")
    if not found:
        return
    share = [(k / (len(found["accuracies"]) - 1), value) for k, value in enumerate(found["accuracies"])]
    below = sum(row["right"] < row["pictures"] for row in found["worst_people"])
    yield paragraph(
        f"{whole(found['wrong_pictures'])} of {whole(found['pictures'])} test pictures, of {whole(found['people'])} "
        "people, got a wrong name."
    )
    yield page.charts(
        [
            curves(
                "People, the worst first",
                "Each person's own accuracy: how many people are how badly served.",
                {"accuracy": share},
                x="part of the people",
                x_form="~%",
                y="accuracy",
                percent=True,
                steps=True,
                height=250,
                zero=True,
            ),
            curves(
                "Among the first (CMC)",
                "Pictures whose person is among the first 1, 2, ... answers.",
                {"found": [(rank + 1, value) for rank, value in enumerate(found["cmc"])]},
                x="answers looked at",
                y="found",
                percent=True,
                height=250,
            ),
            reliability(found["reliability"], number(found["ece"])) if found["reliability"] else None,
        ]
    )
    if below:
        yield heading("People named worst")
        rows = [
            [
                name(row["name"]),
                bar(row["right"] / row["pictures"]),
                f"{row['right']} of {row['pictures']}",
                whole(row["learnt_from"]),
                "–" if row["taken_for"] is None else name(row["taken_for"]),
            ]
            for row in found["worst_people"]
            if row["right"] < row["pictures"]
        ]
        header = ["person", "named rightly", "pictures", "learnt from", "most taken for"]
        yield from _long(header, rows, "People named worst", (0, 4))
    if found["confusions"]:
        yield heading("Who is taken for whom")
        rows = [
            [name(row["name"]), name(row["taken_for"]), f"{row['pictures']} of {row['of']}"]
            for row in found["confusions"]
        ]
        yield from _long(["person", "taken for", "test pictures"], rows, "Confusions", (0, 1))
    if found["wrong"]:
        yield heading("Wrong pictures, the surest first")
        faces = wrong_pictures(album, found["wrong"][:24]) if album else EMPTY
        yield faces
        rows = [
            [
                name(row["picture"]),
                name(row["name"]),
                "–" if row["taken_for"] is None else name(row["taken_for"]),
                percent(row["probability"], 0),
                row["rank"],
            ]
            for row in found["wrong"]
        ]
        header, words = ["picture", "person", "taken for", "sure", "place of the right name"], (0, 1, 2)
        if faces:
            yield folded(f"{len(rows)} of them by name", table(header, rows, "Wrong pictures", words=words))
        else:
            yield from _long(header, rows, "Wrong pictures", words)


def _long(header: list[str], rows: list[list[Any]], label: str, words: tuple[int, ...]) -> Iterator[Markup]:
    yield table(header, rows[:SHOWN], label, words=words)
    if len(rows) > SHOWN:
        yield folded(f"{len(rows) - SHOWN} more", table(header, rows[SHOWN:], f"{label}, continued", words=words))


def verification(run: RunFiles, page: Page, album: Album | None) -> Iterator[Any]:
    """Whether two pictures are of one person: scores, curves, thresholds."""
    found = run.evaluation.get("verification")
    if not found:
        return
    held_out = (run.evaluation.get("photographs") or {}).get("held_out")
    who = "people whom no training saw" if held_out else "people who were trained on: easier than strangers"
    inside = found["intervals"]
    yield paragraph(
        f"{whole(found['pairs'])} pairs of pictures, {whole(found['same_pairs'])} of one person. They are of {who}."
    )
    key = "auc" if held_out else "known_auc"
    auc = number(run.rows.get(run.handed_on, {}).get(key))
    few = [
        card(
            "equal error rate", percent(found["eer"], 2), between(inside["eer"], 2) if "eer" in inside else "", "first"
        )
    ]
    if auc is not None:
        few.append(card("AUC", percent(auc, 2), between(inside["auc"], 2) if "auc" in inside else ""))
    yield cards(*few)
    firm = [
        (f"FMR {100 * row['fmr']:g} %", row["threshold"]) for row in found["thresholds"] if row["threshold"] is not None
    ]
    curve = [(row["threshold"], row["fmr"], row["fnmr"]) for row in found["curve"]]
    yield page.charts([score_histogram(found["histogram"], firm[:4]), *error_curves({"": curve})])
    yield heading("Thresholds for pairs")
    yield thresholds_table(found["thresholds"], "fmr", "fnmr")
    hard = found["hardest"]
    for kind, title in (("one_person", "One person, least alike"), ("two_people", "Two people, most alike")):
        if hard.get(kind):
            yield heading(title)
            yield hard_pairs(album, hard[kind]) if album else EMPTY
            rows = [[name(row["a"]), name(row["b"]), f"{row['cosine']:.3f}"] for row in hard[kind]]
            drawn = table(["picture", "picture", "cosine"], rows, title, words=(0, 1))
            yield folded(f"The {len(rows)} pairs by name", drawn)


def thresholds_table(found: list[Row], rate: str, missed: str) -> Markup:
    """Thresholds with what supports them; those that are refused with the reason."""
    rows, refused = [], [row for row in found if row["threshold"] is None]
    for row in found:
        if row["threshold"] is None:
            continue
        inside = row["threshold_interval"]
        support = f"{whole(row['impostors'])} trials of {whole(row['people'])} people"
        rows.append(
            [
                f"{100 * row[rate]:g}\u00a0%",
                _with(f"{row['threshold']:.3f}", "" if not inside else f"{inside[0]:.3f}–{inside[1]:.3f}"),
                _with(percent(row[missed]), between(row[f"{missed}_interval"])),
                support + ("" if row["firm"] else "; few errors, so roughly"),
            ]
        )
    drawn = EMPTY
    if rows:
        header = [rate.upper(), "threshold", f"{missed.upper()} there", "shown by"]
        drawn = table(header, rows, f"Thresholds by {rate.upper()}", words=(0, 3))
    if refused:
        rates = ", ".join(f"{100 * row[rate]:g}\u00a0%" for row in refused)
        drawn += paragraph(f"None for {rate.upper()} {rates}: {plain(refused[0]['why'])}.", "small")
    return drawn


def _with(value: str, interval: str) -> Markup:
    """A number with its interval beside it."""
    return Markup("{}{}").format(
        value, Markup('<span class="interval">{}</span>').format(interval) if interval else EMPTY
    )


def curve_chart(of: Mapping[str, RunFiles]) -> Iterator[Chart]:
    """ROC and DET of several runs over each other."""
    found = {}
    for label, run in of.items():
        verified = run.evaluation.get("verification")
        if verified:
            found[label] = [(row["threshold"], row["fmr"], row["fnmr"]) for row in verified["curve"]]
    yield from error_curves(found) if found else ()

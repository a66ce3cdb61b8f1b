"""What a report says around the results: how training went, on what data, how fast, where; what the model is for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from facefast.evaluation import measured
from facefast.evaluation.report_charts import bars, curves, number, shares
from facefast.evaluation.report_files import RunFiles
from facefast.evaluation.report_page import (
    EMPTY,
    Page,
    between,
    card,
    cards,
    figure,
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
from facefast.evaluation.report_pictures import Album
from facefast.evaluation.report_results import DRAWN, TITLES, data_name, thresholds_table
from facefast.models import provenance
from facefast.recipe import Phase, Recipe, to_json
from facefast.recipe.jsonable import flat

PARTS = {
    "training": "moves the weights",
    "validation": "chooses the checkpoint, the temperature and the thresholds",
    "test": "is reported; it chooses nothing",
    "verification": "is compared in pairs",
}
FEW_PICTURES, FEW_PEOPLE = 300, 50
"""Test pictures and people below which the numbers are called rough."""
BOUNDS = {
    "data_wait_fraction": "data wait",
    "transfer_fraction": "transfer",
    "allreduce_fraction": "all-reduce",
}


def points(run: RunFiles, key: str, split: str = "train") -> list[tuple[float, float]]:
    """(step, value) of a field of metrics.jsonl."""
    found = []
    for line in run.lines:
        value = number(line.get(key))
        if line.get("split") == split and value is not None:
            found.append((float(line["step"]), value))
    return found


def phases_of(run: RunFiles) -> list[tuple[str, float, float]]:
    """Name, first and last step of each phase."""
    found, begin = [], 0.0
    phases = run.plan.get("phases")
    for phase in phases if isinstance(phases, list) else []:
        steps = number(phase.get("steps")) if isinstance(phase, dict) else None
        if steps:
            found.append((str(phase.get("name")), begin, begin + steps))
            begin += steps
    return found


def training(run: RunFiles, page: Page) -> Iterator[Any]:
    """Curves."""
    loss = points(run, "loss")
    if not loss:
        return
    phases, key = phases_of(run), str(run.best.get("metric") or "top1")
    terms = sorted(
        {key for line in run.lines if line.get("split") == "train" for key in line if key.startswith("loss/")}
    )
    right = {"training batches": points(run, "accuracy"), "validation": points(run, key, "validation")}
    title = "Accuracy" if key == "top1" else f"Accuracy and {TITLES.get(key, key)}"
    yield page.charts(
        [
            curves(
                "Training loss",
                "The whole objective; its scale changes with a phase's loss.",
                {"loss": loss},
                y="loss",
                phases=phases,
            ),
            curves(
                title,
                "Batches are augmented, and so harder than validation pictures.",
                right,
                y="part right",
                phases=phases,
                dots=["validation"],
                percent=True,
            ),
            curves(
                "Terms of the loss",
                "Unweighted, each by itself.",
                {key[5:]: points(run, key) for key in terms},
                y="loss",
                phases=phases,
            )
            if len(terms) > 1
            else None,
            curves(
                "Learning rate",
                "Of the schedule, before layer-wise factors.",
                {"rate": points(run, "lr")},
                y="rate",
                phases=phases,
                form=".3~g",
                zero=True,
            ),
        ]
    )
    skipped = sum(int(number(line.get("skipped_steps")) or 0) for line in run.lines)
    if skipped:
        yield paragraph(f"{whole(skipped)} updates were left out because a gradient was not finite.")


def data(run: RunFiles, page: Page, album: Album | None) -> Iterator[Any]:
    """The photographs, and what was wrong with them."""
    found = run.evaluation.get("photographs")
    if not found:
        return
    rows = []
    for key, what in PARTS.items():
        part = found["parts"].get(key)
        if part and not (key == "verification" and found["same_pictures"]):
            rows.append([key, whole(part["people"]), whole(part["pictures"]), whole(part["nameless"]), what])
    yield table(
        ["part", "people", "pictures", "without a name", "what it does"], rows, "Parts of the photographs", words=(0, 4)
    )
    if found["same_pictures"]:
        yield paragraph(f"Pairs ({whole(found['pairs'])}) are of the test pictures too.", "small")
    left, total = found["left_out"], sum(found["left_out"].values())
    unreadable = sum(int(number(line.get("unreadable_rows")) or 0) for line in run.lines)
    told = (
        f"{whole(total)} pictures were left out before training."
        if total
        else "No picture had to be left out before training."
    )
    if unreadable:
        told += f" {whole(unreadable)} times one could not be decoded while training; its place counted for nothing."
    yield paragraph(told)
    if left:
        rows = [[plain(fault), whole(count)] for fault, count in sorted(left.items(), key=lambda item: -item[1])]
        yield table(["fault", "pictures"], rows, "Faults")
    sides = found["shorter_side"]
    histogram = [(row["from"], row["to"], row["people"]) for row in found["pictures_per_person"]]
    note = ""
    if sides and sides[2]:
        same = f"The shorter side of every picture has {sides[0]} px."
        note = same if sides[0] == sides[2] else f"Shorter sides: {sides[0]} to {sides[2]} px, the median {sides[1]}."
    yield page.charts(
        [bars("Training pictures of a person", note, histogram, "pictures", "people") if histogram else None]
    )
    if album and found["batch"]:
        yield heading("As training sees them")
        yield album.augmented(found["batch"])


def speed(run: RunFiles, page: Page) -> Iterator[Any]:
    """Throughput and what bounded it."""
    status, phases = run.status, phases_of(run)
    rate = number(status.get("images_per_second"))
    if rate:
        yield cards(
            card("images a second, over all processes", f"{rate:.0f}", "evaluations left out", "first"),
            card("bound by", plain(status["bound_by"]), f"data wait {percent(status.get('data_wait_fraction'))}")
            if status.get("bound_by")
            else EMPTY,
        )
        if status.get("advice"):
            yield paragraph(f"To change that: {plain(status['advice'])}.")
    parts = [(title, status[key]) for key, title in BOUNDS.items() if number(status.get(key)) is not None]
    yield page.charts(
        [
            curves(
                "Images a second",
                "Of training, over all processes.",
                {"speed": points(run, "images_per_second")},
                y="images/s",
                phases=phases,
                zero=True,
            ),
            curves(
                "Data wait",
                "Part of the time in which the first process waited for pictures.",
                {"wait": points(run, "data_wait_fraction")},
                y="part",
                phases=phases,
                zero=True,
                percent=True,
            ),
            shares(
                "Where the time goes",
                "Waiting for pictures, moving them to the device and exchanging gradients, as parts of the whole.",
                parts,
            )
            if parts
            else None,
        ]
    )


def facts(pairs: Sequence[tuple[str, Any]]) -> Markup:
    """Names and what they are."""
    return Markup('<dl class="facts">{}</dl>').format(
        joined(
            Markup("<dt>{}</dt><dd>{}</dd>").format(title, value) for title, value in pairs if value not in ("", None)
        )
    )


def card_of(run: RunFiles) -> Iterator[Any]:
    """The model card."""
    model, found = run.model, run.evaluation
    if not model:
        return
    classes, asked = model.get("num_classes") or 0, (model.get("metrics") or {}).get("evaluation_set") or {}
    train = run.plan.get("phases", [{}])[-1]
    use = "telling whether two photographs show one person"
    if classes > 1:
        use = (
            f"naming {whole(classes)} people in photographs like those measured here, saying unknown of others, and "
            + use
        )
    faces = model.get("faces") or {}
    calibration = model.get("calibration") or {}
    yield facts(
        [
            ("Model", Markup("{}, head {}").format(plain(model.get("backbone")), plain(model.get("head")))),
            ("Intended use", f"{use[0].upper()}{use[1:]}. Where a name has consequences a person decides."),
            (
                "Not for",
                "People who have not agreed to it; anybody unlike those measured here, until it is measured on them.",
            ),
            ("Source weights and licence", name(provenance.sentence(model.get("provenance")))),
            (
                "Trained on",
                Markup("{}: {} pictures of {} people, fingerprint <code>{}</code>").format(
                    name(data_name(run)),
                    whole(train.get("num_rows")),
                    whole(train.get("num_classes")),
                    plain(train.get("fingerprint", "")),
                ),
            ),
            ("Measured on", _measured_on(asked)),
            ("Reached", name(measured.sentence(model.get("metrics")))),
            ("How faces are found", name(", ".join(f"{key} {value}" for key, value in faces.items() if value))),
            (
                "Probabilities",
                ""
                if not calibration
                else f"temperature {calibration['temperature']:.3g}, fitted on {whole(calibration['rows'])} validation "
                f"pictures: calibration error {percent(calibration['ece_before'])} before, "
                f"{percent(calibration['ece'])} after",
            ),
        ]
    )
    thresholds = model.get("thresholds") or {}
    if thresholds.get("naming"):
        yield heading("Thresholds for names: below, a face is of somebody unknown")
        yield thresholds_table(thresholds["naming"], "fpir", "fnir")
        yield paragraph(f"By {plain(thresholds.get('measured_on', ''))}.", "small")
    yield from _groups(found)
    yield heading("Limits")
    yield Markup("<ul>{}</ul>").format(joined(Markup("<li>{}</li>").format(text) for text in limits(run)))


def _measured_on(asked: Mapping[str, Any]) -> Any:
    if not asked:
        return ""
    parts = [
        f"{whole(part['pictures'])} {title} of {whole(part['people'])} people"
        for key, title in (("test", "test pictures"), ("verification", "pictures in pairs"))
        if (part := asked.get(key))
    ]
    return Markup("{}: {}; digest <code>{}</code>").format(
        name(asked.get("name", "")), "; ".join(parts), plain(str(asked.get("digest", ""))[:16])
    )


def _groups(found: Mapping[str, Any]) -> Iterator[Any]:
    """Rates of groups of people, with intervals by people."""
    groups = (found.get("closed_set") or {}).get("groups") or []
    if groups:
        yield heading("Names, by group")
        rows = [
            [
                name(row["column"]),
                name(row["group"]),
                whole(row["people"]),
                whole(row["pictures"]),
                percent(row["accuracy"]),
                between(row["interval"]),
            ]
            for row in groups
        ]
        yield table(
            ["", "group", "people", "pictures", "top-1", "95 % interval"], rows, "Accuracy by group", words=(0, 1)
        )
    errors = (found.get("verification") or {}).get("groups") or []
    if errors:
        yield heading("Pairs, by group")
        rate = errors[0]["threshold_fmr"]
        rows = [
            [
                name(row["column"]),
                name(row["group"]),
                whole(row["people"]),
                *(
                    Markup('{} <span class="interval">{}</span>').format(
                        percent(row[key], 2), between(row[f"{key}_interval"], 2)
                    )
                    if row[key] is not None
                    else "–"
                    for key in ("fmr", "fnmr")
                ),
            ]
            for row in errors
        ]
        yield table(["", "group", "people", "FMR", "FNMR"], rows, "Errors of pairs by group", words=(0, 1))
        yield paragraph(f"At one threshold for all: that of FMR {100 * rate:g}\u00a0%.", "small")


def limits(run: RunFiles) -> Iterator[str]:
    """What the numbers do not say."""
    found = run.evaluation
    closed, verified, parts = found.get("closed_set") or {}, found.get("verification"), found.get("photographs") or {}
    if data_name(run) == DRAWN:
        yield "The faces are drawn, not photographed: the numbers say nothing of photographs."
    if closed and (closed["pictures"] < FEW_PICTURES or closed["people"] < FEW_PEOPLE):
        yield (
            f"The test part is small ({whole(closed['pictures'])} pictures of {whole(closed['people'])} people): see "
            "the intervals before two numbers are compared."
        )
    if closed:
        yield (
            "Accuracy is of people who were trained on; how many strangers get a name is what the thresholds are for, "
            "and is to be measured on strangers (facefast evaluate --identify)."
        )
    if verified and not parts.get("held_out"):
        yield (
            "Pairs are of people who were trained on: strangers are harder to tell apart (--data.verify-fraction keeps "
            "people for that)."
        )
    refused = [row for row in ((run.model.get("thresholds") or {}).get("naming") or []) if row["threshold"] is None]
    if refused:
        rates = ", ".join(f"{100 * row['fpir']:g} %" for row in refused)
        yield f"No threshold is given for FPIR {rates}: the pictures are too few to show such rates."
    if not (closed.get("groups") or (verified or {}).get("groups")):
        yield "No group of people was measured by itself: the photographs say nothing of age, sex or origin."
    else:
        yield "Groups are those that the photographs tell of; others were not measured."
    if provenance.licence_of(run.model.get("provenance") or {}) is None and (run.model.get("provenance") or {}).get(
        "source"
    ):
        yield "The licence of the source weights is not known: nobody told it (--model.source-licence)."


def defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What each option of a recipe is by default, by its dotted name; phases go by the names that the recipe has."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(Recipe):
        if field.name == "phases":
            continue
        factory = field.default_factory
        value = field.default if factory is dataclasses.MISSING else factory()
        found |= dict(flat({field.name: to_json(value)}))
    plain_phase = {key: value for key, value in to_json(Phase()).items() if key != "name"}
    for phase in recipe.get("phases", []):
        found |= dict(flat({"phases": [{"name": phase["name"], **plain_phase}]}))
    return found


def recipe(run: RunFiles) -> Iterator[Any]:
    """What was asked for, what differs from the defaults first."""
    usual = defaults(run.recipe)
    own = dict(flat(run.recipe))
    rows = [
        [name(key), name(_told(value)), name(_told(usual[key]))]
        for key, value in own.items()
        if key in usual and usual[key] != value
    ]
    if rows:
        yield folded(
            f"{len(rows)} options that differ from their defaults",
            table(["option", "this run", "default"], rows, "Options that differ", words=(0, 1, 2)),
        )
    for title, document in (("The whole recipe (recipe.json)", run.recipe), ("The plan (plan.json)", run.plan)):
        if document:
            yield folded(title, Markup('<pre tabindex="0">{}</pre>').format(json.dumps(document, indent=1)))


def _told(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def environment(run: RunFiles) -> Iterator[Any]:
    """Where it ran."""
    found = run.environment
    if not found:
        return
    packages = found.get("packages") or {}
    yield facts(
        [
            ("Device", name(found.get("device", ""))),
            ("Processes", figure(found.get("world_size"))),
            ("Cores", figure(found.get("cores"))),
            ("System", name(found.get("platform", ""))),
            ("Python", name(found.get("python", ""))),
            ("Packages", name(", ".join(f"{key} {value}" for key, value in packages.items()))),
            ("Command", Markup("<code>{}</code>").format(name(" ".join(map(str, found.get("command") or []))))),
        ]
    )
    yield EMPTY

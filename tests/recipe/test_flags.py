"""The flags of train: which recipe they choose, what they reach, what is said of misspelt ones, and the help."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from facefast import train
from facefast.evaluate import EvaluateArguments
from facefast.recipe import Recipe
from facefast.recipe.flags import EXAMPLE, TrainArguments, run_folder, train_arguments
from facefast.recipe.named import RECIPES
from facefast.recipe.options import nearest, options, typed
from facefast.recipe.usage import COMMON, SPECIAL, WIDTH
from tests.support.options import OPTION

SOURCE = ["--data.root=people", "--model.source=weights.pt"]


def recipe_of(*words: str) -> Recipe:
    return train_arguments(list(words))[0]


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as left:
        train_arguments(list(words))
    assert left.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "drawn"),
        (["--data.format", "synthetic"], "drawn"),
        (["--data.root=people"], "scratch"),
        (["--data.root=people", "--model.source", "weights.pt"], "finetune"),
        (["--data.root", "people", "--model.source=weights.pt"], "finetune"),
        (["scratch", "--data.root=people", "--seed", "3"], "scratch"),
    ],
)
def test_data_and_source_choose_the_recipe_where_none_is_named(words: list[str], name: str) -> None:
    recipe, out, resume = train_arguments(words)
    assert [phase.name for phase in recipe.phases] == [phase.name for phase in RECIPES[name](EXAMPLE).phases]
    assert (out, resume) == (Path("runs") / name, "auto")


def test_flags_reach_phases_by_name_or_number_and_nothing_else_changes() -> None:
    plain = recipe_of("drawn")
    by_name, out, resume = train_arguments(
        ["drawn", "--phases.finetune.lr=0.5", "--phases.1.loss.gamma", "2", "--out=here", "--resume", "never"]
    )
    assert (by_name.phases[2].lr, by_name.phases[1].loss.gamma) == (0.5, 2.0)
    assert by_name.phases[0] == plain.phases[0]
    assert (out, resume) == (Path("here"), "never")


def test_hyphens_and_underscores_are_the_same_and_switches_have_a_no() -> None:
    recipe = recipe_of("--data.max_bad_fraction=0.5", "--save-every", "7", "--no-channels-last", "--eval.no-baselines")
    assert (recipe.data.max_bad_fraction, recipe.save_every) == (0.5, 7)
    assert not recipe.channels_last and not recipe.eval.baselines


def test_a_recipe_is_built_from_what_it_needs_and_takes_the_rest_as_it_is_typed() -> None:
    binary = recipe_of("binary", *SOURCE, "--binary.people", "ann", "bob", "--tasks.alpha", "0.5")
    assert binary.binary.people == ("ann", "bob")
    assert (binary.tasks.alpha, binary.model.source) == (0.5, "weights.pt")
    assert recipe_of("binary", *SOURCE, "--binary.negatives=rocks").binary.negatives == "rocks"
    tasks = recipe_of("multitask", *SOURCE, "--tasks.attributes", "Male", "Young", "--tasks.weights", "1", "2").tasks
    assert (tasks.attributes, tasks.weights) == (("Male", "Young"), (1.0, 2.0))
    student = recipe_of("distill", "--data.root=people", "--model.teacher", "runs/big", "--model.backbone=facenet")
    assert (student.model.teacher, student.model.backbone, student.model.head) == ("runs/big", "facenet", "cosine")


def test_compare_scratch_puts_the_baseline_first() -> None:
    recipe = recipe_of(*SOURCE, "--compare-scratch", "--phases.last.lr=0.25")
    starts = [(phase.name, phase.start) for phase in recipe.phases]
    assert starts == [("scratch", "scratch"), ("last", "source"), ("all", "previous")]
    assert recipe.phases[1].lr == 0.25


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scratch", "--data.format=celeba"], "data.format celeba needs --data.root"),
        (["finetune", "--data.root=people"], "model.source, which is none"),
        (["scratch", "--data.root=people", "--model.source=weights.pt"], "model.source weights.pt has no effect"),
        (["multitask", *SOURCE], "recipe multitask needs --tasks.attributes NAME"),
        (["binary", *SOURCE], "recipe binary needs --binary.people NAME"),
        (["distill", "--data.root=people"], "recipe distill needs --model.teacher RUN"),
    ],
)
def test_contradictions_are_refused_before_anything_is_read(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_arguments(words)


@pytest.mark.parametrize("form", [["--lr", "0.5"], ["--lr=0.5"]])
def test_a_phase_need_not_be_named_where_there_is_but_one(form: list[str]) -> None:
    (phase,) = recipe_of("share", *SOURCE, *form, "--epochs=2", "--batch_size", "8").phases
    assert (phase.name, phase.lr, phase.epochs, phase.batch_size) == ("share", 0.5, 2.0, 8)
    assert recipe_of("share", *SOURCE, "--batch-size=8").phases[0].batch_size == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetune", *SOURCE, "--lr", "1"], "--lr could mean --phases.last.lr or --phases.all.lr; say which"),
        (
            ["drawn", "--batch_size=8"],
            "--batch-size could mean --phases.scratch.batch-size, --phases.pretrain.batch-size or "
            "--phases.finetune.batch-size; say which",
        ),
        (
            ["share", *SOURCE, "--compare-scratch", "--epochs=1"],
            "--epochs could mean --phases.scratch.epochs or --phases.share.epochs; say which",
        ),
    ],
)
def test_an_option_without_its_phase_is_refused_where_it_could_mean_several(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        train_arguments(words)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["finetun"], "there is no recipe 'finetun'; did you mean finetune? (facefast train --help"),
        (["nonsense"], "there is no recipe 'nonsense'; the recipes are drawn, finetune, scratch"),
        (["--imge.size=64"], "there is no option --imge.size; did you mean --image.size? (facefast train --help-all"),
        (["--size=64"], "there is no option --size; did you mean --image.size?"),
        (
            ["--epoch", "3"],
            "no option --epoch; did you mean --phases.scratch.epochs, --phases.pretrain.epochs or --phases",
        ),
        (["--hepl"], "there is no option --hepl; did you mean --help?"),
        (["share", "--zoom=3"], "there is no option --zoom (facefast train --help-all lists all of them)"),
        (
            ["finetune", "--phases.lst.lr", "3"],
            "there is no option --phases.lst.lr; did you mean --phases.last.lr? (the phases are last, all)",
        ),
        (["finetune", "--phases.2.lr", "3"], "there is no option --phases.2.lr (the phases are last, all)"),
        (["finetune", "--phases.all.rl", "3"], "there is no option --phases.all.rl; did you mean --phases.all.lr?"),
        (["share", "-lr", "3", *SOURCE], "there is no option -lr; did you mean --phases.share.lr?"),
        (["multitask", "--task.attributes", "Male"], "no option --task.attributes; did you mean --tasks.attributes?"),
        (["--no-image.size"], "there is no option --no-image.size"),
        (["--data.root", "people", "scratch"], "the recipe comes first: facefast train scratch"),
        (["--data.root", "my", "people"], "'people' is no value of the option before it"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        train_arguments(words)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_word_is_near_what_it_resembles_or_ends() -> None:
    known = ["--image.size", "--data.root", "--phases.a.lr", "--phases.b.lr", "train"]
    assert nearest("--data.roto", known) == ["--data.root"]
    assert nearest("--lr", known) == ["--phases.a.lr", "--phases.b.lr"]
    assert nearest("trian", known) == ["train"]
    assert nearest("size", known) == []  # no option, so the end of none
    assert nearest("xylophone", known) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model.head=cosin"], "cosine"),
        (["--seed", "abc"], "--seed"),
        (["--data.test-fraction=3"], "must lie in [0, 1)"),
        (["--data.root"], "--data.root"),
    ],
)
def test_a_value_of_the_wrong_kind_ends_with_64_and_names_its_option(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(words) == 64
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [[name] for name in RECIPES]
    + [[name, "--compare-scratch"] for name in RECIPES if name not in ("drawn", "scratch")],
    ids=" ".join,
)
def test_the_help_of_every_recipe_fits_on_a_page(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, *words, "--help").splitlines()
    assert len(page) <= 60
    assert max(map(len, page)) <= WIDTH
    assert not [line for line in page[1:] if line.endswith(" ...")]  # nothing breaks off


@pytest.mark.parametrize("name", RECIPES)
def test_help_shows_the_values_that_the_recipe_has(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, name, "-h")
    recipe = RECIPES[name](EXAMPLE)
    found = {o.path: o for o in options(TrainArguments, TrainArguments(recipe=recipe, out=run_folder(name)))}
    for path in set(COMMON) - set(SPECIAL) - {"compare_scratch"}:
        value = found[path].default
        shown = f"{value:g}" if isinstance(value, float) else str(value) or "''"
        assert re.search(rf"^  {re.escape(found[path].flag)} {re.escape(shown)}  +\w", page, re.M), path
    rates = ", ".join(f"{phase.lr:g}" for phase in recipe.phases)
    assert re.search(rf"^  --(phases\.NAME\.)?lr {rates}  +Peak learning rate$", page, re.M)
    assert f"--phases.{recipe.phases[-1].name}.lr" in page
    assert f"--help-all all {len(found)} options" in page


def test_help_marks_what_a_recipe_needs_and_only_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert "  --model.source FILE  " in printed(capsys, "finetune", "--help")
    assert "  --model.source none  " in printed(capsys, "scratch", "--help")
    assert "  --model.teacher RUN  " in printed(capsys, "distill", "--help")
    assert "  --binary.people NAME  " in printed(capsys, "binary", "--help")
    assert "  --tasks.attributes NAME  " in printed(capsys, "multitask", "--help")
    assert "--binary.people" not in printed(capsys, "multitask", "--help")


def test_help_describes_the_recipe_that_would_run_and_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    page = printed(capsys, "--help", *SOURCE)
    assert "\nfinetune: Staged fine-tuning: " in page
    assert (
        "\n  torchrun --standalone --nproc-per-node 2 -m facefast.train --data.root DIR --model.source FILE\n" in page
    )
    listed = re.findall(r"^  (\w+) +[A-Z].*\.$", page.partition("\nRecipes (")[2], re.M)
    assert listed == list(RECIPES)
    assert "\ndrawn: " in printed(capsys, "--help")
    assert "\nfixed: " in printed(capsys, "fixed", "--lr=3", "--nonsense", "--help")


def test_help_is_the_same_however_train_is_started(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["share", "--help"]) == 0
    assert capsys.readouterr().out == printed(capsys, "share", "--help")


@pytest.mark.parametrize("name", ["drawn", "share"])
def test_help_all_shows_every_option_that_there_is(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, name, "--help-all")
    recipe = RECIPES[name](EXAMPLE)
    numbers = {phase.name: str(number) for number, phase in enumerate(recipe.phases)}
    there = set()
    for option in options(TrainArguments, TrainArguments(recipe=recipe, out=Path("x"))):
        parts = option.flag.split(".")
        there.add(".".join([parts[0], numbers[parts[1]], *parts[2:]]) if parts[0] == "--phases" else option.flag)
    assert set(re.findall(OPTION, text, re.M)) == there
    assert f"phases.0 is {recipe.phases[0].name}" in text


def test_what_was_typed_is_known_whatever_its_value_and_spelling() -> None:
    words = ["MODEL", "--data.root", "x", "--data.test_fraction=0.2", "--eval.no-baselines", "--seed", "0", "--"]
    found = typed(EvaluateArguments, [*words, "--data.format=celeba"])
    assert found == {"data.root", "data.test_fraction", "eval.baselines", "seed"}
    assert typed(EvaluateArguments, ["MODEL"]) == frozenset()

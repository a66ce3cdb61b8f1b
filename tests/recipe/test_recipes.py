"""Every named recipe from its command line, on a few drawn faces: each leaves a mark that no other would."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from facefast import audit, evaluate, export, predict, train
from facefast.data.drawn import synthetic
from facefast.models import build_model, checkpoint
from facefast.recipe import ImageSpec, ModelConfig
from facefast.recipe.flags import EXAMPLE
from facefast.recipe.named import RECIPES
from facefast.runtime import files
from facefast.training.prune import sparsity_of

SIZE = 32
TINY = (
    f"--image.size={SIZE}",
    "--eval.pairs=40",
    "--eval.folds=2",
    "--log-every=1",
    "--data.format=celeba",
    "--keep=1",
)
RUNS: dict[str, tuple[str, ...]] = {
    "finetune": (),
    "adapt": (),
    "fixed": (),
    "share": (),
    "twophase": (),
    "extract": (),
    "softmax": (),
    "focal": (),
    "arcface": (),
    "cosface": (),
    "adaface": (),
    "triplet": ("--phases.triplet.pictures-per-identity=2", "--data.verify-fraction=0.4"),
    "contrastive": ("--phases.contrastive.pictures-per-identity=2", "--data.verify-fraction=0.4"),
    "distill": ("--phases.distill.distill.logits=0.5",),
    "regularised": (),
    "multitask": ("--tasks.attributes", "Male", "Smiling", "--tasks.weighting=uncertainty"),
    "binary": ("--binary.people", "1", "--data.test-fraction=0.4"),
    "prune": ("--phases.prune.prune=0.4",),
    "pseudolabel": ("--data.label-fraction=0.4",),
    "align": ("--data.label-fraction=0.5",),
}
"""Recipes that start from a source model or a teacher, and what their command lines need on so few faces."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = synthetic.DrawnSpec(identities=(6, 0, 0), pictures=8, seed=1)
    return synthetic.write(tmp_path_factory.mktemp("data") / "drawn", spec, processes=1, progress=False)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights whose BatchNorm has seen pictures."""
    torch.manual_seed(4)
    model = build_model(ModelConfig(backbone="mobilefacenet", embedding=16), 0, ImageSpec(size=SIZE))
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        model.encode(torch.randn(32, 3, SIZE, SIZE))
    path = tmp_path_factory.mktemp("weights") / "source.safetensors"
    state = {name.removeprefix("backbone."): value.contiguous() for name, value in model.state_dict().items()}
    safetensors.torch.save_file(state, path)
    return path


class Runs:
    """Finished runs by recipe, each made once."""

    def __init__(self, drawn: Path, source: Path, folder: Path) -> None:
        self.drawn, self.source, self.folder = drawn, source, folder

    def __getitem__(self, name: str) -> Path:
        out = self.folder / name
        if not out.exists():
            given = f"--model.teacher={self['finetune']}" if name == "distill" else f"--model.source={self.source}"
            phases = [phase.name for phase in RECIPES[name](EXAMPLE).phases]
            small = [
                flag for phase in phases for flag in (f"--phases.{phase}.batch-size=8", f"--phases.{phase}.steps=6")
            ]
            words = [name, *TINY, *small, *RUNS[name], given, f"--data.root={self.drawn}", f"--out={out}"]
            assert train.main(words) == 0
        return out


@pytest.fixture(scope="module")
def runs(drawn: Path, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(drawn, source, tmp_path_factory.mktemp("runs"))


def lines(run: Path, split: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["split"] == split]


def reported(run: Path, phase: str) -> dict[str, Any]:
    """What the test part gave for a phase's model."""
    return [line for line in lines(run, "test") if line["phase"] == phase][-1]


def weights(run: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / "last" / "model.safetensors")


def moved(run: Path, source: Path) -> set[str]:
    """The source's parameters that the run has changed."""
    before, after = safetensors.torch.load_file(source), weights(run)
    return {name for name, value in before.items() if not torch.equal(value, after[f"backbone.{name}"])}


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"drawn", "scratch"}))
def test_every_recipe_runs_from_its_command_line(name: str, runs: Runs) -> None:
    run = runs[name]
    assert files.read_json(run / "status.json")["state"] == "done"
    assert evaluate.main([str(run), f"--data.root={runs.drawn}", "--data.format=celeba", "--eval.pairs=20"]) == 0


def test_fixed_weights_move_the_head_alone_and_see_each_picture_once(runs: Runs, source: Path) -> None:
    assert moved(runs["fixed"], source) == set()
    speeds = [line["data_wait_fraction"] for line in lines(runs["fixed"], "train")]
    assert set(speeds) == {0.0}  # no picture was decoded after the features were computed


def test_a_later_phase_may_go_on_for_epochs_without_an_evaluation(drawn: Path, source: Path, tmp_path: Path) -> None:
    small = [f"--phases.{phase}.{flag}" for phase in ("last", "all") for flag in ("batch-size=8", "steps=12")]
    words = ["finetune", *TINY, *small, "--eval.every=100", f"--model.source={source}", f"--data.root={drawn}"]
    assert train.main([*words, f"--out={tmp_path}"]) == 0
    evaluations, asked = lines(tmp_path, "validation"), lines(tmp_path, "test")
    assert [evaluation["phase"] for evaluation in evaluations] == ["last", "last", "all"]
    best = files.read_json(tmp_path / "status.json")["best"]
    (row,) = (line for line in asked if line["phase"] == best["phase"])
    assert best["value"] == row[best["metric"]]
    assert best["validation"] == max(evaluation[best["metric"]] for evaluation in evaluations)


def test_shared_weights_stay_in_the_first_stages(runs: Runs, source: Path) -> None:
    names = moved(runs["share"], source)
    assert names and not any(
        name.startswith(("conv1", "dw_conv1", *(f"blocks.{k}." for k in range(12)))) for name in names
    )
    assert any(name.startswith("blocks.12.") for name in names)
    assert lines(runs["share"], "train")[0]["loss"] > 1.5 * lines(runs["finetune"], "train")[0]["loss"]  # a random head


def test_the_default_moves_the_last_stages_first_and_then_all(runs: Runs, source: Path) -> None:
    assert any(name.startswith("conv1.") for name in moved(runs["finetune"], source))
    evaluations = lines(runs["finetune"], "validation")
    assert [evaluation["phase"] for evaluation in evaluations] == ["last", "last", "last", "all", "all"]
    titles = ["class means", "5 nearest neighbours", "linear probe"]
    assert [line["phase"] for line in lines(runs["finetune"], "test")] == ["last", *titles, "all"]
    rates = {line["phase"]: line["lr"] for line in lines(runs["finetune"], "train")}
    assert max(rates.values()) <= 0.01
    page = (runs["finetune"] / "report.html").read_text()
    assert all(title in page for title in titles)


def test_the_tutorials_two_phases_log_their_curves(runs: Runs) -> None:
    recipe = files.read_json(runs["twophase"] / "recipe.json")
    first, second = recipe["phases"]
    assert (recipe["model"]["dropout"], first["optimizer"], first["schedule"]) == (0.5, "adam", "step")
    assert (first["lr"], first["step_epochs"], first["step_gamma"]) == (3e-4, 5, 0.5)
    assert second["lr"] < first["lr"] and second["loss"]["gamma"] == 2
    board = EventAccumulator(str(runs["twophase"] / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/accuracy", "train/lr", "test/top1", "test/loss"} <= set(board.Tags()["scalars"])


def test_feature_extraction_hands_its_head_to_fine_tuning(runs: Runs, source: Path) -> None:
    training = lines(runs["extract"], "train")
    last_fixed = [line["loss"] for line in training if line["phase"] == "fixed"][-1]
    first_tuned = next(line["loss"] for line in training if line["phase"] == "last")
    assert first_tuned < 2 * last_fixed + 0.5
    assert moved(runs["extract"], source)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("softmax", "margin", "none"),
        ("focal", "class_weights", "effective"),
        ("arcface", "margin", "arc"),
        ("cosface", "margin_size", 0.35),
        ("adaface", "margin", "ada"),
    ],
)
def test_each_loss_trains_to_other_weights(name: str, field: str, value: Any, runs: Runs) -> None:
    assert files.read_json(runs[name] / "recipe.json")["phases"][0]["loss"][field] == value
    others = [
        weights(runs[other])["head.weight"] for other in ("softmax", "focal", "arcface", "cosface") if other != name
    ]
    assert not any(torch.equal(weights(runs[name])["head.weight"], other) for other in others)


@pytest.mark.parametrize("name", ["triplet", "contrastive"])
def test_sets_for_verification_only_need_no_classes(name: str, runs: Runs, source: Path) -> None:
    assert moved(runs[name], source)
    assert not any(key.startswith("head") for key in weights(runs[name]))
    assert "top1" not in reported(runs[name], name)
    best = files.read_json(runs[name] / "status.json")["best"]
    # Two people kept out are too few to be divided: pairs of known people choose, those of strangers are reported.
    value = reported(runs[name], name)["verification_accuracy"]
    assert (best["metric"], best["value"]) == ("verification_accuracy", value)
    chosen = [line["known_verification_accuracy"] for line in lines(runs[name], "validation")]
    assert best["validation"] == max(chosen)


def test_a_shallower_student_starts_from_its_teachers_layers_and_comes_nearer_to_it(runs: Runs) -> None:
    training = lines(runs["distill"], "train")
    assert {"loss/identity", "loss/distill_embeddings", "loss/distill_logits"} <= training[0].keys()
    assert training[-1]["loss/distill_embeddings"] < training[0]["loss/distill_embeddings"]
    assert files.read_json(runs["distill"] / "checkpoints/last/model.json")["backbone"] == "mobilefacenet_short"
    theirs, own = weights(runs["finetune"]), weights(runs["distill"])
    for block, source in ((1, 2), (8, 14)):  # of the student and of the teacher
        name = "backbone.blocks.{}.conv.0.weight".format
        given, other = theirs[name(source)].flatten(), theirs[name(source - 1)].flatten()
        near, far = (torch.cosine_similarity(own[name(block)].flatten(), w, dim=0) for w in (given, other))
        assert near > 0.8 and far < 0.3, block


def test_the_regularised_run_evaluates_averaged_weights(runs: Runs) -> None:
    path = runs["regularised"] / "checkpoints" / "last"
    assert checkpoint.read_tensors(path, "ema")
    recipe = files.read_json(path / "recipe.json")
    assert recipe["model"]["drop_path"] > 0 and recipe["phases"][0]["l2sp"] > 0 and recipe["phases"][0]["mixup"] > 0


def test_attributes_are_told_beside_names(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation = reported(runs["multitask"], "multitask")
    assert {"top1", "Male/auc", "Male/accuracy", "Smiling/auc", "tasks"} <= evaluation.keys()
    training = lines(runs["multitask"], "train")
    assert {"loss/identity", "loss/Male", "loss/Smiling"} <= training[0].keys()
    assert "log_variances" in checkpoint.read_tensors(runs["multitask"] / "checkpoints" / "last", "objective")
    picture = next((runs.drawn / "img_align_celeba").iterdir())
    assert predict.main([str(runs["multitask"]), str(picture), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(answer["attributes"]) == {"Male", "Smiling"} and answer["names"]


def test_yes_or_no_is_learnt_from_people_and_asked_of_strangers(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    run = runs["binary"]
    assert {"match/auc", "match/accuracy", "match/tar@1e-2"} <= reported(run, "binary").keys()
    assert files.read_json(run / "status.json")["best"]["metric"] == "tasks"
    capsys.readouterr()
    picture = next((runs.drawn / "img_align_celeba").iterdir())
    assert predict.main([str(run), str(picture)]) == 0
    assert "match" in capsys.readouterr().out


def test_pruned_weights_are_zero_in_the_model_that_is_handed_on(runs: Runs) -> None:
    assert sparsity_of(checkpoint.load_model(runs["prune"] / "checkpoints" / "last")) == pytest.approx(0.4, abs=0.01)
    assert sparsity_of(checkpoint.load_model(runs["softmax"])) == 0


def test_a_pruned_model_is_drawn_to_the_embeddings_of_the_whole_source(runs: Runs) -> None:
    pulls = [line["loss/distill_embeddings"] for line in lines(runs["prune"], "train")]
    assert pulls[0] == pytest.approx(0, abs=1e-5)  # before the first weight goes the model is the source
    assert max(pulls) > 1e-3


def test_pictures_without_a_name_are_named_and_trained_on(runs: Runs, drawn: Path) -> None:
    run = runs["pseudolabel"]
    with open(run / "pseudo-labels-round1.csv", newline="", encoding="utf-8") as file:
        named = list(csv.DictReader(file))
    plan = files.read_json(run / "plan.json")["phases"]
    assert (plan[0]["num_rows"], plan[1]["num_rows"]) == (12, 36)  # six of eight pictures train, two of them named
    assert len(named) == 24
    assert all(not line["identity"] or 0 <= float(line["confidence"]) <= 1 for line in named)
    assert (run / "pseudo-labels-round2.csv").exists()


def test_a_resumed_run_keeps_the_names_that_it_gave(runs: Runs, source: Path, tmp_path: Path) -> None:
    straight, words = tmp_path / "straight", []
    for phase in ("named", "round1", "round2"):
        words += [f"--phases.{phase}.batch-size=8", f"--phases.{phase}.steps=4"]
    words += [*TINY, *RUNS["pseudolabel"], f"--model.source={source}", f"--data.root={runs.drawn}", "--save-every=2"]
    assert train.main(["pseudolabel", *words, "--keep=20", f"--out={straight}"]) == 0
    resumed = tmp_path / "resumed"
    (resumed / "checkpoints").mkdir(parents=True)
    (resumed / "checkpoints" / "step-0000006").symlink_to(straight / "checkpoints" / "step-0000006")
    names = (straight / "pseudo-labels-round1.csv").read_bytes()
    (resumed / "pseudo-labels-round1.csv").write_bytes(names)
    assert train.main(["pseudolabel", *words, "--keep=20", f"--out={resumed}"]) == 0
    assert (resumed / "pseudo-labels-round1.csv").read_bytes() == names
    one, two = weights(straight), weights(resumed)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_domains_are_aligned_where_names_are_missing(runs: Runs) -> None:
    training = lines(runs["align"], "train")
    assert any(line["loss/align"] > 0 for line in training)


def test_what_the_audit_suspects_is_left_out(runs: Runs, tmp_path: Path) -> None:
    out = tmp_path / "audit"
    assert audit.main([str(runs["finetune"]), f"--data.root={runs.drawn}", "--data.format=celeba", f"--out={out}"]) == 0
    assert (out / "suspects.csv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill"], "recipe distill needs --model.teacher"),
        (["multitask"], "recipe multitask needs --tasks.attributes"),
        (["binary"], "recipe binary needs --binary.people"),
        (
            ["finetune", "--phases.all.sampler=pk", "--phases.last.mixup=0.1", "--model.teacher=x"],
            "model.teacher x has no",
        ),
        (["pseudolabel"], "labels pseudo has no effect: every training picture has a name"),
        (["align"], "align coral has no effect: every training picture has a name"),
        (["finetune", "--model.drop-path=0.1", "--model.source=none"], "model.source, which is none"),
    ],
)
def test_what_a_recipe_cannot_do_without_is_asked_for_by_name(
    words: list[str], message: str, runs: Runs, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [] if "--model.source=none" in words else [f"--model.source={runs.source}"]
    command = [words[0], *TINY, f"--data.root={runs.drawn}", f"--out={tmp_path / 'run'}", *given, *words[1:]]
    assert train.main(command) == 64
    assert message in capfd.readouterr().err


def test_a_set_that_knows_only_ages_joins_a_run_on_names(runs: Runs, tmp_path: Path) -> None:
    pictures = sorted((runs.drawn / "img_align_celeba").iterdir())
    for number, picture in enumerate(pictures[:24]):
        folder = tmp_path / "afad" / str(20 + number % 3) / ("111" if number % 2 else "112")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    out = tmp_path / "run"
    words = ["--phases.multitask.batch-size=8", "--phases.multitask.steps=6", "--tasks.attributes", "Male", "age"]
    words += ["--tasks.weights", "0.5", "0.1", f"--data.more={tmp_path / 'afad'}", f"--model.source={runs.source}"]
    assert train.main(["multitask", *TINY, *words, f"--data.root={runs.drawn}", f"--out={out}"]) == 0
    evaluation = reported(out, "multitask")
    assert {"top1", "Male/auc", "age/mae", "age/within5", "tasks"} <= evaluation.keys()
    assert 0 <= evaluation["age/mae"] <= 2
    assert files.read_json(out / "checkpoints/last/model.json")["attributes"] == [
        {"name": "Male", "levels": []},
        {"name": "age", "levels": [20.0, 21.0, 22.0]},
    ]
    more = files.read_json(out / "plan.json")["phases"][0]["num_rows"]
    assert more > 36  # the named pictures alone


@pytest.mark.parametrize("name", ["multitask", "binary", "pseudolabel"])
def test_what_a_recipe_learns_beside_names_does_not_stand_in_the_way_of_an_evaluation_elsewhere(
    name: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, picture in enumerate(sorted((runs.drawn / "img_align_celeba").iterdir())[:12]):
        folder = tmp_path / "others" / f"stranger{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / picture.name).write_bytes(picture.read_bytes())
    package = tmp_path / "package"
    assert export.main([str(runs[name]), str(package), "--to", "safetensors"]) == 0
    assert str(runs.drawn) not in (package / "recipe.json").read_text()
    for model in (runs[name], package):
        assert evaluate.main([str(model), f"--data.root={tmp_path / 'others'}", "--eval.pairs=10", "--json"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert "verification_accuracy" in found and not any("/" in key for key in found)

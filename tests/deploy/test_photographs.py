"""Photographs in Python: `embed` and `predict` of a loaded model do what `facefast predict` does, and take tensors as
ever."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import facefast
from facefast import gallery, predict
from facefast.data import make_loader, make_sampler, read_index
from facefast.data.walk import loose_photographs
from facefast.deploy import photographs as photographs_module
from facefast.deploy.package import export
from facefast.deploy.photographs import PhotographModel
from facefast.evaluation.thresholds import NamingThreshold
from facefast.faces.align import locator
from facefast.models import FaceModel, Prediction, checkpoint
from facefast.recipe import AugmentSpec, Reading
from facefast.runtime.exits import DataError
from facefast.runtime.process import Runtime, World
from tests.support import small
from tests.support.pictures import as_taken, encode, garbled_png, smooth_picture

RUN = Runtime(World(), torch.device("cpu"))


def bytes_of(seed: int) -> NDArray[np.uint8]:
    return np.asarray(smooth_picture(small.SIZE, small.SIZE, seed), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(), Path("nowhere"))


@pytest.fixture(scope="module")
def model(run: Path) -> PhotographModel:
    return facefast.load(run, detect="none")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of the model's own size, without loss."""
    (tmp_path / "photographs" / "deeper").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "deeper/a.png", "deeper/c.png")):
        (tmp_path / "photographs" / name).write_bytes(encode(bytes_of(seed), "PNG"))
    return tmp_path / "photographs"


def test_a_loaded_model_is_a_face_model_that_takes_tensors_as_ever(run: Path, model: PhotographModel) -> None:
    plain = checkpoint.load_model(run)
    images = torch.randint(0, 256, (3, 3, small.SIZE, small.SIZE), dtype=torch.uint8)
    assert isinstance(model, FaceModel) and not model.training and model.to_config() == plain.to_config()
    for one in (model, copy.deepcopy(model)):
        assert torch.equal(one.embed(images), plain.embed(images))
        assert torch.equal(one.embed(images, mirror=False), plain.embed(images, False))
        assert torch.equal(one.preprocess(images), plain.preprocess(images))
        found = one.predict(images)
        assert isinstance(found, Prediction) and found.names == plain.predict(images).names
    assert model.state_dict().keys() == plain.state_dict().keys()
    with pytest.raises(ValueError, match="are for photographs; a tensor gives all probabilities"):
        model.predict(images, top=2)  # type: ignore[call-overload]


def test_paths_folders_and_arrays_are_embedded_in_the_order_given(model: PhotographModel, folder: Path) -> None:
    arrays = [bytes_of(seed) for seed in range(3)]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    expected = model.embed(images)
    mixed: list[Any] = [folder / "b.png", *arrays[1:]]
    every: tuple[Any, ...] = (folder, [folder], str(folder), arrays, mixed, np.stack(arrays))
    for given in every:
        torch.testing.assert_close(model.embed(given), expected, rtol=0, atol=2e-3)  # bytes are rounded
    torch.testing.assert_close(model.embed(arrays[1]), expected[1:2], rtol=0, atol=2e-3)
    torch.testing.assert_close(model.embed(arrays, mirror=False), model.embed(images, mirror=False), rtol=0, atol=2e-3)
    assert (expected @ expected.T).min() < 0.9  # pictures that are told apart


def answers_of(run: Path, given: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert predict.main([str(run), str(given), "--json", *flags]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def without_embeddings(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for answer in answers:
        for holder in (answer, *answer.get("faces", ())):
            holder.pop("embedding", None)
    return answers


def test_predict_gives_what_the_command_prints(
    run: Path, model: PhotographModel, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "garbled.png").write_bytes(garbled_png())  # its header is sound
    (folder / "html.jpg").write_bytes(b"<html>not found</html>")
    found = model.predict(folder, top=2, threshold="none")
    assert [Path(answer["path"]).name for answer in found] == ["b.png", "a.png", "c.png", "garbled.png", "html.jpg"]
    torch.testing.assert_close(torch.from_numpy(found[0]["embedding"]), model.embed(folder / "b.png")[0])
    assert without_embeddings(found) == answers_of(run, folder, capsys, "--detect=none", "--top=2", "--threshold=none")
    assert found[3]["fault"] == "it could not be decoded" and "names" in found[0]
    named = model.predict([bytes_of(0), folder / "b.png"], threshold="none", top=2)
    assert named[0]["path"] == "array 0" and named[0]["names"] == named[1]["names"] == found[0]["names"]


def test_strangers_are_unknown_by_the_models_threshold_or_by_ones_own(folder: Path, tmp_path: Path, run: Path) -> None:
    made = small.make_model()
    naming = [NamingThreshold(0.01, 0.999, 400, 400, why="").to_json()]
    made.thresholds = {"pairs": [], "naming": naming, "measured_on": "nothing"}
    strict = facefast.load(small.save_run(tmp_path / "strict", made, Path("nowhere")), detect="none")
    (answer,) = strict.predict(folder / "b.png")
    assert answer["names"] == ["unknown"] and answer["nearest"][0] in small.NAMES
    assert strict.predict(folder / "b.png", threshold=-1.0)[0]["names"] == answer["nearest"]
    store, eve = tmp_path / "g.gallery", tmp_path / "eve.png"
    eve.write_bytes(encode(smooth_picture(64, 64, 0), "PNG"))
    assert gallery.main(["enroll", str(store), "eve", str(eve), "--model", str(run), "--detect=none"]) == 0
    loaded = facefast.load(run, detect="none")
    assert loaded.predict(eve, gallery=store, threshold=0.9)[0]["names"] == ["eve"]
    assert loaded.predict(folder / "deeper" / "a.png", gallery=str(store), threshold=0.999)[0]["names"] == ["unknown"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "no photographs were given"),
        (["gone.jpg"], "gone.jpg does not exist"),
        ([np.zeros((4, 4, 3), np.float32)], r"photograph 0 is float32 \[4, 4, 3\]; give a path, or an array"),
        ([np.zeros((40, 40), np.uint8)], r"photograph 0 is uint8 \[40, 40\]"),
        ([3], "photograph 0 is int; give a path"),
        ([torch.zeros(3, 4, 4)], r"photograph 0 is torch.float32 \[3, 4, 4\]"),
    ],
)
def test_what_is_no_photograph_is_refused_by_name(model: PhotographModel, given: Any, message: str) -> None:
    for asked in (model.embed, model.predict):
        with pytest.raises(ValueError, match=message):
            asked(given)


def test_a_photograph_that_gives_no_embedding_is_an_error_that_names_it(model: PhotographModel, folder: Path) -> None:
    (folder / "deeper" / "b.png").write_bytes(garbled_png())
    with pytest.raises(DataError, match="1 of 4 photographs give no embedding .*deeper/b.png: it could not be decoded"):
        model.embed(folder)


def test_a_model_in_training_mode_and_one_without_people_say_so(model: PhotographModel, tmp_path: Path) -> None:
    busy = copy.deepcopy(model).train()
    with pytest.raises(ValueError, match="the model is in training mode"):
        busy.embed([bytes_of(0)])
    nobody = small.save_run(tmp_path / "nobody", small.make_model(classes=()), Path("nowhere"))
    loaded = facefast.load(nobody, detect="none")
    assert loaded.embed([bytes_of(0)]).shape == (1, 16)
    with pytest.raises(ValueError, match="knows no identities; give gallery, or use embed"):
        loaded.predict([bytes_of(0)])


def test_answers_of_more_faces_than_a_block_are_those_of_each(
    model: PhotographModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = without_embeddings(model.predict(folder, threshold="none"))
    monkeypatch.setattr(photographs_module, "BLOCK", 2)
    assert without_embeddings(model.predict(folder, threshold="none")) == whole


def test_group_photographs_give_every_face_and_walls_none(shared_weights: Path, celeba: Path, tmp_path: Path) -> None:
    taken = [np.asarray(Image.open(path).convert("RGB")) for path in as_taken(celeba, 2)[0]]
    height = min(picture.shape[0] for picture in taken)
    group = np.concatenate([picture[:height] for picture in taken], axis=1)
    wall = np.full((200, 200, 3), 128, np.uint8)
    model = facefast.load(shared_weights / "mobilefacenet_casia_112x96.ckpt", detect="mtcnn")
    alone = model.embed(taken)
    together = model.embed([group, *taken])
    assert (together[1:] * alone).sum(1).min() > 0.999
    assert (together[0] @ alone.T).max() > 0.95  # of the two it is one, whole
    store = tmp_path / "g.gallery"
    source = str(shared_weights / "mobilefacenet_casia_112x96.ckpt")
    for name, path in zip(("ann", "bo"), as_taken(celeba, 2)[0], strict=True):
        assert gallery.main(["enroll", str(store), name, str(path), "--model", source, "--detect=mtcnn"]) == 0
    found = model.predict([group, wall], gallery=store, threshold=0.7)
    assert sorted(face["names"][0] for face in found[0]["faces"] if face["names"] != ["unknown"]) == ["ann", "bo"]
    assert all(len(face["box"]) == 4 for face in found[0]["faces"])
    assert found[1] == {"path": "array 1", "fault": "no face was found"}
    with pytest.raises(DataError, match=r"1 of 2 photographs .*array 1: no face was found"):
        model.embed([group, wall])


def test_one_photograph_is_the_same_tensor_in_training_evaluation_prediction_and_onnx(
    tmp_path: Path,
) -> None:
    root = small.draw(tmp_path / "drawn")
    made = small.make_model()
    index = read_index(root).scanned()  # with landmarks: aligned on its way
    tensors: dict[str, torch.Tensor] = {}

    def read(name: str, **fields: Any) -> None:
        images = torch.zeros(len(index), 3, *made.image.shape)
        with make_loader(fields.pop("index", index), made.image, **fields) as loader:
            for batch in loader:
                images[batch.rows[batch.rows >= 0]] = batch.images[batch.rows >= 0].float()
        tensors[name] = images

    sampler = make_sampler("epoch", labels=index.labels, batch_size=8, seed=1)
    read("training", sampler=sampler, augment=AugmentSpec(), seed=1)
    read("evaluation", batch_size=5)
    paths = [index.path(row) for row in range(len(index))]
    faces = locator(made.image, {"how": "landmarks"}, "none", RUN)
    part, owners = faces.every_face(loose_photographs(paths), Reading(1))
    assert part.landmarks is None and owners.tolist() == list(range(len(index)))
    marked = part.__class__(**{**vars(part), "landmarks": index.landmarks})
    read("prediction", index=marked, batch_size=3)
    one = tensors["evaluation"]
    assert one.std() > 0.1  # pictures, not nothing
    for name, other in tensors.items():
        assert float((other - one).abs().max()) * 127.5 <= 1, name

    # ONNX gets the same faces as bytes; what it makes of them is seen in its embeddings.
    faces_as_bytes = (one * 127.5 + 127.5).round().clamp(0, 255).byte()
    assert float((made.preprocess(faces_as_bytes) - one).abs().max()) * 127.5 <= 1
    export(made, "onnx", tmp_path / "model.onnx", kind="uint8")
    read_back = checkpoint.load_model(tmp_path / "model.onnx")
    torch.testing.assert_close(read_back.embed(one), made.embed(faces_as_bytes), rtol=0, atol=1e-4)

"""Prediction: which photographs, who is on them, what could not be read, and faces that a detector has to find."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import facefast
from facefast import gallery, predict
from facefast.data import oracle, read_index
from facefast.data.walk import find_pictures, loose_photographs
from facefast.deploy.photographs import answer as ask
from facefast.evaluation.thresholds import NamingThreshold
from facefast.models import precision
from facefast.models.precision import Precision
from facefast.runtime import process
from tests.support import small
from tests.support.pictures import as_taken, encode, exif, garbled_png, smooth_picture

RUN = process.Runtime(process.World(), torch.device("cpu"))
FP32 = Precision.choose("fp32", "mobilefacenet", True, RUN.device)
AS_THEY_ARE = ("--detect=none",)
"""For pictures that show no face: none is looked for."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.save_run(tmp_path_factory.mktemp("runs") / "run", small.make_model(), Path("nowhere"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Three sound ones: without loss, so that every decoder reads the same, and of the model's own size."""
    folder = tmp_path / "photographs"
    (folder / "deeper").mkdir(parents=True)
    for seed, name in enumerate(("b.png", "deeper/a.PNG", "deeper/c.bmp")):
        picture = smooth_picture(small.SIZE, small.SIZE, seed)
        (folder / name).write_bytes(encode(picture, "BMP" if name.endswith("bmp") else "PNG"))
    (folder / "notes.txt").write_text("not a photograph")
    return folder


def answers_of(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    """What --json printed, by file name."""
    lines = [json.loads(line) for line in capsys.readouterr().out.strip().splitlines()]
    return {Path(line["path"]).name: line for line in lines}


def test_folders_give_their_pictures_in_order_and_files_are_taken_as_they_are(photographs: Path) -> None:
    odd = photographs / "notes.txt"
    found = find_pictures((odd, photographs))
    assert [os.path.basename(path) for path in found] == ["notes.txt", "b.png", "a.PNG", "c.bmp"]
    with pytest.raises(ValueError, match="gone.jpg does not exist"):
        find_pictures((photographs, photographs / "gone.jpg"))
    (photographs / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no photographs in .*empty; they end in \.apng, .*\.jpg"):
        find_pictures((photographs / "empty",))


def test_folders_are_walked_as_the_index_walks_them(tmp_path: Path) -> None:
    names = ["a.JPG", "a.dib", "a.heic", "a.jfif", "a.jpe", "a.ppm"]
    for name in (*names, "._a.jpg", "__MACOSX/b.jpg", "@eaDir/a.jpg/c.jpg"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    (tmp_path / "more").mkdir()
    (tmp_path / "more/b.jpg").touch()
    (tmp_path / "p/link").symlink_to(tmp_path / "more")
    assert [os.path.basename(path) for path in find_pictures((tmp_path / "p",))] == [*names, "b.jpg"]
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="neither a photograph nor a folder"):
        find_pictures((tmp_path / "pipe.jpg",))


def test_names_come_with_probabilities_best_first_and_embeddings_are_the_models(
    run: Path, photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = tmp_path / "vectors.npz"
    assert (
        predict.main([str(run), str(photographs), *AS_THEY_ARE, "--json", "--top", "9", f"--embeddings={vectors}"]) == 0
    )
    found = answers_of(capsys)
    assert list(found) == ["b.png", "a.PNG", "c.bmp"]
    for answer in found.values():
        assert set(answer) == {"path", "names", "probabilities", "score", "faces"}
        assert answer["faces"] == [{name: answer[name] for name in ("names", "probabilities", "score")}]
        assert sorted(answer["names"]) == sorted(small.NAMES)  # no more than there are
        assert answer["probabilities"] == sorted(answer["probabilities"], reverse=True)
        assert sum(answer["probabilities"]) == pytest.approx(1, abs=1e-5)
    model = small.make_model()
    pictures = np.stack([oracle.decode(path) for path in find_pictures((photographs,))])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
    with np.load(vectors) as stored:
        assert stored["paths"].tolist() == [answer["path"] for answer in found.values()]
        np.testing.assert_allclose(stored["embeddings"], model.embed(images).numpy(), atol=2e-3)  # bytes are rounded


def test_a_line_for_people_has_the_path_and_the_best_name(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(run), str(photographs / "b.png"), *AS_THEY_ARE]) == 0
    path, name = capsys.readouterr().out.strip().split("  ")
    assert path == str(photographs / "b.png")
    assert name.split()[0] in small.NAMES
    assert name.endswith("%")


# Unknown.


def thresholds(**values: float | None) -> dict[str, Any]:
    """Of naming, by rate in percent: p1=0.5 is a score of 0.5 at FPIR 1 %."""
    naming = [
        NamingThreshold(int(name[1:]) / 100, value, 400, 400, why="too few").to_json() for name, value in values.items()
    ]
    return {"pairs": [], "naming": naming, "measured_on": "nothing"}


def run_with(folder: Path, found: dict[str, Any] | None) -> Path:
    model = small.make_model()
    model.thresholds = found
    return small.save_run(folder, model, Path("nowhere"))


def asked(run: Path, photo: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[dict[str, Any], str]:
    """The answer, and what was said beside it."""
    assert predict.main([str(run), str(photo), *AS_THEY_ARE, "--json", *flags]) == 0
    output = capsys.readouterr()
    (answer,) = map(json.loads, output.out.splitlines())
    return answer, output.err


def test_a_face_below_the_models_threshold_is_unknown_with_whom_it_is_nearest_to(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = photographs / "b.png"
    named, _ = asked(run_with(tmp_path / "any", thresholds(p1=-1.0)), photo, capsys)
    strict = run_with(tmp_path / "strict", thresholds(p10=-1.0, p1=0.999))
    unknown, said = asked(strict, photo, capsys)
    assert said.count("note") == 0 and named["names"][0] in small.NAMES
    assert unknown["names"] == ["unknown"] and unknown["probabilities"] == [None]
    assert unknown["nearest"] == named["names"] and unknown["score"] == named["score"] < 0.999
    assert unknown["faces"] == [{key: unknown[key] for key in ("names", "probabilities", "score", "nearest")}]
    for flags in (("--threshold=none",), ("--threshold=far@1e-1",), (f"--threshold={named['score'] - 1e-3}",)):
        assert asked(strict, photo, capsys, *flags)[0] == named
    assert asked(strict, photo, capsys, f"--threshold={named['score'] + 1e-3}", "--top=3")[0] == unknown
    assert predict.main([str(strict), str(photo), *AS_THEY_ARE]) == 0
    score = f"{named['score']:.3f}"
    assert capsys.readouterr().out == f"{photo}  unknown (score {score}, nearest {named['names'][0]})\n"


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (None, "knows no threshold: everybody gets a name; give --threshold SCORE"),
        (thresholds(p10=None, p5=None, p1=None), "no threshold for fpir 0.01: too few: everybody gets a name"),
    ],
)
def test_a_model_that_can_tell_nobody_from_strangers_says_so_and_names_everybody(
    found: dict[str, Any] | None,
    said: str,
    photographs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = run_with(tmp_path / "run", found)
    answer, error = asked(run, photographs / "b.png", capsys)
    assert "\nnote: " in error and said in error and answer["names"][0] in small.NAMES
    assert "note" not in asked(run, photographs / "b.png", capsys, "--threshold=none")[1]
    assert asked(run, photographs / "b.png", capsys, "--threshold=1")[0]["names"] == ["unknown"]
    assert predict.main([str(run), str(photographs), *AS_THEY_ARE, "--threshold=far@1e-2"]) == 64
    assert "give --threshold another rate, a score or none, which names all" in capsys.readouterr().err


def test_where_the_pictures_were_too_few_for_one_percent_the_next_rate_is_taken_with_a_word(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with(tmp_path / "run", thresholds(p10=-1.0, p5=0.999, p1=None))
    answer, error = asked(run, photographs / "b.png", capsys)
    assert answer["names"] == ["unknown"]
    assert "note: too few people or pictures for a threshold at FPIR 0.01; that of 0.05 is taken" in error


def test_a_gallery_answers_instead_of_the_people_of_training(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    people, photographs = tmp_path / "people", tmp_path / "photographs"
    photographs.mkdir()
    for seed, name in enumerate(("dee", "eve", "fay")):
        (photographs / f"{name}.png").write_bytes(encode(smooth_picture(64, 64, seed), "PNG"))
        if name != "fay":
            (people / name).mkdir(parents=True)
            shutil.copy(photographs / f"{name}.png", people / name)
    stored = tmp_path / "people.gallery"
    flags = ("--model", str(run), *AS_THEY_ARE)
    assert gallery.main(["enroll", str(stored), str(people), *flags]) == 0
    capsys.readouterr()
    given = (f"--gallery={stored}", "--threshold=0.99")
    answer, _ = asked(run, photographs / "eve.png", capsys, *given, "--top=2")
    assert answer["names"] == ["eve", "dee"] and "probabilities" not in answer
    assert answer["scores"][0] == answer["score"] == pytest.approx(1, abs=1e-4) and answer["scores"][1] < 0.99
    stranger, _ = asked(run, photographs / "fay.png", capsys, *given)
    assert (stranger["names"], stranger["scores"]) == (["unknown"], [None])
    assert stranger["nearest"][0] in ("dee", "eve")
    assert predict.main([str(run), str(photographs), *AS_THEY_ARE, f"--gallery={stored}"]) == 64
    assert "2 pictures of strangers cannot show a rate of 0.01" in capsys.readouterr().err
    other = run_with(tmp_path / "other", None)
    weights = small.make_uneven_model()
    small.save_run(other, weights, Path("nowhere"))
    assert predict.main([str(other), str(photographs), *AS_THEY_ARE, *given]) == 64


def test_unreadable_pictures_are_named_and_the_others_answered(
    run: Path, photographs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photographs / "html.jpg").write_bytes(b"<html>not found</html>")
    (photographs / "garbled.png").write_bytes(garbled_png())  # its header is sound
    assert predict.main([str(run), str(photographs), *AS_THEY_ARE, "--json"]) == 0
    found = answers_of(capsys)
    assert sorted(name for name, answer in found.items() if "names" in answer) == ["a.PNG", "b.png", "c.bmp"]
    assert found["garbled.png"]["fault"] == "it could not be decoded"
    assert found["html.jpg"]["fault"]
    assert predict.main([str(run), str(photographs / "html.jpg"), str(photographs / "garbled.png"), *AS_THEY_ARE]) == 65
    output = capsys.readouterr()
    assert "html.jpg  not read: " in output.out
    assert "none of 2 pictures could be embedded" in output.err


def test_a_file_name_that_is_no_text_is_printed_all_the_same(
    run: Path, photographs: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    os.rename(photographs / "b.png", os.path.join(os.fsencode(photographs), b"b\xff.png"))
    assert predict.main([str(run), str(photographs), *AS_THEY_ARE]) == 0
    assert r"b\xff.png  " in capfd.readouterr().out


def test_a_model_without_identities_gives_embeddings_only(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small.save_run(tmp_path / "headless", small.make_model(classes=()), photographs)
    assert predict.main([str(run), str(photographs)]) == 64
    assert "knows no identities; give --gallery G, --embeddings OUT.npz or --annotate DIR" in capsys.readouterr().err
    flags = (*AS_THEY_ARE, f"--embeddings={tmp_path / 'vectors.npz'}", "--json")
    assert predict.main([str(run), str(photographs), *flags]) == 0
    assert all(set(answer) == {"path", "faces"} for answer in answers_of(capsys).values())


def test_classes_without_names_are_numbered(photographs: Path) -> None:
    model = small.make_model()
    model.class_names = ()
    (answer,) = ask(model, loose_photographs([photographs / "b.png"]), RUN, FP32)
    assert answer["names"][0] in ("0", "1", "2", "3")


def test_a_mobilefacenet_runs_in_full_precision_on_a_cpu_that_has_bfloat16(
    photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index, model = loose_photographs((photographs,)), small.make_model()
    embeddings = []
    for bf16 in (False, True):
        monkeypatch.setattr(precision, "cpu_has_bf16", lambda has=bf16: has)
        chosen = Precision.choose("auto", model.config.backbone, True, RUN.device)
        answers = ask(model, index, RUN, chosen)
        embeddings.append(np.stack([answer["embedding"] for answer in answers]))
    np.testing.assert_array_equal(embeddings[0], embeddings[1])


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--top", "0"), 64, "top is 0; it must lie in"),
        (("--detect", "gone.onnx"), 64, "the detector gone.onnx is not there"),
        ((*AS_THEY_ARE, "--embeddings", "gone/vectors.npz"), 74, "cannot write gone/vectors.npz"),
    ],
)
def test_wrong_use_says_why(
    run: Path, photographs: Path, flags: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main([str(run), str(photographs), *flags]) == code
    assert message in capsys.readouterr().err


def test_a_detector_that_would_change_nothing_is_refused(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = small.save_run(tmp_path / "run", small.make_model(template="none"), photographs)
    assert predict.main([str(run), str(photographs), "--detect", "yunet.onnx"]) == 64
    assert "detect yunet.onnx would change nothing" in capsys.readouterr().err


# From here on: the real detector on real photographs.


@pytest.fixture(scope="module")
def yunet(shared_weights: Path) -> Path:
    return shared_weights / "face_detection_yunet.onnx"


@pytest.fixture(scope="module")
def wild(celeba: Path) -> tuple[list[Path], NDArray[np.float32]]:
    """Six photographs as they were taken, and the landmarks that another detector found on them."""
    return as_taken(celeba)


def test_detected_faces_embed_like_the_same_faces_aligned_by_hand(
    yunet: Path,
    shared_weights: Path,
    wild: tuple[list[Path], NDArray[np.float32]],
    celeba: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "wild"
    folder.mkdir()
    for path in wild[0][:2]:
        shutil.copy(path, folder)
    upright = Image.open(wild[0][0]).convert("RGB")
    (folder / "turned.jpg").write_bytes(encode(upright.transpose(Image.Transpose.ROTATE_90), exif=exif(6)))
    (folder / "wall.jpg").write_bytes(encode(np.full((300, 200, 3), 128, np.uint8)))
    (folder / "garbled.png").write_bytes(garbled_png())
    source = shared_weights / "mobilefacenet_casia_112x96.ckpt"
    found = {}
    for flags in (AS_THEY_ARE, (f"--detect={yunet}",)):
        vectors = tmp_path / f"{flags == AS_THEY_ARE}.npz"
        assert predict.main([str(source), str(folder), "--json", f"--embeddings={vectors}", *flags]) == 0
        with np.load(vectors) as stored:
            names = [Path(path).name for path in stored["paths"].tolist()]
            found[flags != AS_THEY_ARE] = dict(zip(names, stored["embeddings"], strict=True))
    answers = answers_of(capsys)  # of both calls, the later one's stay
    assert answers["wall.jpg"]["fault"] == "no face was found"
    assert answers["garbled.png"]["fault"] == "it could not be decoded"
    assert sorted(found[True]) == sorted({path.name for path in wild[0][:2]} | {"turned.jpg"})

    index = read_index(celeba)
    by_name = {index.name(row): row for row in range(len(index))}
    rows = [by_name[next(name for name in by_name if name.endswith(path.name))] for path in wild[0][:2]]
    aligned = index.select(rows).scanned()
    truth = [answer["embedding"] for answer in ask(facefast.load(source), aligned, RUN, FP32)]
    for path, expected in zip(wild[0][:2], truth, strict=True):
        assert found[True][path.name] @ expected > 0.8
        assert found[False][path.name] @ expected < 0.6  # the middle of the picture is not the face
    assert found[True]["turned.jpg"] @ truth[0] > 0.8

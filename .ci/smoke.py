"""What an installed facefast must do, asked from outside any checkout: `python smoke.py FOLDER [QUESTION...]`.

The questions are version, loss, dali and model, by default all of them; FOLDER takes what `model` writes. Only the
public contract is used. Every question prints one line, or ends in a traceback and a non-zero status.
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ["FACEFAST_REQUIRE_NATIVE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def facefast(*arguments: str) -> str:
    """The console script beside this interpreter."""
    command = [str(Path(sys.executable).with_name("facefast")), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


def version(folder: Path) -> str:
    import facefast as package

    said = facefast("--version")
    assert package.__version__ in said, said
    return f"{said.strip()} in {Path(package.__file__).parent}"


def loss(folder: Path) -> str:
    import torch

    from facefast import _C, ops

    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0]], requires_grad=True)
    target = torch.tensor([0, 2])
    value = ops.focal_loss(logits, target, gamma=0.0)
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, target))
    value.backward()
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    return f"focal_loss of {Path(_C.__file__).name} with torch {torch.__version__}: {value.item():.6f}"


def dali(folder: Path) -> str:
    import nvidia.dali
    from nvidia.dali import fn, plugin_manager

    import facefast as package

    plugin = Path(package.__file__).with_name("_dali.so")
    plugin_manager.load_library(str(plugin))
    return f"{fn.face_augment.__name__} of {plugin.name} with DALI {nvidia.dali.__version__}"


def model(folder: Path) -> str:
    """Index, DALI, a few steps of training, a checkpoint, an export, and embeddings of what was exported."""
    import numpy as np
    import torch
    from PIL import Image

    import facefast as package

    generator = np.random.default_rng(0)
    for person in ("ann", "bob", "cyd"):
        (folder / "photos" / person).mkdir(parents=True)
        for number in range(6):
            noise = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((48, 48)).save(folder / "photos" / person / f"{number}.jpg")
    run, exported = folder / "run", folder / "package"
    flags = ("--image.size=32", "--phases.scratch.steps=2", "--phases.scratch.batch-size=4")
    facefast("train", "scratch", f"--data.root={folder / 'photos'}", f"--out={run}", *flags)
    facefast("export", str(run), str(exported), "--to", "safetensors")
    images = torch.from_numpy(generator.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8))
    with torch.inference_mode():
        vectors = package.load(exported).embed(images)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    return f"embeddings {list(vectors.shape)} of a model that was trained and exported"


QUESTIONS = {"version": version, "loss": loss, "dali": dali, "model": model}

if __name__ == "__main__":
    where = Path(sys.argv[1]).resolve()
    for name in sys.argv[2:] or QUESTIONS:
        print(f"{name}: {QUESTIONS[name](where)}", flush=True)

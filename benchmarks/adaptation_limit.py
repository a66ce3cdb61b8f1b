"""What an adaptation could win back at most: the source, which sees the unshifted pictures, teaches a copy of itself
that sees the shifted ones, as no user can.

    python benchmarks/adaptation_limit.py --root CELEBA --sets DIR --source WEIGHTS [--kinds grey all] [--seeds 0]

People are divided as in `adaptation.py`, and the copy learns from those that may be known: all weights, AdamW, one
cycle over a few passes, towards the direction of the source's embedding of the same picture, mirrored or not, before
its shift. A row `limit-KIND` of results/transfer.jsonl has TAR over all pairs of the third part's pictures by the copy
as it is and after the map that is best for them: a bound needs no honest choice.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import numpy as np
import torch
from adaptation import CLEAN, FARS, Embedded, People, ask_for_sets, divided, embedded, opened, verified
from record import record
from torch import Tensor
from torch.nn.functional import normalize

from facefast.models import FaceModel
from facefast.training.adapt import SHRINKAGES
from facefast.training.whiten import Whitening, centring, mean_of, sums_of, within_scatter

BATCH = 32


def taught(source: FaceModel, clean: Tensor, shifted: Tensor, seed: int, epochs: int, lr: float) -> FaceModel:
    """A copy of the source that embeds shifted pictures [N, 3, H, W] where the source embeds them unshifted."""
    targets = [normalize(torch.from_numpy(embedded(source, each))) for each in (clean, clean.flip(3))]
    torch.manual_seed(seed)
    student, steps = copy.deepcopy(source).train(), len(clean) // BATCH
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * steps, pct_start=0.1)
    for _ in range(epochs):
        for rows in torch.randperm(len(clean))[: steps * BATCH].split(BATCH):
            mirrored = int(torch.rand(()) < 0.5)
            pictures = shifted[rows].flip(3) if mirrored else shifted[rows]
            found = normalize(student.encode(student.preprocess(pictures)))
            loss = (1 - (found * targets[mirrored][rows]).sum(1)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
    return student.eval()


def best_mapped(embeddings: Tensor, labels: np.ndarray[Any, Any], third: Tensor, far: float) -> float:
    """TAR of the third part with the map of the others that is best for it."""
    others, own = embeddings[~third], labels[~third.numpy()]
    nobody = np.zeros(len(others), np.int64)
    centre = mean_of(sums_of(others, torch.ones(len(others), dtype=torch.bool), nobody, 1))
    names = np.unique(own, return_inverse=True)[1]
    maps = Whitening(within_scatter(others, names, np.zeros(names.max() + 1, np.int64), 1, centre)[0])
    tried = [centring(centre) if s == 1 else maps.map(s, centre) for s in SHRINKAGES]
    return max(verified(each(embeddings[third]), labels[third.numpy()], far).tar for each in tried)


def measure(
    kind: str, people: People, clean: Embedded, known: Embedded, seed: int, epochs: int, lr: float
) -> dict[str, Any]:
    """Teaches, measures and records one row."""
    third = torch.from_numpy(np.isin(people.labels, divided(people, seed)[2]))
    student = taught(clean.model, clean.pictures[~third], known.pictures[~third], seed, epochs, lr)
    after, on = torch.from_numpy(embedded(student, known.pictures)), people.labels[third.numpy()]
    fields: dict[str, Any] = {}
    for name, far in FARS.items():
        for prefix, each in (("clean_", clean.of()), ("source_", known.of()), ("", after)):
            fields[prefix + name] = round(verified(each[third], on, far).tar, 5)
        fields["mapped_" + name] = round(best_mapped(after, people.labels, third, far), 5)
    cost = fields["clean_tar@1e-2"] - fields["source_tar@1e-2"]
    best = max(fields["tar@1e-2"], fields["mapped_tar@1e-2"])
    return record(
        "transfer",
        row=f"limit-{kind}",
        title=f"taught by the unshifted pictures, {kind}",
        seed=seed,
        fingerprint=known.fingerprint,
        taught_pictures=int((~third).sum()),
        unseen_people=len(np.unique(on)),
        epochs=epochs,
        lr=lr,
        **fields,
        regained=round((best - fields["source_tar@1e-2"]) / cost, 3),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for_sets(parser)
    parser.add_argument("--kinds", nargs="+", help="folders of --sets", default=["grey", "all"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    given = parser.parse_args()
    people, of = opened(given)
    clean = of(CLEAN)
    for kind in given.kinds:
        known = of(kind)
        for seed in given.seeds:
            print(json.dumps(measure(kind, people, clean, known, seed, given.epochs, given.lr)), flush=True)


if __name__ == "__main__":
    main()

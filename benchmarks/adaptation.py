"""What adaptation wins back of what a shift of the pictures costs, on people who had no part in it.

    python benchmarks/adaptation.py --root CELEBA --sets DIR --source WEIGHTS [--kinds clean grey small blur jpeg all]
        [--seeds 0 1 2] [--shots 0 5]

DIR holds the sets of `shifted.py`. People are divided into three parts by the seed: two that are adapted to, each of
which serves in turn to choose by what the other says, as in `facefast train adapt`, and a third of them that nothing
but the reported numbers is asked of. A row of results/transfer.jsonl has TAR over all pairs of the third part's
pictures (with mirror images) by the source on the unshifted set, by the source on this set, and by the adapted model
on this set; `gain` has a 95 % interval over people.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from record import record
from shifted import KINDS
from torch import Tensor

from facefast.data import FaceIndex, read_index
from facefast.data.subsets import with_shots
from facefast.evaluation.embed import embed_rows
from facefast.models import FaceModel, load_source, model_from_source
from facefast.models.heads import unit
from facefast.models.precision import Precision
from facefast.recipe import AdaptConfig, Reading
from facefast.runtime.process import Runtime, World
from facefast.training.adapt import adapt, adapt_embeddings
from facefast.training.restate import statistics_of

CLEAN = "clean"
UNSEEN = 1 / 3
FARS = (1e-2, 1e-3)
DRAWS = 1000
BATCH = 16
"""Pictures embedded at once: what a processor's caches hold."""
RUN = Runtime(World(0, 1, 0, 1), torch.device("cpu"))


class Embedder:
    """The source, and how pictures are embedded by it and what becomes of it."""

    def __init__(self, source: str, threads: int) -> None:
        self.weights, self.reading = load_source(source), Reading(threads=threads)
        self.precision = Precision.choose("fp32", self.model().config.backbone, False, RUN.device)

    def model(self) -> FaceModel:
        """The source as it is."""
        return model_from_source(self.weights).eval()

    def __call__(self, network: FaceModel, index: FaceIndex, mirror: bool) -> tuple[Tensor, Tensor]:
        return embed_rows(
            network, index, RUN, self.precision, self.reading, batch_size=BATCH, mirror="mean" if mirror else "none"
        )

    def measure(self, network: FaceModel, index: FaceIndex, seed: int) -> Any:
        return statistics_of(network, index, RUN, self.precision, self.reading, seed)


@dataclasses.dataclass
class Passed:
    """Pairs of one person's pictures, by person."""

    passed: NDArray[np.int64]
    """[P] above the threshold that a FAR gives."""
    pairs: NDArray[np.int64]

    @property
    def tar(self) -> float:
        return float(self.passed.sum() / self.pairs.sum())


def verified(embeddings: Tensor, labels: NDArray[np.int32], far: float) -> Passed:
    """All pairs of pictures [N, D] against the lowest threshold that at most `far` of those of two people reach."""
    number = torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    directions = unit(embeddings)
    scores = directions @ directions.T
    same = number[:, None] == number
    different = scores[~same]
    rank = max(1, int(np.ceil(len(different) * far)))
    threshold = different.kthvalue(len(different) - rank + 1).values
    above = ((scores >= threshold) & same).sum(1) - 1
    counts = number.bincount()
    return Passed(number.bincount(above.double()).long().numpy(), (counts * (counts - 1)).numpy())


def gain_interval(before: Passed, after: Passed, seed: int) -> list[float]:
    """95 % interval of the difference of two TARs on the same people, drawn with replacement."""
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(before.pairs), np.full(len(before.pairs), 1 / len(before.pairs)), DRAWS)
    gains = (weights @ (after.passed - before.passed)) / (weights @ before.pairs)
    return [round(float(value), 5) for value in np.quantile(gains, [0.025, 0.975])]


def measure(
    kind: str, index: FaceIndex, known: dict[str, tuple[Tensor, Tensor]], embedder: Embedder, seed: int, shots: int
) -> dict[str, Any]:
    """Adapts to two parts of the people, measures on the third, and records the row."""
    named = np.flatnonzero(index.labels >= 0)
    people = index.labels[named]
    held = np.random.default_rng(seed).permutation(np.unique(people))
    held = held[: round(UNSEEN * len(held))]
    unseen, rest = named[np.isin(people, held)], named[~np.isin(people, held)]
    mine = index.select(rest).compact()
    if shots:
        places = mine.random_places(seed) < shots
        rest, mine = rest[places], with_shots(mine, shots, seed)
    embeddings, seen = (part[torch.from_numpy(rest)].clone() for part in known[kind])
    model = embedder.model()
    start = time.process_time()
    done, _ = adapt(
        model,
        mine,
        None,
        AdaptConfig("auto"),
        (embeddings, seen),
        embed=embedder,
        measure=lambda network, of: embedder.measure(network, of, seed),
        run=RUN,
        seed=seed,
    )
    seconds = time.process_time() - start
    asked = index.select(unseen)
    rows = torch.from_numpy(unseen)
    after = known[kind][0][rows].clone()
    if max(done.batchnorm, done.batchnorm_last) > 0:
        after = embedder(model, asked, True)[0]
    elif done.changes:  # the map alone, which the folded model agrees with (tests/models/test_fold.py)
        config = AdaptConfig("given", centre=done.centre, shrinkage=done.shrinkage)
        mapped = adapt_embeddings(known[kind][0][torch.from_numpy(rest)].clone(), seen, mine.labels, config, RUN, seed)
        assert mapped.map is not None
        after = mapped.map(after)
    fields: dict[str, Any] = {}
    for far in FARS:
        name = f"tar@{far:.0e}".replace("e-0", "e-")
        clean = verified(known[CLEAN][0][rows], asked.labels, far)
        before, now = (verified(each, asked.labels, far) for each in (known[kind][0][rows], after))
        fields |= {
            f"clean_{name}": round(clean.tar, 5),
            f"source_{name}": round(before.tar, 5),
            name: round(now.tar, 5),
            f"gain_{name}": gain_interval(before, now, seed),
        }
    cost = fields["clean_tar@1e-2"] - fields["source_tar@1e-2"]
    gain = fields["tar@1e-2"] - fields["source_tar@1e-2"]
    return record(
        "transfer",
        row=f"adapt-{kind}" + (f"-shots{shots}" if shots else ""),
        title=f"adaptation, {kind}" + (f", {shots} pictures a person" if shots else ""),
        seed=seed,
        training_people=mine.num_classes,
        training_pictures=len(mine),
        unseen_people=len(held),
        unseen_pictures=len(unseen),
        **fields,
        regained=round(gain / cost, 3) if kind != CLEAN else None,
        batchnorm=[done.batchnorm, done.batchnorm_last],
        centre=done.centre,
        shrinkage=done.shrinkage,
        core_seconds=round(seconds, 1),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--kinds", nargs="+", choices=(CLEAN, *KINDS), default=[CLEAN, *KINDS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shots", nargs="+", type=int, default=[0, 5], help="pictures a person; 0 takes all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, help="folder in which the source's embeddings are kept")
    given = parser.parse_args()
    embedder = Embedder(given.source, given.threads)
    known: dict[str, tuple[Tensor, Tensor]] = {}
    indices: dict[str, FaceIndex] = {}
    for kind in dict.fromkeys([CLEAN, *given.kinds]):
        indices[kind] = read_index(given.root if kind == CLEAN else given.sets / kind, "celeba")
        known[kind] = _embedded(kind, indices[kind], embedder, given.cache)
        for shots in given.shots if kind in given.kinds else ():
            for seed in given.seeds:
                line = measure(kind, indices[kind], known, embedder, seed, shots)
                shown = ("row", "seed", "clean_tar@1e-2", "source_tar@1e-2", "tar@1e-2", "gain_tar@1e-2", "regained")
                print(json.dumps({key: line[key] for key in (*shown, "batchnorm", "shrinkage")}), flush=True)


def _embedded(kind: str, index: FaceIndex, embedder: Embedder, cache: Path | None) -> tuple[Tensor, Tensor]:
    if cache is None:
        return embedder(embedder.model(), index, True)
    path = cache / f"{kind}.pt"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(embedder(embedder.model(), index, True), path)
    embeddings, seen = torch.load(path)
    return embeddings, seen


if __name__ == "__main__":
    main()

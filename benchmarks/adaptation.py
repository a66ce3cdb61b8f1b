"""What adaptation wins back of what a shift of the pictures costs, on people who had no part in it.

    python benchmarks/adaptation.py --root CELEBA --sets DIR --source WEIGHTS [--kinds clean grey small blur jpeg all]
        [--seeds 0 1 2] [--shots 10 5] [--cache DIR]

`--sets` holds the sets of `shifted.py`. Of every person with four pictures or more, ten at most are embedded, without
mirror images, by the source and with the BatchNorm statistics of one half of the people and of the other; with
`--cache` this is done once. People are then divided into three parts: that half, a sixth and a third. BatchNorm
statistics are of the first part, and their weight is chosen on the second; the map is chosen and made on both, as in
`facefast train adapt`; and nothing but the reported numbers is asked of the third. A row of results/transfer.jsonl has
TAR over all pairs of the third part's pictures by the source on the unshifted set, by the source on this set and by the
adapted model; `gain` has a 95 % interval over people. Rows `look-` say what a run sees of each set before it decides
to choose anything; `--shots` without a number makes these alone.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from record import record
from shifted import KINDS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.data import make_loader, read_index
from facefast.models import FaceModel, load_source, model_from_source
from facefast.models.fold import LinearMap
from facefast.models.heads import unit
from facefast.recipe import AdaptConfig
from facefast.runtime.process import Runtime, World
from facefast.training import sample
from facefast.training.adapt import FEW_SHRINKAGES, FOLDS, WEIGHTS, adapt_embeddings, choose_map, gather
from facefast.training.leftout import choose, groups_of_people, tar_of_people
from facefast.training.restate import layers, restate
from facefast.training.whiten import Whitening, centring, mean_of, sums_of, within_scatter

CLEAN = "clean"
LEAST, MOST = 4, 10
"""Pictures of a person."""
BATCHES = 6
"""That statistics are taken of."""
FARS = {"tar@1e-2": 1e-2, "tar@1e-3": 1e-3}
DRAWS = 1000
RUN = Runtime(World(0, 1, 0, 1), torch.device("cpu"))


class People(NamedTuple):
    """Which pictures are looked at, and whose they are."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    first: NDArray[np.bool_]
    """[P] who is in the first half."""


def people_of(identities: NDArray[np.int32]) -> People:
    """The same whatever the set."""
    generator, rows = np.random.default_rng(7), []
    labels = np.unique(identities, return_inverse=True)[1]
    for person in np.unique(labels):
        own = np.flatnonzero(labels == person)
        if len(own) >= LEAST:
            rows += generator.permutation(own)[:MOST].tolist()
    chosen = np.sort(np.array(rows))
    whose = np.unique(labels[chosen], return_inverse=True)[1].astype(np.int64)
    count = int(whose.max()) + 1
    return People(chosen, whose, np.random.default_rng(3).permutation(count) < count // 2)


def embedded(model: FaceModel, pictures: Tensor, batch: int = 16) -> NDArray[np.float32]:
    """[N, D] of uint8 pictures [N, 3, H, W]."""
    with torch.inference_mode():
        found = [model.encode(model.preprocess(part)) for part in pictures.split(batch)]
    return torch.cat(found).numpy()


def moments(model: FaceModel, pictures: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """BatchNorm statistics as PyTorch itself gathers them."""
    network = copy.deepcopy(model)
    for layer in network.modules():
        if isinstance(layer, _BatchNorm):
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None
    parts = np.array_split(np.random.default_rng(0).permutation(len(pictures)), BATCHES)
    with torch.inference_mode():
        for part in parts:
            network.encode(network.preprocess(pictures[torch.from_numpy(part)]))
    return {name: (_own(layer.running_mean), _own(layer.running_var)) for name, layer in layers(network).items()}


def _own(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer.clone()


def name_of(weights: tuple[float, float], half: int) -> str:
    """Of embeddings in the cache."""
    return f"{weights[0]:g}-{weights[1]:g}/{half}"


def embeddings_of(root: Path, model: FaceModel, people: People, cache: Path | None) -> dict[str, Tensor]:
    """By `name_of`, and `source`: embeddings of one set."""
    if cache is not None and cache.exists():
        held = np.load(cache)
        return {name: torch.from_numpy(held[name]) for name in held.files}
    index = read_index(root, "celeba").select(people.rows)
    pictures = torch.zeros(len(index), 3, *model.image.shape, dtype=torch.uint8)
    with make_loader(index, model.image, batch_size=64, dtype=torch.float32, threads=1) as loader:
        for batch in loader:
            levels = batch.images * model.pixel_std + model.pixel_mean
            pictures[batch.rows[batch.rows >= 0]] = levels[batch.rows >= 0].round().clamp(0, 255).byte()
    found = {"source": embedded(model, pictures)}
    for half in range(2):
        own = torch.from_numpy(people.first[people.labels] == (half == 0))
        statistics = moments(model, pictures[own])
        for weights in WEIGHTS:
            changed = copy.deepcopy(model)
            restate(changed, statistics, *weights)
            found[name_of(weights, half)] = embedded(changed, pictures)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        np.savez(cache, allow_pickle=False, **found)
    return {name: torch.from_numpy(values) for name, values in found.items()}


class Passed(NamedTuple):
    """Pairs of one person's pictures, by person."""

    passed: NDArray[np.int64]
    """[P] above the threshold that a FAR gives."""
    pairs: NDArray[np.int64]

    @property
    def tar(self) -> float:
        return float(self.passed.sum() / self.pairs.sum())


def verified(embeddings: Tensor, labels: NDArray[np.int64], far: float) -> Passed:
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
    count = len(before.pairs)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), DRAWS)
    gains = (weights @ (after.passed - before.passed)) / (weights @ before.pairs)
    return [round(float(value), 5) for value in np.quantile(gains, [0.025, 0.975])]


def choose_weights(
    known: dict[str, Tensor], half: int, labels: NDArray[np.int64], estimate: NDArray[np.bool_], ask: NDArray[np.bool_]
) -> tuple[float, float]:
    """The BatchNorm weights that are best on the rows to `ask` with the map that goes best with them."""
    best: dict[tuple[float, float], Tensor] = {}
    for weights in ((0.0, 0.0), *WEIGHTS):
        embeddings = known[name_of(weights, half) if any(weights) else "source"]
        own = embeddings[torch.from_numpy(estimate)]
        seen, nobody = torch.ones(len(own), dtype=torch.bool), np.zeros(len(own), np.int64)
        centre = mean_of(sums_of(own, seen, nobody, 1))
        people = np.unique(labels[estimate], return_inverse=True)[1]
        maps = Whitening(within_scatter(own, people, np.zeros(people.max() + 1, np.int64), 1, centre)[0])
        tried: list[LinearMap | nn.Identity] = [nn.Identity()]
        tried.extend(centring(centre) if s == 1 else maps.map(s, centre) for s in FEW_SHRINKAGES)
        tars = [tar_of_people(each(embeddings[torch.from_numpy(ask)].double()), labels[ask]) for each in tried]
        best[weights] = max(tars, key=lambda each: float(each.mean()))
    before = best.pop((0.0, 0.0))
    place, _ = choose([(str(weights), tars) for weights, tars in best.items()], before)
    return WEIGHTS[place] if place >= 0 else (0.0, 0.0)


def measure(
    kind: str, people: People, clean: Tensor, known: dict[str, Tensor], seed: int, shots: int
) -> dict[str, Any]:
    """Divides, adapts, measures and records one row."""
    half, labels = seed % 2, people.labels
    order = np.random.default_rng(seed).permutation(np.flatnonzero(people.first != (half == 0)))
    asked, unseen = order[: len(order) // 3], order[len(order) // 3 :]
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)
    estimate = (people.first[labels] == (half == 0)) & (place < shots)
    ask = np.isin(labels, asked) & (place < shots)
    third = torch.from_numpy(np.isin(labels, unseen))
    weights = choose_weights(known, half, labels, estimate, ask)
    embeddings = known[name_of(weights, half) if any(weights) else "source"]
    mine = estimate | ask
    own = embeddings[torch.from_numpy(mine)].clone()
    names = np.unique(labels[mine], return_inverse=True)[1]
    seen = torch.ones(len(own), dtype=torch.bool)
    done = adapt_embeddings(own, seen, names, AdaptConfig("auto"), RUN, seed)
    after = embeddings[third] if done.map is None else done.map(embeddings[third])
    fields: dict[str, Any] = {}
    for name, far in FARS.items():
        on = labels[third.numpy()]
        best, before, now = (verified(each, on, far) for each in (clean[third], known["source"][third], after))
        fields |= {f"clean_{name}": round(best.tar, 5), f"source_{name}": round(before.tar, 5)}
        fields |= {name: round(now.tar, 5), f"gain_{name}": gain_interval(before, now, seed)}
    cost = fields["clean_tar@1e-2"] - fields["source_tar@1e-2"]
    gain = fields["tar@1e-2"] - fields["source_tar@1e-2"]
    return record(
        "transfer",
        row=f"adapt-{kind}" + (f"-shots{shots}" if shots < MOST else ""),
        title=f"adaptation, {kind}" + (f", {shots} pictures a person" if shots < MOST else ""),
        seed=seed,
        adapted_people=int(names.max()) + 1,
        adapted_pictures=int(mine.sum()),
        unseen_people=len(unseen),
        unseen_pictures=int(third.sum()),
        **fields,
        regained=round(gain / cost, 3) if kind != CLEAN else None,
        batchnorm=list(weights),
        centre=done.centre,
        shrinkage=done.shrinkage,
    )


def looked_at(kind: str, people: People, source: Tensor, seed: int) -> dict[str, Any]:
    """A row of what a run's first look at a sample of the set says of the maps (`facefast.training.sample`): where the
    highest of their intervals ends."""
    rows = sample.rows_to_look_at(people.labels, seed)
    own, labels = source[torch.from_numpy(rows)], people.labels[rows]
    groups = groups_of_people(labels, FOLDS, seed)
    gathered = gather(own, torch.ones(len(own), dtype=torch.bool), labels, groups, FOLDS, centre=True)
    best = max(choose_map(own, labels, groups, gathered)[1], key=lambda trial: trial.high)
    return record(
        "transfer",
        row=f"look-{kind}",
        title=f"a look at a sample, {kind}",
        seed=seed,
        pictures=len(rows),
        map=best.name,
        gain=round(best.gain, 4),
        gain_ends=[round(best.low, 4), round(best.high, 4)],
        promising=best.high >= sample.WORTH,
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--sets", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--kinds", nargs="+", choices=(CLEAN, *KINDS), default=[CLEAN, *KINDS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shots", nargs="*", type=int, default=[MOST, 5], help="pictures a person, 2 to 10")
    parser.add_argument("--cache", type=Path, help="folder in which embeddings are kept")
    given = parser.parse_args()
    model = model_from_source(load_source(given.source)).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    people = people_of(read_index(given.root, "celeba").labels)

    def of(kind: str) -> dict[str, Tensor]:
        root = given.root if kind == CLEAN else given.sets / kind
        return embeddings_of(root, model, people, given.cache and given.cache / f"{kind}.npz")

    clean = of(CLEAN)
    for kind in given.kinds:
        known = clean if kind == CLEAN else of(kind)
        for seed in given.seeds:
            print(json.dumps(looked_at(kind, people, known["source"], seed)["gain_ends"]), kind, seed, flush=True)
        for shots in given.shots:
            for seed in given.seeds:
                line = measure(kind, people, clean["source"], known, seed, shots)
                shown = ("row", "seed", "clean_tar@1e-2", "source_tar@1e-2", "tar@1e-2", "gain_tar@1e-2", "regained")
                print(json.dumps({key: line[key] for key in (*shown, "batchnorm", "shrinkage")}), flush=True)


if __name__ == "__main__":
    main()

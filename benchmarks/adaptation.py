"""What adaptation wins back of what a shift of the pictures costs, on people who had no part in it.

    python benchmarks/adaptation.py --root CELEBA --sets DIR --source WEIGHTS
        [--kinds clean grey small blur jpeg all all@0.5] [--seeds 0 1 2] [--shots 10 5] [--cache DIR]

`--sets` holds the sets of `shifted.py`. Of every person with four pictures or more, ten at most are embedded, without
mirror images, by the source, of blurred pictures, and with the BatchNorm statistics of one half of the people or of the
other; with `--cache` each is done once. People are then divided into three parts: that half, a sixth and a third.
BatchNorm statistics are of the first part; the blur and their weight are chosen on the second; the map is chosen and
made on both, as in `facefast train adapt`; and nothing but the reported numbers is asked of the third. A row of
results/transfer.jsonl has TAR over all pairs of the third part's pictures by the source on the unshifted set, by the
source on this set and by the adapted model; `gain` has a 95 % interval over people. Rows `look-` say what a run sees of
each set before it decides to choose anything; `--shots` without a number makes these alone.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from record import record
from shifted import SHIFTS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from facefast.data import make_loader, read_index
from facefast.models import FaceModel, load_source, model_from_source
from facefast.models.fold import LinearMap
from facefast.models.heads import unit
from facefast.models.smoothing import Deviations
from facefast.recipe import AdaptConfig
from facefast.runtime.process import Runtime, World
from facefast.training import sample
from facefast.training.adapt import BLURS, FEW_SHRINKAGES, FOLDS, WEIGHTS, adapt_embeddings, blurred, choose_map, gather
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
NONE = Deviations(0.0, 0.0)
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


class Embedded:
    """Embeddings of one set by the source, changed in one way or another: each is made when it is first asked for."""

    def __init__(self, root: Path, model: FaceModel, people: People, cache: Path | None) -> None:
        self.model, self.people = model, people
        self.index = read_index(root, "celeba").select(people.rows).scanned()
        self.fingerprint = self.index.fingerprint()[:12]
        """Of the pictures: what is kept of others is not taken for theirs, and a row says what it is of."""
        self.cache = cache and cache / f"{root.name}-{self.fingerprint}.npz"
        self.held: dict[str, NDArray[np.float32]] = {}
        if self.cache is not None and self.cache.exists():
            with np.load(self.cache) as held:
                self.held = {name: held[name] for name in held.files}
        self._statistics: dict[tuple[Deviations, int], dict[str, tuple[Tensor, Tensor]]] = {}

    @functools.cached_property
    def pictures(self) -> Tensor:
        """[N, 3, H, W] uint8."""
        pictures = torch.zeros(len(self.index), 3, *self.model.image.shape, dtype=torch.uint8)
        with make_loader(self.index, self.model.image, batch_size=64, dtype=torch.float32, threads=1) as loader:
            for batch in loader:
                levels = batch.images * self.model.pixel_std + self.model.pixel_mean
                pictures[batch.rows[batch.rows >= 0]] = levels[batch.rows >= 0].round().clamp(0, 255).byte()
        return pictures

    def of(self, blur: Deviations = NONE, weights: tuple[float, float] = (0.0, 0.0), half: int = 0) -> Tensor:
        """[N, D] by the source that blurs its pictures and has statistics of one half of the people."""
        name = f"{blur.luma:g}-{blur.chroma:g}" + (f"/{weights[0]:g}-{weights[1]:g}/{half}" if any(weights) else "")
        if name not in self.held:
            changed = copy.deepcopy(self.model)
            if any(blur):
                blurred(changed, blur)
            if any(weights):
                if (blur, half) not in self._statistics:
                    own = torch.from_numpy(self.people.first[self.people.labels] == (half == 0))
                    self._statistics[blur, half] = moments(changed, self.pictures[own])
                restate(changed, self._statistics[blur, half], *weights)
            self.held[name] = embedded(changed, self.pictures)
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                np.savez(self.cache, allow_pickle=False, **self.held)
        return torch.from_numpy(self.held[name])


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


def best_tars(
    embeddings: Tensor, labels: NDArray[np.int64], estimate: NDArray[np.bool_], ask: NDArray[np.bool_]
) -> Tensor:
    """TARs of the people of the rows to `ask`, with the best map that the rows to `estimate` by give."""
    own = embeddings[torch.from_numpy(estimate)]
    seen, nobody = torch.ones(len(own), dtype=torch.bool), np.zeros(len(own), np.int64)
    centre = mean_of(sums_of(own, seen, nobody, 1))
    people = np.unique(labels[estimate], return_inverse=True)[1]
    maps = Whitening(within_scatter(own, people, np.zeros(people.max() + 1, np.int64), 1, centre)[0])
    tried: list[LinearMap | nn.Identity] = [nn.Identity()]
    tried.extend(centring(centre) if s == 1 else maps.map(s, centre) for s in FEW_SHRINKAGES)
    tars = [tar_of_people(each(embeddings[torch.from_numpy(ask)].double()), labels[ask]) for each in tried]
    return max(tars, key=lambda each: float(each.mean()))


def choose_network(
    known: Embedded, half: int, labels: NDArray[np.int64], estimate: NDArray[np.bool_], ask: NDArray[np.bool_]
) -> tuple[Deviations, tuple[float, float]]:
    """The blur, then the BatchNorm weights, that are best on the rows to `ask`, as `adapt` chooses them."""
    before = best_tars(known.of(), labels, estimate, ask)
    tried = [(str(blur), best_tars(known.of(blur), labels, estimate, ask)) for blur in BLURS]
    place, _ = choose(tried, before)
    blur = BLURS[place] if place >= 0 else NONE
    before = best_tars(known.of(blur), labels, estimate, ask)
    tried = [(str(each), best_tars(known.of(blur, each, half), labels, estimate, ask)) for each in WEIGHTS]
    place, _ = choose(tried, before)
    return blur, WEIGHTS[place] if place >= 0 else (0.0, 0.0)


def divided(people: People, seed: int) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """Which half is the first part, and who is in the second and the third."""
    half = seed % 2
    order = np.random.default_rng(seed).permutation(np.flatnonzero(people.first != (half == 0)))
    return half, order[: len(order) // 3], order[len(order) // 3 :]


def measure(kind: str, people: People, clean: Tensor, known: Embedded, seed: int, shots: int) -> dict[str, Any]:
    """Divides, adapts, measures and records one row."""
    labels = people.labels
    half, asked, unseen = divided(people, seed)
    place = np.arange(len(labels)) - np.searchsorted(labels, labels)
    estimate = (people.first[labels] == (half == 0)) & (place < shots)
    ask = np.isin(labels, asked) & (place < shots)
    third = torch.from_numpy(np.isin(labels, unseen))
    blur, weights = choose_network(known, half, labels, estimate, ask)
    embeddings = known.of(blur, weights, half)
    mine = estimate | ask
    own = embeddings[torch.from_numpy(mine)].clone()
    names = np.unique(labels[mine], return_inverse=True)[1]
    seen = torch.ones(len(own), dtype=torch.bool)
    done = adapt_embeddings(own, seen, names, AdaptConfig("auto"), RUN, seed)
    after = embeddings[third] if done.map is None else done.map(embeddings[third])
    fields: dict[str, Any] = {}
    for name, far in FARS.items():
        on = labels[third.numpy()]
        best, before, now = (verified(each, on, far) for each in (clean[third], known.of()[third], after))
        fields |= {f"clean_{name}": round(best.tar, 5), f"source_{name}": round(before.tar, 5)}
        fields |= {name: round(now.tar, 5), f"gain_{name}": gain_interval(before, now, seed)}
    cost = fields["clean_tar@1e-2"] - fields["source_tar@1e-2"]
    gain = fields["tar@1e-2"] - fields["source_tar@1e-2"]
    return record(
        "transfer",
        row=f"adapt-{kind}" + (f"-shots{shots}" if shots < MOST else ""),
        title=f"adaptation, {kind}" + (f", {shots} pictures a person" if shots < MOST else ""),
        seed=seed,
        fingerprint=known.fingerprint,
        adapted_people=int(names.max()) + 1,
        adapted_pictures=int(mine.sum()),
        unseen_people=len(unseen),
        unseen_pictures=int(third.sum()),
        **fields,
        regained=round(gain / cost, 3) if kind != CLEAN else None,
        blur=list(blur),
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
    best = max(choose_map(own, labels, groups, gathered, seed)[1], key=lambda trial: trial.high)
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


def ask_for_sets(parser: argparse.ArgumentParser) -> None:
    """What `opened` reads."""
    parser.add_argument("--root", type=Path, required=True, help="unshifted, in CelebA's layout")
    parser.add_argument("--sets", type=Path, required=True, help="what shifted.py made")
    parser.add_argument("--source", required=True)
    parser.add_argument("--cache", type=Path, help="folder in which embeddings are kept")


def opened(given: argparse.Namespace) -> tuple[People, Callable[[str], Embedded]]:
    """The people that are looked at, and the embeddings of a set by its name."""
    model = model_from_source(load_source(given.source)).eval()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    people = people_of(read_index(given.root, "celeba").labels)

    @functools.cache
    def of(kind: str) -> Embedded:
        return Embedded(given.root if kind == CLEAN else given.sets / kind, model, people, given.cache)

    return people, of


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for_sets(parser)
    parser.add_argument("--kinds", nargs="+", help="clean, or folders of --sets", default=[CLEAN, *SHIFTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shots", nargs="*", type=int, default=[MOST, 5], help="pictures a person, 2 to 10")
    given = parser.parse_args()
    people, of = opened(given)
    clean = of(CLEAN)
    for kind in given.kinds:
        known = of(kind)
        for seed in given.seeds:
            print(json.dumps(looked_at(kind, people, known.of(), seed)["gain_ends"]), kind, seed, flush=True)
        for shots in given.shots:
            for seed in given.seeds:
                line = measure(kind, people, clean.of(), known, seed, shots)
                shown = ("row", "seed", "clean_tar@1e-2", "source_tar@1e-2", "tar@1e-2", "gain_tar@1e-2", "regained")
                print(json.dumps({key: line[key] for key in (*shown, "blur", "batchnorm", "shrinkage")}), flush=True)


if __name__ == "__main__":
    main()

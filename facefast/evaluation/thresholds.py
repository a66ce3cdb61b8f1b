"""Thresholds and what supports them: of pairs (are these two one person?), and, quite another thing, of naming (is it
anybody of the gallery?).

A score is accepted where it is at least the threshold. A stranger is compared with everybody in a gallery and has as
many chances to be taken for somebody: the threshold of pairs, used for naming, lets most strangers through. So the
two are different types, and neither reads the other's JSON.

How much a count supports (ISO/IEC 19795-1, annex B): by the rule of 3 (Louis 1981), N trials without an error show
a rate below 3 / N at 95 % confidence, and a threshold for a lower rate is refused; by the rule of 30 (Doddington et
al. 2000), the rate is known to within 30 % of itself at 90 % confidence where there are 30 errors. Both are of
independent trials. Pictures of one stranger are not: a threshold for naming is refused too where its people are so few
that the rate may be `LOOSEST` times as high.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from facefast.evaluation.metrics import Floats, Interval

RULE_OF_3 = 3
"""Errors that a rate must allow among the trials to be shown at all."""
RULE_OF_30 = 30
"""Errors that make a rate firm."""
LOOSEST = 10
"""Times a rate that it may be by its interval; a threshold whose strangers leave more open is refused."""

_T = TypeVar("_T", bound="_Threshold")


@dataclass(frozen=True)
class _Threshold:
    """What both kinds have in common; the names of the rates are the kind's own."""

    KIND: ClassVar[str] = ""
    RATE: ClassVar[str] = ""
    MISSED: ClassVar[str] = ""

    rate: float
    """Part of the impostors that may be accepted: FMR of pairs, FPIR of naming."""
    value: float | None
    """The threshold; None where it is refused."""
    impostors: int
    """Comparisons of two people, or probes of strangers, that it was found on."""
    genuine: int
    """Comparisons of one person, or probes of known people."""
    interval: Interval | None = None
    """95 % interval of the threshold that any number of impostors would give."""
    rate_interval: Interval | None = None
    """Where the rate at the threshold lies, at 95 %, on another set of as many identities."""
    missed: float | None = None
    """Part of the genuine that it rejects: FNMR of pairs, FNIR of naming."""
    missed_interval: Interval | None = None
    people: int = 0
    """Identities among the impostors, 0 where nobody knows."""
    why: str = ""
    """Of a refusal."""

    @property
    def firm(self) -> bool:
        """Whether it meets the rule of 30; otherwise the rate may well be half or twice as much."""
        return self.value is not None and _allows(self.impostors, self.rate, RULE_OF_30)

    def require(self) -> float:
        """The threshold.

        Raises:
            ValueError: it was refused; with the reason.
        """
        if self.value is None:
            raise ValueError(f"there is no threshold for {self.RATE} {self.rate:g}: {self.why}")
        return self.value

    def to_json(self) -> dict[str, Any]:
        """A JSON value; what is not known is null."""
        return {
            "kind": self.KIND,
            self.RATE: self.rate,
            "threshold": self.value,
            "threshold_interval": _listed(self.interval),
            f"{self.RATE}_interval": _listed(self.rate_interval),
            self.MISSED: self.missed,
            f"{self.MISSED}_interval": _listed(self.missed_interval),
            "impostors": self.impostors,
            "genuine": self.genuine,
            "people": self.people,
            "firm": self.firm,
            "why": self.why,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: it is none, or of the other kind.
        """
        if not isinstance(document, Mapping) or document.get("kind") != cls.KIND:
            found = document.get("kind") if isinstance(document, Mapping) else document
            raise ValueError(
                f"{found!r} is no threshold of kind {cls.KIND!r}; those for pairs and those for naming are not "
                "interchangeable"
            )
        try:
            return cls(
                rate=float(document[cls.RATE]),
                value=_number(document["threshold"]),
                impostors=int(document["impostors"]),
                genuine=int(document["genuine"]),
                interval=_interval(document["threshold_interval"]),
                rate_interval=_interval(document[f"{cls.RATE}_interval"]),
                missed=_number(document[cls.MISSED]),
                missed_interval=_interval(document[f"{cls.MISSED}_interval"]),
                people=int(document["people"]),
                why=str(document["why"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"a threshold of kind {cls.KIND!r} lacks or garbles {error}; write it anew") from error


@dataclass(frozen=True)
class PairThreshold(_Threshold):
    """Above it two pictures are called one person; wrong to name people by."""

    KIND: ClassVar[str] = "pair"
    RATE: ClassVar[str] = "fmr"
    MISSED: ClassVar[str] = "fnmr"


@dataclass(frozen=True)
class NamingThreshold(_Threshold):
    """Above it the best entry of a gallery gives its name, below it a picture is of somebody unknown."""

    KIND: ClassVar[str] = "naming"
    RATE: ClassVar[str] = "fpir"
    MISSED: ClassVar[str] = "fnir"


@dataclass(frozen=True)
class Thresholds:
    """All of a model or of a gallery."""

    pairs: tuple[PairThreshold, ...] = ()
    naming: tuple[NamingThreshold, ...] = ()
    measured_on: str = ""
    """The pictures and the method, for people."""

    def pair(self, fmr: float) -> PairThreshold:
        """The one for a false match rate.

        Raises:
            ValueError: there is none, or it was refused.
        """
        return _at(self.pairs, fmr, "pairs at FMR")

    def name(self, fpir: float) -> NamingThreshold:
        """The one for a false positive identification rate.

        Raises:
            ValueError: there is none, or it was refused.
        """
        return _at(self.naming, fpir, "naming at FPIR")

    def to_json(self) -> dict[str, Any]:
        """A JSON value."""
        return {
            "pairs": [threshold.to_json() for threshold in self.pairs],
            "naming": [threshold.to_json() for threshold in self.naming],
            "measured_on": self.measured_on,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`.

        Raises:
            ValueError: a threshold is none, or of the other kind.
        """
        return cls(
            tuple(PairThreshold.from_json(item) for item in document.get("pairs", ())),
            tuple(NamingThreshold.from_json(item) for item in document.get("naming", ())),
            str(document.get("measured_on", "")),
        )


def _at(found: Sequence[_T], rate: float, what: str) -> _T:
    for threshold in found:
        if math.isclose(threshold.rate, rate, rel_tol=1e-9):
            threshold.require()
            return threshold
    known = ", ".join(f"{threshold.rate:g}" for threshold in found) or "none"
    raise ValueError(f"there is no threshold for {what} {rate:g}; known: {known}")


def supports(trials: int, rate: float) -> bool:
    """Whether so many trials can show a rate, by the rule of 3."""
    return _allows(trials, rate, RULE_OF_3)


def refusal(trials: int, rate: float, what: str) -> str:
    """Why a threshold is refused; empty where it is not.

    Args:
        trials: impostor comparisons or strangers' probes.
        rate: that is asked for.
        what: they are called.
    """
    if supports(trials, rate):
        return ""
    return f"{trials} {what} cannot show a rate of {rate:g}; {math.ceil(RULE_OF_3 / rate - 1e-9)} are needed"


def _allows(trials: int, rate: float, errors: int) -> bool:
    return trials * rate * (1 + 1e-12) >= errors


def lowest_threshold(impostors: Floats, rate: float) -> float:
    """The lowest threshold that accepts at most a part of the impostors.

    Args:
        impostors: [N] scores, at least one.
        rate: that part, within [0, 1].
    """
    # A rate like 0.29 is a little less in binary, where 29 of 100 must still do.
    allowed = min(int(len(impostors) * rate * (1 + 1e-12)), len(impostors) - 1)
    first_rejected = np.partition(impostors, len(impostors) - 1 - allowed)[len(impostors) - 1 - allowed]
    return float(np.nextafter(first_rejected, np.inf))


def finite(scores: ArrayLike, what: str) -> Floats:
    """Scores as float64 [N].

    Raises:
        ValueError: they have another form, or one is NaN or infinite.
    """
    found = np.asarray(scores, dtype=np.float64)
    if found.ndim != 1:
        raise ValueError(f"{what} have shape {found.shape}; give [N]")
    if bad := int((~np.isfinite(found)).sum()):
        raise ValueError(f"{bad} of {len(found)} {what} are not finite; leave out pictures that could not be read")
    return found


def _listed(interval: Interval | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _interval(value: Any) -> Interval | None:
    return None if value is None else Interval(float(value[0]), float(value[1]))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)

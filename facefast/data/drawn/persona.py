"""Who a drawn face is (`Identity`) and how one picture of it was taken (`Shot`), as plain numbers.

They are drawn from generators keyed by (seed, identity, picture), so that any picture can be drawn alone. Lengths are
pixels of the mean face; the eyes of the mean face are at (-19, 0) and (19, 0), y points down.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random import Generator, Philox

RGB = tuple[float, float, float]

SKIN: tuple[RGB, ...] = (
    (0.98, 0.87, 0.80),
    (0.94, 0.78, 0.67),
    (0.85, 0.66, 0.52),
    (0.70, 0.50, 0.36),
    (0.50, 0.33, 0.23),
    (0.34, 0.22, 0.16),
)
HAIR: tuple[RGB, ...] = (
    (0.10, 0.09, 0.10),
    (0.20, 0.14, 0.11),
    (0.33, 0.22, 0.14),
    (0.48, 0.33, 0.20),
    (0.66, 0.50, 0.30),
    (0.86, 0.73, 0.49),
)
IRIS: tuple[RGB, ...] = (
    (0.17, 0.10, 0.06),
    (0.34, 0.20, 0.10),
    (0.43, 0.36, 0.18),
    (0.34, 0.46, 0.33),
    (0.33, 0.51, 0.66),
    (0.54, 0.62, 0.67),
)
_WHO = (1 << 32) - 1  # the generator slot of the identity itself; pictures use 0, 1, 2, ...


def generator(seed: int, identity: int, picture: int = _WHO) -> Generator:
    """Counter-based generator of one picture, or of the identity itself without `picture`."""
    return Generator(Philox(key=np.array([seed, identity << 32 | picture], dtype=np.uint64)))


def ramp(colours: tuple[RGB, ...], place: float) -> RGB:
    """Colour at `place` in [0, 1] along a list of colours, 0..1 per channel."""
    at = min(max(place, 0.0), 1.0) * (len(colours) - 1)
    low = min(int(at), len(colours) - 2)
    return mix(colours[low], colours[low + 1], at - low)


def mix(first: RGB, second: RGB, part: float) -> RGB:
    """`first` with `part` of `second`."""
    red, green, blue = (a + (b - a) * part for a, b in zip(first, second, strict=True))
    return red, green, blue


def _trait(
    mean: float,
    spread: float,
    male: float = 0.0,
    age: float = 0.0,
    low: float = -1e9,
    high: float = 1e9,
) -> Any:
    """A normal trait: its mean moves by +-`male` with the sex latent and by +-`age` over adult life."""
    return dataclasses.field(metadata={"trait": (mean, spread, male, age, low, high)})


@dataclass(frozen=True)
class Identity:
    """One person: every number is continuous, so people form a continuum rather than types."""

    male: float
    """-1..1; above 0 is attribute Male. Shifts jaw, brows, nose, lips, neck, hair length and beard."""
    age: float
    """0 (twenty) .. 1 (eighty); below 0.55 is attribute Young. Shifts lines, hair colour and hairline."""
    skin: RGB
    hair: RGB
    iris: RGB
    lip: RGB
    marks: tuple[tuple[float, float, float], ...]
    """Moles: (x, y, radius)."""
    freckle_seed: int
    # Outline, added to the radius of the mean face towards that direction.
    chin: float = _trait(0, 2.6, male=1.4)
    chin_side: float = _trait(0, 2.6, male=1.8)
    jaw: float = _trait(0, 2.4, male=1.2, age=0.8)
    cheek: float = _trait(0, 2.2, male=0.4)
    temple: float = _trait(0, 1.8)
    forehead: float = _trait(0, 2.2)
    crown: float = _trait(0, 2.5)
    # Relief: heights of the bumps that catch the light.
    cheekbone: float = _trait(2.2, 1.1, male=-0.2)
    chin_boss: float = _trait(2.0, 1.0, male=0.6, low=0)
    chin_cleft: float = _trait(-0.6, 0.9, male=0.5, low=0)
    brow_ridge: float = _trait(1.2, 0.8, male=0.8)
    socket: float = _trait(3.2, 1.0)
    hollow: float = _trait(0.6, 0.9, age=0.4)
    # Eyes and brows.
    eye_gap: float = _trait(19.2, 1.2)
    eye_level: float = _trait(0, 1.4)
    eye_size: float = _trait(10.0, 0.75, male=-0.2, low=7)
    eye_open: float = _trait(3.5, 0.5, male=-0.3, age=-0.2, low=2.2)
    eye_tilt: float = _trait(0.06, 0.09, male=-0.03, age=-0.04)
    lid_crease: float = _trait(0.6, 0.4, low=0, high=1)
    lashes: float = _trait(0.5, 0.2, male=-0.3, low=0.05, high=1)
    bags: float = _trait(0.15, 0.2, age=0.3, low=0, high=1)
    brow_level: float = _trait(-13.0, 1.4, male=1.0)
    brow_thick: float = _trait(2.3, 0.6, male=0.6, low=1.1)
    brow_arch: float = _trait(2.2, 1.1, male=-0.8)
    brow_tilt: float = _trait(0.0, 0.10)
    brow_length: float = _trait(12.5, 1.3, low=8)
    brow_dark: float = _trait(0.75, 0.14, male=0.1, low=0.3, high=1)
    # Nose.
    nose_length: float = _trait(26.5, 2.1, male=0.5)
    nose_width: float = _trait(8.0, 1.2, male=0.6, low=5.2)
    nose_bridge: float = _trait(4.2, 0.7, male=0.3, low=2.6)
    nose_height: float = _trait(13.0, 2.0, male=0.9, low=7)
    nose_tip: float = _trait(4.6, 0.8, male=0.3, low=3)
    nose_hump: float = _trait(0.3, 0.9)
    nose_bend: float = _trait(0, 0.8)
    # Mouth.
    mouth_level: float = _trait(44.5, 2.0)
    mouth_width: float = _trait(16.2, 1.6, low=11)
    lip_upper: float = _trait(3.6, 1.0, male=-0.5, age=-0.4, low=1.4)
    lip_lower: float = _trait(5.0, 1.1, male=-0.4, age=-0.4, low=2.2)
    cupid: float = _trait(0.9, 0.45, low=0)
    mouth_curve: float = _trait(0, 0.9)
    # Skin.
    ruddy: float = _trait(0.3, 0.2, low=0)
    freckles: float = _trait(-0.5, 0.55, low=0, high=1)
    lines: float = _trait(0.25, 0.12, age=0.4, low=0, high=1)
    # Ears and neck.
    ear_size: float = _trait(1.0, 0.13, male=0.05)
    ear_out: float = _trait(2.5, 1.8)
    neck: float = _trait(27, 1.8, male=3.5)
    # Hair.
    hair_length: float = _trait(48, 36, male=-52)
    hair_volume: float = _trait(11, 3.0, male=-1.0, low=2.5)
    hair_side: float = _trait(6.0, 2.5, male=-3.2, low=0.5)
    hairline: float = _trait(-40, 3.5, age=-2.0)
    hairline_shape: float = _trait(0.6, 0.25, age=-0.1, low=0, high=1.1)
    hair_part: float = _trait(0, 16)
    hair_sweep: float = _trait(0, 0.16)
    hair_curl: float = _trait(0.4, 0.45, low=0, high=1.4)
    bald: float = _trait(-1.6, 0.9, male=0.7, age=0.7)
    # How often a picture shows it: probabilities before clipping to [0, 1].
    bangs: float = _trait(0.0, 0.4, male=-0.2, low=0, high=0.9)
    glasses: float = _trait(0.0, 0.35, age=0.12, low=0.04, high=0.9)
    hat: float = _trait(0.02, 0.12, male=0.03, low=0.02, high=0.5)
    beard: float = _trait(-0.6, 0.45, male=0.8, low=0, high=0.9)
    moustache: float = _trait(-0.65, 0.4, male=0.65, low=0, high=0.8)
    lipstick: float = _trait(0.1, 0.3, male=-0.6, low=0, high=0.9)
    # The glasses and the beard a person has.
    glasses_width: float = _trait(13.0, 1.2)
    glasses_height: float = _trait(9.0, 1.6, low=6.2)
    glasses_round: float = _trait(0.55, 0.3, low=0.05, high=1)
    glasses_thick: float = _trait(1.1, 0.5, low=0.5)
    glasses_dark: float = _trait(0.75, 0.3, low=0, high=1)
    beard_dense: float = _trait(0.55, 0.25, low=0.15, high=1)
    beard_depth: float = _trait(0.5, 0.25, low=0, high=1)

    @property
    def is_bald(self) -> bool:
        """Attribute Bald: no hair above the temples."""
        return self.bald > 0.4

    @property
    def hair_name(self) -> str:
        """The CelebA attribute that names the hair's colour."""
        light = sum(self.hair) / 3
        if max(self.hair) - min(self.hair) < 0.09 and light > 0.35:
            return "Gray_Hair"
        return "Black_Hair" if light < 0.17 else "Brown_Hair" if light < 0.48 else "Blond_Hair"


_TRAITS = {f.name: f.metadata["trait"] for f in dataclasses.fields(Identity) if f.metadata}


@functools.lru_cache(maxsize=64)
def draw_identity(seed: int, identity: int) -> Identity:
    """The person that has number `identity` under `seed`."""
    rng = generator(seed, identity)
    male = float(rng.uniform(0.35, 1.0) * rng.choice((-1.0, 1.0)))
    age = float(rng.beta(1.3, 1.9))
    traits = {}
    for name, (mean, spread, by_male, by_age, low, high) in _TRAITS.items():
        value = mean + spread * rng.standard_normal() + by_male * male + by_age * (2 * age - 1)
        traits[name] = float(min(max(value, low), high))
    tone = float(rng.beta(1.0, 1.6))
    yellow, dark = (float(x) for x in rng.normal(0, (0.035, 0.27)))
    red, green, blue = ramp(SKIN, tone)
    skin = (red, green * (1 - 0.4 * yellow), blue * (1 - 1.2 * yellow))
    hair = ramp(HAIR, 0.52 - 0.45 * tone + dark)
    hair = mix(hair, (0.52, 0.20, 0.09), float(max(0.0, rng.normal(-0.1, 0.35)) * (1 - tone)))
    grey = min(max((age - 0.5) * 2.2 + float(rng.normal(0, 0.25)), 0.0), 0.95)
    hair = mix(hair, (0.72, 0.71, 0.70), grey)
    marks = tuple(
        (float(rng.uniform(-34, 34)), float(rng.uniform(-30, 62)), float(rng.uniform(0.7, 1.6)))
        for _ in range(rng.poisson(0.9))
    )
    return Identity(
        male=male,
        age=age,
        skin=skin,
        hair=hair,
        iris=ramp(IRIS, 0.6 - 0.7 * tone + float(rng.normal(0, 0.28))),
        lip=mix(mix(skin, (0.66, 0.24, 0.26), 0.48), skin, float(rng.uniform(-0.3, 0.5))),
        marks=marks,
        freckle_seed=int(rng.integers(1 << 31)),
        **traits,
    )


@dataclass(frozen=True)
class Shot:
    """One picture of a person: pose, expression, light, what is worn, what is in the way, how it was recorded."""

    # Pose: radians, factor, picture pixels.
    yaw: float
    pitch: float
    roll: float
    scale: float
    shift: tuple[float, float]
    # Expression.
    smile: float
    """-0.5 (frown) .. 1.2; above 0.45 is attribute Smiling."""
    mouth_open: float
    """Pixels between the lips; above 1.5 is attribute Mouth_Slightly_Open."""
    lids: float
    """Factor of the eye's opening."""
    brow_raise: float
    gaze: tuple[float, float]
    # Light.
    light: tuple[float, float, float]
    """Unit vector towards the key light."""
    ambient: float
    exposure: float
    contrast: float
    warmth: float
    saturation: float
    # Worn.
    bangs: bool
    glasses: bool
    sunglasses: bool
    hat: bool
    beard: float
    """Density, 0 for none."""
    moustache: float
    lipstick: float
    makeup: RGB
    hair_part: float
    hair_volume: float
    hair_length: float
    cloth: RGB
    hat_colour: RGB
    # In the way, and behind.
    occluder: str
    """none, hand, scarf or bar."""
    occluder_place: tuple[float, float, float]
    """Side and height in -1..1, and lean in radians."""
    occluder_colour: RGB
    clutter_seed: int
    # Recording.
    blur: float
    noise: float
    quality: int
    """JPEG quality."""


def draw_shot(who: Identity, seed: int, identity: int, picture: int, nuisance: float = 1.0) -> Shot:
    """How picture `picture` of an identity was taken; `nuisance` scales everything that is not the person."""
    rng = generator(seed, identity, picture)

    def normal(spread: float, mean: float = 0.0, limit: float = 2.2) -> float:
        return mean + spread * nuisance * min(max(rng.standard_normal(), -limit), limit)

    def chance(probability: float) -> bool:
        return bool(rng.random() < probability)

    def colour() -> RGB:
        grey, vivid = rng.uniform(0.05, 0.95), rng.uniform(0.0, 0.5)
        tones = (grey + vivid * rng.uniform(-1, 1) for _ in range(3))
        red, green, blue = (min(max(tone, 0.02), 0.98) for tone in tones)
        return red, green, blue

    azimuth, elevation = normal(0.75), normal(0.35, 0.45)
    happy, hat, bangs = chance(0.5), chance(who.hat), chance(who.bangs)
    return Shot(
        yaw=normal(0.24),
        pitch=normal(0.13),
        roll=normal(0.10),
        scale=1.0 + normal(0.05),
        shift=(normal(3.0), normal(3.0)),
        smile=min(max(normal(0.22, 0.8 if happy else 0.05), -0.5), 1.2),
        mouth_open=max(0.0, normal(3.0, 1.0 if happy else -1.0)),
        lids=0.1 if chance(0.03 * nuisance) else min(max(normal(0.13, 0.97), 0.5), 1.3),
        brow_raise=normal(1.3),
        gaze=(normal(1.3), normal(0.6)),
        light=(
            math.sin(azimuth) * math.cos(elevation),
            -math.sin(elevation),
            math.cos(azimuth) * math.cos(elevation),
        ),
        ambient=float(rng.uniform(0.25, 0.8)) if nuisance else 0.5,
        exposure=math.exp(normal(0.26, -0.06)),
        contrast=1.0 + normal(0.14),
        warmth=normal(0.13),
        saturation=0.0 if chance(0.05 * nuisance) else max(0.2, 1.0 + normal(0.2)),
        bangs=bangs and not hat and not who.is_bald,
        glasses=chance(who.glasses),
        sunglasses=chance(0.06 * nuisance),
        hat=hat,
        beard=max(0.15, who.beard_dense + normal(0.15)) if chance(who.beard) else 0.0,
        moustache=max(0.3, who.beard_dense + normal(0.15)) if chance(who.moustache) else 0.0,
        lipstick=float(rng.uniform(0.5, 0.9)) if chance(who.lipstick) else 0.0,
        makeup=ramp(((0.55, 0.05, 0.12), (0.80, 0.15, 0.18), (0.85, 0.40, 0.42)), float(rng.random())),
        hair_part=who.hair_part + normal(4.0),
        hair_volume=max(1.5, who.hair_volume + normal(1.5)),
        hair_length=who.hair_length + normal(8.0),
        cloth=colour(),
        hat_colour=colour(),
        occluder=str(rng.choice(("hand", "scarf", "bar"))) if chance(0.12 * nuisance) else "none",
        occluder_place=(
            float(rng.choice((-1.0, 1.0)) * rng.uniform(0.5, 1.0)),
            float(rng.uniform(-1, 1)),
            float(rng.normal(0, 0.35)),
        ),
        occluder_colour=colour(),
        clutter_seed=int(rng.integers(1 << 31)),
        blur=max(0.0, normal(0.6, 0.35)),
        noise=abs(normal(0.014, 0.004)),
        quality=int(rng.integers(55, 96)) if nuisance else 95,
    )

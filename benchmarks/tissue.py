"""How well tissue is found, on composed slides whose tissue is known.

    python benchmarks/tissue.py [--tiles FOLDER] [--seeds 5] [--first_seed 100] [--tile_set odd]

Each slide is 8 mm square at 4 µm/px: tiles of real tissue fill irregular blobs on glass, then come uneven light,
tint, pen, dust, stitching and missing areas. It is written as a JPEG pyramid and read like any slide.

Truth is the area where tiles were pasted, without what is evidently glass in the tile itself: cells of 4 µm whose
mean is at least 220 in every channel of the tile as it came, before it was paled or placed. As the mask does,
truth fills holes and drops specks below (100 µm)². Under pen nothing is tissue.

``--tiles`` is a folder with JPEG or PNG tiles at about 1 µm/px, in any subfolders; without it, scikit-image's
immunohistochemistry() is cut up. Tiles of even rank (by name) and seeds below 100 were used while the method was
made; the defaults measure on the others.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fire import Fire
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import data, draw
from skimage.morphology import remove_small_holes, remove_small_objects

from s4mil_monai.errors import NoTissueError
from s4mil_monai.slides.pyramid import write_pyramid
from s4mil_monai.slides.reader import open_slide
from s4mil_monai.slides.tissue import SMALLEST_TISSUE_UM2, find_tissue

SIDE_PX, MPP, TILE_PX = 2000, 4.0, 56
EVIDENT_GLASS = 220
Picture = NDArray[np.float64]
"""(H, W, 3), 0 to 255."""

PENS = {
    "blue": (0.15, 0.28, 0.68),
    "green": (0.12, 0.50, 0.32),
    "red": (0.82, 0.16, 0.20),
    "black": (0.12, 0.12, 0.13),
}
"""Share of red, green and blue light that a felt pen lets through."""


@dataclass
class Scene:
    """A slide while it is put together."""

    light: Picture
    """Share of light that reaches the scanner, (H, W, 3)."""
    glass: tuple[float, float, float] = (242, 242, 242)
    """Colour of empty glass."""
    inked: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((SIDE_PX, SIDE_PX), bool))
    missing: list[tuple[NDArray[np.bool_], int]] = field(default_factory=list)


Change = Callable[[Scene, np.random.Generator], None]


def load_tiles(folder: str | None, tile_set: str) -> list[NDArray[np.uint8]]:
    """Read tiles; ``tile_set`` is ``even``, ``odd`` or ``all`` by rank of their names."""
    if folder is None:
        picture = data.immunohistochemistry()
        return [picture[y : y + 128, x : x + 128] for y in range(0, 512, 128) for x in range(0, 512, 128)]
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".png"))
    chosen = {"even": paths[::2], "odd": paths[1::2], "all": paths}[tile_set]
    return [np.asarray(Image.open(path).convert("RGB")) for path in chosen]


def compose(tiles: list[NDArray[np.uint8]], stain: float, full: bool, generator: np.random.Generator):
    """Return the light that tissue lets through, and where it is.

    Args:
        tiles: (s, s, 3) pictures.
        stain: 1 leaves tiles as they are, 0.35 blends them toward white to 35 %.
        full: Tissue everywhere instead of in blobs.
        generator: Of blobs and choice of tiles.
    """
    count = -(-SIDE_PX // TILE_PX)
    light, truth = np.ones((SIDE_PX, SIDE_PX, 3)), np.zeros((SIDE_PX, SIDE_PX), bool)
    inside = np.ones_like(truth) if full else _blobs(generator)
    for row in range(count):
        for column in range(count):
            tile = Image.fromarray(tiles[generator.integers(len(tiles))])
            small = np.asarray(tile.resize((TILE_PX, TILE_PX), Image.Resampling.BOX), float)
            place = np.s_[row * TILE_PX : (row + 1) * TILE_PX, column * TILE_PX : (column + 1) * TILE_PX]
            height, width = inside[place].shape
            small, pasted = small[:height, :width], inside[place]
            through = np.minimum(1 - stain * (1 - small / 245), 1)
            light[place][pasted] = through[pasted]
            truth[place] = pasted & (small.min(axis=2) < EVIDENT_GLASS)
    return light, truth


def _blobs(generator: np.random.Generator) -> NDArray[np.bool_]:
    y, x = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
    inside = np.zeros((SIDE_PX, SIDE_PX), bool)
    angles = np.linspace(-np.pi, np.pi, 721)
    for _ in range(generator.integers(2, 5)):
        centre, radius = generator.uniform(450, SIDE_PX - 450, 2), generator.uniform(200, 420)
        edge = np.ones_like(angles)
        for k in range(2, 30):
            edge += generator.uniform(0, 0.5 / k) * np.cos(k * angles + generator.uniform(0, 6.3))
        reach = np.interp(np.arctan2(y - centre[1], x - centre[0]), angles, radius * np.clip(edge, 0.3, 1.8))
        inside |= np.hypot(y - centre[1], x - centre[0]) < reach
    return inside


def glass(*colour: float) -> Change:
    """Give empty glass a colour."""

    def change(scene: Scene, _: np.random.Generator) -> None:
        scene.glass = (colour[0], colour[1], colour[2])

    return change


def vignette(scene: Scene, _: np.random.Generator) -> None:
    """Darken toward the corners, to 55 %."""
    y, x = np.mgrid[-1 : 1 : SIDE_PX * 1j, -1 : 1 : SIDE_PX * 1j]
    scene.light *= (1 - 0.225 * (x**2 + y**2))[..., None]


def gradient(scene: Scene, _: np.random.Generator) -> None:
    """Fall to 60 % from right to left, and warmer where it is darker."""
    ramp = np.linspace(0.6, 1, SIDE_PX)[None, :, None]
    scene.light *= ramp ** np.array([0.95, 1.0, 1.05])


def shadow(scene: Scene, generator: np.random.Generator) -> None:
    """Cast soft grey shadows, as of a cover slip's edge and of bubbles."""
    dark = np.zeros((SIDE_PX, SIDE_PX))
    for _ in range(6):
        row, column = generator.integers(0, SIDE_PX, 2)
        dark[draw.disk((row, column), generator.uniform(60, 200), shape=dark.shape)] = generator.uniform(0.1, 0.35)
    dark[:, generator.integers(200, 1800) :][:, :40] = 0.3
    scene.light *= 1 - ndimage.gaussian_filter(dark, 12)[..., None]


def pen(colour: str) -> Change:
    """Draw felt pen lines, 0.3 to 1 mm wide, over glass and tissue."""

    def change(scene: Scene, generator: np.random.Generator) -> None:
        drawn = np.zeros((SIDE_PX, SIDE_PX))
        for _ in range(2):
            points = generator.uniform(100, SIDE_PX - 100, (3, 2))
            t = np.linspace(0, 1, 600)[:, None]
            curve = (1 - t) ** 2 * points[0] + 2 * t * (1 - t) * points[1] + t**2 * points[2]
            line = np.zeros_like(drawn)
            line[tuple(np.round(curve).astype(int).T)] = 1
            distance = ndimage.distance_transform_edt(line == 0)
            drawn = np.maximum(drawn, np.clip(generator.uniform(38, 125) - distance, 0, 4) / 4)
        streaks = ndimage.gaussian_filter(generator.normal(0, 1, drawn.shape), 8) * 8 * 0.25
        strength = drawn * np.clip(0.9 + streaks, 0.6, 1.2)
        scene.light *= np.array(PENS[colour]) ** strength[..., None]
        scene.inked |= drawn > 0.25

    return change


def debris(scene: Scene, generator: np.random.Generator) -> None:
    """Scatter dark grains, out-of-focus dust and fibres."""
    dark = np.zeros((SIDE_PX, SIDE_PX))
    for _ in range(600):
        row, column = generator.integers(0, SIDE_PX, 2)
        dark[draw.disk((row, column), generator.uniform(1, 6), shape=dark.shape)] = generator.uniform(0.3, 0.9)
    for _ in range(12):
        row, column = generator.integers(60, SIDE_PX - 60, 2)
        rows, columns = draw.ellipse(row, column, *generator.uniform(8, 45, 2), shape=dark.shape)
        dark[rows, columns] = generator.uniform(0.2, 0.6)
    dark = ndimage.gaussian_filter(dark, 1.5)
    for _ in range(8):
        ends = generator.integers(0, SIDE_PX, 4)
        bend = generator.integers(0, SIDE_PX, 2)
        rows, columns = draw.bezier_curve(*ends[:2], *bend, *ends[2:], weight=1, shape=dark.shape)
        dark[rows, columns] = 0.6
    scene.light *= 1 - ndimage.gaussian_filter(dark, 0.7)[..., None] * np.array([1, 0.98, 0.95])


def stitching(scene: Scene, generator: np.random.Generator) -> None:
    """Give fields of 1 mm a brightness of their own, within 4 %, and dark lines between them."""
    fields = SIDE_PX // 250
    steps = generator.uniform(0.96, 1.0, (fields, fields, 1)) * generator.uniform(
        0.995, 1.005, (fields, fields, 3)
    )
    scene.light *= np.repeat(np.repeat(steps, 250, 0), 250, 1)
    scene.light[::250] *= 0.8
    scene.light[:, ::250] *= 0.8


def missing(value: int) -> Change:
    """Leave areas of one flat value, as scanners do outside of what they scan."""

    def change(scene: Scene, generator: np.random.Generator) -> None:
        area = np.zeros((SIDE_PX, SIDE_PX), bool)
        area[:300] = True
        area[:, : generator.integers(100, 400)] = True
        area[-200:, 1400:] = True
        scene.missing.append((area, value))

    return change


@dataclass(frozen=True)
class Case:
    """One kind of slide."""

    name: str
    changes: tuple[Change, ...] = ()
    stain: float = 1.0
    full: bool = False


CASES = (
    Case("white glass", (glass(252, 252, 252),)),
    Case("clipped white glass", (glass(262, 262, 262),)),
    Case("grey glass", (glass(205, 205, 207),)),
    Case("warm tint", (glass(240, 232, 214),)),
    Case("pink tint", (glass(240, 228, 236),)),
    Case("vignette", (vignette,)),
    Case("gradient", (gradient,)),
    Case("shadows", (shadow,)),
    *(Case(f"{colour} pen", (pen(colour),)) for colour in PENS),
    Case("debris", (debris,)),
    Case("stitching", (stitching,)),
    Case("never scanned, black", (missing(0),)),
    Case("never scanned, white", (missing(255),)),
    Case("no glass", (), full=True),
    Case("paled to 50 %", (), stain=0.5),
    Case("paled to 35 %", (), stain=0.35),
    Case("paled to 35 %, warm tint", (glass(240, 232, 214),), stain=0.35),
    Case("paled to 35 %, vignette", (vignette,), stain=0.35),
    Case("paled to 35 %, debris, stitching", (debris, stitching), stain=0.35),
    Case("paled to 50 %, blue pen, shadows", (shadow, pen("blue")), stain=0.5),
    Case("paled to 50 %, red pen, vignette", (vignette, pen("red")), stain=0.5),
    Case(
        "everything", (glass(236, 230, 222), gradient, debris, stitching, pen("green"), pen("black"), missing(255))
    ),
)


def make_slide(
    case: Case, tiles: list[NDArray[np.uint8]], generator: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return an (H, W, 3) slide and its (H / 2, W / 2) truth."""
    light, truth = compose(tiles, case.stain, case.full, generator)
    scene = Scene(light)
    for change in case.changes:
        change(scene, generator)
    picture = scene.light * np.array(scene.glass) + generator.normal(0, 1.5, scene.light.shape)
    truth &= ~scene.inked
    for area, value in scene.missing:
        picture[area] = value
        truth &= ~area
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), _clean(truth[::2, ::2])


def _clean(truth: NDArray[np.bool_]) -> NDArray[np.bool_]:
    smallest = round(SMALLEST_TISSUE_UM2 / (2 * MPP) ** 2)
    return remove_small_holes(remove_small_objects(truth, max_size=smallest), max_size=smallest)


def dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    """Twice the common area over the sum of areas."""
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


def measure(case: Case, tiles: list[NDArray[np.uint8]], seed: int, folder: Path) -> tuple[float, float]:
    """Return Dice and the seconds find_tissue took."""
    picture, truth = make_slide(case, tiles, np.random.default_rng(seed))
    path = write_pyramid(picture, folder / "slide.tif", mpp=MPP)
    with open_slide(path) as slide:
        start = time.perf_counter()
        try:
            found = find_tissue(slide, mpp=2 * MPP).mask
        except NoTissueError:
            found = np.zeros_like(truth)
        return dice(found, truth), time.perf_counter() - start


def main(tiles: str | None = None, seeds: int = 5, first_seed: int = 100, tile_set: str = "odd") -> None:
    """Print the table."""
    pictures = load_tiles(tiles, tile_set)
    source = f"{len(pictures)} tiles ({tile_set}) of {tiles}" if tiles else "skimage.data.immunohistochemistry()"
    print(f"{source}; seeds {first_seed} to {first_seed + seeds - 1}\n")
    print("| case | Dice, mean | lowest | s |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            runs = [measure(case, pictures, first_seed + i, Path(folder)) for i in range(seeds)]
            scores, seconds = np.array(runs).T
            print(
                f"| {case.name} | {scores.mean():.3f} | {scores.min():.3f} | {np.median(seconds):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    Fire(main)

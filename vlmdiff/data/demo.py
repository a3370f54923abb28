"""The demo factory: draws photos of six products, normal and defective, from a seed.

Each product follows a rule: which parts it has, where, and in which colours. Pose, light and grain vary. Most defects
break the rule with parts that look normal by themselves (missing, doubled, misplaced, or in another part's colour), so
knowing the textures is not enough to find them. The mask marks where the drawings with and without the defect differ.
"""

import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from vlmdiff.core.console import track
from vlmdiff.core.processes import map_in_processes

Colour = tuple[float, float, float]
# Signed distance to a shape, negative inside, of product coordinates (u, v), roughly in [-0.5, 0.5].
Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]

VISIBLE = 0.05  # smallest difference between two drawings that a person sees, with values in [0, 1]
SPECK = 4  # smallest difference in pixels that counts as a defect
REACH = 0.06  # how far from its outline a body changes the brightness
NOISE = 0.012  # standard deviation of the sensor noise, with values in [0, 1]


class Drawing:
    """A product under a light. Shapes are painted over one another, in product coordinates."""

    def __init__(self, rng: np.random.Generator, size: int, turn: float, shift: float):
        v, u = np.mgrid[0:size, 0:size] / size + 0.5 / size - 0.5
        angle, scale = rng.uniform(-turn, turn), rng.uniform(0.94, 1.06)
        u0, v0 = rng.uniform(-shift, shift, 2)
        cos, sin = np.cos(angle), np.sin(angle)
        self.u = (((u - u0) * cos + (v - v0) * sin) / scale).astype(np.float32)
        self.v = (((v - v0) * cos - (u - u0) * sin) / scale).astype(np.float32)
        self.pixel = 1 / (size * float(scale))
        # The light comes roughly from the upper left of the photo, whatever the pose of the product.
        azimuth = rng.uniform(-2.6, -2.0)
        # Python floats keep numpy arrays in float32.
        self.light = float(np.cos(azimuth - angle)), float(np.sin(azimuth - angle))
        self.brightness = rng.uniform(0.88, 1.08) * (1 + rng.uniform(-0.04, 0.04, 3) * (1, 0.2, -1))
        self.falloff = rng.uniform(0.0, 0.25) * (np.cos(azimuth) * u + np.sin(azimuth) * v)
        self.vignette = 1 - 0.25 * (u**2 + v**2)
        self.rgb = np.zeros((size, size, 3), np.float32)

    def fill(self, colour: np.ndarray | Colour) -> None:
        self.rgb[:] = colour

    def paint(
        self, shape: Shape, colour: np.ndarray | Colour, bevel: float = 0.015, shadow: float = 0.3, gloss: float = 0.0
    ) -> None:
        """Paint a body with that outline, a shadow and lit edges."""
        # Nothing changes beyond REACH of the outline: find the window that changes on a coarse grid.
        coarse = shape(self.u[::4, ::4], self.v[::4, ::4]) < REACH + 4 * self.pixel
        rows, columns = (4 * np.flatnonzero(coarse.any(axis)) for axis in (1, 0))
        if not len(rows):
            return
        window = slice(max(rows[0] - 4, 0), rows[-1] + 5), slice(max(columns[0] - 4, 0), columns[-1] + 5)
        u, v, (x, y), rgb = self.u[window], self.v[window], self.light, self.rgb[window]
        distance = shape(u, v)
        if shadow:
            cast = np.clip(0.6 - shape(u + 0.014 * x, v + 0.014 * y) / 0.02, 0, 1)
            rgb *= (1 - shadow * cast)[..., None]
        body = np.broadcast_to(np.asarray(colour, np.float32), self.rgb.shape)[window]
        if bevel:
            # Towards the light, the distance grows on the lit side of a body and shrinks on the other.
            slope = (shape(u + 0.004 * x, v + 0.004 * y) - distance) / 0.004
            body = body * (1 + 0.45 * slope * np.clip(1 + distance / bevel, 0, 1))[..., None]
        if gloss:
            centre = shape(u + 0.03 * x, v + 0.03 * y)
            body = body + gloss * np.clip(-centre / 0.05, 0, 1)[..., None] ** 3
        cover = np.clip(0.5 - distance / self.pixel, 0, 1)[..., None]
        rgb += cover * (body - rgb)

    def photograph(self) -> np.ndarray:
        """Return the drawing under its light, without noise: float (S, S, 3) in [0, 1]."""
        light = self.brightness * (self.vignette * (1 + self.falloff))[..., None]
        return np.clip(self.rgb * light, 0, 1)


def circle(x: float, y: float, radius: float) -> Shape:
    return lambda u, v: np.hypot(u - float(x), v - float(y)) - radius


def box(x: float, y: float, width: float, height: float, corner: float = 0.01, turn: float = 0.0) -> Shape:
    """Return a rectangle from its centre, its full width and height, and the radius of its corners."""
    cos, sin = float(np.cos(turn)), float(np.sin(turn))

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        a = np.abs((u - x) * cos + (v - y) * sin) - width / 2 + corner
        b = np.abs((v - y) * cos - (u - x) * sin) - height / 2 + corner
        return np.hypot(np.maximum(a, 0), np.maximum(b, 0)) + np.minimum(np.maximum(a, b), 0) - corner

    return distance


def hexagon(x: float, y: float, radius: float, turn: float = 0.0) -> Shape:
    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        angle = np.arctan2(v - y, u - x) - turn
        folded = np.abs((angle + np.pi / 6) % (np.pi / 3) - np.pi / 6)
        return np.hypot(u - x, v - y) * np.cos(folded) - radius

    return distance


def stroke(points: np.ndarray, width: float) -> Shape:
    """Return a line of that width through points (N, 2)."""

    def distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
        best = np.full(u.shape, np.inf, np.float32)
        for (ax, ay), (bx, by) in zip(points.tolist(), points.tolist()[1:]):  # noqa: B905
            dx, dy = bx - ax, by - ay
            along = np.clip(((u - ax) * dx + (v - ay) * dy) / (dx * dx + dy * dy), 0, 1)
            np.minimum(best, np.hypot(u - ax - along * dx, v - ay - along * dy), out=best)
        return best - width / 2

    return distance


def without(shape: Shape, hole: Shape) -> Shape:
    return lambda u, v: np.maximum(shape(u, v), -hole(u, v))


def grain(rng: np.random.Generator, size: int, sigma: float | tuple[float, float], amount: float) -> np.ndarray:
    """Return a random texture (S, S, 1) with mean 1."""
    field = ndimage.gaussian_filter(rng.standard_normal((size, size)), sigma, mode="wrap")
    return (1 + amount * field / field.std())[..., None].astype(np.float32)


STEEL, BRASS = (0.66, 0.68, 0.71), (0.80, 0.64, 0.28)


def blister(rng: np.random.Generator, fault: np.random.Generator, defect: str | None, size: int) -> Drawing:
    """Draw eight red tablets in two rows, in a foil."""
    red: Colour = (0.80, 0.20, 0.22)
    others: list[Colour] = [(0.22, 0.42, 0.78), (0.92, 0.78, 0.30), (0.30, 0.62, 0.42)]
    drawing = Drawing(rng, size, turn=0.15, shift=0.04)
    drawing.fill(np.array([0.30, 0.31, 0.33]) * grain(rng, size, 6, 0.04))
    emboss = 1 + 0.02 * np.sign(np.sin(90 * (drawing.u + drawing.v)) * np.sin(90 * (drawing.u - drawing.v)))
    foil = np.array([0.78, 0.79, 0.81]) * emboss[..., None] * grain(rng, size, 10, 0.03)
    drawing.paint(box(0, 0, 0.88, 0.56, 0.05), foil)
    chosen = fault.integers(8)
    angle = fault.uniform(0, 2 * np.pi)
    for i in range(8):
        x, y = -0.3 + 0.2 * (i % 4), -0.125 + 0.25 * (i // 4)
        drawing.paint(circle(x, y, 0.086), (0.70, 0.71, 0.73), bevel=0.03, shadow=0)
        colour, tablet = red, circle(x, y, 0.07)
        if defect and i == chosen:
            if defect == "missing":
                continue
            if defect == "wrong_colour":
                colour = others[fault.integers(3)]
            if defect == "broken":
                a, b = x + 0.07 * np.cos(angle), y + 0.07 * np.sin(angle)
                tablet = without(tablet, circle(a, b, 0.075))
            if defect == "misplaced":
                tablet = circle(x + 0.055 * np.cos(angle), y + 0.055 * np.sin(angle), 0.07)
        drawing.paint(tablet, colour, bevel=0.035, gloss=0.25)
    return drawing


def circuit(rng: np.random.Generator, fault: np.random.Generator, defect: str | None, size: int) -> Drawing:
    """Draw a board with a chip, two capacitors, two resistors, a connector and a lamp, each in its place."""
    drawing = Drawing(rng, size, turn=0.10, shift=0.03)
    drawing.fill(np.array([0.62, 0.60, 0.56]) * grain(rng, size, 8, 0.03))
    board = np.array([0.07, 0.36, 0.20])
    drawing.paint(box(0, 0, 0.88, 0.88, 0.03), board * grain(rng, size, 1, 0.03))
    for k in range(6):
        y = -0.16 + 0.055 * k
        path = np.array([(-0.28, y), (-0.10, y), (0.02, y + 0.05), (0.30, y + 0.05)])
        drawing.paint(stroke(path, 0.010), board * 1.35, bevel=0, shadow=0)
    for x in (-0.39, 0.39):
        for y in (-0.39, 0.39):
            drawing.paint(circle(x, y, 0.028), BRASS, shadow=0)
            drawing.paint(circle(x, y, 0.016), (0.15, 0.15, 0.15), bevel=0, shadow=0)
    parts = ["capacitor", "capacitor", "resistor", "resistor", "connector", "lamp"]
    places = [(-0.30, -0.29), (-0.12, -0.29), (0.29, -0.14), (0.29, 0.10), (-0.30, 0.08), (0.02, 0.30)]
    chosen = fault.integers(len(parts))
    turn = fault.uniform(0, 2 * np.pi)
    swap = {"capacitor": "lamp", "resistor": "capacitor", "connector": "resistor", "lamp": "capacitor"}
    _chip(drawing, 0.03, -0.02)
    for i, (part, (x, y)) in enumerate(zip(parts, places, strict=True)):
        if defect and i == chosen:
            if defect == "missing":
                continue
            if defect == "misplaced":
                x, y = x + 0.11 * np.cos(turn), y + 0.11 * np.sin(turn)
            if defect == "swapped":
                part = swap[part]
        _component(drawing, part, x, y)
    if defect == "doubled":
        free = [(0.10, -0.31), (0.27, 0.30), (-0.20, 0.31)]
        _component(drawing, "lamp" if chosen % 2 else "capacitor", *free[fault.integers(3)])
    return drawing


def _chip(drawing: Drawing, x: float, y: float) -> None:
    for k in range(5):
        for side in (-1, 1):
            drawing.paint(box(x + side * 0.13, y - 0.1 + 0.05 * k, 0.05, 0.022, 0.003), STEEL, bevel=0, shadow=0)
    drawing.paint(box(x, y, 0.22, 0.26, 0.012), (0.13, 0.13, 0.14), bevel=0.02)
    drawing.paint(circle(x - 0.07, y - 0.09, 0.014), (0.30, 0.30, 0.32), bevel=0, shadow=0)


def _component(drawing: Drawing, part: str, x: float, y: float) -> None:
    match part:
        case "capacitor":
            drawing.paint(circle(x, y, 0.068), (0.16, 0.18, 0.30), bevel=0.01, shadow=0.4)
            drawing.paint(circle(x, y, 0.056), (0.78, 0.79, 0.80), bevel=0.02, shadow=0)
        case "resistor":
            drawing.paint(box(x, y, 0.02, 0.20, 0.005), STEEL, bevel=0, shadow=0.2)
            drawing.paint(box(x, y, 0.085, 0.14, 0.03), (0.84, 0.72, 0.50), bevel=0.03, shadow=0.4)
            for k, band in enumerate([(0.65, 0.15, 0.12), (0.20, 0.16, 0.14), BRASS]):
                drawing.paint(box(x, y - 0.04 + 0.04 * k, 0.082, 0.016, 0.002), band, bevel=0, shadow=0)
        case "connector":
            drawing.paint(box(x, y, 0.13, 0.36, 0.012), (0.90, 0.88, 0.82), bevel=0.02, shadow=0.4)
            for k in range(5):
                drawing.paint(box(x, y - 0.13 + 0.065 * k, 0.06, 0.03, 0.004), (0.25, 0.24, 0.22), bevel=0, shadow=0)
        case "lamp":
            drawing.paint(circle(x, y, 0.062), (0.86, 0.16, 0.14), bevel=0.04, shadow=0.4, gloss=0.5)


def flange(rng: np.random.Generator, fault: np.random.Generator, defect: str | None, size: int) -> Drawing:
    """Draw a steel ring with six brass bolts."""
    drawing = Drawing(rng, size, turn=0.25, shift=0.03)
    drawing.fill(np.array([0.20, 0.22, 0.25]) * grain(rng, size, 5, 0.06))
    metal = np.array(STEEL) * rng.uniform(0.85, 1.0)
    brushed = 1 + 0.04 * np.sin(160 * np.hypot(drawing.u, drawing.v) + rng.uniform(0, 6))
    drawing.paint(
        without(circle(0, 0, 0.43), circle(0, 0, 0.15)), metal * brushed[..., None] * grain(rng, size, 12, 0.03)
    )
    drawing.paint(without(circle(0, 0, 0.20), circle(0, 0, 0.15)), metal * 0.82, bevel=0.02, shadow=0)
    chosen = fault.integers(6)
    slip = fault.choice([-0.26, 0.26])
    for k in range(6):
        angle, colour = k * np.pi / 3, BRASS
        if defect and k == chosen:
            if defect == "missing":
                drawing.paint(circle(0.31 * np.cos(angle), 0.31 * np.sin(angle), 0.05), (0.14, 0.14, 0.15), shadow=0)
                continue
            if defect == "wrong_colour":
                colour = (0.80, 0.81, 0.83)
            if defect == "misplaced":
                angle += slip
        x, y = 0.31 * np.cos(angle), 0.31 * np.sin(angle)
        drawing.paint(circle(x, y, 0.078), metal * 0.9, bevel=0.01, shadow=0.3)
        drawing.paint(hexagon(x, y, 0.055, k * 1.1), colour, bevel=0.018, shadow=0.3)
    if defect == "scratch":
        angle = (chosen + 0.5) * np.pi / 3
        a = 0.31 * np.array([np.cos(angle), np.sin(angle)])
        along = 0.085 * np.array([np.cos(angle + slip * 3), np.sin(angle + slip * 3)])
        drawing.paint(stroke(np.stack([a - along, a, a + along + 0.02]), 0.018), (0.28, 0.26, 0.25), bevel=0, shadow=0)
    return drawing


def cable(rng: np.random.Generator, fault: np.random.Generator, defect: str | None, size: int) -> Drawing:
    """Draw a plug with five wires in the order black, red, yellow, green, blue."""
    order: list[Colour] = [
        (0.14, 0.14, 0.15),
        (0.78, 0.16, 0.15),
        (0.90, 0.76, 0.20),
        (0.20, 0.56, 0.26),
        (0.18, 0.32, 0.72),
    ]
    drawing = Drawing(rng, size, turn=0.15, shift=0.03)
    drawing.fill(np.array([0.72, 0.66, 0.56]) * grain(rng, size, (1, 14), 0.05))
    plug: Colour = (0.22, 0.23, 0.25)
    spread, bend = rng.uniform(0.9, 1.1), rng.uniform(-0.06, 0.06)
    colours = list(order)
    chosen = fault.integers(5)
    if defect == "swapped":
        other = (chosen + 1 + fault.integers(4)) % 5
        colours[chosen], colours[other] = colours[other], colours[chosen]
    if defect == "wrong_colour":
        colours[chosen] = order[(chosen + 1 + fault.integers(4)) % 5]
    cut = fault.uniform(0.0, 0.25)
    for k in range(5):
        x = -0.26 + 0.13 * k
        t = np.linspace(0, 1, 7)
        path = np.stack([x * (1 + (spread - 1) * t) + bend * np.sin(np.pi * t), -0.22 + 0.80 * t], axis=1)
        wire = stroke(path, 0.075)
        if defect and k == chosen:
            if defect == "missing":
                continue
            if defect == "cut":
                wire = without(wire, box(x + bend, cut, 0.14, 0.11, 0.02, 0.3))
        drawing.paint(wire, colours[k], bevel=0.035, shadow=0.35)
    drawing.paint(box(0, -0.29, 0.76, 0.22, 0.03), plug, bevel=0.02, shadow=0.4)
    for k in range(5):
        drawing.paint(box(-0.26 + 0.13 * k, -0.31, 0.055, 0.08, 0.008), BRASS, bevel=0.01, shadow=0)
    return drawing


def fabric(rng: np.random.Generator, fault: np.random.Generator, defect: str | None, size: int) -> Drawing:
    """Draw a woven tartan: broad stripes in both directions on a ground of another colour."""
    drawing = Drawing(rng, size, turn=0.12, shift=0.05)
    ground, stripe = np.array([0.80, 0.76, 0.66]), np.array([0.20, 0.30, 0.48])
    pitch, width = 0.30, 0.36
    u, v = drawing.u / pitch, drawing.v / pitch
    # The patch lies on a stripe or, for one more stripe, between two.
    x = pitch * (fault.integers(-1, 1) + (0.0 if defect == "doubled" else 0.5))
    patch = box(x, fault.uniform(-0.26, 0.26), 0.24, 0.24, 0.02)(drawing.u, drawing.v) < 0
    across = patch if defect == "misplaced" else False
    a = np.abs((u + 0.5 * across) % 1 - 0.5) < width / 2
    b = np.abs(v % 1 - 0.5) < width / 2
    if defect == "missing":
        a = a & ~patch
    if defect == "doubled":
        a = a | (patch & (np.abs((u + 0.5) % 1 - 0.5) < width / 2))
    mixed = (a.astype(np.float32) + b)[..., None] / 2
    if defect == "wrong_colour":
        stripe = np.where(patch[..., None], stripe[[1, 2, 0]], stripe)
    weave = 1 + 0.06 * np.sin(2 * np.pi * 34 * drawing.u) * np.sin(2 * np.pi * 34 * drawing.v)
    cloth = (ground + mixed * (stripe - ground)) * weave[..., None] * grain(rng, size, 1.2, 0.03)
    drawing.fill(ndimage.gaussian_filter(cloth, (0.6, 0.6, 0)) * grain(rng, size, 14, 0.03))
    return drawing


def tiles(rng: np.random.Generator, fault: np.random.Generator, defect: str | None, size: int) -> Drawing:
    """Draw a chequerboard of square tiles in two colours, with dark joints."""
    drawing = Drawing(rng, size, turn=0.12, shift=0.06)
    pair = [np.array([0.80, 0.66, 0.52]), np.array([0.52, 0.26, 0.20])]
    joint = np.array([0.42, 0.40, 0.38]) * grain(rng, size, 1, 0.03)
    drawing.fill(joint)
    side = 0.30
    marble = grain(rng, size, 3, 0.025)
    where = (fault.integers(-1, 2), fault.integers(-1, 2))
    shades = rng.uniform(0.97, 1.03, (7, 7))
    for i, j in np.ndindex(7, 7):
        place, shade = (i - 3, j - 3), shades[i, j]
        x, y = side * place[0], side * place[1]
        colour = pair[(i + j) % 2]
        if defect and place == where:
            if defect == "missing":
                continue
            if defect == "wrong_colour":
                colour = pair[(i + j + 1) % 2]
        drawing.paint(box(x, y, side - 0.03, side - 0.03, 0.012), colour * shade * marble, bevel=0.012, shadow=0.2)
        if defect == "stain" and place == where:
            a, b = fault.uniform(-0.04, 0.04, 2)
            drawing.paint(circle(x + a, y + b, 0.085), np.array([0.26, 0.24, 0.18]) * marble, bevel=0, shadow=0)
        if defect == "crack" and place == where:
            bend = fault.uniform(-0.03, 0.03, (5, 2))
            path = np.stack([np.linspace(x - 0.11, x + 0.11, 5), np.linspace(y - 0.08, y + 0.09, 5)], axis=1) + bend
            drawing.paint(stroke(path, 0.028), joint * 0.45, bevel=0, shadow=0)
    return drawing


Product = Callable[[np.random.Generator, np.random.Generator, str | None, int], Drawing]
PRODUCTS: dict[str, tuple[Product, tuple[str, ...]]] = {
    "blister": (blister, ("broken", "misplaced", "missing", "wrong_colour")),
    "cable": (cable, ("cut", "missing", "swapped", "wrong_colour")),
    "circuit": (circuit, ("doubled", "misplaced", "missing", "swapped")),
    "fabric": (fabric, ("doubled", "misplaced", "missing", "wrong_colour")),
    "flange": (flange, ("misplaced", "missing", "scratch", "wrong_colour")),
    "tiles": (tiles, ("crack", "missing", "stain", "wrong_colour")),
}


def render(class_name: str, defect: str | None, key: tuple, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a photo, uint8 (size, size, 3), and the mask of its defect, bool (size, size), as a function of `key`."""
    product, _ = PRODUCTS[class_name]
    number = zlib.crc32(repr(key).encode())

    def draw(what: str | None) -> np.ndarray:
        return product(np.random.default_rng([number, 0]), np.random.default_rng([number, 1]), what, size).photograph()

    photograph = draw(defect)
    mask = np.zeros((size, size), bool)
    if defect:
        differs = np.abs(photograph - draw(None)).max(axis=2) > VISIBLE
        # A misplaced body differs along its outline. The mask includes the enclosed area and excludes single pixels.
        outlined = ndimage.binary_closing(differs, np.ones((3, 3)), iterations=2)
        parts, _ = ndimage.label(ndimage.binary_fill_holes(outlined), np.ones((3, 3)))
        mask = (parts > 0) & (np.bincount(parts.ravel())[parts] >= SPECK)
    noise = np.random.default_rng([number, 2]).normal(0, NOISE, photograph.shape)
    return np.rint(255 * np.clip(photograph + noise, 0, 1)).astype(np.uint8), mask


def listed(train: int, test_good: int, test_per_defect: int) -> list[tuple[str, str, str, int]]:
    """Return class, split, kind (good or a defect) and number of each photo that `make_demo` makes."""
    photographs = []
    for class_name, (_, defects) in PRODUCTS.items():
        wanted = [
            ("train", "good", train),
            ("test", "good", test_good),
            *(("test", d, test_per_defect) for d in defects),
        ]
        photographs += [(class_name, split, kind, i) for split, kind, count in wanted for i in range(count)]
    return photographs


def make_demo(out: Path, *, seed: int, train: int, test_good: int, test_per_defect: int, size: int) -> None:
    """Write the demo into the folder `out` in MVTec-AD's layout. Equal seeds give equal bytes.

    `train` and `test_good` are normal images per class, `test_per_defect` images per class and kind of defect, `size`
    is their side in pixels.
    """
    jobs = [(out, seed, *photograph, size) for photograph in listed(train, test_good, test_per_defect)]
    for _ in track(map_in_processes(_photograph, jobs, chunk=16), "make the demo", total=len(jobs)):
        pass


def _photograph(job: tuple[Path, int, str, str, str, int, int]) -> None:
    out, seed, class_name, split, kind, index, size = job
    defect = None if kind == "good" else kind
    image, mask = render(class_name, defect, (seed, class_name, split, kind, index), size)
    _save(image, out / class_name / split / kind / f"{index:03}.png")
    if defect:
        _save(mask.astype(np.uint8) * 255, out / class_name / "ground_truth" / kind / f"{index:03}_mask.png")


def _save(array: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)

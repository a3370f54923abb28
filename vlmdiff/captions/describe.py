"""Describe an image from measurements of colours, layout, shape and texture, in one to three English sentences.

The text describes and never judges: it contains no class name and no word for a defect.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter
from scipy import ndimage
from scipy.fft import irfft2, next_fast_len, rfft2
from scipy.spatial import ConvexHull

SIDE = 128  # pixels of the longer side at which everything is measured
SMALLEST = 0.003  # smallest share of the image that counts as a part
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
NUMBERS += ["eleven", "twelve"]


def describe(image: Image.Image) -> str:
    """Return the caption of an RGB image of any size. Equal images give equal captions."""
    image = working_size(image)
    lab = to_lab(np.asarray(image.filter(ImageFilter.MedianFilter(3))))
    lightness = ndimage.gaussian_filter(to_lab(np.asarray(image))[..., 0], 0.7)
    names = name_colours(lab)
    whole = np.ones(names.shape, bool)
    foreground = stands_out(lab, _frame(whole.shape), whole, ground=0.6)
    if foreground is None or foreground.mean() < 0.015:
        return _all_over(_colours(names, whole), texture(lightness, whole, least=3))
    ground = _colours(names, ndimage.binary_erosion(~foreground, iterations=2, border_value=1), 0.25)
    parts = regions(foreground)
    if parts[0].area > 0.6 * foreground.mean():
        return _one_object(lab, lightness, names, parts[0], ground)
    return _upper(f"{_parts(names, parts)} on {_article(ground)} background.")


def working_size(image: Image.Image) -> Image.Image:
    """Return an image at the size at which it is described. Describing that gives the same caption."""
    scale = SIDE / max(image.size)
    size = [max(SIDE // 8, round(side * scale)) for side in image.size]
    return image.resize(size, Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR)


# --- colour

_VALUES = np.arange(256) / 255
_LINEAR = np.where(_VALUES <= 0.04045, _VALUES / 12.92, ((_VALUES + 0.055) / 1.055) ** 2.4)
_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
_TO_XYZ = _XYZ / _XYZ.sum(1, keepdims=True)  # relative to sRGB's own white


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """Convert uint8 sRGB (…, 3) to CIELAB (…, 3), white point D65, L in [0, 100]. IEC 61966-2-1 and CIE 15."""
    xyz = _LINEAR[rgb] @ _TO_XYZ.T
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


NEUTRAL = ["black", "dark grey", "grey", "light grey", "white"]
TINTED = ["reddish grey", "brownish grey", "greenish grey", "bluish grey", "purplish grey"]
VIVID = ["pink", "red", "orange", "yellow", "green", "turquoise", "blue", "purple"]
DARK = ["dark red", "dark brown", "dark green", "dark turquoise", "dark blue", "dark purple"]
LIGHT = ["light green", "light turquoise", "light blue", "light purple"]
NAMES = [*NEUTRAL, *TINTED, "brown", "beige", "olive", *VIVID, *DARK, *LIGHT]
FAMILIES = np.array([name.split()[-1] for name in NAMES])  # "blue" of "light blue"
ID = {name: i for i, name in enumerate(NAMES)}


def name_colours(lab: np.ndarray) -> np.ndarray:
    """Return the index into `NAMES` of each CIELAB colour, (…) from (…, 3), by hue angle, lightness and chroma."""
    lightness, a, b = lab[..., 0], lab[..., 1], lab[..., 2]
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    pale = (lightness > 72) & (chroma < 40)
    tint = np.where((lightness > 75) | (lightness < 40), 12, 18)  # pale and dark colours look tinted at less chroma
    rules = [
        ((chroma < 9) | (lightness < 8), np.digitize(lightness, [18, 40, 65, 88])),
        (pale & (hue >= 48) & (hue < 116), ID["beige"]),
        (chroma < tint, ID[TINTED[0]] + np.digitize(hue, [20, 116, 190, 295, 345]) % len(TINTED)),
        (hue < 14, ID["pink"]),
        (hue < 48, _red(lightness, chroma)),
        (hue < 82, _orange(lightness, chroma)),
        (hue < 116, _yellow(lightness, hue)),
        (hue < 172, _shade(lightness, "green", 35, 75)),
        (hue < 232, _shade(lightness, "turquoise", 35, 80)),
        (hue < 309, _shade(lightness, "blue", 22, 68)),
        (hue < 338, _shade(lightness, "purple", 25, 65)),
    ]
    return np.select([condition for condition, _ in rules], [value for _, value in rules], ID["pink"])


def _shade(lightness: np.ndarray, name: str, dark: float, light: float) -> np.ndarray:
    ends = [ID[f"dark {name}"], ID[f"light {name}"]]
    return np.select([lightness < dark, lightness > light], ends, ID[name])


def _red(lightness: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    brown = np.where(lightness < 28, ID["dark brown"], ID["brown"])
    return np.select([lightness > 66, chroma < 36, lightness < 30], [ID["pink"], brown, ID["dark red"]], ID["red"])


def _orange(lightness: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    brown = (lightness < 58) | (chroma < 45)
    return np.select([lightness < 28, brown], [ID["dark brown"], ID["brown"]], ID["orange"])


def _yellow(lightness: np.ndarray, hue: np.ndarray) -> np.ndarray:
    brown = np.where(lightness < 25, ID["dark brown"], ID["brown"])
    return np.select([lightness > 62, hue < 96], [ID["yellow"], brown], ID["olive"])


def _families(names: np.ndarray, mask: np.ndarray) -> dict[str, dict[str, float]]:
    """Return shares of the mask by colour and shade, {"blue": {"dark blue": 0.4, "blue": 0.3}}, largest first."""
    shares = np.bincount(names[mask], minlength=len(NAMES)) / mask.sum()
    families: dict[str, dict[str, float]] = {}
    for i in np.argsort(-shares, kind="stable"):
        families.setdefault(str(FAMILIES[i]), {})[NAMES[i]] = shares[i]
    return dict(sorted(families.items(), key=lambda item: -sum(item[1].values())))


def _main(names: np.ndarray, mask: np.ndarray) -> str:
    return next(iter(_families(names, mask)))


def _colours(names: np.ndarray, mask: np.ndarray, least: float = 0.15) -> str:
    """Return the most common colour, and others that cover at least `least` of the mask, a third of that if vivid.

    A colour is named by its most common shade, because light varies over a surface, or by both its dark and its light
    shade. The order is that of the palette: nearly equal shares would change places between photos.
    """
    chosen: list[str] = []
    for family, shades in list(_families(names, mask).items())[:6]:
        if not chosen or sum(shades.values()) >= (least / 3 if family in VIVID else least):
            ends = [f"dark {family}", f"light {family}"]
            both = all(shades.get(end, 0.0) >= least for end in ends)
            chosen += ends if both else [next(iter(shades))]
    return _join(sorted(chosen, key=NAMES.index))


# --- regions


def stands_out(lab: np.ndarray, reference: np.ndarray, domain: np.ndarray, ground: float) -> np.ndarray | None:
    """Return the mask of pixels in `domain` whose colour differs from the background under `reference`.

    The background is a plane in each channel, to allow for uneven light. The result is None if less than the share
    `ground` of the reference lies on such a plane.
    """
    height, width = reference.shape
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    plane = np.stack([np.ones_like(x), x, y], axis=-1)
    basis, colours = plane[reference], lab[reference]
    fit = np.zeros((3, 3))
    fit[0] = np.median(colours, axis=0)
    for _ in range(3):  # least squares on the pixels near the last fit
        distance = np.linalg.norm(colours - basis @ fit, axis=-1)
        near = distance <= max(6.0, 2.5 * np.median(distance))
        fit = np.linalg.lstsq(basis[near], colours[near], rcond=None)[0]
    distance = np.linalg.norm(colours - basis @ fit, axis=-1)
    spread = np.median(distance)
    threshold = max(9.0, 4 * spread)
    if spread > 6 or np.mean(distance < threshold) < ground:
        return None
    mask = domain & (np.linalg.norm(lab - plane @ fit, axis=-1) > threshold)
    mask = ndimage.binary_opening(mask, np.ones((3, 3)))
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    kept = np.bincount(labels.ravel()) >= SMALLEST * mask.size
    kept[0] = False
    return kept[labels]


def _frame(shape: tuple[int, int]) -> np.ndarray:
    """Return the mask of the image's border. Its width is 1/25 of the longer side."""
    frame = np.ones(shape, bool)
    band = SIDE // 25
    frame[band:-band, band:-band] = False
    return frame


@dataclass(frozen=True)
class Region:
    """A connected part: its bounding box, its mask in that box, its share of the image."""

    window: tuple[slice, slice]
    mask: np.ndarray
    area: float

    @property
    def centre(self) -> tuple[float, float]:
        """Centroid (y, x) in pixels of the image."""
        y, x = (indices.mean() for indices in np.nonzero(self.mask))
        return self.window[0].start + y, self.window[1].start + x


def regions(mask: np.ndarray) -> list[Region]:
    """Return the connected parts of a mask with an area of at least `SMALLEST`, largest first."""
    labels, _ = ndimage.label(mask, np.ones((3, 3)))
    windows = ndimage.find_objects(labels)
    parts = ((window, labels[window] == i) for i, window in enumerate(windows, start=1))
    found = [Region(window, part, part.sum() / mask.size) for window, part in parts]
    return sorted((part for part in found if part.area >= SMALLEST), key=lambda part: -part.area)


def shape_of(mask: np.ndarray) -> str:
    """Return a word for the outline of a region without holes, from its hull and its smallest box."""
    mask = np.pad(mask, 1)
    ys, xs = np.nonzero(mask & ~ndimage.binary_erosion(mask))
    if np.ptp(xs) < 3 or np.ptp(ys) < 3:
        return "long narrow"
    points = np.stack([xs, ys], axis=1).astype(float)
    hull = ConvexHull(points)
    # Pixels are squares: the hull of their centres lacks half a pixel on every side.
    solidity = mask.sum() / (hull.volume + hull.area / 2 + 1)
    angles = np.radians(np.arange(0, 90, 2))
    corners = points[hull.vertices]
    widths = np.ptp(corners @ np.stack([np.cos(angles), np.sin(angles)]), axis=0) + 1
    heights = np.ptp(corners @ np.stack([-np.sin(angles), np.cos(angles)]), axis=0) + 1
    best = np.argmin(widths * heights)
    fill = mask.sum() / (widths * heights)[best]
    ratio = max(widths[best], heights[best]) / min(widths[best], heights[best])
    radius = np.hypot(*(points - points.mean(0)).T)
    if solidity < 0.75:
        return "branching"
    if ratio > 2.5:
        return "long narrow"
    # On few pixels a circle looks like an octagon.
    if ratio < 1.25 and 0.7 < fill < 0.86 and radius.std() < max(1.3, 0.5 + 0.025 * radius.mean()):
        return "round"
    if fill > 0.86:
        return "square" if ratio < 1.15 else "rectangular"
    if fill < 0.62:
        return "triangular"
    if 0.74 < fill < 0.84 and solidity > 0.95 and ratio > 1.2:
        return "oval"
    return "many-cornered"


def arrangement(parts: list[Region]) -> str:
    """Return the layout of three or more parts of similar size, or "" if they form no rows."""
    longest = [max(part.mask.shape) for part in parts]
    if len(parts) < 3 or max(longest) > 2 * min(longest):
        return ""
    rows, columns = (_lines(parts, axis) for axis in (0, 1))
    if rows == 1 < columns:
        return "in a row"
    if columns == 1 < rows:
        return "in a column"
    return f"in {_number(rows)} rows of {_number(columns)}" if rows * columns == len(parts) else ""


def _lines(parts: list[Region], axis: int) -> int:
    """Return how many lines the centres form across `axis`, or 0. A gap of half a part's side ends a line."""
    half = np.median([part.mask.shape[axis] for part in parts]) / 2
    centres = np.sort([part.centre[axis] for part in parts])
    lines = np.split(centres, np.flatnonzero(np.diff(centres) > half) + 1)
    return len(lines) if all(np.ptp(line) <= 2 * half for line in lines) else 0


# --- texture


def texture(lightness: np.ndarray, mask: np.ndarray, least: int) -> str:
    """Return a phrase for the surface under `mask`: smooth, grained, striped, or patterned if `least` periods fit.

    The phrase is "" if the surface is too small to tell.
    """
    inside = ndimage.binary_erosion(mask, iterations=2, border_value=1)
    if inside.sum() < 0.02 * mask.size:
        return ""
    window = SIDE // 4 + 1
    weight = ndimage.uniform_filter(inside.astype(float), window)
    light = ndimage.uniform_filter(np.where(inside, lightness, 0.0), window) / np.maximum(weight, 1e-6)
    detail = np.where(inside, lightness - light, 0.0)
    size = np.abs(detail[inside])
    # Both equal the standard deviation of a Gaussian. The median ignores edges, the mean counts thin lines.
    typical, strength = 1.4826 * np.median(size), 1.2533 * size.mean()
    if typical < 0.9:
        return "smooth"
    gy, gx = (ndimage.gaussian_filter(lightness, 1.0, order=order, truncate=3) for order in ((1, 0), (0, 1)))
    deep = ndimage.binary_erosion(inside, iterations=3, border_value=1)
    gradient = gx[deep] + 1j * gy[deep]
    slope = np.abs(gradient)
    # Doubling the angle makes opposite slopes equal. Weighting by length keeps rare edges from dominating.
    direction = np.sum(gradient**2 / np.maximum(slope, 1e-9)) / max(slope.sum(), 1e-9)
    coherence, angle = np.abs(direction), np.degrees(np.angle(direction)) / 2
    period, grain = _repetition(detail, inside, int(np.sqrt(inside.sum()) / least))
    how = "faint " if strength < 2.5 else "strong " if strength > 12 else ""
    if coherence > 0.5:
        # The angle is that of the gradient, with y downwards; lines run across it.
        run = ["vertical", "diagonal", "horizontal", "diagonal"][round(angle / 45) % 4]
        lines = f"{how}{run} {'stripes' if period else 'lines'}"
        if run == "diagonal":
            lines += " rising to the right" if angle > 0 else " falling to the right"
        return lines + (f", about {_rounded(SIDE / period)} across" if period else "")
    if period:
        # If few pixels hold most of the slope, edges separate flat areas.
        edges = "sharp-edged " if np.median(slope) < 0.43 * slope.mean() else ""
        return f"a {how}{edges}regular pattern repeating about {_rounded(SIDE / period)} times across"
    return f"a {how}{'fine' if grain < 2 else 'coarse' if grain > 3 else 'medium'} grain"


def _repetition(detail: np.ndarray, inside: np.ndarray, reach: int) -> tuple[float, float]:
    """Return (period, grain) in pixels from the autocorrelation; the period is 0 if nothing repeats.

    The period is the shortest shift, up to `reach`, that maps the texture onto itself, outside the spot or ridge around
    shift 0. The grain is the radius of that spot at half its height.
    """
    shape = [next_fast_len(side + reach, real=True) for side in detail.shape]
    overlap, products = (
        irfft2(np.abs(rfft2(field.astype(np.float32), shape)) ** 2, shape) for field in (inside, detail)
    )
    near = np.ix_(*(np.arange(-min(reach, side - 1), min(reach, side - 1) + 1) for side in detail.shape))
    correlation = products[near] / np.maximum(overlap[near], 0.2 * overlap[0, 0])
    centre = tuple(side // 2 for side in correlation.shape)
    correlation /= correlation[centre]
    spots, _ = ndimage.label(correlation > 0.4)
    grain = np.sqrt(np.sum(correlation[spots == spots[centre]] > 0.5) / np.pi)
    away = np.where((spots > 0) & (spots != spots[centre]), correlation, 0.0)
    heights = ndimage.maximum(away, spots, np.arange(spots.max() + 1))
    if heights.max() == 0:
        return 0.0, grain
    # The tops of all spots nearly as high as the highest.
    tops = (heights[spots] > 0.85 * heights.max()) & (away > 0.97 * heights[spots])
    return float(np.hypot(*(np.argwhere(tops) - centre).T).min()), grain


def _rounded(number: float) -> str:
    near = round(number) if number < 20 else 5 * round(number / 5)
    return NUMBERS[near] if near < len(NUMBERS) else str(near)


# --- sentences


def _all_over(colours: str, surface: str) -> str:
    if surface == "smooth":
        return f"A smooth {colours} surface fills the picture."
    return f"{_upper(_article(colours))} surface fills the picture, with {surface}."


def _one_object(lab: np.ndarray, lightness: np.ndarray, names: np.ndarray, thing: Region, ground: str) -> str:
    mask = np.zeros(names.shape, bool)
    mask[thing.window] = thing.mask
    filled = ndimage.binary_fill_holes(thing.mask)
    holes = regions(filled & ~thing.mask)
    inner = ndimage.binary_erosion(mask, iterations=3)
    inner = inner if inner.any() else mask

    carried = stands_out(lab, inner, inner, ground=0.5)
    parts = [] if carried is None else regions(carried)
    # A part in a shade of the object's own colour is probably a shadow or a reflection.
    own = _main(names, inner)
    parts = [part for part in parts if _main(names[part.window], part.mask) != own]
    if parts:
        inner &= ~ndimage.binary_dilation(carried, iterations=2)

    size = "small " if thing.area < 0.08 else "large " if thing.area > 0.4 else ""
    centred = max(abs(c / s - 0.5) for c, s in zip(thing.centre, names.shape, strict=True)) < 0.08
    text = f"One {size}{shape_of(filled)} {_colours(names, inner)} object"
    if holes:
        text += f" with {_counted(len(holes), 'hole')}"
    text += f" {'in the middle of' if centred else 'on'} {_article(ground)} background."
    if parts:
        text += f" On it {_parts(names, parts, own)}."
    if surface := texture(lightness, inner, least=6):
        text += f" Its surface {'is' if surface == 'smooth' else 'shows'} {surface}."
    return text


def _parts(names: np.ndarray, parts: list[Region], own: str = "") -> str:
    """Return a phrase for the parts: number, shape, colours other than `own`, and layout."""
    together = np.zeros(names.shape, bool)
    for part in parts:
        together[part.window] |= part.mask
    what = f"{_colours(names, together & (FAMILIES[names] != own))} part"
    shapes = Counter(shape_of(ndimage.binary_fill_holes(part.mask)) for part in parts)
    shape, alike = shapes.most_common(1)[0]
    if place := arrangement(parts):
        what = f"{shape if alike == len(parts) else f'mostly {shape}'} {what}"
        return f"{_counted(len(parts), what)} {place}"
    if alike == len(parts):
        return _counted(alike, f"{shape} {what}")
    # With many different parts, the borders between them are uncertain, and so is their number.
    number = _number(len(parts)) if len(parts) < 5 else "several" if len(parts) < 10 else "many"
    return f"{number} {what}s of different shapes"


def _counted(number: int, what: str) -> str:
    return f"{_number(number)} {what}{'' if number == 1 else 's'}"


def _number(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else "many"


def _upper(text: str) -> str:
    return text[0].upper() + text[1:]


def _article(text: str) -> str:
    return ("an " if text[0] in "aeiou" else "a ") + text


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]

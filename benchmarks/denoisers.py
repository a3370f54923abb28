"""Train the denoiser in other ways, one at a time, and judge defects drawn on held-out images and the test images.

Run it in a workspace where `dvc repro` has run with presets/photographs.yaml:

    python benchmarks/denoisers.py [NAME ...]

Without names, all ways run. Each trains a denoiser as params.yaml says, but for one change, on the codes that `encode`
wrote. Its map is compared alone, and with a fifth of the weight beside the map of the detector's banks of patches. The
first row, without a change, is always there. The intervals are of the differences from it, and from the banks alone.
They come from 1,000 bootstrap samples of each class's test images. Maps are smoothed, and images scored, as params.yaml
says. The names, and what each changes:
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parent))

from dataset import Dataset, learn_again
from photographs import interval

from vlmdiff.captions.files import read_captions
from vlmdiff.core import workspace as w
from vlmdiff.core.console import say
from vlmdiff.data.synthesised import synthesise
from vlmdiff.detection.anomaly_map import enlarge, fuse, image_scores, smooth
from vlmdiff.detection.calibration import Usual
from vlmdiff.detection.detector import Detector
from vlmdiff.detection.features import rms_difference
from vlmdiff.evaluation.bootstrap import Resampled, Statistics
from vlmdiff.evaluation.metrics import evaluate_classes
from vlmdiff.evaluation.weighing import DEFECTS
from vlmdiff.model.first_stage import load_first_stage
from vlmdiff.model.normalization import Normalization, from_uint8
from vlmdiff.training.diffusion import VARIANCE_WEIGHT, build
from vlmdiff.training.encoded import Encoded
from vlmdiff.training.loop import Problem, batch_indices, fit, step_generator

SHARE, BATCH = 0.8, 16


@dataclass(frozen=True)
class Judged:
    """What is judged of N images: their classes, captions, masks (N, S, S), and whether they have a defect.

    codes: (N, C, h, w); retrieval: (N, S, S), the map of the banks.
    """

    classes: np.ndarray
    captions: list[str]
    masks: np.ndarray
    truths: np.ndarray
    codes: torch.Tensor
    retrieval: np.ndarray


class Workspace:
    """What all ways share: parameters, encoded images, and the images to judge."""

    def __init__(self):
        self.dataset, self.detector = Dataset(), Detector.from_pretrained(w.DETECTOR, "cpu")
        self.params, self.encoded = self.dataset.params, Encoded.open(w.ENCODED)
        self.texts, self.detection = read_captions(w.CAPTIONS), self.detector.params
        train, judge = self.params.train, self.detection
        kinds = [features.kind for features in judge.features]
        usual = (train.sgn, train.prediction, train.trainable, train.accumulate, judge.steps, judge.samples, kinds)
        if usual != (False, "v_prediction", "all", 1, 1, 2, ["latents"]) or judge.captions != "none":
            raise SystemExit("skipped: this needs the `train` and `evaluate.detection` of presets/photographs.yaml")
        normal = self.dataset.normal
        split = normal["split"] == "validation"
        self.held_out = normal[split].reset_index(drop=True)
        rows = pd.concat([self.held_out, normal[~split]])
        learn_again(self.detector, rows, (self.dataset.read(path) for path in rows["path"]))
        self.drawn, self.tested = self._drawn(), self._tested()

    def _drawn(self) -> Judged:
        """Return the held-out normal images, and defects drawn on them. The banks' first images are the held-out."""
        images = self.dataset.images(self.held_out)
        names = self.held_out["class_name"].tolist()
        spoiled = list(synthesise(images, names, DEFECTS))
        rows = [*range(len(images)), *(one.row for one in spoiled)]
        masks = [*np.zeros((len(images), *images.shape[1:3]), bool), *(one.mask for one in spoiled)]
        return self._judged(
            np.stack([*images, *(one.image for one in spoiled)]),
            np.array(names)[rows],
            [self.texts[self.held_out["image_id"][row]] for row in rows],
            np.stack(masks),
            np.arange(len(rows)) >= len(images),
            rows,
        )

    def _tested(self) -> Judged:
        data = self.dataset
        texts = [self.texts[name] for name in data.test["image_id"]]
        images, classes = data.images(data.test), np.array(data.classes)
        return self._judged(images, classes, texts, data.masks, np.array(data.truths), None)

    def _judged(self, images, classes, captions, masks, truths, without: Sequence[int] | None) -> Judged:
        retrieval = self.detector.evidence(images, BATCH, None, without)[:, 1]
        codes = self.encode(images)
        return Judged(classes, captions, masks, truths, codes, np.ascontiguousarray(retrieval))

    @torch.no_grad()
    def encode(self, images: np.ndarray) -> torch.Tensor:
        """Return the codes (N, C, h, w) of images, uint8 (N, S, S, 3)."""
        encode, parts = self.detector.pipeline.encode_images, range(0, len(images), BATCH)
        return torch.cat([encode(from_uint8(images[i : i + BATCH], torch.device("cpu"))) for i in parts])

    @cached_property
    def training(self) -> np.ndarray:
        """The training images, uint8 (N, S, S, 3), in the order of `encoded`."""
        normal = self.dataset.normal.set_index("image_id")
        index = self.encoded.index
        return self.dataset.images(normal.loc[index[index["split"] == "train"]["image_id"]])


class Way:
    """As it is."""

    changes: dict = {}  # noqa: RUF012
    share = 1.0  # of the steps
    dropout = 0.0
    captions = "none"

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        train = workspace.params.train.limited(int((workspace.encoded.index["split"] == "train").sum()))
        self.params = train.model_copy(update={"steps": round(train.steps * self.share), **self.changes})
        self.level = workspace.detection.noise_level
        vae, normalization = load_first_stage(w.FIRST_STAGE), Normalization.load(w.FIRST_STAGE)
        text_encoder = CLIPTextModel.from_pretrained(w.ENCODED / "text_encoder")
        tokenizer = CLIPTokenizer.from_pretrained(w.ENCODED / "tokenizer")
        self.pipeline = build(vae, text_encoder, tokenizer, self.params, normalization)
        self.unet, self.scheduler = self.pipeline.unet, self.pipeline.scheduler
        for module in self.unet.modules():
            if isinstance(module, nn.Dropout):
                module.p = self.dropout
        self.model = nn.ModuleDict({"unet": self.unet})

    def prepared(self, codes: torch.Tensor) -> torch.Tensor:
        """Return what the denoiser learns and judges, of codes (B, C, h, w)."""
        return codes

    def texts(self, captions: Sequence[str]) -> list[str]:
        """Return the captions that images with these captions get."""
        return list(captions)

    def learned(self) -> torch.Tensor:
        """Return the codes (N, C, h, w) of the training images."""
        index = self.workspace.encoded.index
        return torch.from_numpy(self.workspace.encoded.mean[np.flatnonzero(index["split"] == "train")])

    def prompts(self, codes: torch.Tensor, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return what the denoiser attends to (B, L, D), and a term of the loss. embeds: those of the captions."""
        return embeds, 0.0

    def noised(self, codes: torch.Tensor, noise: torch.Tensor, levels: torch.Tensor, generator: torch.Generator | None):
        """Return noised codes (B, C, h, w), and the weights of their places in the loss (B, h, w)."""
        return self.scheduler.add_noise(codes, noise, levels), torch.ones_like(codes[:, 0])

    def weights(self, squared: torch.Tensor, risen: float) -> torch.Tensor:
        """Return the weights (B, h, w) of squared errors (B, h, w). `risen` rises to 1 in a quarter of the steps."""
        return torch.ones_like(squared)

    def loss(
        self, codes: torch.Tensor, embeds: torch.Tensor, generator: torch.Generator, levels: torch.Tensor, risen: float
    ) -> torch.Tensor:
        noise = torch.randn(codes.shape, generator=generator)
        noisy, counted = self.noised(codes, noise, levels, generator)
        prompts, term = self.prompts(codes, embeds)
        output, log_variance = self.pipeline.denoise(noisy, levels, prompts, codes)
        squared = (output.float() - self.scheduler.get_velocity(codes, noise, levels)).square().mean(dim=1)
        weights = counted * self.weights(squared.detach(), risen)
        value = (weights * squared).sum() / weights.sum() + term
        if log_variance is None:
            return value
        surprise = log_variance.float() + squared.detach() * torch.exp(-log_variance.float())
        return value + VARIANCE_WEIGHT * (counted * surprise).sum() / counted.sum()

    def train(self) -> None:
        """Train on the training images; the weights of the lowest validation loss are kept."""
        data, params = self.workspace.encoded, self.params
        codes = self.prepared(self.learned())
        splits = data.index["split"].to_numpy()
        held_out = self.prepared(torch.from_numpy(data.mean[np.flatnonzero(splits == "validation")]))
        lowest, highest = params.noise_levels

        def embedded(split: str) -> torch.Tensor:
            names = data.index["image_id"][splits == split]
            with torch.no_grad():
                return self.pipeline.encode_captions(["", *self.texts([self.workspace.texts[name] for name in names])])

        embeds, theirs = embedded("train"), embedded("validation")[1:]

        def loss(step: int, part: slice) -> torch.Tensor:
            rows = batch_indices(len(codes), params.batch_size, step, params.seed)
            generator = step_generator(params.seed, step)
            levels = torch.randint(lowest, highest + 1, (len(rows),), generator=generator)
            dropped = (torch.rand(len(rows), generator=generator) < params.caption_dropout).numpy()
            texts = np.where(dropped, 0, 1 + rows % (len(embeds) - 1))
            return self.loss(codes[rows], embeds[texts], generator, levels, min(1.0, 4 * step / params.steps))

        def validation_loss(share: slice) -> float:
            generator, total = step_generator(params.seed, 2**32), 0.0
            batches = held_out.split(params.batch_size), theirs.split(params.batch_size)
            for some, prompts in zip(*batches, strict=True):
                levels = torch.randint(lowest, highest + 1, (len(some),), generator=generator)
                total += self.loss(some, prompts, generator, levels, 0).item() * len(some)
            return total / len(held_out)

        with tempfile.TemporaryDirectory() as folder:
            history = fit(Problem("train", self.model, loss, validation_loss), params, Path(folder))
        say(f"validation losses {', '.join('{:.4f}'.format(row['validation_loss']) for row in history)}")

    @torch.no_grad()
    def predict(self, noisy: torch.Tensor, level: int, prompts: torch.Tensor):
        """Return the clean codes that the denoiser predicts, the noise, and the error it expects of the former."""
        output, log_variance = self.pipeline.denoise(noisy, torch.tensor(level), prompts, noisy)
        alpha = self.scheduler.alphas_cumprod[level]
        clean = alpha.sqrt() * noisy - (1 - alpha).sqrt() * output
        noise = alpha.sqrt() * output + (1 - alpha).sqrt() * noisy
        error = torch.ones_like(noisy[:, 0]) if log_variance is None else ((1 - alpha) * log_variance.exp()).sqrt()
        return clean, noise, error

    def reconstruct(self, codes: torch.Tensor, noise: torch.Tensor, level: int, prompts: torch.Tensor):
        """Return codes (B, C, h, w) as if they were normal, and the error that is expected there (B, h, w)."""
        noisy, _ = self.noised(codes, noise, torch.tensor([level]), None)
        clean, _, error = self.predict(noisy, level, prompts)
        return clean, error

    def differences(self, codes: torch.Tensor, prompts: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Return, by title, how far codes (B, C, h, w) are from normal ones, and the error expected there (B, h, w)."""
        return {self.title(): self.residual(codes, prompts, self.level)}

    def residual(self, codes: torch.Tensor, prompts: torch.Tensor, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.workspace.detection.seed)
        noise = torch.randn(codes[:1].shape, generator=generator)
        found = [self.reconstruct(codes, sign * noise, level, prompts) for sign in (1, -1)]
        mean, error = (torch.stack(values).mean(dim=0) for values in zip(*found, strict=True))
        return rms_difference(codes, mean), error

    @torch.no_grad()
    def all_differences(self, judged: Judged) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        parts = []
        texts = self.texts(judged.captions) if self.captions == "image" else [""] * len(judged.captions)
        for i in range(0, len(judged.codes), BATCH):
            codes = self.prepared(judged.codes[i : i + BATCH])
            prompts, _ = self.prompts(codes, self.pipeline.encode_captions(texts[i : i + BATCH]))
            parts.append(self.differences(codes, prompts))
        return {title: tuple(map(torch.cat, zip(*(part[title] for part in parts), strict=True))) for title in parts[0]}

    def maps(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Return, by title, the maps (N, S, S) of the drawn defects and of the test images, on the normal scale."""
        space, found = self.workspace, {}
        size, normal = space.dataset.size, ~space.drawn.truths
        drawn, tested = self.all_differences(space.drawn), self.all_differences(space.tested)
        for title in drawn:
            typical = drawn[title][1][torch.from_numpy(normal)].square().mean().sqrt()
            both = []
            for values, errors in (drawn[title], tested[title]):
                floor = space.detection.deviation_floor
                values = enlarge(values, size)
                if floor is not None:
                    values = values / (enlarge(errors, size) / typical + floor)
                both.append(smooth(values.numpy(), space.detection.smoothing))
            tail = np.float32(Usual.of(both[0][normal]).tail)
            found[title] = both[0] / tail, both[1] / tail
        return self.fused(found)

    def fused(self, found: dict[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        return found

    @classmethod
    def title(cls) -> str:
        return (cls.__doc__ or "").partition(". ")[0].removesuffix(".")


class Half(Way):
    """Half of the steps."""

    share = 0.5


class Double(Way):
    """Twice the steps."""

    share = 2.0


class Levels(Way):
    """Three noise levels, 550, 650 and 750. The mean of their differences; trained at 500 to 800."""

    changes = {"noise_levels": (500, 800)}  # noqa: RUF012

    def differences(self, codes, prompts):
        found = [self.residual(codes, prompts, level) for level in (550, 650, 750)]
        return {self.title(): tuple(torch.stack(values).mean(dim=0) for values in zip(*found, strict=True))}


class Inversion(Way):
    """Trained at all noise levels. Also three steps of DDIM inversion, to noise; the map is its norm (2504.05662)."""

    changes = {"noise_levels": (0, 999)}  # noqa: RUF012
    inverted, both = "... the norm after three steps of inversion", "... the mean of both maps"

    def differences(self, codes, prompts):
        x = codes
        for level, following in ((0, 333), (333, 666), (666, 999)):
            clean, noise, _ = self.predict(x, level, prompts)
            alpha = self.scheduler.alphas_cumprod[following]
            x = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        norm = x.square().mean(dim=1).sqrt()
        return super().differences(codes, prompts) | {self.inverted: (norm, torch.ones_like(norm))}

    def fused(self, found):
        residual, inverted = found[self.title()], found[self.inverted]
        return found | {self.both: tuple((a + b) / 2 for a, b in zip(residual, inverted, strict=True))}


class Dropout(Way):
    """Dropout of 0.1. In all blocks."""

    dropout = 0.1


class Bottleneck(Way):
    """Dropout of 0.4 in the middle block. Cf. the noisy bottleneck of Dinomaly (arXiv 2405.14325)."""

    def __init__(self, workspace: Workspace):
        super().__init__(workspace)
        for module in self.unet.mid_block.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.4


class Loose(Way):
    """Loose loss. The best reconstructed places get a tenth of the gradient; their share rises to 90 % (Dinomaly)."""

    def weights(self, squared, risen):
        return torch.where(squared < squared.flatten().quantile(0.9 * risen), 0.1, 1.0)


class Hard(Way):
    """Hard places weigh more. By the third power of their error (the soft mining loss of INP-Former, 2503.02424)."""

    def weights(self, squared, risen):
        return (squared.sqrt() / squared.sqrt().mean()) ** 3


class Prototypes(Way):
    """Six prototypes. Drawn from the image's own codes (INP-Former); the denoiser attends to them, not to captions."""

    def __init__(self, workspace: Workspace):
        super().__init__(workspace)
        torch.manual_seed(self.params.seed)
        width, channels = self.unet.config.cross_attention_dim, self.unet.config.in_channels
        self.tokens = nn.Parameter(torch.randn(6, width))
        self.project, self.attend = nn.Linear(channels, width), nn.MultiheadAttention(width, 4, batch_first=True)
        self.model["prototypes"] = nn.ModuleList([self.project, self.attend, nn.ParameterList([self.tokens])])

    def prompts(self, codes, embeds):
        places = self.project(codes.flatten(2).transpose(1, 2))
        found, _ = self.attend(self.tokens.expand(len(codes), -1, -1), places, places, need_weights=False)
        # Coherence: each place is close to one of the prototypes.
        near = F.cosine_similarity(places[:, :, None], found[:, None], dim=-1).amax(dim=2)
        return found, 0.2 * (1 - near).mean()


class Masked(Way):
    """Half of the places noised. Blocks of 2 x 2, at random; at test every second one, then the rest (DeCo-Diff)."""

    def noised(self, codes, noise, levels, generator):
        shape = len(codes), 1, codes.shape[2] // 2, codes.shape[3] // 2
        if generator is None:
            rows, columns = (torch.arange(side) for side in shape[2:])
            mask = ((rows[:, None] + columns) % 2 == self.odd).expand(shape)
        else:
            mask = torch.rand(shape, generator=generator) < 0.5
        mask = mask.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return torch.where(mask, self.scheduler.add_noise(codes, noise, levels), codes), mask[:, 0].float()

    def reconstruct(self, codes, noise, level, prompts):
        clean, error = torch.zeros_like(codes), torch.zeros_like(codes[:, 0])
        for self.odd in (0, 1):
            noisy, counted = self.noised(codes, noise, torch.tensor([level]), None)
            found, _, expected = self.predict(noisy, level, prompts)
            clean, error = clean + counted[:, None] * found, error + counted * expected
        return clean, error


class Centred(Way):
    """Codes less the image's mean."""

    def prepared(self, codes):
        return codes - codes.mean(dim=(2, 3), keepdim=True)


class Jittered(Way):
    """Altered training images too. Two of each: moved by 8 pixels, brighter or darker by 10 %, noise of 2 of 255."""

    def learned(self):
        rng, images, every = np.random.default_rng(0), self.workspace.training, [super().learned()]
        for _ in range(2):
            changed = np.empty_like(images)
            for i, image in enumerate(images):
                y, x = rng.integers(0, 17, 2)
                moved = np.pad(image, ((8, 8), (8, 8), (0, 0)), "reflect")[y:, x:][: len(image), : image.shape[1]]
                noisy = moved * rng.uniform(0.9, 1.1) + rng.normal(0, 2, image.shape)
                changed[i] = noisy.round().clip(0, 255).astype(np.uint8)
            every.append(self.workspace.encode(changed))
        return torch.cat(every)


class Wide(Way):
    """A network of 96, 128, 192 channels."""

    changes = {"block_channels": (96, 128, 192)}  # noqa: RUF012


class Raw(Way):
    """Weights not averaged (no EMA)."""

    changes = {"ema_decay": 0.0}  # noqa: RUF012


class Plain(Way):
    """Error not learned."""

    changes = {"learn_variance": False}  # noqa: RUF012


class Uncaptioned(Way):
    """No captions in training."""

    changes = {"caption_dropout": 1.0}  # noqa: RUF012


class Captioned(Way):
    """Captions at test too."""

    captions = "image"


class Shuffled(Captioned):
    """Captions of other images, in training and at test."""

    def texts(self, captions):
        rng, others = np.random.default_rng(0), {text: [one for one in captions if one != text] for text in captions}
        return [str(rng.choice(others[text] or [text])) for text in captions]


WAYS = {
    kind.__name__.lower(): kind
    for kind in (
        *(Half, Double, Levels, Inversion, Dropout, Bottleneck, Loose, Hard, Prototypes, Masked, Centred, Jittered),
        *(Wide, Raw, Plain, Uncaptioned, Captioned, Shuffled),
    )
}


def results(space: Workspace, judged: Judged, maps: np.ndarray) -> tuple[str, Resampled]:
    """Return AU-PRO and image AUROC of maps (N, S, S), and bootstrap samples of them."""
    limit, options = space.params.evaluate.max_fpr, space.detection
    scores = image_scores(maps, options.image_score, options.top_share)
    mean = evaluate_classes(judged.classes, maps, judged.masks, scores, limit, None, judged.truths).mean
    samples = Resampled({})
    for name in np.unique(judged.classes):
        i = judged.classes == name
        samples.classes[name] = Statistics.of(maps[i], judged.masks[i], scores[i], judged.truths[i]).draw(name, limit)
    return f"{mean['au_pro']:.3f} / {mean['image_auroc']:.3f}", samples


def measured(space: Workspace, names: Sequence[str]) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Train and yield title and maps of each way."""
    for kind in (Way, *(WAYS[name] for name in names)):
        way = kind(space)
        way.train()
        yield from way.maps().items()


def main() -> None:
    about = "\n".join(f"  {name}: {kind.__doc__}" for name, kind in WAYS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "") + about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="*", choices=[*WAYS, []], metavar="NAME")
    names = parser.parse_args().name or list(WAYS)
    space = Workspace()
    columns = [f"{where}, {what}" for where in ("drawn", "test") for what in ("alone", "with the banks")]
    table = Table("", *columns, title="AU-PRO / image AUROC")
    (drawn, _), (tested, banks) = (results(space, one, one.retrieval) for one in (space.drawn, space.tested))
    table.add_row("the banks alone", "", drawn, "", tested)
    say(f"the banks alone: {drawn} | {tested}")
    first: dict[str, Resampled] = {}
    for title, maps in measured(space, names):
        cells, found = [], {}
        for judged, one in zip((space.drawn, space.tested), maps, strict=True):
            together = fuse(np.stack([one, judged.retrieval], axis=1), SHARE)
            for what, values in (("alone", one), ("with the banks", together)):
                cell, found[what] = results(space, judged, values)
                cells.append(cell)
        table.add_row(title, *cells)
        say(f"{title}: {' | '.join(cells)}")
        pairs = [(what, found[what] - first[what], f"minus {Way.title().lower()}") for what in first]
        first = first or found
        for what, less, than in (*pairs, ("with the banks", found["with the banks"] - banks, "minus the banks alone")):
            values = ", ".join(f"{metric} {interval(less.interval(metric))}" for metric in ("au_pro", "image_auroc"))
            say(f"{title}, {what}, {than}: {values} (test images, 95 %)")
    Console().print(table)


if __name__ == "__main__":
    main()

"""params.yaml as frozen, validated models: one section per stage, then the gate, the monitor and the registry.

An unknown key or an invalid value raises an `InputError` that names the file and the key.
"""

import math
from pathlib import Path
from typing import Annotated, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlmdiff.core.errors import InputError
from vlmdiff.core.workspace import MADE, WRITTEN

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
NoiseLevel = Annotated[int, Field(ge=0, le=999)]
PositiveFloat = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Demo(Section):
    """The procedural factory: images per class, and the side of an image in pixels."""

    seed: int = 0
    train: Positive = 100
    test_good: Positive = 12
    test_per_defect: Positive = 6
    size: Annotated[int, Field(ge=64)] = 128


class Table(Section):
    """A table that lists the images: CSV or Parquet (.parquet), relative to the root."""

    file: Path = Path("images.csv")


class Visa(Section):
    split: Literal["1cls", "2cls_fewshot", "2cls_highshot"] = "1cls"


class RealIad(Section):
    """The folders of the lists and of the images, relative to the root."""

    jsons: Path = Path("realiad_jsons")
    images: Path = Path("realiad_1024")


class CocoAd(Section):
    split: Annotated[int, Field(ge=0, le=3)] = 0


class Cifar(Section):
    """The normal classes or, for CIFAR-100, superclasses."""

    normal: Annotated[tuple[str, ...], Field(min_length=1)] = ("airplane",)


Copies = Literal["error", "keep_train", "keep_test"]


class Prepare(Section):
    """The dataset. `root` is its folder; the layout `demo` ignores it.

    `copies` is what to do with an image that is in two splits: "error" stops `validate`, "keep_train" leaves out the
    copy in the later split (train, validation, test), "keep_test" the copy in the earlier one.
    """

    layout: Literal[
        "demo", "folder", "table", "mvtec_ad", "mvtec_3d", "btad", "visa", "real_iad", "coco_ad", "cifar"
    ] = "demo"
    root: Path = Path("data/raw")
    validation_fraction: Fraction = 0.3
    test_fraction: Fraction = 0.2
    max_pixels: Positive = 62_500_000
    copies: Copies = "error"
    demo: Demo = Demo()
    table: Table = Table()
    visa: Visa = Visa()
    real_iad: RealIad = RealIad()
    coco_ad: CocoAd = CocoAd()
    cifar: Cifar = Cifar()

    @field_validator("root")
    @classmethod
    def _no_stage_writes_there(cls, root: Path) -> Path:
        for folder in WRITTEN:
            if root.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"the stages replace what is in {folder}: move the dataset, for example into data/raw")
        return root

    @property
    def image_root(self) -> Path:
        """The folder of the manifest's paths: `root`, or the folder of the images that the stage makes."""
        return MADE if self.layout in ("demo", "cifar") else self.root


class Minimum(Section):
    """The smallest number of images per class in each split."""

    train: Positive = 8
    validation: Positive = 2
    test: Positive = 2


class Validate(Section):
    modes: tuple[str, ...] = ("RGB", "L")
    min_side: Positive = 32
    min_images: Minimum = Minimum()
    masks: Literal["required", "optional"] = "required"
    near_duplicate_bits: Annotated[int, Field(ge=0, le=64)] = 8
    max_imbalance: Annotated[float, Field(ge=1)] = 10.0


class Describe(Section):
    """Sentences from measurements of the image, without a model."""

    kind: Literal["describe"]


class CaptionFile(Section):
    """Captions from a file, in a format that `captions/brought.py` lists. Paths are relative to prepare.root.

    `images` is the list of image paths for a file that contains only captions.
    """

    kind: Literal["file"]
    file: Path
    images: Path | None = None


class Prompted(Section):
    """A vision-language model and its prompt: a name in `captions/prompts.py`, or the full text."""

    model: str
    prompt: Annotated[str, Field(min_length=1)] = "paper"
    max_new_tokens: Positive = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0 is greedy and ignores the seed
    seed: Annotated[int, Field(ge=0)] = 0


class VisionLanguageModel(Prompted):
    """An image-text-to-text model of `transformers`: a path, or a name on the hub with a commit hash as `revision`."""

    kind: Literal["transformers"]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device_map: str = "auto"
    batch_size: Positive = 8


class Endpoint(Prompted):
    """A model behind an OpenAI-compatible endpoint, such as vLLM or LMDeploy.

    `base_url` is the part before /chat/completions. `api_key_variable` names the environment variable with the key.
    `timeout` is the longest silence in seconds. Waits before `retries` double, beginning with `backoff` seconds.
    """

    kind: Literal["openai"]
    base_url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")]
    api_key_variable: str | None = None
    max_side: Positive = 1024
    concurrency: Positive = 16
    timeout: Annotated[float, Field(gt=0)] = 120.0
    retries: Annotated[int, Field(ge=0)] = 6
    backoff: Annotated[float, Field(gt=0)] = 1.0


Captioner = Annotated[Describe | CaptionFile | VisionLanguageModel | Endpoint, Field(discriminator="kind")]


class Caption(Section):
    captioner: Captioner = Describe(kind="describe")
    min_words: Positive = 3
    max_words: Positive = 120


class Pretrained(Section):
    """Weights in the layout of diffusers or transformers: a local folder, or a name on the hub with a commit."""

    model: str
    revision: str | None = None


class Part(Pretrained):
    """One network in such a folder or repository."""

    subfolder: str = ""


class Training(Section):
    """The settings of all training loops. After a linear warm-up, the learning rate falls along half a cosine.

    `batch_size` is the number of images per optimizer step, over all processes and `accumulate` parts.
    `precision` is that of the networks' computations; the weights stay fp32. "auto" is bf16 if the device computes
    networks of this width faster in it, else fp32.
    """

    steps: Positive
    batch_size: Positive
    accumulate: Positive = 1
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    learning_rate: PositiveFloat
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Positive = 100
    checkpoint_every: Positive = 100
    seed: int = 0

    @property
    def width(self) -> int | None:
        """The channels of the widest layer that is trained, None for a pretrained network."""
        return None


# The index of a hidden state, or the model's last state.
Layer = int | Literal["last"]


class VisionBackbone(Pretrained):
    """A vision model of `transformers` (a folder, or a hub name and `revision`) and its layers to use.

    Layers are hidden states in the library's order: 0 is the input of a transformer's first block, -1 the output of its
    last. "last" is the model's `last_hidden_state`: state -1 after the final normalisation in ViT and DINO (the
    reference's features), after the last convolution in MobileNet, and equal to -1 in ResNet and ConvNeXt. `image_mean`
    and `image_std` apply to images in [0, 1]. They default to those of the checkpoint's preprocessor_config.json, or
    without it to 0.5, which gives inputs in [-1, 1].
    """

    image_size: Annotated[int, Field(gt=0, le=8192)] = 224
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] = (-1,)
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _normalization_is_whole(self):
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("set both `image_mean` and `image_std`, or neither")
        return self


class Perceptual(VisionBackbone):
    """A loss: the distance in the features of a vision model."""

    weight: PositiveFloat = 1.0


class Discriminator(Section):
    """A patch discriminator that starts at step `start`. `weight` is its share of the decoder's gradient."""

    start: Annotated[int, Field(ge=0)]
    weight: Annotated[float, Field(gt=0)] = 0.5
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = 64
    layers: Positive = 3


class BackboneSpace(VisionBackbone):
    """Features of a frozen vision model as latents: its layers on one grid, projected to `latent_channels`.

    `grid` is the side of the latents, `decoder_channels` the width of the decoder that visualises them. `whitening`
    equalises the deviations of the principal components: 0 keeps them, 1 makes them equal.
    """

    model: str = "models/backbone"
    image_size: Positive = 256
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] = (1, 4, 7, 11)
    grid: Positive = 32
    whitening: Annotated[float, Field(ge=0, le=1)] = 0.5
    decoder_channels: Positive = 128


class FirstStage(Training):
    """The latent space.

    "autoencoder_kl" is an AutoencoderKL, trained from scratch, or a `pretrained` AutoencoderKL or AutoencoderTiny (such
    as TAESD) that is fine-tuned (`steps: 0` keeps it unchanged). `block_channels` has one entry per resolution, each
    half the last; a pretrained model has its own shape and scale. "backbone" uses the features of `backbone` and trains
    only the decoder that visualises them.
    """

    kind: Literal["autoencoder_kl", "backbone"] = "autoencoder_kl"
    backbone: BackboneSpace = BackboneSpace()
    pretrained: Part | None = None
    image_size: Positive = 64
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] = (0.5, 0.5, 0.5)
    latent_channels: Positive = 4
    block_channels: tuple[Positive, ...] = (8, 16, 32)
    kl_weight: Annotated[float, Field(ge=0)] = 1e-4
    perceptual: Perceptual | None = None
    discriminator: Discriminator | None = None
    steps: Annotated[int, Field(ge=0)] = 800
    batch_size: Positive = 8
    learning_rate: PositiveFloat = 3e-3

    @property
    def width(self) -> int | None:
        if self.kind == "backbone":
            return self.backbone.decoder_channels
        return None if self.pretrained else max(self.block_channels)

    @property
    def downsampling(self) -> int | None:
        """How many times smaller than the image the latents are; None if only a pretrained model knows."""
        if self.kind == "backbone":
            return self.image_size // self.backbone.grid
        return None if self.pretrained else 2 ** (len(self.block_channels) - 1)

    @model_validator(mode="after")
    def _fits(self):
        if self.kind == "backbone":
            if self.image_size % self.backbone.grid:
                raise ValueError("`image_size` must be a multiple of `backbone.grid`")
        elif (factor := self.downsampling) and self.image_size % factor:
            raise ValueError(f"`image_size` must be a multiple of {factor}, the downsampling of `block_channels`")
        if self.pretrained is None and self.steps == 0:
            raise ValueError("`steps: 0` keeps a `pretrained` model unchanged: set `pretrained`, or raise `steps`")
        if self.kind == "backbone" and self.pretrained is not None:
            raise ValueError("`kind: backbone` has no `pretrained` autoencoder: set it to null")
        if self.discriminator is not None and self.discriminator.start >= self.steps:
            raise ValueError("`discriminator.start` must be less than `steps`, or the discriminator never starts")
        return self


class TextEncoder(Section):
    """A CLIP text model of this size, trained with its tokenizer on the captions and their images."""

    kind: Literal["trained"] = "trained"
    vocabulary: Annotated[int, Field(ge=300)] = 1000
    max_tokens: Annotated[int, Field(ge=8, le=77)] = 77
    hidden_size: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    steps: Positive = 150
    batch_size: Positive = 64
    learning_rate: PositiveFloat = 1e-3


class PretrainedTextEncoder(Part):
    """A pretrained CLIP text model. The default subfolders are those of a Stable Diffusion pipeline."""

    kind: Literal["pretrained"]
    subfolder: str = "text_encoder"
    tokenizer_subfolder: str = "tokenizer"


class Encode(Section):
    """Latents and text embeddings for training.

    `max_windows` limits a caption to that many windows of the text encoder's length; 1 cuts it as CLIP does. `mirror`
    adds images mirrored in these directions; use it if a mirrored product is normal.
    """

    batch_size: Positive = 32
    mirror: tuple[Literal["horizontal", "vertical"], ...] = ()
    max_windows: Annotated[int, Field(ge=1, le=8)] = 4
    text_encoder: Annotated[TextEncoder | PretrainedTextEncoder, Field(discriminator="kind")] = TextEncoder()
    seed: int = 0


class Train(Training):
    """The denoiser: the initial UNet and SGN, and their training.

    `pretrained` is a pipeline in diffusers' layout: its `unet` initialises the UNet, the down and middle blocks of that
    UNet initialise the SGN, and its `scheduler` sets the noise schedule. Without it, `block_channels`,
    `layers_per_block` and `head_size` shape an untrained UNet.

    Training draws noise levels uniformly between the lowest and the highest of `noise_levels`. `max_epochs` limits
    `steps`, so that few images train for less time; the warm-up becomes shorter by the same factor.
    """

    pretrained: Pretrained | None = None
    trainable: Literal["all", "paper"] = "all"
    block_channels: tuple[Positive, ...] = (32, 32, 64)
    layers_per_block: Positive = 1
    head_size: Positive = 32
    hint_channels: tuple[Positive, ...] = (8, 16, 32)
    sgn: bool = False
    only_mid_control: bool = True
    fuse: bool = True
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    learn_variance: bool = True
    noise_levels: tuple[NoiseLevel, NoiseLevel] = (200, 300)
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    steps: Positive = 420
    max_epochs: PositiveFloat | None = None
    batch_size: Positive = 16
    learning_rate: PositiveFloat = 1e-3

    @property
    def width(self) -> int | None:
        return None if self.pretrained else max(self.block_channels)

    def limited(self, images: int) -> "Train":
        """Return these settings with the steps for so many training images, counting mirrored ones."""
        if self.max_epochs is None:
            return self
        steps = min(self.steps, max(1, math.ceil(self.max_epochs * images / self.batch_size)))
        warmup = self.warmup_steps * steps // self.steps
        return self.model_copy(update={"steps": steps, "warmup_steps": warmup, "max_epochs": None})

    def hint_mistake(self, downsampling: int) -> str | None:
        """Return what is wrong with `hint_channels` for latents `downsampling` times smaller than the image."""
        if not self.sgn or 2 ** (len(self.hint_channels) - 1) == downsampling:
            return None
        return (
            f"train.hint_channels has {len(self.hint_channels)} entries; each but the first halves the image, "
            f"but the latents are {downsampling} times smaller than the image"
        )

    @model_validator(mode="after")
    def _frozen_part_is_trained(self):
        if self.trainable == "paper" and self.pretrained is None:
            raise ValueError("`trainable: paper` freezes the UNet's down and middle blocks and needs `pretrained`")
        return self

    @field_validator("noise_levels")
    @classmethod
    def _levels_rise(cls, levels: tuple[int, int]) -> tuple[int, int]:
        if levels[0] > levels[1]:
            raise ValueError("give the lowest level first")
        return levels


class Pixels(Section):
    """The colours of the image at the model's resolution, averaged over `window` x `window` pixels."""

    kind: Literal["pixels"]
    window: Annotated[int, Field(gt=0, le=1023)] = 3
    weight: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("window")
    @classmethod
    def _has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("must be odd")
        return window


class Latents(Section):
    """The latents of image and reconstruction, in which the denoiser works."""

    kind: Literal["latents"]
    weight: Annotated[float, Field(gt=0)] = 1.0


class AutoencoderFeatures(Section):
    """Activations of the first stage's encoder after the given resolution blocks (0 is the finest)."""

    kind: Literal["autoencoder"]
    layers: tuple[Annotated[int, Field(ge=0)], ...] = (1,)
    weight: Annotated[float, Field(gt=0)] = 1.0


class BackboneFeatures(VisionBackbone):
    """Hidden states of a vision model."""

    kind: Literal["transformers"]
    weight: Annotated[float, Field(gt=0)] = 1.0


Features = Annotated[Pixels | Latents | AutoencoderFeatures | BackboneFeatures, Field(discriminator="kind")]


Spacing = Literal["trailing", "leading"]
Solver = Literal["ddim", "dpmsolver++"]


class Retrieval(Section):
    """How far an image's patches are from the nearest normal patches of the training images, in a backbone's features.

    `patches` is how many of them a bank keeps of each product. The backbone sees an image at its own size and at each
    of `more_sizes`. Each size has a bank, on the grid that the backbone gives it, and the evidence is their mean.
    `expected` is the share of the usual distance that is subtracted from a distance. `level` is the share of the
    image's level, the median of its evidence, that is subtracted everywhere. `weight` is the share of this evidence
    beside that of the reconstruction; "auto" chooses it on synthesised defects.
    """

    patches: Positive = 200_000
    more_sizes: tuple[Annotated[int, Field(gt=0, le=8192)], ...] = ()
    expected: Share = 0.75
    level: Share = 0.5
    weight: Share | Literal["auto"] = "auto"

    def of_each(self, images: int) -> int:
        """Return how many patches of each of a product's `images` images are kept, if it has so many."""
        return -(-self.patches // images)


class Detection(Section):
    """How to compute an anomaly map from an image. The model stores these settings."""

    noise_level: NoiseLevel = 250
    steps: Positive = 1
    spacing: Spacing = "trailing"
    solver: Solver = "ddim"
    samples: Annotated[int, Field(gt=0, le=1000)] = 4
    antithetic: bool = True
    captions: Literal["none", "image", "class"] = "none"
    guidance: Annotated[float, Field(ge=0)] = 1.0
    features: Annotated[tuple[Features, ...], Field(min_length=1)] = (Pixels(kind="pixels"), Latents(kind="latents"))
    retrieval: Retrieval | None = None
    deviation_floor: PositiveFloat | None = 0.5
    align_corners: bool = False
    smoothing: Annotated[float, Field(ge=0, le=1000)] = 2.0
    image_score: Literal["max", "top_percent", "pooled_max"] = "max"
    top_share: Fraction = 0.01
    score_smoothing: Annotated[float, Field(ge=0, le=1000)] | None = 0.5
    review: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    false_alarm_rate: Fraction = 0.05
    seed: int = 0

    @model_validator(mode="after")
    def _steps_fit(self):
        if self.steps > max(self.noise_level, 1):
            raise ValueError(f"`steps` = {self.steps} exceeds the timesteps of `noise_level` = {self.noise_level}")
        return self


class Costs(Section):
    """What a missed defect and a false alarm cost, in any unit."""

    miss: PositiveFloat
    false_alarm: PositiveFloat


class Decision(Section):
    """What a verdict costs. `defect_rate` is the share of images that are expected to have a defect."""

    costs: Costs | None = None
    defect_rate: Fraction = 0.02


class Evaluate(Section):
    detection: Detection = Detection()
    decision: Decision = Decision()
    batch_size: Positive = 32
    max_fpr: Annotated[float, Field(gt=0, le=1)] = 0.3
    examples: Annotated[int, Field(ge=0)] = 3


Ranking = Literal["au_pro", "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max"]
# The false-alarm rate has no floor but a ceiling.
Deciding = Literal["recall", "precision", "f1", "balanced_accuracy", "recall_at_1", "recall_at_5", "region_recall"]
POOLED = {"image_auroc", "image_ap", *get_args(Deciding)}


class Floor(Section):
    """The values that a metric must reach: as mean over classes, in every class, and pooled over all images.

    None sets no floor.
    """

    mean: Share | None = None
    every_class: Share | None = None
    pooled: Share | None = None


class Gate(Section):
    """Criteria for promotion: floors of metrics, limits, and the comparison with the champion.

    `max_false_alarm_rate` limits the upper bound, at `confidence`, of the rate on the test images.
    `no_worse_verdicts` refuses a model with fewer right verdicts than the champion, at that confidence.
    """

    floors: dict[Ranking | Deciding, Floor] = {
        "au_pro": Floor(mean=0.85, every_class=0.70),
        "recall": Floor(pooled=0.70, every_class=0.25),
    }
    max_false_alarm_rate: Share | None = 0.2
    metric: Ranking = "au_pro"
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    max_class_drop: Share | None = 0.05
    no_worse_verdicts: bool = True
    max_latency_ms: PositiveFloat | None = None
    max_size_mb: PositiveFloat | None = None

    @field_validator("floors")
    @classmethod
    def _pooled_where_defined(cls, floors: dict[str, Floor]) -> dict[str, Floor]:
        for metric, floor in floors.items():
            if floor.pooled is not None and metric not in POOLED:
                raise ValueError(f"{metric} has no pooled value: use `mean` or `every_class`")
        return floors


class Monitor(Section):
    """When new images count as drifted from those at calibration.

    `false_alarm_rate` applies to a check as a whole, over the `last` newest images.
    """

    false_alarm_rate: Fraction = 0.01
    min_images: Positive = 50
    last: Positive = 200
    defect_rate: Annotated[float, Field(ge=0, lt=1)] = 0.02


class Registry(Section):
    """The model registry. The environment variable MLFLOW_TRACKING_URI overrides `tracking_uri`."""

    model_name: Annotated[str, Field(pattern=r"^[^/:]+$")] = "vlmdiff"
    experiment: str = "vlmdiff"
    tracking_uri: str = "sqlite:///mlflow.db"
    # Git branches that exist and that the flow `retrain` may commit on, besides those that it has made.
    branches: tuple[str, ...] = ()


class Params(Section):
    prepare: Prepare = Prepare()
    validate_: Annotated[Validate, Field(alias="validate")] = Validate()
    caption: Caption = Caption()
    first_stage: FirstStage = FirstStage()
    encode: Encode = Encode()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    monitor: Monitor = Monitor()
    registry: Registry = Registry()

    @model_validator(mode="after")
    def _hint_meets_the_latents(self):
        downsampling = self.first_stage.downsampling
        if downsampling and (mistake := self.train.hint_mistake(downsampling)):
            raise ValueError(mistake)
        return self

    @model_validator(mode="after")
    def _what_a_test_reads_is_trained(self):
        if self.evaluate.detection.deviation_floor is not None and not self.train.learn_variance:
            raise ValueError("evaluate.detection.deviation_floor needs train.learn_variance: set it to null")
        return self

    @model_validator(mode="after")
    def _retrieval_has_features(self):
        if self.evaluate.detection.retrieval and self.first_stage.kind != "backbone":
            raise ValueError("evaluate.detection.retrieval needs first_stage.kind: backbone: set it to null")
        return self

    @model_validator(mode="after")
    def _levels_of_a_test_are_trained(self):
        detection = self.evaluate.detection
        lowest = round(detection.noise_level / detection.steps) if detection.spacing == "trailing" else 1
        trained = self.train.noise_levels
        if not trained[0] <= lowest <= detection.noise_level <= trained[1]:
            raise ValueError(
                f"evaluate.detection uses noise levels {lowest} to {detection.noise_level}, but train.noise_levels "
                f"covers only {trained[0]} to {trained[1]}: widen train.noise_levels"
            )
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and validate a params file.

    Raises InputError if the file is missing, is not YAML, or has an unknown key or an invalid value.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. Run in its folder, or give its path with --params.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    try:
        return Params.model_validate({} if raw is None else raw)
    except ValidationError as error:
        raise InputError(_explain(path, error)) from error


def _explain(path: Path, error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(the whole file)"
        what = "unknown key" if item["type"] == "extra_forbidden" else item["msg"]
        given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
        lines.append(f"  {key}: {what}{given}")
    return f"{path} has {len(lines)} error(s):\n" + "\n".join(lines)

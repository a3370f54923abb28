"""params.yaml as frozen, validated models: one section a stage, then the gate, the monitor and the registry.

An unknown key or a bad value is an `InputError` that names the file and the key.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlmdiff.core.errors import InputError
from vlmdiff.core.workspace import MADE

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
NoiseLevel = Annotated[int, Field(ge=0, le=999)]
PositiveFloat = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Demo(Section):
    """The procedural factory: images a class, and the side of a photograph in pixels."""

    seed: int = 0
    train: Positive = 80
    test_good: Positive = 12
    test_per_defect: Positive = 6
    size: Annotated[int, Field(ge=64)] = 128


class Table(Section):
    """A list of images of one's own: CSV, or Parquet where its name ends so, relative to the root."""

    file: Path = Path("images.csv")


class Visa(Section):
    split: Literal["1cls", "2cls_fewshot", "2cls_highshot"] = "1cls"


class RealIad(Section):
    """Folders relative to the root."""

    jsons: Path = Path("realiad_jsons")
    images: Path = Path("realiad_1024")


class CocoAd(Section):
    split: Annotated[int, Field(ge=0, le=3)] = 0


class Cifar(Section):
    """Names of classes or, of CIFAR-100, of superclasses."""

    normal: Annotated[tuple[str, ...], Field(min_length=1)] = ("airplane",)


class Prepare(Section):
    """`root` is the dataset's folder; the demo's is read by nobody."""

    layout: Literal[
        "demo", "folder", "table", "mvtec_ad", "mvtec_3d", "btad", "visa", "real_iad", "coco_ad", "cifar"
    ] = "demo"
    root: Path = Path("data/raw")
    validation_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.2
    max_pixels: Positive = 100_000_000
    demo: Demo = Demo()
    table: Table = Table()
    visa: Visa = Visa()
    real_iad: RealIad = RealIad()
    coco_ad: CocoAd = CocoAd()
    cifar: Cifar = Cifar()

    @property
    def image_root(self) -> Path:
        """The folder that the manifest's paths are relative to: the dataset's or, of images that are made, theirs."""
        return MADE if self.layout in ("demo", "cifar") else self.root


class Minimum(Section):
    """Images that each class needs in a split."""

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
    """Captions that the user brings; `captions/brought.py` says in which formats. Paths are relative to prepare.root.

    `images` is the list of image paths that goes with a bare list of captions.
    """

    kind: Literal["file"]
    file: Path
    images: Path | None = None


class Prompted(Section):
    """What is asked of a vision-language model, by the name of a prompt in `captions/prompts.py` or in full."""

    model: str
    prompt: Annotated[str, Field(min_length=1)] = "paper"
    max_new_tokens: Positive = 512
    temperature: Annotated[float, Field(ge=0)] = 0.0  # 0 is greedy, and the seed then says nothing
    seed: Annotated[int, Field(ge=0)] = 0


class VisionLanguageModel(Prompted):
    """An image-text-to-text model of `transformers`, by path, or by its name on the hub with a commit's hash."""

    kind: Literal["transformers"]
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    device_map: str = "auto"
    batch_size: Positive = 8


class Endpoint(Prompted):
    """A model behind an OpenAI-compatible endpoint, such as vLLM's or LMDeploy's.

    `base_url` ends where /chat/completions begins; `api_key_variable` names the environment variable with the key;
    `timeout` is seconds of silence; `retries` come after waits that double from `backoff` seconds.
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
    """Weights in diffusers' or transformers' layout: a folder here, or a name on the hub at a `revision` (a commit)."""

    model: str
    revision: str | None = None


class Part(Pretrained):
    """One network out of such a folder or repository."""

    subfolder: str = ""


class Training(Section):
    """What every training loop of ours has; rates fall by half a cosine after a linear warm-up.

    `batch_size` is that of an optimizer's step, whatever number of processes and of `accumulate` parts share it.
    `precision` is what the networks compute in; the weights stay fp32. "auto" is bf16 on a GPU or CPU with instructions
    for it, else fp32.
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


# A hidden state by its number, or the model's last.
Layer = int | Literal["last"]


class VisionBackbone(Pretrained):
    """A vision model of `transformers`, by folder or by hub name and `revision`, and the layers that are looked at.

    Layers are hidden states as the library counts them: 0 is what enters a transformer's first block, -1 what its last
    block gives. "last" is the model's `last_hidden_state`: -1 after the final normalisation in ViT and DINO (there the
    reference's features), after the last convolution in MobileNet, the same as -1 in ResNet and ConvNeXt. `image_mean`
    and `image_std`, of an image in [0, 1], are those of the checkpoint's preprocessor_config.json where left out, and
    0.5, which means inputs in [-1, 1], where it has none.
    """

    image_size: Positive = 224
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] = (-1,)
    image_mean: tuple[float, float, float] | None = None
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None

    @model_validator(mode="after")
    def _normalization_is_whole(self):
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("give both of `image_mean` and `image_std`, or neither")
        return self


class Perceptual(VisionBackbone):
    """Distance in the features of a vision model."""

    weight: PositiveFloat = 1.0


class Discriminator(Section):
    """A patch discriminator that joins at step `start`; `weight` is its share of the decoder's gradient."""

    start: Annotated[int, Field(ge=0)]
    weight: Annotated[float, Field(gt=0)] = 0.5
    channels: Annotated[int, Field(gt=0, multiple_of=8)] = 64
    layers: Positive = 3


class BackboneSpace(VisionBackbone):
    """Features of a frozen vision model as latents: its layers on one grid, projected to `latent_channels`.

    `grid` is the latents' side, `decoder_channels` the width of the decoder that shows them, and `whitening` the power
    with which the principal components' deviations are evened out: 0 leaves them, 1 makes them one.
    """

    model: str = "models/backbone"
    image_size: Positive = 256
    layers: Annotated[tuple[Layer, ...], Field(min_length=1)] = (1, 4, 7, 11)
    grid: Positive = 32
    whitening: Annotated[float, Field(ge=0, le=1)] = 0.5
    decoder_channels: Positive = 128


class FirstStage(Training):
    """The latent space.

    "autoencoder_kl" is an AutoencoderKL: trained from scratch, or `pretrained` and fine-tuned (`steps: 0` leaves it as
    it is). `block_channels` has an entry a resolution, each halving the last; a pretrained one brings its own shape and
    scale. "backbone" are the features of `backbone`; what is trained is the decoder that shows them.
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
    def downsampling(self) -> int | None:
        """How many times smaller than the image the latents are; None of a pretrained one, which says so itself."""
        if self.kind == "backbone":
            return self.image_size // self.backbone.grid
        return None if self.pretrained else 2 ** (len(self.block_channels) - 1)

    @model_validator(mode="after")
    def _fits(self):
        if self.kind == "backbone":
            if self.image_size % self.backbone.grid:
                raise ValueError("`image_size` must be a multiple of `backbone.grid`")
        elif self.pretrained is None and self.image_size % self.downsampling:
            raise ValueError(
                f"`image_size` must be a multiple of {self.downsampling}, the downsampling of `block_channels`"
            )
        if self.pretrained is None and self.steps == 0:
            raise ValueError("`steps: 0` leaves a `pretrained` autoencoder as it is: name one, or train for some steps")
        if self.kind == "backbone" and self.pretrained is not None:
            raise ValueError("`pretrained` is an autoencoder, and `kind: backbone` has none: leave it null")
        if self.discriminator is not None and self.discriminator.start >= self.steps:
            raise ValueError("`discriminator.start` must be less than `steps`, or the discriminator never joins")
        return self


class TextEncoder(Section):
    """A CLIP text model of this size, fitted with its tokenizer to the captions and their images."""

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
    """A CLIP text model as it is; the subfolders are those of a Stable Diffusion pipeline."""

    kind: Literal["pretrained"]
    subfolder: str = "text_encoder"
    tokenizer_subfolder: str = "tokenizer"


class Encode(Section):
    """`max_windows` of the text encoder's length are read of a caption; 1 cuts it after the first, as CLIP does.

    `mirror`: training sees the images mirrored in these directions as well, where a mirrored product is a normal one.
    """

    batch_size: Positive = 32
    mirror: tuple[Literal["horizontal", "vertical"], ...] = ()
    max_windows: Annotated[int, Field(ge=1, le=8)] = 4
    text_encoder: Annotated[TextEncoder | PretrainedTextEncoder, Field(discriminator="kind")] = TextEncoder()
    seed: int = 0


class Train(Training):
    """The denoiser: what the UNet and the SGN start from, and how they are trained.

    `pretrained` is a pipeline in diffusers' layout: the UNet starts from its `unet`, the SGN from the same UNet's down
    and middle blocks, the noise schedule is its `scheduler`'s. Without it `block_channels`, `layers_per_block` and
    `head_size` shape an untrained UNet.

    `noise_levels` are the lowest and the highest that training draws, evenly from all between.
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
    noise_levels: tuple[NoiseLevel, NoiseLevel] = (250, 350)
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    steps: Positive = 420
    batch_size: Positive = 16
    learning_rate: PositiveFloat = 1e-3

    def hint_mistake(self, downsampling: int) -> str | None:
        """What is wrong with `hint_channels` for latents that are so many times smaller than the image."""
        if not self.sgn or 2 ** (len(self.hint_channels) - 1) == downsampling:
            return None
        return (
            f"train.hint_channels has {len(self.hint_channels)} entries: each but the first halves the photograph, "
            f"and the first stage makes it {downsampling} times smaller"
        )

    @model_validator(mode="after")
    def _frozen_part_is_trained(self):
        if self.trainable == "paper" and self.pretrained is None:
            raise ValueError("`trainable: paper` freezes the UNet's down and middle blocks: it needs `pretrained`")
        return self

    @field_validator("noise_levels")
    @classmethod
    def _levels_rise(cls, levels: tuple[int, int]) -> tuple[int, int]:
        if levels[0] > levels[1]:
            raise ValueError("the lowest comes first")
        return levels


class Pixels(Section):
    """The photograph itself, at the model's resolution: colours, averaged over windows of this many pixels a side."""

    kind: Literal["pixels"]
    window: Positive = 3
    weight: Annotated[float, Field(gt=0)] = 1.0

    @field_validator("window")
    @classmethod
    def _has_a_middle(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("must be odd, to have a pixel in its middle")
        return window


class Latents(Section):
    """What the first stage makes of it: the latents, in which the denoiser works, of photograph and reconstruction."""

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


class Detection(Section):
    """How a photograph becomes an anomaly map: saved with the model, and used wherever the model is."""

    noise_level: NoiseLevel = 300
    steps: Positive = 1
    spacing: Spacing = "trailing"
    solver: Solver = "ddim"
    samples: Positive = 4
    captions: Literal["none", "image", "class"] = "none"
    guidance: Annotated[float, Field(ge=0)] = 1.0
    features: Annotated[tuple[Features, ...], Field(min_length=1)] = (
        Pixels(kind="pixels"),
        Latents(kind="latents"),
    )
    deviation_floor: PositiveFloat | None = 0.5
    align_corners: bool = False
    smoothing: Annotated[float, Field(ge=0)] = 3.0
    image_score: Literal["max", "top_percent", "pooled_max"] = "max"
    false_alarm_rate: Fraction = 0.05
    seed: int = 0

    @model_validator(mode="after")
    def _steps_fit(self):
        if self.steps > max(self.noise_level, 1):
            raise ValueError(f"`steps` = {self.steps} are more than `noise_level` = {self.noise_level} has timesteps")
        return self


class Evaluate(Section):
    detection: Detection = Detection()
    batch_size: Positive = 32
    max_fpr: Annotated[float, Field(gt=0, le=1)] = 0.3
    examples: Annotated[int, Field(ge=0)] = 3


Metric = Literal["au_pro", "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max"]
Share = Annotated[float, Field(ge=0, le=1)]


class Floor(Section):
    """What a metric must reach: its mean over classes, and every class; None where that is not asked."""

    mean: Share | None = None
    every_class: Share | None = None


class Gate(Section):
    """Criteria of promotion: floors of any metric, what the comparison with the champion must show, limits."""

    floors: dict[Metric, Floor] = {"au_pro": Floor(mean=0.85, every_class=0.70)}
    metric: Metric = "au_pro"
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    max_class_drop: Share | None = 0.05
    max_latency_ms: PositiveFloat | None = None
    max_size_mb: PositiveFloat | None = None


class Monitor(Section):
    """When the photographs of today have drifted from those at calibration.

    `false_alarm_rate` is of a check as a whole; `last` are the newest photographs, those that are looked at.
    """

    false_alarm_rate: Fraction = 0.01
    min_images: Positive = 50
    last: Positive = 200
    defect_rate: Annotated[float, Field(ge=0, lt=1)] = 0.02


class Registry(Section):
    """The environment's MLFLOW_TRACKING_URI, where set, comes before `tracking_uri`."""

    model_name: Annotated[str, Field(pattern=r"^[^/:]+$")] = "vlmdiff"
    experiment: str = "vlmdiff"
    tracking_uri: str = "sqlite:///mlflow.db"


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
            raise ValueError(
                "evaluate.detection.deviation_floor is a floor of what only train.learn_variance learns: set it to null"
            )
        return self

    @model_validator(mode="after")
    def _levels_of_a_test_are_trained(self):
        detection = self.evaluate.detection
        lowest = round(detection.noise_level / detection.steps) if detection.spacing == "trailing" else 1
        trained = self.train.noise_levels
        if not trained[0] <= lowest <= detection.noise_level <= trained[1]:
            raise ValueError(
                f"evaluate.detection asks the denoiser at noise levels from {lowest} to {detection.noise_level}, and "
                f"train.noise_levels has it learn {trained[0]} to {trained[1]}: widen them"
            )
        return self


def load(path: Path | str = "params.yaml") -> Params:
    """Read and check a params file.

    Raises InputError where the file is missing, is not YAML, has an unknown key or a value out of range.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: run in the folder that holds it, or name it with --params") from None
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
    return f"{path} has {len(lines)} mistake(s):\n" + "\n".join(lines)

"""params.yaml as frozen, validated models: one section a stage, then the gate and the registry.

An unknown key or a bad value is an `InputError` that names the file and the key.
"""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmdiff.errors import InputError
from vlmdiff.workspace import DEMO

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Demo(Section):
    """The procedural factory: images a class, and the side of a photograph in pixels."""

    seed: int = 0
    train: Positive = 80
    test_good: Positive = 12
    test_per_defect: Positive = 6
    size: Annotated[int, Field(ge=64)] = 128


class Prepare(Section):
    """`root` is the dataset's folder; for the demo it is read by nobody (the demo goes to data/demo)."""

    layout: Literal["demo", "mvtec_ad", "folder"] = "demo"
    root: Path = Path("data/raw")
    validation_fraction: Fraction = 0.15
    test_fraction: Fraction = 0.2
    max_pixels: Positive = 100_000_000
    demo: Demo = Demo()

    @property
    def image_root(self) -> Path:
        """The folder that the manifest's paths are relative to."""
        return DEMO if self.layout == "demo" else self.root


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


class Training(Section):
    """What every training loop of ours has; rates fall by half a cosine after a linear warm-up."""

    steps: Positive
    batch_size: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    warmup_steps: Annotated[int, Field(ge=0)] = 50
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    validate_every: Positive = 100
    checkpoint_every: Positive = 100
    seed: int = 0


class FirstStage(Training):
    """An AutoencoderKL trained from scratch; `block_channels` has an entry a resolution, each halving the last."""

    kind: Literal["autoencoder_kl"] = "autoencoder_kl"
    image_size: Positive = 64
    latent_channels: Positive = 4
    block_channels: tuple[Positive, ...] = (16, 32, 64)
    kl_weight: Annotated[float, Field(ge=0)] = 1e-4
    steps: Positive = 800
    batch_size: Positive = 8
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3

    @model_validator(mode="after")
    def _grid_fits(self):
        factor = 2 ** (len(self.block_channels) - 1)
        if self.image_size % factor:
            raise ValueError(f"`image_size` must be a multiple of {factor}, the downsampling of `block_channels`")
        return self


class TextEncoder(Section):
    """A CLIP text model of this size, fitted with its tokenizer to the captions and their images."""

    vocabulary: Annotated[int, Field(ge=300)] = 1000
    max_tokens: Annotated[int, Field(ge=8, le=77)] = 77
    hidden_size: Positive = 64
    layers: Positive = 2
    heads: Positive = 4
    steps: Positive = 150
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class Encode(Section):
    """`max_windows` of the text encoder's length are read of a caption; 1 cuts it after the first, as CLIP does."""

    batch_size: Positive = 32
    max_windows: Annotated[int, Field(ge=1, le=8)] = 4
    text_encoder: TextEncoder = TextEncoder()
    seed: int = 0


class Train(Training):
    """The denoiser: channels of the UNet and of the SGN at each resolution, and how they are trained."""

    block_channels: tuple[Positive, ...] = (32, 64, 128)
    layers_per_block: Positive = 1
    head_size: Positive = 32
    hint_channels: tuple[Positive, ...] = (16, 32, 64)
    only_mid_control: bool = True
    prediction: Literal["epsilon", "v_prediction"] = "v_prediction"
    caption_dropout: Annotated[float, Field(ge=0, le=1)] = 0.1
    steps: Positive = 520
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3


class Pixels(Section):
    """The photograph itself, at the model's resolution."""

    kind: Literal["pixels"]
    weight: Annotated[float, Field(gt=0)] = 1.0


class AutoencoderFeatures(Section):
    """Activations of the first stage's encoder after the given resolution blocks (0 is the finest)."""

    kind: Literal["autoencoder"]
    layers: tuple[Annotated[int, Field(ge=0)], ...] = (1,)
    weight: Annotated[float, Field(gt=0)] = 1.0


class BackboneFeatures(Section):
    """Hidden states of any vision model of `transformers`, by hub name (pin `revision`) or path."""

    kind: Literal["transformers"]
    model: str
    revision: str | None = None
    image_size: Positive = 224
    layers: tuple[int, ...] = (-1,)
    weight: Annotated[float, Field(gt=0)] = 1.0


Features = Annotated[Pixels | AutoencoderFeatures | BackboneFeatures, Field(discriminator="kind")]


class Detection(Section):
    """How a photograph becomes an anomaly map: saved with the model, and used wherever the model is."""

    noise_level: Annotated[int, Field(ge=0, le=999)] = 500
    steps: Positive = 1
    samples: Positive = 4
    features: Annotated[tuple[Features, ...], Field(min_length=1)] = (Pixels(kind="pixels"),)
    smoothing: Annotated[float, Field(ge=0)] = 3.0
    false_alarm_rate: Fraction = 0.05
    seed: int = 0


class Evaluate(Section):
    detection: Detection = Detection()
    batch_size: Positive = 32
    max_fpr: Annotated[float, Field(gt=0, le=1)] = 0.3
    examples: Annotated[int, Field(ge=0)] = 3


class Gate(Section):
    """Criteria of promotion, on `metric`: the mean over classes, every class, and the gain over the champion."""

    metric: Literal["au_pro", "image_auroc", "image_ap", "image_f1_max", "pixel_auroc", "pixel_ap", "pixel_f1_max"] = (
        "au_pro"
    )
    min_mean: Annotated[float, Field(ge=0, le=1)] = 0.85
    min_class: Annotated[float, Field(ge=0, le=1)] = 0.70
    min_improvement: Annotated[float, Field(ge=-1, le=1)] = 0.001


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
    registry: Registry = Registry()


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

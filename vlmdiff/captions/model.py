"""Captions from a vision-language model of `transformers` on this machine."""

import copy
import hashlib
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature, LogitsProcessor

from vlmdiff.captions.prompts import NoCaption, caption_of, prompt_text, raise_for
from vlmdiff.core.errors import InputError
from vlmdiff.core.files import sha256
from vlmdiff.core.params import VisionLanguageModel
from vlmdiff.data.images import read_image


class FromModel:
    """Ask any image-text-to-text model, with its chat template or, without one (BLIP-2), with the bare prompt.

    The identity holds the weights (hub name and commit, or the files of a local folder), the prompt and the decoding.
    Precision, device and batch size are not part of it: they change a caption only by rounding. The model loads at the
    first caption, so a run that finds all captions stored does not load it. Code that comes with a model never runs.
    """

    def __init__(self, params: VisionLanguageModel, max_pixels: int):
        self.params = params
        self.max_pixels = max_pixels
        folder = Path(params.model)
        if folder.is_dir() == (params.revision is not None):
            raise InputError(
                f"caption.captioner.revision: {folder} is a local folder. Remove the revision."
                if folder.is_dir()
                else f"caption.captioner.revision: {params.model!r} is not a local folder. For a hub model, give the "
                "commit's hash: a branch may move to another model."
            )
        weights = {"files": _digest(folder)} if folder.is_dir() else {"model": folder.as_posix()}
        self.identity = {
            "captioner": "transformers",
            **weights,
            "revision": params.revision,
            "prompt": prompt_text(params.prompt),
            "decoding": {"temperature": params.temperature, "seed": params.seed} if params.temperature else "greedy",
        }

    def caption(self, items: Sequence[tuple[str, Path]]) -> Generator[dict[str, str | None]]:
        if not items:
            return
        self._load()
        problems: list[str] = []
        for start in range(0, len(items), self.params.batch_size):
            batch = items[start : start + self.params.batch_size]
            captions: dict[str, str | None] = {}
            for (image_id, file), (answer, complete) in zip(batch, self._answer(batch), strict=True):
                try:
                    captions[image_id] = caption_of(answer, complete)
                except NoCaption as error:
                    problems.append(f"{file}: {error}")
            yield captions
        raise_for(problems)

    def _load(self) -> None:
        params = self.params
        settings = {"revision": params.revision, "trust_remote_code": False}
        try:
            self.processor = AutoProcessor.from_pretrained(params.model, **settings)
            self.model, found = AutoModelForImageTextToText.from_pretrained(
                params.model,
                **settings,
                dtype=params.dtype,
                device_map=params.device_map,
                use_safetensors=True,
                output_loading_info=True,
            )
        except ImportError as error:
            raise InputError(
                f"caption.captioner: the model {params.model!r} needs a missing package ({error}). The extra `vlm` "
                "installs torchvision."
            ) from error
        except (OSError, ValueError) as error:
            raise InputError(f"caption.captioner: cannot load the model {params.model!r} ({error}).") from error
        if missing := sorted(found["missing_keys"]):
            raise InputError(
                f"caption.captioner: {params.model!r} lacks {len(missing)} of the model's tensors: {missing[0]} … "
                "Use a complete checkpoint."
            )
        self.model.eval()
        tokenizer = self.processor.tokenizer
        tokenizer.padding_side = "left"  # every answer begins where the prompts end
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Passed whole: BLIP-2 would use the configuration of its language model instead.
        self.generation = copy.deepcopy(self.model.generation_config)
        self.generation.update(
            max_new_tokens=params.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            num_beams=1,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        ends = self.generation.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends}
        # Answers shorter than the longest of the batch end in padding.
        self.ends |= {tokenizer.eos_token_id, tokenizer.pad_token_id}

    def _answer(self, batch: Sequence[tuple[str, Path]]) -> list[tuple[str, bool]]:
        """Return the text of each answer and whether the model ended it."""
        inputs = self._inputs([read_image(file, self.max_pixels) for _, file in batch])
        inputs = inputs.to(self.model.device, self.model.dtype)
        processors = []
        if self.params.temperature:
            seeds = [f"{self.params.seed} {image_id}" for image_id, _ in batch]
            processors.append(SeededSampling(self.params.temperature, seeds))
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, generation_config=self.generation, logits_processor=processors)
        prompt = inputs["input_ids"]
        # Decoder-only models repeat the prompt before the answer; encoder-decoders do not.
        if tokens.shape[1] > prompt.shape[1] and torch.equal(tokens[:, : prompt.shape[1]], prompt):
            tokens = tokens[:, prompt.shape[1] :]
        texts = self.processor.batch_decode(tokens, skip_special_tokens=True)
        return [(text, last in self.ends) for text, last in zip(texts, tokens[:, -1].tolist(), strict=True)]

    def _inputs(self, images: Sequence[Image.Image]) -> BatchFeature:
        """Return the model's inputs for the images and the prompt."""
        prompt = prompt_text(self.params.prompt)
        if self.processor.chat_template is None:
            texts = [prompt] * len(images)
            return self.processor(images=list(images), text=texts, padding=True, return_tensors="pt")
        return self.processor.apply_chat_template(
            [
                [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}]}]
                for image in images
            ],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )


class SeededSampling(LogitsProcessor):
    """Turn greedy decoding into sampling. Each row has its own seed, so a caption does not depend on its batch.

    The argmax of logits / temperature + Gumbel noise is a draw from the softmax (Gumbel, 1954).
    """

    def __init__(self, temperature: float, seeds: Sequence[str]):
        self.temperature = temperature
        digests = [hashlib.sha256(seed.encode()).digest() for seed in seeds]
        self.generators = [torch.Generator().manual_seed(int.from_bytes(digest[:7])) for digest in digests]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return scores (B, V) with noise, one row per seed."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -(-uniform.log()).log()
        return scores.double() / self.temperature + gumbel.to(scores.device)


def _digest(folder: Path) -> str:
    """Return the hex SHA-256 of the names and contents of a folder's files, without hidden ones."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name = file.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            digest.update(f"{name.as_posix()}\0{sha256(file)}\n".encode())
    return digest.hexdigest()

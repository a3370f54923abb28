"""Captions of any length reach the denoiser whole, and mean the same beside shorter and longer ones."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import CAPTIONS, SIZE, tiny_pipeline
from vlmdiff.core.params import Encode, TextEncoder, Train
from vlmdiff.model.normalization import Normalization
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.text import token_windows
from vlmdiff.training.diffusion import train_denoiser
from vlmdiff.training.encoded import Encoded, encode

LENGTH = 16  # of the tiny text encoder, 14 of them for a caption's tokens
ROOM = LENGTH - 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def pipeline() -> VLMDiffPipeline:
    pipeline = tiny_pipeline()
    pipeline.text_encoder.config.max_windows = 4
    return pipeline


def caption_of(windows: int) -> str:
    """A caption of so many windows, the last half full: a letter by itself is one token of any CLIP tokenizer."""
    return " ".join(LETTERS[i % len(LETTERS)] for i in range(windows * ROOM - ROOM // 2))


def contents(tokenizer, caption: str) -> list[int]:
    """A caption's own tokens, found by what the tokenizer puts around them."""
    tokens = tokenizer(caption).input_ids
    assert tokens[0] == tokenizer.bos_token_id and tokens[-1] == tokenizer.eos_token_id
    return tokens[1:-1]


@settings(deadline=None)
@given(st.lists(st.text() | st.lists(st.sampled_from(LETTERS), max_size=60).map(" ".join), min_size=1, max_size=4))
def test_windows_are_as_many_as_needed_and_their_tokens_are_the_captions(pipeline, captions):
    tokenizer = pipeline.tokenizer
    tokens, rows = token_windows(tokenizer, captions, LENGTH, 10**6)
    needed = [max(1, -(-len(contents(tokenizer, caption)) // ROOM)) for caption in captions]
    filled = [2 ** int(np.ceil(np.log2(n))) for n in needed]
    assert rows.shape == (len(captions), max(filled)) and tokens.shape == (sum(filled), LENGTH)
    empty = tokenizer("", padding="max_length", max_length=LENGTH).input_ids
    for row, n, own, caption in zip(rows.tolist(), needed, filled, captions, strict=True):
        assert row == row[:own] * (max(filled) // own)
        left = contents(tokenizer, caption)
        for window in tokens[row[:n]].tolist():
            part, left = left[:ROOM], left[ROOM:]
            whole = [tokenizer.bos_token_id, *part, tokenizer.eos_token_id]
            assert window == whole + [tokenizer.pad_token_id] * (LENGTH - len(whole))
        assert left == []
        assert all(tokens[r].tolist() == empty for r in row[n:own])


def test_short_captions_are_encoded_as_clip_does(pipeline):
    captions = [*CAPTIONS, ""]
    batch = pipeline.tokenizer(captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    assert all(len(contents(pipeline.tokenizer, caption)) <= ROOM for caption in captions)
    with torch.no_grad():
        theirs = pipeline.text_encoder(batch.input_ids).last_hidden_state
        torch.testing.assert_close(pipeline.encode_captions(captions), theirs, rtol=0, atol=0)


def test_a_caption_means_the_same_beside_longer_ones(pipeline):
    """The denoiser's output, alone and in batches whose longest caption has two and four windows."""
    captions = ["a red round thing", caption_of(2), caption_of(4)]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, SIZE // 4, SIZE // 4, generator=generator)
    hint = torch.randn(1, 3, SIZE, SIZE, generator=generator)
    with torch.no_grad():
        for block in (*pipeline.sgn.control.controlnet_down_blocks, pipeline.sgn.control.controlnet_mid_block):
            block.weight.normal_(0, 0.1, generator=generator)

        def denoise(prompt_embeds):
            return pipeline.denoise(latents, torch.tensor(400), prompt_embeds, hint)[0]

        alone = [pipeline.encode_captions([caption]) for caption in captions]
        assert len({embeds.shape[1] for embeds in alone}) == 3
        for group in ([0, 1], [0, 1, 2], [0, 2]):
            together = pipeline.encode_captions([captions[i] for i in group])
            for row, i in enumerate(group):
                torch.testing.assert_close(denoise(together[row][None]), denoise(alone[i]), rtol=1e-4, atol=1e-5)
        assert (denoise(alone[0]) - denoise(alone[1])).abs().max() > 1e-3


def test_the_end_of_a_long_caption_is_read(pipeline):
    """Reference defect 9: what stands after 77 tokens is lost."""
    texts = [f"{caption_of(3)} {word}" for word in ("red", "blue")]
    one, two = pipeline.encode_captions(texts)
    assert not torch.allclose(one, two)


def test_what_is_not_read_is_said(pipeline, capsys):
    texts = [caption_of(3), "a red thing", "a blue thing"]
    whole, _ = token_windows(pipeline.tokenizer, texts, LENGTH, 4)
    assert capsys.readouterr().out == ""
    tokens, rows = token_windows(pipeline.tokenizer, texts, LENGTH, 1)
    assert "warning: 1 caption is cut, of 3: longer than 1 x 14 tokens" in capsys.readouterr().out
    assert rows.tolist() == [[0], [1], [2]] and torch.equal(tokens[0], whole[0])
    # One window cuts as the reference does.
    theirs = pipeline.tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    assert torch.equal(tokens, theirs.input_ids)


def test_a_saved_pipeline_reads_as_much(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    captions = [caption_of(2), "a red thing"]
    loaded = VLMDiffPipeline.from_pretrained(tmp_path).encode_captions(captions)
    assert loaded.shape[1] == 2 * LENGTH
    torch.testing.assert_close(loaded, pipeline.encode_captions(captions), rtol=0, atol=0)


def encoded(pipeline, folder, captions, max_windows=4, images=None, steps=1) -> Encoded:
    """Six images with these captions, encoded with a text encoder of their own."""
    ids = [str(i) for i in range(6)]
    frame = pd.DataFrame({"image_id": ids, "split": ["train"] * 4 + ["validation"] * 2})
    if images is None:
        images = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    folder.mkdir()
    np.save(folder / "hints.npy", images)
    small = TextEncoder(vocabulary=300, max_tokens=LENGTH, hidden_size=16, layers=1, heads=2, steps=steps)
    params = Encode(text_encoder=small, max_windows=max_windows, batch_size=4)
    by_image = dict(zip(ids, captions, strict=True))
    encode(frame, images, by_image, pipeline.vae, Normalization(), params, folder, torch.device("cpu"))
    return Encoded.open(folder)


def test_the_text_encoder_learns_from_the_end_of_a_long_caption_too(pipeline, tmp_path, capsys):
    # They differ in their last word alone, which stands in the second window: so do dark and bright.
    captions = [f"{caption_of(1)} {' '.join('abcdefgh')} {last}" for last in ("x", "y") * 3]
    images = np.stack([np.full((SIZE, SIZE, 3), 20 + 200 * (i % 2), np.uint8) for i in range(6)])
    encoded(pipeline, tmp_path / "encoded", captions, images=images, steps=100)
    first, last = map(
        float, re.search(r"contrastive loss (.*) at first, (.*) at last", capsys.readouterr().out).groups()
    )
    assert first > math.log(4) - 0.2
    # Two share a caption: no less than the logarithm of two is possible.
    assert last < math.log(2) + 0.1


def test_training_reads_what_the_saved_text_encoder_says_of_a_caption(pipeline, tmp_path):
    captions = ["a red thing", caption_of(3), caption_of(2), "a blue thing", "a red thing", caption_of(3)]
    data = encoded(pipeline, tmp_path / "encoded", captions)
    load = VLMDiffPipeline.from_pretrained
    pipeline.save_pretrained(tmp_path / "pipeline")
    again = load(
        tmp_path / "pipeline",
        tokenizer=type(pipeline.tokenizer).from_pretrained(tmp_path / "encoded/tokenizer"),
        text_encoder=type(pipeline.text_encoder).from_pretrained(tmp_path / "encoded/text_encoder"),
    )
    with torch.no_grad():
        theirs = again.encode_captions(captions)
        torch.testing.assert_close(data.prompt_embeds(data.index["caption"].to_numpy()), theirs)
        torch.testing.assert_close(data.prompt_embeds(np.array([0])), again.encode_captions(["", caption_of(3)])[:1])


def test_cut_captions_are_counted_in_encode(pipeline, tmp_path, capsys):
    captions = ["a red thing", caption_of(4), caption_of(3), "a blue thing", "green", "white"]
    encoded(pipeline, tmp_path / "encoded", captions, max_windows=1)
    assert "warning: 2 captions are cut, of 7: longer than 1 x 14 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(("dropout", "same"), [(1.0, True), (0.5, False), (0.0, False)])
def test_dropped_captions_teach_nothing(tmp_path, dropout, same):
    """Reference defect 8: no caption dropout, though the empty prompt is what is used to detect."""
    weights = []
    data = encoded(tiny_pipeline(), tmp_path / "encoded", [*CAPTIONS, *CAPTIONS])
    for rows in ([1, 2, 3, 1, 2, 3], [3, 1, 2, 3, 1, 2]):
        pipeline = tiny_pipeline(prediction="epsilon")
        settings = Train(
            caption_dropout=dropout, steps=2, batch_size=4, warmup_steps=0, block_channels=(32, 32), ema_decay=0.0
        )
        shuffled = Encoded(**{**vars(data), "index": data.index.assign(caption=rows)})
        state = tmp_path / str(rows)
        state.mkdir()
        train_denoiser(pipeline, shuffled, settings, state)
        weights.append(torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()]))
    assert torch.equal(*weights) == same

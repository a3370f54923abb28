"""Checkpoints of the reference: every tensor to its place, and what is no such checkpoint refused by name."""

import functools
import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers.loaders import single_file_utils as oracle
from safetensors.torch import save_file
from torch import nn

from vlmdiff.core.errors import InputError
from vlmdiff.model.pipeline import VLMDiffPipeline
from vlmdiff.model.reference import IGNORED, PREFIXES, empty_modules, places

KEYS = Path(__file__).parents[2].parent / "shared" / "reference" / "keys.json"
TEXT = PREFIXES["text_encoder"]


@functools.cache
def shapes() -> dict[str, list[int]]:
    return {name: list(place.shape) for name, place in places(empty_modules(True, False)).items()}


def text_shapes() -> dict[str, list[int]]:
    """The text encoder of a published checkpoint: CLIP ViT-L/14."""
    layer = {f"self_attn.{name}_proj": (768, 768) for name in "qkv"} | {"self_attn.out_proj": (768, 768)}
    layer |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072), "layer_norm1": (768,), "layer_norm2": (768,)}
    modules = {f"encoder.layers.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    modules["final_layer_norm"] = (768,)
    found = {"embeddings.token_embedding.weight": (49408, 768), "embeddings.position_embedding.weight": (77, 768)}
    for name, shape in modules.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {TEXT + name: list(shape) for name, shape in found.items()}


def numbered(named_shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Tensors of one value each, its own, that take no memory."""
    return {name: torch.tensor(float(i)).expand(*shape) for i, (name, shape) in enumerate(named_shapes.items())}


def values(module: nn.Module | dict[str, torch.Tensor]) -> dict[str, float]:
    state = module if isinstance(module, dict) else module.state_dict()
    return {name: tensor[(0,) * tensor.ndim].item() for name, tensor in state.items()}


@pytest.mark.skipif(not KEYS.is_file(), reason=f"the names of the reference's tensors are not in {KEYS}")
def test_names_and_shapes_are_those_of_the_references_checkpoints():
    assert shapes() == json.loads(KEYS.read_text())


def test_unet_control_and_autoencoder_get_the_tensors_that_diffusers_gives_them():
    state = numbered(shapes())
    pipeline = VLMDiffPipeline.from_reference(state)

    unet = oracle.convert_ldm_unet_checkpoint(dict(state), {"layers_per_block": 2})
    assert values(pipeline.unet) == values(unet)
    vae = oracle.convert_ldm_vae_checkpoint(dict(state), {"down_block_types": [0] * 4, "up_block_types": [0] * 4})
    assert values(pipeline.vae) == values(vae)
    fusion = {name: state[name] for name in state if re.match(r"control_model\.down\d\d", name)}
    control = {name: state[name] for name in state.keys() - fusion.keys()}
    control = oracle.convert_controlnet_checkpoint(control, {"layers_per_block": 2})
    assert values(pipeline.sgn.control) == values(control)
    assert len(values(pipeline.sgn)) == len(values(control)) + len(fusion)


@pytest.mark.parametrize(("source", "target"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_the_fusion_gets_the_convolution_from_that_source_to_that_target(source, target):
    state = numbered(shapes())
    pipeline = VLMDiffPipeline.from_reference(state)
    convolution = pipeline.sgn.fusion.downsamplers[target - 1][source - 1][0]
    assert torch.equal(convolution.weight, state[f"control_model.down{source}{target}.0.weight"])


def test_a_published_checkpoint_brings_its_text_encoder_and_a_schedule_that_is_ignored():
    state = numbered(shapes() | text_shapes()) | {name: torch.zeros(1000) for name in IGNORED}
    pipeline = VLMDiffPipeline.from_reference({"state_dict": state, "epoch": 3})
    expected = {name.removeprefix(TEXT): tensor for name, tensor in state.items() if name.startswith(TEXT)}
    del expected["embeddings.position_ids"]
    found = {name.removeprefix("text_model."): value for name, value in values(pipeline.text_encoder).items()}
    assert found == values(expected)
    for module in (pipeline.unet, pipeline.sgn, pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    (positions,) = pipeline.text_encoder.buffers()
    assert positions.tolist() == [list(range(77))]
    with pytest.raises(InputError, match="text_encoder"):
        VLMDiffPipeline.from_reference(state, text_encoder=pipeline.text_encoder)


@pytest.mark.parametrize("only_mid_control", [True, False])
def test_settings_are_the_references(only_mid_control):
    pipeline = VLMDiffPipeline.from_reference(numbered(shapes()), only_mid_control)
    assert pipeline.sgn.config.only_mid_control is only_mid_control
    assert pipeline.config.image_size == 256
    # ImageNet's mean grey is zero, and its standard deviation one.
    grey = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    assert pipeline.normalize(grey.expand(1, 3, 256, 256)).abs().max() < 1e-6
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(pipeline.scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=0)
    assert pipeline.scheduler.config.prediction_type == "epsilon" and pipeline.vae.config.scaling_factor == 0.18215


@pytest.mark.parametrize(
    "name",
    [
        "control_model.down23.0.weight",
        "control_model.zero_convs.11.0.bias",
        "model.diffusion_model.output_blocks.5.2.conv.weight",
        "first_stage_model.decoder.mid.attn_1.proj_out.weight",
    ],
)
def test_a_missing_or_misshapen_tensor_is_named(name):
    state = numbered(shapes())
    shape = state[name].shape
    state[name] = torch.zeros(1, *shape)
    with pytest.raises(InputError, match=re.escape(f"{name} has shape {(1, *shape)} instead of {tuple(shape)}")):
        VLMDiffPipeline.from_reference(state)
    del state[name]
    with pytest.raises(InputError, match=re.escape(f"{name} is missing")):
        VLMDiffPipeline.from_reference(state)


def test_an_unexpected_tensor_is_named_and_so_is_half_a_text_encoder():
    extra = {"control_model.input_blocks.12.0.weight": torch.zeros(1)}
    with pytest.raises(InputError, match=r"control_model\.input_blocks\.12\.0\.weight is unexpected"):
        VLMDiffPipeline.from_reference(numbered(shapes()) | extra)
    half = dict(list(text_shapes().items())[:10])
    with pytest.raises(InputError, match=r"cond_stage_model\.transformer\.text_model\..* is missing"):
        VLMDiffPipeline.from_reference(numbered(shapes() | half))


def test_another_models_checkpoint_is_refused_with_some_of_the_names_and_their_number():
    with pytest.raises(InputError) as error:
        VLMDiffPipeline.from_reference({"layer.weight": torch.zeros(2, 2)})
    assert "is missing" in str(error.value) and f"{len(shapes()) + 1 - 8} more" in str(error.value)


class Payload:
    """What a pickle can do: run a command when it is read."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_a_checkpoint_that_would_run_code_is_refused_and_does_not_run_it(tmp_path):
    torch.save({"state_dict": {}, "callbacks": Payload(tmp_path / "ran")}, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match=r"last\.ckpt contains more than tensors"):
        VLMDiffPipeline.from_reference(tmp_path / "last.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("cut", [0, 10, 200])
def test_a_file_that_is_no_checkpoint_or_not_a_whole_one_is_named(tmp_path, name, cut):
    file = tmp_path / name
    with pytest.raises(InputError, match=f"{name} does not exist"):
        VLMDiffPipeline.from_reference(file)
    tensors = {"weight": torch.zeros(100)}
    torch.save(tensors, file) if name == "a.ckpt" else save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(InputError, match=name):
        VLMDiffPipeline.from_reference(file)


@pytest.mark.parametrize("content", [[torch.zeros(1)], {"state_dict": {"epoch": 1}}, {"epoch": 1}])
def test_what_is_not_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=r"a\.pt is not a state dict"):
        VLMDiffPipeline.from_reference(tmp_path / "a.pt")


def sparse_checkpoint(file: Path) -> None:
    """A checkpoint of full size whose tensors are a hole in the file: zeros that take no space."""
    if file.suffix == ".ckpt":
        state = {name: torch.empty(*shape) for name, shape in shapes().items()}
        with torch.serialization.skip_data():
            torch.save({"state_dict": state, "global_step": 1}, file)
        return
    header, end = {}, 0
    for name, shape in shapes().items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(head)) + head)
        stream.truncate(stream.tell() + end)


PEAK = """
import resource, sys
from vlmdiff.model.pipeline import VLMDiffPipeline
pipeline = VLMDiffPipeline.from_reference(sys.argv[1])
# What is mapped counts once it has been read.
zero = sum(p.sum().item() for m in (pipeline.unet, pipeline.sgn, pipeline.vae) for p in m.parameters())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, zero)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_loading_takes_at_most_one_and_a_half_times_the_weights(tmp_path, name, record_property):
    sparse_checkpoint(tmp_path / name)
    weights = sum(4 * math.prod(shape) for shape in shapes().values()) / 1024
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / name)], capture_output=True, text=True, check=True
    )
    peak, zero = map(float, done.stdout.split())
    record_property(f"peak memory, {name}", f"{peak / 2**20:.2f} GiB for {weights / 2**20:.2f} GiB of weights")
    assert zero == 0
    assert weights < peak < 1.5 * weights

"""LoRAs of images: each network by hand, their sum, in a call, from a file, and by the calls of older scripts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffsynth.pipelines.qwen_image import QwenImageUnit_Image2LoRADecode, QwenImageUnit_Image2LoRAEncode
from PIL import Image
from safetensors.torch import save_file
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

import parity
from diffsynth.core.data.image import cover
from diffsynth.core.lora import merge_lora, save_lora
from diffsynth.core.vram import Policy
from diffsynth.core.vram.managed import managed
from diffsynth.errors import InvalidPipeline, MissingComponent
from diffsynth.models.dinov3 import Dinov3ImageEncoder
from diffsynth.models.image_config import TINY_DINOV3, TINY_SIGLIP
from diffsynth.models.siglip import SiglipImageEncoder
from diffsynth.runtime.image_to_lora import embed_images, mean_lora
from diffsynth_qwen_image import QwenImageImageToLoRAPipeline, QwenImagePipeline, image_to_lora, image_to_lora_config
from diffsynth_qwen_image.features.edit import SYSTEM_MESSAGE
from diffsynth_qwen_image.features.image_to_lora import NETWORKS, UNITS
from diffsynth_qwen_image.prompts import ANSWER, text_before
from qwen_image_oracles import SIZE, OracleProcessor, tiny_pipelines

CALL = {**SIZE, "negative_prompt": "b", "num_inference_steps": 2, "seed": 0, "output_type": "tensor"}
IMAGES = [Image.effect_noise((40, 30), 90).convert("RGB"), Image.linear_gradient("L").resize((24, 32)).convert("RGB")]
KINDS = ("style", "coarse", "fine")
FINE_SIDE, FINE_LENGTH = 280, 10 * 10 + 7


@pytest.fixture(scope="module", autouse=True)
def small_fine_images():
    """The fine network sees images at 280 pixels here; the rows' tests have the published 1024."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_to_lora_config.RESIDUAL_SIDES, "fine", FINE_SIDE)
        patch.setitem(image_to_lora_config.RESIDUAL_LENGTHS, "fine", FINE_LENGTH)
        yield


def networks(*kinds: str) -> dict[str, torch.nn.Module]:
    """Return the image encoders and networks with random weights; the LoRA is for the tiny transformer."""
    parts = {
        "siglip2_image_encoder": SiglipImageEncoder(TINY_SIGLIP),
        "dinov3_image_encoder": Dinov3ImageEncoder(TINY_DINOV3),
    }
    for kind in kinds:
        tiny = getattr(image_to_lora_config, f"TINY_{kind.upper()}")
        groups = tuple(
            tuple((name, 4 * inputs, 4 * outputs) for name, inputs, outputs in group) for group in tiny.groups
        )
        config = replace(
            tiny,
            stacks=(("", "transformer_blocks", 2),),
            groups=groups,
            residual_length=image_to_lora_config.RESIDUAL_LENGTHS[kind],
            residual_dim=32,
        )
        parts[f"image2lora_{kind}"] = getattr(image_to_lora, f"{kind.title()}ToLoRA")(config)
    for seed, module in enumerate(parts.values()):
        module.load_state_dict(parity.draw_weights(parity.shapes_of(module), seed=seed))
        module.requires_grad_(False)
    return parts


def image_processor() -> Qwen2VLImageProcessorPil:
    """Return an image processor with the limits of the published one."""
    return Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 16384)


@pytest.fixture(scope="module")
def tiny():
    made, parts = tiny_pipelines()
    made.tokenizer.add_tokens(["assistant"], special_tokens=True)  # one token, as with the published tokenizer
    return {**made.components, "processor": image_processor()}, parts


@pytest.fixture(scope="module")
def pipe(tiny) -> QwenImagePipeline:
    return pipeline({**tiny[0], **networks(*KINDS)})


@pytest.fixture(scope="module")
def lora(pipe):
    return QwenImageImageToLoRAPipeline.from_pipeline(pipe)(image2lora_images=IMAGES)


def pipeline(components) -> QwenImagePipeline:
    return QwenImagePipeline.from_components(device="cpu", torch_dtype=torch.float32, **components)


def product(lora, name):
    return lora[f"{name}.lora_B.weight"] @ lora[f"{name}.lora_A.weight"]


@torch.no_grad()
def test_the_lora_by_hand(pipe, lora, tiny):
    """transformers' Qwen2.5-VL reads each image as in a prompt for editing without text; the last states without the 64
    before the image enter the coarse and the fine network. The LoRA is the sum of the networks and the mean of images.
    """
    processor, encoder = OracleProcessor(pipe.tokenizer), tiny[1]["text_encoder"]
    processor.image_processor = image_processor()
    text = f"{text_before(SYSTEM_MESSAGE)}<|vision_start|><|image_pad|><|vision_end|>{ANSWER}"
    dropped = len(pipe.tokenizer(text_before(SYSTEM_MESSAGE))["input_ids"])
    embeddings, _ = embed_images(
        pipe.siglip2_image_encoder,
        pipe.dinov3_image_encoder,
        image2lora_images=IMAGES,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    changes = []
    for image, embedding in zip(IMAGES, embeddings, strict=True):
        changes.append(pipe.image2lora_style(embedding))
        for kind, side, length in (("coarse", 224, 71), ("fine", FINE_SIDE, FINE_LENGTH)):
            inputs = processor(text=[text], images=[cover(image, side, side)], padding=True, return_tensors="pt")
            types = (inputs["input_ids"] == encoder.config.image_token_id).int()  # else positions are those of a text
            output = encoder(**inputs, mm_token_type_ids=types, output_hidden_states=True)
            states = output.hidden_states[-1][0, dropped:]
            assert len(states) == length
            changes.append(pipe.components[f"image2lora_{kind}"](embedding, states))
    assert len(lora) == 2 * 12 * 2
    for name in changes[0]:
        mean = sum(up @ down for down, up in (each[name] for each in changes)) / 2
        assert parity.relative_error(product(lora, name), mean) < 1e-4
        assert len(lora[f"{name}.lora_A.weight"]) == 4 * 3 * 2


def test_the_lora_is_the_sum_of_those_of_the_networks(pipe, lora, tiny):
    parts = networks(*KINDS)
    alone = []
    for kind in KINDS:
        some = {role: part for role, part in parts.items() if role not in NETWORKS or role == f"image2lora_{kind}"}
        maker = QwenImageImageToLoRAPipeline.from_pipeline(pipeline({**tiny[0], **some}))
        alone.append(maker(image2lora_images=IMAGES))
    merged = merge_lora(alone)
    assert all(parity.relative_error(product(merged, name), product(lora, name)) < 1e-5 for name in names_of(lora))


def names_of(lora) -> set[str]:
    return {key.removesuffix(".lora_A.weight") for key in lora if key.endswith(".lora_A.weight")}


def test_a_golden_of_the_lora(lora):
    """The sum of squares of all changes by kind of layer. Weights and images are drawn from seeds, the encoders and the
    networks are held to others by hand, so this changes only if one of them changes.
    """
    found = {"attn.to_q": 0.0, "img_mlp.net.2": 0.0, "txt_mod.1": 0.0}
    for name in names_of(lora):
        for kind in found:
            found[kind] += float(product(lora, name).square().sum()) if name.endswith(kind) else 0.0
    assert found == pytest.approx(GOLDEN, rel=1e-3)


GOLDEN = {"attn.to_q": 226252.258, "img_mlp.net.2": 564626.421, "txt_mod.1": 814621.578}


def test_in_a_call_and_from_a_file_it_gives_the_same_bits(pipe, lora, tmp_path):
    got = pipe("a", **CALL, image2lora_images=IMAGES)
    save_file(lora, tmp_path / "plain.safetensors")
    save_lora(lora, tmp_path / "saved.safetensors")
    for each in (lora, tmp_path / "plain.safetensors", tmp_path / "saved.safetensors"):
        assert torch.equal(pipe("a", **CALL, positive_only_lora=each), got)
    assert float((got - pipe("a", **CALL)).abs().max()) > 1e-3


def test_loaded_from_memory_or_from_a_file_it_gives_the_same_bits(pipe, lora, tmp_path):
    """Beside a second LoRA, as the published one for the bias of coarse and fine LoRAs."""
    bias = {key: tensor / 8 for key, tensor in lora.items()}
    save_lora(merge_lora([lora, bias]), tmp_path / "both.safetensors")
    plain = pipe("a", **CALL)
    pipe.load_lora(pipe.dit, tmp_path / "both.safetensors", hotload=True)
    got = pipe("a", **CALL)
    pipe.clear_lora()
    pipe.load_lora(pipe.dit, state_dict=merge_lora([lora, bias]), hotload=True)
    assert torch.equal(pipe("a", **CALL), got)
    pipe.clear_lora()
    assert torch.equal(pipe("a", **CALL), plain)
    assert not torch.equal(got, plain)


def test_the_calls_of_older_scripts(pipe, lora):
    with torch.no_grad():
        embs = QwenImageUnit_Image2LoRAEncode().process(pipe, image2lora_images=IMAGES)
        found = QwenImageUnit_Image2LoRADecode().process(pipe, **embs)["lora"]
    assert found.keys() == lora.keys()
    assert all(torch.equal(found[key], lora[key]) for key in lora)


def test_under_a_policy_it_changes_no_bit(tiny, lora):
    components = {role: tiny[0][role] for role in ("tokenizer", "processor")}
    components["text_encoder"] = type(tiny[0]["text_encoder"])(tiny[0]["text_encoder"].config).eval()
    components["text_encoder"].load_state_dict(tiny[0]["text_encoder"].state_dict())
    components["text_encoder"].requires_grad_(False)
    options = {"device": "cpu", "torch_dtype": torch.float32, "policy": Policy.preset("cpu-offload", "cpu")}
    maker = QwenImageImageToLoRAPipeline({**components, **networks(*KINDS)}, **options)
    assert all(managed(part) is not None for part in maker.parts.values() if isinstance(part, torch.nn.Module))
    found = maker(image2lora_images=IMAGES)
    assert all(torch.equal(found[key], lora[key]) for key in lora)


def test_gradients_reach_every_network(tiny):
    """The networks are trained through the LoRAs that they make."""
    parts = networks(*KINDS)
    trained = [part for role, part in parts.items() if role in NETWORKS]
    maker = QwenImageImageToLoRAPipeline.from_pipeline(pipeline({**tiny[0], **parts}))
    for part in trained:
        part.requires_grad_(True)
    values = maker.run_units((*UNITS[:2], embed_images, *UNITS[2:]), {"image2lora_images": IMAGES[:1]})
    made = mean_lora(values["image2lora_changes"], 1)
    sum((layer.up @ layer.down).square().sum() for layer in made.layers.values()).backward()
    for part in trained:
        assert all(float(parameter.grad.abs().sum()) > 0 for parameter in part.parameters())


def test_what_is_refused(tiny, pipe):
    maker = QwenImageImageToLoRAPipeline.from_pipeline(pipe)
    with pytest.raises(ValueError, match="image2lora_images=None: expected an image"):
        maker()
    with pytest.raises(ValueError, match="image2lora_images"):
        maker(image2lora_images=[])
    with pytest.raises(MissingComponent, match="needs siglip2_image_encoder and dinov3_image_encoder and image2"):
        pipeline(tiny[0])("a", **CALL, image2lora_images=IMAGES)
    alone = QwenImagePipeline.from_components(device="cpu", torch_dtype=torch.float32, **networks("style"))
    with pytest.raises(MissingComponent, match="needs text_encoder and tokenizer"):
        alone("a", **CALL)
    coarse = networks("coarse")
    without = {**tiny[0], **coarse, "processor": None}
    with pytest.raises(MissingComponent, match="needs processor, through which the images also reach"):
        pipeline(without)("a", **CALL, image2lora_images=IMAGES)
    with pytest.raises(MissingComponent, match="or load image2lora_style alone"):
        QwenImageImageToLoRAPipeline.from_pipeline(pipeline(without))(image2lora_images=IMAGES)
    other = Dinov3ImageEncoder(replace(TINY_DINOV3, hidden_size=128, num_layers=1, intermediate_size=16))
    with pytest.raises(InvalidPipeline, match="have 272 channels together, and image2lora_coarse takes 400"):
        pipeline({**tiny[0], **coarse, "dinov3_image_encoder": other})("a", **CALL, image2lora_images=IMAGES)
    small = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    with pytest.raises(ValueError, match="has 23 tokens with this tokenizer and processor, and the coarse network is"):
        QwenImageImageToLoRAPipeline.from_pipeline(pipeline({**tiny[0], **coarse, "processor": small}))(
            image2lora_images=IMAGES
        )


def test_a_plan_counts_every_network(pipe):
    plan = QwenImageImageToLoRAPipeline.from_pipeline(pipe).plan(
        device="cuda", vram_limit=1, image2lora_images=IMAGES[0]
    )
    names = [stage.name for stage in plan.stages]
    assert names.index("encode_coarse") < names.index("embed_images")
    used = {part.role for stage in plan.stages for part in stage.components}
    assert used == {"text_encoder", "siglip2_image_encoder", "dinov3_image_encoder", *NETWORKS}

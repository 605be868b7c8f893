"""FLUX.1's architectures and the published files that hold them."""

from __future__ import annotations

from diffsynth.spec import ArchitectureSpec, CheckpointSpec, LoRASpelling

DIT = "flux_dit"
CONTROLNET = "flux_controlnet"
CLIP = "clip_text_encoder"
T5 = "t5_text_encoder"
REDUX_EMBEDDER = "flux_redux_embedder"
IP_ADAPTER = "flux_ip_adapter"

LORA_TARGETS = (
    "img_attn.qkv",
    "img_attn.proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_attn.qkv",
    "txt_attn.proj",
    "txt_mlp.0",
    "txt_mlp.2",
    "linear1",
    "linear2",
)

# `diffusers` and `peft` wrap the network of diffusers; ai-toolkit and OneTrainer train it. The code of kohya, fal and
# Black Forest Labs has the original network, whose names are ours.
LORA_SPELLINGS = (
    LoRASpelling(name="ai-toolkit", layout=f"{DIT}/diffusers", prefix="transformer."),
    LoRASpelling(name="bfl"),
    LoRASpelling(name="diffusers", layout=f"{DIT}/diffusers", prefix="transformer."),
    LoRASpelling(name="fal", prefix="base_model.model."),
    LoRASpelling.kohya("lora_transformer_", name="onetrainer", layout=f"{DIT}/diffusers"),
    LoRASpelling(name="peft", layout=f"{DIT}/diffusers", prefix="base_model.model."),
    LoRASpelling(
        name="xlabs", layout=f"{DIT}/xlabs_lora", down="down.weight", up="up.weight", layers=("*.processor.*_lora*",)
    ),
)


def _text_spellings(diffusers: str, comfyui: str, *, kohya: str, onetrainer: str) -> tuple[LoRASpelling, ...]:
    return (
        LoRASpelling(
            name="comfyui",
            prefix=f"text_encoders.{comfyui}.transformer.",
            down="lora_down.weight",
            up="lora_up.weight",
            alpha="alpha",
        ),
        LoRASpelling(name="diffusers", prefix=f"{diffusers}."),
        LoRASpelling.kohya(kohya),
        LoRASpelling.kohya(onetrainer, name="onetrainer"),
    )


ARCHITECTURES = (
    ArchitectureSpec(
        name=DIT,
        module="diffsynth_flux.flux1.dit:FluxDiT",
        config="diffsynth_flux.flux1.config:FluxDiTConfig",
        infer_config="diffsynth_flux.flux1.config:infer_dit_config",
        required=(
            "img_in.weight",
            "txt_in.weight",
            "time_in.in_layer.weight",
            "vector_in.in_layer.weight",
            "double_blocks.{n}.img_attn.qkv.weight",
            "double_blocks.{n}.img_attn.norm.query_norm.scale",
            "double_blocks.{n}.img_mlp.0.weight",
            "double_blocks.{n}.txt_attn.qkv.weight",
            "double_blocks.{n}.txt_mod.lin.weight",
            "single_blocks.{n}.linear1.weight",
            "single_blocks.{n}.modulation.lin.weight",
            "final_layer.linear.weight",
            "final_layer.adaLN_modulation.1.weight",
        ),
        tiny="diffsynth_flux.flux1.config:TINY_DIT",
        tiny_inputs="diffsynth_flux.flux1.tiny:tiny_dit_inputs",
        high_precision=("time_in.*", "vector_in.*", "guidance_in.*", "*norm*"),
        repeated_blocks=("double_blocks", "single_blocks"),
        lora_targets=LORA_TARGETS,
        lora_spellings=LORA_SPELLINGS,
        widened_by_loras=("img_in",),
    ),
    ArchitectureSpec(
        name=CONTROLNET,
        module="diffsynth_flux.flux1.controlnet:FluxControlNet",
        config="diffsynth_flux.flux1.config:FluxControlNetConfig",
        infer_config="diffsynth_flux.flux1.config:infer_controlnet_config",
        required=(
            "img_in.weight",
            "txt_in.weight",
            "time_in.in_layer.weight",
            "vector_in.in_layer.weight",
            "controlnet_x_embedder.weight",
            "controlnet_blocks.{n}.weight",
            "double_blocks.{n}.img_attn.qkv.weight",
            "double_blocks.{n}.img_attn.norm.query_norm.scale",
            "double_blocks.{n}.img_mlp.0.weight",
        ),
        tiny="diffsynth_flux.flux1.config:TINY_CONTROLNET",
        tiny_inputs="diffsynth_flux.flux1.tiny:tiny_controlnet_inputs",
        high_precision=("time_in.*", "vector_in.*", "guidance_in.*", "*norm*"),
        repeated_blocks=("double_blocks", "single_blocks"),
        lora_targets=LORA_TARGETS,
    ),
    ArchitectureSpec(
        name=CLIP,
        module="diffsynth_flux.flux1.text_encoders:ClipTextEncoder",
        config="diffsynth_flux.flux1.config:ClipTextEncoderConfig",
        infer_config="diffsynth_flux.flux1.config:infer_clip_config",
        required=(
            "text_model.embeddings.token_embedding.weight",
            "text_model.embeddings.position_embedding.weight",
            "text_model.encoder.layers.{n}.self_attn.q_proj.weight",
            "text_model.encoder.layers.{n}.mlp.fc1.weight",
            "text_model.final_layer_norm.weight",
        ),
        tiny="diffsynth_flux.flux1.config:TINY_CLIP",
        tiny_inputs="diffsynth_flux.flux1.tiny:tiny_text_inputs",
        high_precision=("*norm*",),
        repeated_blocks=("text_model.encoder.layers",),
        lora_spellings=_text_spellings("text_encoder", "clip_l", kohya="lora_te1_", onetrainer="lora_te1_"),
    ),
    ArchitectureSpec(
        name=T5,
        module="diffsynth_flux.flux1.text_encoders:T5TextEncoder",
        config="diffsynth_flux.flux1.config:T5TextEncoderConfig",
        infer_config="diffsynth_flux.flux1.config:infer_t5_config",
        required=(
            "shared.weight",
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "encoder.block.{n}.layer.0.SelfAttention.q.weight",
            "encoder.block.{n}.layer.1.DenseReluDense.wi_0.weight",
            "encoder.block.{n}.layer.1.DenseReluDense.wo.weight",
            "encoder.final_layer_norm.weight",
        ),
        tiny="diffsynth_flux.flux1.config:TINY_T5",
        tiny_inputs="diffsynth_flux.flux1.tiny:tiny_text_inputs",
        # transformers casts the input of `wo` to the dtype of its weight.
        high_precision=("*norm*", "*.wo.weight"),
        repeated_blocks=("encoder.block",),
        # kohya calls T5 the third text encoder, as in Stable Diffusion 3.
        lora_spellings=_text_spellings("text_encoder_2", "t5xxl", kohya="lora_te3_", onetrainer="lora_te2_"),
    ),
    ArchitectureSpec(
        name=REDUX_EMBEDDER,
        module="diffsynth_flux.flux1.image_encoders:ReduxEmbedder",
        config="diffsynth_flux.flux1.config:ReduxEmbedderConfig",
        infer_config="diffsynth_flux.flux1.config:infer_redux_embedder_config",
        required=("redux_up.weight", "redux_down.weight"),
        tiny="diffsynth_flux.flux1.config:TINY_REDUX_EMBEDDER",
        tiny_inputs="diffsynth_flux.flux1.tiny:tiny_redux_inputs",
    ),
    ArchitectureSpec(
        name=IP_ADAPTER,
        module="diffsynth_flux.flux1.ip_adapter:FluxIPAdapter",
        config="diffsynth_flux.flux1.config:IPAdapterConfig",
        infer_config="diffsynth_flux.flux1.config:infer_ip_adapter_config",
        required=(
            "image_proj.proj.0.weight",
            "image_proj.proj.2.weight",
            "image_proj.norm.weight",
            "ip_adapter.{n}.to_k_ip.weight",
            "ip_adapter.{n}.to_v_ip.weight",
        ),
        tiny="diffsynth_flux.flux1.config:TINY_IP_ADAPTER",
        tiny_inputs="diffsynth_flux.flux1.tiny:tiny_ip_adapter_inputs",
        high_precision=("*norm*",),
        repeated_blocks=("ip_adapter",),
        lora_targets=("to_k_ip", "to_v_ip"),
    ),
)

_DIT_CONFIG, _CONTROLNET_CONFIG = (ARCHITECTURES[number].config for number in (0, 1))
_NETWORK = (
    "img_in.weight",
    "txt_in.weight",
    "time_in.in_layer.weight",
    "vector_in.in_layer.weight",
    "double_blocks.{n}.img_attn.qkv.weight",
    "double_blocks.{n}.img_attn.norm.query_norm.scale",
    "double_blocks.{n}.img_mlp.0.weight",
    "single_blocks.{n}.linear1.weight",
    "final_layer.linear.weight",
)


def _named(name: str, description: str, *required: str, config: str = "", infer_config: str = "") -> ArchitectureSpec:
    return ArchitectureSpec(
        name=name,
        module="",
        config=config,
        infer_config=f"diffsynth_flux.flux1.config:{infer_config}" if infer_config else "",
        required=required,
        tiny="",
        tiny_inputs="",
        not_runnable=description,
    )


# Files that users have and that this version only names. A plugin that declares a runnable architecture for the same
# layout takes its place.
NAMED = (
    _named(
        "flex2_dit",
        "the transformer of Flex.2-preview, which takes an image to inpaint, its mask and a control image at once",
        *_NETWORK,
        "guidance_in.in_layer.weight",
        config=_DIT_CONFIG,
        infer_config="infer_flex2_config",
    ),
    _named(
        "step1x_dit",
        "the transformer of Step1X-Edit with its connector to Qwen2.5-VL",
        *_NETWORK,
        "connector.scale_factor",
        "connector.global_proj_out.weight",
        config=_DIT_CONFIG,
        infer_config="infer_dit_config",
    ),
    _named(
        "nexus_gen_decoder",
        "the decoder of Nexus-Gen, a transformer with an adapter from the embeddings of its language model",
        "pipe.dit.x_embedder.weight",
        "pipe.dit.blocks.{n}.attn.a_to_qkv.weight",
        "pipe.dit.single_blocks.{n}.to_qkv_mlp.weight",
        "adapter.0.weight",
    ),
    _named(
        "nexus_gen_llm",
        "the language model of Nexus-Gen",
        "visual.patch_embed.proj.weight",
        "model.embed_tokens.weight",
        "model.layers.{n}.self_attn.q_proj.weight",
        "lm_head.weight",
        "vision_head.weight",
        "image_prefill_embeds.weight",
    ),
    _named(
        "infiniteyou_controlnet",
        "the ControlNet of InfiniteYou, which reads the embedding of a face in place of the text",
        "controlnet_x_embedder.weight",
        "controlnet_blocks.{n}.weight",
        *_NETWORK[:7],
        config=_CONTROLNET_CONFIG,
        infer_config="infer_controlnet_config",
    ),
    _named(
        "infiniteyou_image_projector",
        "the projection of InfiniteYou from the embedding of a face to text tokens",
        "image_proj.latents",
        "image_proj.proj_in.weight",
        "image_proj.proj_out.weight",
        "image_proj.layers.{n}.0.to_kv.weight",
        "image_proj.layers.{n}.1.3.weight",
    ),
    _named(
        "flux_value_controller",
        "an attribute of AttriCtrl, which turns a number into text tokens",
        "positional_embedding",
        "prefer_value_embedder.0.weight",
        "prefer_value_embedder.2.weight",
    ),
    _named(
        "flux_lora_encoder",
        "the LoRA encoder of FLUX.1, which turns a LoRA into text tokens",
        "special_embeds",
        "encoders.{n}.attn.to_q.weight",
        "final_linear.weight",
        "final_layer_norm.weight",
        "embedder.model_dict.blocks___{n}___attn___a_to_qkv.x",
        "embedder.model_dict.single_blocks___{n}___proj_out.x",
    ),
    _named(
        "flux_lora_patcher",
        "the weights of LoRAFusion, which merge several LoRAs",
        "model_dict.blocks___{n}___attn___a_to_qkv.weight_lora",
        "model_dict.single_blocks___{n}___proj_out.weight_lora",
    ),
)

_NAMED_FILES = {
    "flex2_dit": ("d02f41c13549fa5093d3521f62a5570a", "ostris/Flex.2-preview:Flex.2-preview.safetensors"),
    "step1x_dit": ("d30fb9e02b1dbf4e509142f05cf7dd50", "stepfun-ai/Step1X-Edit:step1x-edit-i1258.safetensors"),
    "nexus_gen_decoder": ("3e6c61b0f9471135fc9c6d6a98e98b6d", "DiffSynth-Studio/Nexus-GenV2:generation_decoder.bin"),
    "nexus_gen_llm": ("2bd19e845116e4f875a0a048e27fc219", "DiffSynth-Studio/Nexus-GenV2:model*.safetensors"),
    "infiniteyou_controlnet": (
        "7f9583eb8ba86642abb9a21a4b2c9e16",
        "ByteDance/InfiniteYou:infu_flux_v1.0/aes_stage2/InfuseNetModel/*.safetensors",
    ),
    "infiniteyou_image_projector": (
        "c07c0f04f5ff55e86b4e937c7a40d481",
        "ByteDance/InfiniteYou:infu_flux_v1.0/aes_stage2/image_proj_model.bin",
    ),
    "flux_value_controller": (
        "0629116fce1472503a66992f96f3eb1a",
        "DiffSynth-Studio/AttriCtrl-FLUX.1-Dev:models/brightness.safetensors",
    ),
    "flux_lora_encoder": (
        "77c2e4dd2440269eb33bfaa0d004f6ab",
        "DiffSynth-Studio/LoRA-Encoder-FLUX.1-Dev:model.safetensors",
    ),
    "flux_lora_patcher": (
        "30143afb2dea73d1ac580e0787628f8c",
        "DiffSynth-Studio/LoRAFusion-preview-FLUX.1-dev:model.safetensors",
    ),
}
"""Name of a network that is only named -> the signature of its published file, and the file."""

_DEV = "black-forest-labs/FLUX.1-dev"
_SCHNELL = "black-forest-labs/FLUX.1-schnell"

# The layouts of schnell, Fill, and Depth and Canny are made from that of FLUX.1-dev and the published configs; their
# signatures were not compared with the files.
CHECKPOINTS = (
    CheckpointSpec(
        name=DIT,
        architecture=DIT,
        signature="a29710fea6dddb0314663ee823598e50",
        layout="diffsynth_flux:layouts/flux1_dev.json.gz",
        files=(
            f"{_DEV}:flux1-dev.safetensors",
            "black-forest-labs/FLUX.1-Krea-dev:flux1-krea-dev.safetensors",
            "black-forest-labs/FLUX.1-Kontext-dev:flux1-kontext-dev.safetensors",
        ),
        file_stem="flux1",
    ),
    CheckpointSpec(
        name=f"{DIT}/schnell",
        architecture=DIT,
        signature="57b02550baab820169365b3ee3afa2c9",
        layout="diffsynth_flux:layouts/flux1_schnell.json.gz",
        files=(f"{_SCHNELL}:flux1-schnell.safetensors",),
        file_stem="flux1",
    ),
    CheckpointSpec(
        name=f"{DIT}/fill",
        architecture=DIT,
        signature="f876d2a6fb247fb7da0f84fc7fb8a823",
        layout="diffsynth_flux:layouts/flux1_fill.json.gz",
        files=("black-forest-labs/FLUX.1-Fill-dev:flux1-fill-dev.safetensors",),
        file_stem="flux1",
    ),
    CheckpointSpec(
        name=f"{DIT}/control",
        architecture=DIT,
        signature="80b22e2aff86d8ca58a6d1d96e5a9c67",
        layout="diffsynth_flux:layouts/flux1_control.json.gz",
        files=(
            "black-forest-labs/FLUX.1-Depth-dev:flux1-depth-dev.safetensors",
            "black-forest-labs/FLUX.1-Canny-dev:flux1-canny-dev.safetensors",
        ),
        file_stem="flux1",
    ),
    CheckpointSpec(
        name=f"{DIT}/diffusers",
        architecture=DIT,
        rules="diffsynth_flux.flux1.convert:DIFFUSERS",
        signature="605c56eab23e9e2af863ad8f0813a25d",
        layout="diffsynth_flux:layouts/flux1_dev_diffusers.json.gz",
        files=(f"{_DEV}:transformer/*.safetensors",),
        file_stem="diffusion_pytorch_model",
    ),
    CheckpointSpec(
        name=f"{DIT}/diffsynth_studio",
        architecture=DIT,
        rules="diffsynth_flux.flux1.convert:DIFFSYNTH_STUDIO",
    ),
    CheckpointSpec(
        name=f"{DIT}/xlabs_lora",
        architecture=DIT,
        rules="diffsynth_flux.flux1.convert:XLABS_LORA",
        layout="diffsynth_flux:layouts/flux1_xlabs_lora.json.gz",
        loras_only=True,
    ),
    CheckpointSpec(
        name=f"{DIT}/nexus_gen",
        architecture=DIT,
        rules="diffsynth_flux.flux1.convert:NEXUS_GEN",
    ),
    CheckpointSpec(
        name=CONTROLNET,
        architecture=CONTROLNET,
        rules="diffsynth_flux.flux1.convert:CONTROLNET",
        signature="78d18b9101345ff695f312e7e62538c0",
        layout="diffsynth_flux:layouts/controlnet_union_alpha.json.gz",
        files=(
            "InstantX/FLUX.1-dev-Controlnet-Union-alpha:diffusion_pytorch_model.safetensors",
            "Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro:diffusion_pytorch_model.safetensors",
        ),
    ),
    CheckpointSpec(
        name=f"{CONTROLNET}/inpainting",
        architecture=CONTROLNET,
        rules="diffsynth_flux.flux1.convert:CONTROLNET",
        signature="52357cb26250681367488a8954c271e8",
        layout="diffsynth_flux:layouts/controlnet_inpainting_beta.json.gz",
        files=(
            "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Beta:diffusion_pytorch_model.safetensors",
            "alimama-creative/FLUX.1-dev-Controlnet-Inpainting-Alpha:diffusion_pytorch_model.safetensors",
        ),
    ),
    CheckpointSpec(
        name=f"{CONTROLNET}/depth",
        architecture=CONTROLNET,
        rules="diffsynth_flux.flux1.convert:CONTROLNET",
        signature="43ad5aaa27dd4ee01b832ed16773fa52",
        layout="diffsynth_flux:layouts/controlnet_depth.json.gz",
        files=("Shakker-Labs/FLUX.1-dev-ControlNet-Depth:diffusion_pytorch_model.safetensors",),
    ),
    CheckpointSpec(
        name=f"{CONTROLNET}/upscaler",
        architecture=CONTROLNET,
        rules="diffsynth_flux.flux1.convert:CONTROLNET",
        files=("jasperai/Flux.1-dev-Controlnet-Upscaler:diffusion_pytorch_model.safetensors",),
    ),
    CheckpointSpec(
        name=CLIP,
        architecture=CLIP,
        rules="diffsynth_flux.flux1.convert:CLIP",
        signature="94eefa3dac9cec93cb1ebaf1747d7b78",
        layout="diffsynth_flux:layouts/clip_l.json.gz",
        files=(
            f"{_DEV}:text_encoder/model.safetensors",
            f"{_SCHNELL}:text_encoder/model.safetensors",
            "black-forest-labs/FLUX.1-Fill-dev:text_encoder/model.safetensors",
        ),
    ),
    CheckpointSpec(
        name=f"{CLIP}/without_prefix",
        architecture=CLIP,
        rules="diffsynth_flux.flux1.convert:CLIP_WITHOUT_PREFIX",
    ),
    CheckpointSpec(
        name=T5,
        architecture=T5,
        rules="diffsynth_flux.flux1.convert:T5",
        signature="22540b49eaedbc2f2784b2091a234c7c",
        layout="diffsynth_flux:layouts/t5_xxl.json.gz",
        files=(
            f"{_DEV}:text_encoder_2/*.safetensors",
            f"{_SCHNELL}:text_encoder_2/*.safetensors",
            "black-forest-labs/FLUX.1-Fill-dev:text_encoder_2/*.safetensors",
        ),
    ),
    CheckpointSpec(
        name=f"{T5}/without_shared",
        architecture=T5,
        rules="diffsynth_flux.flux1.convert:T5_WITHOUT_SHARED",
    ),
    CheckpointSpec(
        name=IP_ADAPTER,
        architecture=IP_ADAPTER,
        signature="4daaa66cc656a8fe369908693dad0a35",
        layout="diffsynth_flux:layouts/ip_adapter.json.gz",
        files=("InstantX/FLUX.1-dev-IP-Adapter:ip-adapter.bin",),
    ),
    CheckpointSpec(
        name=REDUX_EMBEDDER,
        architecture=REDUX_EMBEDDER,
        signature="d8ea4618391460bc831fddaae5fb5288",
        layout="diffsynth_flux:layouts/redux_image_embedder.json.gz",
        files=("black-forest-labs/FLUX.1-Redux-dev:image_embedder/diffusion_pytorch_model.safetensors",),
    ),
    *(
        CheckpointSpec(
            name=name,
            architecture=name,
            # By structure it is a ControlNet like any other of its size.
            rules="diffsynth_flux.flux1.convert:CONTROLNET" if name == "infiniteyou_controlnet" else "",
            signature=signature,
            files=(source,),
        )
        for name, (signature, source) in _NAMED_FILES.items()
    ),
)

"""Error messages for files that are not recognised: what the file is, the nearest layout, what to do."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from diffsynth import _discovery
from diffsynth.cli.group import program
from diffsynth.core.loader import files
from diffsynth.core.loader.checkpoint import read_config, read_files
from diffsynth.core.loader.config import ModelConfig
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.lora_keys import lora_keys, lora_share
from diffsynth.core.loader.recognize import recognize
from diffsynth.errors import CorruptFile, NoFiles, Unrecognized

ARCHITECTURES, CHECKPOINTS = _discovery.catalog().layouts()
LAYOUTS = Path(__file__).parents[2] / "data" / "layouts"


def layout(name):
    facts = json.loads(gzip.decompress((LAYOUTS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, shape in facts["tensors"].items()}


def explained(shapes):
    with pytest.raises(Unrecognized) as caught:
        recognize(Header({key: TensorInfo("BF16", shape) for key, shape in shapes.items()}), ARCHITECTURES, CHECKPOINTS)
    return str(caught.value)


# LoRA

Z_IMAGE = layout("Z-Image-Turbo--z_image_dit")
LINEARS = {
    key.removesuffix(".weight"): shape
    for key, shape in Z_IMAGE.items()
    if key.startswith("layers.") and key.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight"))
}

SPELLINGS = {
    "peft": "base_model.model.{}.lora_{A,B}.weight",
    "diffusers": "transformer.{}.lora_{A,B}.weight",
    "bare": "{}.lora_{A,B}.weight",
    "named adapter": "{}.lora_{A,B}.default.weight",
    "of a pipeline": "pipe.dit.{}.lora_{A,B}.default.weight",
    "comfy": "diffusion_model.{}.lora_{A,B}.weight",
    "old diffusers": "transformer.{}.lora.{down,up}.weight",
    "kohya": "lora_unet_[].lora_{down,up}.weight",
    "kohya transformer": "lora_transformer_[].lora_{down,up}.weight",
}  # fmt: skip


def lora(spelling, modules, rank=4):
    """Return the down and up matrices of each module; the key pattern has their two names in braces."""
    start, parts, end = re.fullmatch(r"(.*[._])\{(\w+,\w+)\}(.*)", spelling).groups()
    made = {}
    for module, (outputs, inputs) in modules.items():
        name = start.replace("{}", module).replace("[]", module.replace(".", "_"))
        for part, shape in zip(parts.split(","), ((rank, inputs), (outputs, rank)), strict=True):
            made[f"{name}{part}{end}"] = shape
        if "[]" in spelling:
            made[f"{name.rpartition('.')[0]}.alpha"] = ()
    return made


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_lora_and_its_base(spelling):
    said = explained(lora(spelling, LINEARS))
    assert "is a LoRA for Z-Image-Turbo or Z-Image (z_image_dit), not a model checkpoint" in said
    assert f"it changes {len(LINEARS)} modules" in said


def test_a_lora_with_the_names_of_another_layout():
    fused = {f"layers.{n}.attention.qkv": (3 * 3840, 3840) for n in range(30)}
    assert "is a LoRA for" in (said := explained(lora(SPELLINGS["comfy"], fused)))
    assert "z_image_dit" in said


def test_a_lora_of_a_text_encoder():
    modules = {f"model.layers.{n}.self_attn.{part}_proj": (4096, 2560) for n in range(36) for part in "qk"}
    said = explained(lora("lora_te1_[].lora_{down,up}.weight", modules))
    assert "a LoRA for" in said
    assert "qwen3_text_encoder" in said


def test_a_lora_for_another_size():
    small = dict.fromkeys(LINEARS, (768, 768))
    said = explained(lora(SPELLINGS["diffusers"], small))
    assert "is a LoRA for another size of z_image_dit, not a model checkpoint" in said


def test_a_lora_for_what_is_not_installed():
    modules = {f"no_such_blocks.{n}.attn.to_q": (64, 64) for n in range(3)}
    said = explained(lora(SPELLINGS["diffusers"], modules))
    assert "for none of the installed architectures: it changes 3 modules, like 'transformer.no_such_blocks.0" in said


TO_Q = "layers.0.attention.to_q"
PAIR = {f"{TO_Q}.lora_A.weight": (4, 3840), f"{TO_Q}.lora_B.weight": (3840, 4)}
OTHERS = {
    "LoKr": {
        f"lycoris_{TO_Q.replace('.', '_')}.lokr_w1": (4, 4),
        f"lycoris_{TO_Q.replace('.', '_')}.lokr_w2": (960, 960),
    },
    "LoHa": {f"{TO_Q}.hada_w{n}_{side}": (3840, 4) if side == "a" else (4, 3840) for n in (1, 2) for side in "ab"},
    "DoRA": {**PAIR, f"{TO_Q}.dora_scale": (3840, 1)},
    "difference": {f"{TO_Q}.diff": (3840, 3840)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters(kind):
    """Changes that can only be fused are not sent to be "added"."""
    said = explained(OTHERS[kind])
    assert "a LoRA for Z-Image" in said
    assert f"Load that model, then fuse the {kind} into it: load_lora with hotload=False" in said


REFUSED = {
    "half a pair": (
        dict(list(PAIR.items())[:1]),
        "load_lora refuses it: it has the down matrix of layers.0.attention.t",
    ),
    "half a LoKr": ({f"{TO_Q}.lokr_w1": (4, 4)}, r"load_lora refuses it: the LoKr of layers.0.attention.to_q lacks"),
    "unknown key": ({**PAIR, "surprise": (1,)}, "load_lora refuses it: surprise: no part of a LoRA.* adds the rest"),
    "another layer": (
        PAIR | {key.replace(".0.", ".99.", 1): shape for key, shape in PAIR.items()},
        "load_lora refuses it: 1 of its 2 changes do not fit that model: layers.99.attention.to_q.* adds the rest",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_load_lora_refuses_is_said(name):
    shapes, message = REFUSED[name]
    said = explained(shapes)
    assert re.search(message, said)
    assert "is a LoRA" in said
    assert "add the LoRA to it" not in said


def test_the_parts_of_two_components():
    text = {f"model.layers.{n}.self_attn.q_proj": (4096, 2560) for n in range(36)}
    keys = lora(SPELLINGS["kohya"], LINEARS) | lora("lora_te1_[].lora_{down,up}.weight", text)
    said = explained(keys)
    assert "(z_image_dit) and " in said
    assert "(qwen3_text_encoder), not a model checkpoint" in said
    assert "Load that model, then add the LoRA to it." in said


def test_a_lora_of_100000_layers_is_refused_by_its_number():
    keys = {f"layers.{n}.attention.to_q.lora_{side}.weight": (4, 3840) for n in range(100_000) for side in "AB"}
    said = explained(keys)
    assert "is a LoRA, not a model checkpoint, and changes more than 20,000 modules, which no network has" in said


def test_alphas_alone_make_no_lora():
    for shapes in ({"a.alpha": (), "b.alpha": ()}, Z_IMAGE):
        assert not lora_share(shapes, lora_keys(shapes))


# Other things that people point at


def test_an_optimizer_state(tmp_path):
    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    with pytest.raises(Unrecognized, match="optimizer.pt is an optimizer state, not a model checkpoint"):
        recognize(read_files([tmp_path / "optimizer.pt"]), ARCHITECTURES, CHECKPOINTS)


@pytest.mark.parametrize(
    ("suffix", "name"),
    [("weight_scale_2", "NVFP4"), ("qweight", "GPTQ or AWQ"), ("absmax", "bitsandbytes"), ("wcscales", "SVDQuant")],
)
def test_packed_formats(suffix, name):
    assert f"is quantised with {name}" in explained(Z_IMAGE | {f"layers.0.attention.to_q.{suffix}": (3,)})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF\x03\x00\x00\x00\x01", "is a GGUF file.*convert it with the gguf package"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9973693184\n",
         "Git-LFS pointer, not the weights of 9,973,693,184 bytes. Run: git lfs pull"),
        (b"\n<!doctype html><html>Access denied", "is a web page"),
        (b'{"architectures": ["X"]}', "is JSON, not weights"),
        (b"\x80\x02}q\x00.padding", "is a torch pickle, not safetensors. Name it .pth or .bin"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x01", "compressed with gzip"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
    ],
)  # fmt: skip
def test_other_files(tmp_path, content, message):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CorruptFile, match=message):
        read_files([tmp_path / "x.safetensors"])


# What is nearest


def test_a_part_of_a_layout_is_none_of_another():
    """A text encoder without its vision tower shares more of its keys with a smaller text encoder's file."""
    whole = layout("Qwen-Image--qwen_image_text_encoder")
    said = explained({key: shape for key, shape in whole.items() if "visual" not in key})
    assert "nearest is qwen2.5_vl_text_encoder" in said
    assert "it is refused because it lacks visual." in said


def test_the_nearest_is_named_with_its_first_differences():
    shapes = {key: shape for key, shape in layout("FLUX.2-dev--flux2_vae").items() if not key.startswith("bn.")}
    said = explained(shapes | {"encoder.conv_in.weight": (128, 4, 3, 3)})
    assert "nearest is flux2_autoencoder, which shares 248 of its 251 keys; it is refused because it lacks bn." in said
    assert "Differences: 3 missing (bn.running_mean, bn.running_var and 1 more)" in said
    assert "encoder.conv_in.weight is (128, 4, 3, 3), expected (128, 3, 3, 3)" in said


def test_the_nearest_under_a_prefix():
    half = dict(list(Z_IMAGE.items())[:200])
    said = explained({f"module.model.diffusion_model.{key}": shape for key, shape in half.items()})
    assert "nearest is z_image_dit, which shares 200 of its 521 keys under 'module.model.diffusion_model.'" in said


def test_nothing_is_near():
    assert "no installed architecture has keys like 'a.b' and 'c.d'. It has 2 tensors." in explained(
        {"a.b": (1,), "c.d": (2,)}
    )


# Folders


@pytest.fixture
def put(tmp_path):
    def write(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".json"):
                (tmp_path / name).write_text("{}")
            elif name.endswith(".safetensors"):
                save_file({name: torch.ones(1)}, tmp_path / name)
            else:
                torch.save({name: torch.ones(1)}, tmp_path / name)
        return tmp_path

    return write


def test_an_empty_folder(tmp_path):
    with pytest.raises(NoFiles, match=r"holds no \.safetensors or .* weights\. In .*: nothing\."):
        files.checkpoint_at(tmp_path)


def test_a_folder_whose_folders_hold_weights(put):
    with pytest.raises(NoFiles, match="These folders in it do: transformer, vae. Name one."):
        files.checkpoint_at(put("transformer/a.safetensors", "vae/b.safetensors", "config.json"))


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors",),
        ("model.safetensors", "pytorch_model.bin"),
        ("model.safetensors", "optimizer.bin", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "state.pt"),
        ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"),
        ("model.pth", "config.json"),
    ],
)
def test_a_folder_with_one_checkpoint(put, names):
    folder = put(*names)
    found = files.checkpoint_at(folder)
    expected = [name for name in names if name.startswith("m") and not name.endswith("json")]
    assert [file.name for file in found] == expected
    assert read_files([folder]).files == tuple(found)
    assert read_config(ModelConfig(folder)).files == tuple(found)
    assert files.checkpoint_at(found[-1]) == found


def test_state_dict_is_a_name_for_weights(put):
    assert [file.name for file in files.checkpoint_at(put("state_dict.pth", "state.pt"))] == ["state_dict.pth"]


def test_a_folder_with_two_candidates(put):
    folder = put("a.safetensors", "b-00001-of-00002.safetensors", "b-00002-of-00002.safetensors")
    for look in (
        files.checkpoint_at,
        lambda path: read_files([path]),
        lambda path: read_config(ModelConfig(path)),
    ):
        with pytest.raises(
            NoFiles, match=r"holds 2 checkpoints: a\.safetensors; b-00001-of-00002\.safetensors and its shards"
        ):
            look(folder)


def test_shards_that_only_an_index_joins(put):
    folder = put("x.safetensors", "y.safetensors")
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}))
    assert (
        files.checkpoint_at(folder)
        == files.checkpoint_at(index)
        == [folder / "x.safetensors", folder / "y.safetensors"]
    )
    (folder / "y.safetensors").unlink()
    for path in (folder, index, folder / "x.safetensors"):
        with pytest.raises(NoFiles, match="y.safetensors"):
            files.checkpoint_at(path)


def test_an_index_that_leads_out_of_its_folder(put):
    folder = put("inside/x.safetensors", "outside.safetensors")
    index = folder / "inside" / "m.safetensors.index.json"
    outside = ["../outside.safetensors", str(folder / "outside.safetensors")]
    index.write_text(json.dumps({"weight_map": dict(enumerate(outside))}))
    with pytest.raises(CorruptFile, match="m.safetensors.index.json is not an index"):
        files.checkpoint_at(index)


# The command


def run(*arguments):
    return CliRunner().invoke(program, ["recognize", *map(str, arguments)])


def test_exit_codes(put, tmp_path):
    folder = put("a/lora.safetensors", "b/x.safetensors", "b/y.safetensors")
    matrices = {"lora_A": torch.ones(4, 3840), "lora_B": torch.ones(3840, 4)}
    named = {f"layers.0.attention.to_q.{part}.weight": value for part, value in matrices.items()}
    save_file(named, folder / "a" / "lora.safetensors")
    unknown = run(folder / "a")
    assert (unknown.exit_code, unknown.stdout) == (3, "")
    assert "is a LoRA for Z-Image" in unknown.stderr
    two = run(folder / "b")
    assert two.exit_code == 2
    assert "holds 2 checkpoints" in two.stderr
    (tmp_path / "page.safetensors").write_bytes(b"<html>")
    assert run(tmp_path / "page.safetensors").exit_code == 2


def test_missing_shards_by_number(put):
    folder = put("m-00001-of-00003.safetensors")
    result = run(folder)
    assert result.exit_code == 2
    assert "2 shards are missing" in result.stderr
    assert "m-00002-of-00003.safetensors, m-00003-of-00003.safetensors" in result.stderr


def test_unused_keys_of_a_recognised_file_are_named(tmp_path, toy_vae):
    save_file(toy_vae | {"surprise": torch.ones(1)}, tmp_path / "vae.safetensors")
    result = run(tmp_path / "vae.safetensors")
    assert result.exit_code == 0
    assert "flux_autoencoder" in result.stdout
    assert "1 key that nothing uses: surprise" in result.stderr
    (answer,) = json.loads(run("--json", tmp_path / "vae.safetensors").stdout)
    assert answer["components"][0]["extra"] == ["surprise"]


@pytest.fixture
def toy_vae():
    from diffsynth.models.config import TINY_FLUX_AUTOENCODER
    from diffsynth.models.flux_autoencoder import FluxAutoencoder

    return dict(FluxAutoencoder(TINY_FLUX_AUTOENCODER).state_dict())

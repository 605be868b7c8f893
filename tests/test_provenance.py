import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from diffsynth import provenance
from diffsynth.core.data.media_writer import save_audio
from diffsynth.errors import CorruptFile, NoFiles
from image_pipeline import catalog, image_pipeline, use
from label_pipeline import label_pipeline
from parameters_reader import read_parameters


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    use(monkeypatch, catalog())
    weights = tmp_path / "dit.safetensors"
    weights.write_bytes(b"weights")
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text("{}")
    return image_pipeline(dit=[weights], adapter=[tokenizer])


def test_a_record_has_what_it_takes_to_draw_again(pipe):
    arguments = {"prompt": "äpple 苹果", "seed": 7, "height": 32, "width": 32, "cfg_scale": 2.0}
    made_by = provenance.record(pipe, arguments)
    assert (made_by["model"], made_by["pipeline"]) == ("toy-1", "image_pipeline:ImagePipeline")
    assert (made_by["prompt"], made_by["seed"], made_by["num_inference_steps"]) == ("äpple 苹果", 7, 4)
    # The model's default height is 16, the class's width 32.
    assert (made_by["cfg_scale"], made_by["solver"]) == (2.0, "euler")
    assert made_by["arguments"] == {"height": 32}
    assert (made_by["device"], made_by["dtype"]) == ("cpu", "float32")
    assert made_by["versions"]["diffsynth-toy"] == "1.2"
    assert {"torch", "diffsynth-core"} <= set(made_by["versions"])
    assert json.loads(json.dumps(made_by)) == made_by


def test_a_pipeline_without_a_prompt_has_none_in_its_record(monkeypatch):
    use(monkeypatch, catalog(pipeline="label_pipeline:LabelPipeline"))
    made_by = provenance.record(label_pipeline(), {"label": 3, "seed": 7})
    assert "prompt" not in made_by
    assert (made_by["seed"], made_by["num_inference_steps"], made_by["arguments"]) == (7, 4, {"label": 3})


def test_weights_are_told_by_their_content(pipe, tmp_path):
    first = provenance.record(pipe, {"prompt": ""})["weights"]
    assert set(first["dit"]) == {"dit.safetensors"}
    assert set(first["adapter"]) == {"vocab.json"}
    (tmp_path / "dit.safetensors").write_bytes(b"other weights")
    assert provenance.record(pipe, {"prompt": ""})["weights"]["dit"] != first["dit"]


def test_what_json_cannot_hold_is_named(pipe):
    made_by = provenance.record(pipe, {"prompt": "", "input_image": Image.new("L", (8, 8)), "on_step": print})
    assert made_by["not_recorded"] == ["input_image"]  # on_step only watches
    assert made_by["arguments"] == {}


def test_png_and_back(pipe, tmp_path):
    path = tmp_path / "out.png"
    image = Image.new("RGB", (8, 8), "red")
    made_by = provenance.record(pipe, {"prompt": 'äpple "苹果"\n', "seed": 1})
    provenance.save_png(image, path, made_by)
    assert provenance.read_png(path) == made_by
    assert Image.open(path).tobytes() == image.tobytes()
    assert [file.name for file in tmp_path.glob("*.part")] == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.png"
    provenance.save_png(Image.new("L", (8, 8)), path, {"seed": 1})
    with pytest.raises(TypeError):
        provenance.save_png(Image.new("L", (8, 8)), path, {"seed": object()})
    assert provenance.read_png(path) == {"seed": 1}


def test_files_without_a_record(tmp_path):
    plain, text = tmp_path / "plain.png", tmp_path / "text.png"
    Image.new("L", (8, 8)).save(plain)
    text.write_text("hello")
    with pytest.raises(ValueError, match="plain.png has no 'diffsynth' text"):
        provenance.read_png(plain)
    with pytest.raises(ValueError, match="text.png is not a PNG file"):
        provenance.read_png(text)


def test_a_record_is_read_by_the_suffix(tmp_path):
    made_by, image = {"prompt": 'äpple "苹果"\n', "seed": 1}, Image.new("RGB", (16, 16))
    provenance.save_png(image, tmp_path / "a.PNG", made_by)
    provenance.save_video([image], tmp_path / "a.mkv", made_by, fps=8)
    provenance.save_audio(torch.zeros(1, 8), 8000, tmp_path / "a.wav", made_by)
    provenance.save_tensors({"x": torch.zeros(2)}, tmp_path / "a.safetensors", made_by)
    for name in ("a.PNG", "a.mkv", "a.wav", "a.safetensors"):
        assert provenance.read(tmp_path / name) == made_by


def test_tensors_may_share_memory_and_be_views(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    provenance.save_tensors({"a": base, "b": base, "c": base.T}, tmp_path / "a.safetensors", {})
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["a"], base)
    assert torch.equal(found["b"], base)
    assert torch.equal(found["c"], base.T)


def test_sound_and_tensors_without_a_record(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_audio(torch.zeros(1, 8), tmp_path / "a.wav", 8000)
    (tmp_path / "text.safetensors").write_text("text")
    with pytest.raises(ValueError, match=r"has no 'diffsynth' metadata.*diffsynth recognize"):
        provenance.read(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.wav carries no 'diffsynth' record"):
        provenance.read(tmp_path / "a.wav")
    with pytest.raises(CorruptFile):
        provenance.read(tmp_path / "text.safetensors")
    with pytest.raises(NoFiles):
        provenance.read(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG", ".webp"])
def test_images_have_the_record_and_the_text_of_a1111(pipe, tmp_path, suffix):
    made_by = provenance.record(pipe, {"prompt": "äpple, 苹果", "negative_prompt": "b", "cfg_scale": 2.0, "seed": 7})
    image, path = Image.new("RGB", (48, 16), "red"), tmp_path / f"a{suffix}"
    writer = {".png": provenance.save_png, ".webp": lambda one, *rest: provenance.save_webp([one], *rest)}
    writer.get(suffix, provenance.save_jpeg)(image, path, made_by)
    assert provenance.read(path) == made_by
    with Image.open(path) as written:
        comment = written.getexif().get_ifd(0x8769).get(0x9286, b"")
        text = (
            written.info["parameters"] if suffix == ".png" else comment.removeprefix(b"UNICODE\0").decode("utf-16-be")
        )
    found = read_parameters(text)
    assert (found["Prompt"], found["Negative prompt"]) == ("äpple, 苹果", "b")
    assert [found[name] for name in ("Steps", "Sampler", "CFG scale", "Seed", "Size", "Model")] == [
        *("4", "Euler", "2.0", "7", "48x16", "toy-1")
    ]


def test_animations_and_frames_have_the_record(tmp_path):
    frames, made_by = [Image.new("RGB", (16, 16), (level, 0, 0)) for level in (9, 99)], {"seed": 1, "prompt": "苹果"}
    provenance.save_gif(frames, tmp_path / "a.gif", made_by, fps=8)
    provenance.save_webp(frames, tmp_path / "a.webp", made_by, fps=8)
    provenance.save_frames(frames, tmp_path / "a", made_by)
    assert [provenance.read(tmp_path / name) for name in ("a.gif", "a.webp", "a")] == [made_by] * 3
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == ["00000.png", "00001.png"]
    assert provenance.read(tmp_path / "a" / "00001.png") == {**made_by, "frame": 1}
    with pytest.raises(OSError, match="not empty"):
        provenance.save_frames(frames, tmp_path / "a", made_by)
    assert {file.name for file in tmp_path.iterdir()} == {"a", "a.gif", "a.webp"}


def test_images_and_folders_without_a_record(tmp_path):
    for name in ("a.jpg", "a.webp", "a.gif"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        with pytest.raises(ValueError, match="carries no 'diffsynth' record"):
            provenance.read(tmp_path / name)
    with pytest.raises(ValueError, match="has no PNG images; expected a folder of frames"):
        provenance.read(tmp_path)

import re

import pytest
from PIL import Image

from diffsynth import provenance, registry
from diffsynth._discovery import Declared
from diffsynth.errors import RegistryError
from diffsynth.models.plugin import WRITERS
from diffsynth.runtime.writers import check_kind, declared_writers, find_writer, load_writer, output_kind, write
from diffsynth.spec import WriterSpec
from image_pipeline import catalog, use
from label_pipeline import SoundPipeline


def writer(suffix, kind="lines", *, plugin="toy", reference="label_pipeline:write_lines"):
    return Declared(WriterSpec(suffix=suffix, kind=kind, writer=reference), plugin, f"diffsynth-{plugin}", "1.2")


@pytest.fixture
def declared(monkeypatch):
    """Return a function that adds writers to those of core, and installs the model `toy-1`."""

    def install(*extra, **facts):
        core = [Declared(one, "core", "diffsynth-core", "0.1.0") for one in WRITERS]
        use(monkeypatch, catalog(writers=(*core, *extra), **facts))

    install()
    return install


def test_core_writes_these_suffixes(declared):
    kinds = {suffix: one.spec.kind for suffix, one in declared_writers().items()}
    images = dict.fromkeys((".jpeg", ".jpg", ".png", ".webp"), "image")
    videos = dict.fromkeys(("/", ".gif", ".mp4"), "video")
    assert kinds == {**images, **videos, ".safetensors": "tensors", ".wav": "audio"}
    assert all(callable(load_writer(one)) for one in declared_writers().values())


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.gz", ".gz"), ("a.nii.gz", ".nii.gz"), ("A.NII.GZ", ".nii.gz"), ("a.b.png", ".png")]
)
def test_the_longest_suffix_is_used(declared, name, suffix):
    declared(writer(".gz"), writer(".NII.gz"))
    assert find_writer(f"folder.wav/{name}").spec.suffix.lower() == suffix


def test_a_folder_is_a_name_with_a_slash_or_one_that_is_there(declared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("there", "there.png"):
        (tmp_path / name).mkdir()
    found = {name: find_writer(name).spec.suffix for name in ("new/", "new.png/", "there", "there.png")}
    assert found == {"new/": "/", "new.png/": "/", "there": "/", "there.png": ".png"}
    with pytest.raises(ValueError, match="ends in no suffix"):
        find_writer("new")


def test_a_writer_of_several_kinds(declared):
    specs = {suffix: one.spec for suffix, one in declared_writers().items()}
    for kind in ("image", "video"):
        check_kind("a.webp", specs[".webp"], kind, name="toy-1")
    with pytest.raises(
        ValueError, match=re.escape("expected a name that ends in .gif or .mp4 or .safetensors or .webp or /")
    ):
        check_kind("a.png", specs[".png"], "video", name="toy-1")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out", "'out' ends in no suffix, which no writer has. Expected one of .gif (video), .jpeg (image), .jpg (im"),
        ("out.mpg4", "'out.mpg4' ends in '.mpg4', which no writer has; did you mean '.mp4'? Expected one of .gif"),
        (".wav", "'.wav' ends in no suffix"),
        ("out.wav.xyz", "ends in '.xyz', which no writer has. Expected"),
    ],
)
def test_a_suffix_without_a_writer(declared, name, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        find_writer(name)


def test_the_first_plugin_of_a_suffix_is_used(declared):
    declared(writer(".lines", plugin="alpha"), writer(".lines", plugin="beta"), writer(".PNG", plugin="beta"))
    assert [find_writer(name).plugin for name in ("a.lines", "a.png")] == ["alpha", "core"]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_module:write", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("label_pipeline:SAMPLE_RATE", "'label_pipeline:SAMPLE_RATE' is 8000; expected a function"),
    ],
)
def test_a_writer_that_cannot_be_loaded_names_its_plugin(declared, reference, message):
    with pytest.raises(RegistryError) as caught:
        load_writer(writer(".lines", reference=reference))
    assert str(caught.value).startswith("writer '.lines' of plugin toy (diffsynth-toy 1.2)")
    assert message in str(caught.value)


def test_the_kind_is_that_of_the_pipeline_else_of_the_task(declared):
    def kind(task, pipeline):
        declared(task=task, pipeline=pipeline)
        return output_kind(registry.get("toy-1"))

    assert kind("text-to-image", "label_pipeline:SoundPipeline") == "audio"
    assert kind("text-to-image", "image_pipeline:ImagePipeline") == "image"
    assert kind("image-to-video", "image_pipeline:VideoPipeline") == "video"
    assert kind("label-to-something", "label_pipeline:LabelPipeline") is None


def test_installed_models_return_what_their_task_says():
    records = registry.list()
    assert len(records) > 30
    for record in records:
        assert output_kind(record) == record.task.rpartition("-")[2], record.name


def test_every_kind_can_be_written_as_tensors(declared):
    specs = {suffix: one.spec for suffix, one in declared_writers().items()}
    for kind in ("image", "mesh", "tensors", None):
        check_kind("a.safetensors", specs[".safetensors"], kind, name="toy-1")
    check_kind("a.wav", specs[".wav"], None, name="toy-1")
    check_kind("a.wav", specs[".wav"], SoundPipeline.output_kind, name="toy-1")
    expected = (
        "'a.wav': toy-1 returns image, and .wav is for audio; expected a name that ends in .jpeg or .jpg or .png or "
    )
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_kind("a.wav", specs[".wav"], "image", name="toy-1")


def test_write_uses_the_writer_of_the_suffix(declared, tmp_path):
    image, made_by = Image.new("RGB", (8, 8), "red"), {"seed": 1}
    write(image, tmp_path / "a.PNG", record=made_by)
    assert provenance.read(tmp_path / "a.PNG") == made_by
    write([image, image], str(tmp_path / "a.mp4"), record=made_by, fps=8)
    assert provenance.read(tmp_path / "a.mp4") == made_by
    with pytest.raises(TypeError, match="fps"):
        write(image, tmp_path / "b.png", record=made_by, fps=8)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.PNG", "a.mp4"]

import click
import pytest
from PIL import Image

from diffsynth import registry
from diffsynth.cli.arguments import call_arguments, given_loras, shown_arguments
from diffsynth.cli.output import UserError
from diffsynth.core.data.media import VideoData
from diffsynth.core.data.media_writer import save_video
from diffsynth.errors import NoFiles
from label_pipeline import Mood, Spot


@pytest.fixture
def arguments(installed, tmp_path):
    """Return a function from texts `NAME=VALUE` to arguments of `TypedPipeline`; `red.png` and `clip.mp4` exist."""
    installed(task="label-to-something", pipeline="label_pipeline:TypedPipeline")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    save_video([Image.new("RGB", (16, 16))] * 3, tmp_path / "clip.mp4")

    def parse(*settings, **options):
        with click.Context(click.Command("generate")):
            return call_arguments(registry.get("toy-1"), options, settings)

    return parse


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("label=3", 3),
        ("label=3.0", 3),
        ("text=3", "3"),
        ("text=None", "None"),
        ("text=a=b, c", "a=b, c"),
        ("text=", ""),
        ('text="quoted"', "quoted"),
        ("maybe=None", None),
        ("maybe=null", None),
        ("maybe=nothing", "nothing"),
        ("flag=true", True),
        ("flag=False", False),
        ("scale=1e-3", 1e-3),
        ("pair=(3, 4)", (3, 4)),
        ("pair=[3, 4]", (3, 4)),
        ("levels=[0.5, 1]", [0.5, 1]),
        ("counts={'a': 1}", {"a": 1}),
        ('counts={"a": 1}', {"a": 1}),
        ("mood=wild", Mood.WILD),
        ("spot={'x': 0.5}", Spot(0.5)),
        ("anything=7", 7),
        ("anything=seven", "seven"),
        ("seed=[1, 2]", [1, 2]),
        ("output_type=latents", "latents"),
        ("attention=naive", "naive"),
    ],
)
def test_values_have_the_types_of_the_schema(arguments, setting, expected):
    (value,) = arguments(setting).values()
    assert value == expected
    assert type(value) is type(expected)


def test_options_are_first_and_unchanged(arguments):
    given = arguments("scale=2", num_inference_steps=0, label=1)
    assert list(given.items()) == [("num_inference_steps", 0), ("label", 1), ("scale", 2)]


def test_paths_of_images_and_videos_are_opened(arguments):
    given = arguments("image=red.png", "images=clip.mp4", "either=red.png", "spot={'x': 1, 'image': 'red.png'}")
    assert given["image"].getpixel((0, 0)) == (255, 0, 0)
    assert isinstance(given["images"], VideoData)
    assert len(given["images"]) == 3
    assert isinstance(given["either"], Image.Image)
    assert given["spot"].image.size == (8, 8)
    assert isinstance(arguments("either=clip.mp4")["either"], VideoData)
    one, two = (arguments(text)["images"] for text in ("images=red.png", "images=['red.png', 'red.png']"))
    assert ([image.size for image in one], [image.size for image in two]) == ([(8, 8)], [(8, 8)] * 2)


def test_files_are_opened_by_their_content(arguments, tmp_path):
    frames = [Image.new("RGBA", (8, 8), (level, 0, 0, 255)) for level in (0, 90, 180)]
    frames[0].save(tmp_path / "clip.webp", save_all=True, append_images=frames[1:], duration=100, lossless=True)
    (tmp_path / "frames").mkdir()
    for index, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"frame{9 + index}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 6)).save(tmp_path / "photo.jpg", exif=exif)
    for name in ("clip.webp", "frames"):
        given = arguments(f"images={name}")["images"]
        assert [frame.getpixel((0, 0)) for frame in given] == [(0, 0, 0), (90, 0, 0), (180, 0, 0)]
    assert arguments("image=photo.jpg")["image"].size == (6, 8)
    assert arguments("image=frames/frame9.png")["image"].mode == "RGBA"


def test_values_that_json_cannot_hold_are_shown_as_their_texts(arguments):
    settings = ("image=red.png", "label=3", "pair=(3, 4)")
    assert shown_arguments(arguments(*settings), settings) == {"image": "red.png", "label": 3, "pair": (3, 4)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("label", "--set 'label': expected NAME=VALUE"),
        ("my-label=3", "expected NAME=VALUE"),
        ("lable=3", "unknown argument 'lable'; did you mean 'label'?"),
        ("label=three", "--set label='three': expected an integer, at least 0 and at most 9 or a list"),
        ("label=0.5", "--set label=0.5: expected an integer"),
        ("label=10", "--set label=10: expected an integer, at least 0 and at most 9 or a list"),
        ("scale=0", "--set scale=0: expected a number, above 0"),
        ("flag=1", "--set flag=1: expected true or false"),
        ("pair=[1, 2, 3]", "--set pair=[1, 2, 3]: expected a list"),
        ("mood=calmer", "--set mood='calmer': expected one of calm, wild"),
        ("spot={'y': 1}", "no field 'y'"),
        ("image=clip.mp4", "expected the path of an image or null (it has several images)"),
        ("image=gone.png", "--set image=gone.png: cannot be opened as an image"),
        ("image=page.png", "--set image=page.png: cannot be opened as an image: page.png is not an image"),
        ("image=clip.webp", "it has several images"),
        ("images=[1]", "--set images=[1]: expected a list of the path of an image or null"),
        ("watch=print", "argument 'watch' can only be given by a program in the same process"),
        ("on_step=print", "argument 'on_step' can only be given by a program in the same process"),
    ],
)
def test_wrong_settings(arguments, setting, message, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    two = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    two[0].save(tmp_path / "clip.webp", save_all=True, append_images=two[1:])
    with pytest.raises(click.ClickException) as caught:
        arguments(setting)
    assert message in caught.value.message


def test_an_argument_given_twice(arguments):
    for settings, options in ((("label=1", "label=2"), {}), (("label=2",), {"label": 1})):
        with pytest.raises(click.ClickException, match="--set label=2: label is set twice"):
            arguments(*settings, **options)


def test_a_missing_video(arguments):
    with pytest.raises(NoFiles, match=r"gone.mp4 does not exist"):
        arguments("images=gone.mp4")


@pytest.mark.parametrize(
    ("text", "source", "scale"),
    [
        ("ink.safetensors", "ink.safetensors", 1.0),
        ("ink.safetensors:0.8", "ink.safetensors", 0.8),
        ("ink.safetensors:-1", "ink.safetensors", -1.0),
        ("ink.safetensors:1e-1", "ink.safetensors", 0.1),
        ("C:\\loras\\ink.safetensors", "C:\\loras\\ink.safetensors", 1.0),
        ("C:\\loras\\ink.safetensors:0.5", "C:\\loras\\ink.safetensors", 0.5),
        ("owner/repo:ink.safetensors", "owner/repo:ink.safetensors", 1.0),
        ("owner/repo:ink-*.safetensors:0.5", "owner/repo:ink-*.safetensors", 0.5),
        ("toy://ink:0.5", "toy://ink", 0.5),
        ("a:2", "a:2", 1.0),  # a file of that name is there
    ],
)
def test_the_last_colon_before_a_number_is_that_of_a_scale(monkeypatch, tmp_path, text, source, scale):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:2").touch()
    monkeypatch.setattr("diffsynth.runtime.branch_lora.find_lora", lambda config: [])
    (lora,) = given_loras([text])
    assert (str(lora.config), lora.scale) == (source, scale)


@pytest.mark.parametrize("text", ["", ":0.5", "ink.safetensors:nan", "ink.safetensors:inf"])
def test_loras_without_a_file_or_a_scale(text):
    with pytest.raises(UserError, match="expected FILE or FILE:SCALE, with a number such as 0.8"):
        given_loras([text])


def test_a_missing_lora(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NoFiles, match="ink.safetensors does not exist"):
        given_loras(["ink.safetensors:0.5"])

import pytest
from PIL import Image

import diffsynth
from diffsynth import Pipeline, provenance
from diffsynth.cli.outputs import grid_of, image_grid
from image_pipeline import LayersPipeline, image_pipeline
from toy_pipeline import ToyNet


@pytest.fixture(autouse=True)
def loaded(monkeypatch, installed):
    calls = []
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: calls.append(name) or image_pipeline())
    return calls


def test_a_quality_makes_files_smaller_and_is_recorded(run, tmp_path):
    for name, quality in (("a.jpg", 5), ("b.jpg", 100)):
        assert run("generate", "toy-1", "abc", "-o", name, "--quality", quality, "--seed", 5).exit_code == 0
        assert provenance.read(name)["written"] == {"quality": quality}
    assert (tmp_path / "a.jpg").stat().st_size < (tmp_path / "b.jpg").stat().st_size
    assert "written" not in (run("generate", "toy-1", "abc", "-o", "c.jpg"), provenance.read("c.jpg"))[1]


def test_a_grid_beside_the_images(run):
    result = run("generate", "toy-1", "abc", "-o", "a.png", "--num-images", 3, "--seed", 5, "--grid", "auto")
    assert result.stdout == "a-1.png\na-2.png\na-3.png\na-grid.png\n", result.output
    grid, images = Image.open("a-grid.png"), [Image.open(f"a-{index}.png").convert("RGB") for index in (1, 2, 3)]
    assert grid.size == (64, 32)
    places = [grid.crop((x, y, x + 32, y + 16)) for y in (0, 16) for x in (0, 32)]
    assert [place.tobytes() for place in places[:3]] == [image.tobytes() for image in images]
    made_by = provenance.read("a-grid.png")
    assert (made_by["grid"], made_by["seed"], made_by["arguments"]) == ([2, 2], 5, {"num_images": 3})
    options = ("--num-images", 3, "--grid", "1x3")
    assert run("generate", "toy-1", "abc", "-o", "b.jpg", *options).stdout.split()[-1] == "b-grid.jpg"
    assert Image.open("b-grid.jpg").size == (96, 16)


def test_a_grid_of_layers(run, installed, monkeypatch):
    installed(pipeline="LayersPipeline")
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: image_pipeline(LayersPipeline))
    assert run("generate", "toy-1", "abc", "-o", "a.png", "--grid", "1x1").stdout.split()[-1] == "a-grid.png"
    assert Image.open("a-grid.png").size == (64, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "a.png", "--quality", "90"], "--quality 90: .png has none; leave it out"),
        (["-o", "a.jpg", "--quality", "101"], "101 is not in the range 1<=x<=100"),
        (["-o", "a.png", "--grid", "2"], "--grid '2': expected ROWSxCOLUMNS, such as 2x3, or auto"),
        (["-o", "a.png", "--grid", "0x2"], "--grid '0x2': expected ROWSxCOLUMNS"),
        (["-o", "a.safetensors", "--grid", "auto"], "--grid auto is for images, and .safetensors is for tensors"),
        (["-o", "a.png", "--grid", "1x2", "--num-images", "3"], "--grid 1x2 has too few places for 3 images"),
        (["-o", "new/"], "toy-1 returns image, and / is for video"),
    ],
)
def test_what_does_not_fit_is_told_before_the_result(run, tmp_path, options, message):
    result = run("generate", "toy-1", "abc", *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_transparency_is_told_before_the_call(run, monkeypatch, tmp_path):
    class Decoder(ToyNet):
        config = type("Config", (), {"pixel_mode": "RGBA"})()

    pipe = image_pipeline()
    pipe.components["adapter"] = Decoder()
    monkeypatch.setattr(diffsynth, "load", lambda name, **options: pipe)
    monkeypatch.setattr(Pipeline, "__call__", lambda *_, **__: 1 / 0)
    result = run("generate", "toy-1", "abc", "-o", "a.jpg")
    assert "toy-1 returns images with transparency, which .jpg cannot hold; expected a name that ends in .png or" in (
        result.stderr
    )


def test_grids():
    assert [grid_of(count) for count in (1, 2, 3, 4, 5, 9)] == [(1, 1), (1, 2), (2, 2), (2, 2), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match=r"the images have the sizes \(8, 8\), \(9, 8\); expected one size"):
        image_grid([Image.new("L", (8, 8)), Image.new("L", (9, 8))], 1, 2)

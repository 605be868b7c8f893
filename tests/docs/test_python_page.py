"""The page "Python": the blocks of its section on cascades run, with a small pipeline as the model."""

from pathlib import Path

from PIL import Image

import diffsynth
from diffsynth.runtime.cascade import CascadePlan
from documented import blocks, sections
from tiny_z_image import tiny_z_image

PAGE = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")


def test_the_blocks_on_cascades_run_in_order(monkeypatch, capsys):
    pipe = tiny_z_image(n_layers=1, with_autoencoder=True).named("z-image-nano", {"height": 32, "width": 32})
    monkeypatch.setattr(diffsynth, "load", {"z-image-nano": pipe}.__getitem__)
    first, second, third = (text for _, _, text in blocks(sections(PAGE)["A cascade of pipelines"]))
    names: dict = {}
    exec(first, names)
    refined = names["image"]
    exec(second, names)
    base, (seed,) = names["image"], names["seeds"]
    assert isinstance(refined, Image.Image)
    assert refined.size == base.size == (32, 32)
    assert base.tobytes() == pipe("a red apple", seed=seed).tobytes()
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "base: 6%"
    assert shown[-1] == "refine: 56%"
    exec(third, names)
    assert isinstance(names["plan"], CascadePlan)

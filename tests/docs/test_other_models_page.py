"""Tests of the page on other models: its files are those of the examples, and its blocks run."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO

import pytest

from documented import blocks, sections
from example_plugins import installed
from source_tree import ROOT

PAGE = (ROOT / "docs" / "other-models.md").read_text(encoding="utf-8")
FILES = [(file, text) for file, _, text in blocks(PAGE) if file]
RUN = {
    title: [(language, block) for file, language, block in blocks(text) if not file and language != "sh"]
    for title, text in sections(PAGE).items()
}


@pytest.mark.parametrize(("file", "text"), FILES, ids=[file for file, _ in FILES])
def test_its_files_are_those_of_the_examples(file, text):
    assert text == (ROOT / file).read_text(encoding="utf-8"), f"copy {file} into the page"


@pytest.fixture(scope="module", autouse=True)
def _plugins(tmp_path_factory):
    with installed("pixel_ddpm", "sound", "diffusers_unet", folder=tmp_path_factory.mktemp("site")):
        yield


@pytest.mark.parametrize("title", RUN)
def test_its_blocks_run(title):
    (code_language, code), (text_language, expected) = RUN[title]
    assert (code_language, text_language) == ("python", "text")
    with redirect_stdout(StringIO()) as output:
        exec(code, {"__name__": "block"})
    assert output.getvalue() == expected

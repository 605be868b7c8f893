"""Tests of the manual against the code: it builds, its links resolve, its lists are complete."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from PIL import Image

from diffsynth import _env
from diffsynth.cli.generate import generate
from diffsynth_flux import Flux2ImagePipeline
from diffsynth_qwen_image import QwenImagePipeline
from diffsynth_train.cli import train
from diffsynth_train.config import Recipe, parse_section
from diffsynth_zimage import ZImagePipeline

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("packages/*/README.md")])
FENCED = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(page, language, block, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, (language, block) in enumerate(FENCED.findall(page.read_text(encoding="utf-8")))
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_manual_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    site = tmp_path / "site"
    page = (site / "models" / "z-image" / "index.html").read_text(encoding="utf-8")
    assert '<span class="kn">import</span>' in page, "code is highlighted"
    assert '<table class="docutils">' in page or "<table>" in page
    assert (site / "css" / "site.css").is_file()
    loaded = re.findall(r"<(?:script|link|img)\b[^>]*?\b(?:src|href)=\"?(https?://[^\s\">]+)", page)
    assert loaded == [], "pages load nothing from elsewhere"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}; its headings: {sorted(anchors(file))}"


def anchors(page: Path) -> set[str]:
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\s-]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "language", "block"), BLOCKS)
def test_code_blocks_parse(page, language, block):
    assert language in {"sh", "python", "toml", "csv", "text"}
    if language == "python":
        ast.parse(block)
    elif language == "toml":
        assert tomllib.loads(block)


def test_environment_variables_are_those_of_the_code():
    named = re.compile(r"\bDIFFSYNTH_[A-Z_]+")
    in_code = set(named.findall(inspect.getsource(_env)))
    rows = re.findall(r"^\| `(DIFFSYNTH_[A-Z_]+)` \|", page_text("environment.md"), flags=re.MULTILINE)
    assert len(in_code) >= 7
    assert sorted(rows) == sorted(in_code)
    for page in PAGES:
        assert set(named.findall(page.read_text(encoding="utf-8"))) <= in_code | {"DIFFSYNTH_API"}, page.name


def test_every_dependency_has_its_line_and_every_line_its_dependency():
    root = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    expected = {"development": names(line for group in root["dependency-groups"].values() for line in group)}
    ours, build = set(), set()
    for path in ROOT.glob("packages/*/pyproject.toml"):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        ours.add(content["project"]["name"])
        expected[content["project"]["name"]] = names(content["project"]["dependencies"])
        build |= names(content["build-system"]["requires"])
    expected["build"] = build
    expected = {section: found - ours for section, found in expected.items() if found - ours}
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Dependencies")[2]
    sections = re.findall(r"^### (\S+)\n(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    lines = {title: re.findall(r"^- `(.+?)`: .+\.$", body, flags=re.MULTILINE) for title, body in sections}
    assert {title: sorted(found) for title, found in lines.items()} == {t: sorted(f) for t, f in expected.items()}


def names(requirements) -> set[str]:
    return {Requirement(line).name for line in requirements}


def test_every_path_in_the_contributing_table_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Where do I change")[2].partition("\n## ")[0]
    cells = [row.split("|")[2] for row in re.findall(r"^\| .+ \|$", table, flags=re.MULTILINE)]
    paths = {name for cell in cells for name in re.findall(r"`([\w./-]+(?:/|\.py|\.md|\.sh))`", cell)}
    bases = [ROOT, *ROOT.glob("packages/*/src"), *ROOT.glob("packages/*/src/*")]
    missing = sorted(path for path in paths if not any((base / path).exists() for base in bases))
    assert len(paths) >= 40
    assert missing == []


@pytest.mark.parametrize(
    ("page", "pipeline"),
    [("z-image", ZImagePipeline), ("flux-2", Flux2ImagePipeline), ("qwen-image", QwenImagePipeline)],
)
def test_the_arguments_of_a_page_are_those_of_its_pipeline(page, pipeline):
    text = section(f"models/{page}.md", "## Arguments")
    lines = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.+?) \|", text, flags=re.MULTILINE)
    rows = [(name, default) for names, default in lines for name in re.findall(r"\w+", names)]
    parameters = list(inspect.signature(pipeline.__call__).parameters.values())[1:]
    assert sorted(name for name, _ in rows) == sorted(parameter.name for parameter in parameters)
    documented = dict(rows)
    for parameter in parameters:
        if parameter.name != "progress_bar_cmd":
            assert documented[parameter.name] == f"`{parameter.default!r}`", parameter.name


@pytest.mark.parametrize(
    ("page", "heading"),
    [
        ("z-image", "ControlNets"),
        ("flux-1", "Extensions"),
        ("flux-2", "Reference images"),
        ("flux-2", "Extensions"),
        ("qwen-image", "Editing"),
        ("qwen-image", "Extensions"),
    ],
)
def test_the_blocks_of_a_section_run(page, heading):
    for _, block in FENCED.findall(section(f"models/{page}.md", f"## {heading}")):
        exec(block, {"__name__": "block"})


def test_the_options_of_generate_are_those_of_the_program():
    rows = re.findall(r"^\| (`-.+?) \|", section("cli.md", "## generate"), flags=re.MULTILINE)
    shown = {option for row in rows for option in re.findall(r"`(-[-a-z]+)", row)}
    options = {text for parameter in generate.params for text in parameter.opts if text.startswith("-")}
    assert shown == options - {"--traceback"}


def test_the_recipe_in_the_manual_trains(tmp_path, monkeypatch):
    """As it stands, but for the number of steps, the size of the batch and of the images."""
    ((block, *_),) = [[text for language, text in FENCED.findall(page_text("training.md")) if language == "toml"]]
    recipe = parse_section(Recipe, tomllib.loads(block), where="")
    assert recipe.components["dit"].train
    assert not recipe.components["vae"].train
    monkeypatch.chdir(tmp_path)
    images = tmp_path / Path(recipe.data.manifest).parent
    images.mkdir(parents=True)
    Image.new("RGB", (128, 128), "red").save(images / "a.png")
    (tmp_path / recipe.data.manifest).write_text("image,prompt\na.png,red apple\n")
    Path("recipe.toml").write_text(block)
    smaller = ("loop.steps=1", "loop.batch_size=1", "data.height=32", "data.width=32")
    sets = [word for change in smaller for word in ("--set", change)]
    result = CliRunner().invoke(train, ["recipe.toml", *sets], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert list((tmp_path / recipe.output.folder).rglob("*.safetensors"))


def test_ci_ends_in_the_second_command_of_the_readme():
    commands = [block.strip() for language, block in FENCED.findall(README) if language == "sh"]
    assert commands[1] == "pip install uv && uv run --all-packages pytest"
    assert (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1] == commands[1]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_the_readme_fits_a_screen_or_two():
    assert len(README.splitlines()) <= 60


def page_text(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    return re.split(r"^## ", page_text(name).partition(heading)[2], flags=re.MULTILINE)[0]

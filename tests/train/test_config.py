import pytest

from diffsynth.errors import TrainingError
from diffsynth_train.config import OptimizerRecipe, Recipe, parse_section, read_recipe

MINIMAL = """
pipeline = "a:B"
[objective]
name = "flow_match"
[components.dit]
architecture = "z_image_dit"
[data]
manifest = "x.csv"
height = 64
width = 64
[loop]
steps = 10
[output]
folder = "out"
"""


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_minimal(write):
    recipe = read_recipe(write(MINIMAL))
    assert (recipe.loop.steps, recipe.optimizer.schedule, recipe.data.captions.drop) == (10, "constant", 0.0)


def test_encodings(tmp_path):
    """A byte order mark is no text; in another encoding than UTF-8 the recipe, the line and the remedy are named."""
    path, text = tmp_path / "recipe.toml", MINIMAL.replace("x.csv", "данные.csv")
    path.write_text(text, encoding="utf-8-sig")
    assert read_recipe(path).data.manifest == "данные.csv"
    for encoding, line in (("cp1251", 8), ("utf-16", 1)):
        path.write_text(text, encoding=encoding)
        with pytest.raises(TrainingError, match=rf"recipe.toml is not in UTF-8: .* in line {line}; save it in UTF-8"):
            read_recipe(path)


def test_changes_win(write):
    recipe = read_recipe(write(MINIMAL), changes=["loop.steps=3", "output.folder=elsewhere", "optimizer.clip=2"])
    assert (recipe.loop.steps, recipe.output.folder, recipe.optimizer.clip) == (3, "elsewhere", 2.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL.replace("steps", "stepz"), r"unknown key 'stepz' in \[loop\]; did you mean 'steps'"),
        (MINIMAL.replace("steps = 10", ""), r"\[loop\] lacks 'steps'"),
        (MINIMAL.replace("steps = 10", 'steps = "ten"'), r"loop.steps = 'ten': expected int, got str"),
        (MINIMAL.replace("steps = 10", "steps = true"), r"loop.steps = True: expected int"),
        (MINIMAL + '[optimizer]\nschedule = "cosin"', r"optimizer.schedule = 'cosin': expected one of 'constant'"),
        (MINIMAL + "[optimizer]\nbetas = [0.9]", r"optimizer.betas has 1 entries; expected 2"),
        (MINIMAL.replace("architecture", "archtecture"), r"'archtecture' in \[components.dit\]; did you mean"),
        (MINIMAL.replace('architecture = "z_image_dit"', "train = true"), r"\[components.dit\]: .* either source"),
        ("pipeline = ", "is not TOML"),
        (MINIMAL.replace("steps = 10", "steps = 0"), r"\[loop\]: steps = 0: expected a finite number of at least 1"),
        (MINIMAL.replace("steps = 10", "steps = 10\nkeep = -1"), r"\[loop\]: keep = -1: .* at least 0"),
        (MINIMAL + "[optimizer]\nlearning_rate = -1", r"\[optimizer\]: learning_rate = -1.0: .* at least 0"),
        (MINIMAL + "[optimizer]\nclip = nan", r"\[optimizer\]: clip = nan: expected a finite number"),
        (MINIMAL + "[optimizer]\nbetas = [0.9, 1.0]", r"\[optimizer\]: betas = \[0.9, 1.0\]: expected numbers in"),
        (MINIMAL + "[ema]\ndecay = nan", r"\[ema\]: decay = nan: expected a number in \[0, 1\)"),
    ],
)
def test_bad_recipes(write, text, message):
    with pytest.raises(TrainingError, match=message):
        read_recipe(write(text))


def test_missing_file(tmp_path):
    with pytest.raises(TrainingError, match="does not exist"):
        read_recipe(tmp_path / "none.toml")


def test_nested_sections_are_dataclasses():
    recipe = parse_section(
        Recipe,
        {
            "pipeline": "a:B",
            "objective": {"name": "x"},
            "components": {"vae": {"source": "v.safetensors"}},
            "data": {"manifest": "m.csv", "height": 8, "width": 8, "captions": {"templates": ["{caption}!"]}},
            "loop": {"steps": 1},
            "output": {"folder": "o"},
        },
        where="",
    )
    assert recipe.components["vae"].source == "v.safetensors"
    assert recipe.data.captions.templates == ("{caption}!",)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        ('schedule = "trapezoid"', "schedule = 'trapezoid' needs decay_steps"),
        ('schedule = "cosine"\ndecay_steps = 2', "decay_steps = 2 is for schedule = 'trapezoid'"),
    ],
)
def test_a_schedule_that_contradicts_its_decay_is_refused(write, optimizer, message):
    with pytest.raises(TrainingError, match=message):
        read_recipe(write(f"{MINIMAL}\n[optimizer]\n{optimizer}"))


@pytest.mark.parametrize(
    ("schedule", "warmup", "decay", "fits"),
    [
        ("constant", 10, 0, True),
        ("constant", 11, 0, False),
        ("cosine", 9, 0, True),
        ("cosine", 10, 0, False),
        ("trapezoid", 4, 6, True),
        ("trapezoid", 5, 6, False),
    ],
)
def test_a_schedule_that_the_training_does_not_follow(schedule, warmup, decay, fits):
    optimizer = OptimizerRecipe(schedule=schedule, warmup_steps=warmup, decay_steps=decay)
    assert (optimizer.misfit(10) == "") == fits
    assert fits or "do not fit into loop.steps = 10" in optimizer.misfit(10)

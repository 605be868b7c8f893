from collections.abc import Sequence
from dataclasses import replace

import pytest

from diffsynth.errors import InvalidPipeline, MissingComponent
from diffsynth.runtime.unit import CallValues, Phase, check_units, in_phases, needed_for, run_units, split, unit


@unit("height", "width")
def round_size(*, height: int = 1024, width: int = 1024):
    return -(-height // 16) * 16, -(-width // 16) * 16


@unit("embeds", branches={"uncond": {"prompt": "negative_prompt"}})
def encode(text_encoder, *, prompt: str = ""):
    return f"<{prompt}>"


@unit("doubled")
def double(*, embeds):
    return embeds * 2


@unit("noise", random=True)
def draw(*, height, width):
    return height * width


UNITS = (round_size, encode, double, draw)


def test_arguments_are_reads_with_a_default_that_nobody_writes():
    program = check_units(UNITS, provided=())
    assert list(program.arguments) == ["height", "width", "prompt", "negative_prompt"]
    assert program.arguments["negative_prompt"].default == ""


def test_a_unit_that_reads_a_branched_name_is_branched():
    seen = []
    units = [replace(each, function=recorded(each, seen)) for each in UNITS]
    state = CallValues({"height": 20, "width": 16, "prompt": "a", "negative_prompt": "b"}, ("cond", "uncond"))
    run_units(units, {"text_encoder": object()}, state)
    assert seen == ["round_size", "encode", "encode", "double", "double", "draw"]


def recorded(step, seen):
    """Return the function of a unit that also appends the unit's name to `seen`."""
    return lambda *roles, **reads: (seen.append(step.name), step.function(*roles, **reads))[1]


def test_a_unit_before_the_first_branched_one_runs_once_though_both_write_one_name():
    """As reference images did: encoded once for each branch, because a unit behind them tells branches apart."""

    @unit("parts")
    def begin() -> tuple:
        return ()

    @unit("parts")
    def refer(*, parts):
        return (*parts, object())

    @unit("parts", branches={"uncond": {"prompt": "negative_prompt"}})
    def steer(*, parts, prompt=""):
        return (*parts, prompt)

    state = CallValues({"prompt": "a", "negative_prompt": "b"}, ("cond", "uncond"))
    run_units((begin, refer, steer), {}, state)
    cond, uncond = (state.for_branch(branch)["parts"] for branch in ("cond", "uncond"))
    assert cond[0] is uncond[0]
    assert (cond[1], uncond[1]) == ("a", "b")


def test_a_unit_of_one_branch_runs_once_with_its_values_and_all_branches_share_the_result():
    """ControlNets of Qwen-Image read the prompt in the branch of the negative prompt, too."""

    @unit("kept", of_branch="cond")
    def keep(*, embeds):
        return [embeds]

    state = CallValues({"prompt": "a", "negative_prompt": "b"}, ("cond", "uncond"))
    run_units((encode, keep), {"text_encoder": object()}, state)
    cond, uncond = (state.for_branch(branch) for branch in ("cond", "uncond"))
    assert (cond["embeds"], uncond["embeds"]) == ("<a>", "<b>")
    assert cond["kept"] is uncond["kept"]
    assert cond["kept"] == ["<a>"]
    with pytest.raises(TypeError, match="it has both branches and of_branch; leave out one"):
        unit("kept", of_branch="cond", branches={"uncond": {"embeds": "others"}})(lambda *, embeds: embeds)


def test_branches_run_once_each():
    state = CallValues({"height": 20, "width": 16, "prompt": "a", "negative_prompt": "b"}, ("cond", "uncond"))
    run_units(UNITS, {"text_encoder": object()}, state)
    assert state.for_branch("cond")["doubled"] == "<a><a>"
    assert state.for_branch("uncond")["doubled"] == "<b><b>"
    assert state.shared["noise"] == 32 * 16


@pytest.mark.parametrize(
    ("clip", "expected"), [(None, {"size": 1}), ([], {"size": 1, "extra": []}), ("ab", {"size": 3, "extra": "ab"})]
)
def test_a_unit_is_left_out_without_the_argument_that_it_is_there_for(clip, expected):
    """Nor does anything come to the device for it."""

    @unit("size", "extra", only_with="clip")
    def read_clip(vae, *, size, clip=None):
        return size + len(clip), clip

    state = CallValues({"size": 1, "embeds": "", "clip": clip})
    run_units((read_clip, double), {"vae": object()}, state)
    assert {name: state.shared[name] for name in ("size", "extra") if name in state.shared} == expected
    assert state.shared["doubled"] == ""


def test_the_argument_that_a_unit_is_there_for_is_one_that_it_reads():
    with pytest.raises(TypeError, match="only_with has \\['film'\\], which it does not read"):
        unit("size", only_with="film")(lambda *, clip: clip)


def test_a_read_that_nothing_writes_is_named_with_its_unit():
    @unit("x")
    def broken(*, heigth):
        return heigth

    with pytest.raises(InvalidPipeline, match="unit 'broken' reads 'heigth'.*did you mean 'height'"):
        check_units((round_size, broken), provided=())


def test_units_run_in_the_order_of_their_phases():
    """Those of one phase in the order of the list; a unit without a phase is of CONDITION."""
    named = [unit(name, phase=phase)(lambda: 0) for name, phase in (("noise", Phase.LATENTS), ("size", Phase.SHAPE))]
    plain = [unit(name)(lambda: 0) for name in ("one", "two")]
    assert [each.writes for each in in_phases([named[0], *plain, named[1]])] == [
        ("size",),
        ("one",),
        ("two",),
        ("noise",),
    ]


def test_an_output_unit_declares_arguments_too():
    @unit("output")
    def enlarge(*, latents, factor: int = 1):
        return latents * factor

    program = check_units((round_size,), provided=("latents",), outputs=(enlarge,))
    assert list(program.arguments) == ["height", "width", "factor"]
    assert program.owners("factor") == [enlarge]
    assert "output" not in program.writes


def test_a_unit_switches_arguments_that_it_reads():
    @unit("output", switches={"tiled": True})
    def decode(*, latents, tiled: bool | None = None):
        return latents

    assert check_units((), provided=("latents",), outputs=(decode,)).switches == {"tiled": True}
    with pytest.raises(TypeError, match="switches has \\['tilde'\\], which it does not read"):
        unit("output", switches={"tilde": True})(decode.function)


def test_a_rewrite_needs_a_read():
    @unit("height")
    def overwrite():
        return 3

    with pytest.raises(
        InvalidPipeline, match="'overwrite' rewrites 'height' without reading it; it belongs to unit 'round"
    ):
        check_units((round_size, overwrite), provided=())


def test_two_units_agree_on_an_argument():
    @unit("y")
    def other(*, prompt: int = 3):
        return prompt

    with pytest.raises(
        InvalidPipeline,
        match="unit 'other' declares argument 'prompt' as int = 3, unlike str = ''; it belongs to unit 'encode'",
    ):
        check_units((encode, other), provided=())


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (float, "float"),
        (Sequence[str], "Sequence[str]"),
        (Sequence[str] | None, "collections.abc.Sequence[str] | None"),
    ],
)
def test_a_type_and_its_text_agree(annotation, text):
    """A module may postpone the evaluation of its annotations, and its neighbour may not."""

    def first(*, tone=0): ...

    def second(*, tone=0): ...

    first.__annotations__["tone"], second.__annotations__["tone"] = annotation, text
    assert list(check_units((unit("a")(first), unit("b")(second)), provided=()).arguments) == ["tone"]


def test_a_rewritten_argument_is_declared_alike_too():
    @unit("z")
    def other(*, height: str = "tall"):
        return height

    with pytest.raises(InvalidPipeline, match="'other' declares argument 'height' as str = 'tall', unlike int ="):
        check_units((round_size, other), provided=())


def test_branches_rename_only_what_is_read():
    with pytest.raises(TypeError, match="promt"):

        @unit("x", branches={"uncond": {"promt": "negative_prompt"}})
        def typo(*, prompt: str = ""):
            return prompt


def test_hidden_reads_are_refused():
    with pytest.raises(TypeError, match="hide"):

        @unit("x")
        def greedy(**everything):
            return everything


def test_a_unit_without_its_role_is_left_out_and_its_reader_says_so():
    state = CallValues({"height": 16, "width": 16, "prompt": "a"})
    with pytest.raises(MissingComponent, match="unit 'double' needs 'embeds'"):
        run_units(UNITS, {"text_encoder": None}, state)


def test_split_keeps_the_trained_the_random_and_their_readers_live():
    frozen, live = split(UNITS, trained={"text_encoder"})
    assert [step.name for step in frozen] == ["round_size"]
    assert [step.name for step in live] == ["encode", "double", "draw"]
    frozen, live = split(UNITS, trained={"dit"})
    assert [step.name for step in live] == ["draw"]


def test_needed_for_walks_back():
    assert [step.name for step in needed_for(UNITS, {"noise"})] == ["round_size", "draw"]
    assert [step.name for step in needed_for(UNITS, {"doubled"})] == ["encode", "double"]


def test_needed_for_includes_what_a_unit_reads_in_another_branch():
    """The units of a part of a program are checked, too, and miss no value of a branch that they do not run."""

    @unit("masks", branches={"uncond": {"doubled": "noise"}})
    def place(*, doubled):
        return doubled

    assert [step.name for step in needed_for((*UNITS, place), {"masks"})] == [
        "round_size",
        "encode",
        "double",
        "draw",
        "place",
    ]

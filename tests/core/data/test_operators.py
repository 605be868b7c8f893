import pickle

import pytest
import torch

from diffsynth.core.data import operators
from diffsynth.core.data.operators import (
    DataProcessingOperator,
    DataProcessingOperatorRaw,
    DataProcessingPipeline,
    LoadTorchPickle,
    RouteByExtensionName,
    RouteByType,
    SequencialProcess,
    SequentialProcess,
    ToAbsolutePath,
    ToFloat,
    ToInt,
    ToList,
    ToStr,
)
from diffsynth.errors import CorruptFile, NoFiles


@pytest.mark.parametrize(
    ("operator", "given", "expected"),
    [
        (ToInt(), "7", 7),
        (ToFloat(), "7", 7.0),
        (ToStr(), 7, "7"),
        (ToStr("nothing"), None, "nothing"),
        (ToStr(), None, ""),
        (ToList(), 7, [7]),
        (DataProcessingOperatorRaw(), 7, 7),
        (ToAbsolutePath("/data"), "a/b.png", "/data/a/b.png"),
        (ToAbsolutePath("/data"), "/else/b.png", "/else/b.png"),
        (ToAbsolutePath("/data"), "https://example.org/b.png", "https://example.org/b.png"),
        (ToInt() >> ToList() >> ToStr(), "7", "[7]"),
        (ToInt() >> (ToList() >> ToStr()), "7", "[7]"),
        (SequentialProcess(ToInt()), ("7", 8.5), [7, 8]),
        (SequentialProcess(), ["7"], ["7"]),
        (RouteByType([(str, ToInt()), (type(None), ToStr("none")), (None, ToList())]), "7", 7),
        (RouteByType([(str, ToInt()), (type(None), ToStr("none")), (None, ToList())]), None, "none"),
        (RouteByType([(str, ToInt()), (type(None), ToStr("none")), (None, ToList())]), 7.5, [7.5]),
        (RouteByExtensionName([(("png",), ToList()), (None, ToStr())]), "a.PNG", ["a.PNG"]),
        (RouteByExtensionName([(("png",), ToList()), (None, ToStr())]), "a.png?size=8", ["a.png?size=8"]),
        (RouteByExtensionName([(("png",), ToList()), (None, ToStr())]), "a.txt", "a.txt"),
    ],
)
def test_operators(operator, given, expected):
    made = operator(given)
    assert (type(made), made) == (type(expected), expected)


@pytest.mark.parametrize(
    ("operator", "given", "error", "message"),
    [
        (SequentialProcess(ToInt()), "78", TypeError, "'78' is no list"),
        (ToAbsolutePath("/data"), None, TypeError, "None is no path"),
        (RouteByType([(str, ToInt())]), 7, ValueError, "7 is a int; expected one of str"),
        (RouteByExtensionName([(("png", "jpg"), ToInt())]), "a.txt", ValueError, "'txt'; expected one of png, jpg"),
    ],
)
def test_unfit_values(operator, given, error, message):
    with pytest.raises(error, match=message):
        operator(given)


def test_chains_are_flat_and_checked_when_built():
    chain = ToInt() >> ToList() >> ToStr()
    assert isinstance(chain, DataProcessingPipeline)
    assert [type(step) for step in chain.operators] == [ToInt, ToList, ToStr]
    assert DataProcessingPipeline()(7) == 7
    with pytest.raises(TypeError, match="'resize' is no data operator"):
        ToInt() >> "resize"


def test_the_old_spelling():
    assert SequencialProcess is SequentialProcess


def test_a_star_import_gives_the_operators():
    names: dict = {}
    exec("from diffsynth.core.data.operators import *", names)
    classes = {name for name, value in vars(operators).items() if isinstance(value, type)}
    made_here = {name for name in classes if issubclass(getattr(operators, name), DataProcessingOperator)}
    assert made_here | {"FrameSamplerByRateMixin"} == set(names) - {"__builtins__"}


def test_pickles_hold_values(tmp_path):
    sample = ({"latents": torch.randn(2, 3), "steps": [1, 2], "name": "a"}, {}, None)
    torch.save(sample, tmp_path / "a.pth")
    shared, *rest = LoadTorchPickle()(tmp_path / "a.pth")
    assert torch.equal(shared["latents"], sample[0]["latents"])
    assert (shared["steps"], shared["name"], rest) == ([1, 2], "a", [{}, None])
    with pytest.raises(NoFiles, match="gone.pth does not exist"):
        LoadTorchPickle()(tmp_path / "gone.pth")


class Runs:
    """Unpickling it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_runs_no_code(tmp_path):
    torch.save({"sample": Runs(tmp_path / "written")}, tmp_path / "a.pth")
    with pytest.raises(CorruptFile, match="a.pth is not a pickle of tensors"):
        LoadTorchPickle()(tmp_path / "a.pth")
    assert not (tmp_path / "written").exists()
    with (tmp_path / "b.pth").open("wb") as file:
        pickle.dump(Runs(tmp_path / "written"), file, protocol=2)
    with pytest.raises(CorruptFile):
        LoadTorchPickle()(tmp_path / "b.pth")
    assert not (tmp_path / "written").exists()

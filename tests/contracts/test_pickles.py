"""A pickle can run code when it is loaded: only `torch.load(..., weights_only=True)` loads one."""

import ast

import pytest

from source_tree import modules, syntax_tree

LOADERS = {"torch.load"}
FORBIDDEN = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "torch.jit.load",
    "joblib.load",
    "numpy.load",
    "np.load",
}


@pytest.mark.parametrize("name", modules())
def test_pickles_are_opened_for_weights_only(name):
    for node in ast.walk(syntax_tree(modules()[name])):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in FORBIDDEN, f"{name}:{node.lineno} calls {called}"
        if called in LOADERS:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert given.get("weights_only") == "True", f"{name}:{node.lineno}: {called} without weights_only=True"


def test_somebody_is_watched():
    """The test above must not pass only because the loader was moved."""
    assert "torch.load(" in modules()["diffsynth.core.loader.pickled"].read_text(encoding="utf-8")

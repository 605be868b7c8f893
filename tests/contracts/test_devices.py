"""Only `diffsynth.core.device` names device backends; modules that must are listed with a reason."""

import ast
import re
from collections.abc import Iterator

import pytest

from source_tree import modules

NAMED = re.compile(r"(cuda|npu|mps|xpu|hip|privateuseone)(:\d*)?")
ATTRIBUTES = {"cuda", "npu", "mps", "xpu", "hip", "is_cuda", "is_npu", "is_mps", "is_xpu"}

EXEMPT: dict[str, str] = {
    "diffsynth.core.attention.flex": "flex_attention is compiled for the devices it names, and refuses others",
    "diffsynth.core.attention.libraries.probing": "libraries of kernels are built for generations of CUDA devices",
    "diffsynth.core.attention.triton": "its tiles are tuned for generations of CUDA devices",
    "diffsynth.core.attention.sdpa": "asks torch.backends.cuda which of PyTorch's own kernels take a call",
    "diffsynth.core.attention.triton.configs": "its kernels are cut for generations of CUDA devices",
    "diffsynth.nn.fused": "its kernels are written for CUDA, and a refusal says so",
}
"""Module or package -> reason."""


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


OTHERS = [name for name in modules() if not any(is_in(name, one) for one in ("diffsynth.core.device", *EXEMPT))]


@pytest.mark.parametrize("name", OTHERS)
def test_only_the_device_package_names_a_backend(name):
    found = named_in(name)
    assert found == [], f"{name} names a device backend: {'; '.join(found)}. Ask diffsynth.core.device instead"


@pytest.mark.parametrize("exempt", EXEMPT)
def test_exemptions_are_needed(exempt):
    assert any(named_in(name) for name in modules() if is_in(name, exempt)), f"{exempt} names no backend any more"


@pytest.mark.parametrize(
    "code",
    [
        "torch.cuda.synchronize()",
        "from torch import cuda",
        "import torch.npu",
        "import torch_npu",
        "from torch.backends import mps",
        "x.device.type == 'cuda'",
        "x.to('cuda:1')",
        "x.to(f'npu:{index}')",
        "def f(device='mps'): ...",
        "x.is_cuda",
        "x.cuda()",
        "getattr(torch, 'xpu')",
    ],
)
def test_what_counts_as_naming(code):
    assert list(named(code)) != []


@pytest.mark.parametrize(
    "code",
    [
        "'''cuda'''",
        "def f():\n    'cuda'",
        "raise ValueError('it needs cuda, not cpu')",
        "x.to('cpu')",
        "# torch.cuda\nx",
    ],
)
def test_what_does_not(code):
    assert list(named(code)) == []


def named_in(name: str) -> list[str]:
    return list(named(modules()[name].read_text(encoding="utf-8")))


def named(code: str) -> Iterator[str]:
    """Yield the places where code names a backend; docstrings, comments and messages may name one."""
    tree = ast.parse(code)
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        text = ""
        if isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            text = ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            text = repr(node.value) if NAMED.fullmatch(node.value) else ""
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            words = {word for name in imported for word in re.split(r"[._]", name) if "torch" in ast.unparse(node)}
            text = ast.unparse(node) if words & ATTRIBUTES else ""
        if text:
            yield f"line {node.lineno}: {text}"

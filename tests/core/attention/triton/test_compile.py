"""Graphs that torch.compile makes of the kernels, without a GPU; in a process of its own, without the interpreter.

What they take of a device is in tests/benchmarks/test_kernels.py.
"""

import json
import os
import subprocess
import sys

TRACED = """
import json

import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.triton.backend import TritonAttention


class AbsentDevice:  # torch asks it what to compile for, to see which arguments a kernel writes to
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


triton.runtime.driver.set_active(AbsentDevice())
graphs = []


def keep(module, inputs):
    graphs.append(module.graph)
    results = [node for node in module.graph.nodes if node.op == "output"][0].args[0]
    shapes = [getattr(result, "meta", {}).get("val") for result in results]
    return lambda *args: [None if x is None else torch.zeros(x.shape, dtype=x.dtype) for x in shapes]


def attend(q, k, v, **arguments):
    return TritonAttention()(checked_call(q, k, v, **arguments)).square()


compiled = torch.compile(attend, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
q, k, v = (torch.randn(1, 40, 2, 16, requires_grad=True) for _ in range(3))
compiled(q, k, v, mask=torch.ones(1, 1, 1, 40, dtype=torch.bool), causal=True).sum().backward()
kernels = [[node for node in graph.nodes if "triton_kernel_wrapper" in str(node.target)] for graph in graphs]
print(json.dumps([[sorted(node.kwargs["tensors_to_clone"]) for node in nodes] for nodes in kernels]))
"""


def test_torch_compile_sees_the_kernels_and_what_they_write():
    """One graph forward and one backward, each with the kernels and, as there is a mask, those that list its blocks."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", TRACED], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    forward, backward = json.loads(done.stdout.splitlines()[-1])
    assert forward == [["state"], ["lse", "out"]]
    assert backward == [["delta"], ["state"], ["dk", "dv"], ["state"], ["dq"]]

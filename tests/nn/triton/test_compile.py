"""torch.compile traces into the kernels: one graph of our operators, with the kernels inside."""

import json
import os
import subprocess
import sys

CODE = """
import json
import torch
from torch._dynamo.backends.common import aot_autograd
from diffsynth import nn
from diffsynth.nn import fused
from diffsynth.nn.rms_norm import rms_norm

fused.no_kernels_on = lambda device_type: None  # as on a GPU; nothing is launched here

def layers(x, weight, scale, q, cos, sin, time):
    y = rms_norm(x, weight, eps=1e-6, scale=scale, residual=x, gate=scale)
    q = nn.rms_norm_rotary(q, weight[:8], cos, sin, eps=1e-6)
    return nn.swiglu(y, x), q, nn.sinusoidal_embedding(time, 8)

outside, inside = [], []

class Unlaunched(Exception):
    pass

def unlaunched(*inputs):
    raise Unlaunched

def names(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]

def look_inside(graph, inputs):
    inside.append(names(graph))
    return unlaunched

def look(graph, inputs):
    outside.append(names(graph))
    return aot_autograd(fw_compiler=look_inside)(graph, inputs)

compiled = torch.compile(layers, backend=look, fullgraph=True, dynamic=True)
with torch.no_grad():
    for tokens in (5, 7):
        q, angles = torch.randn(2, tokens, 3, 8), torch.randn(1, tokens, 4)
        x, scale = torch.randn(2, tokens, 16), torch.randn(2, 1, 16)
        try:
            compiled(x, torch.randn(16), scale, q, angles, angles, torch.randn(3))
        except Unlaunched:
            pass
print(json.dumps([outside, inside]))
"""


def test_one_graph_for_all_sizes_and_kernels_inside_it():
    """In a process of its own, because interpreted kernels cannot be traced."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    (*_, outside), [inside] = json.loads(result.stdout.splitlines()[-1])  # tracing may restart
    ours = ["norm", "norm_rotary", "gated_activation", "sinusoidal_embedding"]
    assert [name.split(".")[1] for name in outside if name.startswith("diffsynth.")] == ours
    assert sum("triton_kernel_wrapper" in name for name in inside) == len(ours)

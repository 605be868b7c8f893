"""Accuracy of the inexact backends: cosine similarity and relative L1 against the reference in fp32.

    TRITON_INTERPRET=1 python benchmarks/attention_accuracy.py            on the CPU, minutes
    python benchmarks/attention_accuracy.py --device cuda                 longer sequences

Inputs are random; peaked, so that each query attends to few keys; with a large vector common to all keys, as in real
models; and those of the layers of a tiny Z-Image. Weights of tiny models are random, so the last covers the shapes and
scales of a model, not the accuracy of a trained one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from diffsynth.core.attention import AttentionCall, attention, register_backend, use_attention
from diffsynth.core.attention.call import checked_call
from diffsynth.core.attention.naive import NaiveAttention
from diffsynth.core.attention.registry import refusal

Inputs = tuple[Tensor, Tensor, Tensor]


def main() -> int:
    """Print a table, and return 1 if a result is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backends", nargs="+", default=["triton", "triton_int8", "sage_attention"])
    parser.add_argument("--length", type=int, help="tokens of the generated inputs; default 130 on the CPU, else 4608")
    parser.add_argument("--json", type=Path, help="default: results/attention-accuracy.json beside this file")
    args = parser.parse_args()
    length = args.length or (130 if args.device == "cpu" else 4608)
    dtype = torch.float16 if args.device == "cpu" else torch.bfloat16
    rows, is_finite = [], True
    for name, inputs in (*generated(length), *of_tiny_model()):
        small = [x.to(args.device, dtype) for x in inputs]
        truth = NaiveAttention()(checked_call(*(x.float() for x in small)))
        for backend in args.backends:
            if (reason := refusal(backend, checked_call(*small))) is not None:
                print(f"{name} | {backend} refuses: {reason}")
                continue
            out = attention(*small, backend=backend).float()
            is_finite &= bool(out.isfinite().all())
            cosine = float(cosine_similarity(out.flatten(), truth.flatten(), dim=0))
            relative = float((out - truth).abs().sum() / truth.abs().sum())
            rows.append({"inputs": name, "backend": backend, "cosine": cosine, "relative_l1": relative})
            print(f"{name} | {backend}: cosine {cosine:.6f}, relative L1 {relative:.4f}")
    facts = {"device": args.device, "dtype": str(dtype), "length": length, "torch": torch.__version__, "rows": rows}
    target = args.json or Path(__file__).parent / "results" / "attention-accuracy.json"
    target.write_text(json.dumps(facts, indent=1) + "\n")
    return int(not is_finite)


def generated(length: int) -> Iterator[tuple[str, Inputs]]:
    """Yield names and generated inputs, two heads of 128 channels."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, length, 2, 128, generator=generator) for _ in range(3))
    yield "random", (q, k, v)
    yield "peaked", (4 * q, k, v)
    yield "shared vector in keys", (q, k + 8 * torch.randn(128, generator=generator), v)


def of_tiny_model() -> list[tuple[str, Inputs]]:
    """Return one attention call of each shape of a tiny Z-Image, including text encoder and autoencoder."""
    import diffsynth
    from diffsynth.testing import tiny_hub

    seen: dict[tuple[int, ...], Inputs] = {}

    class Recorder(NaiveAttention):
        def __call__(self, call: AttentionCall) -> Tensor:
            if call.is_plain:
                seen[(*call.q.shape, *call.k.shape)] = (call.q.detach(), call.k.detach(), call.v.detach())
            return super().__call__(call)

    register_backend("recorder", Recorder(), priority=-1000)
    with tempfile.TemporaryDirectory() as folder:
        tiny_hub(folder, ["z-image-turbo"])
        os.environ |= {"DIFFSYNTH_MODEL_BASE_PATH": folder, "DIFFSYNTH_SKIP_DOWNLOAD": "true"}
        pipe = diffsynth.load("z-image-turbo", torch_dtype=torch.float32, device="cpu")
        with use_attention("recorder"), torch.no_grad():
            pipe("a lighthouse", height=64, width=64, num_inference_steps=2, seed=0)
    return [(f"tiny z-image, {shape[1]} x {shape[5]} x {shape[3]}", inputs) for shape, inputs in seen.items()]


if __name__ == "__main__":
    sys.exit(main())

"""Every published layout is recognised as the architectures that declare it, and as no other."""

import gzip
import json
from pathlib import Path

import pytest

from diffsynth import _discovery
from diffsynth.core.loader.header import Header, TensorInfo
from diffsynth.core.loader.recognize import recognize
from diffsynth.errors import Unrecognized

ARCHITECTURES, CHECKPOINTS = _discovery.catalog().layouts()
LAYOUTS = sorted((Path(__file__).parents[2] / "data" / "layouts").glob("*.json.gz"))


def header_of(file):
    facts = json.loads(gzip.decompress(file.read_bytes()))
    return facts["signature"], Header(
        dict(_infos(facts["tensors"])), nested=facts["tensors"] if facts["nested"] else None
    )


def _infos(tensors, prefix=""):
    for key, value in tensors.items():
        if isinstance(value, dict):
            yield from _infos(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", TensorInfo("BF16", tuple(value))


BY_STRUCTURE = {
    "FLUX.1-schnell-type--flux_dit--old": "flux_dit",
}
"""Files whose layout as a whole nothing declares, that hold a network of a known architecture -> that architecture."""


ALIKE = {"InfiniteYou--flux_controlnet": "flux_controlnet"}
"""Files that are named by their signature, and whose shapes are those of a network of another architecture, too."""


def claimed(header, tiers):
    try:
        return recognize(header, ARCHITECTURES, CHECKPOINTS, tiers=tiers)
    except Unrecognized as error:
        if "claimed by" in str(error):
            raise
        return []


def test_all_layouts_are_here():
    assert len(LAYOUTS) >= 67


@pytest.mark.parametrize("file", LAYOUTS, ids=lambda path: path.name.removesuffix(".json.gz"))
def test_a_layout_is_claimed_by_those_who_declare_it_alone(file):
    identity, header = header_of(file)
    declared = {checkpoint.architecture for checkpoint in CHECKPOINTS if checkpoint.signature == identity}
    by_signature, by_structure = claimed(header, ("signature",)), claimed(header, ("structure",))
    name = file.name.removesuffix(".json.gz")
    if name in BY_STRUCTURE:
        assert declared == set()
        assert {found.architecture.name for found in by_structure} == {BY_STRUCTURE[name]}
        return
    assert {found.architecture.name for found in by_signature} == declared
    if name in ALIKE:
        assert {found.architecture.name for found in by_structure} == {ALIKE[name]}
        return
    assert {found.architecture.name for found in by_structure} == declared
    configs = {found.architecture.name: found.config for found in by_signature}
    assert {found.architecture.name: found.config for found in by_structure} == configs
    assert all(found.extra == () for found in by_structure)


UNDECLARED = {
    *BY_STRUCTURE,
    "LongCat-Video--wan_video_dit",
    "Video-As-Prompt-Wan2.1-14B--wan_video_dit+wan_video_vap",
    "Wan-Dancer-14B--wan_video_dit",
    "Wan2.2-S2V-14B--wan_video_dit",
    "Wan2.2-S2V-14B--wans2v_audio_encoder",
}
"""Files whose signature no checkpoint declares."""


def test_all_others_are_declared():
    signatures = {checkpoint.signature for checkpoint in CHECKPOINTS}
    names = {file.name.removesuffix(".json.gz") for file in LAYOUTS if header_of(file)[0] not in signatures}
    assert names == UNDECLARED

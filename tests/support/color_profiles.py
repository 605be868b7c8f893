"""Small ICC profiles, written byte by byte, because PIL creates only that of sRGB."""

import struct

import numpy as np

P3_TO_XYZ = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]], dtype=np.float64
)
"""Linear Display P3 to XYZ, adapted to D50; the columns are the colorants of Apple's profile."""


def matrix_profile(to_xyz: np.ndarray, gamma: float) -> bytes:
    """Return an RGB profile with three colorants and one gamma."""
    tags = {b"wtpt": _xyz([0.96420, 1.0, 0.82491])}
    for index, letter in enumerate(b"rgb"):
        tags[bytes([letter]) + b"XYZ"] = _xyz(to_xyz[:, index])
        tags[bytes([letter]) + b"TRC"] = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """Return a profile of grey with a gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz([0.96420, 1.0, 0.82491]), b"kTRC": curve})


def cmyk_profile() -> bytes:
    """Return a profile of CMYK whose colours are all neutral: L* falls from 100 by 20 for each full ink."""
    corners = [[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    table = bytes(value for inks in corners for value in (round((100 - 20 * sum(inks)) * 2.55), 128, 128))
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 * value for value in (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix + identity * 4 + table + identity * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz([0.96420, 1.0, 0.82491]), b"A2B0": lut, b"A2B1": lut})


def _xyz(values) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(value * 65536) for value in values))


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    text = b"a test"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + b"none\0", **tags}
    table, data, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    head = struct.pack(">I4sI4s4s4s12s4s", 0, b"none", 0x02400000, kind, space, connection, bytes(12), b"acsp")
    head += bytes(4 * 6 + 4) + struct.pack(">3i", 63190, 65536, 54061)
    profile = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + data
    return struct.pack(">I", len(profile)) + profile[4:]

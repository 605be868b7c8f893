"""The keys of LoRA files: which parameter each one changes, by which kind of change, and into which shape. No torch.

Known names are those of peft (`X.lora_A.weight`), of kohya (`lora_unet_X_Y.lora_down.weight`, with underscores for
dots), of diffusers before it used peft (`X.lora.down.weight`, `X.processor.to_q_lora.down.weight`), of LyCORIS
(`X.lokr_w1`, `X.hada_w1_a`, `X.diff`, `X.w_norm`), of lightx2v (`X.diff_b`, `X.diff_m`), and of control LoRAs, which
have new values of norms beside their matrices (`X.query_norm.scale`, `X.set_weight`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod

from diffsynth.core.loader.convert import Shape
from diffsynth.errors import shortened

MAX_MODULES = 20_000
"""Number of modules that a LoRA may change; the largest published networks have fewer than 3,000."""

LOW_RANK, DORA, LOHA, LOKR = "LoRA", "DoRA", "LoHa", "LoKr"
DIFFERENCE, EMBEDDING, REPLACEMENT = "difference", "LoRA of an embedding", "new value"
"""Kinds of change. A `DORA` is any of the others with a magnitude; `Change.kind` is that of the change inside it."""

_ADAPTER = r"(?:\.(?P<adapter>(?!weight$|bias$)\w+))?(?:\.(?P<what>weight|bias))?"
_KEY = re.compile(
    r"(?P<module>.+?)(?:"
    rf"\.lora_(?P<side>A|B|down|up|mid){_ADAPTER}"
    r"|(?:\.lora|(?P<place>_lora[12]?)|\.lora_linear_layer)\.(?P<dotted>down|up|mid)(?:\.weight)?"
    r"|\.lora_embedding_(?P<embedding>A|B)(?:\.\w+)?"
    r"|\.(?P<magnitude>lora_magnitude_vector|dora_scale)(?:\.\w+){0,2}"
    r"|\.(?P<factor>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2))(?:\.\w+)?"
    r"|\.(?P<whole>diff|diff_b|diff_m|w_norm|b_norm)"
    r"|\.(?P<alpha>alpha|lora_alpha|lora\.alpha|network_alpha)"
    r")",
    re.DOTALL,
)
_SIDES = {"A": "down", "B": "up"}

_WHOLE = {
    "diff": "weight",
    "w_norm": "weight",
    "diff_b": "bias",
    "b_norm": "bias",
    "diff_m": "modulation",
}
"""End of a key that holds the difference of a whole parameter -> the parameter's name in its module."""

_REPLACED = re.compile(r"(?P<module>.+)\.set_weight|(?P<norm>(?:.*\.)?[^.]*norm[^.]*)\.(?:weight|scale)", re.DOTALL)
"""A key that holds the new value of a whole parameter; without `set_weight` only that of a norm."""

_OTHERS = {
    r".*\.(oft|boft)_.+": "OFT, which rotates the weights",
    r".*\.(a1|a2|b1|b2)\.weight": "GLoRA",
    r".*\.lora_E(\..+)?": "AdaLoRA",
    r".*\.modules_to_save\..+": "a layer that was trained whole",
    r"(emb_params|string_to_param|bundle_emb)(\..+)?": "a textual inversion",
}
"""Pattern of keys that are known and not read -> what they are."""

UNKNOWN = "no part of a LoRA"


@dataclass(frozen=True)
class Change:
    """One change of one parameter, as the keys of a file describe it.

    Args:
        module: the module's name in the file.
        part: the parameter's name in the module, `"weight"`.
        kind: one of the kinds above.
        keys: part of the change, such as `"down"` or `"lokr_w1"`, -> the key that holds it.
        shape: shape of the parameter; convolutions may be flattened to (outputs, all else).
        rank: the number that an alpha is divided by; 0 if the kind has none.
        by_inputs: whether the magnitudes of a DoRA belong to the weight's columns, its inputs, rather than to its rows.
    """

    module: str
    part: str
    kind: str
    keys: Mapping[str, str]
    shape: Shape
    rank: int = 0
    by_inputs: bool = False

    @property
    def name(self) -> str:
        """Name of the parameter in the file, a str: the module alone for a weight, else `"{module}.{part}"`."""
        return self.module if self.part == "weight" else f"{self.module}.{self.part}"

    @property
    def is_dora(self) -> bool:
        """Whether the change has a magnitude for each output beside it (DoRA)."""
        return "magnitude" in self.keys


@dataclass
class LoRAKeys:
    """The keys of a file, sorted into changes.

    Args:
        changes: the changes that can be read.
        broken: module name -> why its change cannot be read, a sentence without the file's name.
        others: key -> what it is, for keys that are no part of a readable change.
        modules: number of modules that the file names; the count ends behind `MAX_MODULES`.
        certain: whether a key proves that the file is a LoRA.
    """

    changes: list[Change] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)
    modules: int = 0
    certain: bool = False

    @property
    def too_many(self) -> str:
        """Text that says that the file changes more than `MAX_MODULES` modules; empty if it does not."""
        if self.modules <= MAX_MODULES:
            return ""
        return f"changes more than {MAX_MODULES:,} modules, which no network has; it is not read"

    @property
    def kinds(self) -> list[str]:
        """Sorted list of the kinds of change in the file other than plain LoRA, with `"DoRA"` for magnitudes."""
        found = {each.kind for each in self.changes} | {DORA for each in self.changes if each.is_dora}
        return sorted(found - {LOW_RANK})

    def complaint(self) -> str:
        """Return a text that lists what cannot be read: damaged changes, then other keys by kind; empty if nothing."""
        groups: dict[str, list[str]] = {}
        for key, kind in self.others.items():
            groups.setdefault(kind, []).append(key)
        texts = [f"{shortened(keys, 4)}: {kind}" for kind, keys in groups.items()]
        return "; ".join([*([shortened(self.broken.values(), 3)] if self.broken else []), *texts])


def lora_keys(shapes: Mapping[str, Shape]) -> LoRAKeys:
    """Return the `LoRAKeys` of a file: its changes, and what cannot be read; the time is proportional to the number of
    keys.

    Args:
        shapes: key -> shape of the file's tensors.
    """
    found = LoRAKeys()
    groups: dict[str, dict[str, str]] = {}
    adapters: dict[str, str] = {}
    for key, shape in shapes.items():
        parsed = _parsed(key, shape)
        if parsed is None:
            kind = next((text for pattern, text in _OTHERS.items() if re.fullmatch(pattern, key)), UNKNOWN)
            found.others[key] = kind
            continue
        module, slot, adapter = parsed
        found.certain = found.certain or slot not in ("alpha", REPLACEMENT)
        held = groups.setdefault(module, {})
        if len(groups) > MAX_MODULES:
            break
        if slot in held:
            found.broken.setdefault(
                module,
                _twice(held[slot], key) if adapters.get(module, adapter) == adapter or slot == "alpha"
                else _several(adapters[module], adapter),
            )  # fmt: skip
        held[slot] = key
        if slot not in ("alpha", REPLACEMENT):
            adapters.setdefault(module, adapter)
    found.modules = len(groups)
    if found.too_many:
        return found
    for module, held in groups.items():
        if module in found.broken:
            continue
        try:
            found.changes.extend(_changes(module, held, shapes))
        except ValueError as error:
            found.broken[module] = str(error)
    several = {adapter for module, adapter in adapters.items() if "down" in groups[module]}
    if len(several) > 1:
        first, second, *_ = sorted(several)
        found.broken.setdefault("", _several(first, second))
    return found


def lora_share(shapes: Mapping[str, Shape], found: LoRAKeys) -> bool:
    """Whether a file with these keys is a LoRA: a key proves it, and most keys are parts of one."""
    return found.certain and 2 * (len(shapes) - len(found.others)) > len(shapes)


def _parsed(key: str, shape: Shape) -> tuple[str, str, str] | None:
    """Return a tuple (module name, part of the change, adapter's name) for a key; None for a key of no LoRA."""
    match = _KEY.fullmatch(key)
    if match is None:
        replaced = _REPLACED.fullmatch(key)
        if replaced is None or (replaced["norm"] and len(shape) != 1):
            return None
        return replaced["module"] or replaced["norm"], REPLACEMENT, ""
    # The names of a processor's layers are `to_q_lora` in diffusers and `qkv_lora1` in XLabs; `lora_match` knows both.
    module = match["module"] + (match["place"] or "")
    if side := match["side"] or match["dotted"]:
        slot = _SIDES.get(side, side)
        if match["what"] == "bias":
            if slot != "up":
                return None
            slot = "lora_bias"
    elif match["alpha"]:
        if prod(shape) != 1:
            return None
        slot = "alpha"
    elif match["embedding"]:
        slot = f"embedding_{match['embedding']}"
    else:
        slot = "magnitude" if match["magnitude"] else match["factor"] or match["whole"]
    return module, slot, match["adapter"] or ""


def _twice(first: str, second: str) -> str:
    return f"{second} and {first} are the same matrix under another spelling; expected one"


def _several(first: str, second: str) -> str:
    return f"it holds several adapters: {first!r}, {second!r}; expected one. Give the keys of one as state_dict"


def _changes(module: str, held: Mapping[str, str], shapes: Mapping[str, Shape]) -> list[Change]:
    """Return a list of the `Change`s of one module.

    Raises:
        ValueError: a matrix is missing, or two do not go together.
    """
    made: list[Change] = []
    rest = dict(held)
    side: dict[str, str] = {slot: rest.pop(slot) for slot in ("alpha", "magnitude") if slot in rest}
    for read in (_low_rank, _embedding, _loha, _lokr):
        if (change := read(module, rest, shapes)) is not None:
            rest = {slot: key for slot, key in rest.items() if slot not in change.keys}
            made.append(_with_side(change, side, shapes))
    if len(made) > 1:
        raise ValueError(f"{module} is changed as {made[0].kind} and as {made[1].kind}; expected one")
    if "magnitude" in side and not made:
        raise ValueError(f"it has a magnitude but no matrices for {module}")
    if REPLACEMENT in rest:
        key = rest.pop(REPLACEMENT)
        if made:
            raise ValueError(f"{module} is changed as {made[0].kind} and by a new value; expected one")
        made.append(Change(module, "weight", REPLACEMENT, {REPLACEMENT: key}, shapes[key]))
    if side and not made and not _WHOLE.keys() & rest.keys():
        raise ValueError(f"it has an alpha but no matrices for {module}")
    if "lora_bias" in rest:
        key = rest.pop("lora_bias")
        if not made:
            raise ValueError(f"it has a bias but no matrices for {module}")
        keys = {DIFFERENCE: key} | ({"alpha": side["alpha"]} if "alpha" in side else {})
        made.append(Change(module, "bias", DIFFERENCE, keys, shapes[key], made[0].rank))
    for slot, key in rest.items():
        made.append(Change(module, _WHOLE[slot], DIFFERENCE, {DIFFERENCE: key}, shapes[key]))
    return made


def _with_side(change: Change, side: Mapping[str, str], shapes: Mapping[str, Shape]) -> Change:
    """Return a copy of a `Change` with the keys of its alpha and its magnitudes.

    Raises:
        ValueError: the magnitudes are neither one for each output nor one for each input.
    """
    by_inputs = False
    if key := side.get("magnitude"):
        magnitude = shapes[key]
        rows = key.endswith("dora_scale") is False or magnitude[:1] == change.shape[:1]
        by_inputs = not rows
        if len(change.shape) < 2 or prod(magnitude) != change.shape[1 if by_inputs else 0]:
            raise ValueError(f"{key} has shape {magnitude}; it does not fit a weight of {change.shape}")
    return replace(change, keys={**change.keys, **side}, by_inputs=by_inputs)


def _low_rank(module: str, held: Mapping[str, str], shapes: Mapping[str, Shape]) -> Change | None:
    keys = {slot: held[slot] for slot in ("down", "up", "mid") if slot in held}
    if not keys:
        return None
    if not {"down", "up"} <= keys.keys():
        side = next(iter(keys))
        raise ValueError(f"it has the {side} matrix of {module} alone; expected down and up (lora_A and lora_B)")
    down, up = shapes[keys["down"]], shapes[keys["up"]]
    if len(down) < 2 or len(up) < 2 or any(extent != 1 for extent in up[2:]):
        raise ValueError(
            f"{module} has matrices of shape {down} and {up}; expected 2 axes each, those of a linear layer, or those "
            "of a convolution with a kernel in the down matrix"
        )
    if down[0] != up[1] and "mid" not in keys:
        raise ValueError(
            f"the down matrix of {module}, {down}, has rank {down[0]}, and the up matrix, {up}, has rank {up[1]}; "
            "expected one rank. The file is damaged"
        )
    if down[0] == 0 or up[1] == 0:
        raise ValueError(f"{module} has rank 0; expected 1 or more")
    kernel = down[2:]
    if "mid" in keys:
        mid = shapes[keys["mid"]]
        if len(mid) < 3 or mid[:2] != (up[1], down[0]) or any(extent != 1 for extent in down[2:]):
            raise ValueError(f"{module} has a middle tensor of shape {mid} between {up} and {down}; they do not fit")
        kernel = mid[2:]
    shape = (up[0], down[1], *(kernel if any(extent != 1 for extent in kernel) else ()))
    return Change(module, "weight", LOW_RANK, keys, shape, down[0])


def _embedding(module: str, held: Mapping[str, str], shapes: Mapping[str, Shape]) -> Change | None:
    keys = {slot: held[slot] for slot in ("embedding_A", "embedding_B") if slot in held}
    if not keys:
        return None
    _require(module, keys, ("embedding_A", "embedding_B"), EMBEDDING)
    first, second = shapes[keys["embedding_A"]], shapes[keys["embedding_B"]]
    if len(first) != 2 or len(second) != 2 or first[0] != second[1] or not first[0]:
        raise ValueError(f"{module} has embedding matrices of shape {first} and {second}; they do not fit")
    return Change(module, "weight", EMBEDDING, keys, (first[1], second[0]), first[0])


def _loha(module: str, held: Mapping[str, str], shapes: Mapping[str, Shape]) -> Change | None:
    keys = {slot: key for slot, key in held.items() if slot.startswith("hada_")}
    if not keys:
        return None
    tucker = "hada_t1" in keys or "hada_t2" in keys
    wanted = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", *(("hada_t1", "hada_t2") if tucker else ()))
    _require(module, keys, wanted, LOHA)
    products = [_product(module, keys, shapes, f"hada_w{n}", f"hada_t{n}" if tucker else "") for n in (1, 2)]
    if products[0][0] != products[1][0]:
        raise ValueError(f"the two products of the LoHa of {module} have shapes {products[0][0]} and {products[1][0]}")
    return Change(module, "weight", LOHA, keys, *products[0])


def _lokr(module: str, held: Mapping[str, str], shapes: Mapping[str, Shape]) -> Change | None:
    keys = {slot: key for slot, key in held.items() if slot.startswith("lokr_")}
    if not keys:
        return None
    factors, rank = [], 0
    for name, core in (("lokr_w1", ""), ("lokr_w2", "lokr_t2" if "lokr_t2" in keys else "")):
        if name in keys:
            if double := [slot for slot in (f"{name}_a", f"{name}_b", core) if slot in keys]:
                raise ValueError(f"the LoKr of {module} has {name} and {double[0]}; expected one of them")
            factors.append(shapes[keys[name]])
        else:
            _require(module, keys, (f"{name}_a", f"{name}_b"), LOKR)
            shape, rank = _product(module, keys, shapes, name, core)
            factors.append(shape)
    first, second = factors
    if len(first) != 2 or len(second) < 2:
        raise ValueError(f"the factors of the LoKr of {module} have shapes {first} and {second}; expected matrices")
    shape = (first[0] * second[0], first[1] * second[1], *second[2:])
    return Change(module, "weight", LOKR, keys, shape, rank)


def _product(
    module: str, keys: Mapping[str, str], shapes: Mapping[str, Shape], name: str, core: str
) -> tuple[Shape, int]:
    """Return a tuple: the shape of the product of `{name}_a` and `{name}_b`, through a Tucker core if there is one, and
    its rank.

    Raises:
        ValueError: the matrices do not fit each other.
    """
    first, second = shapes[keys[f"{name}_a"]], shapes[keys[f"{name}_b"]]
    middle = shapes[keys[core]] if core else ()
    if core:
        fits = len(first) == len(second) == 2 and len(middle) > 2 and middle[:2] == (first[0], second[0])
        shape, rank = (first[-1], second[-1], *middle[2:]), second[0] if second else 0
    else:
        fits = len(first) == 2 and len(second) >= 2 and first[1] == second[0]
        shape, rank = (first[0], *second[1:]) if first else (), second[0] if second else 0
    if not fits or not rank:
        raise ValueError(f"{module}: {name}_a {first} and {name}_b {second} do not fit each other. The file is damaged")
    return shape, rank


def _require(module: str, keys: Mapping[str, str], wanted: tuple[str, ...], kind: str) -> None:
    if missing := [slot for slot in wanted if slot not in keys]:
        raise ValueError(f"the {kind} of {module} lacks {shortened(missing, 4)}; it has {shortened(keys, 4)}")

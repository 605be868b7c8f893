"""Faults of the plugin of `made_plugin`, at least one for each kind of declaration, which `plugins --check` finds."""

from __future__ import annotations

from made_plugin import DIT, LAYOUT, NAME, PACKAGE, PIPELINE

REFERENCES = "references resolve"
SOLVER, GUIDANCE, WRITER = (
    "solver made ends at the data",
    "guidance made combines predictions",
    "writer .made writes a result",
)
EULER = "diffsynth.sampling.solver:euler"
RETURNED = 'return predictions["cond"] * cfg_scale'
MODEL = 'components={"dit": WEIGHTS}'

FAULTS: dict[str, tuple[str, str, str, str, str]] = {
    "a model of a pipeline that is not there": (
        "plugin.py",
        f'"{PIPELINE}"',
        f'"{PACKAGE}.pipeline:Missing"',
        REFERENCES,
        "has no 'Missing'",
    ),
    "a pipeline whose module raises": (
        "pipeline.py",
        "from diffsynth import",
        "1 / 0\nfrom diffsynth import",
        REFERENCES,
        "ZeroDivisionError: division by zero",
    ),
    "a model with a default that is no argument": (
        "plugin.py",
        "components={",
        'defaults={"stepz": 4}, components={',
        f"model {NAME}-1 fits its pipeline",
        "default 'stepz' is not an argument",
    ),
    "a model with a default out of range": (
        "plugin.py",
        "components={",
        'defaults={"num_inference_steps": 0}, components={',
        f"model {NAME}-1 defaults obey the schema",
        "the default of num_inference_steps does not obey its schema",
    ),
    "a model of files that nobody finds": (
        "plugin.py",
        'WEIGHTS = "package://',
        'WEIGHTS = "nowhere://',
        f"model {NAME}-1 has sources that can be found",
        "no installed plugin resolves nowhere://",
    ),
    "a network that cannot be built": (
        "dit.py",
        "        self.config = config\n",
        "        self.config = config\n        raise RuntimeError('no such layer')\n",
        f"{DIT} builds on meta without allocating memory",
        "RuntimeError: no such layer",
    ),
    "rules that lose a key": (
        "convert.py",
        "(Rename(",
        '(Rename("net.positions.bias", "lost"), Rename(',
        f"{LAYOUT} converts with no missing keys",
        "positions.bias",
    ),
    "units that do not fit": (
        "pipeline.py",
        "sigma, *, letters",
        "sigma, *, words, letters",
        f"units of {PIPELINE} are consistent",
        "reads 'words', which no unit writes",
    ),
    "a feature that is left out": (
        "bright.py",
        "(*, latents:",
        "(*, gamma, latents:",
        f"additions to {PIPELINE} are there",
        "'gamma'",
    ),
    "a solver that goes backwards": ("plugin.py", EULER, f"{PACKAGE}.more:backwards", SOLVER, "from the data"),
    "a solver without on_step": ("plugin.py", EULER, f"{PACKAGE}.more:quiet", SOLVER, r"called on_step\(\) with \[\]"),
    "a solver that calls too often": (
        "plugin.py",
        EULER,
        f"{PACKAGE}.more:eager",
        SOLVER,
        r"called velocity\(\) 4 times in 3 steps; evaluations_per_step=1 allows 3",
    ),
    "a solver whose module is another library's": (
        "plugin.py",
        EULER,
        "no_such_library:euler",
        REFERENCES,
        "no_such_lib",
    ),
    "an attention backend without refuses()": (
        "attention.py",
        "def refuses",
        "def declines",
        REFERENCES,
        "expected an attention backend",
    ),
    "an attention backend that is wrong": (
        "attention.py",
        "NaiveAttention()(call)",
        "NaiveAttention()(call) + 1",
        "attention made equals naive with a plain call",
        "differs from naive by 1",
    ),
    "a guidance of another shape": (
        "more.py",
        RETURNED,
        RETURNED.replace('cond"]', 'cond"][:1]'),
        GUIDANCE,
        r"returned float32 \(1, 16, 4, 6\)",
    ),
    "a guidance that changes its inputs": (
        "more.py",
        RETURNED,
        f'predictions["cond"].mul_(2)\n        {RETURNED}',
        GUIDANCE,
        r"changed predictions\['cond'\]",
    ),
    "a writer of other arguments": ("more.py", "path, *, record", "path", WRITER, "cannot be called as f"),
    "a writer that writes nothing": ("more.py", '    output.save(path, format="PNG")\n', "", WRITER, "wrote no file"),
    "a writer of everything": (
        "more.py",
        '        raise TypeError("expected an image")\n',
        '        return path.write_text("")\n',
        WRITER,
        "accepted a result that is no image",
    ),
    "a command that is none": ("plugin.py", ".more:command", ".more:write", REFERENCES, "expected a click.Command"),
    "an objective without a loss": (
        "more.py",
        "def loss",
        "def lose",
        "objective made has a loss",
        r"has no loss\(\)",
    ),
    "a door that breaks": ("doors/zzz_made.py", "ZzzMadePipeline", "Missing", "door made imports", "Missing"),
    "a layer that is no module": (
        "plugin.py",
        "torch.nn:Bilinear",
        "torch.nn.functional:relu",
        REFERENCES,
        "expected an nn.Module class",
    ),
    "a schedule that rises": (
        "more.py",
        "torch.linspace(1, 0,",
        "torch.linspace(0, 1,",
        f"training of {PIPELINE} has a schedule",
        "that descend strictly",
    ),
    "a quantization that is not there": (
        "plugin.py",
        'QuantizationSpec(name="made", backend="' + f"{PACKAGE}.more:write",
        'QuantizationSpec(name="made", backend="' + f"{PACKAGE}.more:Missing",
        REFERENCES,
        "has no 'Missing'",
    ),
    "a LoRA with a default that is no argument": (
        "plugin.py",
        '{"num_inference_steps": 2}',
        '{"stepz": 2}',
        "LoRA made sets arguments of its pipeline",
        "default 'stepz' is not an argument",
    ),
    "a module that ends the program": (
        "more.py",
        "import click",
        "raise SystemExit(3)",
        REFERENCES,
        "ends the program",
    ),
    "a module that raises anything": (
        "more.py",
        "import click",
        "import click\n\n\nclass Odd(BaseException):\n    pass\n\n\nraise Odd('beyond')\n",
        REFERENCES,
        "Odd: beyond",
    ),
    "a plugin that does not load": (
        "plugin.py",
        "DIFFSYNTH_API = 2",
        "DIFFSYNTH_API = 2\n1 / 0",
        "loads",
        "ZeroDivisionError",
    ),
}
"""Fault -> (file, text, its replacement, the check that fails, pattern of the error)."""

TOGETHER = (
    (
        "a model with a default out of range",
        "a model of files that nobody finds",
        "rules that lose a key",
        "a feature that is left out",
        "a solver that goes backwards",
        "an attention backend that is wrong",
        "a guidance of another shape",
        "a writer of other arguments",
        "an objective without a loss",
        "a door that breaks",
        "a schedule that rises",
        "a LoRA with a default that is no argument",
    ),
    (
        "a model with a default that is no argument",
        "a network that cannot be built",
        "a solver without on_step",
        "a guidance that changes its inputs",
        "a writer that writes nothing",
    ),
    ("units that do not fit", "a solver that calls too often", "a writer of everything"),
    (
        "a model of a pipeline that is not there",
        "an attention backend without refuses()",
        "a solver whose module is another library's",
        "a command that is none",
        "a layer that is no module",
        "a quantization that is not there",
    ),
    ("a pipeline whose module raises",),
    ("a module that ends the program",),
    ("a module that raises anything",),
    ("a plugin that does not load",),
)
"""Faults that one plugin can have at the same time, none of which hides another."""

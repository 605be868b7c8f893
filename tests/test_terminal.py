"""Nothing that a file, a name or a message holds commands the terminal: all doors to it are walked here."""

import io
import json
import logging
import re
import struct
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import click
import pytest
from PIL import Image, PngImagePlugin
from tqdm import tqdm

from diffsynth._discovery import Declared, Problem
from diffsynth.cli import main
from diffsynth.spec import CommandSpec
from diffsynth.terminal import EscapingStream, OutputFailed, escaping_output, module_logger, stdout_to_stderr, unescaped
from image_pipeline import catalog, use

HOSTILE = "\x1b]0;owned\x07a\x9b31m\u202eb\rc"
COMMANDING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@click.command()
@click.argument("door")
def loud(door: str) -> None:
    """Print a hostile text by one of the ways that a command or a library has."""
    root = logging.getLogger()
    handler = logging.StreamHandler()
    if door == "log":
        root.addHandler(handler)
        try:
            logging.getLogger("library").warning("a type %s", HOSTILE)
        finally:
            root.removeHandler(handler)
    elif door == "last resort":
        handlers, root.handlers = root.handlers, []
        try:
            logging.getLogger("library").error(HOSTILE)
        finally:
            root.handlers = handlers
    elif door == "warning":
        with warnings.catch_warnings():  # pytest records warnings; a program shows them
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, kind, *rest, **other: sys.stderr.write(
                f"{kind.__name__}: {message}\n"
            )
            warnings.warn(HOSTILE, stacklevel=1)
    elif door == "print":
        sys.stdout.write(f"{HOSTILE}\n")
        sys.stderr.writelines([HOSTILE, "\n"])
        click.echo(HOSTILE)
        click.secho(HOSTILE, err=True)
    elif door == "progress":
        list(tqdm([1], desc=HOSTILE, file=sys.stderr))
    elif door == "usage":
        raise click.UsageError(HOSTILE)
    else:
        raise {"fault": RuntimeError, "value": ValueError}[door](HOSTILE) from OSError(HOSTILE)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A folder of hostile names and contents, and an installation whose texts are hostile."""
    monkeypatch.chdir(tmp_path)
    problem = Problem(
        plugin="bad", distribution="bad", version="1", error=HOSTILE, traceback=f"line\n{HOSTILE}", seconds=0.0
    )
    command = CommandSpec(name="loud", command=f"{__name__}:loud", help=HOSTILE)
    use(monkeypatch, catalog(problems=(problem,), commands=(Declared(command, "toy", "toy", "1"),)))
    header = {f"{HOSTILE}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header["__metadata__"] = {"diffsynth.architecture": HOSTILE, HOSTILE: HOSTILE}
    text = json.dumps(header).encode()
    Path("a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    Path("a.ckpt").write_bytes(b"\x80\x02c" + HOSTILE.encode() + b"\nloads\n.")
    record = PngImagePlugin.PngInfo()
    record.add_itxt("diffsynth", json.dumps({"model": HOSTILE, "arguments": {HOSTILE: HOSTILE}}))
    Image.new("RGB", (8, 8)).save("a.png", pnginfo=record)
    Path("model_index.json").write_text(json.dumps({"_class_name": HOSTILE, HOSTILE: [HOSTILE, HOSTILE]}))
    return tmp_path


WALK = [
    ["list"],
    ["list", "--json"],
    ["--help"],
    ["plugins"],
    ["plugins", "--json"],
    ["info", "a.png"],
    ["info", "a.png", "--json"],
    ["info", HOSTILE],
    ["recognize", "a.safetensors"],
    ["recognize", "a.safetensors", "--json"],
    ["recognize", "a.ckpt", "a.png", f"{HOSTILE}.safetensors", "."],
    ["convert", "a.safetensors", "b.safetensors"],
    ["convert", HOSTILE, HOSTILE],
    ["plan", HOSTILE],
    ["plan", "toy-1", "--set", f"{HOSTILE}=1"],
    ["generate", HOSTILE, "-o", "a.png"],
    ["generate", "toy-1", HOSTILE, "-o", f"{HOSTILE}.png", "--device", "cpu"],
    ["generate", "toy-1", "-o", "b.png", "--set", f"input_image={HOSTILE}", "--device", HOSTILE],
    ["--traceback", "generate", "toy-1", "-o", "b.png", "--set", f"height={HOSTILE}"],
    ["new-plugin", HOSTILE],
    [HOSTILE],
    [f"--{HOSTILE}"],
    ["list", HOSTILE],
    *([*traceback, "loud", door] for traceback in ([], ["--traceback"]) for door in ("value", "fault")),
    *(["loud", door] for door in ("log", "last resort", "warning", "print", "progress", "usage")),
]


@pytest.mark.parametrize("arguments", WALK, ids=lambda arguments: ascii(" ".join(arguments)))
def test_no_door_of_the_program_passes_control_characters(files, capsys, arguments):
    with pytest.raises(SystemExit):
        main(arguments)
    out, err = capsys.readouterr()
    texts = out + err.lstrip("\r").replace("it/s]\r", "")  # what a progress bar has before and between its states
    assert texts
    assert not COMMANDING.findall(texts), ascii(texts)
    if "loud" in arguments:
        assert r"\x1b]0;owned\x07a" in texts
    if "--json" in arguments and out:
        json.loads(out)
    if arguments[-2:] == ["loud", "fault"]:
        assert "Traceback" in texts
        assert "RuntimeError" in texts


def test_doctor(files, capsys, monkeypatch):
    monkeypatch.setenv("DIFFSYNTH_MODEL_BASE_PATH", f"/{HOSTILE}")
    with pytest.raises(SystemExit):
        main(["doctor"])
    out, err = capsys.readouterr()
    assert out
    assert not COMMANDING.findall(out + err)


def test_loggers_of_our_modules():
    """In Python, without the command line: messages and tracebacks of our loggers."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = module_logger("tests.terminal")
    assert module_logger("tests.terminal") is logger
    assert len(logger.filters) == 1
    logger.addHandler(handler)
    logger.propagate = False
    logger.warning("a file %s of %d", HOSTILE, 3)
    logger.warning("plain %s", "text")
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        logger.exception("fails")
    assert not COMMANDING.findall(stream.getvalue())
    assert "a file \\x1b]0;owned" in stream.getvalue()
    assert "plain text\n" in stream.getvalue()
    assert "ValueError: \\x1b]" in stream.getvalue()


def test_all_modules_use_such_loggers():
    packages = Path(__file__).parents[1] / "packages"
    found = [
        f"{path.relative_to(packages)}: {line.strip()}"
        for path in packages.rglob("*.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if "getLogger(" in line and path.name != "terminal.py"
    ]
    assert found == [
        'diffsynth-train/src/diffsynth_train/cli.py: logging.getLogger("diffsynth_train").setLevel(logging.INFO)'
    ]


def test_the_stream():
    inner = io.StringIO()
    stream = EscapingStream(inner)
    assert stream.write("a\x1b[31mb\n\tc\r") == 11
    for text in ("\r 10%|# |", "\x1b[A", "\x1b[A\x1b[A", "\x1b[Aa"):
        stream.write(text)
    assert inner.getvalue() == "a\\x1b[31mb\n\tc\\r" + "\r 10%|# |" + "\x1b[A" + "\x1b[A\x1b[A" + "\\x1b[Aa"
    assert not stream.isatty()
    assert unescaped(stream) is inner
    assert unescaped(inner) is inner
    with pytest.raises(TypeError):
        stream.write(b"bytes")
    before = sys.stdout, sys.stderr
    with escaping_output():
        assert isinstance(sys.stderr, EscapingStream)
    assert (sys.stdout, sys.stderr) == before


@pytest.mark.parametrize(("encoding", "shown"), [("cp1252", "caf\xe9 \\u732b"), ("ascii", "caf\\xe9 \\u732b")])
def test_characters_that_the_terminal_lacks(encoding, shown):
    """A prompt in Chinese in the record of an image ended `diffsynth info` on Windows with a UnicodeEncodeError."""
    written = io.BytesIO()
    stream = EscapingStream(io.TextIOWrapper(written, encoding=encoding))
    stream.write("caf\xe9 \u732b\n")
    stream.flush()
    assert written.getvalue().decode(encoding).rstrip() == shown


class Failing(io.StringIO):
    """A stream whose writes fail."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_output_that_nobody_reads_is_dropped():
    for stream in (EscapingStream(None, required=True), EscapingStream(Failing(BrokenPipeError()), required=True)):
        assert stream.write("text") == 4
        stream.flush()
        assert stream.write("more") == 4
    full = OSError(28, "No space left on device")
    assert EscapingStream(Failing(full)).write("a log") == 5
    stream = EscapingStream(Failing(full), required=True)
    for call in (lambda: stream.write("a result"), stream.flush):
        with pytest.raises(OutputFailed, match="standard output cannot be written: No space left on device"):
            call()


@pytest.mark.parametrize(
    ("redirection", "code", "error"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("| true", 0, ""),
        (">/dev/full", 1, "Error: standard output cannot be written: No space left on device\n"),
    ],
)
def test_a_command_of_a_shell(redirection, code, error):
    program = f"{sys.executable} -c 'from diffsynth.cli import main; main([\"--help\"])'"
    script = f"set -o pipefail; {program} {redirection}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (code, error)


def test_output_of_one_thread_goes_to_stderr(capsys):
    """Discovery must not take the output of the program's other threads."""
    with stdout_to_stderr():
        sys.stdout.write("own\n")
        thread = threading.Thread(target=lambda: sys.stdout.write("other\n"))
        thread.start()
        thread.join()
    sys.stdout.write("later\n")
    assert capsys.readouterr() == ("other\nlater\n", "own\n")

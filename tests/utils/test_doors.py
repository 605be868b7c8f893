"""`diffsynth.utils`: modules of re-exports."""

import ast
from pathlib import Path

import pytest

import diffsynth.utils

FOLDER = Path(diffsynth.utils.__file__).parent
DOORS = sorted(FOLDER.rglob("*.py"))


def test_the_lines_of_existing_scripts():
    from diffsynth.core.data import annotator, media, media_writer
    from diffsynth.runtime import controlnet
    from diffsynth.utils.controlnet import Annotator, ControlNetInput
    from diffsynth.utils.data import VideoData, save_frames, save_video, save_video_with_audio

    assert (Annotator, ControlNetInput) == (annotator.Annotator, controlnet.ControlNetInput)
    assert VideoData is media.VideoData
    assert save_video is media_writer.save_video
    assert save_frames is media_writer.save_frames
    assert save_video_with_audio is media_writer.save_video_with_audio


@pytest.mark.parametrize("door", DOORS, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_a_door_defines_nothing(door):
    for statement in ast.parse(door.read_text(encoding="utf-8")).body:
        is_docstring = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        is_list = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) in ("__all__", "__path__")
        is_import = isinstance(statement, ast.ImportFrom) and statement.level == 0
        is_door = isinstance(statement, ast.Assign) and ast.unparse(statement.value).startswith("door(__name__, ")
        assert is_docstring or is_list or is_import or is_door, ast.unparse(statement)

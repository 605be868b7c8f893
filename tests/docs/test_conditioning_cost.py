"""`tools/conditioning_cost.py`: its count of files and lines, on sources made for it and on those of Wan."""

import importlib.util
import sys

from source_tree import ROOT


def tool():
    spec = importlib.util.spec_from_file_location("conditioning_cost", ROOT / "tools" / "conditioning_cost.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_own_files_count_whole_and_shared_ones_by_line():
    cost = tool()
    sources = {
        "features/camera.py": "a\nb\nc\n",
        "arguments.py": "from camera import CameraArguments\nx = 1\nclass All(CameraArguments): ...\n",
        "features/image.py": "'''Control-Camera networks take an image, too.'''\n",
        "dit.py": "camera_channels = 6\n",
    }
    found = cost.touched(sources, cost.WORD)
    assert found == {"features/camera.py": cost.Cost(3, True), "arguments.py": cost.Cost(2, False)}
    shown = cost.table({"before": {}, "after": found}).splitlines()
    assert shown[0] == "| lines in | before | after |"
    assert shown[2:4] == ["| `arguments.py` |  | 2 |", "| `features/camera.py` |  | 3 (own) |"]
    assert shown[-4:] == [
        "| own files | 0 | 1 |",
        "| shared files | 0 | 1 |",
        "| lines in shared files | 0 | 2 |",
        "| lines | 0 | 5 |",
    ]


def test_wans_camera_path_is_one_file_an_entry_and_a_base():
    cost = tool()
    found = cost.touched(cost.tracked_sources("diffsynth-wan"), cost.WORD)
    assert {path: each.lines for path, each in found.items() if not each.is_own} == {
        "arguments.py": 2,
        "features/__init__.py": 2,
    }
    assert [path for path, each in found.items() if each.is_own] == ["features/camera.py"]

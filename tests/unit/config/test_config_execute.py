"""Executing a file: what it may import, what is kept, what is gone afterwards, how its errors read."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest

from internlm_ds.config.execute import execute
from internlm_ds.errors import ConfigError


def config(tmp_path: Path, text: str, name: str = "c.py") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def test_only_plain_data_is_kept(tmp_path: Path) -> None:
    text = (
        "import os\nimport math as m\nfrom pathlib import Path\n"
        "def f(): return 1\nclass C: pass\n__hidden = 3\n"
        "a = f()\nb = Path('x')\nc = (1, [2])\nd = float('inf')\ne = dict(x=dict(y=None))\n"
    )
    assert execute(config(tmp_path, text)).values == {
        "a": 1, "b": "x", "c": (1, [2]), "d": float("inf"), "e": {"x": {"y": None}},
    }  # fmt: skip


def test_file_is_absolute_and_name_is_not_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = config(tmp_path, "F = __file__\nN = __name__\nimport os\nD = os.path.dirname(__file__)\n")
    monkeypatch.chdir(tmp_path)
    values = execute(path.name).values
    assert values == {"F": str(path), "N": "c", "D": str(tmp_path)}


def test_functions_of_the_file_see_its_names(tmp_path: Path) -> None:
    assert execute(config(tmp_path, "A = 2\ndef twice(): return 2 * A\nB = twice()\n")).values["B"] == 4


def test_replacements_hold_while_the_file_runs(tmp_path: Path) -> None:
    path = config(tmp_path, "A = 2\nB = 2 * A\ndef f(): return A\nC = f()\n")
    executed = execute(path, replacements={"A": 5, "Z": 1})
    assert executed.values == {"A": 5, "B": 10, "C": 5}
    assert executed.replaced == {"A"}


def test_replacements_reach_base_files(tmp_path: Path) -> None:
    config(tmp_path, "A = 2\nB = 2 * A\n", "configs/base.py")
    path = config(tmp_path, "from configs.base import *\nC = A + B\n")
    assert execute(path, replacements={"A": 5}).values == {"A": 5, "B": 10, "C": 15}


def test_configs_are_found_above_the_file_then_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config(tmp_path, "A = 'far'\nB = 'far'\n", "configs/base.py")
    config(tmp_path, "A = 'near'\n", "project/configs/base.py")
    here = tmp_path / "elsewhere"
    config(here, "D = 'cwd'\n", "configs/only_here.py")
    monkeypatch.chdir(here)
    path = config(tmp_path, "from configs.base import A\nfrom configs.only_here import D\n", "project/deep/c.py")
    assert execute(path).values == {"A": "near", "D": "cwd"}


def test_modules_beside_the_file_and_relative_imports(tmp_path: Path) -> None:
    config(tmp_path, "from .inner import X\nY = X + 1\n", "configs/pack/outer.py")
    config(tmp_path, "X = 1\n", "configs/pack/inner.py")
    config(tmp_path, "S = 7\n", "sibling_of_config.py")
    path = config(tmp_path, "from configs.pack.outer import *\nfrom sibling_of_config import S\n")
    assert execute(path).values == {"X": 1, "Y": 2, "S": 7}


def test_packages_with_init_files(tmp_path: Path) -> None:
    config(tmp_path, "from .part import P\n", "configs/__init__.py")
    config(tmp_path, "P = 1\n", "configs/part.py")
    config(tmp_path, "Q = 2\n", "configs/deep/__init__.py")
    path = config(tmp_path, "from configs.deep import Q\nfrom configs.part import P\n")
    assert execute(path).values == {"P": 1, "Q": 2}


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("configs")
    monkeypatch.setitem(sys.modules, "configs", other)
    config(tmp_path, "A = 1\n", "configs/base.py")
    config(tmp_path, "B = 1\n", "left_behind_sibling.py")
    path = config(
        tmp_path,
        "import sys\nsys.path.insert(0, '/nowhere')\nfrom internlm.utils.utils import read_base\n"
        "with read_base():\n  from configs.base import *\n  from left_behind_sibling import *\n",
    )
    before = (set(sys.modules), list(sys.path), list(sys.meta_path))
    execute(path)
    assert (set(sys.modules), list(sys.path), list(sys.meta_path)) == before
    assert sys.modules["configs"] is other
    path.write_text("from configs.base import *\nraise ValueError('no')\n")
    with pytest.raises(ConfigError):
        execute(path)
    assert (set(sys.modules), list(sys.path), list(sys.meta_path)) == before
    assert not list(tmp_path.rglob("__pycache__"))


def test_what_a_file_prints_does_not_reach_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    execute(config(tmp_path, "print('hello')\n"))
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "hello\n")


def test_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "c.py"
    path.write_bytes("# -*- coding: gbk -*-\nA = '中'\n".encode("gbk"))
    assert execute(path).values == {"A": "中"}
    path.write_bytes(b"\xef\xbb\xbfA = 1\n")
    assert execute(path).values == {"A": 1}


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        execute(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a = 1\nb = a + c\n", "NameError (line 2): name 'c' is not defined"),
        ("a = dict(\n", "syntax (line 1): '(' was never closed"),
        ("a = 1\nimport internlm.core.context\n", "import internlm.core (line 2): a configuration may import only"),
        ("from internlm.utils.registry import MODEL_INITIALIZER\n",
         "import internlm.utils.registry (line 1): a configuration may import only internlm.utils.utils.read_base"),
        ("\nfrom internlm.utils.utils import other\n", "ImportError (line 2): cannot import name 'other'"),
        ("from configs.nowhere import *\n", "ModuleNotFoundError (line 1): no configs/nowhere.py in any folder above"),
        ("import sys\nsys.exit()\n", "SystemExit (line 2): raised by the file"),
        ("def f():\n  return 1 / 0\nf()\n", "ZeroDivisionError (line 2): division by zero"),
    ],
)  # fmt: skip
def test_errors_of_the_file_name_their_line(tmp_path: Path, text: str, expected: str) -> None:
    path = config(tmp_path, text)
    message = refusal(path)
    assert message.startswith(f"1 problem in {path}\n  {expected}"), message


@pytest.mark.parametrize(("text", "line"), [("A = 1\nB = A.x\n", 2), ("A = 1\n\nB = (\n", 3)])
def test_errors_of_base_files_name_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    base = config(tmp_path, text, "configs/base.py")
    message = refusal(config(tmp_path, "from configs.base import *\n"))
    assert f"({base}: line {line})" in message


def test_the_remedy_for_the_registry_is_named(tmp_path: Path) -> None:
    path = config(tmp_path, "from internlm.utils.registry import MODEL_INITIALIZER\n")
    assert "from internlm_ds.registry import MODEL_INITIALIZER" in refusal(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.py") == f"{tmp_path / 'none.py'}: No such file or directory"
    (tmp_path / "d.py").mkdir()
    assert refusal(tmp_path / "d.py") == f"{tmp_path / 'd.py'}: Is a directory"
    assert "a Python file that ends with .py" in refusal(config(tmp_path, "", "c.yaml"))
    (tmp_path / "b.py").write_bytes(b"A = '\xff'\n")
    assert "save it as UTF-8" in refusal(tmp_path / "b.py")


def test_a_keyboard_interrupt_passes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        execute(config(tmp_path, "raise KeyboardInterrupt\n"))


def test_the_current_directory_is_not_changed(tmp_path: Path) -> None:
    before = os.getcwd()
    execute(config(tmp_path, "A = 1\n"))
    assert os.getcwd() == before

"""What the README and the documents tell people to type exists: commands, options, make targets, files.

Commands stand in fenced blocks of `bash`; nothing here runs a training.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from internlm_ds.cli.main import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    *("README.md", "README.zh-CN.md", "CONTRIBUTING.md"),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").glob("*.md"))),
]
SCRIPTS = ("launch/pretrain.py", "preprocessing/tokenizer.py", "preprocessing/alpaca_tokenizer.py")
PRE_COMMIT = ROOT / ".pre-commit-config.yaml"


def commands(page: str) -> Iterator[list[str]]:
    """Words of every command in the page's `bash` blocks, continued lines joined, comments dropped."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words:
                yield words


@cache
def help_of(*words: str) -> str:
    done = subprocess.run([sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if word.startswith("--")]


def help_for(words: list[str]) -> str | None:
    """The help text that must know a command's options; None for commands of others."""
    if words[0] == "internlm-ds":
        assert words[1] in COMMANDS or words[1].startswith("--"), f"internlm-ds has no command {words[1]!r}"
        sub = words[1:3] if words[1] in ("preprocess", "data") else words[1:2]
        return help_of("-m", "internlm_ds.cli.main", *sub) if words[1] in COMMANDS else None
    script = next((word for word in words if word in SCRIPTS), None)
    return help_of(script) if script else None


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page: str):
    for words in commands(page):
        known = help_for(words)
        if known is None:
            continue
        script = next((i for i, word in enumerate(words) if word in SCRIPTS), 0)
        for option in options_of(words[script:]):
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", known), (
                f"{page}: {shlex.join(words)}: {option}"
            )


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page: str):
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {word for words in commands(page) if words[0] == "make" for word in words[1:] if "=" not in word}
    text = (ROOT / page).read_text(encoding="utf-8")
    named |= set(re.findall(r"`make ([a-z0-9-]+)`", text))
    assert named <= targets


@pytest.mark.parametrize("page", PAGES)
def test_files_and_links_exist(page: str):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text)
    here = (ROOT / page).parent
    missing = [link for link in links if not (here / link).exists()]
    configs = set(re.findall(r"(?<![\w/])(?:model_configs|ds_configs|launch|preprocessing)/[\w./-]+\.\w+", text))
    missing += [name for name in sorted(configs) if not (ROOT / name).exists()]
    assert not missing, f"{page} names what does not exist: {missing}"


def run_ours(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "internlm_ds.cli.main", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)


def sample_that_begins(page: str, first: str) -> list[str]:
    """Lines of the page's fenced block that begins with `first`."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"^```\n({re.escape(first)}.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert found is not None, f"{page} shows no block that begins with {first!r}"
    return found[1].splitlines()


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_report_that_is_shown_is_the_real_one(page: str):
    done = run_ours("convert-config", "model_configs/7b.py", "--world-size", "8")
    assert done.returncode == 0, done.stderr

    def columns(line: str) -> list[str]:
        return re.split(r" {2,}", line.split("…")[0].strip())

    real = [columns(line) for line in done.stderr.splitlines()]
    for line in sample_that_begins(page, "line "):
        shown = columns(line)
        assert any(
            len(shown) <= len(r) and r[:-1] == shown[: len(r) - 1] and r[-1].startswith(shown[-1]) for r in real
        ), f"{page} shows a line that is not in the report (any more): {line}"


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md"])
def test_error_that_is_shown_is_the_real_one(page: str, tmp_path: Path):
    text = (ROOT / "model_configs" / "7b.py").read_text(encoding="utf-8")
    mistakes = {"    micro_num=4": "    micro_nun=4", 'skip_batches=""': 'skip_batches="10-5"'}
    mistakes |= {"clip_grad_norm=": "clip_grad_norn=", "tensor=1,": "tensor=3,"}
    for right, wrong in mistakes.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "bad.py").write_text(text, encoding="utf-8")
    done = run_ours("convert-config", "bad.py", "--world-size", "8", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == sample_that_begins(page, "ConfigError")


def test_both_languages_show_the_same_commands():
    english, chinese = (list(commands(page)) for page in ("README.md", "README.zh-CN.md"))
    assert [shlex.join(words) for words in english] == [shlex.join(words) for words in chinese]


def test_ci_runs_the_test_command_of_the_readme():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert ["make", "test"] in list(commands("README.md"))
    assert "\nmake test\n" in script
    assert "set -euo pipefail" in script


def test_ci_stops_at_the_first_step_that_fails(tmp_path: Path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_bytes((ROOT / ".ci" / "run").read_bytes())
    (tmp_path / "Makefile").write_text("lint:\n\t@echo looked\n\t@exit 3\ntest:\n\t@echo tested\n", encoding="utf-8")
    done = subprocess.run(["bash", str(tmp_path / ".ci" / "run")], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "looked" in done.stdout and "tested" not in done.stdout


def test_pre_commit_pins_the_ruff_of_the_test_extra():
    pinned = re.search(r'"ruff==([\d.]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pinned is not None
    assert set(re.findall(r"ruff==([\d.]+)", PRE_COMMIT.read_text(encoding="utf-8"))) == {pinned[1]}

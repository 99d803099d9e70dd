"""The kernel's code on disk: linked without numba, made again when damaged, numba's own way where this one fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from internlm_ds.preprocess.engine import kernel, machine_code
from internlm_ds.preprocess.engine.fast_rows import FastRows
from internlm_ds.preprocess.rows import TextBlock
from internlm_ds.preprocess.tokenizers import PlainEncoder


@pytest.fixture
def content():
    machine_code.encode_block()
    return machine_code._path().read_bytes()


def test_another_process_runs_it_without_numba(content, tiny_model):
    script = (
        "import sys\n"
        "from internlm_ds.preprocess.engine.select import row_encoder\n"
        "from internlm_ds.preprocess.rows import TextBlock\n"
        "from internlm_ds.preprocess.tokenizers import Tokenizer\n"
        f"encoder = row_encoder(Tokenizer({str(tiny_model)!r}), num_bytes=600_000)\n"
        "encoder.encode(TextBlock.of(['the cat']))\n"
        "sys.exit(encoder.engine != 'compiled' or 'numba' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[4], timeout=60).returncode == 0


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "absent"])
def test_damaged_code_is_never_run_but_made_again(content, tmp_path, monkeypatch, damage):
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    path = tmp_path / "kernel.o"
    if damage != "absent":
        path.write_bytes({"cut": content[:-9], "flipped": bytes(flipped), "empty": b""}[damage])
        with pytest.raises(ValueError, match="damaged machine code"):
            machine_code.link(path.read_bytes())
    monkeypatch.setattr(machine_code, "_make", lambda target: target.write_bytes(content))
    machine_code._linked(path)
    assert path.read_bytes() == content


def test_numbas_own_way_where_the_folder_cannot_be_written(content, tmp_path, monkeypatch, tables, tiny_tokenizer):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernel, "compiled_object", lambda: pytest.fail("compiled in vain"))
    stamps = []
    monkeypatch.setattr(kernel, "jitted", lambda stamp: stamps.append(stamp) or machine_code.link(content))
    assert not machine_code.is_kept()
    rows = FastRows(tables, PlainEncoder(tiny_tokenizer)).encode(TextBlock.of(["the cat"]))
    assert rows.lengths.tolist() == [len(tiny_tokenizer.encode(["the cat"])[0])]
    assert len(stamps) == 1


def test_code_that_fails_its_trial_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel, "compiled_object", lambda: ("no_such_function", b"no object file"))
    with pytest.raises(subprocess.CalledProcessError):
        machine_code._make(tmp_path / "kernel.o")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_numbas_own_way_makes_the_same_rows(monkeypatch, tables, tiny_tokenizer):
    block = TextBlock.of(["the cat sat on the mat", "a\0b", "猫坐在垫子上。" * 90, ""])
    rows = FastRows(tables, PlainEncoder(tiny_tokenizer)).encode(block)
    monkeypatch.setattr(machine_code, "encode_block", lambda: kernel.jitted(1))
    other = FastRows(tables, PlainEncoder(tiny_tokenizer)).encode(block)
    assert bytes(rows.data) == bytes(other.data)

"""What `inspect-checkpoint` says of good and damaged checkpoints of each format."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from internlm_ds.checkpoint.formats import hf, internlm, native
from internlm_ds.checkpoint.inspection import inspect, render
from internlm_ds.cli import main
from internlm_ds.errors import CheckpointError
from internlm_ds.layout.ranks import Layout


@pytest.fixture
def write(tiny_model, tiny_arch, tiny_weights):
    """`write(folder, kind)`: a checkpoint of a format."""

    def native_into(folder):
        fragments = [native.Fragment(n, k, 0, w.flatten()) for n, w in tiny_weights.items() for k in native.KINDS]
        native.save(
            folder,
            weights=[(name, weight.bfloat16()) for name, weight in tiny_weights.items()],
            fragments=fragments,
            train_state={},
            config_text="x = 1",
            layout=Layout(pipe=2, data=2, zero=2),
            arch=tiny_arch,
            dtype="bfloat16",
            step=7,
            model=tiny_model,
        )

    def internlm_into(folder):
        folder.mkdir()
        internlm.write_weights(folder, tiny_weights, arch=tiny_arch, tensor_size=2, pipe=2, chunks=2)
        torch.save({"step": 7}, folder / "7.step")

    def hf_into(folder):
        folder.mkdir()
        hf.write(folder, tiny_weights, model=tiny_model, arch=tiny_arch, dtype=torch.float16, max_shard_bytes=4000)

    return lambda folder, kind: {"native": native_into, "internlm": internlm_into, "hf": hf_into}[kind](folder)


def test_native(tmp_path, write, tiny_arch):
    write(tmp_path / "7", "native")
    (found,) = inspect(tmp_path / "7", verify=True)
    assert (found.format, found.format_version, found.family, found.step) == ("native", 2, "INTERNLM", 7)
    assert found.layout == {"pipe": 2, "data": 2, "tensor": 1, "zero": 2, "chunks": 1}
    assert (found.dtype, found.num_elements) == ("bfloat16", tiny_arch.num_params)
    assert found.optimizer == ("master", "exp_avg_sq", "exp_avg") and not found.problems
    assert found.bytes["optimizer"] > 12 * tiny_arch.num_params > found.bytes["weights"] > 2 * tiny_arch.num_params
    assert "all contents compared" in render(found)


def test_internlm(tmp_path, write, tiny_arch):
    write(tmp_path / "7", "internlm")
    (found,) = inspect(tmp_path / "7", verify=True)
    assert (found.format, found.family, found.step, found.dtype) == ("internlm", "INTERNLM", 7, "float32")
    assert found.layout == {"tensor": 2, "pipe": 2, "chunks": 2}
    assert found.num_elements >= tiny_arch.num_params and not found.problems


def test_hf(tmp_path, write, tiny_arch):
    write(tmp_path / "hf", "hf")
    (found,) = inspect(tmp_path / "hf", verify=True)
    assert (found.format, found.family, found.dtype) == ("hf", "INTERNLM (as LlamaForCausalLM)", "float16")
    assert found.num_elements == tiny_arch.num_params and not found.problems
    assert "no checksums" in render(found)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("native", "weights-rank00000-00000.safetensors"), ("internlm", "model_tp1_pp0.pt"), ("hf", "*-00002-of-*")],
)
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damage_is_named_and_the_exit_code_says_so(tmp_path, write, kind, file, how, capsys):
    folder = tmp_path / "x"
    write(folder, kind)
    (path,) = folder.glob(file)
    os.truncate(path, path.stat().st_size - 9) if how == "cut" else path.unlink()
    assert main.main(["inspect-checkpoint", str(folder), "--json"]) == 1
    (found,) = json.loads(capsys.readouterr().out)
    assert found["format"] == kind and not found["is_good"]
    assert any(path.name in problem for problem in found["problems"])


def test_a_flipped_byte_needs_verify(tmp_path, write, capsys):
    write(tmp_path / "7", "native")
    path = tmp_path / "7/optimizer-rank00000-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 8
    path.write_bytes(data)
    assert main.main(["inspect-checkpoint", str(tmp_path / "7")]) == 0
    assert "--verify compares contents" in capsys.readouterr().out
    assert main.main(["inspect-checkpoint", str(tmp_path / "7"), "--verify"]) == 1
    assert "optimizer-rank00000-00000.safetensors: sha256 is" in capsys.readouterr().out


def test_a_save_folder_lists_its_checkpoints(tmp_path, write):
    write(tmp_path / "7", "native")
    write(tmp_path / "snapshot/0", "native")
    (tmp_path / "9").mkdir()
    (tmp_path / "9/manifest.json").write_text("{}")
    found = inspect(tmp_path)
    assert [(one.path.removeprefix(f"{tmp_path}/"), bool(one.problems)) for one in found] == [
        ("9", True),
        ("7", False),
        ("snapshot/0", False),
    ]


def test_what_is_no_checkpoint_is_wrong_input(tmp_path, capsys):
    for path, message in ((tmp_path, "holds no checkpoint"), (tmp_path / "gone", "does not exist")):
        with pytest.raises(CheckpointError, match=message):
            inspect(path)
        assert main.main(["inspect-checkpoint", str(path)]) == 2


def test_native_checkpoints_are_told_without_torch(tmp_path, write):
    write(tmp_path / "7", "native")
    script = (
        "import sys\nfrom internlm_ds.cli.main import main\n"
        f"assert main(['inspect-checkpoint', {str(tmp_path / '7')!r}, '--verify']) == 0\n"
        "assert not {'torch', 'numpy', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

"""A manifest made by hand, its checksum right, leads nowhere outside its folder."""

from __future__ import annotations

import hashlib
import json

import pytest

from internlm_ds.checkpoint import manifest
from internlm_ds.checkpoint.formats import native
from internlm_ds.checkpoint.tensorfile import TensorReader
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.ranks import Layout


@pytest.fixture
def folder(tmp_path, tiny_weights, tiny_arch):
    arguments = {"train_state": {}, "config_text": "", "layout": Layout(), "dtype": "float32", "step": 1}
    return native.save(tmp_path / "1", weights=tiny_weights.items(), arch=tiny_arch, **arguments)


def rewrite(folder, change) -> None:
    """Change the manifest and give it the checksum that belongs to it."""
    body = json.loads((folder / manifest.NAME).read_text())
    change(body)
    body["checksum"] = "0" * 64
    text = json.dumps(body, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / manifest.NAME).write_text(text.replace("0" * 64, digest))


OUTSIDE = ["../secret", "/etc/passwd", "a/b", "..", "a\\b", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_files_outside_are_refused(folder, name):
    rewrite(folder, lambda body: body["files"].update({name: {"size": 1, "sha256": "0"}}))
    with pytest.raises(CheckpointError, match="is no name of a file in its folder"):
        native.open(folder)


@pytest.mark.parametrize("name", ["../secret", "elsewhere.safetensors"])
def test_tensors_lie_in_files_that_have_a_checksum(folder, name):
    rewrite(folder, lambda body: body["parameters"][0].update(file=name))
    with pytest.raises(CheckpointError, match="is refused"):
        native.open(folder)


@pytest.mark.parametrize("name", OUTSIDE)
def test_readers_stay_in_their_folder(folder, name):
    """What an index of a Hugging Face folder names, for example."""
    with pytest.raises(CheckpointError, match="is no name of a file in that folder"):
        TensorReader(folder).tensor(name, "x")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("parameters"),
        lambda body: body.update(files=[1]),
        lambda body: body["parameters"][0].update(extra=1),
        lambda body: body.update(fragments=3),
    ],
)
def test_what_has_another_form_is_no_manifest(folder, change):
    rewrite(folder, change)
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json is no manifest"):
        native.open(folder)

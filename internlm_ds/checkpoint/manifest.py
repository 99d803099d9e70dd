"""The manifest of a native checkpoint: its files with sizes and checksums, its parameters, its optimizer state.

A folder is a checkpoint if and only if it holds a valid `manifest.json`; it is written last. Its last line is the
sha256 of its own text with that checksum blanked out, so a flipped bit anywhere in it is noticed too. Writing the
other files, and what they mean, is the native format's business.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internlm_ds.checkpoint import diskfile
from internlm_ds.checkpoint.diskfile import FileRecord
from internlm_ds.checkpoint.names import is_plain
from internlm_ds.errors import CheckpointDamagedError, CheckpointError
from internlm_ds.layout.shards import Shard

NAME = "manifest.json"
FORMAT = "internlm-ds native checkpoint"
# 2: parameters may lie in shards of tensor ranks
FORMAT_VERSION = 2
_BLANK = "0" * 64
_LAST_KEY = '\n "checksum": "'
_END = '"\n}\n'


@dataclass(frozen=True)
class StoredParameter:
    """A parameter, or what one tensor rank held of it: safetensors file and the tensor in it.

    Attributes:
        shape: Of the whole parameter.
        shard: The part that is stored; None: all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str
    shard: Shard | None = None

    @property
    def key(self) -> str:
        """Name of the tensor in its safetensors file."""
        return key_of(self.name, self.tensor_rank)

    @property
    def tensor_rank(self) -> int | None:
        """The tensor rank whose shard it is."""
        return None if self.shard is None else self.shard.rank

    @property
    def numel(self) -> int:
        """Elements that are stored."""
        return math.prod(self.shape if self.shard is None else self.shard.shape(self.shape))


@dataclass(frozen=True)
class StoredFragment:
    """Elements `[start, start + numel)` of a flattened parameter, of one kind of optimizer state.

    Attributes:
        tensor_rank: Of the shard that was flattened (its `StoredParameter` describes it); None: the whole parameter.
    """

    name: str
    kind: str
    start: int
    numel: int
    file: str
    tensor_rank: int | None = None

    @property
    def key(self) -> str:
        """Name of the tensor in its safetensors file."""
        return f"{self.kind}/{key_of(self.name, self.tensor_rank)}@{self.start}"

    @property
    def stop(self) -> int:
        return self.start + self.numel


def key_of(name: str, tensor_rank: int | None) -> str:
    """A parameter's name with the tensor rank whose shard is meant.

    >>> key_of("head.weight", 3)
    'head.weight@tensor3'
    """
    return name if tensor_rank is None else f"{name}@tensor{tensor_rank}"


@dataclass(frozen=True)
class Manifest:
    """Everything known about a checkpoint without opening its other files.

    Attributes:
        step: Successful updates before it was written.
        created: Unix time in seconds.
        dtype: Parameter dtype of the run, `bfloat16` for example.
        layout: Sizes of the axes of the run that wrote it; loading does not depend on them.
        model: The blueprint's sizes; {} for a registered model type.
        random_states: Number of ranks whose random state is stored.
    """

    step: int
    created: float
    versions: dict[str, str]
    layout: dict[str, int]
    dtype: str
    model: dict[str, Any]
    parameters: tuple[StoredParameter, ...]
    fragments: tuple[StoredFragment, ...]
    random_states: int
    files: dict[str, FileRecord]


def render(manifest: Manifest) -> str:
    """The text of `manifest.json`, its own checksum in the last line."""
    body = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(manifest), "checksum": _BLANK}
    text = json.dumps(body, indent=1, allow_nan=False) + "\n"
    assert text.endswith(_LAST_KEY + _BLANK + _END), "the checksum must be the last line"
    return _with_checksum(text, hashlib.sha256(text.encode()).hexdigest())


def _with_checksum(text: str, checksum: str) -> str:
    return text[: -len(_BLANK + _END)] + checksum + _END


def read(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        CheckpointError: The folder holds none, or it was written by a later version.
        CheckpointDamagedError: It is not as it was written.
    """
    path = folder / NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a native checkpoint: it has no {NAME}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    return parse(data, path=path)


def parse(data: bytes, *, path: Path) -> Manifest:
    """Check the text against its own checksum and read it; raises as `read`."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointDamagedError(f"{path} is damaged: byte {error.start} is no text") from error
    found = text[-len(_BLANK + _END) : -len(_END)]
    computed = hashlib.sha256(_with_checksum(text, _BLANK).encode()).hexdigest()
    if not text.endswith(_END) or found != computed:
        raise CheckpointDamagedError(
            f"{path} is damaged: its checksum is {found[:12]!r}…, its text gives {computed[:12]!r}… ({len(data)} bytes)"
        )
    try:
        return _from_text(text, path=path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # its checksum is right: made by hand, or by a version that knew it differently
        raise CheckpointDamagedError(f"{path} is no manifest: {type(error).__name__}: {error}") from error


def _from_text(text: str, *, path: Path) -> Manifest:
    body = json.loads(text)
    if body["format"] != FORMAT or body["format_version"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is {body['format']!r} version {body['format_version']}; this version of internlm-ds reads up to "
            f"{FORMAT_VERSION}. Use the version that wrote it: internlm_ds {body['versions'].get('internlm_ds', '?')}"
        )
    manifest = _from_json(body)
    entries = (*manifest.parameters, *manifest.fragments)
    outside = [name for name in (*manifest.files, *(entry.file for entry in entries)) if not is_plain(name)]
    if outside:
        raise CheckpointError(f"{path} is refused: {outside[0]!r} is no name of a file in its folder")
    unknown = [entry.key for entry in entries if entry.file not in manifest.files]
    if unknown:
        raise CheckpointError(f"{path} is refused: {unknown[0]!r} lies in a file that has no checksum")
    return manifest


def _from_json(body: dict[str, Any]) -> Manifest:
    fields = {key: body[key] for key in Manifest.__dataclass_fields__}
    return Manifest(
        **{
            **fields,
            "parameters": tuple(_parameter(p) for p in body["parameters"]),
            "fragments": tuple(StoredFragment(**f) for f in body["fragments"]),
            "files": {name: FileRecord(**record) for name, record in body["files"].items()},
        }
    )


def _parameter(body: dict[str, Any]) -> StoredParameter:
    shard = body.get("shard")  # files of version 1 have none
    if shard is not None:
        shard = Shard(**{**shard, "spans": tuple((start, stop) for start, stop in shard["spans"])})
    return StoredParameter(**{**body, "shape": tuple(body["shape"]), "shard": shard})


def verify(folder: Path, manifest: Manifest, *, names: Iterable[str] | None = None) -> None:
    """Compare files (all by default) with the manifest.

    Raises:
        CheckpointDamagedError: Names each file that is missing or differs, and what differs.
    """
    problems = list(differences(folder, manifest, names=names))
    if problems:
        raise CheckpointDamagedError(f"checkpoint {folder} is damaged:\n  " + "\n  ".join(problems))


def differences(
    folder: Path, manifest: Manifest, *, names: Iterable[str] | None = None, contents: bool = True
) -> Iterator[str]:
    """A line for each file that is missing or differs from the manifest, in size or (`contents`) in its checksum."""
    chosen = list(manifest.files if names is None else names)
    # two at a time: one file's reading goes on beside the other's hashing
    with ThreadPoolExecutor(2) as pool:
        found = pool.map(lambda name: _difference(folder, manifest, name, contents=contents), chosen)
        yield from (problem for problem in found if problem)


def _difference(folder: Path, manifest: Manifest, name: str, *, contents: bool) -> str | None:
    expected, path = manifest.files[name], folder / name
    try:
        size = path.stat().st_size
        if size != expected.size:
            return f"{name}: {size} bytes, the manifest says {expected.size}"
        found = diskfile.digest(path) if contents else expected
    except FileNotFoundError:
        return f"{name}: missing"
    except OSError as error:
        return f"{name}: cannot be read ({error.strerror})"
    if found.sha256 != expected.sha256:
        return f"{name}: sha256 is {found.sha256[:12]}…, the manifest says {expected.sha256[:12]}…"
    return None

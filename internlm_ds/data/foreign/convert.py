"""From any format to any: which format a path is, one file, a whole folder.

The formats are a table; a new one needs a reader that gives a `Source`, a target, and a line here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from internlm_ds.data.foreign import megatron, numpy_files, parquet
from internlm_ds.data.foreign.blocks import Source, TokenDtype
from internlm_ds.data.foreign.internlm import InternlmTarget, read_internlm
from internlm_ds.errors import DataFormatError

Progress = Callable[[int, int, int], None]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        marks: Endings of the one file that tells it, in a folder full of files.
        read: Path -> Source.
        stem: A path without what is the format's in its name.
        ending: What a name gets in a folder of results.
        parts: Endings behind the stem of all files that belong to one of these.
    """

    marks: str
    read: Callable[[str], Source]
    stem: Callable[[str], str]
    ending: str
    parts: tuple[str, ...]

    def files(self, path: str) -> set[str]:
        return {os.path.realpath(self.stem(path) + part) for part in self.parts}


def _cut(ending: str) -> Callable[[str], str]:
    return lambda path: path[: -len(ending)] if path.endswith(ending) else path


FORMATS = {
    "internlm": Format(".bin", read_internlm, _cut(".bin"), ".bin", (".bin", ".bin.meta", ".bin.json")),
    "megatron": Format(".idx", megatron.read_megatron, megatron.prefix_of, "", megatron.PARTS),
    "numpy": Format(numpy_files.TOKENS, numpy_files.read_numpy, numpy_files.prefix_of, "", numpy_files.PARTS),
    "parquet": Format(".parquet", parquet.read_parquet, _cut(".parquet"), ".parquet", (".parquet",)),
    "datasets": Format(os.sep + parquet.STATE, parquet.read_datasets, lambda path: path.rstrip(os.sep), "", ("",)),
}


@dataclass(frozen=True)
class Converted:
    """One file that was converted."""

    source: str
    target: str
    samples: int
    tokens: int


def convert(
    source: str,
    target: str,
    *,
    source_format: str | None = None,
    target_format: str | None = None,
    dtype: TokenDtype = "int32",
    overwrite: bool = False,
    progress: Progress = lambda done, total, tokens: None,
) -> list[Converted]:
    """Convert a file, or all files of a folder, whose sub-folders (types) come out as they are.

    Args:
        source_format, target_format: Keys of `FORMATS`; None to tell it from the path.
        dtype: Type of the ids in a foreign file.
        progress: Called with bytes done, bytes in all, tokens done.

    Raises:
        DataFormatError: A file is damaged or does not fit the format, or an output exists; what was being written is
            not there then, files finished before are.
        MissingExtraError: A package is not installed.
    """
    found = inputs(source, source_format)
    name = target_format or _format_of_name(target)
    if name is None:
        raise DataFormatError(f"which format is wanted? Give --to ({', '.join(FORMATS)})", path=target)
    pairs = [(path, kind, _target_path(target, relative, FORMATS[name])) for path, kind, relative in found]
    for path, kind, to in pairs:
        if FORMATS[kind].files(path) & FORMATS[name].files(to):
            raise DataFormatError("the output would replace the input; name another place", path=to)
    # every file is looked at before one is written
    total, results = sum(FORMATS[kind].read(path).num_bytes for path, kind, _ in pairs), []
    done_bytes = done_tokens = 0
    for path, kind, to in pairs:
        one = FORMATS[kind].read(path)
        with _named(to), _open_target(name, to, one, dtype=dtype, overwrite=overwrite) as file:
            samples = tokens = 0
            for block in one.blocks():
                file.write(block)
                samples += len(block.lengths)
                tokens += len(block.tokens)
                share = one.num_bytes * samples // max(one.num_samples, 1)
                progress(done_bytes + share, total, done_tokens + tokens)
        results.append(Converted(one.path, to, samples, tokens))
        done_bytes, done_tokens = done_bytes + one.num_bytes, done_tokens + tokens
    return results


def inputs(path: str, source_format: str | None) -> list[tuple[str, str, str]]:
    """Files to convert: path, format, name below the folder ("" where one file is named).

    Raises:
        DataFormatError: There is nothing of this format, or several formats and none was chosen.
    """
    known = source_format or _format_of_file(path)
    if known is not None and (not os.path.isdir(path) or _format_of_file(path) == known):
        return [(path, known, "")]
    if not os.path.isdir(path):
        what = "cannot tell the format of this file" if os.path.exists(path) else "no such file or folder"
        raise DataFormatError(f"{what}; give --from ({', '.join(FORMATS)})", path=path)
    below = {name: _below(path, name) for name in ([source_format] if source_format else FORMATS)}
    several = [name for name, files in below.items() if files]
    if len(several) != 1:
        what = f"holds {' and '.join(several)}; choose with --from" if several else "nothing to convert in this folder"
        raise DataFormatError(what, path=path)
    return [(file, several[0], os.path.relpath(file, path)) for file in below[several[0]]]


def _below(folder: str, name: str) -> list[str]:
    """Files of a format in a folder and below it, hidden ones and loss masks left out, sorted."""
    found = []
    marks = FORMATS[name].marks
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(one for one in folders if not one.startswith("."))
        for file in sorted(names):
            path = os.path.join(root, file)
            if not path.endswith(marks) or file.startswith("."):
                continue
            mask = name == "megatron" and path.endswith(f"{megatron.MASK}.idx")
            # a bin without its meta is not passed over: reading it says what is missing
            if not mask and (name != "internlm" or _format_of_file(path) == "internlm"):
                found.append(path)
    return [os.path.dirname(path) for path in found] if name == "datasets" else found


def _format_of_file(path: str) -> str | None:
    """The format of what lies at a path; None for a folder of files, or where it cannot be told."""
    if os.path.isdir(path):
        return "datasets" if os.path.isfile(os.path.join(path, parquet.STATE)) else None
    if path.endswith(".bin"):
        return "internlm" if os.path.exists(f"{path}.meta") or not os.path.exists(f"{path[:-4]}.idx") else "megatron"
    if (named := _format_of_name(path)) is not None:
        return named
    if os.path.exists(f"{path}.idx"):
        return "megatron"
    return "numpy" if os.path.exists(f"{path}{numpy_files.TOKENS}") else None


def _format_of_name(path: str) -> str | None:
    endings = {".bin": "internlm", ".idx": "megatron", numpy_files.TOKENS: "numpy", ".parquet": "parquet"}
    return next((name for ending, name in endings.items() if path.endswith(ending)), None)


def _target_path(target: str, relative: str, wanted: Format) -> str:
    """Where a file goes; `relative` is its name below the source folder, with the endings of its own format."""
    if not relative:
        return target
    for own in FORMATS.values():
        relative = own.stem(relative)
    return os.path.join(target, relative + wanted.ending)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """What the system refuses without naming a file (no space left) happened while this one was written."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise OSError(error.errno, f"cannot be written: {error.strerror or error}", path) from error
        raise


def _open_target(name: str, path: str, source: Source, *, dtype: TokenDtype, overwrite: bool) -> Any:
    if name == "internlm":
        return InternlmTarget(path, note=source.note, overwrite=overwrite)
    kinds = {
        "megatron": megatron.MegatronTarget,
        "numpy": numpy_files.NumpyTarget,
        "parquet": parquet.ParquetTarget,
        "datasets": parquet.DatasetsTarget,
    }
    return kinds[name](path, masked=source.masked(), dtype=dtype, note=source.note, overwrite=overwrite)


def summary(results: Sequence[Converted]) -> list[str]:
    """A line for each file."""
    return [f"{one.source} -> {one.target}: {one.samples} samples, {one.tokens} tokens" for one in results]

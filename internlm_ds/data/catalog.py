"""Which files make up a data set: the walk through a folder, types, samples too short, ids that do not fit.

Everything that can be wrong with the files is found here, before training. Files are `binmeta`'s, reading samples is
`samples`', packing them `packing`'s.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from internlm_ds.data import side_file
from internlm_ds.data.bintext import BinText, OpenFiles
from internlm_ds.data.metarows import MetaRows
from internlm_ds.data.samples import KeptSamples
from internlm_ds.errors import DataFormatError

logger = logging.getLogger(__name__)

SAMPLES_TO_CHECK = 2048
FEWEST_PER_FILE, MOST_PER_FILE = 4, 64


@dataclass(frozen=True)
class BinFile:
    """A file of a data set.

    Attributes:
        path: Where it lies.
        name: Path below the data set's folder, with forward slashes.
        type_name, type_id: First folder below the data set's folder, and its place among all, sorted.
        min_length: Shorter samples are left out; 0 keeps all.
    """

    path: str
    name: str
    type_name: str
    type_id: int
    min_length: int


@dataclass(frozen=True)
class Catalog:
    """A training folder: its types and its files, both in the order that numbers follow."""

    folder: str
    dataset_types: tuple[str, ...]
    files: tuple[BinFile, ...]


def scan(folder: str, *, min_length: int = 0, min_length_dict: Mapping[str, int] | None = None) -> Catalog:
    """All bin files below a training folder, `<folder>/<type>/**/*.bin`; nothing is opened.

    Raises:
        DataFormatError: The folder does not exist, holds no bin, holds one outside a type's folder, or two keys of
            `min_length_dict` apply to one file.
    """
    found = [os.path.join(root, name) for root, names in walk_bins(folder, key="data.train_folder") for name in names]
    if not found:
        message = "no .bin file below data.train_folder; it holds one folder per data type, such as en/x.bin"
        raise DataFormatError(message, path=folder)
    types = tuple(sorted(entry.name for entry in os.scandir(folder) if _is_visible_folder(entry)))
    files = []
    for path in found:
        name = os.path.relpath(path, folder).replace(os.sep, "/")
        type_name, _, rest = name.partition("/")
        if not rest:
            message = "the file lies directly in data.train_folder; move it into a folder named after its data type, "
            raise DataFormatError(f"{message}such as {os.path.join(folder, 'en', name)}", path=path)
        shortest = min_length_of(path, name, default=min_length, by_key=min_length_dict)
        files.append(BinFile(path, name, type_name, types.index(type_name), shortest))
    return Catalog(folder, types, tuple(files))


def walk_bins(folder: str, *, key: str) -> Iterator[tuple[str, list[str]]]:
    """(folder, its .bin names) for a folder and all below it: a folder's files before its sub-folders, all sorted.

    Links are followed, but never in a circle; hidden files and folders (snapshots of file systems) are left out.

    Args:
        key: Configuration key that names the folder, for messages.
    Raises:
        DataFormatError: A folder does not exist or cannot be read.
    """
    if not os.path.isdir(folder):
        found = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise DataFormatError(f"{key} {found}; give an existing folder, or None for synthetic data", path=folder)
    yield from _walk(folder, frozenset())


def min_length_of(path: str, name: str, *, default: int, by_key: Mapping[str, int] | None) -> int:
    """Shortest sample kept of a file: the value of the one key that occurs in its path, else the default.

    An occurrence counts if it reaches below the data set's folder: `en/` means a folder of the data set, and is not
    found in `/data/golden/` above it.

    Args:
        path: The whole path.
        name: The path below the data set's folder.
    Raises:
        DataFormatError: Two keys or more occur.

    >>> min_length_of("/data/en/x.bin", "en/x.bin", default=0, by_key={"en/": 6})
    6
    """
    above = len(path) - len(name)
    found = {key: value for key, value in (by_key or {}).items() if path.find(key, max(0, above - len(key) + 1)) >= 0}
    if len(found) > 1:
        message = f"several keys of data.min_length_dict occur in this path: {', '.join(map(repr, found))}"
        raise DataFormatError(f"{message}; exactly one may, make them longer, e.g. '/en/'", path=path)
    return int(next(iter(found.values()), default))


def open_kept(
    path: str,
    *,
    min_length: int = 0,
    type_id: int = 0,
    vocab_size: int | None = None,
    files: OpenFiles | None = None,
    samples_to_check: int = MOST_PER_FILE,
    make_side_file: bool = False,
) -> KeptSamples:
    """Open a bin, check that it fits its meta and the vocabulary, keep the samples that are long enough.

    Args:
        make_side_file: Make the bin's side file if there is none that fits; one that fits is used in any case.
    Returns:
        What is left, in file order; `.rows.counts` says of how much.
    Raises:
        DataFormatError: Bin or meta is missing, damaged, or they do not fit each other or the vocabulary.
    """
    rows = MetaRows(path, min_length=min_length)
    text = BinText(path, vocab_size=vocab_size, files=files, state=rows.state)
    ids = side_file.find_or_make(path) if make_side_file else side_file.find(path)
    samples = KeptSamples(text, rows, type_id=type_id, ids=ids)
    if vocab_size is not None:
        check_vocabulary(samples, vocab_size=vocab_size, count=samples_to_check)
    return samples


def open_files(
    catalog: Catalog, *, vocab_size: int | None, log: bool = True, make_side_files: bool = False
) -> Iterator[tuple[BinFile, KeptSamples]]:
    """The files of a catalog one after the other; those with nothing left are named and left out.

    Args:
        log: Say what was dropped (one rank does).
        make_side_files: See `open_kept`.
    """
    opened = OpenFiles()
    count = min(MOST_PER_FILE, max(FEWEST_PER_FILE, SAMPLES_TO_CHECK // len(catalog.files)))
    for file in catalog.files:
        kept = open_kept(
            file.path,
            min_length=file.min_length,
            type_id=file.type_id,
            vocab_size=vocab_size,
            files=opened,
            samples_to_check=count,
            make_side_file=make_side_files,
        )
        if log:
            report_dropped(kept, name=file.name, min_length=file.min_length)
        if len(kept):
            yield file, kept


def report_dropped(kept: KeptSamples, *, name: str, min_length: int) -> None:
    """Say what `min_length` took from a file, and warn if it took all."""
    counts = kept.rows.counts
    dropped = counts.samples - counts.kept_samples
    if not len(kept):
        why = f"none of its {counts.samples} samples has {min_length} tokens" if counts.samples else "it is empty"
        logger.warning("%s is left out: %s", name, why)
    elif dropped:
        facts = (dropped, counts.samples, counts.tokens - counts.kept_tokens, min_length)
        logger.info("%s: %d of %d samples (%d tokens) dropped, shorter than %d tokens", name, *facts)


def check_vocabulary(samples: KeptSamples, *, vocab_size: int, count: int) -> None:
    """Compare a file's ids with the model's vocabulary: `count` samples spread over it, and preprocessing's note.

    Raises:
        DataFormatError: An id does not fit, or cannot be known to.
    """
    for offset, length in samples.rows.some(count):
        samples.text.read(offset, length)
    largest_id, tokenizer_size = noted_ids(samples.path)
    if largest_id is not None and largest_id >= vocab_size:
        for index in range(len(samples)):  # find the line to name; the sample may be one that was dropped
            samples.read(index)
    elif largest_id is None and tokenizer_size is not None and tokenizer_size > vocab_size:
        message = f"made with a tokenizer of {tokenizer_size} ids ({samples.path}.json), too many for model.vocab_size"
        message += f" = {vocab_size}; set model.vocab_size = {tokenizer_size}, or tokenize the text again with the"
        raise DataFormatError(f"{message} model's tokenizer", path=samples.path)


def noted_ids(path: str) -> tuple[int | None, int | None]:
    """Largest id and size of the tokenizer, as preprocessing noted them beside a bin; None where it noted nothing."""
    try:
        with open(f"{path}.json", encoding="utf-8") as file:
            note: Any = json.load(file)
        largest = note.get("counts", {}).get("largest_id")
        return None if largest is None else int(largest), int(note["tokenizer"]["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None, None


def _walk(folder: str, above: frozenset[str]) -> Iterator[tuple[str, list[str]]]:
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataFormatError(f"the folder cannot be read: {error.strerror}", path=folder) from None
    visible = [entry for entry in entries if not entry.name.startswith(".")]
    yield folder, [entry.name for entry in visible if entry.name.endswith(".bin") and not entry.is_dir()]
    for entry in visible:
        if entry.is_dir():
            yield from _walk(entry.path, above | {real})


def _is_visible_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")

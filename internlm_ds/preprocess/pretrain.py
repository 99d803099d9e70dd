"""Text files to one bin/meta pair: documents in, samples out, provenance beside.

Reading is `documents`, encoding `tokenizers`, bytes `data.binmeta`; this file joins them and counts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from internlm_ds.data.binmeta import Writer, check_output
from internlm_ds.preprocess import provenance
from internlm_ds.preprocess.documents import Document, batches, read_documents, read_reference_documents
from internlm_ds.preprocess.files import SourceFile, expand_inputs, text_kind
from internlm_ds.preprocess.progress import Progress
from internlm_ds.preprocess.tokenizers import Encoder, PlainEncoder, ReferenceEncoder, Tokenizer

DATA_TYPES = ("cn", "en", "code", "ja", "ar", "kaoshi")


@dataclass(frozen=True)
class TextOptions:
    """How texts become samples.

    Attributes:
        bos, eos: Put the model's piece before, behind each sample.
        text_key: Field of JSON records that holds the text; None: `text`, then `content`.
        compat: Write what InternEvo's tool of March 2024 writes (see `for_reference`).
    """

    bos: bool = False
    eos: bool = False
    text_key: str | None = None
    compat: bool = False

    @classmethod
    def choose(cls, *, bos: bool | None, eos: bool | None, text_key: str | None, compat: bool) -> TextOptions:
        """What was not said (None) is off, or on with `compat`, as the reference has it."""
        return cls(compat if bos is None else bos, compat if eos is None else eos, text_key, compat)


@dataclass(frozen=True)
class Summary:
    """What a run wrote: samples and tokens of this run, empty texts left out, size of the bin."""

    path: str
    samples: int
    tokens: int
    empty: int
    num_bytes: int

    def __str__(self) -> str:
        text = f"{self.path}: {self.samples} samples, {self.tokens} tokens ({self.num_bytes} bytes in all)"
        return text + (f"; {self.empty} empty texts left out" if self.empty else "")


@dataclass
class _Tally:
    samples: int = 0
    tokens: int = 0
    empty: int = 0
    largest_id: int = 0

    def add(self, ids: Sequence[int]) -> None:
        self.samples += 1
        self.tokens += len(ids)
        self.largest_id = max(self.largest_id, max(ids, default=0))


def tokenize_texts(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    options: TextOptions = TextOptions(),
    append: bool = False,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    progress_to: IO[str] | None = None,
) -> Summary:
    """Tokenize files and globs, in order, into `output`, its meta and its provenance file.

    With `options.compat` an existing output is appended to, as the reference does, unless `overwrite`.

    Raises:
        DataFormatError: An input or the output is unusable; then nothing has changed on disk.
        TokenizerError: bos or eos is asked for and the model has none.
    """
    sources = open_sources(inputs)
    append = append or (options.compat and not overwrite)
    check_output(output, append=append, overwrite=overwrite)
    warn_about_output(output, warn=warn)
    earlier = provenance.read(output) if append and os.path.exists(output) else None
    if earlier:
        provenance.check_same_tokens(earlier, tokenizer, bos=options.bos, eos=options.eos, path=output)
    before = [tokenizer.bos_id] if options.bos else []
    behind = [tokenizer.eos_id] if options.eos else []
    compat_meta: dict[str, Any] = {"meta_dtype": "int32", "empty_meta": "int32"} if options.compat else {}
    with Writer(output, append=append, overwrite=overwrite, **compat_meta) as writer:
        present = provenance.unrecorded(output, samples=writer.num_samples, tokens=writer.num_tokens)
        earlier = earlier or (present if writer.num_samples else None)
        tallies = _write_sources(sources, writer, tokenizer, options, ends=(before, behind), progress_to=progress_to)
        record = _record(tokenizer, options, sources, tallies, num_bytes=writer.num_bytes)
        writer.put_beside(
            provenance.SUFFIX, provenance.encode(provenance.extended(earlier, record) if earlier else record)
        )
    counts = record["counts"]
    if not counts["samples"]:
        warn(f"{output}: no sample was written, the inputs hold no text")
    return Summary(os.fspath(output), counts["samples"], counts["tokens"], counts["empty"], counts["bytes"])


def open_sources(inputs: Sequence[str]) -> list[SourceFile]:
    """The inputs with their formats checked, before anything is written."""
    sources = [SourceFile(path) for path in expand_inputs(inputs)]
    for source in sources:
        text_kind(source.path)
    return sources


def warn_about_output(output: str | os.PathLike[str], *, warn: Callable[[str], None]) -> None:
    """Say what training would not find, or would not know the type of."""
    if not os.fspath(output).endswith(".bin"):
        warn(f"{output} does not end in .bin: training reads *.bin only")
    folders = os.path.dirname(os.path.abspath(output)).split(os.sep)
    if not set(folders) & set(DATA_TYPES):
        known = ", ".join(DATA_TYPES)
        warn(f"{output} lies in no folder named after a data type ({known}); its type will be the name of its folder")


def _write_sources(
    sources: Sequence[SourceFile],
    writer: Writer,
    tokenizer: Tokenizer,
    options: TextOptions,
    *,
    ends: tuple[list[int], list[int]],
    progress_to: IO[str] | None,
) -> list[_Tally]:
    encoder: Encoder = ReferenceEncoder(tokenizer) if options.compat else PlainEncoder(tokenizer)
    progress = Progress(sum(source.num_bytes for source in sources), stream=progress_to)
    tallies: list[_Tally] = []
    done_bytes = done_tokens = 0  # of the sources before this one
    for source in sources:
        tally = _Tally()
        for ids in _samples(_documents(source, options), encoder, tally, keep_empty=options.compat):
            sample = [*ends[0], *ids, *ends[1]]
            writer.write(sample)
            tally.add(sample)
            progress.update(done_bytes + source.bytes_read, tokens=done_tokens + tally.tokens)
        tallies.append(tally)
        done_bytes, done_tokens = done_bytes + source.bytes_read, done_tokens + tally.tokens
    progress.finish()
    return tallies


def _documents(source: SourceFile, options: TextOptions) -> Iterator[Document]:
    return read_reference_documents(source) if options.compat else read_documents(source, text_key=options.text_key)


def _samples(
    documents: Iterable[Document], encoder: Encoder, tally: _Tally, *, keep_empty: bool
) -> Iterator[list[int]]:
    """Ids of each document; those without any are counted and left out, unless `keep_empty`."""
    for batch in batches(documents):
        for document, ids in zip(batch, encoder.encode([document.text for document in batch])):
            if keep_empty or (ids and not document.text.isspace()):
                yield ids
            else:
                tally.empty += 1


def _record(
    tokenizer: Tokenizer,
    options: TextOptions,
    sources: Sequence[SourceFile],
    tallies: Sequence[_Tally],
    *,
    num_bytes: int,
) -> dict[str, Any]:
    settings = {
        "bos": options.bos,
        "eos": options.eos,
        "text_key": options.text_key,
        "compat": "reference" if options.compat else None,
    }
    entries = [
        {
            "path": source.path,
            "bytes": source.bytes_read,
            "sha256": source.sha256,
            "samples": tally.samples,
            "tokens": tally.tokens,
            "empty": tally.empty,
        }
        for source, tally in zip(sources, tallies)
    ]
    counts = {
        "samples": sum(tally.samples for tally in tallies),
        "tokens": sum(tally.tokens for tally in tallies),
        "empty": sum(tally.empty for tally in tallies),
        "bytes": num_bytes,
        "largest_id": max((tally.largest_id for tally in tallies), default=0),
    }
    return provenance.describe(tokenizer, kind="text", settings=settings, sources=entries, counts=counts)

"""Steps for datatrove pipelines: texts as `preprocess text` reads them, rows of a bin, the bin of each task.

datatrove deals files to tasks, starts them (on this machine, under Slurm, with Ray), repeats what failed. These steps
do with a task's share what `pretrain.tokenize_texts` does with all. Importing this file needs the extra `datatrove`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internlm_ds.data.binmeta import Writer
from internlm_ds.errors import DataFormatError, MissingExtraError
from internlm_ds.preprocess import documents as texts
from internlm_ds.preprocess import provenance
from internlm_ds.preprocess.blocks import BLOCK_BYTES, text_pieces
from internlm_ds.preprocess.engine.select import EngineName, row_encoder
from internlm_ds.preprocess.files import SourceFile
from internlm_ds.preprocess.longtext import cuts_of
from internlm_ds.preprocess.pipeline import LongRow, PieceEncoder, largest_id
from internlm_ds.preprocess.shards import shard_path
from internlm_ds.preprocess.tokenizers import Tokenizer, open_tokenizer

try:
    from datatrove.data import Document
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.readers.base import BaseDiskReader
except ImportError:
    raise MissingExtraError("datatrove", extra="datatrove", needed_for="internlm_ds.preprocess.datatrove") from None

__all__ = ["BinWriter", "RowTokenizer", "TextReader", "TokenRow"]

ROW = "internlm_ds_row"  # where a document carries its row


class TokenRow(NamedTuple):
    """A sample as it stands in a bin.

    Attributes:
        line: `{"tokens": [...]}` with its newline.
        num_tokens: bos and eos counted.
        origin: Facts on the tokenizer, for the provenance file.
    """

    line: bytes
    num_tokens: int
    origin: dict[str, Any]


class TextReader(BaseDiskReader):  # type: ignore[misc]
    """Documents of .txt, .json and .jsonl files (also .gz, .zst) of a local folder, as `preprocess text` reads them.

    Args:
        data_folder: Folder of the inputs; each task takes its share of its files.
        text_key: Field of JSON records that holds the text; None: `text`, then `content`.
        glob_pattern, recursive, limit: As in datatrove's readers.

    Blank texts are left out. A document's id is its file and line; `file_path` and `line` are in its metadata.

    Raises:
        DataFormatError: While reading, with file and line.
    """

    name = "internlm-ds texts"

    def __init__(
        self,
        data_folder: Any,
        *,
        text_key: str | None = None,
        glob_pattern: str | None = None,
        recursive: bool = True,
        limit: int = -1,
    ):
        super().__init__(data_folder, glob_pattern=glob_pattern, recursive=recursive, limit=limit)
        self.text_field = text_key
        if not self.data_folder.is_local():
            message = "TextReader reads local folders; for others take one of datatrove's readers"
            raise DataFormatError(message, path=str(data_folder))

    def read_file(self, filepath: str) -> Iterator[Document]:
        path = self.data_folder.resolve_paths(filepath)
        for found in texts.read_documents(SourceFile(path), text_key=self.text_field):
            if found.text and not found.text.isspace():
                metadata = {"file_path": path, "line": found.line}
                yield Document(text=found.text, id=f"{filepath}/{found.line}", metadata=metadata)


class RowTokenizer(PipelineStep):  # type: ignore[misc]
    """Tokenizes documents; `BinWriter` behind it finds the row of each in its metadata.

    Args:
        tokenizer: Model file, readable on every machine.
        bos, eos: Put the model's piece before, behind each sample.
        engine: See `engine.select`.

    Documents without text or tokens go no further.
    """

    name = "internlm-ds rows"
    type = "🔢 - TOKENIZER"

    def __init__(
        self,
        tokenizer: str | os.PathLike[str],
        *,
        bos: bool = False,
        eos: bool = False,
        engine: EngineName = "auto",
    ):
        super().__init__()
        self.model, self.bos, self.eos, self.engine = os.fspath(tokenizer), bos, eos, engine

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Documents with rows, in their order. The model is opened here: steps travel to other machines."""
        rows = _Rows(open_tokenizer(self.model), bos=self.bos, eos=self.eos, engine=self.engine)
        held: list[Document] = []
        size = 0
        for document in data or ():
            held.append(document)
            size += len(document.text)
            if size >= BLOCK_BYTES:
                yield from self._with_rows(held, rows)
                held, size = [], 0
        yield from self._with_rows(held, rows)

    def _with_rows(self, documents: Sequence[Document], rows: _Rows) -> Iterator[Document]:
        filled = [document for document in documents if document.text and not document.text.isspace()]
        for document, row in zip(filled, rows.encode([document.text for document in filled])):
            if row.num_tokens > rows.num_ends:
                document.metadata[ROW] = row
                document.metadata["token_count"] = row.num_tokens
                self.stat_update("tokens", value=row.num_tokens)
                yield document


class _Rows:
    """A model at work in one task."""

    def __init__(self, tokenizer: Tokenizer, *, bos: bool, eos: bool, engine: EngineName):
        before, behind = [tokenizer.bos_id] if bos else [], [tokenizer.eos_id] if eos else []
        self.num_ends = len(before) + len(behind)
        encoder = row_encoder(tokenizer, before=before, behind=behind, engine=engine)
        self._encode = PieceEncoder(encoder, self.num_ends, keep_empty=True)
        self._long = LongRow(before=before, behind=behind)
        self._cuts = lambda: cuts_of(tokenizer)
        settings = {"bos": bos, "eos": eos, "text_key": None, "compat": None}
        self._origin = provenance.describe(tokenizer, kind="text", settings=settings, sources=[], counts={})

    def encode(self, strings: Sequence[str]) -> Iterator[TokenRow]:
        """The row of each text."""
        numbered = (texts.Document(text, 0) for text in strings)
        parts: list[bytes] = []
        for piece in text_pieces(numbered, "", self._cuts, BLOCK_BYTES):
            rows = self._encode(piece).rows
            if piece.kind != "part":
                data, at = memoryview(rows.data), 0
                for size, length in zip(rows.sizes.tolist(), rows.lengths.tolist()):
                    yield TokenRow(bytes(data[at : at + size]), length, self._origin)
                    at += size
                continue
            parts.append(self._long.bytes_of(rows, begins=piece.begins, ends=piece.ends))
            if piece.ends:
                yield TokenRow(b"".join(parts), self._long.num_tokens, self._origin)
                parts = []


class BinWriter(PipelineStep):  # type: ignore[misc]
    """Writes the rows of a task to a bin with meta and provenance, which appear whole when the task ends.

    Args:
        output_folder: Local or shared folder, named after the type of the data.
        name: Task 3 writes `NAME-00003.bin`; one that is run again replaces its bin. A task without documents writes
            none.

    Raises:
        DataFormatError: A document carries no row: `RowTokenizer` must stand before.
    """

    name = "internlm-ds bins"
    type = "💽 - WRITER"

    def __init__(self, output_folder: str | os.PathLike[str], *, name: str = "data"):
        super().__init__()
        self.output_folder, self.output_name = os.fspath(output_folder), name

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        documents = iter(data or ())
        first = next(documents, None)
        if first is None:
            return
        counted: dict[str, dict[str, Any]] = {}
        path = shard_path(Path(self.output_folder) / f"{self.output_name}.bin", rank)
        with Writer(path, overwrite=True) as writer:
            largest, origin, document = -1, _row(first, path).origin, first
            while document is not None:
                row = _row(document, path)
                writer.write_line(row.line, row.num_tokens)
                largest = max(largest, largest_id(row.line))
                source = str(document.metadata.get("file_path", "unknown"))
                _count(counted, source, row.num_tokens)
                del document.metadata[ROW]
                self.stat_update("samples")
                yield document
                document = next(documents, None)
            counts = {"samples": writer.num_samples, "tokens": writer.num_tokens, "empty": 0}
            counts |= {"bytes": writer.num_bytes, "largest_id": largest}
            record = {**origin, "sources": list(counted.values()), "counts": counts}
            writer.put_beside(provenance.SUFFIX, provenance.encode(record))


def _row(document: Document, path: Path) -> TokenRow:
    row = document.metadata.get(ROW)
    if not isinstance(row, TokenRow):
        message = f"document {document.id} carries no tokens; put RowTokenizer before BinWriter"
        raise DataFormatError(message, path=str(path))
    return row


def _count(counted: dict[str, dict[str, Any]], source: str, tokens: int) -> None:
    empty = {"path": source, "bytes": None, "sha256": None, "samples": 0, "tokens": 0, "empty": 0}
    entry = counted.setdefault(source, empty)
    entry["samples"] += 1
    entry["tokens"] += tokens

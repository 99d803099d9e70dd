"""A run over text inputs: pieces in, rows out, counted and noted, from the beginning or from where another stopped."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess.blocks import BLOCK_BYTES, Piece, pieces, split, text_pieces
from internlm_ds.preprocess.documents import read_reference_documents
from internlm_ds.preprocess.files import SourceFile, split_name
from internlm_ds.preprocess.journal import Journal
from internlm_ds.preprocess.longtext import Cuts, cuts_of
from internlm_ds.preprocess.pipeline import Encoded, LongRow, PieceEncoder, give_back_memory, in_order
from internlm_ds.preprocess.progress import Progress
from internlm_ds.preprocess.rows import RowEncoder
from internlm_ds.preprocess.shards import Shards
from internlm_ds.preprocess.tokenizers import Tokenizer

_SAMPLED_FILES, _SAMPLE_BYTES = 16, 1 << 14
_TRIM_EVERY = 128


class Place(NamedTuple):
    """A piece in its source: how many come before it, the check sum of the text up to its end, bytes of files read."""

    piece: Piece
    source: int
    number: int
    crc: int
    bytes_read: int


class TextReader:
    """Pieces of all inputs.

    Attributes:
        sources: The inputs, in order.
        done: For each source read to its end: size and hash of the file.

    Args:
        compat: Read as the reference does.
        state: `done`, `source`, `pieces`, `crc` of a journal: pieces before are passed over.
    """

    def __init__(
        self,
        sources: Sequence[SourceFile],
        tokenizer: Tokenizer,
        *,
        text_key: str | None,
        compat: bool,
        block_bytes: int = BLOCK_BYTES,
        state: Mapping[str, Any] | None = None,
    ):
        self.sources, self.text_key, self._compat, self._block_bytes = sources, text_key, compat, block_bytes
        self._tokenizer = tokenizer
        self._from = (state["source"], state["pieces"], state["crc"]) if state else (0, 0, 0)
        self.done: list[dict[str, Any]] = list(state["done"])[: self._from[0]] if state else []
        self._check_done()

    def read(self) -> Iterator[Place]:
        """All pieces that are not in the bins yet.

        Raises:
            DataFormatError: An input is unusable, or is not what it was when it was read the first time.
        """
        first, passed_over, expected = self._from
        bytes_before = sum(source.num_bytes for source in self.sources[:first])
        for index, source in enumerate(self.sources[first:], start=first):
            crc = number = 0
            for number, piece in enumerate(self.pieces(source), start=1):
                crc = _checksum(piece, crc)
                if index > first or number > passed_over:
                    yield Place(piece, index, number, crc, bytes_before + source.bytes_read)
                elif number == passed_over and crc != expected:
                    raise self._changed(source.path)
            if index == first and passed_over and number < passed_over:
                raise self._changed(source.path)
            bytes_before += source.num_bytes
            modified = os.stat(source.path).st_mtime_ns
            self.done.append({"bytes": source.bytes_read, "sha256": source.sha256, "modified": modified})

    def pieces(self, source: SourceFile, *, block_bytes: int | None = None) -> Iterator[Piece]:
        size = block_bytes or self._block_bytes
        if self._compat:
            return text_pieces(read_reference_documents(source), source.path, lambda: None, size)
        return pieces(source, text_key=self.text_key, cuts=lambda: self._cuts, block_bytes=size)

    def text_bytes(self) -> int | None:
        """Bytes of text to come; None where files are compressed."""
        if any(split_name(source.path)[1] for source in self.sources):
            return None
        return sum(source.num_bytes for source in self.sources[self._from[0] :])

    def sample(self) -> list[str]:
        """Some texts of the first inputs, to try an encoder on; what cannot be read is left to its turn."""
        texts: list[str] = []
        for source in self.sources[:_SAMPLED_FILES]:
            try:
                piece = next(self.pieces(SourceFile(source.path), block_bytes=_SAMPLE_BYTES), None)
                block = split(piece, text_key=self.text_key).block if piece else None
            except DataFormatError:
                continue
            if block:
                texts += [block.text[b:e].decode() for b, e in zip(block.begins.tolist(), block.ends.tolist())]
        return texts

    @cached_property
    def _cuts(self) -> Cuts | None:
        return cuts_of(self._tokenizer)

    def _check_done(self) -> None:
        for source, known in zip(self.sources, self.done):
            if source.num_bytes == known["bytes"] and os.stat(source.path).st_mtime_ns == known["modified"]:
                continue
            if source.num_bytes != known["bytes"] or source.hash_whole() != known["sha256"]:
                raise self._changed(source.path)

    def _changed(self, path: str) -> DataFormatError:
        message = (
            "cannot resume: this input is not what it was when the first part was made; start over without --resume"
        )
        return DataFormatError(message, path=path)


def _checksum(piece: Piece, crc: int) -> int:
    if isinstance(piece.data, bytes):
        return zlib.crc32(piece.data, crc)
    for text in piece.data:
        crc = zlib.crc32(text.encode("utf-8", "surrogatepass"), crc)
    return crc


class TextRun:
    """Carries the pieces of a reader through an encoder into shards.

    Args:
        ends: Ids before and behind each text, as the encoder puts them.
        keep_empty: Texts without tokens are samples too.
    """

    def __init__(
        self,
        reader: TextReader,
        encoder: RowEncoder,
        shards: Shards,
        *,
        ends: tuple[Sequence[int], Sequence[int]],
        keep_empty: bool,
        workers: int,
        journal: Journal,
        progress: Progress,
    ):
        self._reader, self._shards, self._journal, self._progress = reader, shards, journal, progress
        self._work = PieceEncoder(encoder, len(ends[0]) + len(ends[1]), reader.text_key, keep_empty)
        self._workers = workers
        self._long = LongRow(before=ends[0], behind=ends[1])
        self._tokens = 0  # of this process

    def run(self) -> None:
        """Write all rows."""
        work: Callable[[Place], Encoded] = lambda place: self._work(place.piece)  # noqa: E731
        for place, encoded in in_order(self._reader.read(), work, workers=self._workers):
            self._write(place, encoded)
            self._progress.update(place.bytes_read, tokens=self._tokens)
            if place.number % _TRIM_EVERY == 0:
                give_back_memory()
            if place.piece.ends and self._journal.is_due():
                self._journal.note(self._state(place), self._shards.handles())
        self._progress.finish()

    def _write(self, place: Place, encoded: Encoded) -> None:
        rows, piece = encoded.rows, place.piece
        self._tokens += int(rows.lengths.sum())
        if piece.kind != "part":
            self._shards.add(rows, source=place.source, empty=encoded.empty)
            return
        data = self._long.bytes_of(rows, begins=piece.begins, ends=piece.ends)
        self._shards.add_part(data, source=place.source, begins=piece.begins, largest=rows.largest_id)
        if piece.ends:
            self._shards.end_row(self._long.num_tokens, source=place.source)

    def _state(self, place: Place) -> dict[str, Any]:
        done = self._reader.done[: place.source]
        position = {"source": place.source, "pieces": place.number, "crc": place.crc, "done": done}
        return {**position, **self._shards.state()}

"""Input files as text: globs, compression by ending, UTF-8 with line numbers, sizes and hashes on the way.

What stands in the text (lines, JSON) is read by `documents`; this file knows bytes and their encoding only.
"""

from __future__ import annotations

import glob
import hashlib
import io
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

from internlm_ds.errors import DataFormatError

KINDS = ("txt", "json", "jsonl")
_COMPRESSIONS = ("gz", "zst")
_CHUNK_BYTES = 1 << 18
# a decoder gets this much at once: a few bytes of a compressed file may stand for megabytes of text
_FEED_BYTES = 1 << 11


def expand_inputs(patterns: Sequence[str]) -> list[str]:
    """Files behind paths and globs, in the order given, matches of one glob sorted; a file is taken once.

    Raises:
        DataFormatError: A path does not exist, is a folder, or a glob matches no file.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        for path in [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True)) or [pattern]:
            if os.path.isdir(path) and path != pattern:
                continue  # a folder that a glob like `data/*` happens to match
            if os.path.isdir(path):
                raise DataFormatError(
                    f"is a folder; name its files, such as '{os.path.join(path, '*.jsonl')}'", path=path
                )
            if not os.path.exists(path):
                what = "no file matches this pattern" if glob.has_magic(path) else "no such input file"
                raise DataFormatError(what, path=path)
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise DataFormatError(f"no input file among {', '.join(patterns) or 'nothing'}")
    return list(found.values())


def split_name(path: str) -> tuple[str, str | None]:
    """Format and compression by the endings of a name, e.g. ("jsonl", "gz"); the format is "" where it has none.

    >>> split_name("a/b.jsonl.zst"), split_name("c.txt")
    (('jsonl', 'zst'), ('txt', None))
    """
    stem, ending = os.path.splitext(os.path.basename(path))
    compression = ending[1:].lower()
    if compression in _COMPRESSIONS:
        return os.path.splitext(stem)[1][1:].lower(), compression
    return compression, None


def text_kind(path: str) -> str:
    """ "txt", "json" or "jsonl".

    Raises:
        DataFormatError: The name ends in something else.
    """
    kind, _ = split_name(path)
    if kind not in KINDS:
        ending = f".{kind}" if kind else "no ending"
        message = (
            f"cannot tell the format of this input ({ending}); supported: .txt, .json, .jsonl, each also .gz or .zst"
        )
        raise DataFormatError(message, path=path)
    return kind


class SourceFile:
    """One input while it is read: its text, how far reading is, its size and hash afterwards.

    Attributes:
        path: As given.
        num_bytes: Size on disk.
        bytes_read: Bytes of the file (compressed, if it is) read so far.
    """

    def __init__(self, path: str):
        self.path = path
        self.num_bytes = os.path.getsize(path)
        self._hash = hashlib.sha256()
        self.bytes_read = 0

    @property
    def sha256(self) -> str:
        """Hex digest of what was read; of the whole file once the text has been read to its end."""
        return self._hash.hexdigest()

    def open(self) -> IO[str]:
        """The text from its beginning; `\\r\\n` and `\\r` arrive as `\\n`, bytes that are no UTF-8 as lone surrogates.

        Raises:
            DataFormatError: Here, if the file cannot be opened; while reading, if it is damaged.
        """
        file = self._opened()
        raw = _ChunkStream(self._chunks(file), file)
        return io.TextIOWrapper(io.BufferedReader(raw, _CHUNK_BYTES), encoding="utf-8", errors="surrogateescape")

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the text from its beginning, in pieces of no particular size.

        Raises:
            DataFormatError: The file cannot be opened or is damaged.
        """
        with self._opened() as file:
            yield from self._chunks(file)

    def hash_whole(self) -> str:
        """`sha256` of the file, read now."""
        with self._opened() as file:
            for _ in self._raw_chunks(file):
                pass
        return self.sha256

    def _opened(self) -> IO[bytes]:
        self._hash, self.bytes_read = hashlib.sha256(), 0
        try:
            return open(self.path, "rb", buffering=0)
        except OSError as error:
            raise DataFormatError(f"cannot be read: {error.strerror}", path=self.path) from None

    def _chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        _, compression = split_name(self.path)
        chunks = self._raw_chunks(file)
        return self._decompressed(chunks, compression) if compression else chunks

    def _raw_chunks(self, file: IO[bytes]) -> Iterator[bytes]:
        while chunk := self._read(file):
            self._hash.update(chunk)
            self.bytes_read += len(chunk)
            yield chunk

    def _read(self, file: IO[bytes]) -> bytes:
        try:
            return file.read(_CHUNK_BYTES)
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise DataFormatError(message, path=self.path, offset_bytes=self.bytes_read) from None

    def _decompressed(self, chunks: Iterator[bytes], compression: str) -> Iterator[bytes]:
        """Text of all members or frames; a cut one is an error, never a short text."""
        decoder: Any = None
        members = 0
        try:
            for rest in (chunk[i : i + _FEED_BYTES] for chunk in chunks for i in range(0, len(chunk), _FEED_BYTES)):
                while rest:
                    if decoder is None:
                        # gzip allows zero bytes behind a member
                        rest = rest.lstrip(b"\0") if compression == "gz" and members else rest
                        if not rest:
                            break
                        decoder, members = _decoder(compression), members + 1
                    yield decoder.decompress(rest)
                    rest = decoder.unused_data if decoder.eof else b""
                    decoder = None if decoder.eof else decoder
        except (zlib.error, _zstd_error()) as error:
            raise self._damaged(compression, str(error)) from None
        if decoder is not None:
            raise self._damaged(compression, "it ends in the middle of the compressed data")

    def _damaged(self, compression: str, what: str) -> DataFormatError:
        message = f"damaged .{compression} file ({what}); fetch or compress it again"
        return DataFormatError(message, path=self.path, offset_bytes=self.bytes_read)


class _ChunkStream(io.RawIOBase):
    """Pieces of bytes as a readable file, so that `TextIOWrapper` can decode them."""

    def __init__(self, chunks: Iterator[bytes], file: IO[bytes]):
        self._pieces, self._file, self._rest = chunks, file, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def numbered_lines(stream: IO[str], *, path: str, keep_bom: bool = False) -> Iterator[tuple[int, str]]:
    """Lines with their ends, and their numbers from 1.

    Args:
        keep_bom: Leave a byte order mark at the beginning of the text, as the reference does.

    Raises:
        DataFormatError: A line is not UTF-8.
    """
    for number, line in enumerate(stream, start=1):
        check_utf8(line, path=path, line=number)
        yield number, line.removeprefix("\ufeff") if number == 1 and not keep_bom else line


def check_utf8(text: str, *, path: str, line: int) -> None:
    """Refuse a text that holds bytes which are no UTF-8; `line` is the number of its first line."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        line += text.count("\n", 0, error.start)
        found = ord(text[error.start]) - 0xDC00
        raise not_utf8(found, path=path, line=line) from None


def not_utf8(byte: int, *, path: str, line: int) -> DataFormatError:
    return DataFormatError(f"byte 0x{byte:02x} is no UTF-8; save the file as UTF-8", path=path, line=line)


def _decoder(compression: str) -> Any:
    if compression == "gz":
        return zlib.decompressobj(wbits=31)  # 31: a gzip header and check sum
    import zstandard

    return zstandard.ZstdDecompressor().decompressobj()


def _zstd_error() -> type[Exception]:
    import zstandard

    return zstandard.ZstdError

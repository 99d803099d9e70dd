"""Hugging Face's side: Parquet files and folders of `datasets.save_to_disk`, through pyarrow (extra `datasets`).

Columns as transformers names them: `input_ids` (a list of ids for each sample) and, if something is not learned,
`labels`: the same ids, −100 where the token is no target. As in transformers, labels are not shifted. What
preprocessing recorded is in the file's metadata.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from internlm_ds.data.binformat import sync_folder, temporary_name, write_whole
from internlm_ds.data.foreign.blocks import Block, FileTarget, Source, TokenDtype, WholeFiles, checked_ids, file_sizes
from internlm_ds.errors import DataFormatError, MissingExtraError

IDS, LABELS, IGNORED = "input_ids", "labels", -100
_COLUMNS = (IDS, "tokens")
_NOTE_KEY = b"internlm_ds"
_ROWS = 1024
_REMEDY = "copy it again, or write it again with the tool that made it"
STATE = "state.json"


def arrow() -> Any:
    """pyarrow.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", extra="datasets", needed_for="reading and writing Parquet") from None
    return pyarrow


def read_parquet(path: str) -> Source:
    """
    Raises:
        DataFormatError: The file is missing, damaged, or holds no ids; here or when it is read.
    """
    pa = arrow()
    if not os.path.isfile(path):
        raise DataFormatError("no such file", path=path)
    try:
        file = pa.parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None
    columns = _columns(file.schema_arrow, path)

    def batches() -> Iterator[Any]:
        with pa.parquet.ParquetFile(path) as again:
            yield from again.iter_batches(batch_size=_ROWS, columns=columns)

    note = _note((file.schema_arrow.metadata or {}).get(_NOTE_KEY))
    rows = int(file.metadata.num_rows)
    return Source(
        path, file_sizes(path), rows, lambda: len(columns) > 1, note, lambda: _blocks(batches(), columns, path)
    )


def read_datasets(path: str) -> Source:
    """A folder that `datasets.Dataset.save_to_disk` wrote.

    Raises:
        DataFormatError: It is none, or damaged; here or when it is read.
    """
    pa = arrow()
    state_path = os.path.join(path, STATE)
    try:
        state = json.loads(Path(state_path).read_text(encoding="utf-8"))
        files = [os.path.join(path, entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"no folder of datasets.save_to_disk ({type(error).__name__}: {error}); {_REMEDY}"
        raise DataFormatError(message, path=state_path) from None
    if state.get("_indices_files"):
        message = "rows are chosen by an index; call .flatten_indices() before .save_to_disk()"
        raise DataFormatError(message, path=state_path)
    schemas = [_opened(pa, file) for file in files]
    if not schemas:
        raise DataFormatError("it names no data files", path=state_path)
    columns = _columns(schemas[0][0], files[0])

    def blocks() -> Iterator[Block]:
        for file in files:
            yield from _blocks(_stream(pa, file), columns, file)

    note = _note((schemas[0][0].metadata or {}).get(_NOTE_KEY))
    rows = sum(rows for _, rows in schemas)
    return Source(path, file_sizes(*files), rows, lambda: len(columns) > 1, note, blocks)


class ParquetTarget(FileTarget):
    """One Parquet file, a row group for each block."""

    def __init__(self, path: str, *, masked: bool, dtype: TokenDtype, note: dict[str, Any] | None, overwrite: bool):
        pa = arrow()
        super().__init__(WholeFiles([Path(path)], overwrite=overwrite))
        self._rows = _Rows(path, masked=masked, dtype=dtype, note=note)
        self._writer = pa.parquet.ParquetWriter(self.files[0], self._rows.schema, compression="zstd")

    def write(self, block: Block) -> None:
        self._writer.write_batch(self._rows.batch(block))

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            self._writer.close()
        finally:
            super().__exit__(kind, *rest)


class DatasetsTarget:
    """A folder that `datasets.load_from_disk` opens: one Arrow file, its features and its state."""

    def __init__(self, path: str, *, masked: bool, dtype: TokenDtype, note: dict[str, Any] | None, overwrite: bool):
        pa = arrow()
        self._path, self._overwrite = Path(path), overwrite
        if self._path.exists() and not overwrite:
            raise DataFormatError("the output exists; --overwrite replaces it", path=path)
        if self._path.exists() and not (self._path / STATE).is_file():
            raise DataFormatError("the output exists and is no data set's folder; name another one", path=path)
        self._folder = temporary_name(self._path)
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._rows = _Rows(path, masked=masked, dtype=dtype, note=note)
        self._name = "data-00000-of-00001.arrow"
        self._writer = pa.ipc.new_stream(str(self._folder / self._name), self._rows.schema)

    def write(self, block: Block) -> None:
        self._writer.write_batch(self._rows.batch(block))

    def __enter__(self) -> DatasetsTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._writer.close()
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _commit(self) -> None:
        with open(self._folder / self._name, "rb") as file:
            os.fsync(file.fileno())
        feature = {"feature": {"dtype": self._rows.dtype, "_type": "Value"}, "_type": "Sequence"}
        info: dict[str, Any] = {"citation": "", "description": "", "homepage": "", "license": ""}
        info["features"] = {name: feature for name in self._rows.schema.names}
        state: dict[str, Any] = {
            "_data_files": [{"filename": self._name}],
            "_fingerprint": "internlm-ds",
            "_format_columns": None,
        }
        state |= {"_format_kwargs": {}, "_format_type": None, "_output_all_columns": False, "_split": None}
        write_whole(self._folder / "dataset_info.json", json.dumps(info, indent=2).encode())
        write_whole(self._folder / STATE, json.dumps(state, indent=2).encode())
        if self._path.exists():
            shutil.rmtree(self._path)
        os.rename(self._folder, self._path)
        sync_folder(self._path.parent)


class _Rows:
    """Blocks as Arrow's record batches."""

    def __init__(self, path: str, *, masked: bool, dtype: TokenDtype, note: dict[str, Any] | None):
        self._arrow = pa = arrow()
        self._path, self._masked, self._samples = path, masked, 0
        # labels hold -100
        self.dtype: TokenDtype = "int32" if dtype == "uint16" and masked else dtype
        kind = pa.list_(pa.type_for_alias(self.dtype))
        about = json.dumps({"note": note}, ensure_ascii=False).encode()
        self.schema = pa.schema([(name, kind) for name in ((IDS, LABELS) if masked else (IDS,))], {_NOTE_KEY: about})

    def batch(self, block: Block) -> Any:
        pa = self._arrow
        ids = checked_ids(block, self.dtype, path=self._path, first_sample=self._samples)
        self._samples += len(block.lengths)
        borders = pa.array(np.concatenate([[0], np.cumsum(block.lengths)]).astype(np.int32))
        columns = [ids]
        if self._masked:
            columns.append(ids if block.learned is None else np.where(block.learned, ids, ids.dtype.type(IGNORED)))
        arrays = [pa.ListArray.from_arrays(borders, pa.array(column)) for column in columns]
        return pa.record_batch(arrays, schema=self.schema)


def _columns(schema: Any, path: str) -> list[str]:
    """Names of the column of ids and, if there is one, of the labels."""
    pa = arrow()
    ids = next((name for name in _COLUMNS if name in schema.names), None)
    if ids is None:
        has = ", ".join(schema.names[:8]) or "none"
        raise DataFormatError(f"no column {' or '.join(_COLUMNS)}; its columns: {has}", path=path)
    columns = [ids, *([LABELS] if LABELS in schema.names else [])]
    for name in columns:
        kind = schema.field(name).type
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
        if not lists or not pa.types.is_integer(kind.value_type):
            raise DataFormatError(
                f"the column {name} is {kind}; a list of integers for each sample is needed", path=path
            )
    return columns


def _blocks(batches: Iterable[Any], columns: list[str], path: str) -> Iterator[Block]:
    """
    Raises:
        DataFormatError: With file and row.
    """
    pa = arrow()
    row = 0
    try:
        for batch in batches:
            block = _block(batch, columns, path=path, first_row=row)
            row += batch.num_rows
            yield block
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error, row=row + 1) from None


def _block(batch: Any, columns: list[str], *, path: str, first_row: int) -> Block:
    ids, lengths = _flat(batch.column(columns[0]), path=path, name=columns[0], first_row=first_row)
    if (ids < 0).any():
        row = _row_of(int(np.argmax(ids < 0)), lengths, first_row)
        raise DataFormatError(f"row {row} has an id below 0 in {columns[0]}; mask with labels instead", path=path)
    if len(columns) == 1:
        return Block(ids, None, lengths)
    labels, label_lengths = _flat(batch.column(LABELS), path=path, name=LABELS, first_row=first_row)
    if not np.array_equal(lengths, label_lengths):
        row = first_row + int(np.argmax(lengths != label_lengths)) + 1
        raise DataFormatError(f"row {row} has another number of {LABELS} than of {columns[0]}", path=path)
    learned = labels != IGNORED
    if (wrong := learned & (labels != ids)).any():
        at = int(np.argmax(wrong))
        row = _row_of(at, lengths, first_row)
        message = f"row {row} has the label {labels[at]} at the id {ids[at]}; a label is the id itself or {IGNORED}"
        raise DataFormatError(f"{message} (labels are not shifted)", path=path)
    return Block(ids, learned, lengths)


def _flat(column: Any, *, path: str, name: str, first_row: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Values of all lists behind one another and the lists' lengths, both int64."""
    import pyarrow.compute as pc

    values = column.flatten()
    if column.null_count or values.null_count:
        known = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        empty = np.asarray(column.is_null()) if column.null_count else None
        at = int(np.argmax(empty)) if empty is not None else -1
        row = first_row + at + 1 if at >= 0 else _row_of(int(np.argmax(np.asarray(values.is_null()))), known, first_row)
        raise DataFormatError(f"row {row} has nothing (null) in {name}", path=path)
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
    return values.to_numpy(zero_copy_only=False).astype(np.int64), lengths


def _row_of(index: int, lengths: npt.NDArray[Any], first_row: int) -> int:
    return first_row + int(np.searchsorted(np.cumsum(lengths), index, side="right")) + 1


def _stream(pa: Any, path: str) -> Iterator[Any]:
    # not mapped: what was read would pile up as this process's memory
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        yield from reader


def _opened(pa: Any, path: str) -> tuple[Any, int]:
    """Schema and rows of an Arrow file."""
    if not os.path.isfile(path):
        raise DataFormatError("no such file", path=path)
    try:
        with pa.memory_map(path) as file, pa.ipc.open_stream(file) as reader:
            return reader.schema, sum(batch.num_rows for batch in reader)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(path, error) from None


def _note(value: bytes | None) -> dict[str, Any] | None:
    try:
        note = json.loads(value or b"{}").get("note")
    except (ValueError, AttributeError):
        return None
    return note if isinstance(note, dict) else None


def _damaged(path: str, error: Exception, *, row: int | None = None) -> DataFormatError:
    where = f" at or behind row {row}" if row is not None else ""
    message = f"damaged{where} ({str(error).splitlines()[0]}); {_REMEDY}"
    return DataFormatError(message, path=path, offset_bytes=file_sizes(path) if row is None else None)

"""One call of `pretrain.tokenize_texts` against the disk: what is there already, and what becomes of it.

The flow: take the output, go on from a journal or begin, run (`textrun`), record (`textrecords`), publish (`shards`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from internlm_ds.data.binmeta import check_output
from internlm_ds.data.partial import PartialOutput
from internlm_ds.errors import DataFormatError
from internlm_ds.preprocess import journal as journals
from internlm_ds.preprocess import provenance
from internlm_ds.preprocess.engine.plain_rows import PlainRows
from internlm_ds.preprocess.engine.select import row_encoder
from internlm_ds.preprocess.files import SourceFile
from internlm_ds.preprocess.options import TextOptions, Work
from internlm_ds.preprocess.pipeline import Verified
from internlm_ds.preprocess.progress import Progress
from internlm_ds.preprocess.rows import RowEncoder
from internlm_ds.preprocess.shards import Shards, existing_outputs, publish, shard_path, write_records
from internlm_ds.preprocess.textrecords import Summary, complete_summary, records_of, summary_of
from internlm_ds.preprocess.textrun import TextReader, TextRun
from internlm_ds.preprocess.tokenizers import PlainEncoder, ReferenceEncoder, Tokenizer

_MAX_WORKERS = 16


@dataclass(frozen=True)
class TextTask:
    """A call, its arguments checked one by one but not yet against the disk."""

    output: Path
    sources: Sequence[SourceFile]
    tokenizer: Tokenizer
    options: TextOptions
    work: Work
    append: bool
    overwrite: bool
    warn: Callable[[str], None]
    progress_to: IO[str] | None

    def do(self, *, about_output: Callable[[], None]) -> Summary:
        """All of it; `about_output` is called before anything is written.

        Raises: what `tokenize_texts` raises.
        """
        partial = PartialOutput(self.output)
        if not (self.work.resume and partial.folder.exists()):
            if done := self._complete():
                return done
            self._check_output()
        about_output()
        partial.open()
        try:
            summary = self._with_output(partial)
        except BaseException as error:
            if (self.work.resume or isinstance(error, KeyboardInterrupt)) and partial.read_journal():
                self.warn(f"{partial.folder} keeps what is done; --resume goes on from there")
                partial.leave()
            raise
        finally:
            partial.discard()
        return summary

    def _with_output(self, partial: PartialOutput) -> Summary:
        found = partial.read_journal() if self.work.resume else None
        if found:
            journals.check_same_plan(found.get("plan", {}), self._plan(), path=str(self.output))
            if found["stage"] == "publishing":
                publish(partial, count=found["count"], sharded=self.work.shard_bytes is not None)
                return complete_summary(self._targets(found["count"]))
            return self._run(partial, found)
        if done := self._complete():
            return done
        self._check_output()  # again: another process may have finished it before it gave up the lock
        partial.clear()
        return self._run(partial, None)

    def _run(self, partial: PartialOutput, state: dict[str, Any] | None) -> Summary:
        earlier = self._earlier_record()
        reader, shards = self._reader(state), self._shards(partial, state)
        journal = journals.Journal(partial, self._plan(), interval_s=self.work.journal_s)
        try:
            self._carry(reader, shards, journal, self._progress(state))
            sizes = shards.finish()
            if not earlier and (kept := shards.kept).num_samples:
                earlier = provenance.unrecorded(self.output, samples=kept.num_samples, tokens=kept.num_tokens)
            settings, tallies = self.options.settings(), shards.tallies
            records = records_of(self.tokenizer, settings, reader, tallies, sizes, self.work.shard_bytes)
            records[0] = provenance.extended(earlier, records[0]) if earlier else records[0]
            write_records(partial, [provenance.encode(record) for record in records])
            journal.publishing(count=len(sizes))
        finally:
            journal.stop()
            shards.close()
        publish(partial, count=len(sizes), sharded=self.work.shard_bytes is not None)
        summary = summary_of(self._targets(len(sizes)), tallies, sizes)
        if not summary.samples:
            self.warn(f"{self.output}: no sample was written, the inputs hold no text")
        return summary

    def _earlier_record(self) -> dict[str, Any] | None:
        """What is known of a bin that grows."""
        earlier = provenance.read(self.output) if self.append and self.output.exists() else None
        if earlier:
            bos, eos = self.options.bos, self.options.eos
            provenance.check_same_tokens(earlier, self.tokenizer, bos=bos, eos=eos, path=self.output)
        return earlier

    def _reader(self, state: dict[str, Any] | None) -> TextReader:
        options, size = self.options, self.work.block_bytes
        settings: dict[str, Any] = {"text_key": options.text_key, "compat": options.compat, "block_bytes": size}
        return TextReader(self.sources, self.tokenizer, state=state, **settings)

    def _shards(self, partial: PartialOutput, state: dict[str, Any] | None) -> Shards:
        # the reference's meta is int32, of shape (0,) where there is nothing
        kinds: dict[str, Any] = {"meta_dtype": "int64", "empty_meta": None}
        if self.options.compat:
            kinds = {"meta_dtype": "int32", "empty_meta": "int32"}
        return Shards(partial, shard_bytes=self.work.shard_bytes, append=self.append, state=state, **kinds)

    def _carry(self, reader: TextReader, shards: Shards, journal: journals.Journal, progress: Progress) -> None:
        tokenizer, options = self.tokenizer, self.options
        ends = ([tokenizer.bos_id] if options.bos else [], [tokenizer.eos_id] if options.eos else [])
        run = TextRun(
            reader,
            self._encoder(reader, ends),
            shards,
            ends=ends,
            keep_empty=options.compat,
            workers=self.work.workers or _all_cpus(),
            journal=journal,
            progress=progress,
        )
        run.run()

    def _plan(self) -> dict[str, Any]:
        """What another process must have in common with this one to go on from its journal."""
        options, work = self.options, self.work
        return {
            "--tokenizer": f"{self.tokenizer.name} ({self.tokenizer.sha256})",
            "--bos": options.bos,
            "--eos": options.eos,
            "--text-key": options.text_key,
            "--compat": "reference" if options.compat else None,
            "--append": self.append,
            "--shard-size": work.shard_bytes,
            "--verify": work.verify,
            "inputs": [f"{source.path} ({source.num_bytes} bytes)" for source in self.sources],
            "the block size": work.block_bytes,
            "the journal's format": 1,
        }

    def _complete(self) -> Summary | None:
        """With `resume`: what is said of an output that is whole, None if there is none.

        Raises:
            DataFormatError: It was made otherwise.
        """
        found = existing_outputs(self.output) if self.work.resume else []
        if not found:
            return None
        sharded = self.work.shard_bytes is not None
        expected = provenance.describe(
            self.tokenizer, kind="text", settings=self.options.settings(), sources=[], counts={}
        )
        inputs = [(source.path, source.num_bytes) for source in self.sources]
        reason = provenance.made_otherwise(found, expected, inputs, shard_bytes=self.work.shard_bytes)
        if reason is None and (found == [self.output]) != sharded:
            return complete_summary(found)
        if self.overwrite:
            return None
        what = reason or "it is in another number of bins"
        message = f"the output exists, and nothing says that this run made it: {what}. --overwrite replaces it"
        raise DataFormatError(message, path=str(found[0]))

    def _check_output(self) -> None:
        check_output(self.output, append=self.append, overwrite=self.overwrite)
        for path in existing_outputs(self.output):
            if path != self.output or self.work.shard_bytes is not None:
                check_output(path, append=False, overwrite=self.overwrite, can_append=False)

    def _targets(self, count: int) -> list[Path]:
        if self.work.shard_bytes is None:
            return [self.output]
        return [shard_path(self.output, index) for index in range(count)]

    def _progress(self, state: dict[str, Any] | None) -> Progress:
        earlier = sum(known["bytes"] for known in state["done"]) if state else 0
        total = sum(source.num_bytes for source in self.sources)
        return Progress(total, stream=self.progress_to, earlier_bytes=earlier)

    def _encoder(self, reader: TextReader, ends: tuple[Sequence[int], Sequence[int]]) -> RowEncoder:
        before, behind = ends
        encoder = row_encoder(
            self.tokenizer,
            before=before,
            behind=behind,
            sample=reader.sample(),
            num_bytes=reader.text_bytes(),
            compat=self.options.compat,
            engine=self.work.engine,
            warn=self.warn,
        )
        if not self.work.verify:
            return encoder
        ids = ReferenceEncoder(self.tokenizer) if self.options.compat else PlainEncoder(self.tokenizer)
        return Verified(encoder, PlainRows(ids, before=before, behind=behind), warn=self.warn)


def _all_cpus() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MAX_WORKERS, count)

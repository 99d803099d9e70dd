"""Text files to bins, for callers: one function, its options, and what is said about an output."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from internlm_ds.preprocess.files import SourceFile, expand_inputs, text_kind
from internlm_ds.preprocess.options import TextOptions, Work, check_wishes
from internlm_ds.preprocess.textrecords import Summary
from internlm_ds.preprocess.texttask import TextTask
from internlm_ds.preprocess.tokenizers import Tokenizer

__all__ = ["DATA_TYPES", "Summary", "TextOptions", "Work", "open_sources", "tokenize_texts", "warn_about_output"]

DATA_TYPES = ("cn", "en", "code", "ja", "ar", "kaoshi")


def tokenize_texts(
    inputs: Sequence[str],
    output: str | os.PathLike[str],
    *,
    tokenizer: Tokenizer,
    options: TextOptions = TextOptions(),
    work: Work = Work(),
    append: bool = False,
    overwrite: bool = False,
    warn: Callable[[str], None] = lambda text: None,
    progress_to: IO[str] | None = None,
) -> Summary:
    """Tokenize files and globs, in order, into `output`, its meta and its provenance file, or into shards of it.

    With `options.compat` an existing output is appended to, as the reference does, unless `overwrite` or `work.resume`.

    Raises:
        DataFormatError: An input or the output is unusable; then nothing has changed on disk, but for hidden parts
            that `work.resume` goes on from.
        TokenizerError: bos or eos is asked for and the model has none.
    """
    check_wishes(output, work, options, append=append, overwrite=overwrite)
    sources = open_sources(inputs)
    append = append or (options.compat and not overwrite and not work.resume)
    task = TextTask(Path(output), sources, tokenizer, options, work, append, overwrite, warn, progress_to)
    return task.do(about_output=lambda: warn_about_output(output, warn=warn))


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

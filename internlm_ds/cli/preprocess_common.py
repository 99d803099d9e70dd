"""What the tasks of `internlm-ds preprocess` and the scripts in `preprocessing/` share: options, the model, errors.

Parses and prints; the work is `internlm_ds.preprocess`'s, imported when it is to be done.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from internlm_ds.errors import DataFormatError


def add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    about = "sentencepiece model or tokenizer.json (default: $INTERNLM_DS_TOKENIZER)"
    parser.add_argument("--tokenizer", "--tokenizer_path", metavar="MODEL", help=about)


def add_overwrite(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")


def load_tokenizer(given: str | None, *, constant: str = "", folder: Path | None = None) -> Any:
    """The model that `tokenizers.find_model` finds, loaded.

    Raises:
        TokenizerError: There is none, or it is no model.
    """
    from internlm_ds.preprocess.tokenizers import find_model, open_tokenizer

    return open_tokenizer(find_model(given, environ=os.environ, constant=constant, folder=folder))


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


class FileErrors:
    """What the system refuses (no permission, disk full) becomes an error with the file's name."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            path = error.filename if isinstance(error.filename, str) else None
            raise DataFormatError(error.strerror or str(error), path=path) from error

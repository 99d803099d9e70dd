"""How a rank that failed ends: it tells the others, says why, and is gone. A rank that ends with it names the cause."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from functools import partial
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from internlm_ds.errors import InternlmDsError
from internlm_ds.monitor import log
from internlm_ds.parallel.first_failure import Failure, FirstFailure

logger = logging.getLogger(__name__)


def watch_peers(first: FirstFailure, *, rank: int) -> None:
    """From now on this rank notes in its log why a peer failed, and ends with it if it has not ended by itself."""
    first.watch(partial(end_for_peer, rank=rank, first=first), note=partial(_note_failure, rank=rank))


def end_process(error: Exception, *, rank: int, first: FirstFailure) -> NoReturn:
    """End this rank of several for an error that it alone raised.

    At once: at the interpreter's end communicators would be taken down whose operations never complete, and waited for.
    The last words are the cause: the traceback on the rank that failed first, one line that names it on the others.
    """
    text = f"{type(error).__name__}: {error}"
    failure = first.report(text, exit_code=getattr(error, "exit_code", 1))
    if failure.rank != rank:  # what broke here most likely follows from it
        end_for_peer(failure, rank=rank, first=first, broke=text)
    log_failure(error, rank=rank)
    plain = isinstance(error, InternlmDsError) and os.environ.get("INTERNLM_DS_DEBUG") != "1"
    shown = text if plain else "".join(traceback.format_exception(error)).rstrip()
    print(f"rank {rank}: {shown}", file=sys.stderr)
    _exit(failure, error, first=first)


def end_for_peer(failure: Failure, *, rank: int, first: FirstFailure, broke: str = "") -> NoReturn:
    """End this rank because another one failed: by its own watch while it waits, or when its collective breaks.

    Args:
        broke: What its collective said.
    """
    text = _because(failure, rank=rank)
    # one record with the cause last: a launcher may end this process at any time
    _to_log_file(f"rank {rank} is stopped by {broke.partition(chr(10))[0]}; {text}" if broke else text)
    print(text, file=sys.stderr)
    try:
        raise RuntimeError(text) from None  # torchrun is told of the exception that is being handled
    except RuntimeError as error:
        _exit(failure, error, first=first)


def _note_failure(failure: Failure, *, rank: int) -> None:
    _to_log_file(_because(failure, rank=rank))


def _because(failure: Failure, *, rank: int) -> str:
    cause = failure.text.partition("\n")[0]
    return f"rank {rank} ends, because rank {failure.rank} failed: {cause}"


def log_failure(error: Exception, *, rank: int) -> None:
    """What ended this rank, into its log file; stderr gets it from whoever catches the error."""
    trace = None if isinstance(error, InternlmDsError) else (type(error), error, error.__traceback__)
    _to_log_file(f"rank {rank} ends: {type(error).__name__}: {error}", trace)


def _exit(failure: Failure, error: Exception, *, first: FirstFailure) -> NoReturn:
    log.close()
    get_error_handler().record_exception(error)  # torchrun shows it behind everything else
    sys.stdout.flush()
    sys.stderr.flush()
    first.linger()
    os._exit(failure.exit_code)


def _to_log_file(text: str, trace: tuple | None = None) -> None:
    record = logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, (), trace, func="run")
    for handler in logging.getLogger(log.LOGGER_NAME).handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(record)

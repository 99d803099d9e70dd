"""Where lines go, what a step's line looks like, and that it reads back."""

from __future__ import annotations

import io
import logging
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm_ds.monitor import log

TUTORIAL = (
    "2023-07-07 12:29:01,636\tINFO train.py:323 in record_current_batch_training_metrics -- tflops=189.83371103277346,"
    "step=1,loss=11.613704681396484,tgs (tokens/gpu/second)=4274.45,lr=6.000000000000001e-07,loss_scale=65536.0,"
    "grad_norm=65.150786641452,micro_num=4,num_consumed_tokens=262144,inf_nan_skip_batches=0,num_samples_in_batch=16,"
    "largest_length=2048,largest_batch=5,smallest_batch=3,adam_beta2=0.95,fwd_bwd_time=3.67"
)


@pytest.fixture(autouse=True)
def _restored_logging():
    yield
    log.close()


def test_lines_have_the_tutorials_format(tmp_path):
    stream = io.StringIO()
    logger = log.setup(tmp_path, rank=0, is_log_rank=True, stream=stream)
    logger.info("hello")
    line = stream.getvalue()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}\tINFO test_log_format\.py:\d+ in test_lines_have\w+ -- hello\n", line
    )
    assert (tmp_path / "train.log").read_text() == line


def test_another_ranks_file_appears_with_its_first_line(tmp_path):
    logger = log.setup(tmp_path / "new", rank=7, is_log_rank=False, stream=io.StringIO())
    assert list((tmp_path / "new").iterdir()) == []
    logger.warning("something to say")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["train.rank7.log"]


def test_modules_of_the_package_are_children(tmp_path):
    stream = io.StringIO()
    log.setup(None, rank=0, is_log_rank=True, stream=stream)
    logging.getLogger("internlm_ds.train.run").info("from a module")
    assert stream.getvalue().endswith("-- from a module\n")


def test_a_second_setup_replaces_the_first(tmp_path):
    first, second = io.StringIO(), io.StringIO()
    log.setup(tmp_path, rank=0, is_log_rank=True, stream=first)
    logger = log.setup(tmp_path, rank=0, is_log_rank=True, stream=second)
    logger.info("once")
    assert first.getvalue() == "" and second.getvalue().count("once") == 1
    assert (tmp_path / "train.log").read_text().count("once") == 1


def test_the_tutorials_line_reads_and_writes_back():
    line = log.parse_line(TUTORIAL)
    assert line is not None
    assert (line.time, line.level, line.file, line.line) == ("2023-07-07 12:29:01,636", "INFO", "train.py", 323)
    assert line.function == "record_current_batch_training_metrics"
    assert (line.metrics["step"], line.metrics["tgs"], line.metrics["lr"]) == (1, 4274.45, 6.000000000000001e-07)
    assert TUTORIAL.endswith("-- " + log.format_metrics(dict(reversed(line.metrics.items()))))


def test_the_tutorials_keys_come_first():
    text = log.format_metrics({"acc": 0.5, "step": 3, "tgs": 2.0, "tflops": 1.0})
    assert text == "tflops=1.0,step=3,tgs (tokens/gpu/second)=2.0,acc=0.5"


def test_what_is_no_number():
    text = log.format_metrics(
        {"step": 0, "grad_norm": None, "update_applied": False, "note": "a,b=c\nd", "acc": {"cn": math.nan, "e,n": 1}}
    )
    assert text == "step=0,grad_norm=null,update_applied=false,note=a;b:c d,acc/cn=nan,acc/e;n=1"
    line = log.parse_line(f"2026-01-01 00:00:00,000\tINFO a.py:1 in f -- {text}\n")
    assert line is not None
    assert line.metrics["grad_norm"] is None and line.metrics["update_applied"] is False
    assert math.isnan(line.metrics["acc/cn"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step=1",
        "2023-07-07 12:29:01,636\tINFO train.py:1 in main -- ===========New Run x on host:h,tp:0,pp=0,dp=0===========",
        "2023-07-07 12:29:01,636\tINFO train.py:1 in main -- a=1,b=2",
        "2023-07-07 12:29:01,636\tINFO train.py:1 in main -- saved step=3, took 2 s",
    ],
)
def test_other_lines_are_none(text):
    assert log.parse_line(text) is None


numbers = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.just(-math.inf))


@given(st.dictionaries(st.sampled_from([*log.LINE_KEYS, "acc", "acc/cn"]), numbers), st.integers(0, 9))
def test_any_line_reads_back(metrics, step):
    metrics = {**metrics, "step": step}
    line = log.parse_line(f"2026-01-01 00:00:00,000\tINFO a.py:1 in f -- {log.format_metrics(metrics)}")
    assert line is not None
    assert line.metrics == {("tgs" if key.startswith("tgs") else key): value for key, value in metrics.items()}

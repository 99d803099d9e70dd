"""`internlm-ds preprocess TASK`: which tasks there are, and where each one lives."""

from __future__ import annotations

import argparse

from internlm_ds.cli.tasks import Task, add_tasks, run_task

TASKS = {
    "text": Task("preprocess_text", "tokenize .txt, .json and .jsonl files (also .gz, .zst) into a bin/meta pair"),
    "alpaca": Task(
        "preprocess_sft", "tokenize an instruction data set with Alpaca's fields into train/en and valid/en"
    ),
    "chat": Task("preprocess_sft", "tokenize conversations (messages with roles) through one of InternLM's templates"),
    "custom": Task("preprocess_sft", "tokenize records of your own format, which a function of yours takes apart"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each task."""
    add_tasks(parser, TASKS)


def run(args: argparse.Namespace) -> int:
    """Do the task; returns the exit code."""
    return run_task(args, TASKS)

"""`internlm-ds data TASK`: which tasks there are, and where each one lives."""

from __future__ import annotations

import argparse

from internlm_ds.cli.tasks import Task, add_tasks, run_task

TASKS = {
    "check": Task("data_check", "look for faults in token files: which file, which line, what mends it"),
    "repair": Task("data_repair", "write a sound copy of token files: meta rebuilt, torn tail cut, repetition dropped"),
    "stats": Task("data_stats", "tokens by type, lengths, what packing makes of them for a configuration"),
    "show": Task("data_show", "decode a sample, or a batch of a run, with what is learned and what is masked"),
    "side-file": Task(
        "data_side_file", "write the ids of token files as numbers beside them, which training reads faster"
    ),
    "convert": Task("data_convert", "to and from Megatron's .bin/.idx, numpy files, Parquet and Hugging Face datasets"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command for each task."""
    add_tasks(parser, TASKS)


def run(args: argparse.Namespace) -> int:
    """Do the task; returns the exit code."""
    return run_task(args, TASKS)

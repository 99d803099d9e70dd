"""Findings as text for people, those of one kind and file together, and as JSON with every one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from internlm_ds.data.doctor.checks import Examined
from internlm_ds.data.doctor.findings import ERROR, KINDS, Finding

SHOWN = 3


def as_text(findings: Sequence[Finding], examined: Sequence[Examined]) -> str:
    """One paragraph for each kind and file, with the first few places, and a line of totals."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.path, finding.kind), []).append(finding)
    paragraphs = [_paragraph(group) for group in groups.values()]
    return "\n".join([*paragraphs, _totals(findings, examined)])


def as_json(findings: Sequence[Finding], examined: Sequence[Examined]) -> dict[str, Any]:
    """`{"files": [...], "findings": [...], "errors": N, "warnings": N}`."""
    files = [
        {"file": one.path, "samples": one.samples, "tokens": one.tokens, "bytes": one.num_bytes} for one in examined
    ]
    errors, warnings = _numbers(findings)
    listed = [finding.as_json() for finding in findings]
    return {"files": files, "findings": listed, "errors": errors, "warnings": warnings}


def _paragraph(group: Sequence[Finding]) -> str:
    kind, number = KINDS[group[0].kind], sum(finding.times for finding in group)
    times = f" ({number} times)" if number > 1 else ""
    rows = [f"{group[0].path}: {kind.severity}: {kind.title}{times} [{group[0].kind}]"]
    rows += [f"  {_place(finding)}{finding.message}" for finding in group[:SHOWN]]
    if len(group) > SHOWN:
        rows.append(f"  … and {number - SHOWN} more (--json lists them)")
    return "\n".join([*rows, f"  remedy: {group[0].remedy}"])


def _place(finding: Finding) -> str:
    if finding.line is None:
        return ""
    at = "" if finding.offset_bytes is None else f", byte {finding.offset_bytes}"
    return f"line {finding.line}{at}: "


def _numbers(findings: Sequence[Finding]) -> tuple[int, int]:
    """Errors and warnings."""
    errors = sum(finding.times for finding in findings if finding.severity == ERROR)
    return errors, sum(finding.times for finding in findings) - errors


def _totals(findings: Sequence[Finding], examined: Sequence[Examined]) -> str:
    samples, tokens = sum(one.samples for one in examined), sum(one.tokens for one in examined)
    errors, warnings = _numbers(findings)
    found = f"{_counted(errors, 'error')}, {_counted(warnings, 'warning')}" if findings else "nothing wrong"
    return f"{_counted(len(examined), 'file')}, {_counted(samples, 'sample')}, {_counted(tokens, 'token')}: {found}"


def _counted(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"

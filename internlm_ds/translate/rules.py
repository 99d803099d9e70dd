"""How a rule about a key is written: a function of the leaf and the whole run that returns a `Verdict`.

The rules themselves are in `rules_train`, `rules_data` and `rules_model`. A rule is found by its key, or by the longest
`section.*` pattern that covers it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from internlm_ds.config.schema import Config, Leaf
from internlm_ds.runspec import RunSpec
from internlm_ds.translate.provenance import Fidelity, Note


@dataclass(frozen=True)
class Verdict:
    """What a rule says about a key; `warn` asks for a line at the start of a run too."""

    fidelity: Fidelity
    reason: str = ""
    target: str | None = None
    warn: bool = False

    def note(self, leaf: Leaf) -> Note:
        """The note of a leaf; what reading the file said about an old spelling is added in brackets."""
        old = leaf.note if leaf.note.startswith(("old", "from")) else ""
        reason = f"{self.reason} ({old})" if self.reason and old else self.reason or old
        return Note(leaf.source, leaf.value, self.target, self.fidelity, reason, leaf.line)


@dataclass(frozen=True)
class Facts:
    """What rules may ask: the run, and the DeepSpeed JSON as far as it came from InternLM's keys."""

    spec: RunSpec
    ds_config: Mapping[str, Any]

    @property
    def config(self) -> Config:
        return self.spec.config

    @property
    def saves(self) -> bool:
        return self.config.ckpt.enable_save_ckpt

    @property
    def alerts(self) -> bool:
        return self.config.monitor.alert.enable_feishu_alert


Rule = Callable[[Leaf, Facts], Verdict]


def exact(target: str, reason: str = "") -> Verdict:
    return Verdict("exact", reason, target)


def native(reason: str, target: str | None = None) -> Verdict:
    return Verdict("native", reason, target)


def approximate(reason: str, target: str | None = None, *, warn: bool = False) -> Verdict:
    return Verdict("approximate", reason, target, warn)


def no_effect(reason: str) -> Verdict:
    return Verdict("no_effect", reason)


def refused(reason: str) -> Verdict:
    return Verdict("refused", reason)


def always(verdict: Verdict) -> Rule:
    """The rule that says the same whatever the value."""
    return lambda leaf, facts: verdict


def neutral(*values: Any, off: str, on: Verdict) -> Rule:
    """The rule of a feature that this version lacks: harmless at its neutral values, `on` otherwise."""

    def rule(leaf: Leaf, facts: Facts) -> Verdict:
        same = any(leaf.value == value and isinstance(leaf.value, bool) == isinstance(value, bool) for value in values)
        return no_effect(off) if same else on

    return rule


def find(rules: Mapping[str, Rule], key: str) -> Rule | None:
    """The rule of a key: its own, else that of the nearest section `a.b.*`."""
    if key in rules:
        return rules[key]
    while "." in key:
        key = key.rsplit(".", 1)[0]
        if f"{key}.*" in rules:
            return rules[f"{key}.*"]
    return None

"""Is what the ranks of a job wrote a whole checkpoint? Every parameter once, every piece of optimizer state once.

Works on the table of what was written, before it is published; the bytes themselves are the manifest's checksums'
business. Each function returns problems as lines, so that all of them are shown together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.manifest import StoredFragment, StoredParameter


def check_parameters(parameters: list[StoredParameter], *, arch: ModelArch | None) -> list[str]:
    """Every parameter once, in the blueprint's shape."""
    counts: dict[str, int] = defaultdict(int)
    for parameter in parameters:
        counts[parameter.name] += 1
    problems = [f"{name}: written by {count} ranks" for name, count in counts.items() if count > 1]
    if arch is None:
        return problems
    shapes = {spec.name: tuple(spec.shape) for spec in arch.iter_params()}
    problems += [f"{name}: written by no rank" for name in shapes if name not in counts]
    problems += [f"{p.name}: the model has no such parameter" for p in parameters if p.name not in shapes]
    return problems + [
        f"{p.name}: shape {list(p.shape)}, the model has {list(shapes[p.name])}"
        for p in parameters
        if p.name in shapes and shapes[p.name] != p.shape
    ]


def check_fragments(fragments: list[StoredFragment], numels: Mapping[str, int]) -> list[str]:
    """The fragments of a kind, if there are any, cover every parameter once."""
    by_kind: dict[str, dict[str, list[StoredFragment]]] = defaultdict(lambda: defaultdict(list))
    for fragment in fragments:
        by_kind[fragment.kind][fragment.name].append(fragment)
    problems = []
    for kind, by_name in by_kind.items():
        problems += [f"{kind} of {name}: no such parameter" for name in by_name if name not in numels]
        for name, numel in numels.items():
            problems += _check_cover(kind, name, by_name.get(name, []), numel=numel)
    return problems


def _check_cover(kind: str, name: str, fragments: list[StoredFragment], *, numel: int) -> list[str]:
    covered = 0
    for fragment in sorted(fragments, key=lambda f: f.start):
        if fragment.start != covered:
            what = "missing" if fragment.start > covered else "written twice"
            low, high = sorted((covered, fragment.start))
            return [f"{kind} of {name}: elements {low} to {high} are {what}"]
        covered = fragment.stop
    return [] if covered == numel else [f"{kind} of {name}: {covered} elements of {numel} were written"]


def check_visible(folder: Path, files: Iterable[str]) -> list[str]:
    """Rank 0 sees what the others wrote: not so if the folder is not shared between machines."""
    missing = [name for name in files if not (folder / name).exists()]
    return [f"{name}: rank 0 does not see it; is {folder.parent} shared by all machines?" for name in missing]

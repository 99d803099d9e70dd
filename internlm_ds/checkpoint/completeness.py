"""Is what the ranks of a job wrote a whole checkpoint? Every parameter once, every piece of optimizer state once.

Works on the table of what was written, before it is published; the bytes themselves are the manifest's checksums'
business. Each function returns problems as lines, so that all of them are shown together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

from internlm_ds.arch.spec import ModelArch
from internlm_ds.checkpoint.manifest import StoredFragment, StoredParameter, key_of


def check_parameters(parameters: list[StoredParameter], *, arch: ModelArch | None) -> list[str]:
    """Every parameter once, whole or in the shards of all tensor ranks, in the blueprint's shape."""
    by_name: dict[str, list[StoredParameter]] = defaultdict(list)
    for parameter in parameters:
        by_name[parameter.name].append(parameter)
    problems = [problem for name, held in by_name.items() for problem in _check_shards(name, held)]
    if arch is None:
        return problems
    shapes = {spec.name: tuple(spec.shape) for spec in arch.iter_params()}
    problems += [f"{name}: written by no rank" for name in shapes if name not in by_name]
    problems += [f"{name}: the model has no such parameter" for name in by_name if name not in shapes]
    return problems + [
        f"{p.name}: shape {list(p.shape)}, the model has {list(shapes[p.name])}"
        for p in parameters
        if p.name in shapes and shapes[p.name] != p.shape
    ]


def _check_shards(name: str, held: list[StoredParameter]) -> list[str]:
    if any(p.shard is None for p in held):
        return [f"{name}: written by {len(held)} ranks"] if len(held) > 1 else []
    shards = [p.shard for p in held if p.shard is not None]
    if len({(s.dim, s.length, s.size) for s in shards}) > 1:
        return [f"{name}: its shards were cut in different ways"]
    covered = 0
    for start, stop in sorted(span for shard in shards for span in shard.spans):
        if start != covered:
            what = "missing" if start > covered else "written twice"
            low, high = sorted((covered, start))
            return [f"{name}: indices {low} to {high} of dimension {shards[0].dim} are {what}"]
        covered = stop
    if covered == shards[0].length:
        return []
    return [f"{name}: indices {covered} to {shards[0].length} of dimension {shards[0].dim} are missing"]


def check_fragments(fragments: list[StoredFragment], parameters: list[StoredParameter]) -> list[str]:
    """The fragments of a kind, if there are any, cover every stored parameter or shard once."""
    numels = {p.key: p.numel for p in parameters}
    by_kind: dict[str, dict[str, list[StoredFragment]]] = defaultdict(lambda: defaultdict(list))
    for fragment in fragments:
        by_kind[fragment.kind][key_of(fragment.name, fragment.tensor_rank)].append(fragment)
    problems = []
    for kind, by_key in by_kind.items():
        problems += [f"{kind} of {key}: no such parameter" for key in by_key if key not in numels]
        for key, numel in numels.items():
            problems += _check_cover(kind, key, by_key.get(key, []), numel=numel)
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


def check_visible(folder: Path, sizes: Mapping[str, int], arrived: Mapping[str, int]) -> list[str]:
    """Rank 0 sees what the others wrote: not so if the folder is not shared between machines.

    Args:
        sizes: Bytes that each file was written with.
        arrived: Bytes of what rank 0 sees.
    """
    missing = [name for name, size in sizes.items() if arrived.get(name) != size]
    return [f"{name}: rank 0 does not see it; is {folder.parent} shared by all machines?" for name in missing]

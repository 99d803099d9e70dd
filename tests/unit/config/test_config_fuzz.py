"""Whatever value a key has, the answer is a configuration or a list of problems, never another error."""

from __future__ import annotations

from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm_ds.config.keys import SECTIONS, all_keys
from internlm_ds.errors import ConfigError
from internlm_ds.runspec import resolve

KEYS = [
    *all_keys(),
    *SECTIONS,
    *(f"{name}.{key}" for name, section in SECTIONS.items() for key in section.nested),
    "deepspeed",
    "deepspeed.a.b",
]
VALUES = ["None", "0", "-1", "1", "3", "2.5", "inf", "nan", "x", "", "[]", "(1, 'a')", "{}", "{'size': 2}", "True"]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    overrides=st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), min_size=1, max_size=4),
    world_size=st.sampled_from([1, 6, 8]),
)
def test_any_value_gives_a_run_or_problems(
    tmp_path: Path, tiny: str, overrides: list[tuple[str, str]], world_size: int
) -> None:
    path = tmp_path / "c.py"
    path.write_text(tiny)
    arguments = [f"{key}={value}" for key, value in overrides]
    try:
        spec = resolve(path, overrides=arguments, world_size=world_size)
    except ConfigError as error:
        assert error.problems
        assert all(problem.message for problem in error.problems)
    else:
        sources = [leaf.source for leaf in spec.leaves]
        assert len(sources) == len(set(sources))
        assert spec.layout.world_size == world_size

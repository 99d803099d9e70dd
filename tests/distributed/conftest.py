"""One process' runs, made once for all layouts that must follow them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from layout_runs import Case, RankResult, train

from internlm_ds.layout.ranks import Layout
from internlm_ds.testing.ranks import run_ranks


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Callable[[Case], RankResult]:
    """`single(case)`: what one process makes of the case, whatever the layout."""
    known: dict[Case, RankResult] = {}

    def get(case: Case) -> RankResult:
        alone = replace(case.alone(), save_folder="", load="")
        if alone not in known:
            path = alone.write(tmp_path_factory.mktemp("single"))
            (known[alone],) = run_ranks(train, Layout(), path, alone, timeout_s=100)
        return known[alone]

    return get

"""Many more examples for every property test, whatever number it asks for itself: `make soak` loads it as a plugin."""

from __future__ import annotations

from hypothesis import settings

FACTOR = 30
_ATTRIBUTE = "_hypothesis_internal_use_settings"  # hypothesis has no public way to change a test's own number


def pytest_collection_modifyitems(items):  # type: ignore[no-untyped-def]
    # the cases of a parametrised test share its function: each function once
    functions = {getattr(getattr(item, "obj", None), "__func__", getattr(item, "obj", None)) for item in items}
    for test in functions:
        own = getattr(test, _ATTRIBUTE, None)
        if own is not None:
            more = settings(own, max_examples=own.max_examples * FACTOR, deadline=None, print_blob=True)
            setattr(test, _ATTRIBUTE, more)

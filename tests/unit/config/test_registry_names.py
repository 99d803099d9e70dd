"""Model types by name: registering, finding, and what cannot be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from internlm_ds.config import load
from internlm_ds.errors import ConfigError
from internlm_ds.registry import MODEL_INITIALIZER, Registry


@pytest.fixture(autouse=True)
def _own_names_are_forgotten() -> Iterator[None]:
    before = dict(MODEL_INITIALIZER._builders)
    yield
    MODEL_INITIALIZER._builders.clear()
    MODEL_INITIALIZER._builders.update(before)


def test_a_decorated_builder_is_found() -> None:
    models = Registry("model type")

    @models.register_module(module_name="X")
    def build(**model: int) -> dict[str, int]:
        return model

    assert models.get("X") is build
    assert "X" in models
    assert models.has("X")
    assert models.names == ("X",)


def test_a_builder_may_be_named() -> None:
    models = Registry("model type")
    models.register_module("X")("json:dumps")
    import json

    assert models.get("X") is json.dumps
    assert models.get("json:loads") is json.loads
    assert "json:loads" in models
    assert "json" not in models


def test_registering_again() -> None:
    models = Registry("model type")
    models.register_module("X")("json:dumps")
    models.register_module("X")("json:dumps")
    with pytest.raises(ConfigError) as caught:
        models.register_module("X")("json:loads")
    assert str(caught.value) == "model type 'X' is already registered as json:dumps; choose another name"


@pytest.mark.parametrize(
    ("name", "builder", "message"),
    [
        ("X", "no_such_module:f", "model type 'X': cannot import no_such_module ("),
        ("X", "json:no_such", "model type 'X': module json has no no_such"),
        ("X", "json:__name__", "model type 'X': json:__name__ is not callable"),
    ],
)
def test_what_cannot_be_resolved(name: str, builder: str, message: str) -> None:
    models = Registry("model type")
    models.register_module(name)(builder)
    with pytest.raises(ConfigError) as caught:
        models.get(name)
    assert str(caught.value).startswith(message)


def test_what_cannot_be_registered_or_found() -> None:
    models = Registry("model type")
    with pytest.raises(ConfigError, match=r"a builder is named as \"module:function\", not 'json'"):
        models.register_module("X")("json")
    with pytest.raises(ConfigError, match=r"3 is neither callable nor"):
        models.register_module("X")(3)  # type: ignore[type-var]
    with pytest.raises(ConfigError, match=r"model type 'X' is not registered; registered: none"):
        models.get("X")


def test_a_configuration_may_register_its_model(write: Callable[..., Path]) -> None:
    path = write(
        "from internlm_ds.registry import MODEL_INITIALIZER\n"
        "model_type = 'MINE'\nmodel['wings'] = dict(left=1)\nmodel['hiden_size'] = 3\ndel model['hidden_size']\n"
        "@MODEL_INITIALIZER.register_module(module_name='MINE')\ndef build(**model): return model\n"
    )
    for _ in range(2):  # loading twice registers twice
        loaded = load(path)
        assert loaded.problems == []
    assert loaded.config is not None
    model = loaded.config.model
    assert model.extra == {"wings": {"left": 1}, "hiden_size": 3}
    assert model.given["num_layers"] == 4
    assert loaded.warnings == ["model.hiden_size goes to the builder of MINE as it is; did you mean hidden_size?"]
    keys = {leaf.key for leaf in loaded.leaves}
    assert "model.wings.left" in keys
    assert "model.rope_base" not in keys
    assert MODEL_INITIALIZER.get("MINE")(a=1) == {"a": 1}


def test_a_model_type_may_be_a_path_itself(write: Callable[..., Path]) -> None:
    loaded = load(write("model_type = 'my.models:build'\nmodel['anything'] = 1\n"))
    assert loaded.problems == []


def test_a_taken_name_is_an_error_of_the_file(write: Callable[..., Path]) -> None:
    MODEL_INITIALIZER.register_module("TAKEN")("json:dumps")
    path = write("from internlm_ds.registry import MODEL_INITIALIZER as M\nM.register_module('TAKEN')('json:loads')\n")
    with pytest.raises(ConfigError, match=r"ConfigError \(line \d+\): model type 'TAKEN' is already registered"):
        load(path)

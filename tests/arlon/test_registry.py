"""The table of components agrees with the classes, the configurations and the model folders that use it."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from dataclasses import is_dataclass
from pathlib import Path

import pytest

from arlon.checkpoint import ModelSources
from arlon.components import Component
from arlon.film.geometry import ModelConfigs
from arlon.registry import BASE_COMPONENTS, CODE_COMPONENTS, COMPONENTS, FILM_COMPONENTS, TRAINED_COMPONENTS


@pytest.mark.parametrize("name", TRAINED_COMPONENTS)
def test_row_names_a_component_class_with_its_config(name: str) -> None:
    kind = COMPONENTS[name]
    assert issubclass(kind.model_class, Component)
    assert kind.model_class.config_class is kind.config_class
    assert is_dataclass(kind.config_class)


def test_text_encoder_is_loaded_by_its_kind() -> None:
    assert is_dataclass(COMPONENTS["text_encoder"].config_class)
    with pytest.raises(LookupError, match="load_text_encoder"):
        _ = COMPONENTS["text_encoder"].model_class


def test_groups_are_parts_of_the_table() -> None:
    assert set(BASE_COMPONENTS) | set(CODE_COMPONENTS) == set(FILM_COMPONENTS) < set(COMPONENTS)
    assert set(TRAINED_COMPONENTS) == set(COMPONENTS) - {"text_encoder"}


def test_typed_views_have_a_field_for_each_component() -> None:
    sources = ModelSources(**dict.fromkeys(COMPONENTS, "somewhere"))
    assert list(sources.components) == list(COMPONENTS)
    assert set(ModelConfigs.__dataclass_fields__) - {"backbone"} == set(FILM_COMPONENTS) - {"dit"}  # of any family


@pytest.mark.parametrize("size", ["shapes", "opensora_v1_2"])
def test_every_component_has_a_recipe(size: str) -> None:
    folder = Path(__file__).parents[2] / "configs" / size
    assert all((folder / f"{kind.recipe}.yaml").is_file() for kind in COMPONENTS.values())


def test_packaged_model_has_every_component_of_the_stated_class() -> None:
    index = json.loads(importlib.resources.files("arlon").joinpath("weights/shapes/model_index.json").read_text())
    assert index["_class_name"] == "ArlonPipeline"
    assert set(index["components"]) == set(COMPONENTS)
    for name in TRAINED_COMPONENTS:
        assert index["components"][name]["class"] == COMPONENTS[name].model_class.__name__


def test_reading_the_table_loads_no_network_code() -> None:
    code = "import sys, arlon.registry; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(__file__).parents[2])}, check=True)

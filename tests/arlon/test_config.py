from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from arlon.config import ConfigError, config_from_dict, config_to_dict, load_config, save_config


@dataclass(frozen=True, kw_only=True)
class Block:
    width: int = 8
    ratio: tuple[int, int, int] = (1, 2, 2)
    mode: Literal["none", "dsu"] = "dsu"
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.width % 2:
            raise ValueError(f"width ({self.width}) must be even")


@dataclass(frozen=True, kw_only=True)
class Run:
    learning_rate: float
    block: Block = field(default_factory=Block)
    other: Block | None = None
    widths: tuple[int, ...] = ()
    pairs: tuple[tuple[int, float], ...] = ((1, 2.0),)
    blocks: tuple[Block, ...] = ()
    names: list[str] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    length: int | str = 4


def load(*overrides: str) -> Run:
    return load_config(Run, [], ["learning_rate=1e-4", *overrides])


def test_defaults_are_the_base() -> None:
    assert load() == Run(learning_rate=1e-4)


def test_no_configuration_leaves_anything_to_the_next() -> None:
    values = {"learning_rate": 1, "block": {"width": 6}, "other": {"width": 2}, "names": ["a"], "weights": {"a": 0.5}}
    first = config_from_dict(Run, values)
    first.names.append("b")
    first.weights["b"] = 1.0
    assert config_from_dict(Run, {"learning_rate": 2}) == Run(learning_rate=2.0)


def test_files_merge_left_to_right_and_overrides_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("learning_rate: 1\nblock: {width: 2, limit: 0.5}\n")
    second.write_text("block: {width: 4, ratio: [4, 8, 8]}\n")
    config = load_config(Run, [first, second], ["block.mode=none"])
    assert config == Run(learning_rate=1.0, block=Block(width=4, limit=0.5, ratio=(4, 8, 8), mode="none"))


@pytest.mark.parametrize(
    ("override", "name", "expected"),
    [
        ("block.ratio=[4,8,8]", "block", Block(ratio=(4, 8, 8))),
        ("other.width=6", "other", Block(width=6)),
        ("widths=[1,2]", "widths", (1, 2)),
        ("pairs=[[3,4],[5,6.5]]", "pairs", ((3, 4.0), (5, 6.5))),
        ("blocks=[{width: 2},{mode: none}]", "blocks", (Block(width=2), Block(mode="none"))),
        ("names=[a,b]", "names", ["a", "b"]),
        ("weights={a: 1}", "weights", {"a": 1.0}),
        ("weights.a=0.5", "weights", {"a": 0.5}),
        ("length=full", "length", "full"),
    ],
)
def test_value_gets_the_type_of_its_field(override: str, name: str, expected: Any) -> None:
    value = getattr(load(override), name)
    assert value == expected
    assert repr(value) == repr(expected)  # tuples stay tuples, floats are floats, at every depth


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("block.widht=3", "unknown key 'block.widht', did you mean 'width'"),
        ("zzz=3", "unknown key 'zzz', choose from 'learning_rate', 'block"),
        ("block.width=wide", "block.width: Value 'wide'"),
        ("block.width=1.5", "block.width: Value '1.5'"),
        ("block.mode=dsv", r"block.mode: Invalid value 'dsv', expected one of \['none', 'dsu'\]"),
        ("block.ratio=[1,2]", "block.ratio: tuple length 2 does not match type hint length 3"),
        ("block.ratio=7", "block.ratio: "),
        ("block=7", "block: "),
        ("pairs=[[1,x]]", r"pairs\[0\]\[1\]: expected float, got 'x'"),
        ("pairs=[[1,2,3]]", r"pairs\[0\]: expected 2 values, got 3"),
        ("blocks=[{widht: 2}]", "unknown key 'widht', did you mean 'width'"),
        ("block.limit=${oc.env:HOME}", "block.limit: interpolation"),
        ("block.limit", "must read key=value"),
        ("=3", "must read key=value"),
        ("block.limit=[", "cannot parse the overrides"),
    ],
)
def test_bad_value_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load(override)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_missing_required_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'learning_rate' of Run"):
        load_config(Run)


def test_rules_across_fields_run_after_all_overrides() -> None:
    assert load("block.width=3", "block.width=4").block.width == 4
    with pytest.raises(ValueError, match=r"width \(3\) must be even"):
        load("block.width=3")


def test_dict_round_trip_is_exact_and_json() -> None:
    config = load("pairs=[[3,4]]", "blocks=[{width: 2}]", "other.limit=0.1", "weights.a=2")
    assert config_from_dict(Run, json.loads(json.dumps(config_to_dict(config)))) == config


def test_saved_yaml_loads_back(tmp_path: Path) -> None:
    config = load("names=['1e-3', 'on', 'a: b']", "blocks=[{ratio: [3,3,3]}]", "length=12")
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(Run, [tmp_path / "run" / "config.yaml"]) == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_value_that_is_not_plain_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Run\.names\[0\].*PosixPath"):
        config_to_dict(Run(learning_rate=1.0, names=[Path("x")]))  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="expected a dataclass instance"):
        config_to_dict({"a": 1})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "as YAML: .*line"),
        ("- 1\n- 2\n", "must hold 'key: value' pairs"),
        (b"\xff\xfe\x00a", "as YAML"),
    ],
)
def test_unreadable_file_is_named(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(Run, [path])
    assert str(path) in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no configuration file .*none\.yaml"):
        load_config(Run, [tmp_path / "none.yaml"])


def test_empty_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert load_config(Run, [tmp_path / "empty.yaml"], ["learning_rate=1"]) == Run(learning_rate=1.0)

"""Configurations survive the way to `ml_collections` and back; what is wrong is refused by its key."""

from __future__ import annotations

import dataclasses
import json
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lvm.common.config import describe_changes, expand_home, find_config, from_config_dict, to_config_dict, to_json
from lvm.common.errors import UserError
from lvm.data.mixture.mixture import ComponentConfig, MixtureConfig
from lvm.data.mixture.recipes import Pairs, Video
from tests.commands import ROOT


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("~", "/home/me"),
        ("~/a/~", "/home/me/a/~"),
        ("~/a+~/b:~", "/home/me/a+/home/me/b:/home/me"),
        ("a~/b", "a~/b"),
        ("gs://a/~/b", "gs://a/~/b"),
        ("~no.such.user/a", "~no.such.user/a"),
        ("", ""),
    ],
)
def test_expand_home(text, expanded, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home(text) == expanded


def test_expand_home_names_unknown_home(monkeypatch):
    monkeypatch.setattr("os.path.expanduser", lambda text: text)
    with pytest.raises(UserError, match=r"~/a: no home folder .* set HOME"):
        expand_home("~/a")


class Shape:
    kinds: ClassVar[dict] = {}


@dataclasses.dataclass(frozen=True)
class Circle(Shape):
    kind = "circle"
    radius: float = 1.0

    def __post_init__(self):
        if self.radius <= 0:
            raise UserError(f"radius: {self.radius} is not positive")


@dataclasses.dataclass(frozen=True)
class Square(Shape):
    kind = "square"
    side: int = 2


Shape.kinds = {"circle": Circle, "square": Square}


@dataclasses.dataclass(frozen=True)
class Drawing:
    name: str = "untitled"
    is_public: bool = False
    limit: int | None = None
    shape: Shape = Square()
    sizes: tuple[int, ...] = (1, 2)
    shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)


shapes = st.builds(Circle, st.floats(0.5, 9)) | st.builds(Square, st.integers())
drawings = st.builds(
    Drawing,
    name=st.text(),
    is_public=st.booleans(),
    limit=st.none() | st.integers(),
    shape=shapes,
    sizes=st.lists(st.integers()).map(tuple),
    shapes=st.dictionaries(st.from_regex("[a-z]{1,5}", fullmatch=True), shapes, max_size=3),
)


@settings(max_examples=10)
@given(drawings)
def test_config_dict_round_trip(drawing):
    assert from_config_dict(Drawing, to_config_dict(drawing)) == drawing


@given(drawings)
def test_json_round_trip(drawing):
    assert from_config_dict(Drawing, json.loads(json.dumps(to_json(drawing)))) == drawing


def test_mixture_config_round_trip():
    sources = {
        "a": ComponentConfig(Video(strides=(3, 4)), 2.0),
        "b": ComponentConfig(Pairs(), store=("elsewhere",)),
    }
    mixture = MixtureConfig(sources, ("store",))
    assert from_config_dict(MixtureConfig, to_config_dict(mixture)) == mixture


def test_config_dict_has_every_key():
    tree = to_config_dict(Drawing())
    assert set(tree) == {field.name for field in dataclasses.fields(Drawing)}
    tree.shape.side = 7
    assert from_config_dict(Drawing, tree).shape == Square(7)


def test_integer_is_accepted_for_float():
    radius = from_config_dict(Circle, {"kind": "circle", "radius": 3}).radius
    assert (radius, type(radius)) == (3.0, float)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nmae": "x"}, r"^config\.nmae: no such key; config has name, is_public, limit"),
        ({"name": 3}, r"^config\.name: 3 is a int, expected str"),
        ({"is_public": 1}, r"^config\.is_public: 1 is a int, expected bool"),
        ({"limit": True}, r"^config\.limit: True is a bool, expected int"),
        ({"limit": 1.5}, r"^config\.limit: 1\.5 is a float, expected int"),
        ({"sizes": 3}, r"^config\.sizes: 3 is not a tuple"),
        ({"sizes": (1, "2")}, r"^config\.sizes\[1\]: '2' is a str, expected int"),
        ({"shape": 3}, r"^config\.shape: 3 is not a group of keys"),
        ({"shape": {"side": 1}}, r"^config\.shape\.kind: None is not one of circle, square"),
        ({"shape": {"kind": "line"}}, r"^config\.shape\.kind: 'line' is not one of circle, square"),
        ({"shape": {"kind": "circle", "side": 1}}, r"^config\.shape\.side: .*config\.shape of kind 'circle' has"),
        ({"shapes": {"a": {"kind": "circle", "radius": -1}}}, r"^config\.shapes\.a\.radius: -1\.0 is not"),
        ({"shapes": [1]}, r"^config\.shapes: \[1\] is not a group of keys"),
        (None, r"^config: None is not a group of keys"),
    ],
)
def test_bad_value_is_rejected_by_full_key(values, message):
    with pytest.raises(UserError, match=message):
        from_config_dict(Drawing, values)


def test_key_without_default_is_required():
    with pytest.raises(UserError, match=r"^config\.a: .*missing.*'recipe'"):
        from_config_dict(ComponentConfig, ConfigDict({"weight": 1.0}), "config.a")


def test_find_config_finds_packaged_configs_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/demo_lvm.py") == str(ROOT / "configs" / "demo_lvm.py")
    assert find_config("configs/nothing.py") == "configs/nothing.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo_lvm.py").touch()
    assert find_config("configs/demo_lvm.py") == "configs/demo_lvm.py"


def test_describe_changes_names_nested_keys():
    old = {"a": 1, "b": {"c": "x", "d": [1] * 20}, "e": 0}
    assert describe_changes(old, {"a": 1, "b": {"c": "y", "d": [2] * 20}}) == "b.c: x → y, b.d, e: 0 → None"
    assert describe_changes(old, old) == ""
    assert describe_changes({}, {f"{i}": i for i in range(9)}).endswith("7: None → 7, …")

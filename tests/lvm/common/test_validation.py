"""Field checks name the field and the value."""

import dataclasses
import math

import pytest

from lvm.common.config import from_config_dict
from lvm.common.errors import UserError
from lvm.common.validation import check_choice, check_non_negative, check_positive


@dataclasses.dataclass(frozen=True)
class Config:
    size: float = 1.0
    offset: int = 0
    mode: str = "a"

    def __post_init__(self):
        check_positive(self, "size")
        check_non_negative(self, "offset")
        check_choice(self, "mode", ("a", "b"))


def test_good_values_pass():
    config = Config(size=1e-9, offset=0, mode="b")
    assert (config.size, config.offset, config.mode) == (1e-9, 0, "b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0.0}, r"size=0\.0 "),
        ({"size": -1.0}, r"size=-1\.0 "),
        ({"size": math.nan}, "size=nan "),
        ({"offset": -1}, "offset=-1 "),
        ({"mode": "c"}, "mode='c' .*a, b"),
    ],
)
def test_bad_value_names_field_and_value(values, message):
    with pytest.raises(UserError, match=f"^{message}"):
        Config(**values)


def test_config_path_precedes_field():
    with pytest.raises(UserError, match=r"^config\.loop\.offset=-2 "):
        from_config_dict(Config, {"offset": -2}, "config.loop")

"""Ranges of token ids, and vocabulary.json."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvm.common.errors import UserError
from lvm.model.vocabulary import FILENAME, Vocabulary


@given(st.integers(1, 2**20))
def test_for_codes_puts_specials_after_codes(num_codes):
    vocabulary = Vocabulary.for_codes(num_codes)
    assert (vocabulary.bos, vocabulary.eos, vocabulary.pad) == (num_codes, num_codes + 1, num_codes + 2)
    assert vocabulary.size == num_codes + 256


@pytest.mark.parametrize(
    "vocabulary", [Vocabulary.for_codes(8192), Vocabulary(8192, 8292, bos=None, eos=None, pad=8192)]
)
def test_load_inverts_save(tmp_path, vocabulary):
    vocabulary.save(tmp_path)
    assert Vocabulary.load(tmp_path) == vocabulary
    vocabulary.save(str(tmp_path))
    assert Vocabulary.load(str(tmp_path)) == vocabulary


@pytest.mark.parametrize("token", [0, 7, 264, -1])
@pytest.mark.parametrize("name", ["bos", "eos", "pad"])
def test_specials_must_follow_codes_within_size(name, token):
    specials = {"bos": 8, "eos": 9, "pad": 10, name: token}
    with pytest.raises(UserError, match=rf"{name}={token} must lie in 8\.\.263 or be null"):
        Vocabulary(8, 264, **specials)


@pytest.mark.parametrize("num_codes", [0, -1, 11])
def test_codes_must_fit_the_size(num_codes):
    with pytest.raises(UserError, match=rf"num_codes={num_codes} must lie in 1\.\.10"):
        Vocabulary(num_codes, 10, None, None, None)


def test_load_names_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=rf"{tmp_path}.*{FILENAME}: not found"):
        Vocabulary.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1, 2]", '{"num_codes": 8}', '{"num_codes": "8", "size": 9}', "3"])
def test_load_names_an_invalid_file(tmp_path, text):
    (tmp_path / FILENAME).write_text(text)
    with pytest.raises(UserError, match=FILENAME):
        Vocabulary.load(tmp_path)

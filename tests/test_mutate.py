"""The mutation tool on a tiny checkout."""

import json
import subprocess

import pytest

from scripts import mutate

MODULE = '''"""A sum."""


def total(values: list, start: int = 1, scale=2.0) -> float:
    """The sum of values."""
    values = list(values)
    print("a side effect")
    if not values:
        raise ValueError(f"{len(values) + 1} values")
    return (sum(values) + start) * scale
'''


def test_find_faults_covers_code_but_no_messages_or_annotations():
    faults = [(line, kind, after) for _, line, kind, _, _, _, after in mutate.find_faults("math.py", MODULE)]
    assert faults == [
        *((4, "constant", f"({other})") for other in ("2", "0", "3.0", "1.0", "4.0")),
        (6, "statement", "pass"),
        (6, "call", "(values)"),
        (7, "statement", "pass"),
        (8, "condition", "(not not values)"),
        (8, "operator", "(values)"),
        (10, "operator", "((sum(values) + start) / scale)"),
        (10, "operator", "(sum(values) - start)"),
        (10, "call", "(values)"),
        (10, "function", "(mean)"),
    ]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    files = {
        "unit/math.py": "def total(values):\n    values.sort()\n    return sum(values)\n",
        "tests/unit/test_math.py": "from unit.math import total\n\ndef test_total():\n    assert total([1, 2]) == 3\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_mutate_lists_faults_that_no_test_notices(checkout, capsys):
    command = ["--modules", "unit", "--out=faults.jsonl"]
    assert mutate.main([*command, "--shard=1", "--num_shards=2"]) == 0
    tried = (checkout / "faults.jsonl").read_text()
    assert mutate.main(command) == 0
    assert (checkout / "faults.jsonl").read_text().startswith(tried)
    outcomes = [json.loads(line) for line in (checkout / "faults.jsonl").read_text().splitlines()]
    assert {outcome["fault"][-1]: outcome["noticed_by"] for outcome in outcomes} == {
        "pass": "",
        "(mean)": "tests/unit/test_math.py::test_total",
        "(values)": "tests/unit/test_math.py::test_total",
    }
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["| unit/math.py:2 | statement | `values.sort()` | `pass` |", "3 planted, 2 noticed"]

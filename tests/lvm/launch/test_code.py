"""Commits to ship, with and without uncommitted changes."""

import subprocess

import pytest

from lvm.common.errors import UserError
from lvm.launch import code


def test_resolve_commit_with_uncommitted_changes(tmp_path, monkeypatch):
    monkeypatch.setattr(code, "ROOT", tmp_path)

    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    for key, value in (("user.name", "Nobody"), ("user.email", "nobody@example.com")):
        git("config", key, value)
    (tmp_path / "a.txt").write_text("old\n")
    git("add", "a.txt")
    git("commit", "-m", "first")
    clean = code.resolve_commit("", ship_changes=False)
    assert code.uncommitted_diff(clean) == ""
    (tmp_path / "a.txt").write_text("new\n")
    (tmp_path / "b.txt").write_text("untracked\n")
    with pytest.raises(UserError, match=r"uncommitted changes in a\.txt, b\.txt; commit them"):
        code.resolve_commit("", ship_changes=False)
    shipped = code.resolve_commit("", ship_changes=True)
    assert shipped != clean
    assert "+new" in code.uncommitted_diff(shipped)
    assert code.resolve_commit("HEAD", ship_changes=False) == clean
    subprocess.run(code.archive_command(shipped, tmp_path / "code.tar.gz"), check=True)
    content = subprocess.run(["tar", "-xzOf", tmp_path / "code.tar.gz", "a.txt"], capture_output=True, check=True)
    assert content.stdout == b"new\n"

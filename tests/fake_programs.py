"""Fakes of external programs: they record their calls and answer as a test defines."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

_PROGRAM = """#!{python}
import json, os, sys
folder = {folder!r}
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
with open(os.path.join(folder, "calls.jsonl"), "a") as file:
    file.write(json.dumps([[name, *arguments], dict(os.environ)]) + "\\n")
with open(os.path.join(folder, "answers.json")) as file:
    answers = json.load(file)
line = " ".join([name, *arguments])
for index, (words, code, output) in enumerate(answers):
    if words in line:
        if len([other for other in answers if other[0] == words]) > 1:
            answers.pop(index)
            with open(os.path.join(folder, "answers.json"), "w") as file:
                json.dump(answers, file)
        (sys.stderr if code else sys.stdout).write(output)
        sys.exit(code)
"""


class Programs:
    """Fakes in a folder; with `path` as PATH, they take precedence.

    Args:
      folder: the folder of the programs.
      names: names of the programs.
    """

    def __init__(self, folder: Path, *names: str):
        self._folder = folder
        folder.mkdir(exist_ok=True)
        for name in names:
            path = folder / name
            path.write_text(_PROGRAM.format(python=sys.executable, folder=str(folder)))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.path = f"{folder}{os.pathsep}{os.environ['PATH']}"
        self.answer()

    def answer(self, *answers: tuple[str, int, str]) -> None:
        """Defines answers: (words of a command, exit code, output); several for the same words are used up in order."""
        (self._folder / "answers.json").write_text(json.dumps(answers))

    @property
    def calls(self) -> list[list[str]]:
        """Program and arguments of every call so far."""
        return [arguments for arguments, _ in self._records()]

    @property
    def environments(self) -> list[dict[str, str]]:
        """The environment of every call so far."""
        return [environment for _, environment in self._records()]

    def _records(self) -> list[Any]:
        path = self._folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

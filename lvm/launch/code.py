"""The code that a run is started with: an archive of a commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

from lvm.common.errors import UserError
from lvm.common.logging import log_info

ROOT = Path(__file__).parents[2]
_NAMED = 5  # changed files that are named


def commit(wanted: str, ship_changes: bool) -> str:
    """The hash of the code to ship.

    Args:
      wanted: any name of a commit; "" is the one that is checked out.
      ship_changes: whether changes of tracked files that aren't committed go along, as a commit of their own that no
        branch holds; the file `changes.diff` then records them.

    Raises:
      UserError: no such commit, or changes that aren't committed.
    """
    if wanted:
        return _git("rev-parse", "--verify", f"{wanted}^{{commit}}")
    changed = [line for line in _git("status", "--porcelain").splitlines() if line]
    untracked = [line[3:] for line in changed if line.startswith("??")]
    tracked = [line[3:] for line in changed if not line.startswith("??")]
    if changed and not ship_changes:
        names = ", ".join((tracked + untracked)[:_NAMED]) + (" …" if len(changed) > _NAMED else "")
        raise UserError(
            f"{ROOT}: {len(changed)} files aren't committed ({names}); commit them, or give --ship_changes=true, or "
            "name what to run with --commit"
        )
    if untracked:
        log_info(f"not shipped, since git doesn't know them: {', '.join(untracked)}")
    return (_git("stash", "create") if tracked else "") or _git("rev-parse", "HEAD")


def changes(commit: str) -> str:
    """What a commit of uncommitted changes has changed, as a diff; "" for any other."""
    parents = _git("rev-list", "--parents", "--max-count=1", commit).split()[1:]
    is_stash = len(parents) > 1 and _git("log", "-1", "--format=%s", commit).startswith("WIP on ")
    return _git("diff", "--binary", parents[0], commit) if is_stash else ""


def archive_command(commit: str, path: Path) -> list[str]:
    """Writes the archive."""
    return ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={path.resolve()}", commit]


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except FileNotFoundError as error:
        raise UserError("git isn't installed; a run is shipped as a commit's archive") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"git {' '.join(arguments)}: {error.stderr.strip()}") from error
    return done.stdout.rstrip("\n")

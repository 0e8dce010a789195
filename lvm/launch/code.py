"""The code of a run: an archive of a commit."""

from pathlib import Path

from lvm.common.errors import UserError
from lvm.common.logging import log_info
from lvm.launch import shell

ROOT = Path(__file__).parents[2]
_MAX_LISTED = 5  # changed files in an error message


def resolve_commit(revision: str, ship_changes: bool) -> str:
    """Hash of the commit to ship.

    Args:
      revision: a Git revision; "" is HEAD.
      ship_changes: includes uncommitted changes of tracked files, in a commit that is on no branch.

    Raises:
      UserError: no checkout, no such commit, or uncommitted changes.
    """
    if not (ROOT / ".git").exists():
        raise UserError(
            f"{ROOT}: not a Git checkout, so there is no commit to ship; clone the repository, `pip install -e .`, and "
            "submit from there"
        )
    if revision:
        return _git("rev-parse", "--verify", f"{revision}^{{commit}}")
    changed = [line for line in _git("status", "--porcelain").splitlines() if line]
    untracked = [line[3:] for line in changed if line.startswith("??")]
    tracked = [line[3:] for line in changed if not line.startswith("??")]
    if changed and not ship_changes:
        names = ", ".join((tracked + untracked)[:_MAX_LISTED]) + (
            f" and {len(changed) - _MAX_LISTED} more" if len(changed) > _MAX_LISTED else ""
        )
        raise UserError(f"{ROOT}: uncommitted changes in {names}; commit them, or use --ship_changes or --commit")
    if untracked:
        log_info(f"untracked files are not shipped: {', '.join(untracked)}")
    return (_git("stash", "create") if tracked else "") or _git("rev-parse", "HEAD")


def uncommitted_diff(commit: str) -> str:
    """Diff of a commit of uncommitted changes against its base; "" for any other commit."""
    parents = _git("rev-list", "--parents", "--max-count=1", commit).split()[1:]
    is_stash = len(parents) > 1 and _git("log", "-1", "--format=%s", commit).startswith("WIP on ")
    return _git("diff", "--binary", parents[0], commit) if is_stash else ""


def archive_command(commit: str, path: Path) -> list[str]:
    return ["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={path.resolve()}", commit]


def _git(*arguments: str) -> str:
    return shell.run(["git", *arguments], ROOT, quiet=True).rstrip("\n")

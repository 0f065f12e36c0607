"""A second place for a run's checkpoints, at a URL that fsspec knows: s3://, gs://, memory://, file:// and others.

Each checkpoint is written in the run's folder first, whole or not at all, and then copied there, its manifest last: what has no
manifest, or not that of its files, is no checkpoint. Where the run's folder has lost its checkpoints, the newest one there
is brought back. No lock reaches there: two jobs with one URL would mix their checkpoints.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hvdtrain.errors import CheckpointError
from hvdtrain.training.checkpoint_files import FILES, MANIFEST, check, discard, name_of, step_of

_log = logging.getLogger(__name__)


class Mirror:
    """The copies of one run's checkpoints; for rank 0. Nothing is connected to before it is used.

    Args:
        url: A folder, such as ``s3://bucket/run``.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connected: tuple[Any, str] | None = None

    def put(self, path: Path, keep: int) -> None:
        """Copy a checkpoint there, and delete all there but the newest ones.

        Raises:
            CheckpointError: It could not be copied; what was there before still is.
        """
        with self._told(f"could not copy {path} to {self.url}") as (files, root):
            there = f"{root}/{path.name}"
            files.makedirs(there, exist_ok=True)
            if files.exists(f"{there}/{MANIFEST}"):  # of the same step, written again: first it is none any more
                files.rm_file(f"{there}/{MANIFEST}")
            for name in (*FILES, MANIFEST):
                files.put_file(str(path / name), f"{there}/{name}")
        try:
            self._thin(keep)
        except CheckpointError as error:
            _log.warning("%s", error)

    def bring_back(self, folder: Path) -> None:
        """Copy the newest whole checkpoint from there into the run's folder, unless it is there, whole, or a newer one is.

        Raises:
            CheckpointError: It could not be read from there.
        """
        for step in reversed(self.steps()):
            path = folder / name_of(step)
            if _newest_step(folder) > step or _is_whole(path):
                return
            try:
                self._get(path)
                _log.warning("brought %s back from %s", path.name, self.url)
            except CheckpointError as error:
                _log.warning("skipping a damaged checkpoint: %s", error)
            else:
                return

    def refuse_other_lines(self, after: int | None) -> None:
        """Make sure that a line that goes on from a step, or begins, will not mix with another one there.

        Raises:
            CheckpointError: There are newer ones.
        """
        newer = [step for step in self.steps() if after is None or step > after]
        if newer:
            goes_on = "begins anew" if after is None else f"goes on from step {after}"
            raise CheckpointError(
                f"{self.url} has the checkpoint of step {newer[-1]}, and this run {goes_on}: nothing there is set aside. Name another "
                "--checkpoint-url, go on from there with --resume auto, or move it away"
            )

    def steps(self) -> list[int]:
        """Of the checkpoints there, in their order; those without a manifest are none.

        Raises:
            CheckpointError: The place cannot be read.
        """
        with self._told(f"could not read {self.url}") as (files, root):
            return [step for step, whole in self._folders(files, root) if whole]

    # -- inside -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _told(self, what: str) -> Iterator[tuple[Any, str]]:
        """The file system and the folder's name in it; failures become one sentence."""
        try:
            if self._connected is None:
                self._connected = _connect(self.url)
            yield self._connected
        except CheckpointError:
            raise
        except Exception as error:  # each file system has its own
            raise CheckpointError(f"{what}: {type(error).__name__}: {error}") from error

    def _folders(self, files: Any, root: str) -> list[tuple[int, bool]]:
        """Steps that there are folders of, and whether they have a manifest."""
        files.invalidate_cache()
        try:
            names = [str(name).rstrip("/").rpartition("/")[2] for name in files.ls(root, detail=False)]
        except FileNotFoundError:
            return []
        steps = sorted(step for name in names if (step := step_of(name)) is not None)
        return [(step, bool(files.exists(f"{root}/{name_of(step)}/{MANIFEST}"))) for step in steps]

    def _thin(self, keep: int) -> None:
        with self._told(f"older checkpoints than the newest {keep} could not be deleted in {self.url}") as (
            files,
            root,
        ):
            found = self._folders(files, root)
            kept = [step for step, whole in found if whole][-keep:]
            for step, whole in found:
                if step in kept or step > max(kept, default=0):
                    continue
                there = f"{root}/{name_of(step)}"
                if whole:
                    files.rm_file(f"{there}/{MANIFEST}")
                files.rm(there, recursive=True)

    def _get(self, path: Path) -> None:
        """Copy one into a folder beside, look at all of it, and rename."""
        partial = path.with_name(f"partial-{os.getpid()}-{path.name}")
        discard(partial)
        partial.mkdir(parents=True)
        try:
            with self._told(f"could not copy {self.url}/{path.name}") as (files, root):
                for name in (*FILES, MANIFEST):
                    files.get_file(f"{root}/{path.name}/{name}", str(partial / name))
            inner = partial / path.name  # `check` compares the folder's name
            inner.mkdir()
            for name in (*FILES, MANIFEST):
                (partial / name).rename(inner / name)
            check(inner)
            if os.path.lexists(path):  # damaged
                path.rename(path.with_name(f"old-{os.getpid()}-{path.name}"))
            inner.rename(path)
        finally:
            discard(partial)


def _connect(url: str) -> tuple[Any, str]:
    try:
        url_to_fs: Callable[..., tuple[Any, str]] = importlib.import_module("fsspec.core").url_to_fs
    except ImportError as error:
        raise CheckpointError(f"--checkpoint-url {url} needs fsspec ({error}); pip install fsspec") from error
    try:
        return url_to_fs(url)
    except ImportError as error:  # names the package: "Install s3fs to access S3"
        raise CheckpointError(f"--checkpoint-url {url} needs another package: {error}") from error
    except ValueError as error:
        raise CheckpointError(f"--checkpoint-url {url} is of no kind that fsspec knows: {error}") from error


def _newest_step(folder: Path) -> int:
    """Of those in the run's folder, whole or not; -1 if there are none."""
    if not folder.is_dir():
        return -1
    return max((step for name in os.listdir(folder) if (step := step_of(name)) is not None), default=-1)


def _is_whole(path: Path) -> bool:
    try:
        check(path)
    except CheckpointError:
        return False
    return True

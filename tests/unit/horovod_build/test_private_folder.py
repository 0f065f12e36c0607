"""Finished wheels are taken from a folder only if nobody else can have put them there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hvdtrain.horovod_build import wheels
from hvdtrain.horovod_build.failure import BuildError
from hvdtrain.horovod_build.installing import install
from hvdtrain.horovod_build.private_folder import check_private, make_private
from hvdtrain.horovod_build.wishes import Wishes

NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


def test_a_folder_that_is_made_is_this_users_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [each.stat().st_mode & 0o777 for each in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
    make_private(tmp_path / "a" / "b")


def test_what_is_not_there_yet_is_no_problem(tmp_path):
    check_private(tmp_path / "not" / "there")


@pytest.mark.parametrize(
    ("mode", "message"),
    [(0o777, "by everybody"), (0o1777, "by everybody"), (0o702, "by everybody"), (0o770, "by the group")],
)
@pytest.mark.parametrize("which", ["cache", "cache/wheels"])
def test_a_folder_in_which_others_can_write_is_refused(tmp_path, which, mode, message):
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    if "group" in message:
        if os.getuid() != 0:
            pytest.skip("only root can choose any group")
        os.chown(tmp_path / which, -1, NOBODY)
    (tmp_path / which).chmod(mode)
    sticky_parent = mode == 0o1777 and which == "cache"
    if sticky_parent:  # as /tmp is: a folder of one's own in it is one's own
        make_private(tmp_path / "cache" / "wheels")
        return
    with pytest.raises(BuildError, match=message) as caught:
        make_private(tmp_path / "cache" / "wheels")
    assert str(tmp_path / which) in str(caught.value)
    assert "HVDTRAIN_CACHE" in str(caught.value)


@as_root
@pytest.mark.parametrize("which", ["cache", "cache/wheels", "cache/wheels/x.whl"])
def test_what_belongs_to_somebody_else_is_refused(tmp_path, which):
    (tmp_path / "cache" / "wheels").mkdir(parents=True)
    (tmp_path / "cache" / "wheels" / "x.whl").write_text("")
    os.chown(tmp_path / which, NOBODY, -1)
    with pytest.raises(BuildError, match=r"belongs to .*65534"):
        check_private(tmp_path / "cache" / "wheels" / "x.whl")


@as_root
def test_a_link_that_somebody_else_made_is_refused_and_ones_own_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real")
    make_private(link / "wheels")
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    with pytest.raises(BuildError, match="belongs to"):
        make_private(link / "wheels")


@as_root
def test_a_link_into_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "real").mkdir()
    os.chown(tmp_path / "real", NOBODY, -1)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(BuildError, match="belongs to"):
        make_private(tmp_path / "link")


def test_a_planted_cache_is_refused_before_anything_in_it_is_read_or_written(tmp_path):
    planted = tmp_path / "cache"
    (planted / "wheels").mkdir(parents=True)
    planted.chmod(0o777)
    environment = {**os.environ, "HVDTRAIN_CACHE": str(planted)}
    reporter = type("Quiet", (), {"tell": lambda self, line: None, "show": lambda self, fraction, what: None})()
    with pytest.raises(BuildError, match="by everybody"):
        install(Wishes(force=True), reporter, environment)
    assert sorted(planted.rglob("*")) == [planted / "wheels"]


def test_a_cache_is_named_as_it_was_given_so_that_links_can_be_looked_at(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    assert wheels.cache({"HVDTRAIN_CACHE": str(tmp_path / "link")}) == tmp_path / "link"
    assert wheels.folder("~/x", {}) == Path.home() / "x"

"""Whose the files are that scripts/install.sh makes, and where the API key may lie.

Runs inside the test bed, whose root is an overlay, so that nothing reaches the machine itself.
"""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.installing import (
    DATA,
    KEY,
    MEDIA,
    MODES,
    SERVICE,
    TMPFILES,
    USER,
    install,
    modes,
    run,
    show,
    stand_in,
)

pytestmark = pytest.mark.usefixtures("first_install")


def test_there_is_a_user_nobody_can_log_in_as() -> None:
    user = pwd.getpwnam(USER)
    assert grp.getgrgid(user.pw_gid).gr_name == USER
    assert 0 < user.pw_uid < 1000
    assert user.pw_shell.endswith("/nologin")
    assert not Path(user.pw_dir).exists()


def test_what_boots_make_is_what_the_installation_made() -> None:
    """As where /var is made anew at each boot."""
    MEDIA.rmdir()
    run("systemd-tmpfiles", "--create", TMPFILES)
    assert modes() == MODES


def test_owner_and_mode_of_the_media_are_the_operators() -> None:
    MEDIA.chmod(0o2775)
    os.chown(MEDIA, -1, grp.getgrnam(USER).gr_gid)
    install()
    run("systemd-tmpfiles", "--create", TMPFILES)
    found = MEDIA.stat()
    assert stat.S_IMODE(found.st_mode) == 0o2775
    assert grp.getgrgid(found.st_gid).gr_name == USER
    os.chown(MEDIA, 0, 0)
    MEDIA.chmod(0o755)


def test_somebody_can_deliver_media_and_see_nothing_else() -> None:
    inbox = MEDIA / "inbox"
    inbox.mkdir()
    os.chown(inbox, 65534, 65534)
    as_somebody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    run(*as_somebody, "touch", inbox / "delivered.mp4")
    assert run(*as_somebody, "ls", DATA, check=False).returncode != 0
    shutil.rmtree(inbox)


@pytest.fixture
def shared_mounts() -> Iterator[None]:
    """As systemd has them on a machine: what it mounts for a service, the service sees."""
    run("mount", "--make-rshared", "/")
    yield
    run("mount", "--make-rprivate", "/")


@pytest.mark.usefixtures("with_a_master", "shared_mounts")
@pytest.mark.parametrize("written", ["", "the-key"])
def test_the_key_can_be_a_credential(written: str) -> None:
    seen = DATA / "seen"
    stand_in('cat "$CREDENTIALS_DIRECTORY/master-api-key" >seen; systemd-notify --ready; sleep 99')
    if written:
        KEY.write_text(f"{written}\n")
    install()
    assert show(SERVICE, "ActiveState") == "active"
    assert seen.read_text() == f"{written}\n"
    KEY.unlink(missing_ok=True)
    seen.unlink()


@pytest.fixture
def no_user() -> Iterator[None]:
    run("userdel", USER)
    yield
    run("userdel", USER, check=False)  # where the test has failed
    install()


@pytest.fixture
def no_sysusers() -> Iterator[None]:
    """As in container images whose systemd is there in parts."""
    found = shutil.which("systemd-sysusers")
    assert found is not None
    program = Path(found)
    away = program.rename(program.with_name("systemd-sysusers.away"))
    yield
    away.rename(program)


@pytest.mark.usefixtures("no_user", "no_sysusers")
def test_the_user_is_made_without_systemd_sysusers() -> None:
    install()
    test_there_is_a_user_nobody_can_log_in_as()


@pytest.mark.usefixtures("no_user")
def test_a_user_of_that_name_is_kept() -> None:
    run("useradd", "--uid", "1234", "--shell", "/bin/sh", USER)
    install()
    user = pwd.getpwnam(USER)
    assert (user.pw_uid, user.pw_shell) == (1234, "/bin/sh")

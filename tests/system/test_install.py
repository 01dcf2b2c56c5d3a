"""scripts/install.sh on a real systemd: owners, modes, upgrades, removal.

Runs inside the test bed, whose root is an overlay, so that nothing reaches the machine itself.
"""

from __future__ import annotations

import pwd
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.installing import (
    CONFIG,
    DATA,
    INSTALL,
    KEY,
    MODES,
    PREFIX,
    PROGRAM,
    ROOT,
    SERVICE,
    SLICES,
    SYSTEM,
    SYSUSERS,
    TMPFILES,
    USER,
    WHEELS,
    install,
    modes,
    run,
    show,
    stand_in,
)

pytestmark = pytest.mark.usefixtures("first_install")


@pytest.fixture
def configured() -> Iterator[str]:
    """A config.env that an operator has edited, without a master to go to."""
    before = CONFIG.read_text()
    edited = before.replace("MAX_CONCURRENT_JOBS=4", "MAX_CONCURRENT_JOBS=7")
    assert edited != before
    CONFIG.write_text(edited)
    yield edited
    CONFIG.write_text(before)
    CONFIG.with_name("config.env.new").unlink(missing_ok=True)


def test_owners_and_modes_are_the_guides() -> None:
    assert modes() == MODES
    for path in MODES:
        owner = Path(path).stat()
        assert (owner.st_uid, owner.st_gid) == (0, 0), path


def test_program_runs_from_its_own_venv() -> None:
    assert PROGRAM.is_symlink()
    assert PROGRAM.resolve().is_relative_to(PREFIX / "releases")
    version = run("/bin/sh", "-c", "cd / && ffmpeg-worker --version").stdout
    wheel = next(WHEELS.glob("ffmpeg_worker-*.whl")).name.split("-")[1]
    assert wheel in version


def test_units_are_valid() -> None:
    units = [SYSTEM / unit for unit in (SERVICE, *SLICES)]
    done = run("systemd-analyze", "verify", "--man=no", *units)  # man need not be installed
    assert done.stdout + done.stderr == ""


def test_enabled_but_not_started_with_the_placeholder(first_install: str) -> None:
    assert show(SERVICE, "UnitFileState") == "enabled"
    assert show(SERVICE, "ActiveState") == "inactive"
    assert "MASTER_URL is still the placeholder" in first_install
    assert f"systemctl start {SERVICE}" in first_install


def test_exposure_stays_low() -> None:
    done = run("systemd-analyze", "security", "--offline=yes", "--threshold=25", SYSTEM / SERVICE)
    assert "Overall exposure level" in done.stdout


def test_second_install_keeps_the_configuration(configured: str) -> None:
    before = PROGRAM.resolve()
    done = install()
    assert CONFIG.read_text() == configured
    # what is shipped has not changed, so there is nothing to compare
    assert not CONFIG.with_name("config.env.new").exists()
    assert modes() == MODES
    assert PROGRAM.resolve() != before
    assert before.exists(), "the release before must stay while it may still be running"
    assert show(SERVICE, "ActiveState") == "inactive"
    assert "warning" not in done.stderr


def test_new_version_of_the_configuration_is_put_beside(configured: str) -> None:
    (PREFIX / "config.env.shipped").write_text("# an older one\n")
    done = install()
    assert CONFIG.read_text() == configured
    new = CONFIG.with_name("config.env.new")
    assert new.read_text() == (ROOT / "etc/ffmpeg-worker/config.env").read_text()
    assert stat.S_IMODE(new.stat().st_mode) == 0o600
    assert str(new) in done.stdout


def test_old_releases_do_not_pile_up() -> None:
    before = PROGRAM.resolve().parents[1]
    for name in ("20200101T000000.aaaaaa", "20210101T000000.bbbbbb"):
        (PREFIX / "releases" / name).mkdir()
    install()
    now = PROGRAM.resolve().parents[1]
    assert set((PREFIX / "releases").iterdir()) == {before, now}


def test_failed_upgrade_leaves_the_old_release_at_work(tmp_path: Path) -> None:
    before = PROGRAM.resolve()
    releases = sorted((PREFIX / "releases").iterdir())
    done = run(INSTALL, "--wheels", tmp_path, check=False)
    assert done.returncode == 1
    assert "nothing was changed" in done.stderr
    assert PROGRAM.resolve() == before
    assert sorted((PREFIX / "releases").iterdir()) == releases
    run(PROGRAM, "--version")


def test_file_modes_are_repaired() -> None:
    CONFIG.chmod(0o644)
    DATA.chmod(0o755)
    KEY.write_text("a key")
    KEY.chmod(0o644)
    install()
    assert modes() == MODES
    assert stat.S_IMODE(KEY.stat().st_mode) == 0o600
    KEY.unlink()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--purge"], "--purge goes with --uninstall"),
        (["--wheels"], "--wheels needs a folder"),
        (["--wheels", "/nonexistent"], "/nonexistent: there is no such folder"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], sentence: str) -> None:
    done = run(INSTALL, *arguments, check=False)
    assert done.returncode == 1
    assert sentence in done.stderr


def test_an_interpreter_that_the_service_cannot_see_is_refused() -> None:
    copy = Path("/root/python3")
    shutil.copy("/usr/bin/python3", copy)  # what the link leads to
    done = run("env", f"PYTHON={copy}", INSTALL, check=False)
    copy.unlink()
    assert done.returncode == 1
    assert f"{copy} lies in a home" in done.stderr


def test_needs_root() -> None:
    copy = Path("/tmp/install-as-somebody.sh")  # the checkout may be where nobody else can read
    shutil.copy(INSTALL, copy)
    done = run("setpriv", "--reuid=65534", "--clear-groups", copy, check=False)
    copy.unlink()
    assert done.returncode == 1
    assert "run this as root" in done.stderr


def test_setup_names_a_checkout_that_cannot_be_written() -> None:
    done = run(ROOT / "scripts/setup.sh", check=False)  # the bed shows the project read-only
    assert done.returncode == 1
    assert (
        done.stderr == f"setup: {ROOT} cannot be written: clone the project to a folder that can.\n"
    )


@pytest.mark.usefixtures("with_a_master")
def test_started_and_restarted_once_there_is_a_master() -> None:
    stand_in('systemd-notify --ready; echo "$MASTER_URL $LOG_FILE" >seen; exec sleep 1000')
    done = install()
    assert "installed and running" in done.stdout
    assert "MASTER_API_KEY" in done.stderr, "the key is the placeholder still"
    assert show(SERVICE, "ActiveState") == "active"
    first = show(SERVICE, "InvocationID")
    install()
    assert show(SERVICE, "ActiveState") == "active"
    assert show(SERVICE, "InvocationID") != first, "an upgrade restarts into the new release"
    seen = (DATA / "seen").read_text().split()
    assert seen == ["https://192.168.1.100:8080", "/var/log/ffmpeg-worker/worker.log"]


JOB = "ffmpeg-job-installed.service"


@pytest.fixture
def job() -> Iterator[str]:
    """A unit of the kind that jobs are; its invocation."""
    run("systemd-run", "--unit", JOB, "--slice", "ffmpeg-batch.slice", "sleep", "1000")
    yield show(JOB, "InvocationID")
    run("systemctl", "stop", JOB, check=False)


@pytest.mark.usefixtures("with_a_master")
def test_jobs_run_on_during_an_upgrade(job: str) -> None:
    stand_in("systemd-notify --ready; exec sleep 1000")
    install()
    done = install()
    assert show(SERVICE, "ActiveState") == "active"
    assert (show(JOB, "ActiveState"), show(JOB, "InvocationID")) == ("active", job)
    assert "run on: 1; systemctl status" in done.stdout


@pytest.mark.usefixtures("with_a_master", "job")
def test_uninstall_has_the_worker_see_its_jobs_off() -> None:
    ledger = DATA / "ledger.db"
    ledger.touch()
    seen = ledger.with_name("seen")
    # What it finds when it is told to stop: a job that nobody has stopped before it.
    stand_in(
        f'trap "systemctl is-active {JOB} >seen; sleep 1; systemctl is-active {JOB} >>seen; exit" '
        "TERM; systemd-notify --ready; while :; do sleep 0.1; done"
    )
    install()
    done = run(INSTALL, "--uninstall")
    assert seen.read_text() == "active\nactive\n"
    assert show(JOB, "ActiveState") == "inactive"
    assert "as STOP_MODE says (running: 1)" in done.stdout
    assert f"{ledger} knows every job" in done.stdout
    assert ledger.exists()
    ledger.unlink()
    install()


@pytest.mark.usefixtures("with_a_master")
def test_a_configuration_error_is_told_and_not_tried_again() -> None:
    stand_in("exit 2")
    done = install(check=False)
    assert done.returncode == 1
    assert f"journalctl -u {SERVICE}" in done.stderr
    # Otherwise it would be "activating", in wait for its next start.
    assert show(SERVICE, "ActiveState") == "failed"
    assert show(SERVICE, "ExecMainStatus") == "2"


def test_only_files_where_systemd_does_not_run() -> None:
    """/run is where a running systemd is recognised by, sd_booted(3)."""
    without_run = 'mount -t tmpfs none /run && exec "$0" --wheels "$1"'
    done = run("unshare", "--mount", "/bin/sh", "-c", without_run, INSTALL, WHEELS)
    assert "enabled" in done.stdout
    assert modes() == MODES
    assert (SYSTEM / "multi-user.target.wants" / SERVICE).is_symlink()


def test_a_hand_made_installation_is_kept_aside() -> None:
    run(INSTALL, "--uninstall")
    for path in (PROGRAM, SYSTEM / SERVICE):
        path.write_text("made by hand")
    install()
    for path in (PROGRAM, SYSTEM / SERVICE):
        kept = path.with_name(path.name + ".disabled")
        assert kept.read_text() == "made by hand"
        kept.unlink()
    assert PROGRAM.is_symlink()


def test_uninstall_tells_the_way_back_to_a_hand_made_installation() -> None:
    kept = PROGRAM.with_name(PROGRAM.name + ".disabled")
    kept.write_text("made by hand")
    assert f"mv {kept} {PROGRAM}" in run(INSTALL, "--uninstall").stdout
    kept.unlink()
    assert "mv " not in run(INSTALL, "--uninstall").stdout
    install()


def test_uninstall_keeps_configuration_and_data(configured: str) -> None:
    data = DATA / "kept"
    data.write_text("a job's")
    said = run(INSTALL, "--uninstall").stdout
    assert CONFIG.read_text() == configured
    assert data.exists()
    wanted = SYSTEM / "multi-user.target.wants" / SERVICE
    for gone in (PREFIX, PROGRAM, SYSTEM / SERVICE, wanted, SYSUSERS, TMPFILES):
        assert not gone.exists()
        assert not gone.is_symlink()
    assert show(SERVICE, "LoadState") == "not-found"
    assert f"userdel {USER}" in said
    assert pwd.getpwnam(USER)

    run(INSTALL, "--uninstall")  # nothing left to do is no error
    install()
    assert CONFIG.read_text() == configured
    assert shutil.which("ffmpeg-worker", path="/usr/local/bin") == str(PROGRAM)

"""The project's tests that need a systemd, run in a virtual machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import vm_host
from bed_kernel import BedError
from vm_image import Image
from vm_machine import Machine

PROJECT = Path(__file__).resolve().parents[2]
CHECKOUT = "/srv/ffmpeg-worker"  # the project's folder in the guest
_REPORTS = "/var/tmp/reports"
_PYTHON = {"bookworm": "3.11", "trixie": "3.13"}
_NEWEST_GLIBC = 36  # bookworm has 2.36
# For the host: dbus-python, which the last needs, would have to be compiled.
_NOT_IN_GUEST = ("mypy", "ruff", "python-dbusmock")
_LEFT_OUT = ("./.venv", "./.git", "./build", "./dist", "./.hypothesis", ".*_cache", "__pycache__")
_PIP_TIMEOUT_SEC = 600.0
# Software emulation takes this many times longer; the tests read it.
_SLOWNESS = "20"
# The bed makes cgroups below its own, so that has to be delegated to it, as it says itself.
_DELEGATED = ["systemd-run", "--quiet", "--scope", "--property=Delegate=yes", "--"]
_LAUNCHER = "tests/system/test_launcher.py"
_INTERFERENCE = "tests/system/test_launcher_interference.py"
_SANDBOX = "tests/system/test_sandbox.py"
# What runs, by the name of its report: a command before pytest's, and what pytest is given.
# test_install.py is left out: it is about files, the same on every cgroup version, and makes a
# virtual environment a dozen times, which takes minutes each where the processor is emulated.
_RUNS: dict[str, tuple[list[str], list[str]]] = {
    "system": (
        [],
        [
            "tests/system/test_units.py",
            "tests/system/test_user.py",
            "tests/system/test_enforcement.py",
            "tests/system/test_attach.py",
            "tests/system/test_attach_safety.py",
            "tests/system/test_meters.py",
            "tests/system/test_adoption.py",
            "tests/system/test_ownunit.py",
            "tests/system/test_sandbox.py",
            "tests/system/test_rootless.py",
            "tests/system/test_overrides.py",
            "tests/system/test_survivors.py",
            "tests/system/test_diskwatch.py",
            _LAUNCHER,
            _INTERFERENCE,
            "tests/e2e",
        ],
    ),
    "bed": (_DELEGATED, ["tests/bed/test_bed.py", "tests/bed/test_bed_life.py"]),
    # Of these, those in which cgroup v2 or the version of systemd matter most, for every day.
    "core": (
        [],
        [
            "tests/system/test_units.py",
            "tests/system/test_user.py",
            "tests/system/test_enforcement.py::test_the_systems_manager_enforces_limits_and_says_so",
            "tests/system/test_attach.py::test_a_twentieth_of_a_core_for_a_foreign_ffmpeg_and_more_again",
            "tests/system/test_attach.py::test_the_memory_limit_kills_a_foreign_ffmpeg",
            "tests/system/test_attach.py::test_children_are_included_those_to_come_as_well",
            "tests/system/test_attach.py::test_in_the_user_s_own_manager",
            "tests/system/test_meters.py",
            "tests/system/test_adoption.py::test_a_running_unit",
            "tests/system/test_adoption.py::test_the_limit_holds_after_two_pauses",
            "tests/system/test_adoption.py::test_a_pause_outlives_the_agent",
            "tests/system/test_adoption.py::test_a_paused_unit_is_stopped_at_once",
            "tests/system/test_adoption.py::test_nothing_is_left_of_a_pause",
            f"{_SANDBOX}::test_two_jobs_are_two_users_who_see_nothing_of_each_other",
            f"{_SANDBOX}::test_the_kernels_limit_on_memory_is_told_from_a_kill",
            f"{_SANDBOX}::test_exposure_of_a_streaming_job",
            "tests/system/test_rootless.py",
            "tests/system/test_survivors.py",
            _LAUNCHER,
            _INTERFERENCE,
            "tests/e2e/test_jobs.py::test_a_generated_job_reports_the_truth",
            "tests/e2e/test_durable.py::test_jobs_run_on_while_the_agent_is_replaced[kill]",
        ],
    ),
    # What only cgroup v2 can show, and no test that looks at the time: for each change.
    "v2": (
        [],
        [
            "tests/system/test_units.py",
            *(
                f"{_LAUNCHER}::{name}"
                for name in (
                    "test_a_memory_limit_kills_and_is_told_every_time",
                    "test_a_kill_is_not_taken_for_lack_of_memory",
                    "test_a_file_limit",
                    "test_a_task_limit",
                    "test_exit_statuses",
                    "test_stop_of_a_suspended_program",
                    "test_what_a_unit_used",
                )
            ),
            f"{_SANDBOX}::test_the_kernels_limit_on_memory_is_told_from_a_kill",
            "tests/system/test_attach.py::test_the_memory_limit_kills_a_foreign_ffmpeg",
            "tests/system/test_user.py::test_limits_of_a_running_job",
            "tests/e2e/test_jobs.py::test_a_generated_job_reports_the_truth",
        ],
    ),
    "core-bed": (
        _DELEGATED,
        [
            "tests/bed/test_bed.py",
            "tests/bed/test_bed_life.py::test_killed_run_leaves_nothing",
        ],
    ),
}
PARTS = {
    "all": ("system", "bed"),
    "system": ("system",),
    "bed": ("bed",),
    "core": ("core", "core-bed"),
    "v2": ("v2",),
}
"""What can be asked for, and the runs it consists of."""


def packages(image: Image) -> Path:
    """A .venv for the guest's Python, with all that the tests import. Raises BedError."""
    version = _PYTHON[image.suite]
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    wanted = [item for item in wanted if not item.startswith(_NOT_IN_GUEST)]
    constraints = PROJECT / "constraints.txt"
    text = "\n".join([version, *wanted, constraints.read_text(), Path(__file__).read_text()])
    stamp = hashlib.sha256(text.encode()).hexdigest()
    folder = image.home / "packages"
    if (folder / "stamp").exists() and (folder / "stamp").read_text() == stamp:
        return folder
    print(f"vm: fetching Python packages for {image.suite}", flush=True)
    draft = image.home / "packages.new"
    shutil.rmtree(draft, ignore_errors=True)
    site = draft / f"lib/python{version}/site-packages"
    python = PROJECT / ".venv/bin/python"
    command = [str(python if python.exists() else sys.executable), "-m", "pip", "install"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "--no-compile"]
    command += ["--target", str(site), "-c", str(constraints), "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", version]
    for minor in range(_NEWEST_GLIBC, 16, -1):
        command += ["--platform", f"manylinux_2_{minor}_x86_64"]
    command += ["--platform", "manylinux2014_x86_64", *wanted]
    with (image.home / "pip.log").open("w") as log:
        if vm_host.run_logged(command, log, _PIP_TIMEOUT_SEC):
            raise BedError(
                f"pip cannot fetch the packages for Python {version}, see {log.name}: "
                "mostly the index is out of reach, then try again"
            )
    (site / "project.pth").write_text(f"{CHECKOUT}\n")
    (draft / "pyvenv.cfg").write_text(
        f"home = /usr/bin\ninclude-system-site-packages = true\nversion = {version}\n"
    )
    (draft / "bin").mkdir()
    (draft / "bin/python").symlink_to("/usr/bin/python3")
    program = draft / "bin/ffmpeg-worker"
    program.write_text(
        f"#!{CHECKOUT}/.venv/bin/python\n"
        "import sys\nfrom worker.__main__ import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    (draft / "stamp").write_text(stamp)
    shutil.rmtree(folder, ignore_errors=True)
    draft.rename(folder)
    return folder


def run(image: Image, machine: Machine, part: str, arguments: Sequence[str], timeout: float) -> int:
    """Run a part of the tests in the running machine for at most `timeout` seconds in all.

    Returns pytest's status. All runs take place, also after one has failed. Reports, and after
    a failure the journal, are in build/vm/SUITE then. Raises BedError where time is up.
    """
    deadline = time.monotonic() + timeout
    results = PROJECT / "build/vm" / image.suite
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    machine.push(PROJECT, CHECKOUT, _LEFT_OUT)
    machine.push(packages(image), f"{CHECKOUT}/.venv")
    # The tests' services cannot write bytecode, and would compile for seconds at each start.
    machine.run([f"cd {CHECKOUT} && .venv/bin/python -c 'import worker.agent, worker.cli'"])
    # A tmpfs of half the memory on trixie, where jobs with default limits may need 5 GB of disk.
    machine.run(["! mountpoint -q /tmp || mount -o remount,size=6G /tmp"], timeout=60)
    # Arguments that are paths take the place of a part's own.
    given = [item for item in arguments if item.startswith("tests/")]
    if given:
        part = "bed" if given[0].startswith("tests/bed") else "system"
    status = 0
    for name in PARTS[part]:
        wrapper, paths = _RUNS[name]
        print(f"== {name} tests on {image.suite}, cgroup v2", flush=True)
        began = time.monotonic()
        slowness = os.environ.get("FFMPEG_WORKER_SLOWNESS", _SLOWNESS)
        command = ["env", "FFMPEG_WORKER_BED=1", f"FFMPEG_WORKER_SLOWNESS={slowness}", *wrapper]
        command += [".venv/bin/python", "-m", "pytest", "-p", "no:cacheprovider", "--color=no"]
        command += [f"--junitxml={_REPORTS}/{name}.xml", *arguments, *([] if given else paths)]
        line = f"cd {CHECKOUT} && exec {shlex.join(command)}"
        try:
            done = machine.run(
                [line], timeout=max(1.0, deadline - time.monotonic()), stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            _collect(machine, results, failed=True)
            raise BedError(
                f"the {name} tests did not end within {timeout:.0f} s; the journal is in "
                f"{results}: see where they hang, or give them more with --timeout"
            ) from None
        except BedError:
            raise BedError(
                f"the virtual machine hung or died in the {name} tests, and is ended: "
                f"{machine.said()}; try again, or see what else needs the processors here"
            ) from None
        status = status or done.returncode
        print(f"== {name}: status {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    _collect(machine, results, failed=status != 0)
    return status


def _collect(machine: Machine, results: Path, *, failed: bool) -> None:
    # Where even this fails, what has failed before is told, not this.
    problems = (BedError, subprocess.SubprocessError)
    with contextlib.suppress(*problems):
        machine.pull(_REPORTS, results)
    if failed:
        command = ["journalctl --no-pager --output=short-monotonic --boot"]
        with (results / "journal.txt").open("wb") as file, contextlib.suppress(*problems):
            machine.run(command, timeout=300, stdin=subprocess.DEVNULL, stdout=file)
        print(f"== reports and journal: {results}", flush=True)

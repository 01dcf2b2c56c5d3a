"""The service files and the configuration that is shipped."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from worker.config import KEYS, resolve
from worker.config.envfile import parse_env
from worker.config.resolve import CREDENTIAL

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "units"
CONFIG = ROOT / "etc/ffmpeg-worker/config.env"
CONFIG_DIR = Path("/etc/ffmpeg-worker")
LOGROTATE = ROOT / "etc/ffmpeg-worker/logrotate"
SERVICE = UNITS / "ffmpeg-worker.service"
SYSUSERS = ROOT / "units/sysusers.d/ffmpeg-worker.conf"
TMPFILES = ROOT / "units/tmpfiles.d/ffmpeg-worker.conf"
QUEUES = ("live", "default", "batch")

# What an operator who followed the deployment guide has in place.
GUIDE = {
    "MASTER_URL": "https://MASTER_IP:8080",
    "MASTER_API_KEY": "your-api-key-here",
    "MAX_CONCURRENT_JOBS": "4",
    "POLL_INTERVAL": "3s",
    "HEARTBEAT_INTERVAL": "30s",
    "DEFAULT_CPU_PERCENT": "200",
    "DEFAULT_MEMORY_MB": "2048",
    "DEFAULT_DISK_MB": "5000",
    "DEFAULT_TIMEOUT_SEC": "3600",
    "GENERATE_INPUT": "true",
    "INSECURE_SKIP_VERIFY": "false",
    "METRICS_PORT": "9091",
}


def parse_unit(path: Path) -> dict[str, list[str]]:
    """``Section.Key`` to all of its values (systemd.syntax(7)); no line is left unread."""
    found: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if not line or line.startswith(("#", ";")):
            continue
        if match := re.fullmatch(r"\[(\w+)\]", line):
            section = match[1]
            continue
        match = re.fullmatch(r"([A-Za-z]+)=(.*)", line)
        assert match is not None, f"{path.name}: not a line of a unit file: {line!r}"
        assert section, f"{path.name}: outside of every section: {line!r}"
        found.setdefault(f"{section}.{match[1]}", []).append(match[2])
    return found


def only(unit: Mapping[str, list[str]], key: str) -> str:
    (value,) = unit[key]
    return value


def shipped_config() -> dict[str, str]:
    parsed = parse_env(CONFIG.read_text())
    assert not parsed.ignored
    return {key: assignment.value for key, assignment in parsed.assignments.items()}


def optional_keys() -> dict[str, str]:
    """The keys that config.env shows commented out."""
    return dict(re.findall(r"^#([A-Z_]+)=(.*)$", CONFIG.read_text(), re.MULTILINE))


def test_config_has_the_guides_keys_and_values() -> None:
    assert shipped_config() == GUIDE


def test_config_names_every_key_of_the_worker_and_no_other() -> None:
    known = {key.names[0] for key in KEYS if key.names}
    assert set(GUIDE) | set(optional_keys()) == known
    assert not set(GUIDE) & set(optional_keys())


def test_placeholders_stand_once_so_that_replacing_them_touches_nothing_else() -> None:
    text = CONFIG.read_text()
    assert text.count("MASTER_IP") == 1
    assert text.count("your-api-key-here") == 1


def test_config_is_accepted_once_the_placeholder_is_gone() -> None:
    values = shipped_config() | {"MASTER_URL": "https://192.168.1.100:8080"}
    settings = resolve({}, values).settings
    assert settings.max_concurrent_jobs == 4
    assert settings.poll_interval == 3.0
    assert settings.default_memory_mb == 2048
    assert settings.insecure_skip_verify is False


def test_optional_values_shown_are_the_defaults() -> None:
    # LOG_FILE is the service's default, not the program's.
    shown = {key: value for key, value in optional_keys().items() if value and key != "LOG_FILE"}
    base = {"MASTER_URL": "https://master:8080"}
    assert resolve({}, base | shown).settings == resolve({}, base).settings


@pytest.mark.parametrize("path", sorted(UNITS.glob("*.s*ice")), ids=lambda path: path.name)
def test_unit_parses_and_is_described(path: Path) -> None:
    unit = parse_unit(path)
    assert only(unit, "Unit.Description")
    assert only(unit, "Unit.Documentation")


def test_there_is_a_slice_for_each_queue_and_one_around_them() -> None:
    names = {path.name for path in UNITS.glob("*.slice")}
    assert names == {"ffmpeg.slice", *(f"ffmpeg-{queue}.slice" for queue in QUEUES)}


@pytest.mark.parametrize("key", ["Slice.CPUWeight", "Slice.IOWeight"])
def test_weights_fall_from_live_to_batch(key: str) -> None:
    weights = [int(only(parse_unit(UNITS / f"ffmpeg-{queue}.slice"), key)) for queue in QUEUES]
    assert weights == sorted(set(weights), reverse=True)
    assert all(1 <= weight <= 10_000 for weight in weights)


@pytest.mark.parametrize("path", sorted(UNITS.glob("*.slice")), ids=lambda path: path.name)
def test_slices_account_for_everything(path: Path) -> None:
    unit = parse_unit(path)
    for resource in ("CPU", "Memory", "IO", "Tasks"):
        assert only(unit, f"Slice.{resource}Accounting") == "yes"


def test_nothing_secret_is_where_every_user_can_read_it() -> None:
    unit = parse_unit(SERVICE)
    assert only(unit, "Service.ExecStart") == "/usr/local/bin/ffmpeg-worker"
    assert only(unit, "Service.EnvironmentFile") == "/etc/ffmpeg-worker/config.env"
    secret = {name for key in KEYS if key.secret for name in key.names}
    assert secret >= {"MASTER_API_KEY"}
    shown = " ".join(unit["Service.Environment"])
    assert not any(name in shown for name in secret)


def test_service_sees_the_files_of_its_jobs() -> None:
    unit = parse_unit(SERVICE)
    assert "Service.PrivateTmp" not in unit
    assert "Service.PrivateDevices" not in unit
    writable = " ".join(unit["Service.ReadWritePaths"]).split()
    assert writable == [
        *("/var/lib/ffmpeg-worker", "/var/log/ffmpeg-worker"),
        *("-/run/systemd/units", "-/run/systemd/transient"),
    ]
    log_file = only(unit, "Service.Environment").removeprefix("LOG_FILE=")
    assert Path(log_file).parent == Path("/var/log/ffmpeg-worker")


def test_service_takes_the_api_key_from_a_credential_that_may_be_missing() -> None:
    unit = parse_unit(SERVICE)
    name, _, path = only(unit, "Service.LoadCredential").partition(":")
    assert (name, Path(path).parent) == (CREDENTIAL, CONFIG_DIR)
    # Without a default the service would not start where there is no such file; an empty one is
    # a syntax error to systemd.
    assert only(unit, "Service.SetCredential") == rf"{CREDENTIAL}:\n"


def test_a_credential_that_is_a_line_break_is_no_key(tmp_path: Path) -> None:
    (tmp_path / CREDENTIAL).write_text("\n")
    found = {"MASTER_URL": "https://master:8080", "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert resolve({}, found).settings.master_api_key is None
    found["MASTER_API_KEY"] = "from-config.env"
    key = resolve({}, found).settings.master_api_key
    assert key is not None
    assert key.get_secret_value() == "from-config.env"


def test_work_directory_has_the_same_mode_from_whoever_makes_it() -> None:
    mode = only(parse_unit(SERVICE), "Service.StateDirectoryMode")
    lines = [line.split() for line in TMPFILES.read_text().splitlines() if line[:1] == "d"]
    assert ["d", "/var/lib/ffmpeg-worker", mode, "root", "root", "-"] in lines


def test_what_is_made_at_boot_are_the_defaults() -> None:
    settings = resolve({}, {"MASTER_URL": "https://master:8080"}).settings
    (user,) = re.findall(r"^u (\S+) ", SYSUSERS.read_text(), re.MULTILINE)
    assert settings.output_owner == settings.job_group == user
    made = {line.split()[1] for line in TMPFILES.read_text().splitlines() if line[:1] == "d"}
    assert {str(path) for path in settings.input_dirs} <= made


@pytest.mark.parametrize("key", ["Slice.MemoryMax", "Slice.TasksMax"])
def test_the_ceiling_over_all_jobs_fits_any_machine(key: str) -> None:
    assert 0 < int(only(parse_unit(UNITS / "ffmpeg.slice"), key).removesuffix("%")) < 90


def test_service_gives_a_configuration_error_no_second_try() -> None:
    unit = parse_unit(SERVICE)
    assert only(unit, "Service.Restart") == "always"
    assert only(unit, "Service.RestartPreventExitStatus") == "2"


def test_logrotate_covers_the_log_of_the_service() -> None:
    lines = [line.strip() for line in LOGROTATE.read_text().splitlines()]
    (pattern,) = [line.removesuffix(" {") for line in lines if line.endswith("{")]
    assert Path("/var/log/ffmpeg-worker/worker.log").match(pattern)
    wanted = {"daily", "rotate 7", "compress", "delaycompress", "create 0644 root root"}
    assert wanted <= set(lines)


def test_make_works_in_a_folder_with_a_blank_in_its_name(tmp_path: Path) -> None:
    checkout = tmp_path / "two words"
    checkout.mkdir()
    shutil.copy(ROOT / "Makefile", checkout)
    for name in ("pyproject.toml", "constraints.txt", "scripts/setup.sh"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).touch()
    done = subprocess.run(
        ["make", "--dry-run", "demo", "test", "lint"], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "pytest" in done.stdout
    assert str(tmp_path) not in done.stdout  # it would have to be quoted


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_says_at_once_what_needs_root(target: str, tmp_path: Path) -> None:
    (tmp_path / "id").write_text("#!/bin/sh\necho 1000\n")
    (tmp_path / "id").chmod(0o755)
    search = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["make", target], cwd=ROOT, env={"PATH": search}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "run this as root" in done.stderr.splitlines()[0]
    assert done.stdout == ""

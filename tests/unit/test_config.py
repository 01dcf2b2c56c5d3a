from __future__ import annotations

import contextlib
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cli import check
from worker.config import KEYS, Resolved, Settings, resolve
from worker.config import parsers as parsers_module
from worker.config.envfile import EnvFileError, parse_env
from worker.errors import ConfigError
from worker.jobs.policy import Policy

MASTER = {"MASTER_URL": "https://master.example:8080"}
SECRET = "sesame-open-0123456789"


def config(tmp_path: Path, text: str, mode: int = 0o600) -> str:
    path = tmp_path / "config.env"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def wrong(*args: dict[str, str], config_file: str = "", need_master: bool = True) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(*args, config_file=config_file, need_master=need_master)
    assert caught.value.exit_status == 2
    return str(caught.value).splitlines()


def one_flag(flag: str, text: str) -> Resolved:
    return resolve({flag: text}, {}, need_master=False)


def test_defaults_are_the_guides() -> None:
    settings = resolve({}, MASTER).settings
    assert settings == Settings(
        master_url="https://master.example:8080", node_name=socket.gethostname()
    )
    assert settings.poll_interval == 3
    assert settings.heartbeat_interval == 30
    assert settings.max_concurrent_jobs == 4
    assert settings.job_check_interval == 5
    assert (settings.stop_mode, settings.stop_grace) == ("handback", 30)
    assert settings.history_days == 7
    assert settings.metrics_port == 9091
    assert settings.work_dir == Path("/var/lib/ffmpeg-worker")
    assert settings.generate_input
    limits = settings.defaults
    assert (limits.cpu_percent, limits.memory_mb, limits.disk_mb, limits.timeout_sec) == (
        200,
        2048,
        5000,
        3600,
    )


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    path = config(tmp_path, "METRICS_PORT=1\nPOLL_INTERVAL=1s\nMASTER_URL=http://file\n")
    environ = {"METRICS_PORT": "2", "POLL_INTERVAL": "2s"}
    resolved = resolve({"--metrics-port": "3"}, environ, config_file=path)
    assert resolved.settings.metrics_port == 3
    assert resolved.settings.poll_interval == 2
    assert resolved.settings.master_url == "http://file"
    assert resolved.sources["metrics_port"] == "--metrics-port"
    assert resolved.sources["poll_interval"] == "environment variable POLL_INTERVAL"
    assert resolved.sources["master_url"] == f"{path}:3: MASTER_URL"
    assert resolved.sources["log_level"] == "default"
    assert set(resolved.sources) == set(Settings.model_fields)


def test_an_empty_value_counts_as_not_given(tmp_path: Path) -> None:
    path = config(tmp_path, "METRICS_PORT=7\nPOLL_INTERVAL=\n")
    resolved = resolve(
        {"--metrics-port": "", "--generate-input": ""},
        {"METRICS_PORT": ""} | MASTER,
        config_file=path,
    )
    assert resolved.settings.metrics_port == 7
    assert resolved.settings.poll_interval == 3
    assert resolved.settings.generate_input


def test_all_wrong_values_are_reported_at_once_each_as_written(tmp_path: Path) -> None:
    path = config(tmp_path, "# port\nMETRICS_PORT=http\nPOLL_INTERVAL=3s # often\n")
    lines = wrong({"--heartbeat-interval": "30"}, {"MAX_CONCURRENT_JOBS": "many"}, config_file=path)
    assert lines == [
        "environment variable MAX_CONCURRENT_JOBS: 'many' must be a whole number from 1 to 1000, "
        "or auto (three quarters of the CPUs)",
        f"{path}:3: POLL_INTERVAL: '3s # often' must be a duration such as 500ms, 3s, 1m30s or "
        "1.5h; a comment needs a line of its own",
        "--heartbeat-interval: '30' has no unit: write 30s, 30m or the like",
        f"{path}:2: METRICS_PORT: 'http' must be a whole number from 0 to 65535",
        "MASTER_URL is missing: give --master URL, or set MASTER_URL in the environment or in the "
        "file that --config names",
    ]


@pytest.mark.parametrize(
    ("flag", "text", "accepted"),
    [
        ("--poll-interval", "99ms", "from 100ms to 1h"),
        ("--poll-interval", "-3s", "from 100ms to 1h"),
        ("--heartbeat-interval", "90s", "without a heartbeat for 90s the master gives our jobs"),
        ("--job-check-interval", "999ms", "from 1s to 5m"),
        ("--job-check-interval", "301s", "from 1s to 5m"),
        ("--stop-mode", "Drain", "must be handback, drain or leave"),
        ("--stop-grace", "-1s", "from 0s to 1h"),
        ("--stop-grace", "61m", "from 0s to 1h"),
        ("--history-days", "0", "from 1 to 3650"),
        ("--history-days", "7d", "from 1 to 3650"),
        ("--max-concurrent-jobs", "0", "from 1 to 1000, or auto"),
        ("--max-concurrent-jobs", "AUTO", "or auto"),
        ("--max-concurrent-jobs", "1_0", "from 1 to 1000"),
        ("--max-concurrent-jobs", "٣", "from 1 to 1000"),
        ("--default-cpu-percent", "0", "100 is one core"),
        ("--default-memory-mb", "15", "from 16"),
        ("--default-disk-mb", "-1", "from 1"),
        ("--default-timeout-sec", "1.5", "whole number"),
        ("--generate-input", "yes", "true or false"),
        ("--register", "maybe", "true or false"),
        ("--metrics-port", "65536", "from 0 to 65535"),
        ("--metrics-addr", "not here", "IPv4 or IPv6"),
        ("--log-level", "loud", "debug, info, warn"),
        ("--log-file", "worker.log", "absolute path"),
        ("--work-dir", "var/lib", "absolute path"),
        ("--work-dir", "/var/../etc", "without '..'"),
        ("--work-dir", "/", "a directory of its own"),
        ("--input-dirs", "media", "absolute path"),
        ("--input-dirs", "/a:b", "absolute path"),
        ("--input-dirs", "/a:/b/../c", "without '..'"),
        ("--input-dirs", "/a,/", "a directory of its own"),
        ("--output-dirs", "//", "a directory of its own"),
        ("--output-dirs", ":, ", "one directory at least"),
        ("--output-dirs", "/a\x1b", "absolute path"),
        ("--input-protocols", "http,gopher", "names out of file, http, https"),
        ("--input-protocols", ",", "names out of"),
        ("--output-protocols", "http", "names out of file, rtmp, rtmps"),
        ("--output-owner", "root:", "USER or USER:GROUP"),
        ("--output-owner", ":media", "USER or USER:GROUP"),
        ("--output-owner", "Media", "USER or USER:GROUP"),
        ("--output-owner", "a:b:c", "USER or USER:GROUP"),
        ("--output-owner", "-1", "USER or USER:GROUP"),
        ("--job-group", "two words", "name or number of a group"),
        ("--job-group", "٣", "name or number of a group"),
        ("--api-key-file", "key", "absolute path"),
        ("--node-name", "two words", "letters, digits"),
        ("--ca", "/nowhere/ca.pem", "No such file"),
    ],
)
def test_wrong_values_name_flag_value_and_what_is_accepted(
    flag: str, text: str, accepted: str
) -> None:
    (line,) = wrong({flag: text}, {}, need_master=False)
    assert line.startswith(f"{flag}: {text!r} ")
    assert accepted in line


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("https://m", "https://m"),
        ("http://m:8080/", "http://m:8080"),
        ("http://[::1]:1", None),
        ("https://10.0.0.1:8443/ffmpeg/", "https://10.0.0.1:8443/ffmpeg"),
    ],
)
def test_master_url(text: str, value: str | None) -> None:
    assert one_flag("--master", text).settings.master_url == (value or text)


@pytest.mark.parametrize(
    "text",
    [
        "master:8080",
        "ftp://m",
        "https://",
        "https://:8080",
        "http://m:99999",
        "http://m:0",
        "http://m?x=1",
        "http://m/#x",
        "http://m m",
        "http://m\n",
        "//m",
        "https://MASTER_IP:8080",
    ],
)
def test_a_master_url_that_cannot_work_is_refused(text: str) -> None:
    (line,) = wrong({"--master": text}, {})
    assert line.startswith(f"--master: {text!r} ")


def test_credentials_in_the_master_url_are_refused_and_not_shown() -> None:
    (line,) = wrong({"--master": f"https://me:{SECRET}@m:8080"}, {})
    assert "MASTER_API_KEY" in line
    assert SECRET not in line


@pytest.mark.parametrize("text", ["debug", "INFO", "Warn", "warning", "ERROR"])
def test_log_levels_in_any_case(text: str) -> None:
    level = one_flag("--log-level", text).settings.log_level
    assert level == {"warn": "warning"}.get(text.lower(), text.lower())


def test_how_jobs_are_watched_stopped_and_remembered() -> None:
    for mode in ("handback", "drain", "leave"):
        assert one_flag("--stop-mode", mode).settings.stop_mode == mode
    assert one_flag("--stop-grace", "0").settings.stop_grace == 0
    assert one_flag("--stop-grace", "1h").settings.stop_grace == 3600
    assert one_flag("--job-check-interval", "1s").settings.job_check_interval == 1
    assert one_flag("--job-check-interval", "5m").settings.job_check_interval == 300
    assert one_flag("--history-days", "3650").settings.history_days == 3650
    environ = MASTER | {"STOP_MODE": "leave", "STOP_GRACE": "2m", "HISTORY_DAYS": "30"}
    settings = resolve({}, environ | {"JOB_CHECK_INTERVAL": "10s"}).settings
    assert (settings.stop_mode, settings.stop_grace) == ("leave", 120)
    assert (settings.history_days, settings.job_check_interval) == (30, 10)


@pytest.mark.parametrize(("cpus", "jobs"), [(1, 1), (2, 1), (4, 3), (8, 6), (10, 7)])
def test_auto_is_three_quarters_of_the_cpus(
    monkeypatch: pytest.MonkeyPatch, cpus: int, jobs: int
) -> None:
    monkeypatch.setattr(parsers_module, "usable_cpus", lambda: cpus)
    assert one_flag("--max-concurrent-jobs", "auto").settings.max_concurrent_jobs == jobs


def test_the_key_comes_from_either_variable_and_is_never_shown() -> None:
    for name in ("MASTER_API_KEY", "FFMPEG_RTMP_API_KEY"):
        settings = resolve({}, MASTER | {name: SECRET}).settings
        assert settings.master_api_key is not None
        assert settings.master_api_key.get_secret_value() == SECRET
        assert SECRET not in repr(settings) + str(settings) + settings.model_dump_json()
    both = MASTER | {"MASTER_API_KEY": SECRET, "FFMPEG_RTMP_API_KEY": "other"}
    key = resolve({}, both).settings.master_api_key
    assert key is not None
    assert key.get_secret_value() == SECRET


def test_a_wrong_key_is_not_shown_either() -> None:
    (line,) = wrong({}, MASTER | {"MASTER_API_KEY": SECRET + " \n"})
    assert line.startswith("environment variable MASTER_API_KEY: must be visible ASCII")
    assert "sesame" not in line


def test_a_key_in_a_flag_works_with_a_warning() -> None:
    resolved = resolve({"--api-key": SECRET}, MASTER)
    assert resolved.settings.master_api_key is not None
    (warning,) = resolved.warnings
    assert "every local user" in warning
    assert SECRET not in warning


def test_a_credential_is_the_key_unless_flag_or_environment_give_one(tmp_path: Path) -> None:
    (tmp_path / "master-api-key").write_text(f"{SECRET}\n", encoding="utf-8")
    path = config(tmp_path, "MASTER_API_KEY=from-the-file\n")
    environ = MASTER | {"CREDENTIALS_DIRECTORY": str(tmp_path)}

    def key(flags: dict[str, str], **more: str) -> str:
        found = resolve(flags, environ | more, config_file=path).settings.master_api_key
        assert found is not None
        return found.get_secret_value()

    assert key({}) == SECRET
    assert key({}, MASTER_API_KEY="from-the-environment") == "from-the-environment"
    assert key({"--api-key": "from-the-flag"}) == "from-the-flag"


def test_no_credential_there_is_no_error(tmp_path: Path) -> None:
    environ = MASTER | {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert resolve({}, environ).settings.master_api_key is None


def test_an_unreadable_credential_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "master-api-key").mkdir()
    (line,) = wrong({}, MASTER | {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert line.startswith(f"credential {tmp_path}/master-api-key: cannot be read: ")


def test_warnings_about_the_master() -> None:
    def warnings(url: str, **more: str) -> str:
        return "\n".join(resolve({}, {"MASTER_URL": url} | more).warnings)

    assert warnings("https://m", MASTER_API_KEY=SECRET) == ""
    assert warnings("http://m") == ""
    assert "unencrypted" in warnings("http://m", MASTER_API_KEY=SECRET)
    for host in ("localhost", "127.0.0.1", "[::1]"):
        text = warnings(f"http://{host}:8080", MASTER_API_KEY=SECRET)
        assert "is this machine" in text
        assert "unencrypted" not in text
    assert "placeholder" in warnings("https://m", MASTER_API_KEY="your-api-key-here")
    assert "INSECURE_SKIP_VERIFY" in warnings("https://m", INSECURE_SKIP_VERIFY="true")


def test_certificate_and_key_belong_together(tmp_path: Path) -> None:
    pem = tmp_path / "a.pem"
    pem.touch()
    settings = resolve({"--cert": str(pem), "--key": str(pem)}, MASTER).settings
    assert settings.cert == settings.key == pem
    (line,) = wrong({"--cert": str(pem)}, MASTER)
    assert line == "--cert: --cert and --key belong together, give --key as well"


def test_implied_flags_are_accepted_and_saying_no_has_no_effect() -> None:
    names = ("--register", "--skip-confirmation", "--allow-master-as-worker")
    assert resolve(dict.fromkeys(names, "true"), MASTER).warnings == ()
    (warning,) = resolve({"--register": "false"}, MASTER).warnings
    assert warning == "--register: has no effect, it is always so"


def test_a_host_name_that_is_no_node_name_asks_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "")
    (line,) = wrong({}, MASTER)
    assert "--node-name" in line
    assert resolve({"--node-name": "n1"}, MASTER).settings.node_name == "n1"


def test_flags_and_names_are_unique() -> None:
    flags = [key.flag for key in KEYS]
    names = [name for key in KEYS for name in key.names]
    assert len(set(flags)) == len(flags)
    assert len(set(names)) == len(names)
    fields = [key.field for key in KEYS if key.field]
    assert sorted(fields) == sorted(Settings.model_fields)


# the --config file


def test_unknown_and_broken_lines_are_warned_about(tmp_path: Path) -> None:
    path = config(tmp_path, "COLOUR=red\nexport LOG_LEVEL=debug\nnonsense\n3X=1\n")
    assert resolve({}, MASTER, config_file=path).warnings == (
        f"{path}: line 2: passed over, write it without 'export'",
        f"{path}: line 3: no '=' in it, so it was passed over",
        f"{path}: line 4: passed over, '3X' is no name of a variable",
        f"{path}:1: COLOUR is not known and has no effect",
    )


def test_a_key_that_everybody_can_read_is_warned_about(tmp_path: Path) -> None:
    text = f"MASTER_API_KEY={SECRET}\n"
    assert resolve({}, MASTER, config_file=config(tmp_path, text, 0o600)).warnings == ()
    (warning,) = resolve({}, MASTER, config_file=config(tmp_path, text, 0o644)).warnings
    assert "chmod 600" in warning
    other = config(tmp_path, "LOG_LEVEL=info\n", 0o644)
    assert resolve({}, MASTER, config_file=other).warnings == ()


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (line,) = wrong({}, MASTER, config_file=str(tmp_path / "none.env"))
    assert line.startswith(f"--config {tmp_path}/none.env: cannot be read: No such file")
    binary = tmp_path / "binary"
    binary.write_bytes(b"A=\xff\n")
    (line,) = wrong({}, MASTER, config_file=str(binary))
    assert "not UTF-8" in line
    large = tmp_path / "large"
    large.write_bytes(b"#" * (1 << 20) + b"\n")
    (line,) = wrong({}, MASTER, config_file=str(large))
    assert "larger than 1 MiB" in line
    (line,) = wrong({}, MASTER, config_file=config(tmp_path, "A=1\nB='x\n"))
    assert line.endswith("line 2: the quote ' is never closed")


def test_nothing_is_said_to_be_missing_while_the_file_is_unread(tmp_path: Path) -> None:
    (line,) = wrong({}, {}, config_file=str(tmp_path / "none.env"))
    assert "MASTER_URL" not in line


def test_a_misspelt_key_is_named_beside_what_is_missing(tmp_path: Path) -> None:
    path = config(tmp_path, "MASTER_ULR=https://m:8080\n")
    missing, misspelt = wrong({}, {}, config_file=path)
    assert missing.startswith("MASTER_URL is missing")
    assert misspelt == f"warning: {path}:1: MASTER_ULR is not known and has no effect"


def test_the_guides_file_is_read_in_full(tmp_path: Path) -> None:
    path = config(
        tmp_path,
        "# Master\nMASTER_URL=https://192.168.1.100:8080\nMASTER_API_KEY=abc\n\n"
        "MAX_CONCURRENT_JOBS=4\nPOLL_INTERVAL=3s\nHEARTBEAT_INTERVAL=30s\n"
        "DEFAULT_CPU_PERCENT=200\nDEFAULT_MEMORY_MB=2048\nDEFAULT_DISK_MB=5000\n"
        "DEFAULT_TIMEOUT_SEC=3600\nGENERATE_INPUT=true\nINSECURE_SKIP_VERIFY=false\n"
        "METRICS_PORT=9091\n",
    )
    resolved = resolve({}, {}, config_file=path)
    assert resolved.warnings == ()
    assert sum(source.startswith(path) for source in resolved.sources.values()) == 12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("A=x", "x"),
        ("A=  x y \t", "x y"),
        ("A=x\r\n", "x"),
        (" A = x\n", "x"),
        ("A=a'b\"c", "a'b\"c"),
        ("A='a b '  ", "a b "),
        ('A="a b "', "a b "),
        ('A="a\\"b\\\\c\\$d\\e"', 'a"b\\c$d\\e'),
        ("A='a\\b'", "a\\b"),
        ("A='a\nb'\n", "a\nb"),
        ('A="a\\\nb"', "ab"),
        ("A=a\\\nb\n", "ab"),
        ("A=a\\ \n", "a "),
        ("A=a\\#b", "a#b"),
        ("A=x#y", "x#y"),
        ("A='a''b'\"c\"d", "abcd"),
        ("A=", ""),
        ("A=''", ""),
        ("A=1\nA=2\n", "2"),
        ("#A=1\n;A=3\nA=2", "2"),
        ("# ends in a backslash \\\nA=2", "2"),
        ("A=b=c", "b=c"),
    ],
)
def test_values_as_systemd_reads_them(text: str, value: str) -> None:
    env_file = parse_env(text)
    assert env_file.assignments["A"].value == value
    assert env_file.ignored == []


def test_lines_are_counted_across_quotes_and_continuations() -> None:
    env_file = parse_env("A='1\n2'\nB=x\\\ny\n\n# c\nC=3\n")
    assert {name: a.line for name, a in env_file.assignments.items()} == {"A": 1, "B": 3, "C": 7}


@given(st.text(alphabet="AB=\"'\\ \n#$x", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(EnvFileError):
        env_file = parse_env(text)
        assert all(1 <= a.line <= text.count("\n") + 1 for a in env_file.assignments.values())


def test_what_jobs_may_read_and_write() -> None:
    settings = resolve({}, MASTER).settings
    assert settings.policy == Policy()
    assert settings.input_dirs == (Path("/var/lib/ffmpeg-worker/media"),)
    assert settings.output_dirs == (Path("/var/lib/ffmpeg-worker"),)
    assert (settings.output_owner, settings.job_group) == ("ffmpeg-worker", "ffmpeg-worker")
    environ = MASTER | {
        "INPUT_DIRS": "/data//in/:/mnt/a b , //data/in",
        "INPUT_PROTOCOLS": "File, https",
        "OUTPUT_PROTOCOLS": "file",
        "OUTPUT_OWNER": "media:1000",
        "JOB_GROUP": "video",
        "WORK_DIR": "/srv/work",
    }
    settings = resolve({}, environ).settings
    assert settings.input_dirs == (Path("/data/in"), Path("/mnt/a b"))
    assert settings.output_dirs == (Path("/srv/work"),)
    assert {Path("/srv/work/jobs"), Path("/srv/work/ledger.db")} < set(settings.policy.closed)
    assert settings.policy.input_protocols == {"file", "https"}
    assert settings.policy.output_protocols == {"file"}
    assert (settings.output_owner, settings.job_group) == ("media:1000", "video")
    settings = resolve({"--output-dirs": "/x,/y"}, environ).settings
    assert settings.output_dirs == (Path("/x"), Path("/y"))


def test_check_shows_what_is_allowed() -> None:
    environ = MASTER | {"INPUT_DIRS": "/a:/b", "INPUT_PROTOCOLS": "https,file"}
    rows = {name: value for name, value, _ in check.rows(resolve({}, environ))}
    assert rows["INPUT_DIRS"] == "/a:/b"
    assert rows["OUTPUT_DIRS"] == "/var/lib/ffmpeg-worker"
    assert rows["INPUT_PROTOCOLS"] == "file,https"
    assert rows["OUTPUT_OWNER"] == "ffmpeg-worker"
    assert rows["MASTER_API_KEY_FILE"] == "-"

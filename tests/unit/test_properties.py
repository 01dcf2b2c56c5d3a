"""Which properties a unit is started with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from worker.errors import SystemdError
from worker.systemd.launch import DeviceLimit, Launch, UnitLimits
from worker.systemd.library import Variant
from worker.systemd.properties import properties
from worker.systemd.property import Property
from worker.systemd.sandbox import JobRoot, Sandbox

LAUNCH = Launch(
    unit="ffmpeg-job-a.service",
    description="job a",
    argv=("/usr/bin/ffmpeg", "-i", "in.mp4"),
    slice="ffmpeg-live.slice",
    limits=UnitLimits(),
    stdout=Path("/var/lib/x/main.out"),
)


def table(launch: Launch, version: int = 252, **options: object) -> dict[str, Property]:
    result = properties(launch, version=version, **options)  # type: ignore[arg-type]
    assert len({item.name for item in result}) == len(result)
    for item in result:
        Variant(item.signature, item.value)  # raises where the value does not fit its type
    return {item.name: item for item in result}


def test_the_fixed_part() -> None:
    values = {name: item.value for name, item in table(LAUNCH).items()}
    assert values == {
        "Description": "job a",
        "Type": "exec",
        "RemainAfterExit": True,
        "Slice": "ffmpeg-live.slice",
        "ExecStart": [["/usr/bin/ffmpeg", ["/usr/bin/ffmpeg", "-i", "in.mp4"], False]],
        "CPUAccounting": True,
        "MemoryAccounting": True,
        "IOAccounting": True,
        "TasksAccounting": True,
        "TasksMax": 512,
        "TimeoutStopUSec": 10_000_000,
        "KillMode": "control-group",
        "Nice": 10,
        "OOMPolicy": "kill",
        "OOMScoreAdjust": 500,
        "UMask": 0o077,
        "NoNewPrivileges": True,
        "StandardInput": "null",
        "StandardOutputFileToAppend": "/var/lib/x/main.out",
        "StandardError": "journal",
        "SyslogLevelPrefix": False,
        "SyslogIdentifier": "ffmpeg-job",
    }


def test_old_systemd_gets_what_it_knows() -> None:
    old = table(LAUNCH, version=239)
    assert old["Type"].value == "simple"
    assert old["StandardOutputFile"].value == "/var/lib/x/main.out"
    assert "StandardOutputFileToAppend" not in old


def test_limits() -> None:
    limits = UnitLimits(
        cpu_percent=150,
        memory_bytes=1 << 30,
        runtime_sec=1.5,
        file_bytes=1000,
        tasks_max=0,
        cpu_weight=300,
        io_weight=50,
        devices=(
            DeviceLimit("8:0", read_bps=1, write_iops=4),
            DeviceLimit("8:16", read_bps=2),
        ),
    )
    values = {name: i.value for name, i in table(replace(LAUNCH, limits=limits)).items()}
    assert values["CPUQuotaPerSecUSec"] == 1_500_000
    assert (values["MemoryMax"], values["MemorySwapMax"]) == (1 << 30, 0)
    assert values["RuntimeMaxUSec"] == 1_500_000
    assert values["LimitFSIZE"] == values["LimitFSIZESoft"] == 1000
    assert values["TasksMax"] == 1
    assert (values["CPUWeight"], values["IOWeight"]) == (300, 50)
    assert values["IOReadBandwidthMax"] == [["/dev/block/8:0", 1], ["/dev/block/8:16", 2]]
    assert values["IOWriteIOPSMax"] == [["/dev/block/8:0", 4]]
    assert "IOWriteBandwidthMax" not in values


def test_limits_and_safety_cannot_be_dropped() -> None:
    limits = UnitLimits(cpu_percent=1, memory_bytes=1, runtime_sec=1, file_bytes=1, cpu_weight=1)
    items = table(replace(LAUNCH, limits=limits), grep="/bin/grep", record_files=["/a"])
    optional = {name for name, item in items.items() if item.optional}
    assert optional == {
        "Description", "CPUAccounting", "MemoryAccounting", "IOAccounting", "TasksAccounting",
        "CPUWeight", "Nice", "OOMPolicy", "SyslogIdentifier", "ExecStopPost",
    }  # fmt: skip


def test_nothing_in_the_arguments_is_expanded() -> None:
    argv = ("/bin/echo", "$HOME", "${HOME}", "a$b", "$$", "%n", "ä\n\t\"'\\;")
    value = table(replace(LAUNCH, argv=argv))["ExecStart"].value
    expected = ["/bin/echo", "$$HOME", "$${HOME}", "a$$b", "$$$$", "%n", "ä\n\t\"'\\;"]
    assert value == [["/bin/echo", expected, False]]


def test_usage_record_needs_grep_and_files() -> None:
    files = ["/sys/fs/cgroup/x/cpu.stat"]
    assert "ExecStopPost" not in table(LAUNCH, record_files=files)
    assert "ExecStopPost" not in table(LAUNCH, grep="/bin/grep")
    item = table(LAUNCH, grep="/bin/grep", record_files=files)["ExecStopPost"]
    assert item.value == [["/bin/grep", ["/bin/grep", "-sH", ".", *files], True]]


def test_the_usage_record_is_made_outside_the_sandbox() -> None:
    files = ["/sys/fs/cgroup/x/cpu.stat"]
    sandbox = Sandbox(JobRoot(Path("/r"), ("/usr",)), Path("/w/files"))

    def outside(launch: Launch, grep: str | None, *, user: bool = False) -> list[object]:
        found = properties(launch, version=252, grep=grep, record_files=files, user=user)
        wanted = ("PermissionsStartOnly", "RootDirectoryStartOnly", "WorkingDirectory")
        return [item.value for item in found if item.name in wanted]

    launch = replace(LAUNCH, working_directory=Path("/w/files"))
    assert outside(launch, "/bin/grep") == ["/w/files"]
    boxed = replace(launch, sandbox=sandbox)
    assert outside(boxed, None) == ["-/w/files"]
    assert outside(boxed, "/bin/grep") == ["-/w/files", True, True]
    assert outside(boxed, "/bin/grep", user=True) == ["/w/files"]


def test_journal_fields_are_checked_and_escaped() -> None:
    fields = {"JOB_ID": "a\nPRIORITY=0\x1b[2Jä\ud800"}
    item = table(replace(LAUNCH, journal_fields=fields))["LogExtraFields"]
    assert item.value == ["JOB_ID=a\\nPRIORITY=0\\x1b[2Jä\\ud800".encode()]
    for name in ("_PID", "job", "1A", "A=B", "A" * 65, ""):
        with pytest.raises(SystemdError, match="journal field"):
            table(replace(LAUNCH, journal_fields={name: "x"}))


def test_environment_and_folder() -> None:
    launch = replace(LAUNCH, environment={"A": "1 $x"}, working_directory=Path("/tmp/w"))
    items = table(launch)
    assert items["Environment"].value == ["A=1 $x"]
    assert items["WorkingDirectory"].value == "/tmp/w"


def test_a_description_stays_one_line() -> None:
    assert table(replace(LAUNCH, description="a\nb"))["Description"].value == "a\\nb"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"argv": ("/bin/echo", "a\0b")}, "argument 1 contains a NUL"),
        ({"argv": ("/bin/echo", "a", "\udcff")}, "argument 2 is not valid Unicode"),
        ({"argv": ("echo",)}, "absolute path"),
        ({"argv": ()}, "absolute path"),
        ({"environment": {"A": "\udcff"}}, "environment variable A"),
        ({"stdout": Path("/x/\udcff")}, "output file"),
        ({"limits": UnitLimits(devices=(DeviceLimit("sda", read_bps=1),))}, "MAJOR:MINOR"),
    ],
)
def test_what_cannot_be_sent_is_named(changes: dict[str, object], text: str) -> None:
    with pytest.raises(SystemdError, match=text):
        table(replace(LAUNCH, **changes))  # type: ignore[arg-type]


def test_a_unit_without_a_usage_record() -> None:
    for recorded in (True, False):
        launch = replace(LAUNCH, usage_record=recorded)
        found = table(launch, grep="/usr/bin/grep", record_files=["/sys/fs/cgroup/a/cpu.stat"])
        assert ("ExecStopPost" in found) == recorded

"""How a unit is closed in: the properties, and the root that jobs see."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from worker.systemd.library import Variant
from worker.systemd.sandbox import Device, JobRoot, Sandbox, sandbox_properties

ROOT = JobRoot(
    Path("/var/lib/w/root"), ("/usr", "/opt"), ("/etc/fonts",), ("/etc/hosts", "/etc/ssl/certs")
)
FOLDER = Path("/var/lib/w/jobs/7/files")
MEDIA = Path("/srv/media/in.mp4")
JOB = Sandbox(ROOT, FOLDER, (MEDIA,), "ffmpeg-worker")


def values(sandbox: Sandbox, *, user: bool = False) -> dict[str, object]:
    found: dict[str, object] = {}
    for item in sandbox_properties(sandbox, user=user):
        Variant(item.signature, item.value)  # raises where the value does not fit its type
        assert item.name not in found or item.name == "SystemCallFilter"
        found[item.name] = item.value
    return found


def mounted(value: object) -> dict[str, str]:
    """Bind mounts: what is seen, by where."""
    assert isinstance(value, list)
    return {row[1]: row[0] for row in value}


def test_a_file_job_sees_its_folder_its_input_and_programs() -> None:
    found = values(JOB)
    assert found["RootDirectory"] == "/var/lib/w/root"
    seen = ("/usr", "/opt", "/etc/fonts", str(MEDIA))
    assert mounted(found["BindReadOnlyPaths"]) == {path: path for path in seen}
    folder = str(FOLDER)
    assert mounted(found["BindPaths"]) == {folder: folder, "/tmp": folder, "/var/tmp": folder}
    hidden = found["TemporaryFileSystem"]
    assert isinstance(hidden, list)
    assert [path for path, _ in hidden] == ["/run", "/srv", "/var", "/dev/shm"]
    assert all("ro" in options.split(",") for _, options in hidden[:-1])


def test_a_file_job_has_no_network() -> None:
    found = values(JOB)
    assert found["PrivateNetwork"] is True
    assert found["RestrictAddressFamilies"] == [True, []]
    assert found["IPAddressDeny"] == [[2, bytes(4), 0], [10, bytes(16), 0]]


def test_a_streaming_job_has_the_network_but_not_the_cloud_it_runs_in() -> None:
    found = values(Sandbox(ROOT, FOLDER, network=True))
    assert "PrivateNetwork" not in found
    assert found["RestrictAddressFamilies"] == [True, ["AF_INET", "AF_INET6"]]
    denied = found["IPAddressDeny"]
    assert isinstance(denied, list)
    assert [2, bytes([169, 254, 0, 0]), 16] in denied
    assert {"/etc/hosts", "/etc/ssl/certs"} <= set(mounted(found["BindReadOnlyPaths"]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DynamicUser", True),
        ("Group", "ffmpeg-worker"),
        ("NoNewPrivileges", True),
        ("CapabilityBoundingSet", 0),
        ("AmbientCapabilities", 0),
        ("RestrictNamespaces", 0),
        ("PrivateUsers", True),
        ("PrivateTmp", True),
        ("PrivateDevices", True),
        ("PrivateIPC", True),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("ProtectProc", "invisible"),
        ("ProcSubset", "pid"),
        ("InaccessiblePaths", ["-+/sys/fs", "-+/sys/kernel"]),
        ("MemoryDenyWriteExecute", True),
        ("DevicePolicy", "closed"),
        ("UMask", 0o077),
        ("LimitCORE", 0),
        ("KeyringMode", "private"),
        ("SystemCallArchitectures", ["native"]),
        ("SystemCallErrorNumber", 1),
    ],
)
def test_every_job(name: str, value: object) -> None:
    assert values(JOB)[name] == value


def test_system_calls_are_first_allowed_and_then_denied() -> None:
    rows = [
        item.value for item in sandbox_properties(JOB) if item.name == "SystemCallFilter"
    ]  # systemd adds up the rows in their order
    assert len(rows) == 2
    assert rows[0] == [True, ["@system-service"]]
    assert isinstance(rows[1], list)
    assert rows[1][0] is False
    assert {"@privileged", "@resources", "@debug", "io_uring_setup"} <= set(rows[1][1])


def test_only_what_later_versions_brought_is_optional() -> None:
    assert {item.name for item in sandbox_properties(JOB) if item.optional} == {
        "ProtectHostname", "ProtectClock", "ProtectProc", "ProcSubset", "PrivateIPC", "NoExecPaths",
    }  # fmt: skip


def test_a_job_for_a_gpu_gets_its_nodes_and_no_other_device() -> None:
    node = Device("/dev/dri/renderD128", "render")
    found = values(
        Sandbox(ROOT, FOLDER, devices=(node, Device("/dev/nvidia0")), generates_code=True)
    )
    assert found["DeviceAllow"] == [["/dev/dri/renderD128", "rw"], ["/dev/nvidia0", "rw"]]
    assert found["SupplementaryGroups"] == ["render"]
    assert "/dev/dri/renderD128" in mounted(found["BindPaths"])
    assert found["PrivateDevices"] is True
    assert found["MemoryDenyWriteExecute"] is False  # its drivers generate code


def test_what_lies_below_tmp_is_seen_in_an_empty_tmp() -> None:
    found = values(Sandbox(ROOT, Path("/tmp/w/jobs/7/files")))
    assert mounted(found["BindPaths"]).keys() == {"/tmp/w/jobs/7/files", "/var/tmp"}
    hidden = found["TemporaryFileSystem"]
    assert isinstance(hidden, list)
    assert "/tmp" in [path for path, _ in hidden]
    assert found["PrivateTmp"] is False  # it would be put over what is mounted there


def test_nothing_that_a_job_writes_can_be_run() -> None:
    # with "+", or it would be about the host's root: systemd.exec(5)
    assert values(JOB)["NoExecPaths"] == [f"+{FOLDER}", "+/tmp", "+/var/tmp"]


@pytest.mark.parametrize(
    ("folder", "value"),
    [("/var/lib/w/f", "yes"), ("/home/u/w/f", "tmpfs"), ("/root/f", "tmpfs"), ("/homes/f", "yes")],
)
def test_homes_are_hidden_but_for_what_the_job_has_there(folder: str, value: str) -> None:
    assert values(Sandbox(ROOT, Path(folder)))["ProtectHome"] == value


def test_a_job_without_a_uid_of_its_own_cannot_signal_those_that_share_it() -> None:
    found = values(JOB, user=True)
    assert not {"DynamicUser", "Group", "SupplementaryGroups", "PrivateIPC"} & found.keys()
    assert "InaccessiblePaths" not in found  # the counters of a failed job are read from within
    rows = [
        item.value for item in sandbox_properties(JOB, user=True) if item.name == "SystemCallFilter"
    ]
    assert isinstance(rows[2], list)
    assert {"kill", "tgkill", "pidfd_send_signal", "prlimit64", "shmget"} <= set(rows[2][1])
    assert found["PrivateUsers"] is True


def test_nothing_is_hidden_that_programs_need() -> None:
    found = values(Sandbox(ROOT, FOLDER, (Path("/usr/share/media/in.mp4"),)))
    hidden = found["TemporaryFileSystem"]
    assert isinstance(hidden, list)
    assert "/usr" not in [path for path, _ in hidden]


def host(tmp_path: Path) -> Path:
    host = tmp_path / "host"
    for folder in ("usr/bin", "usr/lib", "lib32", "etc/fonts", "etc/ssl/certs", "home"):
        (host / folder).mkdir(parents=True)
    (host / "bin").symlink_to("usr/bin")
    (host / "lib").symlink_to("usr/lib")
    (host / "etc/hosts").write_text("")
    return host


def test_the_root_has_the_hosts_links_and_nothing_else(tmp_path: Path) -> None:
    root = JobRoot.prepare(tmp_path / "root", host=host(tmp_path))
    assert sorted(path.name for path in root.path.iterdir()) == ["bin", "lib"]
    assert str((root.path / "bin").readlink()) == "usr/bin"
    assert stat.S_IMODE(root.path.stat().st_mode) == 0o755
    assert root.folders == ("/usr", "/lib32")
    assert root.settings == ("/etc/fonts",)
    assert root.network_settings == ("/etc/hosts", "/etc/ssl/certs")


def test_the_root_is_made_again_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/lib").symlink_to("elsewhere")
    root = JobRoot.prepare(tmp_path / "root", host=host(tmp_path))
    assert str((root.path / "lib").readlink()) == "usr/lib"


def test_programs_elsewhere_are_seen(tmp_path: Path) -> None:
    real = tmp_path / "built/bin/ffmpeg"
    real.parent.mkdir(parents=True)
    real.touch()
    link = tmp_path / "links/ffmpeg"
    link.parent.mkdir()
    link.symlink_to(real)
    root = JobRoot.prepare(
        tmp_path / "root", [str(link), "/usr/bin/ffprobe", "", str(link)], host=host(tmp_path)
    )
    assert root.folders == ("/usr", "/lib32", str(link.parent), str(real.parent))

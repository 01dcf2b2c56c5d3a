"""What is said where there can be no virtual machine. Needs root, but no virtual machine."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bed"))

import vm_host
import vm_image
from bed_kernel import BedError, Process
from vm_image import Image
from vm_machine import Machine

BED = Path(vm_image.__file__).parent
PROGRAM = [sys.executable, str(BED / "vm.py")]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for images that has none."""
    monkeypatch.setenv("FFMPEG_WORKER_VM", str(tmp_path))
    return tmp_path


def _program(*arguments: str, **options: Any) -> tuple[int, str]:
    done = subprocess.run(
        [*PROGRAM, *arguments], capture_output=True, text=True, timeout=60, **options
    )
    return done.returncode, done.stderr


@pytest.fixture
def image(home: Path) -> Image:
    """An image that is whole, as far as its files tell."""
    image = Image("bookworm")
    image.folder.mkdir()
    files = {}
    for name in ("base.img", "state"):
        path = image.folder / name
        path.write_bytes(bytes(1 << 20) + name.encode() * 1000 + bytes(1 << 20))
        files[name] = {
            "size": path.stat().st_size,
            "sha256": vm_image._digest(path),
            "touched": vm_image._touched(path),
        }
    image._write_manifest(image.folder, {"stamp": image._stamp(), "files": files})
    return image


# --- the machine this runs on -------------------------------------------------------------------


def test_without_root(home: Path) -> None:
    script = "import os, sys, vm; os.setuid(65534); sys.exit(vm.main(['up']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=BED)
    assert done.returncode == 125
    assert done.stderr == "vm: virtual machines are made and run by root: use sudo, for example\n"


@pytest.mark.parametrize("verb", ["build", "up", "test"])
def test_without_qemu_and_apt(tmp_path: Path, verb: str) -> None:
    status, said = _program(verb, env={"PATH": "/nowhere", "FFMPEG_WORKER_VM": str(tmp_path)})
    assert status == 125
    assert "qemu-system-x86" in said
    assert "without apt it cannot be done here" in said
    assert said.count("\n") == 1


def test_without_qemu_but_with_apt_somebody_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vm_host, "missing_packages", lambda *_: ["qemu-system-x86"])
    monkeypatch.setattr("shutil.which", lambda *_, **__: "/usr/bin/apt-get")
    sentence = "run as root `apt-get install --no-install-recommends qemu-system-x86`"
    with pytest.raises(BedError, match=sentence):
        vm_host.check_to_run(2048)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BedError, match=sentence):
        vm_host.install_what_is_missing(io.StringIO())


def test_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_host, "missing_packages", lambda *_: [])
    monkeypatch.setattr(vm_host, "available_memory", lambda: 100 << 20)
    with pytest.raises(BedError, match="needs 3072 MiB of memory, of which 100 MiB are free: end"):
        vm_host.check_to_run(2048)


def test_available_memory_is_that_of_the_machine_or_less() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < vm_host.available_memory() <= total


def test_with_too_little_disk(tmp_path: Path) -> None:
    with pytest.raises(BedError, match=r"of disk are needed at .* free some, or name another"):
        vm_host.check_disk(tmp_path, 1 << 40)


def test_folder_that_others_can_write_to(home: Path) -> None:
    home.chmod(0o777)
    status, said = _program("status")
    assert (status, said.count("\n")) == (125, 1)
    assert "others can write to" in said


def test_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMPEG_WORKER_VM", "/proc/vm")
    with pytest.raises(BedError, match=r"/proc/vm cannot be made .* name another folder"):
        Image("bookworm")


@pytest.mark.parametrize("made", [True, False])
def test_folder_that_is_mounted_read_only(home: Path, made: bool) -> None:
    if made:
        (home / "bookworm").mkdir()
    # Only this command sees the mount: unshare gives it a mount namespace, private by default.
    script = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, str(home), *PROGRAM, "up"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        125,
        f"vm: {home}/bookworm cannot be written to (Read-only file system): "
        "mount it read-write, or name another folder in FFMPEG_WORKER_VM\n",
    )


@pytest.mark.parametrize("name", ["with, comma", "x" * 80])
def test_folder_that_qemu_and_ssh_cannot_take(tmp_path: Path, name: str) -> None:
    environment = os.environ | {"FFMPEG_WORKER_VM": str(tmp_path / name)}
    status, said = _program("up", env=environment)
    assert (status, said.count("\n")) == (125, 1)
    assert "cannot be used: qemu and ssh take neither a comma" in said
    assert "name another folder in FFMPEG_WORKER_VM" in said


def test_image_stays_where_none_could_be_made(
    image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise BedError("no qemu")

    monkeypatch.setattr(image, "problem", lambda **_: "it was made by another recipe")
    monkeypatch.setattr(image.machine, "check_place", lambda: None)
    monkeypatch.setattr(vm_host, "install_what_is_missing", refuse)
    with pytest.raises(BedError, match="no qemu"):
        image.ensure()
    assert (image.folder / "base.img").exists()


# --- where packages come from -------------------------------------------------------------------


def test_apt_sources_of_both_kinds(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb\nURIs: http://one.invalid/debian\n http://two.invalid/debian\nSuites: x\n"
    )
    (tmp_path / "sources.list").write_text(
        "# deb http://no.invalid/debian x main\ndeb [a=b c=d] http://three.invalid/debian/ x main\n"
    )
    assert vm_host.apt_sources(tmp_path) == [
        "http://one.invalid/debian",
        "http://two.invalid/debian",
        "http://three.invalid/debian/",
    ]


def test_no_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_host, "apt_sources", lambda: ["http://x.invalid/ubuntu"])
    with pytest.raises(BedError, match="name one in FFMPEG_WORKER_VM_MIRROR"):
        vm_host.mirror()


def test_servers_are_not_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FFMPEG_WORKER_VM_MIRROR", "http://user:secret@mirror.invalid:81/debian")
    vm_host._secrets.cache_clear()
    said = vm_host.redacted("Get http://mirror.invalid/a from mirror.invalid, https://b.invalid/c")
    vm_host._secrets.cache_clear()
    assert said == "Get http://server/a from server, https://server/c"


# --- programs that make the image ---------------------------------------------------------------


def test_program_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    mark = f"{time.monotonic_ns() % 10**9 + 10**6}"
    with (tmp_path / "log").open("w") as log, pytest.raises(BedError, match="did not end within"):
        vm_host.run_logged(["sh", "-c", f"sleep {mark} & exec sleep {mark}"], log, 1)
    deadline = time.monotonic() + 10
    while subprocess.run(["pgrep", "-f", f"sleep {mark}"], capture_output=True).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_programs_status_and_words(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        command = ["sh", "-c", "echo a; echo http://name.invalid/x >&2; printf end; exit 3"]
        assert vm_host.run_logged(command, log, 60) == 3
    assert (tmp_path / "log").read_text() == "a\nhttp://server/x\nend"


# --- the image ----------------------------------------------------------------------------------


def test_whole_image(image: Image) -> None:
    assert image.problem() is None
    assert image.problem(thorough=True) is None


def test_image_that_is_not_there(home: Path) -> None:
    assert Image("trixie").problem() == "there is none"


def test_image_of_another_recipe(image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vm_image, "_WARM_UP", "true")
    assert image.problem() == "it was made by another recipe"


def test_image_with_a_byte_changed_under_the_old_time(image: Image) -> None:
    path = image.folder / "state"
    facts = path.stat()
    with path.open("r+b") as file:
        file.seek((1 << 20) + 7)
        file.write(b"!")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert image.problem() == "state is damaged"


def test_image_with_a_file_cut_or_gone(image: Image) -> None:
    os.truncate(image.folder / "base.img", 1000)
    assert image.problem() == "base.img is damaged"
    (image.folder / "base.img").unlink()
    assert image.problem() == "base.img is gone"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"stamp": 1, "files": {}}'])
def test_image_with_a_damaged_manifest(image: Image, text: str) -> None:
    (image.folder / "manifest.json").write_text(text)
    assert image.problem() is not None


def test_image_that_was_copied_is_read_once_and_known_then(image: Image) -> None:
    path = image.folder / "state"
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    assert image.problem() is None
    manifest = json.loads((image.folder / "manifest.json").read_text())
    assert manifest["files"]["state"]["touched"] == vm_image._touched(path)


def test_holes_make_no_difference(tmp_path: Path) -> None:
    data = bytes(3 << 20) + b"x" + bytes(3 << 20)
    (tmp_path / "dense").write_bytes(data)
    with (tmp_path / "sparse").open("wb") as file:
        file.seek(3 << 20)
        file.write(b"x")
        file.truncate(len(data))
    assert vm_image._digest(tmp_path / "dense") == vm_image._digest(tmp_path / "sparse")


# --- the process --------------------------------------------------------------------------------


def test_recycled_pid_is_left_alone(home: Path) -> None:
    machine = Machine(home, home / "run")
    machine.run_folder.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        state = {"process": {"pid": other.pid, "start": "1"}, "port": 1}
        (machine.run_folder / "machine.json").write_text(json.dumps(state))
        assert machine.process is None
        machine.down()
        assert Process.of(other.pid) is not None
        other.kill()
    assert not machine.run_folder.exists()


@pytest.mark.parametrize("command", [["run", "true"], ["push", "/etc/passwd", "/x"]])
def test_machine_that_is_not_up(command: list[str]) -> None:
    assert _program(*command) == (125, "vm: the virtual machine is not up: `vm.py up`\n")


def test_status_and_down_of_a_machine_that_is_not_up() -> None:
    assert _program("status") == (3, "")
    assert _program("down") == (0, "")

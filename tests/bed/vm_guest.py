"""What is in a virtual machine: Debian's packages, and how they are set up.

Nothing in the guest wakes up by itself, so that two runs of the tests see the same machine.
"""

from __future__ import annotations

import lzma
import os
import re
import secrets
import shutil
import subprocess
from pathlib import Path
from typing import IO

from bed_kernel import BedError
from vm_host import run_logged

PACKAGES = """\
systemd systemd-sysv libpam-systemd dbus dbus-user-session udev kmod polkitd openssh-server
busybox-static iproute2 mount procps util-linux time ca-certificates python3 python3-venv ffmpeg
nginx libnginx-mod-rtmp
"""
USER = "tester"
ADDRESS = "10.0.2.15"  # what qemu's user network forwards to

# The kernel is unpacked, not installed: its package would bring an initramfs generator along.
# /lib is a link in the image, and tar must leave it one.
KERNEL_HOOK = """\
set -e
cd /tmp
package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/.*Depends: \\(linux-image-[^ ]*\\).*/\\1/p' | head -1)
apt-get download "$package"
dpkg --fsys-tarfile "$package"_*.deb | tar -x --keep-directory-symlink -C /
rm "$package"_*.deb
depmod -a "${package#linux-image-}"
"""  # noqa: E501

_NETWORK = f"""\
[Unit]
Description=Network and disk of the test machine
DefaultDependencies=no
Wants=network.target network-online.target
Before=network.target network-online.target
BindsTo=sys-subsystem-net-devices-eth0.device
After=sys-subsystem-net-devices-eth0.device

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'ip addr add {ADDRESS}/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2'
# IOWeight= works with the BFQ scheduler only.
ExecStart=-/bin/sh -c 'modprobe bfq; echo bfq >/sys/block/vda/queue/scheduler'

[Install]
WantedBy=multi-user.target
"""  # noqa: E501
# Debian's default leaves io and cpuset out.
_DELEGATE = "[Service]\nDelegate=cpu cpuset io memory pids\n"
_SSHD = """\
PermitRootLogin prohibit-password
UseDNS no
PrintMotd no
PrintLastLog no
MaxSessions 200
KexAlgorithms curve25519-sha256
"""
_MASKED = """
apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service
fstrim.timer systemd-tmpfiles-clean.timer systemd-networkd.service systemd-networkd.socket
systemd-networkd-wait-online.service systemd-timesyncd.service systemd-firstboot.service
systemd-binfmt.service systemd-pstore.service getty@tty1.service serial-getty@ttyS0.service
modprobe@drm.service modprobe@efi_pstore.service ldconfig.service sshd-keygen.service
nginx.service
"""
_INIT = """\
#!/bin/sh
export PATH=/bin
busybox mount -t devtmpfs dev /dev
for module in /modules/*; do busybox insmod $module; done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 500 ]; do busybox usleep 20000; tries=$((tries + 1)); done
busybox mount -t ext4 -o rw,noatime /dev/vda /root
busybox mount --move /dev /root/dev
exec busybox switch_root /root /sbin/init
"""


def kernel_version(root: Path) -> str:
    """The version of the one kernel in the image. Raises BedError where its modules lack."""
    versions = [path.parent.name for path in root.glob("lib/modules/*/modules.dep")]
    if len(versions) != 1:
        raise BedError(f"the image has {len(versions)} kernels instead of one")
    return versions[0]


def configure(root: Path, keys: Path, log: IO[str]) -> None:
    """Set the unpacked system at `root` up; its keys, and ours, are made in `keys`."""
    for name in ("key", "host_key"):
        path = keys / name
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "vm", "-f", str(path)]
        _must(command, log)
    host_key = (keys / "host_key.pub").read_text()
    (keys / "known_hosts").write_text(f"vm {host_key}")
    etc = root / "etc"
    for path in etc.glob("ssh/ssh_host_*"):
        path.unlink()
    shutil.move(keys / "host_key", etc / "ssh/ssh_host_ed25519_key")
    (keys / "host_key.pub").rename(etc / "ssh/ssh_host_ed25519_key.pub")
    files = {
        etc / "hostname": "vm\n",
        etc / "hosts": "127.0.0.1 localhost vm\n::1 localhost\n",
        etc / "default/locale": "LANG=C.UTF-8\n",
        etc / "machine-id": f"{secrets.token_hex(16)}\n",
        etc / "resolv.conf": "",
        etc / "fstab": "",
        etc / "ssh/sshd_config.d/vm.conf": _SSHD,
        etc / "systemd/system/vm-network.service": _NETWORK,
        etc / "systemd/system/user@.service.d/delegate.conf": _DELEGATE,
        root / "root/.ssh/authorized_keys": (keys / "key.pub").read_text(),
        root / f"var/lib/systemd/linger/{USER}": "",
        root / "var/lib/systemd/linger/root": "",
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a link out of the image
        path.write_text(text)
    (root / "root/.ssh").chmod(0o700)
    (root / "var/log/journal").mkdir(exist_ok=True)  # kept on the disk, as on a server
    _must(["chroot", str(root), "useradd", "-m", "-u", "1000", "-s", "/bin/bash", USER], log)
    units = ["vm-network.service", "ssh.service"]
    _must(["chroot", str(root), "systemctl", "enable", *units], log)
    for unit in _MASKED.split():
        path = etc / "systemd/system" / unit
        path.unlink(missing_ok=True)
        path.symlink_to("/dev/null")
    # Newer than /usr: no unit with ConditionNeedsUpdate= has work. In the future, since the
    # clock of the guest is not set yet when systemd looks.
    for path in (etc / ".updated", root / "var/.updated"):
        path.touch()
        os.utime(path, (2**31 - 1, 2**31 - 1))
    # What is left of apt names the mirror.
    for path in (etc / "apt/sources.list", *etc.glob("apt/sources.list.d/*")):
        path.unlink(missing_ok=True)
    for folder in (root / "var/lib/apt/lists", root / "var/cache/apt"):
        shutil.rmtree(folder, ignore_errors=True)


def make_initrd(root: Path, target: Path, log: IO[str]) -> None:
    """The smallest that finds the disk: busybox and virtio's modules; ext4 is in the kernel."""
    version = kernel_version(root)
    folder = target.with_name("initrd.d")
    for name in ("bin", "dev", "root", "modules"):
        (folder / name).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", folder / "bin")
    (folder / "bin/sh").symlink_to("busybox")
    for number, path in enumerate(_modules(root, version, "virtio_pci", "virtio_blk")):
        (folder / f"modules/{number:02}.ko").write_bytes(_unpacked(root / path.lstrip("/")))
    init = folder / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
    packed = f"find . | cpio -o -H newc --quiet >{target.name}.new"
    _must(["sh", "-ec", f"cd initrd.d; {packed.replace(' >', ' >../')}"], log, cwd=target.parent)
    target.with_name(f"{target.name}.new").rename(target)
    shutil.rmtree(folder)


def _modules(root: Path, version: str, *names: str) -> list[str]:
    """The files of these kernel modules and of what they need, in the order to load them."""
    found: dict[str, None] = {}
    for name in names:
        command = ["chroot", str(root), "modprobe", "-S", version, "--show-depends", name]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found |= dict.fromkeys(re.findall(r"^insmod (\S+)", output, re.M))
    return list(found)


def _unpacked(module: Path) -> bytes:
    if module.suffix == ".xz":
        return lzma.decompress(module.read_bytes())
    if module.suffix == ".zst":
        return subprocess.run(["zstd", "-qdc", module], capture_output=True, check=True).stdout
    return module.read_bytes()


def _must(command: list[str], log: IO[str], cwd: Path | None = None) -> None:
    if status := run_logged(command, log, 120, cwd=cwd):
        raise BedError(f"{' '.join(command[:3])} … ended with {status}, see {log.name}")

"""What a host must have for a bed, and what of the host's environment a bed sees."""

from __future__ import annotations

import os
import re
from pathlib import Path

from bed_kernel import BedError

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = {
    "DAC_OVERRIDE": 1,
    "KILL": 5,
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "SYS_CHROOT": 18,
    "SYS_ADMIN": 21,
}
_PASSED_IN = re.compile(r"HOME|TERM|LANG|LC_.*|TZ|PIP_.*|.*_proxy|SSL_CERT_.*", re.IGNORECASE)


def systemd() -> str:
    """The systemd program. Raises BedError where there is none."""
    for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd"):
        if os.access(path, os.X_OK):
            return path
    raise BedError("systemd is not installed: `apt-get install systemd dbus`")


def environment() -> dict[str, str]:
    """What a command inside finds in its environment."""
    passed = {name: value for name, value in os.environ.items() if _PASSED_IN.fullmatch(name)}
    own = {"PATH": PATH, "SYSTEMD_PAGER": "cat", "PAGER": "cat", "FFMPEG_WORKER_BED": "1"}
    return passed | own


def check_host() -> None:
    """Raise BedError, with a sentence that says what to do, where no bed can be."""
    if os.geteuid() != 0:
        raise BedError("the test bed needs root: run it as root, for example with sudo")
    held = int(re.findall(r"^CapEff:\s*(\w+)", Path("/proc/self/status").read_text(), re.M)[0], 16)
    lacking = [name for name, number in _CAPABILITIES.items() if not held >> number & 1]
    if lacking:
        raise BedError(
            f"the test bed needs the capabilities {', '.join(lacking)}: "
            "in a container, start it with --privileged"
        )
    systemd()
    units = [Path(folder, "systemd/system/dbus.socket") for folder in ("/usr/lib", "/lib", "/etc")]
    if not any(unit.exists() for unit in units):
        raise BedError("the system bus is not installed: `apt-get install dbus`")

"""What is known of a unit, and when it is over. Pure.

systemd tells a unit's story in pieces that may come late, twice or not at all, so this folds
property dictionaries (of the Unit and the Service interface alike) into one immutable value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

UNSET = 2**64 - 1
"""systemd's "no value" of a 64-bit counter."""

_PROPERTIES = {
    "LoadState": "load_state",
    "ActiveState": "active_state",
    "SubState": "sub_state",
    "Result": "result",
    "MainPID": "main_pid",
    "ExecMainCode": "exec_main_code",
    "ExecMainStatus": "exec_main_status",
    "ExecMainStartTimestampMonotonic": "exec_main_start_usec",
    "ExecMainExitTimestampMonotonic": "exec_main_exit_usec",
    "ControlGroup": "control_group",
}
_FIRST_EXEC_STAGE_STATUS = 200
_LAST_EXEC_STAGE_STATUS = 245
_CLD_EXITED = 1


def counter(value: object) -> int | None:
    """A counter as systemd sends it; None where it is unset or no number."""
    if not isinstance(value, int) or isinstance(value, bool) or value in (UNSET, -1):
        return None
    return value


@dataclass(frozen=True, slots=True)
class UnitState:
    """A snapshot. Names and meaning are those of org.freedesktop.systemd1(5)."""

    load_state: str = ""
    active_state: str = ""
    sub_state: str = ""
    result: str = ""
    """success, exit-code, signal, core-dump, timeout, oom-kill, resources, …"""
    main_pid: int = 0
    exec_main_code: int = 0
    """How the process ended: 0 not (yet), 1 exited, 2 killed, 3 killed and dumped core."""
    exec_main_status: int = 0
    """Exit status, or the number of the signal."""
    exec_main_start_usec: int | None = None
    """CLOCK_MONOTONIC"""
    exec_main_exit_usec: int | None = None
    """CLOCK_MONOTONIC"""
    invocation_id: str = ""
    control_group: str = ""
    job_id: int | None = None
    """The systemd job pending for the unit, 0 if there is none, None if nobody has looked."""

    def folded(self, properties: Mapping[str, object]) -> UnitState:
        """This state with what ``properties`` says; names without meaning here are ignored."""
        changes: dict[str, object] = {}
        for name, value in properties.items():
            if field := _PROPERTIES.get(name):
                if field.endswith("_usec"):
                    changes[field] = counter(value) or None  # 0: it has not happened yet
                else:
                    changes[field] = value
            elif name == "InvocationID" and isinstance(value, bytes):
                changes["invocation_id"] = value.hex()
            elif name == "Job" and isinstance(value, list) and value:
                changes["job_id"] = value[0]
        changes = {
            name: value for name, value in changes.items() if isinstance(value, _TYPES[name])
        }
        same_process = (
            changes.get("exec_main_start_usec", self.exec_main_start_usec)
            == self.exec_main_start_usec
        )
        if self.exec_main_code and same_process:
            # The verdict stands: `reset-failed` and `stop` announce Result=success afterwards.
            if self.result not in ("", "success") and changes.get("result") == "success":
                del changes["result"]
            if changes.get("exec_main_code") == 0:
                del changes["exec_main_code"]
                changes.pop("exec_main_status", None)
        if not changes.get("control_group", "x"):
            del changes["control_group"]  # emptied at the end; where it was stays worth knowing
        return replace(self, **changes) if changes else self  # type: ignore[arg-type]

    @property
    def vanished(self) -> bool:
        """The unit left without us: stopped by somebody else, or no longer loaded.

        Never a success, whatever ``result`` says: for a unit that is not loaded systemd answers
        "success". The verdict fields hold what was seen before (a process that died of the
        SIGTERM of ``systemctl stop``: code 2, status 15), or zero if nothing was.
        """
        if self.load_state == "not-found":
            return True
        # Pinned by RemainAfterExit, a unit gets here by being stopped only. Before its start it
        # is inactive as well, but then its start job is pending.
        return self.active_state == "inactive" and self.job_id == 0

    @property
    def finished(self) -> bool:
        """Nothing more will happen to the process of this unit, and its verdict is complete."""
        if self.vanished or self.active_state == "failed":
            return True
        return self.active_state == "active" and self.sub_state == "exited"

    @property
    def ended_well(self) -> bool:
        """The process exited by itself, with a status of success."""
        return self.exec_main_code == _CLD_EXITED and self.result == "success"

    @property
    def exec_failed(self) -> bool:
        """The exit status is one by which systemd reports that it could not run the program.

        systemd.exec(5), "Process Exit Codes". A program may use these numbers too, so this says
        for sure only that the program did not succeed.
        """
        return (
            self.exec_main_code == _CLD_EXITED
            and _FIRST_EXEC_STAGE_STATUS <= self.exec_main_status <= _LAST_EXEC_STAGE_STATUS
        )

    @property
    def wall_seconds(self) -> float | None:
        """How long the process ran; None unless both ends are known."""
        if self.exec_main_start_usec is None or self.exec_main_exit_usec is None:
            return None
        return max(0, self.exec_main_exit_usec - self.exec_main_start_usec) / 1e6


_TYPES: dict[str, type | tuple[type, ...]] = {
    field.name: (int, type(None)) if "None" in str(field.type) else int if "int" in str(field.type)
    else str
    for field in fields(UnitState)
}  # fmt: skip

"""The verdict on one unit: what ended it, whose fault that is, and what to do about it."""

from __future__ import annotations

import signal
from typing import Protocol

from worker.errors import Reason
from worker.jobs.failures import classify, lines_without_names, sending_failed, write_failed
from worker.jobs.outcome import COMPLETED, Intent, Outcome, stopped
from worker.jobs.probe import NO_VIDEO
from worker.jobs.progress import LogFacts
from worker.jobs.spec import Limits
from worker.jobs.text import label, redact

CLD_EXITED, CLD_KILLED, CLD_DUMPED = 1, 2, 3  # sigaction(2); systemd's ExecMainCode
_NEAR_LIMIT = 0.95
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StateLike(Protocol):
    """A unit's last state, as ``worker.systemd`` reports it."""

    @property
    def load_state(self) -> str: ...
    @property
    def result(self) -> str: ...
    @property
    def exec_main_code(self) -> int: ...
    @property
    def exec_main_status(self) -> int: ...
    @property
    def vanished(self) -> bool: ...
    @property
    def wall_seconds(self) -> float | None: ...


class UsageLike(Protocol):
    """What a unit used. None is not known."""

    @property
    def cpu_seconds(self) -> float | None: ...
    @property
    def memory_peak_bytes(self) -> int | None: ...
    @property
    def io_read_bytes(self) -> int | None: ...
    @property
    def io_write_bytes(self) -> int | None: ...
    @property
    def oom_kills(self) -> int | None: ...
    @property
    def memory_limit_hits(self) -> int | None: ...
    @property
    def task_limit_hits(self) -> int | None: ...


# systemd.exec(5), "Process exit codes": the unit failed before the program ran.
EXEC_FAILURES = {
    200: "CHDIR",
    201: "NICE",
    202: "FDS",
    203: "EXEC",
    204: "MEMORY",
    205: "LIMITS",
    206: "OOM_ADJUST",
    207: "SIGNAL_MASK",
    208: "STDIN",
    209: "STDOUT",
    210: "CHROOT",
    211: "IOPRIO",
    212: "TIMERSLACK",
    213: "SECUREBITS",
    214: "SETSCHEDULER",
    215: "CPUAFFINITY",
    216: "GROUP",
    217: "USER",
    218: "CAPABILITIES",
    219: "CGROUP",
    220: "SETSID",
    221: "CONFIRM",
    222: "STDERR",
    224: "PAM",
    225: "NETWORK",
    226: "NAMESPACE",
    227: "NO_NEW_PRIVILEGES",
    228: "SECCOMP",
    229: "SELINUX_CONTEXT",
    230: "PERSONALITY",
    231: "APPARMOR_PROFILE",
    232: "ADDRESS_FAMILIES",
    233: "RUNTIME_DIRECTORY",
    235: "CHOWN",
    236: "SMACK_PROCESS_LABEL",
    237: "KEYRING",
    238: "STATE_DIRECTORY",
    239: "CACHE_DIRECTORY",
    240: "LOGS_DIRECTORY",
    241: "CONFIGURATION_DIRECTORY",
    242: "NUMA_POLICY",
    243: "CREDENTIALS",
    245: "BPF",
}

_HINTS = {
    "CHDIR": "its working directory cannot be entered",
    "STDIN": "its standard input cannot be opened",
    "STDOUT": "its standard output cannot be opened: does the job's folder exist?",
    "STDERR": "its standard error cannot be opened",
    "USER": "its user does not exist or cannot be taken on",
    "GROUP": "its group does not exist or cannot be taken on",
    "NAMESPACE": "its mount or other namespaces cannot be set up",
    "CREDENTIALS": "its credentials cannot be set up",
    "CGROUP": "its control group cannot be set up",
    "LIMITS": "a resource limit cannot be set",
    "MEMORY": "there is not enough memory to start it",
}


def judge(
    state: StateLike,
    usage: UsageLike,
    intent: Intent,
    log: LogFacts,
    limits: Limits,
    *,
    step: str = "",
    program: str = "ffmpeg",
    source: str | None = None,
    output: str | None = None,
    is_url: bool = False,
    is_stream: bool = False,
    executed: bool = False,
) -> Outcome:
    """Judge a unit that has ended.

    ``step`` opens the sentence of a failure ("generating the input failed"); empty for the
    transcode itself. ``limits`` are those that the unit ran under. ``source`` and ``output`` are
    the names on ffmpeg's command line, ``is_url`` says what the source is, ``is_stream`` that
    the output goes to a server. ``executed`` says that the program surely ran: its exit status is
    then its own, and not systemd's word for a failed start, which uses some of the same numbers.
    """
    verdict = _Judge(
        state, usage, intent, log, limits, program, source, output, is_url, is_stream, executed
    ).verdict()
    if verdict.completed:
        return verdict
    message = verdict.message
    if intent is Intent.NONE:
        message = f"{step} failed: {message}" if step else message
        message += f"; ffmpeg: {log.last_error}" if log.last_error else ""
    return Outcome(False, verdict.reason, redact(message))


class _Judge:
    """The parts of ``judge``, which share all its arguments."""

    def __init__(
        self,
        state: StateLike,
        usage: UsageLike,
        intent: Intent,
        log: LogFacts,
        limits: Limits,
        program: str,
        source: str | None,
        output: str | None,
        is_url: bool,
        is_stream: bool,
        executed: bool,
    ) -> None:
        self.state, self.usage, self.intent = state, usage, intent
        self.log, self.limits, self.program = log, limits, program
        self.lines, self.is_url = lines_without_names(log, source, output), is_url
        self.is_stream, self.executed = is_stream, executed

    def verdict(self) -> Outcome:
        state = self.state
        gone = state.vanished or state.load_state == "not-found"
        code, status = state.exec_main_code, state.exec_main_status
        if not gone and (code, status, state.result) == (CLD_EXITED, 0, "success"):
            return self._clean_exit()
        if self.intent is not Intent.NONE:
            return stopped(self.intent)
        if gone and code == CLD_KILLED and status in _STOP_SIGNALS:
            return self._stopped(status)
        if gone:
            return Outcome.failed(
                Reason.PLATFORM_ERROR,
                f"systemd lost the unit of {self.program} before its end was seen "
                "(was it reset, or systemd restarted?)",
            )
        if state.result == "timeout" and not self._time_was_left():
            return Outcome.failed(
                Reason.TIMEOUT,
                f"time limit of {self.limits.timeout_sec} s exceeded, {self.program} was stopped; "
                "raise timeout_sec or ask for less",
            )
        if state.result == "timeout":
            return self._stopped(signal.SIGTERM)
        if self._out_of_memory():
            return self._memory()
        if code in (CLD_KILLED, CLD_DUMPED):
            return self._killed(status)
        if code == CLD_EXITED and status in EXEC_FAILURES and not self.executed:
            return self._not_executed(status)
        if code == CLD_EXITED and status != 0:
            return self._exited(status)
        return Outcome.failed(
            Reason.PLATFORM_ERROR,
            f"systemd could not run {self.program}: result {label(state.result, 40)!r}, and no "
            "process of it is known",
        )

    def _time_was_left(self) -> bool:
        """It did not end in time when it was told to: "timeout" is systemd's word for that, too."""
        wall = self.state.wall_seconds
        return wall is not None and wall < self.limits.timeout_sec

    def _clean_exit(self) -> Outcome:
        if write_failed(self.lines):
            return Outcome.failed(Reason.RESOURCE_ERROR, self._disk_sentence())
        if self.is_stream and sending_failed(self.lines):
            return Outcome.failed(Reason.NETWORK_ERROR, self._network_sentence())
        return COMPLETED

    def _out_of_memory(self) -> bool:
        # The one killed need not be the main process, which then fails for want of the other.
        if self.state.result == "oom-kill" or (self.usage.oom_kills or 0) > 0:
            return True
        killed = self.state.exec_main_code in (CLD_KILLED, CLD_DUMPED)
        if not killed or self.state.exec_main_status != signal.SIGKILL:
            return False
        # no record: the kernel's counter was not to be had
        return self.usage.oom_kills is None and self._own_limit_reached()

    def _own_limit_reached(self) -> bool:
        if self.state.result == "oom-kill" and self.usage.memory_limit_hits is None:
            # Systemd saw the kill, but the record of it is lost, as it can be when the kernel's
            # second notice kills what writes it. A job's own limit is by far the likelier.
            return True
        peak, limit = self.usage.memory_peak_bytes or 0, self.limits.memory_mb * 2**20
        return (self.usage.memory_limit_hits or 0) > 0 or peak >= _NEAR_LIMIT * limit

    def _memory(self) -> Outcome:
        limit = self.limits.memory_mb
        if self._own_limit_reached():
            return Outcome.failed(
                Reason.RESOURCE_ERROR,
                f"memory limit of {limit} MB exceeded; raise max_memory_mb or ask for less",
            )
        return Outcome.failed(
            Reason.RESOURCE_ERROR,
            f"the host ran out of memory (the job's limit of {limit} MB was not reached)",
        )

    def _disk_sentence(self) -> str:
        if any("No space left" in line for line in self.lines):
            return "the output could not be written: no space is left on the disk"
        return (
            f"disk limit of {self.limits.disk_mb} MB exceeded by the output; raise max_disk_mb "
            "or ask for a lower bitrate or duration"
        )

    def _killed(self, number: int) -> Outcome:
        try:
            name = signal.Signals(number).name.removeprefix("SIG")
        except ValueError:
            name = "unknown"
        if number == signal.SIGXFSZ:
            return Outcome.failed(Reason.RESOURCE_ERROR, self._disk_sentence())
        if number == signal.SIGKILL:
            return Outcome.failed(
                Reason.PLATFORM_ERROR,
                f"{self.program} was killed by signal 9 (KILL) by somebody else",
            )
        if number in _STOP_SIGNALS:
            return self._stopped(number)
        return Outcome.failed(
            Reason.RUNTIME_ERROR, f"{self.program} crashed with signal {number} ({name})"
        )

    def _stopped(self, number: int) -> Outcome:
        name = {signal.SIGTERM: "TERM", signal.SIGINT: "INT"}.get(signal.Signals(number), "HUP")
        return Outcome.failed(
            Reason.PLATFORM_ERROR,
            f"{self.program} was stopped by somebody else with signal {number} ({name}): "
            "systemctl stop or kill?",
        )

    def _not_executed(self, status: int) -> Outcome:
        name = EXEC_FAILURES[status]
        if name == "EXEC":
            sentence = f"could not run {self.program}: not found or not executable"
        else:
            hint = _HINTS.get(name, "systemd could not set it up, see its journal")
            sentence = f"could not start {self.program}: {hint}"
        return Outcome.failed(Reason.PLATFORM_ERROR, f"{sentence} ({status}/{name})")

    def _exited(self, status: int) -> Outcome:
        if self.log.stopped_by_signal in _STOP_SIGNALS:
            # ffmpeg catches the signal, closes its files and exits with 255.
            return self._stopped(self.log.stopped_by_signal)
        if self.log.input_has_video is False:
            return Outcome.failed(Reason.INPUT_ERROR, NO_VIDEO)
        reason = classify(self.lines, is_url=self.is_url, is_stream=self.is_stream)
        if write_failed(self.lines):
            return Outcome.failed(Reason.RESOURCE_ERROR, self._disk_sentence())
        if reason is Reason.RUNTIME_ERROR and (self.usage.task_limit_hits or 0) > 0:
            return Outcome.failed(
                Reason.RESOURCE_ERROR,
                f"{self.program} was refused a thread or process: its task limit was reached",
            )
        sentence = _SENTENCES[reason](self.program)
        if reason is Reason.NETWORK_ERROR:
            sentence = self._network_sentence()
        return Outcome.failed(reason, f"{sentence} (exit status {status})")

    def _network_sentence(self) -> str:
        if self.is_stream and (sending_failed(self.lines) or not self.is_url):
            return (
                f"{self.program} could not send the stream: the server is down, went away or "
                "does not take this application and key"
            )
        return _SENTENCES[Reason.NETWORK_ERROR](self.program)


_SENTENCES = {
    Reason.RESOURCE_ERROR: lambda program: f"{program} ran out of memory",
    Reason.CAPABILITY_MISMATCH: lambda program: f"{program} lacks what the job asks for here",
    Reason.PLATFORM_ERROR: lambda program: f"{program} could not write where it was told to",
    Reason.NETWORK_ERROR: lambda program: f"{program} could not get the input over the network",
    Reason.USER_ERROR: lambda program: f"{program} does not accept what the job asks for",
    Reason.INPUT_ERROR: lambda program: f"{program} could not read the input",
    Reason.RUNTIME_ERROR: lambda program: f"{program} failed",
}

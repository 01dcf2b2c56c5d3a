"""Runs a command in a bed: in its namespaces, in a cgroup of its own below the bed's.

    bed_enter.py NAME FOLDER COMMAND…

FOLDER is where the command starts; empty: where the caller is, or / if that is not seen inside.
Ends as the command ends. Signals are passed on; killed itself, it takes the command with it.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path

import bed_cgroups
import bed_state
from bed_kernel import BedError, die_with_parent, drop_capabilities, setns

# Asks for SIGKILL to the command. Killing this program itself does that, too, but then it is left
# to the host's init to bury the command, and until it does the bed cannot end.
KILL = signal.SIGRTMIN
_SI_KERNEL = 0x80
_PASSED_ON = {
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
    KILL,
}


def enter(name: str, folder: str, command: list[str]) -> int:
    """Run `command` in the bed and return its exit status, 128 + n when signal n ended it."""
    state = bed_state.read(name)
    if state is None or state.init is None:
        raise BedError(f"there is no bed called {name}: `bed.py up {name}`")
    # Opened before the check: what is opened here stays with the process that it was opened for.
    try:
        process = os.open(f"/proc/{state.init.pid}", os.O_RDONLY | os.O_DIRECTORY)
        kinds = ("pid", "cgroup", "uts", "ipc", "net", "mnt")
        spaces = {kind: os.open(f"ns/{kind}", os.O_RDONLY, dir_fd=process) for kind in kinds}
    except (FileNotFoundError, ProcessLookupError) as error:
        raise BedError(f"the bed called {name} has ended") from error
    if not state.up:
        raise BedError(f"the bed called {name} has ended")
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON | {signal.SIGCHLD})
    caller = Path.cwd()
    setns(spaces.pop("pid"))
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent()
            # Not in the bed's own: its systemd has that, and knows nothing of this one.
            bed_cgroups.join(state.hierarchies, name, "exec")
            for fd in spaces.values():
                setns(fd)
            drop_capabilities()
            _execute(folder, caller, command)
        except (OSError, BedError) as error:
            print(f"bed: the bed called {name} cannot be entered: {error}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()  # a fork must not return into the caller's code
        finally:
            os._exit(125)
    return _follow(pid)


def _execute(folder: str, caller: Path, command: list[str]) -> None:
    os.chdir(folder or (caller if os.access(caller, os.X_OK) else "/"))
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, a command does not
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"bed: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        # As a shell would say it.
        os._exit(127 if isinstance(error, FileNotFoundError) else 126)


def _follow(pid: int) -> int:
    while True:
        received = signal.sigwaitinfo(_PASSED_ON | {signal.SIGCHLD})
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        elif received.si_signo == KILL:
            os.kill(pid, signal.SIGKILL)
        elif received.si_code != _SI_KERNEL:  # those of the terminal reach the command by itself
            os.kill(pid, received.si_signo)


def main(arguments: list[str]) -> int:
    """Run the program."""
    name, folder, *command = arguments
    try:
        return enter(name, folder, command)
    except BedError as error:
        print(f"bed: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What tests in the bed do on its command line, and how they wait."""

from __future__ import annotations

import asyncio
import fnmatch
import os
from asyncio.subprocess import DEVNULL, PIPE, STDOUT
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from tests.slowness import SLOWNESS

_NONE: Mapping[str, str] = MappingProxyType({})


async def tried(*command: str, environment: Mapping[str, str] = _NONE) -> tuple[int, str]:
    """Exit status and output of a command that may fail."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, stderr=STDOUT, env={**os.environ, **environment}
    )
    output = (await process.communicate())[0].decode()
    return process.returncode or 0, output


async def run(*command: str, environment: Mapping[str, str] = _NONE) -> str:
    """The output of a command, without the last line's end."""
    status, output = await tried(*command, environment=environment)
    assert status == 0, f"{command}: {output}"
    return output.removesuffix("\n")


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout: float = 20) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(timeout * SLOWNESS):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)


async def no_cgroups(*patterns: str) -> None:
    """Wait until none of that name is left, in any hierarchy."""

    def found() -> list[str]:
        names = [name for _, names, _ in os.walk("/sys/fs/cgroup") for name in names]
        return [name for pattern in patterns for name in fnmatch.filter(names, pattern)]

    await until(lambda: not found())

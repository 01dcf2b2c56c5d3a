"""A bus that is asked what is attached."""

from __future__ import annotations

from worker.errors import SystemdError


class FakeBus:
    """Each answer to the question what is attached is one of these, then the last one again."""

    def __init__(self) -> None:
        self.attached: list[list[str] | SystemdError] = [[]]

    async def call(self, member: str, *_: object) -> list[object]:
        assert member == "ListUnitsByPatterns"
        answer = self.attached.pop(0) if len(self.attached) > 1 else self.attached[0]
        if isinstance(answer, SystemdError):
            raise answer
        return [[[name] for name in answer]]

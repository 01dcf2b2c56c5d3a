"""When a unit is over, and how it ended."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.systemd.state import UNSET, UnitState, counter

RUNNING = UnitState().folded(
    {
        "MainPID": 7,
        "Result": "success",
        "ExecMainStartTimestampMonotonic": 1_000_000,
        "ExecMainExitTimestampMonotonic": 0,
        "ExecMainCode": 0,
        "ControlGroup": "/a",
    }
)
ENDED = {
    "MainPID": 0,
    "Result": "exit-code",
    "ExecMainCode": 1,
    "ExecMainStatus": 3,
    "ExecMainStartTimestampMonotonic": 1_000_000,
    "ExecMainExitTimestampMonotonic": 3_500_000,
    "ControlGroup": "",
}


def row(load: str, active: str, sub: str, job: int = 0) -> dict[str, object]:
    return {"LoadState": load, "ActiveState": active, "SubState": sub, "Job": [job, "/"]}


@pytest.mark.parametrize(
    ("where", "finished", "vanished"),
    [
        (row("loaded", "inactive", "dead", job=5), False, False),  # before its start
        (row("loaded", "activating", "start", job=5), False, False),
        (row("loaded", "active", "running"), False, False),
        (row("loaded", "deactivating", "stop-sigterm", job=6), False, False),
        (row("loaded", "deactivating", "stop-post"), False, False),
        (row("loaded", "active", "exited"), True, False),
        (row("loaded", "active", "exited", job=9), True, False),
        (row("loaded", "failed", "failed"), True, False),
        (row("loaded", "inactive", "dead"), True, True),  # stopped, about to be collected
        (row("not-found", "inactive", "dead"), True, True),
    ],
)
def test_where_a_unit_is(where: dict[str, object], finished: bool, vanished: bool) -> None:
    state = RUNNING.folded(where)
    assert (state.finished, state.vanished) == (finished, vanished)


def test_nothing_known_is_not_an_end() -> None:
    assert not UnitState().finished
    assert not UnitState(active_state="inactive").finished  # the job is not known
    assert UnitState().wall_seconds is None


def test_the_answer_for_a_unit_that_is_gone_is_no_success() -> None:
    stub = {"LoadState": "not-found", "Result": "success", "ExecMainCode": 0}
    assert UnitState().folded(stub).vanished


def test_the_verdict() -> None:
    state = RUNNING.folded(ENDED).folded(row("loaded", "failed", "failed"))
    assert (state.result, state.exec_main_code, state.exec_main_status) == ("exit-code", 1, 3)
    assert state.wall_seconds == 2.5
    assert state.control_group == "/a"
    assert state.main_pid == 0


def test_the_verdict_survives_the_clean_up() -> None:
    ended = RUNNING.folded(ENDED)
    assert ended.folded({**ENDED, "Result": "success"}).result == "exit-code"
    stub = {"Result": "success", "ExecMainCode": 0, "ExecMainStatus": 0}
    assert ended.folded(stub).exec_main_status == 3


def test_a_late_failure_replaces_a_success() -> None:
    ended = RUNNING.folded({**ENDED, "Result": "success"})
    assert ended.folded({"Result": "timeout"}).result == "timeout"


def test_another_process_has_its_own_verdict() -> None:
    again = {"ExecMainStartTimestampMonotonic": 9_000_000, "ExecMainCode": 0, "Result": "success"}
    state = RUNNING.folded(ENDED).folded(again)
    assert (state.result, state.exec_main_code) == ("success", 0)


@pytest.mark.parametrize(
    ("code", "status", "failed"),
    [
        (1, 203, True),
        (1, 200, True),
        (1, 245, True),
        (1, 255, False),
        (1, 1, False),
        (2, 203, False),
    ],
)
def test_exec_stage(code: int, status: int, failed: bool) -> None:
    assert UnitState(exec_main_code=code, exec_main_status=status).exec_failed is failed


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, 0), (5, 5), (UNSET, None), (-1, None), ("5", None), (True, None), (None, None)],
)
def test_counters(value: object, expected: int | None) -> None:
    assert counter(value) == expected


def test_invocation() -> None:
    assert UnitState().folded({"InvocationID": b"\x01\xff"}).invocation_id == "01ff"


@given(
    st.dictionaries(
        st.sampled_from([*ENDED, "LoadState", "ActiveState", "SubState", "Job", "InvocationID"]),
        st.one_of(st.integers(), st.text(), st.none(), st.binary(), st.lists(st.integers())),
    )
)
def test_values_of_a_wrong_type_are_ignored(values: dict[str, object]) -> None:
    state = RUNNING.folded(values)
    assert isinstance(state.main_pid, int)
    assert isinstance(state.result, str)
    assert state.finished in (True, False)

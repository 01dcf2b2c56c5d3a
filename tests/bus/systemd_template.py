# mypy: allow-untyped-defs, allow-untyped-calls
"""python-dbusmock template: a systemd manager good enough to test a launcher against.

Units exist from StartTransientUnit until they are stopped or reset; their object paths, errors and
signals are those of the real one. How a unit goes on is up to the test, through the methods of
CONTROL_IFACE, in any order of events, however unkind.
"""

from __future__ import annotations

import dbus
from dbusmock import mockobject

BUS_NAME = "org.freedesktop.systemd1"
MAIN_OBJ = "/org/freedesktop/systemd1"
MAIN_IFACE = "org.freedesktop.systemd1.Manager"
SYSTEM_BUS = True
CONTROL_IFACE = "ffmpeg_worker.tests.Systemd"

UNIT = "org.freedesktop.systemd1.Unit"
SERVICE = "org.freedesktop.systemd1.Service"
UNSET = dbus.UInt64(2**64 - 1)
NO_JOB = dbus.ObjectPath("/")


def load(mock, parameters):
    mock.units = {}
    mock.unknown = set(parameters.get("unknown", []))
    mock.hanging = set()
    mock.subscribers = set()
    mock.jobs = 0
    mock.started = dbus.Array([], signature="s")
    mock.automatic = True
    mock.AddProperties(
        MAIN_IFACE,
        {
            "Version": dbus.String(parameters.get("version", "252.38-1~deb12u1")),
            "ControlGroup": dbus.String(""),
        },
    )


def escape(name):
    return "".join(
        c if (c.isascii() and c.isalpha()) or (c.isdigit() and i) else f"_{ord(c):02x}"
        for i, c in enumerate(name)
    )


def path_of(name):
    return f"{MAIN_OBJ}/unit/{escape(name)}"


def fail(name, text):
    raise dbus.exceptions.DBusException(text, name=name)


def no_such_unit(name):
    fail("org.freedesktop.systemd1.NoSuchUnit", f"Unit {name} not loaded.")


def signal(mock, name, signature, *args):
    mock.EmitSignal(MAIN_IFACE, name, signature, list(args))


def new_job(mock, name):
    mock.jobs += 1
    path = f"{MAIN_OBJ}/job/{mock.jobs}"
    signal(mock, "JobNew", "uos", dbus.UInt32(mock.jobs), dbus.ObjectPath(path), name)
    return mock.jobs, path


def end_job(mock, job, name, result):
    number, path = job
    args = (dbus.UInt32(number), dbus.ObjectPath(path), name, result)
    signal(mock, "JobRemoved", "uoss", *args)


def row(mock, name):
    unit = mock.units.get(name)
    job = unit["job"] if unit else None
    return (
        name,
        name,
        "loaded" if unit else "not-found",
        unit["active"] if unit else "inactive",
        unit["sub"] if unit else "dead",
        "",
        dbus.ObjectPath(path_of(name)),
        dbus.UInt32(job[0] if job else 0),
        "start" if job else "",
        dbus.ObjectPath(job[1]) if job else NO_JOB,
    )


def add_unit(mock, name, job):
    path = path_of(name)
    mock.units[name] = {"active": "inactive", "sub": "dead", "job": job}
    mock.AddObject(path, UNIT, {"InactiveExitTimestampMonotonic": dbus.UInt64(0)}, [])
    unit = mockobject.objects[path]
    unit.AddProperties(
        SERVICE,
        {
            "MainPID": dbus.UInt32(0),
            "Result": "success",
            "ExecMainCode": dbus.Int32(0),
            "ExecMainStatus": dbus.Int32(0),
            "ExecMainStartTimestampMonotonic": dbus.UInt64(0),
            "ExecMainExitTimestampMonotonic": dbus.UInt64(0),
            "CPUUsageNSec": dbus.UInt64(1_500_000_000),
            "MemoryPeak": dbus.UInt64(8192),
            "IOReadBytes": UNSET,
            "IOWriteBytes": dbus.UInt64(4096),
            "ControlGroup": f"/ffmpeg.slice/{name}",
        },
    )
    signal(mock, "UnitNew", "so", name, dbus.ObjectPath(path))


def service(name, values):
    """Change properties of the Service interface; this announces them."""
    mockobject.objects[path_of(name)].UpdateProperties(SERVICE, values)


def unload(mock, name):
    del mock.units[name]
    mock.RemoveObject(path_of(name))
    signal(mock, "UnitRemoved", "so", name, dbus.ObjectPath(path_of(name)))


def now_usec():
    with open("/proc/uptime") as file:  # noqa: PTH123
        return dbus.UInt64(int(float(file.read().split()[0]) * 1e6) + 1_000_000)


def run(mock, name):
    """From the start job to a running process."""
    unit = mock.units[name]
    service(name, {"MainPID": dbus.UInt32(0), "Result": "success"})  # still inactive here
    unit["active"], unit["sub"] = "activating", "start"
    begun = now_usec()
    mockobject.objects[path_of(name)].UpdateProperties(
        UNIT, {"InactiveExitTimestampMonotonic": begun}
    )
    values = {"MainPID": dbus.UInt32(4194305), "ExecMainStartTimestampMonotonic": begun}
    service(name, values)
    unit["active"], unit["sub"] = "active", "running"
    job, unit["job"] = unit["job"], None
    end_job(mock, job, name, "done")


def verdict(result, code, status):
    return {
        "MainPID": dbus.UInt32(0),
        "Result": result,
        "ExecMainCode": dbus.Int32(code),
        "ExecMainStatus": dbus.Int32(status),
        "ExecMainExitTimestampMonotonic": dbus.UInt64(now_usec() + 2_000_000),
    }


@dbus.service.method(
    MAIN_IFACE,
    in_signature="ssa(sv)a(sa(sv))",
    out_signature="o",
    async_callbacks=("reply", "error"),
)
def StartTransientUnit(self, name, mode, properties, aux, reply, error):  # noqa: N802
    names = [str(item[0]) for item in properties]
    self.started.append(name)
    if "StartTransientUnit" in self.hanging:
        self.hanging.discard("StartTransientUnit")
        if "started" in self.hanging:
            self.hanging.discard("started")
            add_unit(self, name, new_job(self, name))
            run(self, name)
        return
    try:
        if name in self.units:
            text = f"Unit {name} was already loaded or has a fragment file."
            fail("org.freedesktop.systemd1.UnitExists", text)
        for item in names:
            if item in self.unknown:
                text = f"Cannot set property {item}, or unknown property."
                fail("org.freedesktop.DBus.Error.PropertyReadOnly", text)
    except dbus.exceptions.DBusException as exception:
        error(exception)
        return
    job = new_job(self, name)
    add_unit(self, name, job)
    self.units[name]["properties"] = names
    reply(dbus.ObjectPath(job[1]))
    if self.automatic:
        run(self, name)


@dbus.service.method(MAIN_IFACE, in_signature="ss", out_signature="o")
def StopUnit(self, name, mode):  # noqa: N802
    if name not in self.units:
        no_such_unit(name)
    unit = self.units[name]
    job = new_job(self, name)
    if "StopUnit" in self.hanging:  # a process that cannot be killed
        unit["job"] = job
        return dbus.ObjectPath(job[1])
    if unit["sub"] == "running":
        unit["active"], unit["sub"] = "deactivating", "stop-sigterm"
        service(name, verdict("success", 2, 15))
    if unit["active"] != "failed":
        service(name, {"Result": "success"})
        unit["active"], unit["sub"] = "inactive", "dead"
    end_job(self, job, name, "done")
    if unit["active"] != "failed":
        unload(self, name)
    return dbus.ObjectPath(job[1])


@dbus.service.method(MAIN_IFACE, in_signature="s", out_signature="")
def ResetFailedUnit(self, name):  # noqa: N802
    if name not in self.units:
        no_such_unit(name)
    if self.units[name]["active"] == "failed":
        service(name, {"Result": "success"})
        unload(self, name)


@dbus.service.method(MAIN_IFACE, in_signature="s", out_signature="o")
def GetUnit(self, name):  # noqa: N802
    if name not in self.units:
        no_such_unit(name)
    return dbus.ObjectPath(path_of(name))


@dbus.service.method(MAIN_IFACE, in_signature="as", out_signature="a(ssssssouso)")
def ListUnitsByNames(self, names):  # noqa: N802
    return [row(self, str(name)) for name in names]


@dbus.service.method(MAIN_IFACE, in_signature="asas", out_signature="a(ssssssouso)")
def ListUnitsByPatterns(self, states, patterns):  # noqa: N802
    prefixes = tuple(str(pattern).partition("*")[0] for pattern in patterns)
    return [row(self, name) for name in sorted(self.units) if name.startswith(prefixes)]


@dbus.service.method(MAIN_IFACE, in_signature="", out_signature="", sender_keyword="sender")
def Subscribe(self, sender=None):  # noqa: N802
    if sender in self.subscribers:
        fail("org.freedesktop.systemd1.AlreadySubscribed", "Client is already subscribed.")
    self.subscribers.add(sender)


@dbus.service.method(MAIN_IFACE, in_signature="", out_signature="")
def Reload(self):  # noqa: N802
    signal(self, "Reloading", "b", True)
    for name in list(self.units):
        args = (name, dbus.ObjectPath(path_of(name)))
        signal(self, "UnitRemoved", "so", *args)
        signal(self, "UnitNew", "so", *args)
    signal(self, "Reloading", "b", False)


@dbus.service.method(CONTROL_IFACE, in_signature="as", out_signature="")
def Hang(self, what):  # noqa: N802
    """Leave the next StartTransientUnit ("started": but start it), or every StopUnit, undone."""
    self.hanging = {str(item) for item in what}


@dbus.service.method(CONTROL_IFACE, in_signature="b", out_signature="")
def Automatic(self, on):  # noqa: N802
    """Whether a unit's process runs as soon as it is started."""
    self.automatic = bool(on)


@dbus.service.method(CONTROL_IFACE, in_signature="as", out_signature="")
def Unknown(self, names):  # noqa: N802
    """Properties this systemd does not know."""
    self.unknown = {str(name) for name in names}


@dbus.service.method(CONTROL_IFACE, in_signature="", out_signature="as")
def Started(self):  # noqa: N802
    """The names in all calls of StartTransientUnit."""
    return self.started


@dbus.service.method(CONTROL_IFACE, in_signature="s", out_signature="as")
def Properties(self, name):  # noqa: N802
    """Names of the properties a unit was started with."""
    return dbus.Array(self.units[name]["properties"], signature="s")


@dbus.service.method(CONTROL_IFACE, in_signature="s", out_signature="")
def Run(self, name):  # noqa: N802
    run(self, name)


@dbus.service.method(CONTROL_IFACE, in_signature="ssii", out_signature="")
def Finish(self, name, result, code, status):  # noqa: N802
    """The process ends; ExecStopPost runs in between where it failed."""
    unit = self.units[name]
    if result != "success":
        unit["active"], unit["sub"] = "deactivating", "stop-post"
        service(name, verdict(result, code, status))
        unit["active"], unit["sub"] = "failed", "failed"
    else:
        unit["active"], unit["sub"] = "active", "exited"
    service(name, verdict(result, code, status))


@dbus.service.method(CONTROL_IFACE, in_signature="sssii", out_signature="")
def RunAndFinish(self, name, job_result, result, code, status):  # noqa: N802
    """The process ends before its start is reported, and that report may be wrong."""
    unit = self.units[name]
    begun = now_usec()
    values = {"MainPID": dbus.UInt32(4194305), "ExecMainStartTimestampMonotonic": begun}
    service(name, values)
    job, unit["job"] = unit["job"], None
    good = result == "success"
    unit["active"], unit["sub"] = ("active", "exited") if good else ("failed", "failed")
    service(name, verdict(result, code, status))
    end_job(self, job, name, job_result)


@dbus.service.method(CONTROL_IFACE, in_signature="sb", out_signature="")
def Vanish(self, name, silently):  # noqa: N802
    """Somebody else stops the unit and it is collected at once."""
    if not silently:
        service(name, verdict("success", 2, 15))
    unload(self, name)


@dbus.service.method(CONTROL_IFACE, in_signature="sssii", out_signature="")
def Load(self, name, active, sub, code, status):  # noqa: N802
    """A unit that is there already: after a restart of the bus, or left over."""
    add_unit(self, name, None)
    self.units[name]["active"], self.units[name]["sub"] = active, sub
    if code:
        service(name, verdict("success" if not status else "exit-code", code, status))


@dbus.service.method(CONTROL_IFACE, in_signature="s", out_signature="")
def Restart(self, name):  # noqa: N802
    """Somebody runs the unit again: a new process, with nothing to say of the old one."""
    self.units[name]["active"], self.units[name]["sub"] = "active", "running"
    values = {
        "MainPID": dbus.UInt32(4194306),
        "ExecMainStartTimestampMonotonic": dbus.UInt64(now_usec() * 2),
    }
    service(name, {**verdict("success", 0, 0), **values})

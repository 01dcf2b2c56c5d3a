"""From a step of a job to the Launch of its unit. Pure.

What a unit may see and reach follows from what its step does: nothing but files for most, the
network where input or output is a network one, a GPU where the job asks for one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from worker.jobs import ffmpeg
from worker.jobs.spec import JobSpec, Limits, Priority, StreamOutput
from worker.site import Site
from worker.systemd.launch import Launch, UnitLimits
from worker.systemd.names import Step, slice_name, unit_name
from worker.systemd.overrides import Changes
from worker.systemd.sandbox import Sandbox
from worker.workspace import Workspace

MIB = 1024 * 1024
CPU_WEIGHT = {Priority.HIGH: 200, Priority.MEDIUM: 100, Priority.LOW: 50}


def launch_of(
    step: Step,
    job_id: str,
    space: Workspace,
    spec: JobSpec,
    limits: Limits,
    command: tuple[str, ...],
    site: Site,
    readable: Sequence[Path] = (),
) -> Launch:
    """The unit of a step. ``readable`` are the files that it sees besides the job's own."""
    what = {Step.INPUT: "test input of", Step.MAIN: "transcode", Step.PROBE: "check of"}[step]
    main = step is Step.MAIN
    if main and isinstance(spec.output, StreamOutput):
        what = "stream of"
    return Launch(
        unit=unit_name(job_id, step),
        description=f"FFmpeg {what} job {spec.id} ({spec.scenario or 'no scenario'}, "
        f"{spec.queue}/{spec.priority})",
        argv=command,
        slice=slice_name(spec.queue),
        limits=UnitLimits(
            cpu_percent=limits.cpu_percent,
            memory_bytes=limits.memory_mb * MIB,
            runtime_sec=limits.timeout_sec,
            file_bytes=limits.disk_mb * MIB,
            cpu_weight=limits.cpu_weight or CPU_WEIGHT[spec.priority],
            devices=(limits.io,) if limits.io else (),
        ),
        stdout=space.stdout(step),
        environment=ffmpeg.report_environment(space.log(step)),
        working_directory=space.files,
        usage_record=step is not Step.PROBE,
        sandbox=Sandbox(
            root=site.root,
            folder=space.files,
            readable=tuple(readable),
            group=site.group,
            network=main and spec.network_needed,
            devices=site.gpus if main and spec.gpu_needed else (),
            generates_code=main and spec.gpu_needed,
        ),
        journal_fields={"JOB_ID": job_id, "SCENARIO": spec.scenario},
    )


def changed_limits(limits: Limits, changes: Changes) -> Limits:
    """The limits that were in force in the end; one that was lifted stays as it was asked for."""
    now = {name: value for name, (_, value) in changes.items() if value is not None}
    cpu, memory = now.get("cpu_percent"), now.get("memory_bytes")
    return replace(
        limits,
        cpu_percent=limits.cpu_percent if cpu is None else max(1, round(cpu)),
        memory_mb=limits.memory_mb if memory is None else max(1, round(memory / MIB)),
    )

"""The settings that the rest of the program reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, SecretStr, model_validator

from worker.jobs.policy import (
    INPUT_DIR,
    INPUT_PROTOCOLS,
    OUTPUT_PROTOCOLS,
    WORK_DIR,
    Policy,
    workers_own,
)
from worker.jobs.spec import Limits

DEFAULT_WORK_DIR = WORK_DIR
DEFAULT_ACCOUNT = "ffmpeg-worker"


class Settings(BaseModel):
    """Every value parsed and within its bounds (``worker.config.resolve`` sees to that)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    master_url: str = ""
    """``http(s)://host[:port][/path]`` without a trailing slash; empty: no master is needed."""
    master_api_key: SecretStr | None = None
    master_api_key_file: Path | None = None
    """Where the operator keeps the key; it has been read where ``master_api_key`` is from it."""
    ca: Path | None = None
    """PEM file of the authorities that may vouch for the master; None: the system's."""
    cert: Path | None = None
    key: Path | None = None
    insecure_skip_verify: bool = False

    node_name: str = ""
    """The ``address`` we register with: it is our identity at the master."""
    max_concurrent_jobs: int = 4
    poll_interval: float = 3.0
    """Seconds between two polls that found no job."""
    heartbeat_interval: float = 30.0
    """Seconds."""
    job_check_interval: float = 5.0
    """Seconds between two questions to the master about the same running job."""
    stop_mode: Literal["handback", "drain", "leave"] = "handback"
    """What becomes of running jobs when the service is stopped."""
    stop_grace: float = 30.0
    """Seconds that a stop waits for running jobs."""
    history_days: int = 7
    """How long jobs that are done are remembered."""

    default_cpu_percent: int = 200
    """100 is one core."""
    default_memory_mb: int = 2048
    default_disk_mb: int = 5000
    default_timeout_sec: int = 3600

    input_dirs: tuple[Path, ...] = (INPUT_DIR,)
    """Jobs may read files below these."""
    output_dirs: tuple[Path, ...] = (DEFAULT_WORK_DIR,)
    """Jobs may put outputs below these; the work directory unless something else is said."""
    input_protocols: frozenset[str] = frozenset(INPUT_PROTOCOLS)
    output_protocols: frozenset[str] = frozenset(OUTPUT_PROTOCOLS)
    output_owner: str = DEFAULT_ACCOUNT
    """``user`` or ``user:group``, by name or number: whose a published output is."""
    job_group: str = DEFAULT_ACCOUNT
    """By name or number: the group that jobs run in."""

    generate_input: bool = True
    persist_inputs: bool = False
    persist_outputs: bool = False

    metrics_addr: str = ""
    """Address to serve metrics and health on; empty: all, IPv6 and IPv4."""
    metrics_port: int = 9091
    """0: none are served."""

    work_dir: Path = DEFAULT_WORK_DIR
    log_level: str = "info"
    """``debug``, ``info``, ``warning`` or ``error``."""
    log_file: Path | None = None
    """A second place for the log; stderr has it in any case."""
    user: bool = False
    """Jobs are units of our own service manager (``systemctl --user``)."""

    @model_validator(mode="before")
    @classmethod
    def _outputs_go_to_the_work_dir(cls, values: Any) -> Any:
        if isinstance(values, dict) and "work_dir" in values:
            return {"output_dirs": (values["work_dir"],), **values}
        return values

    @property
    def policy(self) -> Policy:
        """What jobs may read and write."""
        return Policy(
            input_dirs=self.input_dirs,
            output_dirs=self.output_dirs,
            input_protocols=self.input_protocols,
            output_protocols=self.output_protocols,
            closed=workers_own(self.work_dir),
        )

    @property
    def defaults(self) -> Limits:
        """The limits of a job that names none."""
        return Limits(
            cpu_percent=self.default_cpu_percent,
            memory_mb=self.default_memory_mb,
            disk_mb=self.default_disk_mb,
            timeout_sec=self.default_timeout_sec,
        )

"""Inputs and outputs where the configuration is another one."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.attack.sharing import assert_good, attacked, ours, reading, writing
from tests.e2e.conftest import WORK_DIR
from tests.e2e.surroundings import drop_in


def test_another_owner_and_another_file_system() -> None:
    """As configured: a user without a name, on what is not the work directory's file system."""
    folder = Path("/run/outputs")
    folder.mkdir(mode=0o755)
    config = {"OUTPUT_OWNER": "12345:54321", "OUTPUT_DIRS": f"{WORK_DIR}:{folder}"}
    with drop_in(f"ReadWritePaths={folder}"), attacked(**config) as scene:
        assert folder.stat().st_dev != WORK_DIR.stat().st_dev
        for target in (WORK_DIR / "owned.mp4", folder / "x.mp4", folder / "x.mp4"):
            scene.take_note()
            result = scene.run(writing(target))
            assert result["status"] == "completed", result
            assert_good(target, (12345, 54321))
            scene.unharmed(*([target] if target.is_relative_to(WORK_DIR) else []))
        (folder / "link.mp4").symlink_to("/etc/passwd")
        scene.refused(writing(folder / "link.mp4"), "it is a symbolic link")
        ours(folder / "old.mp4")
        scene.refused(writing(folder / "old.mp4"), "outputs replace only what belongs to 12345")
    (WORK_DIR / "owned.mp4").unlink()
    shutil.rmtree(folder)


def test_what_is_ours_alone_where_media_are_the_work_directory() -> None:
    """INPUT_DIRS as wide as it goes."""
    with attacked(INPUT_DIRS=str(WORK_DIR)) as scene:
        odd = WORK_DIR / "odd.mp4"
        for name in ("ledger.db", "jobs/x/files/output.mp4", "root/x", "control.sock"):
            scene.refused(reading(WORK_DIR / name), "is the worker's own")
            odd.symlink_to(WORK_DIR / name)
            scene.refused(reading(odd), "is among the worker's own files")
            odd.unlink()
        scene.refused(reading(WORK_DIR), "lies outside of INPUT_DIRS")

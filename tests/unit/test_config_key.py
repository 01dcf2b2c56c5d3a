"""The API key: where it may come from, and that it goes nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.unit.test_config import MASTER, SECRET, config, wrong
from worker.cli import check
from worker.config import resolve
from worker.config.resolve import CREDENTIAL, PLACEHOLDER_KEY


def key_file(folder: Path, text: str = f" {SECRET} \nnotes\n", mode: int = 0o600) -> Path:
    path = folder / "api.key"
    path.write_text(text)
    path.chmod(mode)
    return path


def test_the_key_from_a_file_of_its_own(tmp_path: Path) -> None:
    name = str(key_file(tmp_path))
    (tmp_path / "master-api-key").write_text("from-the-credential")
    credential = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    written = config(tmp_path, f"MASTER_API_KEY_FILE={name}\nMASTER_API_KEY=from-config\n")
    for flags, environ, file in (
        ({"--api-key-file": name}, MASTER, ""),
        ({}, MASTER | {"MASTER_API_KEY_FILE": name} | credential, ""),
        ({}, MASTER | credential, written),
    ):
        resolved = resolve(flags, environ, config_file=file)
        key = resolved.settings.master_api_key
        assert key is not None
        assert key.get_secret_value() == SECRET
        assert resolved.sources["master_api_key"] == f"key file {name}"
        assert SECRET not in repr(resolved) + str(check.rows(resolved))
        assert not any("MASTER_API_KEY_FILE" in warning for warning in resolved.warnings)


def test_a_key_that_comes_before_the_key_file_is_said(tmp_path: Path) -> None:
    name = str(key_file(tmp_path))
    for flags, environ in (
        ({"--api-key": "flagged"}, MASTER),
        ({}, MASTER | {"MASTER_API_KEY": "flagged"}),
    ):
        resolved = resolve({**flags, "--api-key-file": name}, environ)
        key = resolved.settings.master_api_key
        assert key is not None
        assert key.get_secret_value() == "flagged"
        assert any("MASTER_API_KEY_FILE has no effect" in text for text in resolved.warnings)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o602, 0o644])
def test_a_key_file_is_for_its_owner_alone(tmp_path: Path, mode: int) -> None:
    path = key_file(tmp_path, mode=mode)
    (line,) = wrong({"--api-key-file": str(path)}, MASTER)
    assert line == f"--api-key-file: {path} must be for its owner alone: chmod 600 it"


def test_a_key_file_that_cannot_be_one(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo, 0o600)
    for path, why in (
        (fifo, "must be a regular file"),
        (tmp_path, "must be a regular file"),
        (Path("/dev/null"), "must be a regular file"),
        (tmp_path / "none", "cannot be read: No such file or directory"),
        (key_file(tmp_path, "\n" + SECRET), "has no key in its first line"),
    ):
        (line,) = wrong({}, MASTER | {"MASTER_API_KEY_FILE": str(path)})
        assert line == f"environment variable MASTER_API_KEY_FILE: {path} {why}"
    for text in (f"{SECRET} two words", f"{SECRET}\xfc", "x" * 5000 + SECRET):
        path = key_file(tmp_path, text)
        (line,) = wrong({}, MASTER | {"MASTER_API_KEY_FILE": str(path)})
        assert line.startswith(f"key file {path}: must be visible ASCII")
        assert SECRET not in line


def test_a_key_file_must_be_ours_or_roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = key_file(tmp_path)
    owner = path.stat().st_uid or 4711  # root's are always fine
    if path.stat().st_uid == 0:
        os.chown(path, owner, -1)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    (line,) = wrong({"--api-key-file": str(path)}, MASTER)
    assert "must be owned by root, or by the user that the worker runs as" in line
    monkeypatch.setattr(os, "geteuid", lambda: owner)
    assert resolve({"--api-key-file": str(path)}, MASTER).settings.master_api_key


def test_the_key_by_flag_works_is_warned_about_and_never_shown() -> None:
    resolved = resolve({"--api-key": SECRET}, MASTER)
    key = resolved.settings.master_api_key
    assert key is not None
    assert key.get_secret_value() == SECRET
    assert any("every local user can see the key" in text for text in resolved.warnings)
    shown = [repr(resolved), str(resolved.settings), str(check.rows(resolved))]
    assert SECRET not in "".join(shown)


def test_a_placeholder_gives_way_to_a_key(tmp_path: Path) -> None:
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    environ = {
        "MASTER_URL": "https://m",
        "NODE_NAME": "n",
        "MASTER_API_KEY": PLACEHOLDER_KEY,
        "CREDENTIALS_DIRECTORY": str(credentials),
    }
    alone = resolve({}, environ)
    assert any("placeholder" in warning for warning in alone.warnings)
    (credentials / CREDENTIAL).write_text("the-key\n")
    both = resolve({}, environ)
    assert both.settings.master_api_key is not None
    assert both.settings.master_api_key.get_secret_value() == "the-key"
    assert not any("placeholder" in warning for warning in both.warnings)

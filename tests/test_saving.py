"""A folder is the old one or the new one, whole, however its writer ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from common.atomic_folder import recover, written_whole


SCRIPTS = Path(__file__).parents[1] / "scripts"


# Writes versions 1, 2, … of a folder; each file of a version says which one it belongs to.
WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from common.atomic_folder import written_whole
version = 0
while True:
    version += 1
    with written_whole(Path(sys.argv[2])) as folder:
        for name in "abcd":
            (folder / name).write_text(str(version) * 1000)
    print(version, flush=True)
"""


def texts(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def fail_half_way(target: Path, error: BaseException):
    with written_whole(target) as folder:
        (folder / "file").write_text("half")
        raise error


def test_replaces_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "parent" / "run"
    for version in ("one", "two"):
        with written_whole(target) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / "file").write_text(version)
            assert folder.parent == target.parent
        assert texts(target / "inner") == {"file": version}
    assert [path.name for path in target.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_the_old_folder(tmp_path, error):
    target = tmp_path / "run"
    for _ in range(2):
        with pytest.raises(type(error)):
            fail_half_way(target, error)
        assert not any(tmp_path.iterdir())
    with written_whole(target) as folder:
        (folder / "file").write_text("old")
    with pytest.raises(type(error)):
        fail_half_way(target, error)
    assert texts(target) == {"file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_refuses_a_file(tmp_path):
    (tmp_path / "run").write_text("text")
    with pytest.raises(FileExistsError, match="must be a folder"), written_whole(tmp_path / "run"):
        pass
    assert (tmp_path / "run").read_text() == "text"


def test_puts_back_what_a_killed_process_moved_aside(tmp_path, monkeypatch):
    target = tmp_path / "run"
    with written_whole(target) as folder:
        (folder / "file").write_text("old")

    # Killed between the two renames: not even the handler of exceptions runs.
    def stop(*_):
        os._exit(0)

    child = os.fork()
    if child == 0:
        real = Path.rename
        monkeypatch.setattr(Path, "rename", lambda path, to: stop() if path.name.endswith(".new") else real(path, to))
        with written_whole(target) as folder:
            (folder / "file").write_text("new")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.new", ".run.old"]
    recover(target)
    assert texts(target) == {"file": "old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_any_moment_the_folder_is_whole(tmp_path):
    target, written = tmp_path / "run", 0
    for _ in range(12):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(SCRIPTS), str(target)], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout.readline()
        time.sleep(random.uniform(0, 0.05))
        writer.send_signal(signal.SIGKILL)
        written += 1 + len(writer.stdout.readlines())
        writer.wait()
        recover(target)
        found = texts(target)
        assert sorted(found) == list("abcd")
        assert len(set(found.values())) == 1
        assert len(found["a"]) % 1000 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert written >= 12

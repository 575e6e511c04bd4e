"""Files that several processes write: whole, of their own name, synced; and one run a folder."""

import fcntl
import os
import socket
import stat

import pytest
import torch

from minidistill import training
from minidistill.training import files
from tests.training.test_training import toy_state, toy_update


def put(path, text):
    with files.atomic(path) as name:
        name.write_text(text)


def test_a_temporary_file_has_a_name_of_its_own_and_no_link_is_followed(tmp_path, monkeypatch):
    """What stands under a name that could be guessed, a link or a folder, is neither written through nor in the way."""
    file, victim = tmp_path / "run", tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / ".partial-run").symlink_to(victim)
    put(file, "one")
    assert victim.read_text() == "kept"
    (tmp_path / ".partial-run").unlink()
    (tmp_path / ".partial-run").mkdir()
    put(file, "two")
    assert file.read_text() == "two"
    names = iter(["0" * 8, "1" * 8])
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: next(names))
    (tmp_path / f".partial-{'0' * 8}-run").symlink_to(victim)
    put(file, "three")
    assert (file.read_text(), victim.read_text()) == ("three", "kept")
    assert next(names, None) is None  # the name that was taken was left alone


def test_a_file_has_the_usual_rights(tmp_path):
    (tmp_path / "plain").touch()
    put(tmp_path / "run", "x")
    assert (tmp_path / "run").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_dead_writers_left_is_removed_and_nothing_else(tmp_path):
    dead, alive = (tmp_path / f".partial-{digit * 8}-run" for digit in "ab")
    others = [tmp_path / f".partial-{'c' * 8}-big-run", tmp_path / f".partial-{'c' * 8}-run.png", tmp_path / "run-big"]
    for path in (dead, alive, *others):
        path.write_text("x")
    with alive.open() as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        put(tmp_path / "run", "x")
    assert not dead.exists()
    assert all(path.exists() for path in (alive, *others))


def test_the_folder_is_synced_after_the_rename(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, os.replace

    def fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda *names: [done.append("rename"), replace(*names)])
    put(tmp_path / "run", "x")
    assert done == ["file", "rename", "folder"]


def test_a_second_run_in_a_folder_is_refused_in_a_line_that_names_the_first(tmp_path):
    folder = tmp_path / "new"
    with files.hold(folder):
        with pytest.raises(BlockingIOError) as caught, files.hold(folder):
            pass
        said, me = str(caught.value), f"process {os.getpid()} on {socket.gethostname()}"
        assert said.startswith(f"{folder} is in use by another run: {me}, since ")
        assert "\n" not in said
    assert not folder.exists()  # made for nothing, so removed
    with files.hold(tmp_path), files.hold(tmp_path, "other"):  # a file in it is another matter
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_a_dead_process_left_is_taken_over(tmp_path):
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "long ago"}')
    with files.hold(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_a_link_in_the_locks_place_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match=r"\.lock"), files.hold(tmp_path):
        pass
    assert victim.read_text() == "kept"


def test_a_run_has_its_checkpoint_to_itself(tmp_path):
    file = tmp_path / "run.safetensors"

    def second(state):
        training.fit(toy_state(), toy_update, 3, progress=False, checkpoint=file)

    with pytest.raises(BlockingIOError, match=r"run\.safetensors is in use by another run"):
        training.fit(toy_state(), second, 3, progress=False, checkpoint=file)
    training.fit(toy_state(), toy_update, 3, progress=False, checkpoint=file)
    assert [path.name for path in tmp_path.iterdir()] == ["run.safetensors"]
    assert torch.isfinite(torch.tensor(training.progress_of(file)["history"][-1]["loss"]))

"""A disk that takes no more: the system itself refuses what is written beyond so many bytes."""

import contextlib
import resource

import pytest

from minidistill import training
from minidistill.training import checkpoints
from tests.helpers import small_denoiser
from tests.training.test_training import toy_state, toy_update


@contextlib.contextmanager
def room(bytes_):
    """While active, no file of this process may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_runs_out_of_room_leaves_the_old_file(tmp_path, times, tally):
    file = checkpoints.save_model(tmp_path / "model.safetensors", small_denoiser(0))
    before, lost = file.read_bytes(), 0
    sizes = range(0, len(before), times(len(before) // 40, len(before) // 1000))
    for size in sizes:
        with room(size), pytest.raises(OSError, match="File too large"):
            checkpoints.save_model(file, small_denoiser(1))
        lost += file.read_bytes() != before or len(list(tmp_path.iterdir())) > 1
    tally("saves on a full disk", len(sizes), lost)


def test_a_run_on_a_full_disk_goes_on_and_saves_when_there_is_room_again(tmp_path, tally):
    file = tmp_path / "run.safetensors"
    with contextlib.ExitStack() as stack:
        def callback(state):
            if state.step == 10:
                stack.enter_context(room(2000))
            if state.step == 30:
                assert training.progress_of(file)["step"] == 5
                stack.close()

        with pytest.warns(UserWarning, match="could not be written") as warned:
            training.fit(toy_state(), toy_update, 50, progress=False, checkpoint=file, checkpoint_every=5,
                         callbacks=[callback], callback_every=5)
    assert len([each for each in warned if "File too large" in str(each.message)]) == 4  # steps 10 to 25
    tally("periodic saves on a full disk", 4, int(training.progress_of(file)["step"] != 50))

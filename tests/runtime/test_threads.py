import threading

import pytest
import torch

from triptych.errors import UsageError
from triptych.runtime.threads import check_thread_count, serial_openmp, torch_threads


def levels() -> int:
    guard = serial_openmp()
    assert guard is not None
    return int(guard._get())


def test_serial_openmp_reaches_other_threads_and_is_restored() -> None:
    """The guard works only while the limit belongs to the process: a torch with another OpenMP shows here."""
    guard = serial_openmp()
    if guard is None:
        pytest.skip("this torch is built without OpenMP")
    before = levels()
    assert before > 0
    seen: list[int] = []
    with guard:
        thread = threading.Thread(target=lambda: seen.append(levels()))
        thread.start()
        thread.join()
        with guard:
            assert levels() == 0
        assert levels() == 0  # the inner caller left; the outer one is still inside
    assert seen == [0]
    assert levels() == before


def test_serial_openmp_is_restored_after_an_error() -> None:
    guard = serial_openmp()
    if guard is None:
        pytest.skip("this torch is built without OpenMP")
    before = levels()
    with pytest.raises(RuntimeError), guard:
        raise RuntimeError
    assert levels() == before


def test_torch_threads_are_restored() -> None:
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with torch_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(UsageError, match="threads is -1"):
        check_thread_count(-1)

"""What only this run's own processes can say."""

import threading
from pathlib import Path

import pytest

from ensemble.errors import Forbidden
from ensemble.serving import secret
from ensemble.serving.marks import (
    Mark,
    ensemble_mark,
    openai_mark,
    read_mark,
    read_stream_handle,
    stream_handle,
)
from ensemble.serving.run_dir import RUN_DIR_VARIABLE


def test_a_sealed_call_is_opened_and_no_other() -> None:
    sealed = secret.seal(b"call")
    assert secret.open(sealed) == b"call"
    for forged in (b"", b"call", bytes(32) + b"call", b"\0" + sealed[1:]):
        with pytest.raises(Forbidden):
            secret.open(forged)


def test_marks_and_handles_cannot_be_forged_or_taken_for_each_other() -> None:
    mark, stream = ensemble_mark(12345), stream_handle(7)
    assert read_mark(mark) == Mark(12345, is_of_ensemble=True)
    assert read_mark(openai_mark(12345)) == Mark(12345, is_of_ensemble=False)
    assert read_stream_handle(stream) == 7
    assert read_mark(stream) is None and read_stream_handle(mark) is None
    for forged in (
        "",
        "/",
        "stream 7",
        "stream 7/",
        stream.replace("7", "8", 1),
        stream[:-1],
        stream + "0",
        "é/é",
    ):
        assert read_stream_handle(forged) is None
        assert read_mark(forged) is None


def test_threads_that_need_it_at_once_have_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the two exchanges of a scheduler that starts: with another secret its stages would obey no call of it."""
    num_threads = 16
    for attempt in range(50):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        monkeypatch.setenv(RUN_DIR_VARIABLE, str(folder))
        barrier, found = threading.Barrier(num_threads), []

        def make(barrier: threading.Barrier = barrier, found: list[bytes] = found) -> None:
            barrier.wait()
            found.append(secret._secret.__wrapped__())

        threads = [threading.Thread(target=make) for _ in range(num_threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(found) == {(folder / "secret").read_bytes()}
        assert len(found) == num_threads
        assert [path.name for path in folder.iterdir()] == ["secret"]

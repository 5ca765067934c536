from __future__ import annotations

import errno

from covray.errors import last_line, one_line


def test_what_an_exception_says_is_one_line_of_bounded_length() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(KeyError()) == "KeyError"
    assert one_line(OSError(errno.ENOSPC, "No space left on device", "/a/file")) == "No space left on device"
    assert len(one_line(ValueError("x" * 1000))) == 200
    assert one_line(ValueError("x" * 1000)).endswith("x...")


def test_the_last_line_is_without_the_traceback_above_it() -> None:
    assert last_line(RuntimeError("Traceback\n  File x\nValueError: why\n\n")) == "ValueError: why"
    assert last_line(RuntimeError("\n")) == "RuntimeError"


def test_what_a_filesystem_refused_is_told_without_its_wrapping() -> None:
    arrow = "Error writing bytes to file. Detail: [errno 28] No space left on device"
    assert last_line(OSError(arrow)) == last_line(OSError(errno.ENOSPC, arrow)) == "No space left on device"
    assert last_line(OSError("AWS Error NETWORK_CONNECTION")) == "AWS Error NETWORK_CONNECTION"

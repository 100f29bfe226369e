"""The file that a test's trace is written to."""

from __future__ import annotations

from lingualinked.testing.traces import file_name


def test_a_file_is_named_after_its_test() -> None:
    assert (
        file_name("tests/test_a.py::TestIt::test_b[devices=near+far-2]")
        == "tests_test_a.py_TestIt_test_b_devices=near+far-2_.json"
    )


def test_long_names_differ() -> None:
    names = [file_name(f"test_a.py::test_b[{'x' * 300}{number}]") for number in range(2)]
    assert names[0] != names[1]
    assert max(map(len, names)) < 200

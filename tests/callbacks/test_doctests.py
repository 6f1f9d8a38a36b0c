"""The examples in the docstrings of all callbacks run."""

import doctest
import importlib

import pytest

import rlmt.callbacks


@pytest.mark.parametrize("name", rlmt.callbacks.__all__)
def test_example(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(getattr(rlmt.callbacks, name).__module__)
    result = doctest.testmod(module)
    assert result.attempted >= 3 and result.failed == 0

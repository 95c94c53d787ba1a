"""Where packages of the evaluation are missing, the tests that need them are skipped, and no other failure is."""

from __future__ import annotations

import pytest

from mtrain.errors import EvalError
from tests import conftest

NO_TEMPLATES = "the prompt templates are read out of lm-eval, which is not installed; pip install it"


def test_an_error_that_names_a_missing_package_skips_and_no_other_does(monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped = RuntimeError("rank 1 failed")
    wrapped.__cause__ = EvalError(NO_TEMPLATES)
    missing = [ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval.api"), EvalError(NO_TEMPLATES), wrapped]
    others = [
        AssertionError("lm-eval says 0.3"),
        ModuleNotFoundError("No module named 'datasets'", name="datasets"),  # it is there, but a test broke it
        EvalError("the words come from wonderwords, which is not installed"),
        RuntimeError("rank 1 failed"),
    ]
    monkeypatch.setattr(conftest, "MISSING", frozenset({"lm_eval"}))
    assert all(conftest.absent(error) for error in missing)
    assert not any(conftest.absent(error) for error in others)
    monkeypatch.setattr(conftest, "MISSING", frozenset())
    assert not any(conftest.absent(error) for error in missing)

"""Errors carry their subject."""

import inspect

from tenon.base import errors


def test_every_error_is_of_the_tree_and_drawn_in_it() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    assert all(issubclass(kind, errors.TenonError) for kind in kinds)
    assert [kind.__name__ for kind in kinds if kind.__name__ not in (errors.__doc__ or "")] == []


def test_subjects() -> None:
    assert errors.ConfigError("x is wrong", subject="x").subject == "x"
    assert errors.RequestError("n is wrong", param="n", code="invalid").subject == "n"
    assert errors.Overloaded("full", retry_after_s=2.0).retry_after_s == 2.0


def test_context_too_long_keeps_the_phrase_clients_match_on() -> None:
    error = errors.ContextTooLong(100, 29, 128)
    assert "maximum context length is 128 tokens" in str(error)
    assert error.code == "context_length_exceeded"

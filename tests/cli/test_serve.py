"""``tenon serve``: words to a config."""

from __future__ import annotations

import argparse

import pytest

from tenon.base.errors import ConfigError
from tenon.cli import serve
from tenon.engine.config import EngineConfig


def config(*words: str) -> EngineConfig:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.config_from(parser.parse_args(words)).engine


def test_nothing_said_is_the_default() -> None:
    assert config() == EngineConfig()


def test_the_policy_that_is_named_decides_who_gives_way() -> None:
    assert config("--evict", "tuned").evict == "tuned"
    assert config().evict == "lru"


def test_chunks_go_by_what_is_said() -> None:
    found = config("--chunk", "adaptive", "--tpot-ms", "25", "--min-chunk-tokens", "32")
    assert (found.chunk, found.tpot_ms, found.min_chunk_tokens) == ("adaptive", 25.0, 32)


def test_who_guesses_and_how_far_is_as_said() -> None:
    words = ["--speculative", "suffix, ngram", "--speculative-policy", "chain-4"]
    found = config(*words, "--speculative-depth", "5", "--speculative-nodes", "40")
    assert found.drafters == ("suffix", "ngram")
    assert (found.speculative_policy, found.speculative_depth, found.speculative_nodes) == ("chain-4", 5, 40)
    with pytest.raises(ConfigError, match="speculative_depth must be from 1 to 64, got 65"):
        config("--speculative-depth", "65")


def test_a_target_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match="tpot_ms must be given"):
        config("--chunk", "adaptive")


def test_a_bound_on_waiting_is_taken_and_one_of_nothing_is_named() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    assert serve.config_from(parser.parse_args(["--max-wait-s", "2.5"])).limits.max_wait_s == 2.5
    with pytest.raises(ConfigError, match=r"max_wait_s must be above 0, got 0\.0"):
        serve.config_from(parser.parse_args(["--max-wait-s", "0"]))


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], []),
        (["--slo", "tpot=50ms"], ["--chunk patient"]),
        (["--slo", "tpot=50ms", "--speculative", "suffix"], ["--chunk patient", "--speculative-policy slack"]),
        (["--slo", "tpot=50ms", "--speculative", "suffix", "--speculative-policy", "paper", "--chunk", "patient"], []),
    ],
)
def test_who_promises_is_told_how_to_serve_by_it(words: list[str], hint: list[str]) -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    said = serve.hint_for(serve.config_from(parser.parse_args(words)))
    assert all(one in said for one in hint)
    assert bool(said) == bool(hint)

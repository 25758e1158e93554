"""The embedded pair's tokenizer: byte-level BPE, trained on the training split alone.

Runs of blanks are tokens of their own (Python's indentation), digits stand alone, and every byte sequence
can be encoded: there is no unknown token.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tenon.base.errors import ConfigError

END_OF_TEXT, IM_START, IM_END, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL = (END_OF_TEXT, IM_START, IM_END, PAD)

# A word takes one blank or mark before it (" self", ".append"); marks take the line ends and the indentation
# after them ("):\n        "); digits stand alone.
PIECES = (
    r"(?:\n[ \t]*)+|[^\s\p{L}\p{M}\p{N}_]?[\p{L}\p{M}_]+|[ ][\p{L}\p{M}_]+|\p{N}"
    r"|[ ]?[^\s\p{L}\p{M}\p{N}_]+(?:\n[ \t]*)*|[ \t]+(?=\S)|\s+"
)


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token. Raises ``ConfigError`` when the tokenizer has none of that name."""
    number: int | None = tokenizer.token_to_id(token)
    if number is None:
        raise ConfigError(f"the tokenizer has no {token}.", subject=token)
    return number


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn ``vocab_size`` tokens, the special ones first (ids 0..3) and the 256 bytes among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer

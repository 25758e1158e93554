from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from tenon.base.errors import CheckpointError, RequestError, UnsupportedModel
from tenon.models.tokenizer import Detokenizer, Tokenizer, load_tokenizer

TEXTS = (
    "def foo(x):\n    return x + 1\n",
    "Überraschung, naïve café – 12,5 %",
    "你好,世界。天地玄黄",
    "Привет, мир! שלום עולם مرحبا بالعالم",
    "👩🏽‍🚀🙂 नमस्ते e\u0301 \u200b\ufffd\x00\t  ",
    "<|end|> is not <|start|>",
)
SENTENCE_PIECE = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3 and Qwen have it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    made.add_special_tokens(["<|start|>", "<|end|>"])
    made.add_tokens([AddedToken("<think more>", special=False)])
    return made


def byte_fallback() -> tokenizers.Tokenizer:
    """As Llama 2, Mistral and Mixtral have it: pieces with ▁, and a token for each byte."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for piece in ("▁", "a", "b", "c", "é", "你", "ab", "▁a", "▁ab", "▁▁", "▁▁▁"):
        vocab[piece] = len(vocab)
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab"), ("▁", "▁"), ("▁▁", "▁")]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = SENTENCE_PIECE
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return made


def metaspace() -> tokenizers.Tokenizer:
    made = byte_fallback()
    made.decoder = decoders.Sequence([decoders.Metaspace("▁"), decoders.ByteFallback(), decoders.Fuse()])
    return made


KINDS = {
    "byte level": Tokenizer(byte_level(), {}),
    "byte fallback": Tokenizer(byte_fallback(), {}),
    "metaspace": Tokenizer(metaspace(), {}),
}
LIBRARY = {"byte level": byte_level(), "byte fallback": byte_fallback(), "metaspace": metaspace()}
kinds = pytest.mark.parametrize("kind", KINDS)


def streamed(tokenizer: Tokenizer, ids: list[int], skip_special: bool = True) -> list[str]:
    stream = Detokenizer(tokenizer, skip_special=skip_special)
    return [*(stream.push([token]) for token in ids), stream.flush()]


@kinds
@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(kind: str, text: str) -> None:
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert "".join(streamed(tokenizer, ids, skip_special=False)) == text


@kinds
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_streams_as_the_library_decodes_it(kind: str, text: str) -> None:
    ids = KINDS[kind].encode(text)
    right = LIBRARY[kind].decode(ids, skip_special_tokens=False)
    pieces = streamed(KINDS[kind], ids, skip_special=False)
    assert "".join(pieces) == right
    assert "�" in text or not any("�" in piece for piece in pieces)


@kinds
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_as_they_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = KINDS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 5), max_size=30))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=5)))
    stream = Detokenizer(tokenizer)
    pieces = [stream.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    assert "".join(pieces) + stream.flush() == tokenizer.decode(ids) == "".join(streamed(tokenizer, ids))


def test_random_byte_level_ids_decode_as_in_the_library() -> None:
    rng, library = random.Random(0), LIBRARY["byte level"]
    for _ in range(2000):
        ids = [rng.randrange(library.get_vocab_size()) for _ in range(rng.randrange(12))]
        assert KINDS["byte level"].decode(ids) == library.decode(ids)


def test_a_character_waits_for_its_last_byte() -> None:
    pieces = streamed(KINDS["byte fallback"], [3 + byte for byte in "🙂".encode()])
    assert pieces == ["", "", "", "🙂", ""]


def test_an_unfinished_character_ends_as_a_replacement() -> None:
    assert streamed(KINDS["byte fallback"], [3 + 0xF0, 3 + 0x9F]) == ["", "", "�"]


def test_the_leading_blank_goes_only_at_the_start_of_a_text() -> None:
    tokenizer = KINDS["byte fallback"]
    ids = tokenizer.encode("ab ab")
    assert tokenizer.decode(ids) == "ab ab"
    after = Detokenizer(tokenizer, at_start=False)
    assert after.push(ids) + after.flush() == " ab ab"


def test_special_tokens_and_names() -> None:
    tokenizer = Tokenizer(byte_level(), {"eos_token": "<|end|>", "bos_token": {"content": "<|start|>"}})
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("<|end|>", "<|start|>", None)
    assert tokenizer.special_ids == {tokenizer.bos_id, tokenizer.eos_id}
    ids = tokenizer.encode("<|start|>hi<think more><|end|>")
    assert ids[0] == tokenizer.bos_id
    assert tokenizer.decode(ids) == "hi<think more>"
    assert tokenizer.token_bytes(10**6) == b""


def test_a_lone_surrogate_is_the_request_s_fault() -> None:
    with pytest.raises(RequestError, match="surrogate at character 2"):
        KINDS["byte level"].encode("ab\ud83d")


def test_a_long_stream_costs_the_same_per_token() -> None:
    tokenizer = KINDS["byte level"]
    stream, ids = Detokenizer(tokenizer), tokenizer.encode("x " * 20)
    text = "".join(stream.push(ids) for _ in range(2000))
    assert text == "x " * 40_000
    assert stream._utf8.getstate()[0] == b""


@kinds
@pytest.mark.parametrize("special", [False, True])
def test_a_long_text_is_encoded_like_a_short_one(kind: str, special: bool) -> None:
    text = "".join(TEXTS) * 100
    assert KINDS[kind].encode(text, special) == LIBRARY[kind].encode(text, add_special_tokens=special).ids


def test_a_long_text_lets_other_threads_run() -> None:
    """Otherwise a body of 8 MiB stops a server for seconds, probes and all."""
    left, turns = threading.Event(), 0

    def count() -> None:
        nonlocal turns
        while not left.wait(0.0001):
            turns += 1

    other = threading.Thread(target=count)
    other.start()
    turns = 0
    KINDS["byte level"].encode("".join(TEXTS) * 2000)
    seen = turns
    left.set()
    other.join()
    assert seen > 10


def test_from_a_folder(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(3)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(tmp_path, vocab_size=1000)
    assert len(tokenizer.encode("a b c d e f")) > 3
    with pytest.raises(CheckpointError, match="embeds ids below 100"):
        load_tokenizer(tmp_path, vocab_size=100)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|nowhere|>"}))
    with pytest.raises(CheckpointError, match="eos_token"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b'{"version": "1.0"}', b"[]", b"\xff\xfe"])
def test_a_damaged_file_gives_one_sentence(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is damaged") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_not_implemented_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"tokenizer.model"):
        load_tokenizer(tmp_path)
    made = byte_level()
    made.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedModel, match="WordPiece"):
        Tokenizer(made, {})

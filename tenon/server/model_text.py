"""The text side of a model, for the HTTP process: tokenizer, chat template, the model's own sampling defaults."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tenon.engine.grammar import Compiler, Vocabulary
from tenon.models.embedding import EmbeddingSpec, read_embedding
from tenon.models.generation import GenerationDefaults, read_generation
from tenon.models.hf_config import read_config
from tenon.models.template import Renderer, load_templates
from tenon.models.tokenizer import Detokenizer, Tokenizer, is_thinking, load_tokenizer
from tenon.server.text import Thought
from tenon.server.tools import Dialect, dialect_of

_log = logging.getLogger("tenon.server")


@dataclass(frozen=True)
class ModelText:
    """``generation``: what the model's makers recommend, used where a request says nothing; ``embedding``: how they
    make embeddings."""

    tokenizer: Tokenizer
    renderer: Renderer
    generation: GenerationDefaults
    grammars: Compiler
    embedding: EmbeddingSpec
    long_texts: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while a very long text is tokenised."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Ids of a text; ``special`` adds what the model wants around a plain one. Raises ``RequestError``."""
        return self.tokenizer.encode(text, add_special=special)

    def spellings(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Each word as tokens, at the start of a text and after a blank."""
        return self.tokenizer.spellings(words)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a prompt given as ids."""
        return self.tokenizer.decode(ids)

    def detokenizer(self, prompt: Sequence[int], keep: Sequence[str] = ()) -> Detokenizer:
        """An incremental decoder for what follows ``prompt``. ``keep``: special tokens that stay in the text."""
        kept = frozenset(token for name in keep if (token := self.tokenizer.token_id(name)) is not None)
        return Detokenizer(self.tokenizer, at_start=not prompt, keep=kept)

    @cached_property
    def dialect(self) -> Dialect | None:
        """How the model writes calls of tools, as its template tells."""
        sources = self.renderer.templates.sources
        return dialect_of(self.renderer.templates.choose(tools=True)) if sources else None

    def thought(self, prompt: Sequence[int]) -> Thought | None:
        """Of an answer to ``prompt``, for a model that thinks between tokens of its own."""
        think = self.tokenizer.think
        return Thought(think, begun=is_thinking(prompt, think)) if think is not None else None

    def token_text(self, token: int) -> str:
        """A token's name in log-probabilities: its text or, where its bytes are none, those, so that names differ."""
        found = self.tokenizer.token_bytes(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def token_bytes(self, token: int) -> bytes:
        """The token's exact bytes."""
        return self.tokenizer.token_bytes(token)

    async def render(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
    ) -> str:
        """The chat as one text that ends where the answer begins. Raises ``RequestError``."""
        return await self.renderer.render_async(
            messages, add_generation_prompt=add_generation_prompt, tools=tools, variables=variables
        )

    def close(self) -> None:
        """End the processes that render and compile."""
        self.renderer.close()
        self.grammars.close()


def load_model_text(folder: Path) -> ModelText:
    """Reads ``folder``. Raises ``CheckpointError`` naming the file that is damaged or missing."""
    spec = read_config(folder)
    tokenizer = load_tokenizer(folder, spec.vocab_size)
    generation, embedding = read_generation(folder, spec), read_embedding(folder, spec)
    for warning in generation.warnings:
        _log.warning("%s", warning)
    renderer = Renderer(load_templates(folder))
    renderer.check()
    grammars = Compiler(Vocabulary(str(folder), spec.vocab_size, generation.eos_ids))
    return ModelText(tokenizer, renderer, generation, grammars, embedding)

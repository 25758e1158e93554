"""What may be asked of an embedding, whoever asks."""

from __future__ import annotations

from tenon.base.errors import RequestError
from tenon.engine.messages import Add, Embed
from tenon.models.embedding import POOLINGS, EmbeddingSpec


def wanted(spec: EmbeddingSpec, dimensions: int | None) -> Embed:
    """As the model's makers pool, cut to ``dimensions``. Raises ``RequestError``: more than there are, or a pooling
    that is not implemented."""
    if spec.refusal is not None:
        raise RequestError(f"this model's embeddings are not supported: {spec.refusal}", code="unsupported")
    if dimensions is not None and not 1 <= dimensions <= spec.width:
        said = f"dimensions must be from 1 to {spec.width}, the width of this model, got {dimensions}"
        raise RequestError(said, param="dimensions", code="invalid_value")
    return Embed(spec.pooling, spec.normalize, dimensions or 0)


def check_embed(add: Add) -> None:
    """A request that embeds asks for nothing else. Raises ``RequestError`` naming the field."""
    embed = add.embed
    if embed is None:
        return
    if embed.pooling not in POOLINGS or embed.dimensions < 0:
        said = f"embed must pool by one of {', '.join(POOLINGS)} to at least 0 dimensions, got {embed}"
        raise RequestError(said, param="embed", code="invalid_value")
    if add.max_tokens != 0 or add.n != 1 or add.outputs or add.prompt_logprobs >= 0:
        said = "embed generates and scores nothing: it needs max_tokens 0, n 1, no outputs and no prompt_logprobs"
        raise RequestError(said, param="embed", code="invalid_value")

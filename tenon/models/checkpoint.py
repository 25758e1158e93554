"""Hugging Face checkpoints <-> ``Decoder``.

A checkpoint's tensors and the decoder's differ in grouping: q, k and v are rows of one ``qkv``, gate and up of one
``gate_up``, a layer's experts lie in two tensors. ``layout(spec)`` says, for each name a checkpoint may hold, which
part of which parameter it is. Loading checks every header against it before it allocates, then copies tensor by tensor
out of the mapped files: memory peaks at one copy of the weights. Only safetensors are read; nothing is unpickled and no
code of a checkpoint is run.

A decoder that was saved alone, as embedding models are, has names without ``model.`` and mostly no output layer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from tenon.base.errors import CheckpointError, UnsupportedModel
from tenon.models.decoder import Decoder
from tenon.models.hf_config import read_config
from tenon.models.metadata import read_object
from tenon.models.safetensors_file import SHARD_NAME, SafetensorsFile, write_safetensors
from tenon.models.spec import ModelSpec

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
HEAD: Final = "lm_head.weight"
COMPUTE: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED: Final = frozenset({"F32", "BF16", "F16"})
INERT: Final = re.compile(r"(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Old checkpoints carry the rotary frequencies, which follow from the config."""
PICKLED: Final = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Part:
    """Where a checkpoint's tensor goes: rows ``[start, start + shape[0])`` of ``parameter``, or of its ``expert``.

    ``whole`` marks the layout in which one tensor holds all experts; a checkpoint has one or the other.
    """

    parameter: str
    shape: tuple[int, ...]
    start: int = 0
    expert: int | None = None
    whole: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The view of ``parameter`` that this part fills."""
        target = parameter if self.expert is None else parameter[self.expert]
        return target[self.start : self.start + self.shape[0]]


def layout(spec: ModelSpec) -> dict[str, Part]:
    """Every name that a checkpoint of ``spec`` may hold, with its part of the decoder."""
    d, q, kv = spec.hidden_size, spec.q_size, spec.kv_size
    parts = {
        "model.embed_tokens.weight": Part("embed.weight", (spec.vocab_size, d)),
        "model.norm.weight": Part("norm.weight", (d,)),
    }
    if not spec.tie_embeddings:
        parts["lm_head.weight"] = Part("lm_head.weight", (spec.vocab_size, d))
    for i in range(spec.n_layers):
        hf, own = f"model.layers.{i}.", f"layers.{i}."
        attn = hf + "self_attn."
        parts[hf + "input_layernorm.weight"] = Part(own + "attn_norm.weight", (d,))
        parts[hf + "post_attention_layernorm.weight"] = Part(own + "mlp_norm.weight", (d,))
        for name, start, rows in (("q", 0, q), ("k", q, kv), ("v", q + kv, kv)):
            parts[f"{attn}{name}_proj.weight"] = Part(own + "qkv.weight", (rows, d), start)
            if spec.qkv_bias:
                parts[f"{attn}{name}_proj.bias"] = Part(own + "qkv.bias", (rows,), start)
        parts[attn + "o_proj.weight"] = Part(own + "out.weight", (d, q))
        if spec.o_bias:
            parts[attn + "o_proj.bias"] = Part(own + "out.bias", (d,))
        if spec.qk_norm:
            for name in ("q_norm", "k_norm"):
                parts[f"{attn}{name}.weight"] = Part(f"{own}{name}.weight", (spec.head_dim,))
        parts.update(_sparse(spec, hf, own) if spec.is_sparse(i) else _dense(spec, hf, own))
    return parts


def _dense(spec: ModelSpec, hf: str, own: str) -> dict[str, Part]:
    d, f = spec.hidden_size, spec.intermediate_size
    parts = {
        hf + "mlp.gate_proj.weight": Part(own + "mlp.gate_up.weight", (f, d)),
        hf + "mlp.up_proj.weight": Part(own + "mlp.gate_up.weight", (f, d), f),
        hf + "mlp.down_proj.weight": Part(own + "mlp.down.weight", (d, f)),
    }
    if spec.mlp_bias:
        parts[hf + "mlp.gate_proj.bias"] = Part(own + "mlp.gate_up.bias", (f,))
        parts[hf + "mlp.up_proj.bias"] = Part(own + "mlp.gate_up.bias", (f,), f)
        parts[hf + "mlp.down_proj.bias"] = Part(own + "mlp.down.bias", (d,))
    return parts


def _sparse(spec: ModelSpec, hf: str, own: str) -> dict[str, Part]:
    moe = spec.moe
    if moe is None:
        raise ValueError("a sparse layer needs spec.moe")
    d, f, n = spec.hidden_size, moe.intermediate_size, moe.n_experts
    mixtral = spec.family == "mixtral"
    block = hf + ("block_sparse_moe." if mixtral else "mlp.")
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    parts = {block + "gate.weight": Part(own + "mlp.router.weight", (n, d))}
    for e in range(n):
        parts[f"{block}experts.{e}.{gate}.weight"] = Part(own + "mlp.gate_up", (f, d), 0, e)
        parts[f"{block}experts.{e}.{up}.weight"] = Part(own + "mlp.gate_up", (f, d), f, e)
        parts[f"{block}experts.{e}.{down}.weight"] = Part(own + "mlp.down", (d, f), 0, e)
    parts[hf + "mlp.experts.gate_up_proj"] = Part(own + "mlp.gate_up", (n, 2 * f, d), whole=True)
    parts[hf + "mlp.experts.down_proj"] = Part(own + "mlp.down", (n, d, f), whole=True)
    if mixtral:  # what transformers 5 calls the router when it saves without converting back
        parts[hf + "mlp.gate.weight"] = Part(own + "mlp.router.weight", (n, d), whole=True)
    return parts


def open_files(folder: Path) -> dict[str, SafetensorsFile]:
    """The file of each tensor of the checkpoint in ``folder``, sharded or not, every header checked.

    Raises ``CheckpointError`` for a file that is missing or damaged and for a tensor that two files hold, and
    ``UnsupportedModel`` where there are only pickled weights.
    """
    if (folder / WEIGHTS).exists():
        file = SafetensorsFile(folder / WEIGHTS)
        return dict.fromkeys(file.entries, file)
    index = folder / INDEX
    if not index.exists():
        raise _no_weights(folder)
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names", subject="weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{index}: tensor {name[:200]!r} is said to be in {shard!r:.120}; a shard is a plain file name ending "
                f"in .safetensors",
                subject=name,
            )
    where: dict[str, SafetensorsFile] = {}
    for shard in sorted(set(weight_map.values())):
        file = SafetensorsFile(folder / shard)
        for name in file.entries:
            if name in where:
                raise CheckpointError(f"tensor {name!r} is in both {where[name].path} and {file.path}", subject=name)
            where[name] = file
    for name, shard in weight_map.items():
        if name not in where or where[name].path.name != shard:
            raise CheckpointError(f"{folder / shard} has no tensor {name!r}, which {INDEX} says it has", subject=name)
    return where


def _no_weights(folder: Path) -> CheckpointError:
    if not folder.is_dir():
        return CheckpointError(f"{folder} is not a folder", subject=str(folder))
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
    if pickled:
        return UnsupportedModel(
            f"{folder} has its weights in {pickled[0]}, a pickle, which can run code when it is read; Tenon reads "
            f"{WEIGHTS} only: convert it first",
            subject=pickled[0],
        )
    return CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}", subject=str(folder))


def iter_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and read-only views of all tensors of a checkpoint, as stored. Raises as ``open_files``."""
    for name, file in open_files(folder).items():
        yield name, file.tensor(name)


def compute_dtype(name: str) -> torch.dtype:
    """The torch type of a spec's type name."""
    return COMPUTE[name]


def _is_alone(files: dict[str, SafetensorsFile]) -> bool:
    """Whether the files hold a decoder that was saved without what is around it."""
    return "embed_tokens.weight" in files


def _renamed(parts: dict[str, Part]) -> dict[str, Part]:
    """The layout of a decoder alone."""
    return {name.removeprefix("model."): part for name, part in parts.items()}


def load_decoder(
    folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", spec: ModelSpec | None = None
) -> Decoder:
    """The checkpoint in ``folder`` as a decoder of ``dtype`` (the config's own where ``None``) on ``device``.

    ``spec`` saves reading ``config.json`` again. Raises ``CheckpointError``, naming tensor and file, for a tensor that
    is missing, unknown, given twice, or of a wrong shape or type; nothing is allocated before all of that holds.
    """
    spec = spec or read_config(folder)
    files = open_files(folder)
    parts, has_head = layout(spec), True
    if _is_alone(files):
        parts = _renamed(parts)
        has_head = spec.tie_embeddings or HEAD in files
        if not has_head:
            del parts[HEAD]
    used = _check(spec, parts, files, folder)
    decoder = empty_decoder(spec, dtype or compute_dtype(spec.dtype), device, has_head=has_head)
    parameters = dict(decoder.named_parameters())
    with torch.no_grad():
        for name in used:
            part = parts[name]
            part.of(parameters[part.parameter]).copy_(files[name].tensor(name))
    return decoder


def _check(spec: ModelSpec, parts: dict[str, Part], files: dict[str, SafetensorsFile], folder: Path) -> list[str]:
    """The names to copy, in the files' order. Raises unless each parameter is given once and whole."""
    for name, file in files.items():
        if INERT.fullmatch(name):
            continue
        if name == HEAD and spec.tie_embeddings:
            _check_tied(files)
            continue
        if name not in parts:
            raise CheckpointError(f"{file.path}: tensor {name!r} is not part of a {spec.family} model", subject=name)
        entry, right = file.entries[name], parts[name].shape
        if entry.shape != right:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} has shape {list(entry.shape)}; the config makes it {list(right)}",
                subject=name,
            )
        if entry.dtype not in STORED:
            raise UnsupportedModel(
                f"{file.path}: tensor {name!r} is stored as {entry.dtype}; implemented are {', '.join(sorted(STORED))}",
                subject=name,
            )
    used = [name for name in files if name in parts]
    whole = {parts[name].parameter: name for name in used if parts[name].whole}
    for name, part in parts.items():
        given = name in files
        other = whole.get(part.parameter)
        if part.whole or (other is not None and not given):
            continue
        if other is not None:
            raise CheckpointError(f"{folder} holds the same weights as {name!r} and as {other!r}", subject=name)
        if not given:
            raise CheckpointError(f"{folder}: tensor {name!r} is missing from the weights", subject=name)
    return used


def _check_tied(files: dict[str, SafetensorsFile]) -> None:
    """A tied output layer that is stored all the same must be the embedding: else config or weights are wrong."""
    head = files[HEAD]
    name = "embed_tokens.weight" if _is_alone(files) else "model.embed_tokens.weight"
    embed = files.get(name)
    if embed is not None and not torch.equal(head.tensor(HEAD), embed.tensor(name)):
        raise CheckpointError(
            f"{head.path}: tensor 'lm_head.weight' differs from the embedding although the config says "
            f"tie_word_embeddings; set it to false or drop the tensor",
            subject=HEAD,
        )


def empty_decoder(
    spec: ModelSpec, dtype: torch.dtype, device: str | torch.device = "cpu", *, has_head: bool = True
) -> Decoder:
    """A decoder whose weights are allocated once and not set."""
    with torch.device("meta"):
        decoder = Decoder(spec).to(dtype)
    decoder.has_head = has_head
    shares = spec.tie_embeddings or not has_head
    if shares:
        decoder.lm_head.register_parameter("weight", None)  # else it would be allocated as a second tensor
    decoder.to_empty(device=device)
    if shares:
        decoder.lm_head.weight = decoder.embed.weight
    return decoder


def random_decoder(
    spec: ModelSpec, seed: int, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Decoder:
    """A decoder without a checkpoint: same spec, seed and type, same weights. For benchmarks and tests.

    Matrices are normal with variance 1/inputs, those that write to the residual stream smaller by sqrt(2 L)
    (Radford et al. 2019), norms 1, biases small: activations stay of order one at any depth.
    """
    decoder = empty_decoder(spec, dtype or compute_dtype(spec.dtype), device)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
                continue
            std = 0.02 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            if re.search(r"\.(out|down)\b", name):
                std /= math.sqrt(2 * spec.n_layers)
            drawn = torch.empty(parameter.shape, dtype=dtype or parameter.dtype).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)
    return decoder


def save_weights(decoder: nn.Module, spec: ModelSpec, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write ``folder/model.safetensors`` with the names that Hugging Face gives the parts, in ``dtype`` if given.

    ``config.json`` is not touched. Raises ``ResourceError``.
    """
    parameters = dict(decoder.named_parameters())
    tensors = {name: part.of(parameters[part.parameter]) for name, part in layout(spec).items() if not part.whole}
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"}, dtype)

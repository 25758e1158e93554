"""``generation_config.json``: what a model's makers recommend for sampling, and where it ends.

A field is honoured, known to mean nothing here, or reported in ``warnings``: none is dropped in silence. Only what the
file says is used; the library's own implicit defaults (such as ``top_k`` 50) are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tenon.models.hf_config import Fields
from tenon.models.metadata import read_object, token_ids
from tenon.models.spec import ModelSpec

FILE_NAME: Final = "generation_config.json"

NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "typical_p": (1,), "top_h": (),
    "epsilon_cutoff": (0,), "eta_cutoff": (0,), "encoder_repetition_penalty": (1,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "bad_words_ids": ([],), "renormalize_logits": (False,),
    "forced_bos_token_id": (), "forced_eos_token_id": (), "suppress_tokens": ([],), "begin_suppress_tokens": ([],),
    "sequence_bias": ({}, []), "guidance_scale": (1,), "watermarking_config": (), "min_length": (0,),
    "min_new_tokens": (0,), "diversity_penalty": (0,), "penalty_alpha": (0,), "num_return_sequences": (1,),
    "exponential_decay_length_penalty": (), "constraints": (), "force_words_ids": (), "dola_layers": (),
    "max_time": (), "token_healing": (False,), "stop_strings": ([],), "use_mtp": (False,),
}  # fmt: skip
"""Fields that change the tokens and are not honoured, with the values besides null under which they change nothing."""

INERT: Final = frozenset(
    {
        "transformers_version", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "max_length",
        "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
        "early_stopping", "length_penalty", "remove_invalid_values", "decoder_start_token_id", "pad_token_id",
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "compile_config", "disable_compile",
        "continuous_batching_config", "low_memory", "prefill_chunk_size", "trust_remote_code",
    }
)  # fmt: skip
"""Speed, memory and the shape of answers; beams' own settings, which matter only where ``num_beams`` is reported."""

READ: Final = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens"}
) | {
    "eos_token_id",
    "bos_token_id",
}


@dataclass(frozen=True)
class GenerationDefaults:
    """What applies where a request says nothing; ``None`` leaves the matter to the server.

    ``temperature`` is 0 (greedy) where the file says ``do_sample: false``. ``warnings`` are sentences for the log.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    eos_ids: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    def sampling(self) -> dict[str, float | int]:
        """The recommendations by the names that ``SamplingParams`` has."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def read_generation(folder: Path, spec: ModelSpec) -> GenerationDefaults:
    """The defaults of the checkpoint in ``folder``; those of the spec alone where it has no such file.

    Its end tokens win over ``config.json``'s. Raises ``CheckpointError`` for a damaged file or a value out of range.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return GenerationDefaults(eos_ids=spec.eos_ids)
    return parse_generation(read_object(path), spec, str(path))


def parse_generation(raw: Mapping[str, Any], spec: ModelSpec, where: str = FILE_NAME) -> GenerationDefaults:
    """What a parsed ``generation_config.json`` says; ``where`` names the file. Raises as above."""
    fields = Fields(raw, where)
    warnings = [
        f"{where}: {name} = {value!r:.80} is not implemented and has no effect"
        for name, value in raw.items()
        if value is not None
        and not (name in READ or name in INERT or name.startswith("_"))
        and not (name in NEUTRAL and any(value == neutral for neutral in NEUTRAL[name]))
    ]
    greedy = raw.get("do_sample") is not None and not fields.flag("do_sample", False)
    temperature = fields.maybe("temperature", least=0.0, most=100.0)
    top_k = None if raw.get("top_k") is None else fields.integer("top_k", least=-1)
    max_new = None if raw.get("max_new_tokens") is None else fields.integer("max_new_tokens")
    eos = raw.get("eos_token_id")
    return GenerationDefaults(
        temperature=0.0 if greedy else temperature,
        top_k=top_k,
        top_p=fields.maybe("top_p", least=1e-9, most=1.0),
        min_p=fields.maybe("min_p", least=0.0, most=1.0),
        repetition_penalty=fields.maybe("repetition_penalty", least=1e-9, most=10.0),
        max_new_tokens=max_new,
        eos_ids=spec.eos_ids if eos is None else token_ids(eos, "eos_token_id", where, spec.vocab_size),
        warnings=tuple(warnings),
    )

"""What a scheduler has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Counters:
    """Only ever grow."""

    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Of prompts, as far as they were not computed for the request: found resident, or shared while pending."""
    pending_tokens: int = 0
    """In blocks that another running sequence computed while this one held them and waited."""
    output_tokens: int = 0
    holes: int = 0
    """Of requests as they came in: runs that had to be computed although what comes after them was not."""
    preemptions: int = 0
    started: int = 0
    finished: dict[str, int] = field(default_factory=dict)

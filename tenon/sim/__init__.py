"""Virtual time: a heap of events and what came of them as pictures."""

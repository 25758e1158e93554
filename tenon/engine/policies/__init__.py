"""Decisions of the engine as pure objects: no torch, no clock, no socket. A baseline is a policy too."""

"""What computes a ``Step``: torch (the reference), hash (no model at all). Each is imported where it is chosen."""

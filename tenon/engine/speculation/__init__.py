"""Speculative decoding: drafters guess what comes next as trees of tokens, one step of the target verifies them."""

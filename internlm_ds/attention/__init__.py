"""Causal attention over the segments of a packed micro-batch: borders, backends, and the choice among them."""

"""The parity ladder: a tiny model trained on every layout that so many ranks allow, against one process."""

"""Reading InternLM's Python configurations: `load` gives typed values, the origin of each, and all problems."""

from internlm_ds.config.loader import Loaded, load

__all__ = ["Loaded", "load"]

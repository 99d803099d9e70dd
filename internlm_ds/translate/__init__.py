"""InternLM's words to DeepSpeed's: `translate(spec)` gives the JSON and a note on every key."""

from internlm_ds.translate.deepspeed import Translation, examine, translate
from internlm_ds.translate.provenance import Note

__all__ = ["Note", "Translation", "examine", "translate"]

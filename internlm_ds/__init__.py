"""internlm-ds: train InternLM configurations, data sets and checkpoints, unchanged, on DeepSpeed.

Importing this package does nothing: no environment writes, no probing, no heavy imports.
"""

__version__ = "0.1.0"

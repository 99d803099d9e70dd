"""A run on paper: `describe` computes it, `render` shows it."""

from internlm_ds.plan.report import Plan, as_json, describe, render

__all__ = ["Plan", "as_json", "describe", "render"]

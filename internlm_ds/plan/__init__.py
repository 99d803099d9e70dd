"""A run on paper: `describe` computes it, `render` shows it, `render_timeline` draws its pipeline."""

from internlm_ds.plan.report import Plan, as_json, describe, render
from internlm_ds.plan.timeline import render_timeline

__all__ = ["Plan", "as_json", "describe", "render", "render_timeline"]

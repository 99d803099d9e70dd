"""`internlm-ds plan`: the door to `plan`. A page of text, or JSON."""

from __future__ import annotations

import argparse
import json
import sys

from internlm_ds.cli.convert_config import add_run_arguments, world_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="an InternLM Python configuration")
    add_run_arguments(parser)
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="the plan as JSON")
    output.add_argument("--timeline", action="store_true", help="draw the pipeline's step below the plan")


def run(args: argparse.Namespace) -> int:
    from internlm_ds import plan, runspec
    from internlm_ds.translate import translate

    spec = runspec.resolve(args.config, overrides=args.set, world_size=world_size(args))
    translation = translate(spec, overlays=args.overlay)
    found = plan.describe(spec, translation)
    for warning in (*spec.warnings, *translation.warnings):
        print(f"warning: {warning}", file=sys.stderr)
    if args.json:
        sys.stdout.write(json.dumps(plan.as_json(found), indent=2, allow_nan=False) + "\n")
    else:
        sys.stdout.write(plan.render(found))
        if args.timeline:
            sys.stdout.write("\n" + plan.render_timeline(spec))
    return 0

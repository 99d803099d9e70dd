"""`internlm-ds verify` with a fault: the shards of the head are not flagged as such. Started by `test_verify`."""

import argparse
import sys

from internlm_ds.cli import verify


def drop_flag(engine) -> None:
    for name, parameter in engine.logical_parameters():
        if name == "head.weight" and hasattr(parameter, "tensor_model_parallel"):
            del parameter.tensor_model_parallel


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    verify.add_arguments(parser)
    sys.exit(verify.run(parser.parse_args(), tamper=drop_flag))

"""Alpaca data to bin/meta, with the tutorial's arguments; the same engine as `internlm-ds preprocess alpaca`.

python preprocessing/alpaca_tokenizer.py alpaca_data.json OUTPUT tokenizer_internlm.model --split_ratio 0.1
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from internlm_ds.cli.main import guarded
from internlm_ds.cli.preprocess_sft import add_alpaca_options, run_alpaca


def main() -> int:
    parser = argparse.ArgumentParser(description="tokenize Alpaca records for fine-tuning", allow_abbrev=False)
    parser.add_argument("dataset", metavar="DATASET", help="one JSON list of records, or .jsonl (also .gz, .zst)")
    parser.add_argument("output", metavar="OUTPUT", help="folder; train/en and valid/en are made in it")
    parser.add_argument("tokenizer", metavar="TOKENIZER", help="sentencepiece model")
    add_alpaca_options(parser)
    args = parser.parse_args()
    return guarded(lambda: run_alpaca(args))


if __name__ == "__main__":
    sys.exit(main())

"""Text files to bin/meta, with the tutorial's flags; the same engine as `internlm-ds preprocess text`.

python preprocessing/tokenizer.py --text_input_path raw_data.txt --bin_output_path cn/output.bin
"""

import argparse
import sys
from pathlib import Path

# Path of your sentencepiece model, absolute or relative to this folder; --tokenizer and $INTERNLM_DS_TOKENIZER win over
# it. Left empty, V7_sft.model or tokenizer_internlm.model in this folder is used.
TOKENIZER = ""

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # a checkout works without being installed

from internlm_ds.cli.main import guarded  # noqa: E402
from internlm_ds.cli.preprocess_text import add_text_options, run_text  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description="tokenize text files into a bin and its meta", allow_abbrev=False)
    about = ".txt, .json or .jsonl, also .gz or .zst; several files or globs"
    parser.add_argument("--text_input_path", nargs="+", required=True, dest="inputs", metavar="IN", help=about)
    about = "the bin to write, in a folder named cn, en, code, ja, ar or kaoshi"
    parser.add_argument("--bin_output_path", required=True, dest="output", metavar="OUT.bin", help=about)
    add_text_options(parser)
    args = parser.parse_args()
    return guarded(lambda: run_text(args, constant=TOKENIZER, folder=HERE))


if __name__ == "__main__":
    sys.exit(main())

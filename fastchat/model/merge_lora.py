"""Merge an adapter into its base: one model folder and, on request, GGUF files for llama.cpp.

python3 fastchat/model/merge_lora.py --base_model ./base --lora_weights ./output \\
    --output_dir ./merged --gguf Q8_0
"""

import argparse
import logging
import time
import warnings
from pathlib import Path

from llama_lora.cli import one_line_errors
from llama_lora.options import Help, file_size

GGUF_KINDS = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add(
        "--base_model",
        type=Path,
        required=True,
        help="folder of the 16-bit base, even if the adapter was trained on it in 8 or 4 bits",
    )
    add("--lora_weights", type=Path, required=True, help="adapter folder")
    add("--output_dir", type=Path, required=True, help="folder to write; it appears once complete")
    add(
        "--dtype",
        choices=["auto", "float16", "bfloat16", "float32"],
        default="auto",
        help="dtype of the written weights; auto keeps the base's 16-bit dtype, and writes float32 "
        "as float16",
    )
    add(
        "--max_shard_size",
        type=file_size,
        default="5GB",
        help="largest size of one weights file; about as much memory is needed",
    )
    add(
        "--gguf",
        nargs="+",
        choices=GGUF_KINDS,
        default=[],
        metavar="KIND",
        help=f"also write a GGUF file of each kind: {', '.join(GGUF_KINDS)}",
    )
    add("--overwrite", action="store_true", help="replace the model in --output_dir")
    return parser.parse_args()


@one_line_errors
def main(args: argparse.Namespace) -> None:
    import torch

    from llama_lora.hardware.device import dtype_name
    from llama_lora.weights.hf_writer import check_target
    from llama_lora.weights.merge_lora import merge

    warnings.simplefilter("ignore")  # the libraries' are for developers
    logging.getLogger("transformers").setLevel(logging.ERROR)
    started = time.monotonic()
    check_target(args.output_dir, args.overwrite)
    written = merge(
        args.base_model,
        args.lora_weights,
        args.output_dir,
        dtype=None if args.dtype == "auto" else getattr(torch, args.dtype),
        max_shard_size=args.max_shard_size,
        kinds=tuple(dict.fromkeys(args.gguf)),
        overwrite=args.overwrite,
    )
    print(
        f"wrote {args.output_dir}: {written.parameters / 1e6:,.1f} M parameters in "
        f"{dtype_name(written.dtype)}, {written.bytes / 1e9:.2f} GB in {written.files} file(s), "
        f"{time.monotonic() - started:.0f} s"
    )
    for file in sorted(args.output_dir.glob("*.gguf")):
        print(f"wrote {file}: {file.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main(parse_args())

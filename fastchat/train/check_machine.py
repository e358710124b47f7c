"""Try everything that training needs on this machine, and say how to get what is missing.

python3 fastchat/train/check_machine.py
python3 fastchat/train/check_machine.py --cards     # the table of docs/cards.md
"""

import argparse
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # it also runs where this project is not installed yet


def parse_args() -> argparse.Namespace:
    from llama_lora.options import Help, between

    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="Exits with 0 if training can run, and with 1 if it cannot.",
        formatter_class=Help,
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), help="folder for runs; its free disk is reported"
    )
    parser.add_argument(
        "--seconds",
        type=between(0, 3600),
        help="time to train a tiny base, ten steps at least (default: 20 on a card, 5 on a CPU)",
    )
    parser.add_argument(
        "--cards", action="store_true", help="print the tables of cards and libraries, and exit"
    )
    args = parser.parse_args()
    if not args.folder.is_dir():
        parser.error(f"argument --folder: no such folder: {args.folder}")
    return args


def main(args: argparse.Namespace) -> int:
    from llama_lora.cli import one_line_errors

    return one_line_errors(report)(args)


def report(args: argparse.Namespace) -> int:
    """Print what is found and how to fix it; returns the exit code."""
    from llama_lora.check_machine.screen import lines
    from llama_lora.hardware import cards, kernel_images

    if args.cards:
        print(cards.markdown_table(), kernel_images.markdown_table(), sep="\n\n")
        return 0
    logging.disable(logging.WARNING)  # the findings say what the libraries would warn of
    findings = []
    for finding in try_all(args):
        findings.append(finding)
        print(f"{finding.mark:4} {finding.what:11} {finding.found}", flush=True)
    tell_remedies(findings)
    told = verdict(findings)
    print(f"\n{told}\n", *lines(findings, told, ROOT), sep="\n")
    return int(any(finding.stops for finding in findings))


def try_all(args: argparse.Namespace):
    """The findings; a training is tried only if nothing rules it out."""
    from llama_lora.check_machine.checks import examine, learning

    ready = True
    for finding in examine(ROOT / "requirements.txt", args.folder):
        ready = ready and not finding.stops
        yield finding
    if ready:
        yield learning(args.seconds)


def tell_remedies(findings) -> None:
    """One line for each thing that a command can fix."""
    remedies = [finding for finding in findings if finding.remedy]
    if remedies:
        print("\nTo get what is missing:")
    for finding in remedies:
        print(f"  {finding.what}: {finding.remedy}")


def verdict(findings) -> str:
    """Whether training can run, and how."""
    if stopped := [finding.what for finding in findings if finding.stops]:
        return f"Training cannot run here yet: {', '.join(stopped)}"
    from llama_lora.hardware.device import compute_dtype, dtype_name, resolve_quantization

    quantization, _ = resolve_quantization("auto")
    return f"Training can run here: {quantization} base, {dtype_name(compute_dtype())}"


if __name__ == "__main__":
    sys.exit(main(parse_args()))

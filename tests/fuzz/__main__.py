"""Random cases by hand: ``python -m tests.fuzz --seeds 1000``, or ``--start 17 --seeds 1`` for one again."""

import argparse
import time
import warnings

import tests.conftest  # noqa: F401  timm, and Triton's interpreter

from .networks import draw, failures, smallest


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that long")
    parser.add_argument("--whole", action="store_true", help="print failing cases as drawn, not made smaller")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    end, tried, failed = time.monotonic() + 60 * arguments.minutes, 0, []
    for seed in range(arguments.start, arguments.start + arguments.seeds):
        if time.monotonic() > end:
            break
        tried += 1
        spec = draw(seed)
        if found := failures(spec):
            failed.append(seed)
            if not arguments.whole:
                spec, found = smallest(spec)
            print(f"{spec}\n    " + "\n    ".join(found[:4]), flush=True)
    print(f"{tried} cases, {len(failed)} differ from stock: {failed}")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())

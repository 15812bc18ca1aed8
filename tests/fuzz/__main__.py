"""Random cases, by request for as long as one likes; see tests/fuzz/runner.py.

python -m tests.fuzz --minutes 60                           operators, command lines and kills in turn
python -m tests.fuzz --minutes 5 --only kills --seed 7
python -m tests.fuzz --minutes 30 --only kills --processes 2
python -m tests.fuzz --only operators --case 123456         one case again
"""

from __future__ import annotations

import argparse
import secrets
import sys

from tests.fuzz.runner import TARGETS, Worker, fuzz, serve


def main() -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__, formatter_class=raw)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="which cases (default: drawn, and printed)")
    parser.add_argument("--only", choices=TARGETS)
    parser.add_argument("--case", type=int, help="run one case of --only")
    parser.add_argument("--processes", type=int, default=1, help="of each run that is killed (default: 1)")
    parser.add_argument("--serve", choices=TARGETS, help=argparse.SUPPRESS)  # the fuzzer's own processes
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.processes)
        return 0
    if arguments.case is not None:
        if arguments.only is None:
            parser.error("--case needs --only")
        with Worker(arguments.only, arguments.processes) as worker:
            finding = worker.run(arguments.case)
        print(finding or "nothing found")
        return bool(finding)
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    targets = [arguments.only] if arguments.only else list(TARGETS)
    return bool(fuzz(targets, seconds=60 * arguments.minutes, seed=seed, processes=arguments.processes))


if __name__ == "__main__":
    sys.exit(main())

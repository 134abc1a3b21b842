"""What ``import pyro_ae`` takes beside ``import pyro``, each in a process of its own.

python tests/benchmarks/imports.py --repeats 15
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time


def seconds(package: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {package}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    for package in ("pyro", "pyro_ae"):
        seconds(package)  # so that files are cached
    pairs = [(seconds("pyro"), seconds("pyro_ae")) for _ in range(repeats)]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    print(f"import pyro {theirs:.2f} s, import pyro_ae {ours:.2f} s; ratio {statistics.median(ratios):.2f}", end=" ")
    print(f"({ratios[0]:.2f}-{ratios[-1]:.2f})")


if __name__ == "__main__":
    main()

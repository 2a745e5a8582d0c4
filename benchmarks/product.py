"""The former name of `python -m benchmarks.skinny_gemm`."""

import sys

from benchmarks.skinny_gemm import main

if __name__ == "__main__":
    print("python -m benchmarks.product is called python -m benchmarks.skinny_gemm now.", file=sys.stderr)
    sys.exit(main())

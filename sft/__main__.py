"""`python -m sft` is the command `sft`; torchrun starts it so."""

import sys

from sft.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

"""Look at this machine: python scripts/doctor.py"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout that is not installed

from sft.cli.doctor import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

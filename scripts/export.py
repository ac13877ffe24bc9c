"""Export a trained run and compare each export with it: python scripts/export.py run=outputs/<run> export=gguf"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout that is not installed

from sft.cli.export import main
from sft.threads import spin_briefly

spin_briefly()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

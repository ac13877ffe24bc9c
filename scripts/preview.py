"""Show what a run would train on: python scripts/preview.py model=llama3_8b dataset=ruozhiba"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout that is not installed

from sft.cli.preview import main
from sft.threads import spin_briefly

spin_briefly()

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

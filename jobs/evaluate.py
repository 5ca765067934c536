"""Score adapters as a Ray job; takes what ``covray evaluate`` takes.

ray job submit --working-dir . -- python jobs/evaluate.py --data CHAINS --adapter RUN --out EVAL
python jobs/evaluate.py --data CHAINS --adapter RUN --out EVAL    # the same on this machine
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evaluate")
    main()

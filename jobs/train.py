"""Train an adapter as a Ray job; takes what ``covray train`` takes.

ray job submit --working-dir . -- python jobs/train.py --scale 7b --backbone LVM --data CHAINS --out RUN --workers 32
python jobs/train.py --scale nano --data CHAINS --out RUN         # the same on this machine
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()

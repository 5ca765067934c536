"""Sweep over chain lengths, pairs and methods as a Ray job; takes what ``covray sweep`` takes.

ray job submit --working-dir . -- python jobs/sweep.py --config configs/paper/sweep.yaml --manifest PAIRS --out SWEEP
python jobs/sweep.py --config configs/sweep/nano.yaml --data CHAINS --out SWEEP       # the same on this machine
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "sweep")
    main()

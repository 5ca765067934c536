"""Build chains as a Ray job; takes what ``covray build`` takes.

ray job submit --working-dir . -- python jobs/build_chains.py --manifest PAIRS --out CHAINS --length 4,8
python jobs/build_chains.py --manifest PAIRS --out CHAINS            # the same on this machine
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "build")
    main()

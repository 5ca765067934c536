"""Answer over HTTP as a Ray job; takes what ``covray serve`` takes.

ray job submit --no-wait --working-dir . -- python jobs/serve.py --adapter RUN
python jobs/serve.py --adapter RUN    # the same on this machine
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "serve")
    main()

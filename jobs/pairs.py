"""Make pairs as a Ray job; takes what ``covray pairs`` takes.

ray job submit --working-dir . -- python jobs/pairs.py photos s3://bucket/photos --actors 64 --out s3://bucket/pairs.parquet
python jobs/pairs.py photos PHOTOS --out pairs.parquet    # the same on this machine
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "pairs")
    main()

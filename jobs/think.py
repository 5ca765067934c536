"""Take features, train an aligner or evaluate it as a Ray job; takes what ``covray think`` takes.

ray job submit --working-dir . -- python jobs/think.py features --data MANIFEST --vlm VLM --out FEATURES
ray job submit --working-dir . -- python jobs/think.py train --data FEATURES --language-model T5 --out RUN --workers 4
ray job submit --working-dir . -- python jobs/think.py evaluate --config paper/thinkdiff-cobsat --aligner RUN --out EVAL
"""

import sys

from covray.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "think")
    main()

"""``python -m covray`` is ``covray``."""

from covray.cli import main

if __name__ == "__main__":
    main()

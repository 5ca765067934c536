"""The programme of ``covray experiments thinking``: ThinkDiff on rendered portraits, from nothing to the table."""

"""Statistics over results: leaderboards, paired differences, comparisons and training cost."""

"""BFCL, the Berkeley Function Calling Leaderboard, scored by its own package in an environment of its own."""

"""`fastppo plan`: whether a run fits in memory, and what would help."""

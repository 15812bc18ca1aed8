"""A package, so that `python -m tests.fuzz` finds this folder: other libraries install one of the same name."""

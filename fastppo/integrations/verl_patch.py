"""Importing this patches verl: for VERL_USE_EXTERNAL_MODULES, which verl imports in each of its processes."""

from fastppo.integrations.verl import patch

patch()

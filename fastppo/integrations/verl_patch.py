"""Importing this module patches verl; VERL_USE_EXTERNAL_MODULES lets verl import it in each of its processes."""

from fastppo.integrations.verl import patch

patch()

"""`fastppo plan`: whether a run fits in memory, and what would help."""

from fastppo.training.plan.page import page
from fastppo.training.plan.plan import Machine, Plan, machine_of, plan

__all__ = ["Machine", "Plan", "machine_of", "page", "plan"]

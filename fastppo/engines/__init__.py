"""The backends behind the operators, and the choice among them."""

"""Programs that print a table and write JSON; `results/` holds what was measured, and where."""

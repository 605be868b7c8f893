"""Weights that come and go: policies, blocks that stream, budgets and plans."""

"""What a run minimises; `base.Objective` is the contract, plugins add theirs by `register_objectives`."""

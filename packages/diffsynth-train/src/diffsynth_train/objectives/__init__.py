"""Training objectives (losses). `base.Objective` is the contract; plugins declare theirs by `register_objectives`."""

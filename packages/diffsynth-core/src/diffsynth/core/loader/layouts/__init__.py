"""Published layouts: reading them, going back to them, and what other tools put beside their weights."""

"""What the conformance suite checks, by the kind of declaration it looks at."""

"""From files to modules: find, read the header, recognise, plan, load."""

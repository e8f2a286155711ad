"""Every figure that the README and docs state, one command each."""

"""The model token by token: a cache of keys and values, and the choice of the next token."""

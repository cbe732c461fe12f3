"""The configuration: schema, merging, the key table."""

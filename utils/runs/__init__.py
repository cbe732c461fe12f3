"""What a command does, from the configuration to the report."""

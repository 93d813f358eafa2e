"""The decoder: configuration, layers, parameters. A family is a configuration."""

"""Models by name: local directories, the embedded one, the package registry, the hub."""

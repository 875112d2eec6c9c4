"""Models by name: local directories, the embedded model, the package registry, the hub."""

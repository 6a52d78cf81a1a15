"""The conformance table: what the library does with many models and layers, on each backend."""

"""The tables of README and docs: a module for the results of each benchmark."""

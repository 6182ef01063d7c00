"""Plans: a module's forward and backward pass, traced once into two flat functions.

`trace` records them, `graph` simplifies and compiles them, `independence` proves which of them may run on a few samples
at a time, `watch` notices when what a plan was made for has changed, and `run` holds them and runs them.
"""

"""A differential fuzzer: whatever a model does, training it with quantised activations has to do the same.

`cases` says what a case is and how one is compared with the stock model, `corpus` holds the named cases (each a
defect that was once found), `pieces` and `networks` make random ones, `found` holds those that once failed, and `known`
lists what is known to fail.
`python -m tests.fuzz --seeds 1000` runs random cases by hand; a case's seed reproduces it.
"""

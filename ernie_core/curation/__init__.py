"""From a pile of pictures to a training set: a manifest of rows, to which every stage adds columns.

`manifest` reads and writes rows, `engines` runs a stage over them (here, in worker processes, on a Ray cluster), and
every other file here is a stage or reads what stages have made.
"""

"""Files <-> arrays under the official parameter names; the only room of the package that reads checkpoints.

`load` finds a checkpoint and builds its modules, `convert` writes it in the native layout, `inspect` describes
any tensor file. Below them: `files` and `pickles` read headers, `layouts` renames and turns, `shapes` reads
dimensions off tensors, `identify` says which released model a file belongs to.
"""

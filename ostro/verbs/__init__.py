"""What each verb of the command line takes, and whom it asks; `cli` names them.

Each imports what it needs when it runs, so that `ostro --help` is instant.
"""

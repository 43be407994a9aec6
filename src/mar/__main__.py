"""`python -m mar`: the `mar` command where its script is not on the path."""

from mar.cli import main

if __name__ == "__main__":
    main()

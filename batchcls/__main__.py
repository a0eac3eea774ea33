"""`python -m batchcls` is the `batchcls` command, also where its console script is not on the PATH."""

from batchcls.cli.main import main

if __name__ == "__main__":
    main()

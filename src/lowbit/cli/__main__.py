"""`python -m lowbit.cli`."""

from lowbit.cli.main import main

if __name__ == "__main__":
    main()
